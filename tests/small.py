"""Few images and a small network, for tests of what does not depend on their size, in this process and in others."""

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets
from sklearn.datasets import load_digits
from sklearn.utils import Bunch
from torch import nn

import data
import train
from batch_norm import ScaleBatchNorm2d


def load_few_digits() -> Bunch:
    """200 of the digits: 144 to train on, 16 for validation, 40 for the test. A ResNet-18 takes a second an epoch."""
    digits = load_digits()
    digits.images, digits.target = digits.images[:200], digits.target[:200]
    return digits


def construct_small_network(
    network_name: str, num_classes: int, dataset: str, bn_weight: float = 1.0, *_: Any, **__: Any
) -> nn.Module:
    """One layer of each kind that matters, for digits, in place of `networks.construct_network`."""
    layers = [nn.Conv2d(3, 8, 3), ScaleBatchNorm2d(8, bn_weight=bn_weight), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(ScaleBatchNorm2d(3, bn_weight=bn_weight), *layers, nn.Linear(8 * 6 * 6, num_classes))


def train_small() -> None:
    """Let every further run of this process take a few digits and the small network."""
    data.load_digits = load_few_digits
    train.construct_network = construct_small_network


def write_small_cifar10(folder: Path, set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Write random images in the files of CIFAR-10: 45 to train on, 5 for validation, 15 for the test."""
    batches = folder / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    generator = np.random.default_rng(0)

    def write(name: str, content: dict) -> str:
        (batches / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((batches / name).read_bytes()).hexdigest()

    def images(number: int) -> dict:
        labels = [n % 5 for n in range(number)]
        return {"data": generator.integers(0, 256, (number, 3072), dtype=np.uint8), "labels": labels}

    cifar10 = torchvision.datasets.CIFAR10
    meta = {"label_names": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]}
    train_list = [[name := f"data_batch_{n}", write(name, images(10))] for n in range(1, 6)]
    set_attribute(cifar10, "train_list", train_list)
    set_attribute(cifar10, "test_list", [["test_batch", write("test_batch", images(15))]])
    set_attribute(cifar10, "meta", {**cifar10.meta, "md5": write("batches.meta", meta)})
