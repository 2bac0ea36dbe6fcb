"""Folders of images: found, read, brought to one size."""

import io
import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension
from torchvision.transforms import v2
from tqdm import tqdm

from command_line.files import read_file
from command_line.signals import until_stopped
from run_settings import SMALL_IMAGE

try:
    import simplejpeg  # faster than PIL, to the same pixels
except ImportError:
    simplejpeg = None

warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd EXIF and of large images, which are read all the same

Size = tuple[int, int]  # height and width of an image in pixels
Images = Sequence[Path] | Tensor  # files, or uint8 (N, 3, H, W)
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel, from 0 to 1

ORIENTATION = 0x0112  # EXIF's tag for how the camera was held


@dataclass
class FoundImages:
    """The images of a data set as they are found.

    Attributes:
        images: the training images, then the test images.
        labels: of each, from 0 on.
        classes: the name of each label.
        num_train: how many of them are training images, those for validation included.
        folder: where they are.
        files: those of the training images.
        flip: whether an image and its mirror image are of the same class.
        statistics: of the training images, where they are known already.
    """

    images: Images
    labels: Sequence[int]
    classes: list[str]
    num_train: int
    folder: Path = Path()
    files: Sequence[Path] = ()
    flip: bool = True
    statistics: Statistics | None = None


class Classes(ImageFolder):
    """torchvision's ImageFolder without hidden folders and files."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        classes = class_names(directory)
        return classes, {name: label for label, name in enumerate(classes)}


def class_names(directory: str | Path) -> list[str]:
    """The names of the folders in a folder, sorted, without hidden ones."""
    folders = (entry.name for entry in os.scandir(directory) if entry.is_dir())
    return sorted(name for name in folders if not name.startswith("."))


def is_image(folder: Path, file: str) -> bool:
    """Whether a file somewhere in a folder has the name of an image, and nothing on the way to it is hidden."""
    hidden = f"{os.sep}." in file.removeprefix(str(folder))
    return has_file_allowed_extension(file, IMG_EXTENSIONS) and not hidden


def find_images(folder: Path) -> FoundImages:
    """The images of `folder`/train/CLASS and `folder`/test/CLASS (or val/CLASS where there is no test/).

    Classes and files are in the order of their names, as torchvision's ImageFolder has them.

    Raises:
        FileNotFoundError: one of these folders is missing, or has no image.
        ValueError: there are fewer than two classes, or training and test images are not of the same.
    """
    parts = find_parts(folder)
    train, test = (Classes(part, is_valid_file=partial(is_image, part), allow_empty=True) for part in parts)
    if unlike := sorted(set(train.classes) ^ set(test.classes)):
        raise ValueError(f"{parts[0]} and {parts[1]} must have the same classes; only one has {listed(unlike)}")
    for part, found in zip(parts, (train, test), strict=True):
        if len(found.classes) < 2:
            raise ValueError(f"{part} must have a folder for each class, at least two; it has {len(found.classes)}")
        labels = {label for _, label in found.samples}
        if empty := [name for name, label in found.class_to_idx.items() if label not in labels]:
            raise FileNotFoundError(
                f"{part} has no image of {listed(empty)}: files end with {' '.join(IMG_EXTENSIONS)}"
            )
    samples = train.samples + test.samples
    files, labels = [Path(file) for file, _ in samples], [label for _, label in samples]
    num_train = len(train.samples)
    return FoundImages(files, labels, train.classes, num_train, folder, files[:num_train])


def find_parts(folder: Path) -> list[Path]:
    """The folders of training and of test images. FileNotFoundError where one is missing."""
    parts = [folder / "train", folder / "test" if (folder / "test").exists() else folder / "val"]
    for part in parts:
        if not part.is_dir():
            names = "train" if part.name == "train" else "test (or val)"
            raise FileNotFoundError(
                f"{folder} has no folder {names}: images belong into {folder}/train/CLASS and so on"
            )
    return parts


def listed(names: Sequence[str]) -> str:
    """Names in a line; of many, the first few."""
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def read_image(file: Path) -> Tensor:
    """The image in a file, uint8 (3, H, W), upright, in red, green and blue as PIL converts it.

    Of 16-bit grey the upper 8 bits are taken; transparency is ignored.

    Raises:
        OSError: the file cannot be read.
        ValueError: it does not hold a whole image, or its pixels have no common scale; the message names it.
    """
    content = read_file(file)
    try:
        with Image.open(io.BytesIO(content)) as opened:
            if simplejpeg and opened.format == "JPEG" and opened.mode == "RGB" and find_orientation(opened) == 1:
                with suppress(ValueError):  # of a slight damage, which PIL may pass over
                    return torch.from_numpy(simplejpeg.decode_jpeg(content)).permute(2, 0, 1)
            opened.load()
            image = opened
            if find_orientation(image) != 1:
                # of its metadata only what its pixels depend on: the rest would be rewritten, which may fail
                image.info = {name: image.info[name] for name in image.info if name == "transparency"}
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # PIL would cut off at 255
            elif image.mode in ("I", "F"):
                raise ValueError(f"pixels of mode {image.mode} have no scale of their own: convert it")
            elif "transparency" in image.info:
                image = image.convert("RGBA")
            return v2.functional.pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # which one depends on the format, and on where the damage is
        raise unreadable(file, error) from error


def find_orientation(image: Image.Image) -> int:
    """How an image is to be turned, by its EXIF, from 1 to 8; 1, upright, where that is unreadable or senseless."""
    with suppress(Exception):  # which one depends on where the damage is
        if (found := image.getexif().get(ORIENTATION)) in range(2, 9):
            return found
    return 1


def get_image(images: Images, index: int) -> Tensor:
    """One of the images, uint8 (3, H, W); raises as `read_image` does."""
    image = images[index]
    return image if isinstance(image, Tensor) else read_image(image)


def own_size(files: Iterable[Path]) -> Size | None:
    """Height and width that all these images have, upright, or None where they differ or one is not small."""
    sizes = set()
    for file in files:
        content = read_file(file)
        try:
            with Image.open(io.BytesIO(content)) as image:
                width, height = image.size
                exchanged = find_orientation(image) >= 5 and image.format != "TIFF"  # whose size is upright already
        except Exception as error:
            raise unreadable(file, error) from error
        sizes.add((width, height) if exchanged else (height, width))
        if len(sizes) > 1 or max(height, width) > SMALL_IMAGE:
            return None
    return sizes.pop()


def unreadable(file: Path, error: Exception) -> ValueError:
    """The error for a file that is not a whole image."""
    reason = "it is not of a known kind" if isinstance(error, Image.UnidentifiedImageError) else error
    return ValueError(f"{file} cannot be read as an image: {reason}")


def resize(image: Tensor, size: Size, margin: float = 1) -> Tensor:
    """The centre of an image whose shorter side is resized to `margin` times the height in `size`."""
    if image.shape[1:] == size and margin == 1:
        return image
    image = v2.functional.resize(image, [round(size[0] * margin)], antialias=True)
    return v2.functional.center_crop(image, list(size))


def decode_all(images: Images, size: Size, workers: int, show_bar: bool = False) -> Tensor:
    """All images in one tensor, uint8 (N, 3, H, W), decoded by `workers` threads; see `read_image`.

    KeyboardInterrupt as soon as a signal has arrived.
    """
    decoded = torch.empty(len(images), 3, *size, dtype=torch.uint8)

    def decode(index: int) -> None:
        decoded[index] = resize(get_image(images, index), size)

    with ThreadPoolExecutor(workers) as threads, closing(threads.map(decode, range(len(images)))) as done:
        bar = tqdm(done, "decoding", len(images), unit="image", disable=not show_bar, leave=False)
        for _ in until_stopped(bar):
            pass
    return decoded
