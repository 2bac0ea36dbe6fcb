"""How fast large images are streamed from their files, beside torchvision's reference loader, and what a step waits.

    python benchmarks/folders.py --workers 2

JPEGs of ImageNet's usual size (500×375, about 110 kB), made for the purpose, to batches of 224×224 for training. Both
loaders have the same processes and the same transforms; they take turns.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent))
from image_sets.batches import Batches
from image_sets.loading import load_image_set
from networks import construct_network


def make_photographs(folder: Path, number: int) -> None:
    """Two classes of JPEGs with smooth colours and some noise, so that they compress about as photographs do."""
    generator = np.random.default_rng(0)
    for part, of_part in (("train", number), ("test", 4)):
        for n in range(of_part):
            colours = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            smooth = np.asarray(colours.resize((500, 375), Image.Resampling.BICUBIC), dtype=float)
            noisy = np.clip(smooth + generator.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
            file = folder / part / f"class {n % 2}" / f"{n}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noisy).save(file, quality=90)


def reference_loader(folder: Path, batch_size: int, workers: int) -> DataLoader:
    """The loader of torchvision's reference training, with the transforms of ours: PIL, one image at a time."""
    augment = [v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()]
    transform = v2.Compose([*augment, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    images = ImageFolder(folder / "train", transform)
    return DataLoader(images, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def seconds_of_epoch(batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """How long it takes to have every batch."""
    start = time.perf_counter()
    for images, _ in batches:
        images.sum().item()
    return time.perf_counter() - start


def share_waiting(batches: Iterable[tuple[Tensor, Tensor]], num_classes: int) -> float:
    """The share of the time of an epoch of training a ResNet-18 in which it waits for a batch."""
    network = construct_network("resnet18", num_classes, "imagenet")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    waited, start = 0.0, time.perf_counter()
    before = start
    for images, labels in batches:
        waited += time.perf_counter() - before
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        before = time.perf_counter()
    return waited / (time.perf_counter() - start)


def main() -> None:
    """Measure both in turn, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_images", type=int, default=640)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "photographs"
        make_photographs(folder, args.num_images)
        image_set = load_image_set("photographs", name, workers=args.workers, statistics=False)
        ways = {
            "Batches": Batches(image_set, "train", args.batch_size, normalize=False),
            "torchvision's reference": reference_loader(folder, args.batch_size, args.workers),
        }
        numbers = {"Batches": len(image_set.splits["train"]), "torchvision's reference": args.num_images}
        speeds = {way: [] for way in ways}
        for _ in range(args.rounds + 1):  # the first round warms up
            for way, batches in ways.items():
                speeds[way].append(numbers[way] / seconds_of_epoch(batches))
        for way, (_, *of_way) in speeds.items():
            share = share_waiting(ways[way], len(image_set.classes))
            print(
                f"{way:24} {statistics.median(of_way):7.0f} images/s ({min(of_way):.0f} to {max(of_way):.0f} in"
                f" {args.rounds} rounds); training a ResNet-18 waits for batches {share:.1%} of the time"
            )


if __name__ == "__main__":
    main()
