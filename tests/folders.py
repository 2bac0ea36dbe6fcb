"""Folders of images for tests."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("Käfer", "甲虫", "beetle 3")


def smooth_image(generator: np.random.Generator, height: int, width: int) -> Image.Image:
    """Random colours that flow into each other, as a photograph's do."""
    few = generator.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    return Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC)


def make_folder(folder: Path, num_train: int = 60, num_test: int = 9, size: tuple[int, int] | None = None) -> Path:
    """`folder` with images of three classes in names of several scripts; returns it.

    Without `size` (height and width) they are JPEGs of all sizes and of several modes, some of them turned by their
    EXIF; with it, PNGs.
    """
    generator = np.random.default_rng(0)
    for part, number in (("train", num_train), ("test", num_test)):
        for n in range(number):
            inside = folder / part / CLASSES[n % 3]
            inside.mkdir(parents=True, exist_ok=True)
            if size:
                smooth_image(generator, *size).save(inside / f"{n}.png")
                continue
            image = smooth_image(generator, *generator.integers(60, 160, 2))
            exif = Image.Exif()
            exif[0x0112] = n % 8 + 1
            image.convert(("RGB", "L", "CMYK")[n % 5 % 3]).save(inside / f"{n}.jpg", quality=90, exif=exif)
    return folder
