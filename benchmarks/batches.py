"""How fast the batches of a training epoch are made, beside one PIL transform an image.

    python benchmarks/batches.py --batch_size 128

Random images of CIFAR-10's size, random flips, on the CPU or any other device.
"""

import argparse
import statistics

import torch
from torch.utils.data import DataLoader

from throughput import Batches, SyntheticCIFAR10, our_batches, plain_batches, seconds_of


def make_all(batches: DataLoader | Batches, device: torch.device) -> None:
    """Make every batch of an epoch and have it on the device."""
    for images, labels in batches:
        images.to(device), labels.to(device)


def main() -> None:
    """Measure both in turn, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--num_images", type=int, default=12_800)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()

    images = SyntheticCIFAR10(args.num_images, pixels=32)
    ways = {
        "Batches": our_batches(images, args.batch_size, args.device),
        "PIL and DataLoader": plain_batches(images, args.batch_size),
    }
    times = {name: [] for name in ways}
    for _ in range(args.rounds + 1):  # the first round warms up
        for name, batches in ways.items():
            times[name].append(seconds_of(lambda batches=batches: make_all(batches, args.device), args.device))
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
