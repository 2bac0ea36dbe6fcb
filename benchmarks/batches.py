"""How fast the batches of a training epoch are made, beside one PIL transform an image.

    python benchmarks/batches.py --batch_size 128

Random images of CIFAR-10's size, random flips, on the CPU or any other device.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import ImageSet, make_batches


class PlainImages(Dataset):
    """The usual way: every image through PIL and torchvision's transforms."""

    transform = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor()])

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), 0


def seconds_an_epoch(batches: Iterable, device: torch.device) -> float:
    """How long it takes to make every batch and have it on the device."""
    start = time.perf_counter()
    for images, labels in batches:
        images.to(device), labels.to(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    """Measure both in turn, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--num_images", type=int, default=12_800)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()

    pixels = np.random.default_rng(0).integers(0, 256, (args.num_images, 32, 32, 3), dtype=np.uint8)
    image_set = ImageSet(
        images=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(args.device),
        labels=torch.zeros(args.num_images, dtype=torch.int64, device=args.device),
        splits={"train": torch.arange(args.num_images, device=args.device)},
        classes=["all"],
        flip=True,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    ways = {
        "data.make_batches": make_batches(image_set, "train", args.batch_size, normalize=False),
        "PIL and DataLoader": DataLoader(PlainImages(pixels), args.batch_size, shuffle=True),
    }
    times = {name: [] for name in ways}
    for _ in range(args.rounds + 1):  # the first round warms up
        for name, batches in ways.items():
            times[name].append(seconds_an_epoch(batches, args.device))
    for name, (_, *seconds) in times.items():
        milliseconds = [1000 * s / len(ways[name]) for s in seconds]
        median = statistics.median(milliseconds)
        print(
            f"{name:20} {median:8.3f} ms a batch of {args.batch_size}"
            f" ({min(milliseconds):.3f} to {max(milliseconds):.3f} in {args.rounds} rounds),"
            f" {1000 * args.batch_size / median:9,.0f} images/s"
        )


if __name__ == "__main__":
    main()
