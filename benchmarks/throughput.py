"""How fast a network is trained: this project's training pass beside a plain loop, mode by mode, in one table.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --network resnet18 --pixels 8 --steps 5

The plain loop is what one would write today: torchvision's CIFAR10 with PIL transforms, a DataLoader with its defaults,
eager float32, `loss.item()` at every step. All modes take turns, for several rounds. The images are CIFAR-10's where
`--path` has them, and random ones otherwise.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn, optim
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import CIFAR10
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import ImageSet, make_batches
from networks import construct_network, speed_up
from train import machine_name, train_one_epoch
from weight_decay_and_learning_rate import adjust_weight_decay_and_learning_rate

MODES = {  # precision, whether compiled
    "float32": ("float32", False),
    "bfloat16": ("bfloat16", False),
    "float32 compiled": ("float32", True),
    "bfloat16 compiled": ("bfloat16", True),
}


class SyntheticCIFAR10(CIFAR10):
    """Random images that are fetched just as torchvision fetches those of CIFAR-10."""

    def __init__(self, num_images: int, pixels: int) -> None:
        self.data = np.random.default_rng(0).integers(0, 256, (num_images, pixels, pixels, 3), dtype=np.uint8)
        self.targets = [n % 10 for n in range(num_images)]
        self.transform = self.target_transform = None


def load_images(path: Path, num_images: int, pixels: int) -> CIFAR10:
    """CIFAR-10's first images where they are below `path` and have that size, random ones otherwise."""
    try:
        images = CIFAR10(path / "images") if pixels == 32 else SyntheticCIFAR10(num_images, pixels)
    except RuntimeError:
        images = SyntheticCIFAR10(num_images, pixels)
    images.data, images.targets = images.data[:num_images], images.targets[:num_images]
    return images


def make_network(args: argparse.Namespace) -> nn.Module:
    """The paper's network for small images."""
    return construct_network(args.network, bn_weight=0.1).to(args.device)


def plain_batches(images: CIFAR10, batch_size: int) -> DataLoader:
    """The batches as one would make them today, an image at a time."""
    transforms = torchvision.transforms
    images.transform = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    return DataLoader(images, batch_size, shuffle=True)


def our_batches(images: CIFAR10, batch_size: int, device: torch.device) -> DataLoader:
    """The batches of `train.py`."""
    image_set = ImageSet(
        images=torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous().to(device),
        labels=torch.tensor(images.targets, device=device),
        splits={"train": torch.arange(len(images), device=device)},
        classes=[str(n) for n in range(10)],
        flip=True,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    return make_batches(image_set, "train", batch_size, normalize=False)


def plain_epoch(args: argparse.Namespace, images: CIFAR10) -> Callable[[], None]:
    """A function that trains on all images once, as one would write it today."""
    network = make_network(args)
    optimizer = optim.SGD(network.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)
    loader = plain_batches(images, args.batch_size)

    def epoch() -> None:
        network.train()
        total = 0.0
        for batch, labels in loader:
            batch, labels = batch.to(args.device), labels.to(args.device)
            optimizer.zero_grad()
            loss = F.cross_entropy(network(batch), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()

    return epoch


def our_epoch(args: argparse.Namespace, images: CIFAR10, precision: str, compiled: bool) -> Callable[[], None]:
    """A function that trains on all images once, with the code of `train.py`."""
    batches = our_batches(images, args.batch_size, args.device)
    network = make_network(args)
    speed_up(network, args.device, precision, compiled)
    parameters = adjust_weight_decay_and_learning_rate(network, learning_rate=0.001, c=100)
    optimizer = optim.SGD(parameters, momentum=0.9, fused=args.device.type == "cuda")
    return lambda: train_one_epoch(network, batches, optimizer, 1, tqdm(disable=True))


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long some work takes until the device is through with it."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of a large matrix product, in operations (a multiplication, an addition) a second."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n**3 / min(seconds_of(lambda: a @ b, device) for _ in range(5))


def copy_bandwidth(device: torch.device) -> float:
    """The best rate of a large copy, in bytes a second, read and written."""
    a = torch.empty(2**28, dtype=torch.uint8, device=device).zero_()
    b = torch.zeros_like(a)
    return 2 * len(a) / min(seconds_of(lambda: b.copy_(a), device) for _ in range(5))


def flops_a_step(args: argparse.Namespace) -> int:
    """Operations of the matrix products and convolutions of one training step, forward and backward."""
    network = make_network(args)
    images = torch.rand(args.batch_size, 3, args.pixels, args.pixels, device=args.device)
    with FlopCounterMode(display=False) as counter:
        network(images).sum().backward()
    return counter.get_total_flops()


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--pixels", type=int, default=32, help="height and width of an image (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="steps of a round (default: 1 on a CPU, 100 on a GPU)")
    parser.add_argument("--rounds", type=int, default=3, help="after one that warms up (default: %(default)s)")
    parser.add_argument("--modes", nargs="*", choices=MODES, help="(default: the first two on a CPU, all on a GPU)")
    parser.add_argument("--path", type=Path, default=Path(), help="where images/ is (default: the current folder)")
    default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device", type=torch.device, default=default)
    args = parser.parse_args()
    on_gpu = args.device.type == "cuda"
    steps = args.steps or (100 if on_gpu else 1)
    modes = args.modes or list(MODES)[: 4 if on_gpu else 2]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    images = load_images(args.path, steps * args.batch_size, args.pixels)
    epochs = {"plain loop": plain_epoch(args, images)}
    epochs |= {mode: our_epoch(args, images, *MODES[mode]) for mode in modes}
    times = {name: [] for name in epochs}
    for _ in range(args.rounds + 1):
        for name, epoch in epochs.items():
            times[name].append(seconds_of(epoch, args.device) / steps)

    flops = flops_a_step(args)
    peaks = {name: peak_flops(args.device, getattr(torch, name)) for name in ("float32", "bfloat16")}
    print(f"{machine_name(args.device)}, torch {torch.__version__}")
    print(f"{args.network}, {args.pixels}x{args.pixels}, batch {args.batch_size}")
    print(f"{flops / 1e9:.0f} GFLOP a step; {type(images).__name__}; {args.rounds} rounds of {steps} steps")
    for name, peak in peaks.items():
        print(f"matrix product, {name}: {peak / 1e12:.2f} TFLOP/s")
    print(f"copy: {copy_bandwidth(args.device) / 1e9:.1f} GB/s")
    print(f"\n{'':18} {'ms a step':>10} {'from':>9} {'to':>9} {'images/s':>9} {'to plain':>9} {'of peak':>8}")
    for name, (_, *seconds) in times.items():
        median = statistics.median(seconds)
        ratio = statistics.median(plain / own for plain, own in zip(times["plain loop"][1:], seconds, strict=True))
        peak = peaks["bfloat16" if "bfloat16" in name else "float32"]
        print(
            f"{name:18} {1000 * median:10.2f} {1000 * min(seconds):9.2f} {1000 * max(seconds):9.2f}"
            f" {args.batch_size / median:9,.0f} {ratio:8.2f}x {flops / median / peak:7.1%}"
        )
    peak_memory = torch.cuda.max_memory_allocated(args.device) / 2**20 if on_gpu else 0
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"\npeak memory of all modes together: {resident:,.0f} MiB of the process, {peak_memory:,.0f} MiB of the GPU")


if __name__ == "__main__":
    main()
