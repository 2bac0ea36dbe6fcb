"""Few images and a small network, for tests of what does not depend on their size, in this process and in others."""

import hashlib
import pickle
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets
from sklearn import datasets
from sklearn.datasets import load_digits
from sklearn.utils import Bunch
from torch import Tensor, nn

import run_settings
import train
from batch_norm import ScaleBatchNorm2d
from command_line.flag_types import FlagError, SettingError
from experiment.making import Outcome
from run_settings import Settings
from training import preparation
from training.run import Run

STOP = KeyboardInterrupt(signal.SIGINT)  # as Ctrl-C raises it


def load_few_digits() -> Bunch:
    """200 of the digits: 144 to train on, 16 for validation, 40 for the test. A ResNet-18 takes a second an epoch."""
    digits = load_digits()
    digits.images, digits.target = digits.images[:200], digits.target[:200]
    return digits


class SmallNetwork(nn.Sequential):
    """With a `forward` of its own: torch 2.11 does not compile that of `nn.Sequential`."""

    def forward(self, images: Tensor) -> Tensor:
        for layer in self:
            images = layer(images)
        return images


def construct_small_network(
    network_name: str, num_classes: int, dataset: str, bn_weight: float = 1.0, *_: Any, **__: Any
) -> nn.Module:
    """One layer of each kind that matters, for digits, in place of `networks.construct_network`."""
    layers = [nn.Conv2d(3, 8, 3), ScaleBatchNorm2d(8, bn_weight=bn_weight), nn.ReLU(), nn.Flatten()]
    return SmallNetwork(ScaleBatchNorm2d(3, bn_weight=bn_weight), *layers, nn.Linear(8 * 6 * 6, num_classes))


class StochasticDepth(nn.Module):
    """A layer that training skips at random, by a draw from Python's own generator."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, images: Tensor) -> Tensor:
        return images if self.training and random.random() < 0.5 else images + self.layer(images)


def stochastic_depth(num_classes: int) -> nn.Module:
    """A network of one's own for digits: `--network small:stochastic_depth`."""
    layers = [StochasticDepth(nn.Conv2d(8, 8, 3, padding=1)) for _ in range(2)]
    first, last = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()], nn.Linear(8 * 6 * 6, num_classes)
    return nn.Sequential(*first, *layers, nn.Flatten(), last)


def prepared(flags: list[str]) -> Settings:
    """The settings of a run, complete and checked."""
    return preparation.prepare(run_settings.parse(flags))


def train_small() -> None:
    """Let every further run of this process take a few digits and the small network."""
    datasets.load_digits = load_few_digits
    preparation.construct_network = construct_small_network


def make_run_here(settings: Settings, experiment: str, **_: str) -> Outcome:
    """In place of `making.make_run`, without a process of its own: so, a test can change what the run does."""
    try:
        return train.train(settings)
    except SettingError as error:
        return FlagError(f"argument --{error.name}: {error.problem}")
    except KeyboardInterrupt as stop:
        return stop.args[0]


def stop_in_epoch(epoch_to_stop: int, monkeypatch, error: BaseException = STOP) -> None:
    """Let the run stop within an epoch, when its weights have moved on already."""
    whole_epoch = Run.steps

    def part_of_epoch(run, batches):
        yield from whole_epoch(run, batches)
        if batches.training and run.epochs[0] == epoch_to_stop:
            raise error

    monkeypatch.setattr(Run, "steps", part_of_epoch)


def write_pickle(file: Path, content: dict) -> list[str]:
    """Write a file of CIFAR; returns its name and MD5 sum, as torchvision lists them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(content))
    return [file.name, hashlib.md5(file.read_bytes()).hexdigest()]


def write_small_cifar10(folder: Path, set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Write random images in the files of CIFAR-10: 45 to train on, 5 for validation, 15 for the test."""
    batches = folder / "cifar-10-batches-py"
    generator = np.random.default_rng(0)

    def images(number: int) -> dict:
        labels = [n % 5 for n in range(number)]
        return {"data": generator.integers(0, 256, (number, 3072), dtype=np.uint8), "labels": labels}

    cifar10 = torchvision.datasets.CIFAR10
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    set_attribute(cifar10, "train_list", [write_pickle(batches / f"data_batch_{n}", images(10)) for n in range(1, 6)])
    set_attribute(cifar10, "test_list", [write_pickle(batches / "test_batch", images(15))])
    _, meta_md5 = write_pickle(batches / "batches.meta", {"label_names": names})
    set_attribute(cifar10, "meta", {**cifar10.meta, "md5": meta_md5})
