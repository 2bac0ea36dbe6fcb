"""How fast a network is trained: this project's training pass beside a plain loop, mode by mode, in one table.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --network resnet18 --pixels 8 --steps 5
    python benchmarks/throughput.py --pixels 8 --steps 5 --profile

The plain loop is what one would write today: torchvision's CIFAR10 with PIL transforms, a DataLoader with its defaults,
eager float32, `loss.item()` at every step. All modes take turns, for several rounds. The images are CIFAR-10's where
`--path` has them, and random ones otherwise. The columns after the ratio to the plain loop:

    product   operations of a step's convolutions and matrix products, as a share of what a large product reaches
    copy      bytes that the operations of an eager step read and write, as a share of what a large copy reaches
    batch     making the batch, with nothing else going on, as a share of the step
    memory    peak of a process that trains in this mode alone (GPU: what tensors take of the GPU) with all images
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn, optim
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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


PLAIN = "plain loop"


class SyntheticCIFAR10(CIFAR10):
    """Random images that are fetched just as torchvision fetches those of CIFAR-10."""

    def __init__(self, num_images: int, pixels: int) -> None:
        self.data = np.random.default_rng(0).integers(0, 256, (num_images, pixels, pixels, 3), dtype=np.uint8)
        self.targets = [n % 10 for n in range(num_images)]
        self.transform = self.target_transform = None


def load_images(path: Path, pixels: int) -> CIFAR10:
    """CIFAR-10 where it is below `path` and has that size, as many random images otherwise."""
    try:
        return CIFAR10(path / "images") if pixels == 32 else SyntheticCIFAR10(50_000, pixels)
    except RuntimeError:
        return SyntheticCIFAR10(50_000, pixels)


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


def plain_round(args: argparse.Namespace, images: CIFAR10) -> Callable[[], None]:
    """A function that makes the steps of a round, as one would write it today."""
    network = make_network(args)
    optimizer = optim.SGD(network.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)
    loader = plain_batches(images, args.batch_size)

    def steps() -> None:
        network.train()
        total = 0.0
        for batch, labels in islice(loader, args.steps):
            batch, labels = batch.to(args.device), labels.to(args.device)
            optimizer.zero_grad()
            loss = F.cross_entropy(network(batch), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()

    return steps


def our_round(args: argparse.Namespace, images: CIFAR10, mode: str) -> Callable[[], None]:
    """A function that makes the steps of a round, with the code of `train.py`."""
    batches = our_batches(images, args.batch_size, args.device)
    network = make_network(args)
    speed_up(network, args.device, *MODES[mode])
    parameters = adjust_weight_decay_and_learning_rate(network, learning_rate=0.001, c=100)
    optimizer = optim.SGD(parameters, momentum=0.9, fused=args.device.type == "cuda")
    return lambda: train_one_epoch(network, islice(batches, args.steps), optimizer, 1, tqdm(disable=True))


def make_round(args: argparse.Namespace, images: CIFAR10, mode: str) -> Callable[[], None]:
    """One or the other."""
    return plain_round(args, images) if mode == PLAIN else our_round(args, images, mode)


def make_batches_only(args: argparse.Namespace, images: CIFAR10, mode: str) -> Callable[[], None]:
    """A function that makes as many batches as a round has steps, at least 20, and has them on the device."""
    ours = mode != PLAIN
    batches = our_batches(images, args.batch_size, args.device) if ours else plain_batches(images, args.batch_size)
    return lambda: [images.to(args.device) for images, _ in islice(batches, max(args.steps, 20))]


def peak_memory(args: argparse.Namespace, mode: str) -> float:
    """MiB at the peak of one step in this process: of the process, or of the tensors on the GPU."""
    args = argparse.Namespace(**(vars(args) | {"steps": 1}))
    make_round(args, load_images(args.path, args.pixels), mode)()
    if args.device.type == "cuda":
        return torch.cuda.max_memory_allocated(args.device) / 2**20
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 2**10  # not getrusage, which counts what the process was before it began


def peak_memory_alone(args: argparse.Namespace, mode: str) -> float:
    """`peak_memory` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_memory, args, mode).result()


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


class ByteCounter(TorchDispatchMode):
    """Counts the bytes of all tensors that operations read and write, as if nothing stayed in a cache."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def count_step(args: argparse.Namespace, precision: str) -> tuple[int, int]:
    """Operations of the convolutions and matrix products of a training step, and bytes of all its operations."""
    network = make_network(args)
    speed_up(network, args.device, precision)
    images = torch.rand(args.batch_size, 3, args.pixels, args.pixels, device=args.device)
    with FlopCounterMode(display=False) as flops:
        network(images).sum().backward()
    with ByteCounter() as bytes_:
        network(images).sum().backward()
    return flops.get_total_flops(), bytes_.total


def print_profile(args: argparse.Namespace, images: CIFAR10, mode: str) -> None:
    """What the steps of a round spend their time with."""
    steps = our_round(args, images, mode)
    steps()
    on_gpu = args.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        seconds_of(steps, args.device)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(f"{mode}, {args.steps} steps")
    print(profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=40))


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--pixels", type=int, default=32, help="height and width of an image (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="steps of a round (default: 1 on a CPU, 100 on a GPU)")
    parser.add_argument("--rounds", type=int, default=3, help="after one that warms up (default: %(default)s)")
    modes_help = "(default: float32; bfloat16 where the device has instructions for it; on a GPU compiled too)"
    parser.add_argument("--modes", nargs="*", choices=MODES, help=modes_help)
    parser.add_argument("--path", type=Path, default=Path(), help="where images/ is (default: the current folder)")
    parser.add_argument("--profile", action="store_true", help="show what the steps of each mode are spent with")
    default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device", type=torch.device, default=default)
    args = parser.parse_args()
    on_gpu = args.device.type == "cuda"
    args.steps = args.steps or (100 if on_gpu else 1)
    modes = args.modes or [m for m in list(MODES)[: 4 if on_gpu else 2] if "float32" in m or has_bfloat16(args.device)]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    images = load_images(args.path, args.pixels)
    print(f"{machine_name(args.device)}, torch {torch.__version__}")
    print(f"{args.network}, {args.pixels}x{args.pixels}, batch {args.batch_size}, {type(images).__name__}")
    if args.profile:
        for mode in modes:
            print_profile(args, images, mode)
        return

    rounds = {mode: make_round(args, images, mode) for mode in (PLAIN, *modes)}
    times = {mode: [] for mode in rounds}
    for _ in range(args.rounds + 1):
        for mode, steps in rounds.items():
            times[mode].append(seconds_of(steps, args.device) / args.steps)

    precisions = {mode: MODES[mode][0] if mode in MODES else "float32" for mode in rounds}
    peaks = {name: peak_flops(args.device, getattr(torch, name)) for name in sorted(set(precisions.values()))}
    counts = {name: count_step(args, name) for name in peaks}
    bandwidth = copy_bandwidth(args.device)
    print(f"{args.rounds} rounds of {args.steps} steps; copy: {bandwidth / 1e9:.1f} GB/s")
    for name, peak in peaks.items():
        flops, num_bytes = counts[name]
        print(
            f"{name}: {flops / 1e9:.0f} GFLOP and {num_bytes / 1e9:.1f} GB a step; product: {peak / 1e12:.2f} TFLOP/s"
        )
    print(
        f"\n{'':18} {'ms a step':>9} {'from':>8} {'to':>8} {'images/s':>9} {'to plain':>8}"
        f" {'product':>8} {'copy':>7} {'batch':>8} {'memory':>10}"
    )
    for mode, (_, *seconds) in times.items():
        median = statistics.median(seconds)
        ratio = statistics.median(plain / own for plain, own in zip(times[PLAIN][1:], seconds, strict=True))
        flops, num_bytes = counts[precisions[mode]]
        make = make_batches_only(args, images, mode)
        batch = statistics.median(seconds_of(make, args.device) / max(args.steps, 20) for _ in range(args.rounds))
        print(
            f"{mode:18} {1000 * median:9.2f} {1000 * min(seconds):8.2f} {1000 * max(seconds):8.2f}"
            f" {args.batch_size / median:9,.0f} {ratio:7.2f}x {flops / median / peaks[precisions[mode]]:8.1%}"
            f" {num_bytes / median / bandwidth:7.1%} {batch / median:8.3%} {peak_memory_alone(args, mode):6,.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
