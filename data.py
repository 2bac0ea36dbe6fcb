"""Image sets, the split into training and validation images, and the batches.

The images of a set live once, as one uint8 tensor on the training device. A split is a vector of indices into it, and
a batch is one gather, one flip and one conversion of it.
"""

import math
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_md5, download_and_extract_archive

from seeds import make_complex
from settings import DATASETS

Batch = tuple[Tensor, Tensor]  # images and labels

CIFAR10_STATISTICS = ((0.4916, 0.4823, 0.4467), (0.2472, 0.2437, 0.2618))  # mean and std, as in the paper's code
DOWNLOAD_TIMEOUT = 60.0  # seconds for which a server may be silent


@dataclass
class ImageSet:
    """Labelled images and how they are split.

    Attributes:
        images: uint8 (N, 3, H, W).
        labels: int64 (N,), on the same device.
        splits: for 'train', 'val' and 'test' the indices into the two above, int64, on the same device.
        classes: the name of each label.
        flip: whether training images are mirrored left to right at random.
        mean, std: of the three channels of the training and validation images, on a scale from 0 to 1.
    """

    images: Tensor
    labels: Tensor
    splits: dict[str, Tensor]
    classes: list[str]
    flip: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def load_image_set(
    name: str, folder: Path | str = "images", device: torch.device | str = "cpu", *, download: bool = True
) -> ImageSet:
    """Load a data set onto a device.

    Args:
        name: 'cifar10' (60,000 photographs, 32×32, through torchvision) or 'digits' (1,797 handwritten digits, 8×8,
            which scikit-learn brings along).
        folder: where `cifar-10-batches-py` lies or shall lie; created where it is missing. 'digits' needs none.
        device: where the images shall live.
        download: whether to download CIFAR-10 into `folder` where it, or a file of it, is missing or damaged.

    Raises:
        ValueError: `name` is not in `DATASETS`.
        FileNotFoundError: CIFAR-10, or a file of it, is missing and is not to be or cannot be downloaded.
        NotADirectoryError: `folder` is a file.
        OSError: a file of CIFAR-10 is damaged and is not to be or cannot be downloaded anew.
    """
    if name not in DATASETS:
        raise ValueError(f"the data set must be one of {', '.join(DATASETS)}, not {name!r}")
    return load_cifar10(Path(folder), device, download) if name == "cifar10" else load_digits_image_set(device)


def load_cifar10(folder: Path, device: torch.device | str, download: bool) -> ImageSet:
    """CIFAR-10 with the statistics that the paper's code normalizes it with; see `load_image_set`."""
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file, where the folder of CIFAR-10's files should be")
    try:
        try:
            complete_train = CIFAR10(folder)
        except RuntimeError:  # it is missing, damaged, or being unpacked by another run, which is then waited for
            if not download:
                raise
            download_cifar10(folder)
            complete_train = CIFAR10(folder)
        test = CIFAR10(folder, train=False)
    except (OSError, RuntimeError, HTTPException) as error:
        faults = find_faults(folder)
        if not faults:
            raise
        attempt = f" and could not be downloaded ({error})" if download else ""
        raise describe_faults(folder, faults, attempt) from error
    mean, std = CIFAR10_STATISTICS
    images = np.concatenate([part.data.transpose(0, 3, 1, 2) for part in (complete_train, test)])
    labels = torch.tensor(complete_train.targets + test.targets)
    return ImageSet(
        images=torch.from_numpy(images).to(device),
        labels=labels.to(device),
        splits=split_indices(labels, len(complete_train), device),
        classes=complete_train.classes,
        flip=True,
        mean=mean,
        std=std,
    )


def download_cifar10(folder: Path) -> None:
    """Download and unpack CIFAR-10 where it is not whole, one process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    lock_file = folder / "cifar10.lock"
    with FileLock(lock_file):
        timeout = socket.getdefaulttimeout()
        try:
            if find_faults(folder):
                socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision itself would wait for ever
                download_and_extract_archive(CIFAR10.url, folder, filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
        finally:
            socket.setdefaulttimeout(timeout)
            with suppress(OSError):
                lock_file.unlink()  # last of all: who waits for it finds that it is gone, and makes a new one


def find_faults(folder: Path) -> dict[str, str]:
    """What is wrong with the files of CIFAR-10, by name; those that are whole are left out."""
    faults = {}
    for name, md5 in [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]:
        file = folder / CIFAR10.base_folder / name
        if not file.is_file():
            faults[name] = "missing"
        elif not check_md5(file, md5):
            faults[name] = "damaged (its MD5 sum is wrong)"
    return faults


def describe_faults(folder: Path, faults: dict[str, str], attempt: str) -> OSError:
    """The error for what `find_faults` has found, with what became of the `attempt` to download it."""
    if not (folder / CIFAR10.base_folder).is_dir():
        return FileNotFoundError(
            f"CIFAR-10 is not in {folder}{attempt}: unpack cifar-10-python.tar.gz there,"
            " so that it holds the folder cifar-10-batches-py, or use --dataset digits, which needs no files"
        )
    listed = ", ".join(f"{name} is {fault}" for name, fault in faults.items())
    error = FileNotFoundError if set(faults.values()) == {"missing"} else OSError
    return error(f"CIFAR-10 in {folder / CIFAR10.base_folder} is not whole{attempt}: {listed}; put a good copy there")


def load_digits_image_set(device: torch.device | str) -> ImageSet:
    """scikit-learn's handwritten digits in three equal channels, a fifth of them as test images; see `load_image_set`.

    The digits are not mirrored: a mirrored 2 is no digit.
    """
    digits = load_digits()
    complete_train, test = stratified_split(digits.target, test_size=0.2)
    order = np.concatenate([complete_train, test])
    grey = np.round(digits.images[order] * (255 / 16)).astype(np.uint8)  # ink is counted from 0 to 16
    seen = grey[: len(complete_train)] / 255
    labels = torch.from_numpy(digits.target[order]).long()
    return ImageSet(
        images=torch.from_numpy(grey).unsqueeze(1).repeat(1, 3, 1, 1).to(device),
        labels=labels.to(device),
        splits=split_indices(labels, len(complete_train), device),
        classes=[str(name) for name in digits.target_names],
        flip=False,
        mean=(float(seen.mean()),) * 3,
        std=(float(seen.std()),) * 3,
    )


def split_indices(labels: Tensor, num_complete_train: int, device: torch.device | str) -> dict[str, Tensor]:
    """Indices of the training, validation and test images, where the test images come last.

    A tenth of the first `num_complete_train` images, equally many of every class, is for validation.
    """
    train, val = stratified_split(labels[:num_complete_train].numpy(), test_size=0.1)
    parts = {"train": train, "val": val, "test": np.arange(num_complete_train, len(labels))}
    return {name: torch.from_numpy(indices).to(device) for name, indices in parts.items()}


def stratified_split(labels: np.ndarray, test_size: float) -> list[np.ndarray]:
    """Indices of two parts, the same whatever the seed of the run: drawn with seed 0, from a generator of its own."""
    return train_test_split(np.arange(len(labels)), test_size=test_size, stratify=labels, random_state=make_complex(0))


class Batches:
    """The batches of one split, anew at every iteration; the last one may be short.

    A batch is (images, labels), on the device of the set: float32 (n, 3, H, W), the pixels divided by 255 and, if
    `normalize`, normalized with the statistics of the set; int64 (n,).

    Those of 'train' are shuffled and, where the set allows it, mirrored. The numbers drawn from torch's global
    generator are those that the paper's code draws through torch's DataLoader, so order and flips are the same. Both go
    to the device before the first batch of an epoch, and nothing does after that.

    Args:
        image_set: the images.
        split: 'train', 'val' or 'test'.
        batch_size: number of images in a batch.
        normalize: whether to normalize with the statistics of the set (`input_norm` is 'dataset').

    Raises:
        ValueError: `split` is none of these.
    """

    def __init__(self, image_set: ImageSet, split: str, batch_size: int, normalize: bool) -> None:
        if split not in image_set.splits:
            raise ValueError(f"the split must be one of {', '.join(image_set.splits)}, not {split!r}")
        self.image_set = image_set
        self.indices = image_set.splits[split]
        self.training = split == "train"
        self.batch_size = batch_size
        self.normalize = normalize
        on_device = {"dtype": torch.float32, "device": self.indices.device}
        self.mean = torch.tensor(image_set.mean, **on_device).view(3, 1, 1)
        self.std = torch.tensor(image_set.std, **on_device).view(3, 1, 1)
        # a DataLoader of positions whose one batch is the whole order
        positions = range(len(self.indices))
        self.orders = DataLoader(positions, len(positions), shuffle=self.training, collate_fn=torch.tensor)

    @property
    def num_images(self) -> int:
        """The number of images in the split."""
        return len(self.indices)

    def __len__(self) -> int:
        return math.ceil(self.num_images / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        [order] = self.orders
        order = self.indices[order.to(self.indices.device)]
        flipped = None
        if self.training and self.image_set.flip:
            # the paper's code draws once an image; torch.rand(n) draws the same numbers as n times torch.rand(1)
            flipped = (torch.rand(self.num_images) < 0.5).to(order.device).view(-1, 1, 1, 1)
        for start in range(0, self.num_images, self.batch_size):
            part = slice(start, start + self.batch_size)
            images = self.image_set.images.index_select(0, order[part])  # ten times as fast as images[order] on a CPU
            if flipped is not None:
                images = torch.where(flipped[part], images.flip(-1), images)
            images = images.float().div_(255)
            if self.normalize:
                images = images.sub_(self.mean).div_(self.std)
            yield images, self.image_set.labels[order[part]]
