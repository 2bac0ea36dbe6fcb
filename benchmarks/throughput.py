"""How fast a network is trained: this project's training pass beside a plain loop, mode by mode, in one table.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --network resnet18 --pixels 8 --steps 5
    python benchmarks/throughput.py --pixels 8 --steps 5 --profile

The plain loop is what one would write today: torchvision's CIFAR10 with PIL transforms, a DataLoader with its defaults,
eager float32 with torch's own settings, `loss.item()` at every step. All modes take turns,
for several rounds. The images are CIFAR-10's where `--path` has them, and random ones otherwise. The columns after the
ratio to the plain loop:

    product   operations of a step's convolutions and matrix products, as a share of what a large product reaches
    memory    peak of a process that trains in this mode alone (GPU: what tensors take of the GPU) with all images
"""

import argparse
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn, optim
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import CIFAR10

sys.path.insert(0, str(Path(__file__).parent.parent))
from image_sets.batches import Batch, Batches
from image_sets.loading import ImageSet
from networks import construct_network
from run_settings import STEMS, Settings
from saved_runs.circumstances import machine_name
from train import train_one_epoch
from training.devices import speed_up, use_precision
from weight_decay_and_learning_rate import adjust_weight_decay_and_learning_rate

PLAIN = "plain loop"
MODES = ("float32", "strict", "tf32", "bfloat16", "float32 compiled", "tf32 compiled", "bfloat16 compiled")


class SyntheticCIFAR10(CIFAR10):
    """Random images that are fetched just as torchvision fetches those of CIFAR-10."""

    def __init__(self, pixels: int) -> None:
        self.data = np.random.default_rng(0).integers(0, 256, (50_000, pixels, pixels, 3), dtype=np.uint8)
        self.targets = [n % 10 for n in range(50_000)]
        self.transform = self.target_transform = None


def load_images(path: Path, pixels: int) -> CIFAR10:
    """CIFAR-10 where it is below `path` and has that size, as many random images otherwise."""
    try:
        return CIFAR10(path / "images") if pixels == 32 else SyntheticCIFAR10(pixels)
    except RuntimeError:
        return SyntheticCIFAR10(pixels)


def plain_batches(images: CIFAR10, batch_size: int) -> DataLoader:
    """The batches as one would make them today, an image at a time."""
    transforms = torchvision.transforms
    images.transform = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    return DataLoader(images, batch_size, shuffle=True)


def our_batches(images: CIFAR10, batch_size: int, device: torch.device) -> Batches:
    """The batches of `train.py`."""
    image_set = ImageSet(
        images=torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous().to(device),
        labels=torch.tensor(images.targets, device=device),
        splits={"train": torch.arange(len(images), device=device)},
        classes=[str(n) for n in range(10)],
        flip=True,
    )
    return Batches(image_set, "train", batch_size, normalize=False)


def make_loader(args: argparse.Namespace, images: CIFAR10, mode: str) -> DataLoader | Batches:
    """One or the other."""
    if mode == PLAIN:
        return plain_batches(images, args.batch_size)
    return our_batches(images, args.batch_size, args.device)


def take(loader: DataLoader | Batches, num_batches: int) -> Iterator[Batch]:
    """So many batches, of several epochs where one has fewer."""
    return islice(chain.from_iterable(repeat(loader)), num_batches)


def train_plainly(network: nn.Module, batches: Iterable[Batch], optimizer: optim.Optimizer) -> None:
    """The plain loop."""
    network.train()
    device = next(network.parameters()).device
    total = 0.0
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        total += loss.item()


def make_training(args: argparse.Namespace, mode: str) -> Callable[[Iterable[Batch]], None]:
    """A function that makes a training step with each of some batches: a plain loop, or the code of `train.py`."""
    network = construct_network(args.network, bn_weight=0.1, stem=args.stem).to(args.device)
    if mode == PLAIN:
        optimizer = optim.SGD(network.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)
        return partial(train_plainly, network, optimizer=optimizer)
    precision, compiled = mode.split()[0], "compiled" in mode
    settings = Settings(batch_size=args.batch_size, precision=precision)
    speed_up(network, precision, compiled)
    parameters = adjust_weight_decay_and_learning_rate(network, learning_rate=0.001, c=100)
    optimizer = optim.SGD(parameters, momentum=0.9, fused=args.device.type == "cuda")

    def train(batches: Iterable[Batch]) -> None:
        with use_precision(precision):
            train_one_epoch(network, batches, optimizer, settings)

    return train


def peak_memory(args: argparse.Namespace, mode: str) -> float:
    """MiB at the peak of three steps in this process: of the process, or of the tensors on the GPU."""
    make_training(args, mode)(take(make_loader(args, load_images(args.path, args.pixels), mode), 3))
    if args.device.type == "cuda":
        return torch.cuda.max_memory_allocated(args.device) / 2**20
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 2**10  # not getrusage, which counts what the process was before it began


def peak_memories(args: argparse.Namespace, modes: Sequence[str]) -> dict[str, float]:
    """`peak_memory` of each mode, in processes of their own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(modes), mp_context=context, max_tasks_per_child=1) as pool:
        return dict(zip(modes, pool.map(partial(peak_memory, args), modes), strict=True))


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long some work takes until the device is through with it."""
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def peak_flops(device: torch.device, precision: str) -> float:
    """The best rate of a large matrix product, in operations (a multiplication, an addition) a second."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    # what convolutions compute in: in 'float32', a GPU rounds their inputs, but not those of products
    with use_precision("strict" if precision == "strict" else "tf32"):
        return 2 * n**3 / min(seconds_of(lambda: a @ b, device) for _ in range(5))


def count_step(args: argparse.Namespace, precision: str, batch: Batch) -> int:
    """Operations of the convolutions and matrix products of a training step."""
    train = make_training(args, precision)
    with FlopCounterMode(display=False) as flops:
        train([batch])
    return flops.get_total_flops()


def print_profile(args: argparse.Namespace, images: CIFAR10, mode: str) -> None:
    """What the steps of a round spend their time with."""
    train, loader = make_training(args, mode), make_loader(args, images, mode)
    train(take(loader, args.steps))
    on_gpu = args.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        seconds_of(partial(train, take(loader, args.steps)), args.device)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(f"{mode}, {args.steps} steps")
    print(profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=40))


def has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--stem", choices=STEMS, default="auto", help="as in train.py (default: %(default)s)")
    parser.add_argument("--pixels", type=int, default=32, help="height and width of an image (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of a round (default: 1 on a CPU, an epoch of CIFAR-10 on a GPU)")
    parser.add_argument("--rounds", type=int, default=3, help="after one that warms up (default: %(default)s)")
    modes_help = "(default: all on a GPU; on a CPU float32, and bfloat16 where it has instructions for that)"
    parser.add_argument("--modes", nargs="*", choices=MODES, help=modes_help)
    parser.add_argument("--path", type=Path, default=Path(), help="where images/ is (default: the current folder)")
    parser.add_argument("--profile", action="store_true", help="show what the steps of each mode are spent with")
    default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device", type=torch.device, default=default)
    args = parser.parse_args()
    on_gpu = args.device.type == "cuda"
    args.steps = args.steps or (math.ceil(50_000 / args.batch_size) if on_gpu else 1)
    modes = args.modes or [*(MODES if on_gpu else ["float32", *(["bfloat16"] if has_bfloat16() else [])])]

    images = load_images(args.path, args.pixels)
    print(f"{machine_name(args.device)}, torch {torch.__version__}")
    size = f"{args.pixels}x{args.pixels}, batch {args.batch_size}"
    print(f"{args.network}, stem {args.stem}, {size}, {type(images).__name__}")
    if args.profile:
        for mode in modes:
            print_profile(args, images, mode)
        return

    ours = our_batches(images, args.batch_size, args.device)
    loaders = {PLAIN: plain_batches(images, args.batch_size), **dict.fromkeys(modes, ours)}
    modes = list(loaders)
    trainings = {mode: make_training(args, mode) for mode in modes}
    times = {mode: [] for mode in modes}
    for _ in range(args.rounds + 1):
        for mode, train in trainings.items():
            times[mode].append(seconds_of(partial(train, take(loaders[mode], args.steps)), args.device) / args.steps)

    precisions = {mode: mode.split()[0] for mode in modes}
    precisions[PLAIN] = "float32"
    peaks = {name: peak_flops(args.device, name) for name in sorted(set(precisions.values()))}
    [batch] = take(ours, 1)
    counts = {name: count_step(args, name, batch) for name in peaks}
    memories = peak_memories(args, modes)
    print(f"{args.rounds} rounds of {args.steps} steps")
    for name, peak in peaks.items():
        print(f"{name}: {counts[name] / 1e9:.0f} GFLOP a step; product: {peak / 1e12:.2f} TFLOP/s")
    columns = f"{'ms a step':>9} {'from':>8} {'to':>8} {'images/s':>9} {'to plain':>8} {'product':>8} {'memory':>10}"
    print(f"\n{'':18} {columns}")
    for mode, (_, *seconds) in times.items():
        median = statistics.median(seconds)
        ratio = statistics.median(plain / own for plain, own in zip(times[PLAIN][1:], seconds, strict=True))
        product = counts[precisions[mode]] / median / peaks[precisions[mode]]
        print(
            f"{mode:18} {1000 * median:9.2f} {1000 * min(seconds):8.2f} {1000 * max(seconds):8.2f}"
            f" {args.batch_size / median:9,.0f} {ratio:7.2f}x {product:8.1%} {memories[mode]:6,.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
