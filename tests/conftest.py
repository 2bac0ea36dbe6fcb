"""Small image sets, so that a whole training takes a second."""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: tests run side by side, each with a thread of its own

import hypothesis
import pytest

import data
import observations
import small
import train

hypothesis.settings.register_profile("machines of any speed", deadline=None)
hypothesis.settings.load_profile("machines of any speed")


@pytest.fixture
def few_digits(monkeypatch):
    """Train on 144 digits."""
    monkeypatch.setattr(data, "load_digits", small.load_few_digits)


@pytest.fixture
def small_network(few_digits, monkeypatch):
    """Train a small network on them."""
    monkeypatch.setattr(train, "construct_network", small.construct_small_network)
    monkeypatch.setattr(observations, "construct_network", small.construct_small_network)


@pytest.fixture
def small_cifar10(tmp_path, monkeypatch) -> Path:
    """A folder with random images in the files of CIFAR-10: 45 to train on, 5 for validation, 15 for the test."""
    folder = tmp_path / "images"
    small.write_small_cifar10(folder, monkeypatch.setattr)
    return folder
