"""Mean and standard deviation of an image set, computed and kept."""

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from command_line.files import write_atomically
from command_line.signals import until_stopped
from image_sets.folders import FoundImages, Size, Statistics


def compute_statistics(batches: Iterable[Tensor], num_images: int, show_bar: bool = False) -> Statistics:
    """Mean and standard deviation of the channels of `num_images` images in batches, uint8 (n, 3, H, W).

    ValueError where a channel has one value only.
    """
    counts = np.zeros((3, 256), np.int64)  # of each value in each channel
    with tqdm(total=num_images, desc="statistics", unit="image", disable=not show_bar, leave=False) as bar:
        for batch in until_stopped(batches):
            channels = batch.transpose(0, 1).flatten(1)
            counts += torch.stack([torch.bincount(channel, minlength=256) for channel in channels]).cpu().numpy()
            bar.update(len(batch))
    sums, squares, count = counts @ np.arange(256), counts @ np.arange(256) ** 2, counts[0].sum().item()
    mean = sums / count
    deviation = np.sqrt([(q * count - s**2) / count**2 for s, q in zip(sums.tolist(), squares.tolist(), strict=True)])
    if not deviation.all():
        raise ValueError("the images all have the same value in a channel: use input_norm='bn'")
    return tuple((mean / 255).tolist()), tuple((deviation / 255).tolist())


def keep_statistics(
    found: FoundImages, size: Size, compute: Callable[[], Statistics], report: Callable[[str], None]
) -> Statistics:
    """What `compute` returns, kept as JSON in the folder of the data set, and computed anew where its files change.

    They have changed where a name, a size or a time of change of a training image has. Where nothing can be written
    there, `report` is given a line that says so.
    """
    files = [(str(file.relative_to(found.folder)), file.stat()) for file in found.files]
    listed = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    made_from = hashlib.sha256(repr(listed).encode()).hexdigest()
    file = found.folder / f"statistics-{size[0]}x{size[1]}.json"
    with suppress(Exception):  # there may be anything in it, or nothing
        kept = json.loads(file.read_bytes())
        if kept["made_from"] == made_from:
            return tuple(kept["mean"]), tuple(kept["std"])
    mean, std = compute()
    content = {"mean": mean, "std": std, "made_from": made_from}
    try:
        write_atomically(file, f"{json.dumps(content, indent=1)}\n".encode())
    except OSError as error:
        report(f"mean and standard deviation of the images are computed each time, as {error}")
    return mean, std
