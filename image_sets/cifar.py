"""CIFAR-10 and CIFAR-100 in the files in which they are published; downloaded where they are missing."""

import socket
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_md5, download_and_extract_archive

from image_sets.folders import FoundImages

CIFAR10_STATISTICS = ((0.4916, 0.4823, 0.4467), (0.2472, 0.2437, 0.2618))  # mean and std, as in the paper's code
DOWNLOAD_TIMEOUT = 60.0  # seconds for which a server may be silent
TITLES = {CIFAR10: "CIFAR-10", CIFAR100: "CIFAR-100"}


def find_cifar(dataset: type[CIFAR10], folder: Path, download: bool) -> FoundImages:
    """The images of CIFAR-10 or CIFAR-100; the statistics of CIFAR-10 are those of the paper's code.

    Args:
        dataset: torchvision's class for it.
        folder: where its folder lies or shall lie; created where it is missing.
        download: whether to download it where it, or a file of it, is missing or damaged.

    Raises:
        FileNotFoundError: it, or a file of it, is missing and is not to be or cannot be downloaded.
        NotADirectoryError: `folder` is a file.
        OSError: a file of it is damaged and is not to be or cannot be downloaded anew.
    """
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file, where the folder of {TITLES[dataset]}'s files should be")
    try:
        try:
            train = dataset(folder)
        except RuntimeError:  # it is missing, damaged, or being unpacked by another run, which is then waited for
            if not download:
                raise
            download_cifar(dataset, folder)
            train = dataset(folder)
        test = dataset(folder, train=False)
    except (OSError, RuntimeError, HTTPException) as error:
        faults = find_faults(dataset, folder)
        if not faults:
            raise
        attempt = f" and could not be downloaded ({error})" if download else ""
        raise describe_faults(dataset, folder, faults, attempt) from error
    images = np.concatenate([part.data.transpose(0, 3, 1, 2) for part in (train, test)])
    return FoundImages(
        images=torch.from_numpy(images),
        labels=train.targets + test.targets,
        classes=train.classes,
        num_train=len(train),
        folder=folder / dataset.base_folder,
        files=[folder / dataset.base_folder / name for name, _ in dataset.train_list],
        statistics=CIFAR10_STATISTICS if dataset is CIFAR10 else None,
    )


def download_cifar(dataset: type[CIFAR10], folder: Path) -> None:
    """Download and unpack it where it is not whole, one process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    lock_file = folder / f"{TITLES[dataset].replace('-', '').lower()}.lock"
    with FileLock(lock_file):
        timeout = socket.getdefaulttimeout()
        try:
            if find_faults(dataset, folder):
                socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision itself would wait for ever
                download_and_extract_archive(dataset.url, folder, filename=dataset.filename, md5=dataset.tgz_md5)
        finally:
            socket.setdefaulttimeout(timeout)
            with suppress(OSError):
                lock_file.unlink()  # last of all: who waits for it finds that it is gone, and makes a new one


def find_faults(dataset: type[CIFAR10], folder: Path) -> dict[str, str]:
    """What is wrong with its files, by name; those that are whole are left out."""
    faults = {}
    for name, md5 in [*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])]:
        file = folder / dataset.base_folder / name
        if not file.is_file():
            faults[name] = "missing"
        elif not check_md5(file, md5):
            faults[name] = "damaged (its MD5 sum is wrong)"
    return faults


def describe_faults(dataset: type[CIFAR10], folder: Path, faults: dict[str, str], attempt: str) -> OSError:
    """The error for what `find_faults` has found, with what became of the `attempt` to download it."""
    title, place = TITLES[dataset], folder / dataset.base_folder
    if not place.is_dir():
        return FileNotFoundError(
            f"{title} is not in {folder}{attempt}: unpack {dataset.filename} there,"
            f" so that it holds the folder {dataset.base_folder}, or use --dataset digits, which needs no files"
        )
    listed = ", ".join(f"{name} is {fault}" for name, fault in faults.items())
    error = FileNotFoundError if set(faults.values()) == {"missing"} else OSError
    return error(f"{title} in {place} is not whole{attempt}: {listed}; put a good copy there")
