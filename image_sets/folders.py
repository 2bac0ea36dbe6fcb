"""Folders of images: found, read, brought to one size."""

import hashlib
import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension
from torchvision.transforms import v2
from tqdm import tqdm

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

# what PIL always reads; a GIF may have several images, others need libraries that PIL may have been built without
ENDINGS = (*IMG_EXTENSIONS, ".jpe", ".jfif")
OF_SYSTEMS = ("@eaDir", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information")
OF_SYSTEMS += ("__MACOSX", "lost+found", "Thumbs.db", "desktop.ini")
BITS, WHITE_IS_ZERO, ORIENTATION = 258, 262, 274  # tags of TIFF, the last one of EXIF too: how the camera was held


@dataclass
class FoundImages:
    """The images of a data set as they are found."""

    images: Images  # the training images, then the test images
    labels: Sequence[int]  # of each, from 0 on
    classes: list[str]  # the name of each label
    num_train: int  # how many of the images are training images, those for validation included
    folder: Path = Path()  # where they are
    files: Sequence[Path] = ()  # those of the training images
    flip: bool = True  # whether an image and its mirror image are of the same class
    statistics: Statistics | None = None  # of the training images, where they are known already


def visible(folder: str | Path) -> list[os.DirEntry]:
    """What is in a folder, without what is hidden or of a system."""
    return [entry for entry in os.scandir(folder) if not entry.name.startswith(".") and entry.name not in OF_SYSTEMS]


def class_names(folder: str | Path) -> list[str]:
    """The names of the visible folders in a folder, sorted."""
    return sorted(entry.name for entry in visible(folder) if entry.is_dir())


def find_images(folder: Path, report: Callable[[str], None] = lambda line: None) -> FoundImages:
    """The images of `folder`/train/CLASS and `folder`/test/CLASS (or val/CLASS where there is no test/).

    They are in the order of torchvision's ImageFolder. `report` is given a line that counts the files that do not end
    with one of `ENDINGS`, if any.

    Raises:
        FileNotFoundError: one of these folders is missing, or has no image.
        ValueError: there are fewer than two classes, training and test images have others, or links lead to a folder or
            an image twice.
    """
    parts = find_parts(folder)
    classes, of_test = map(class_names, parts)
    if unlike := sorted(set(classes) ^ set(of_test)):
        raise ValueError(f"{parts[0]} and {parts[1]} must have the same classes; only one has {listed(unlike)}")
    if len(classes) < 2:
        raise ValueError(f"{parts[0]} must have a folder for each class, at least two; it has {len(classes)}")
    seen: dict[tuple[int, int], str] = {}
    for above in (folder, *folder.resolve().parents):
        note(str(above), seen)
    files, labels, num_train, left_out = [], [], 0, Counter()
    for part in parts:
        num_train = len(files)
        note(str(part), seen)
        by_class = {name: sorted(walk(str(part / name), seen, left_out)) for name in until_stopped(classes)}
        if empty := [name for name, found in by_class.items() if not found]:
            raise FileNotFoundError(f"{part} has no image of {listed(empty)}: {counted(left_out)}")
        for label, found in enumerate(by_class.values()):
            files += [Path(*file) for file in found]
            labels += [label] * len(found)
    if left_out:
        report(f"{folder}: {counted(left_out)}")
    if parts[1].name == "test" and (folder / "val").is_dir():
        report(f"{folder / 'val'} is not used: a tenth of {parts[0]} is for validation")
    return FoundImages(files, labels, classes, num_train, folder, files[:num_train])


def walk(folder: str, seen: dict[tuple[int, int], str], left_out: Counter[str]) -> Iterator[tuple[str, str]]:
    """Folder and name of each image in a folder and in those below, in no order; the endings of others are counted."""
    note(folder, seen)
    for entry in visible(folder):
        if entry.is_dir():
            yield from walk(entry.path, seen, left_out)
        elif has_file_allowed_extension(entry.name, ENDINGS):
            note(entry.path, seen)
            yield folder, entry.name
        else:
            left_out[os.path.splitext(entry.name)[1].lower() or "without an ending"] += 1


def note(path: str, seen: dict[tuple[int, int], str]) -> None:
    """Note by device and inode that a file or folder has been seen. ValueError, with both names, where it had been."""
    stat = os.stat(path)
    first = seen.setdefault((stat.st_dev, stat.st_ino), path)
    if first != path:
        raise ValueError(f"{path} and {first} are the same, by a link: remove one, or images count more than once")


def counted(left_out: Counter[str]) -> str:
    """How images end, and how many files of which other ending are left out."""
    others = listed([f"{number} {ending}" for ending, number in left_out.most_common()])
    return f"images end with {' '.join(ENDINGS)}" + (f"; left out are {others}" if left_out else "")


def identify(found: FoundImages, contents: Sequence[str] = ()) -> str:
    """A short hash of the images of a folder: of classes, names, labels, and `contents` (SHA-256) or else sizes.

    It is the same for a copy on another machine.
    """
    digest = hashlib.sha256(ascii(found.classes).encode())
    above = len(found.folder.parts)
    for index, (file, label) in until_stopped(enumerate(zip(found.images, found.labels, strict=True))):
        size_or_content = contents[index] if contents else file.stat().st_size
        digest.update(ascii((file.parts[above:], label, size_or_content)).encode())
    return digest.hexdigest()[:16]


def find_parts(folder: Path) -> list[Path]:
    """The folders of training and of test images. FileNotFoundError where one is missing."""
    parts = [folder / "train", folder / "test" if (folder / "test").exists() else folder / "val"]
    for part in parts:
        if not part.is_dir():
            name = "train" if part.name == "train" else "test (or val)"
            raise FileNotFoundError(f"{folder} has no folder {name}: images belong into {folder}/train/CLASS and so on")
    return parts


def listed(names: Sequence[str]) -> str:
    """Names in a line; of many, the first few."""
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def read_image(file: Path) -> Tensor:
    """The image in a file, uint8 (3, H, W), upright, in red, green and blue as PIL converts it.

    Of grey of more than 8 bits the upper 8 are taken; transparency is ignored. ValueError, too, where pixels have no
    common scale.
    """
    with open_image(file) as (opened, content):
        if simplejpeg and opened.format == "JPEG" and opened.mode == "RGB" and find_orientation(opened) == 1:
            with suppress(ValueError):  # of a slight damage, which PIL may pass over
                return torch.from_numpy(simplejpeg.decode_jpeg(content)).permute(2, 0, 1)
        opened.load()
        image = opened
        if find_orientation(image) != 1:
            # of its metadata only what its pixels depend on: the rest would be rewritten, which may fail
            image.info = {name: image.info[name] for name in image.info if name == "transparency"}
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16") or (image.mode == "I" and opened.format == "PPM"):  # not as in other "I"
            tags = getattr(opened, "tag_v2", {})
            grey = (np.asarray(image) >> tags.get(BITS, (16,))[0] - 8).astype(np.uint8)  # PIL would cut off at 255
            image = Image.fromarray(255 - grey if tags.get(WHITE_IS_ZERO) == 0 else grey)
        elif image.mode in ("I", "F"):
            raise ValueError(f"pixels of mode {image.mode} have no scale of their own: convert it")
        elif "transparency" in image.info:
            image = image.convert("RGBA")
        return v2.functional.pil_to_tensor(image.convert("RGB"))


@contextmanager
def open_image(file: Path) -> Iterator[tuple[Image.Image, bytes]]:
    """PIL's image of a file, not decoded yet, and the file's content.

    Raises:
        OSError: the file cannot be read.
        ValueError: it does not hold a whole image, as one finds out within, too; the message names it.
    """
    content = file.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            yield image, content
    except Exception as error:  # which one depends on the format, and on where the damage is
        reason = "it is not of a known kind" if isinstance(error, Image.UnidentifiedImageError) else error
        raise ValueError(f"{file} cannot be read as an image: {reason}") from error


def find_orientation(image: Image.Image) -> int:
    """How an image is to be turned, by its EXIF, from 1 to 8; 1, upright, where that is unreadable or senseless."""
    with suppress(Exception):  # which one depends on where the damage is
        if (found := image.getexif().get(ORIENTATION)) in range(2, 9):
            return found
    return 1


def get_image(images: Images, index: int, fit: Callable[[Tensor], Tensor]) -> Tensor:
    """What `fit` makes of one of the images, uint8 (3, H, W)."""
    image = images[index]
    return fit(image if isinstance(image, Tensor) else read_image(image))


def own_size(files: Iterable[Path]) -> Size | None:
    """Height and width that all these images have, upright, or None where they differ or one is not small."""
    sizes = set()
    for file in files:
        with open_image(file) as (image, _):
            width, height = image.size
            exchanged = find_orientation(image) >= 5 and image.format != "TIFF"  # whose size is upright already
        sizes.add((width, height) if exchanged else (height, width))
        if len(sizes) > 1 or max(height, width) > SMALL_IMAGE:
            return None
    return sizes.pop()


def resize(image: Tensor, size: Size, margin: float = 1) -> Tensor:
    """The centre of an image whose shorter side is resized to `margin` times the height in `size`."""
    if image.shape[1:] == size and margin == 1:
        return image
    shorter = round(size[0] * margin)
    image = v2.functional.resize(image, [shorter], antialias=True)
    return v2.functional.center_crop(image, list(size))


def decode_all(images: Images, size: Size, workers: int, show_bar: bool = False) -> tuple[Tensor, list[str]]:
    """All images in one tensor, uint8 (N, 3, H, W), decoded by `workers` threads, and the SHA-256 of each file."""
    decoded = torch.empty(len(images), 3, *size, dtype=torch.uint8)

    def decode(index: int) -> str:
        decoded[index] = get_image(images, index, partial(resize, size=size))
        # a file that has just been read is in memory
        return "" if isinstance(images, Tensor) else hashlib.sha256(images[index].read_bytes()).hexdigest()

    with ThreadPoolExecutor(workers) as threads, closing(threads.map(decode, range(len(images)))) as done:
        bar = tqdm(done, "decoding", len(images), unit="image", disable=not show_bar, leave=False)
        return decoded, list(until_stopped(bar))
