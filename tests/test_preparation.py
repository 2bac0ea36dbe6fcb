"""What is checked before a training."""

import random
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

import train
from command_line.flag_types import SettingError
from run_settings import Settings
from saved_runs.results import read_results
from seeds import make_deterministic
from trained_networks import load_network
from training.trial import check_network

ONE_EPOCH = ["--dataset", "digits", "--num_epochs", "1", "--device", "cpu"]


def check(network: nn.Module, height: int, width: int, batch_size: int = 4, num_train: int = 8) -> None:
    """`check_network` for so many images of three classes."""
    settings = Settings(network="own:picky", dataset="flowers", batch_size=batch_size)
    splits = {"train": torch.arange(num_train)}
    image_set = SimpleNamespace(splits=splits, classes=["a", "b", "c"], size=(height, width))
    with (
        patch("training.trial.check_state"),
        patch("training.trial.find_seed_problem", return_value=None),
    ):  # which would build the network anew
        check_network(settings, network, image_set)


class Picky(nn.Module):
    """Computes logits of images whose sides are divisible by 7, in batches of more than one, and draws numbers."""

    def __init__(self, logits: Callable[[torch.Tensor], Any] = lambda logits: logits) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm2d(3)
        self.logits = logits

    def forward(self, images: torch.Tensor) -> Any:
        assert self.training
        random.random(), np.random.rand(), torch.rand(3)
        if images.shape[2] % 7 or images.shape[3] % 7:
            raise ValueError("sides must be\ndivisible by 7")
        if len(images) == 1:
            raise ValueError("one image")
        return self.logits(self.batch_norm(images).mean((2, 3)))


def test_a_network_is_tried_and_left_as_it_is():
    network = Picky().eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    make_deterministic(3)
    numbers = random.random(), np.random.rand(), torch.rand(1)
    make_deterministic(3)
    check(network, 7, 14)
    with pytest.raises(SettingError) as error:
        check(network, 7, 20)
    assert str(error.value) == (
        "network: own:picky cannot train on two images of 7×20 pixels: ValueError: sides must be divisible by 7"
    )
    assert (random.random(), np.random.rand(), torch.rand(1)) == numbers and not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("logits", "what"),
    [
        (lambda logits: logits[:, :2], r"\(2, 2\)"),
        (lambda logits: (logits, logits), "tuple"),
    ],
)
def test_what_is_no_logits(logits, what):
    with pytest.raises(SettingError, match=rf"computes {what} for 2 images, not logits \(2, 3\)"):
        check(Picky(logits), 7, 7)


def test_network_that_starts_with_nan():
    with pytest.raises(SettingError, match="own:picky computes values that are not finite before its first step"):
        check(Picky(lambda logits: logits * torch.nan), 7, 7)


def test_last_batch_of_one():
    check(Picky(), 7, 7, batch_size=3, num_train=8)
    without_batch_norm = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    check(without_batch_norm, 7, 7, batch_size=3, num_train=7)  # it can train on one
    with pytest.raises(
        SettingError, match=r"batch_size: 3 leaves a last batch of one .* cannot train on one: ValueError: one image"
    ):
        check(Picky(), 7, 7, batch_size=3, num_train=7)


def test_more_in_a_batch_than_there_are():
    with pytest.raises(SettingError, match="batch_size: flowers has 8 training images, fewer than a batch of 9"):
        check(Picky(), 7, 7, batch_size=9)


def test_network_that_cannot_be_copied():
    network = Picky()
    network.weight = nn.Parameter(torch.ones(3)) * 2
    with pytest.raises(SettingError, match="own:picky cannot be copied: RuntimeError: Only Tensors created"):
        check(network, 7, 7)


class WithMore(nn.Module):
    """A network whose `state_dict` holds more than finite tensors."""

    def __init__(self, num_classes: int, more: Any) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.layers = nn.Sequential(*layers, nn.Linear(8, num_classes))
        self.register_buffer("mask", torch.full((2,), -torch.inf))
        self.more = more

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)

    def get_extra_state(self) -> Any:
        return self.more

    def set_extra_state(self, state: Any) -> None:
        assert state == self.more


def test_state_of_more_than_finite_tensors_is_saved_resumed_and_loaded(few_digits, tmp_path, monkeypatch):
    more = {"version": 3, "names": ["a", "b"]}
    module = SimpleNamespace(network=lambda num_classes: WithMore(num_classes, more))
    monkeypatch.setitem(sys.modules, "with_more", module)
    flags = [*ONE_EPOCH, "--network", "with_more:network", "--path", str(tmp_path), "--name", "x"]
    train.main([*flags, "--scheduler", "none"])
    train.main([*flags, "--scheduler", "none", "--num_epochs", "2"])
    file = tmp_path / "results" / "x.csv"
    assert read_results(file).num_epochs == 2
    network = load_network(file)
    assert network[1].more == more and network[1].mask.isneginf().all()


def test_state_that_cannot_be_loaded_again_is_refused(few_digits, tmp_path, monkeypatch):
    module = SimpleNamespace(network=lambda num_classes: WithMore(num_classes, np.random.default_rng(0)))
    monkeypatch.setitem(sys.modules, "with_more", module)
    settings = Settings(dataset="digits", network="with_more:network", path=tmp_path, batch_size=16, device="cpu")
    with pytest.raises(SettingError, match="with_more:network cannot be saved and resumed: UnpicklingError"):
        train.train(settings)
