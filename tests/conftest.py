"""Small image sets, so that a whole training takes a second."""

import os
import signal
import socket
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: tests run side by side, each with a thread of its own

import hypothesis
import numpy as np
import pytest
import torchvision.datasets
from sklearn import datasets

import small
import trained_networks
from command_line.signals import STOP_SIGNALS
from experiment import making
from image_sets import cifar
from training import preparation

hypothesis.settings.register_profile("machines of any speed", deadline=None)
hypothesis.settings.load_profile("machines of any speed")


@pytest.fixture(autouse=True, scope="session")
def no_signal_is_ignored():
    """Under nohup or in the background of a script, some are, and child processes would inherit that."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)  # the tests go on as before; a child process starts with the default


@pytest.fixture
def few_digits(monkeypatch):
    """Train on 144 digits."""
    monkeypatch.setattr(datasets, "load_digits", small.load_few_digits)


@pytest.fixture
def small_network(few_digits, monkeypatch):
    """Train a small network on them."""
    monkeypatch.setattr(preparation, "construct_network", small.construct_small_network)
    monkeypatch.setattr(trained_networks, "construct_network", small.construct_small_network)


@pytest.fixture
def runs_here(monkeypatch):
    """The runs of an experiment are made in threads of this process."""
    monkeypatch.setattr(making, "make_run", small.make_run_here)


@pytest.fixture
def small_cifar10(tmp_path, monkeypatch) -> Path:
    """A folder with random images in the files of CIFAR-10: 45 to train on, 5 for validation, 15 for the test."""
    folder = tmp_path / "images"
    small.write_small_cifar10(folder, monkeypatch.setattr)
    return folder


@pytest.fixture
def small_cifar100(tmp_path, monkeypatch) -> Path:
    """A folder with random images of four classes in the files of CIFAR-100: 40 to train on and 4 for the test."""
    folder = tmp_path / "images"
    files = folder / "cifar-100-python"
    generator = np.random.default_rng(0)

    def images(number: int) -> dict:
        labels = [n % 4 for n in range(number)]
        values = generator.integers(0, 256, (number, 3072), dtype=np.uint8)
        return {"data": values, "fine_labels": labels, "coarse_labels": [0] * number}

    cifar100 = torchvision.datasets.CIFAR100
    names = {"fine_label_names": ["apple", "bee", "cloud", "dolphin"], "coarse_label_names": ["thing"]}
    monkeypatch.setattr(cifar100, "train_list", [small.write_pickle(files / "train", images(40))])
    monkeypatch.setattr(cifar100, "test_list", [small.write_pickle(files / "test", images(4))])
    monkeypatch.setattr(cifar100, "meta", {**cifar100.meta, "md5": small.write_pickle(files / "meta", names)[1]})
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """Every download fails."""

    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(cifar, "download_and_extract_archive", fail)


@pytest.fixture
def forbidden_network(monkeypatch):
    """Every attempt to download fails the test."""

    def fail(*_, **__):
        pytest.fail("there was an attempt to use the network")

    monkeypatch.setattr(cifar, "download_and_extract_archive", fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
