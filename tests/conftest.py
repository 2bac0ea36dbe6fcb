"""Small image sets, so that a whole training takes a second."""

import hashlib
import os
import pickle
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: tests run side by side, each with a thread of its own

import hypothesis
import numpy as np
import pytest
import torchvision.datasets

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
    monkeypatch.setattr(cifar10, "train_list", train_list)
    monkeypatch.setattr(cifar10, "test_list", [["test_batch", write("test_batch", images(15))]])
    monkeypatch.setattr(cifar10, "meta", {**cifar10.meta, "md5": write("batches.meta", meta)})
    return folder
