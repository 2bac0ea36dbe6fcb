"""CIFAR-10 and CIFAR-100 in the files in which they are published; downloaded where they are missing."""

import socket
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import download_and_extract_archive

from image_sets.folders import FoundImages

CIFAR10_STATISTICS = ((0.4916, 0.4823, 0.4467), (0.2472, 0.2437, 0.2618))  # mean and std, as in the paper's code
DOWNLOAD_TIMEOUT = 60.0  # seconds for which a server may be silent


def find_cifar(dataset: type[CIFAR10], folder: Path, download: bool) -> FoundImages:
    """The images of CIFAR-10 or CIFAR-100, with whole files by their MD5 sums; statistics as in the paper's code.

    FileNotFoundError where a file in `folder` is missing or damaged, and is not to be or cannot be downloaded.
    """
    try:
        try:
            train = dataset(folder)
        except RuntimeError:  # it is missing, damaged, or being unpacked by another run, which is then waited for
            if not download:
                raise
            train = download_cifar(dataset, folder)
        test = dataset(folder, train=False)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = f"could not be downloaded: {error}" if download else str(error).partition(". ")[0]
        title = dataset.__name__.replace("R", "R-")
        raise FileNotFoundError(
            f"{title} is not in {folder}, or a file of it is damaged ({reason}): unpack {dataset.filename}"
            f" there, so that it holds the folder {dataset.base_folder}; the data set 'digits' needs no files"
        ) from error
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


def download_cifar(dataset: type[CIFAR10], folder: Path) -> CIFAR10:
    """The training images, downloaded and unpacked where they are not whole, by one process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    lock_file = folder / f"{dataset.__name__.lower()}.lock"
    with FileLock(lock_file):
        timeout = socket.getdefaulttimeout()
        try:
            with suppress(RuntimeError):
                return dataset(folder)
            socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision itself would wait for ever
            download_and_extract_archive(dataset.url, folder, filename=dataset.filename, md5=dataset.tgz_md5)
            return dataset(folder)
        finally:
            socket.setdefaulttimeout(timeout)
            with suppress(OSError):
                lock_file.unlink()  # last of all: who waits for it finds that it is gone, and makes a new one
