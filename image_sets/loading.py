"""Image sets and their split into training, validation and test images.

The images of a set live once, as one uint8 tensor on the training device, or are streamed from their files where they
are large. A split is a vector of indices into them.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from image_sets.cifar import find_cifar
from image_sets.folders import FoundImages, Size, decode_all, find_images, identify, own_size
from image_sets.statistics import compute_statistics, keep_statistics
from image_sets.streaming import StreamedImages
from run_settings import DATASETS, LARGE_IMAGE, SMALL_IMAGE
from seeds import make_complex

CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}


@dataclass
class ImageSet:
    """Labelled images and how they are split.

    Attributes:
        images: uint8 (N, 3, H, W), or the images that are streamed.
        labels: int64 (N,), on the device on which batches are made.
        splits: for 'train', 'val' and 'test' the indices into the two above, int64, on that device.
        classes: the name of each label.
        flip: whether training images are mirrored left to right at random.
        image_hash: of the images of a folder, see `identify`.
        mean, std: of the three channels of the training and validation images, on a scale from 0 to 1, if known.
    """

    images: Tensor | StreamedImages
    labels: Tensor
    splits: dict[str, Tensor]
    classes: list[str]
    flip: bool
    image_hash: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def size(self) -> Size:
        """Height and width of an image."""
        return tuple(self.images.shape[2:]) if isinstance(self.images, Tensor) else self.images.size

    @property
    def numbers(self) -> str:
        """How many images and classes there are."""
        train, val, test = (len(self.splits[name]) for name in ("train", "val", "test"))
        images = f"{train:,} training, {val:,} validation and {test:,} test images"
        return f"{images} of {len(self.classes):,} classes"

    @property
    def notes(self) -> dict[str, str]:
        """What a result file says of the images: `numbers` and, if known, `mean`, `std` and `image_hash`."""
        notes = {"images": self.numbers}
        if self.mean:
            notes |= {"mean": " ".join(map(repr, self.mean)), "std": " ".join(map(repr, self.std))}
        return notes | ({"image_hash": self.image_hash} if self.image_hash else {})

    def sample(self, split: str, num_images: int) -> Tensor:
        """Indices of at most so many images of a split: the first ones, or evenly spread where classes come in turn."""
        indices = self.splits[split]
        in_turn = bool((self.labels[indices].diff() >= 0).all())
        number = min(num_images, len(indices))
        return indices[torch.linspace(0, len(indices) - 1, number).long()] if in_turn else indices[:number]

    def take(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """For each vector of indices its images as they are for evaluation, uint8 (n, 3, H, W), on the device."""
        if isinstance(self.images, Tensor):
            for part in parts:
                yield self.images.index_select(0, part)  # ten times as fast as images[part] on a CPU
        else:
            for batch in self.images.batches([(index, None) for index in part.tolist()] for part in parts):
                yield batch.to(self.labels.device, non_blocking=True)


def load_image_set(
    name: str,
    folder: Path | str = "images",
    device: torch.device | str = "cpu",
    *,
    image_size: int | None = None,
    flip: bool = True,
    split_seed: int = 0,
    workers: int | None = None,
    download: bool = True,
    statistics: bool = True,
    report: Callable[[str], None] = lambda line: None,
    show_bar: bool = False,
) -> ImageSet:
    """Load a data set, its pixels onto a device where they are small enough to be kept.

    Args:
        name: 'cifar10' (60,000 photographs of 10 classes, 32×32, through torchvision), 'cifar100' (as many, of 100
            classes), 'digits' (1,797 handwritten digits, 8×8, which scikit-learn brings along); any other name is that
            of a folder of images, see `find_images`.
        folder: where these folders lie. 'digits' needs none.
        device: where images and labels shall live.
        image_size: height and width to which images are resized and cropped. By default they stay as they are where all
            are alike and at most `SMALL_IMAGE` pixels high and wide, and get `LARGE_IMAGE` pixels where not. Up to
            `SMALL_IMAGE` pixels, they are decoded once and kept; above, streamed, and augmented for training.
        flip: whether training images may be mirrored left to right. Digits never are.
        split_seed: seed with which the validation images are drawn; of 'digits', the test images too. The paper's is 0.
        workers: how many threads or, where images are streamed, processes decode them; by default torch's threads.
        download: whether to download CIFAR into `folder` where it, or a file of it, is missing or damaged.
        statistics: whether mean and standard deviation are needed; see `keep_statistics`.
        report: called with a line of text where these cannot be kept, or files in the folder are left out.
        show_bar: whether to draw a progress bar on standard error while images are decoded.

    Raises:
        ValueError: a file is not an image, the folder is not as `find_images` needs it, or it has a known set's name.
        FileNotFoundError: there is no such data set, or a part of it is missing (or damaged) and cannot be downloaded.
        OSError: a file cannot be read.
    """
    folder, device = Path(folder), torch.device(device)
    found = find(name, folder, download, split_seed, report)
    flip = flip and found.flip
    workers = torch.get_num_threads() if workers is None else workers
    decoded = isinstance(found.images, Tensor)
    own = tuple(found.images.shape[2:]) if decoded else None if image_size else own_size(found.images)
    size = (image_size, image_size) if image_size else own or (LARGE_IMAGE, LARGE_IMAGE)
    contents = []
    if decoded and size == own:
        images = found.images.to(device)
    elif max(size) <= SMALL_IMAGE:
        images, contents = decode_all(found.images, size, max(workers, 1), show_bar)
        images = images.to(device)
    else:
        images = StreamedImages(found.images, size, flip, workers, pin_memory=device.type == "cuda")
    labels = torch.tensor(found.labels)
    splits = split_indices(labels, found.num_train, device, split_seed)
    image_hash = None if decoded else identify(found, contents)
    image_set = ImageSet(images, labels.to(device), splits, found.classes, flip, image_hash)
    if statistics:
        parts = torch.arange(found.num_train, device=device).split(100)
        compute = partial(compute_statistics, image_set.take(parts), found.num_train, show_bar)
        image_set.mean, image_set.std = found.statistics or keep_statistics(found, image_set.size, compute, report)
    return image_set


def find(name: str, folder: Path, download: bool, split_seed: int, report: Callable[[str], None]) -> FoundImages:
    """The images of a data set; see `load_image_set`."""
    if name in DATASETS and (folder / name / "train").is_dir():
        raise ValueError(f"{name} is a data set that is known already: give the folder {folder / name} another name")
    if name == "digits":
        return find_digits(split_seed)
    if name in CIFAR:
        return find_cifar(CIFAR[name], folder, download)
    if not (folder / name).is_dir():
        raise FileNotFoundError(f"there is no folder {folder / name}, and {name} is none of {', '.join(DATASETS)}")
    return find_images(folder / name, report)


def find_digits(split_seed: int) -> FoundImages:
    """scikit-learn's handwritten digits in three equal channels, a fifth of them, drawn with a seed, as test images."""
    from sklearn.datasets import load_digits  # takes a second to import, which not every start has to wait for

    digits = load_digits()
    complete_train, test = stratified_split(digits.target, 0.2, split_seed)
    order = np.concatenate([complete_train, test])
    grey = np.round(digits.images[order] * (255 / 16)).astype(np.uint8)  # ink is counted from 0 to 16
    seen = grey[: len(complete_train)] / 255
    return FoundImages(
        images=torch.from_numpy(grey).unsqueeze(1).repeat(1, 3, 1, 1),
        labels=digits.target[order].tolist(),
        classes=[str(name) for name in digits.target_names],
        num_train=len(complete_train),
        flip=False,  # a mirrored 2 is not a digit
        statistics=((float(seen.mean()),) * 3, (float(seen.std()),) * 3),
    )


def split_indices(
    labels: Tensor, num_complete_train: int, device: torch.device | str, split_seed: int
) -> dict[str, Tensor]:
    """Indices of the training, validation and test images, where the test images come last.

    A tenth of the first `num_complete_train` images is drawn for validation, in proportion to the classes.
    """
    try:
        train, val = stratified_split(labels[:num_complete_train].numpy(), 0.1, split_seed)
    except ValueError as error:
        raise ValueError(
            f"{num_complete_train} training images of {len(labels.unique())} classes are too few for a validation"
            " split: every class must have two, and a tenth of all must be enough for one of every class"
        ) from error
    parts = {"train": train, "val": val, "test": np.arange(num_complete_train, len(labels))}
    return {name: torch.from_numpy(indices).to(device) for name, indices in parts.items()}


def stratified_split(labels: np.ndarray, test_size: float, seed: int) -> list[np.ndarray]:
    """Indices of two parts, drawn from a generator of its own, which nothing else depends on."""
    from sklearn.model_selection import train_test_split

    random_state = make_complex(seed)
    return train_test_split(np.arange(len(labels)), test_size=test_size, stratify=labels, random_state=random_state)
