"""What a run costs as its images and the runs beside it grow: seconds and memory, in one table.

    python benchmarks/cost.py --path DIR

The images are digits, CIFAR-10 (in DIR/images; with torchvision's own first layers) and a folder of 50,000 JPEGs
that is made for the purpose (500×375, streamed to 224×224). So many runs at a time train a ResNet-18 for some seconds,
the cores shared out among them as `reproduce.py --jobs` does it. The columns:

    start     seconds from the start of a process to its first step: importing, finding and loading the images
    images/s  of all runs together
    epoch     seconds that an epoch of training takes one run, of all its images
    memory    of a run: the peak of its process, and what those that decode images for it have of their own
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from pathlib import Path

import torch
from torch import optim

sys.path.insert(0, str(Path(__file__).parent.parent))
import run_settings
from folders import make_photographs
from image_sets.batches import Batches
from saved_runs.circumstances import machine_name
from train import train_one_epoch
from training.preparation import construct, load_images, prepare
from weight_decay_and_learning_rate import adjust_weight_decay_and_learning_rate

DATA_SETS = {
    "digits": ["--dataset", "digits", "--batch_size", "64"],
    "CIFAR-10": ["--dataset", "cifar10", "--stem", "own"],
    "50,000 JPEGs": ["--dataset", "photographs", "--batch_size", "32"],
}


@dataclass
class Cost:
    """Of one run: seconds to its first step, images a second, images of an epoch, MiB."""

    start: float
    speed: float
    num_images: int
    memory: float


def make_many_photographs(folder: Path, number: int, different: int = 200) -> None:
    """So many JPEGs, a few of them under many names."""
    make_photographs(folder, different)
    for file in list((folder / "train").glob("*/*.jpg")):
        for n in range(int(file.stem), number, different):
            copy = file.with_name(f"{n}.jpg")
            if not copy.exists():
                os.link(file, copy)


def memory() -> float:
    """MiB of this process at its peak, and of those that it has started, without what they share with others."""
    places = [("self", "VmHWM:"), *((child.pid, "RssAnon:") for child in multiprocessing.active_children())]
    return sum(int(Path(f"/proc/{pid}/status").read_text().split(name)[1].split()[0]) for pid, name in places) / 2**10


def measure(began: float, flags: list[str], seconds: float, num_threads: int) -> Cost:
    """Train in this process for so long, after a first step that is not counted."""
    torch.set_num_threads(num_threads)
    settings = prepare(run_settings.parse([*flags, "--device", "cpu"]))
    image_set = load_images(settings)
    network = construct(settings, len(image_set.classes), image_set.size)
    optimizer = optim.SGD(adjust_weight_decay_and_learning_rate(network, learning_rate=0.001), momentum=0.9)
    batches = Batches(image_set, "train", settings.batch_size, normalize=False)
    train = partial(train_one_epoch, network, optimizer=optimizer, settings=settings)

    start, endless = time.time() - began, chain.from_iterable(repeat(batches))
    train(batches=[next(endless)])
    first, num_images = time.perf_counter(), 0
    while time.perf_counter() - first < seconds:
        batch = next(endless)
        train(batches=[batch])
        num_images += len(batch[1])
    return Cost(start, num_images / (time.perf_counter() - first), batches.num_images, memory())


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, default=Path(), help="where images/ is (default: the current folder)")
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 2, 4], help="at a time (default: 1 2 4)")
    parser.add_argument("--seconds", type=float, default=30, help="of training (default: %(default)s)")
    parser.add_argument("--data", nargs="+", choices=DATA_SETS, default=[*DATA_SETS], help="(default: all)")
    parser.add_argument("--precision", default="float32", help="as in train.py (default: %(default)s)")
    args = parser.parse_args()

    cores = len(os.sched_getaffinity(0))
    print(f"{machine_name(torch.device('cpu'))}, {cores} cores, torch {torch.__version__}, {args.precision}\n")
    print("| images | runs at a time | start (s) | images/s | epoch (s) | memory (MiB) |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as made:
        for name in args.data:
            path = args.path
            if name == "50,000 JPEGs":
                path = Path(made)
                make_many_photographs(path / "images" / "photographs", 50_000)
            flags = [*DATA_SETS[name], "--path", str(path), "--precision", args.precision]
            for runs in args.runs:
                context = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(runs, mp_context=context) as pool:
                    work = partial(measure, time.time(), flags, args.seconds, max(1, cores // runs))
                    costs = [future.result() for future in [pool.submit(work) for _ in range(runs)]]
                speed = sum(cost.speed for cost in costs)
                print(
                    f"| {name} | {runs} | {max(cost.start for cost in costs):.1f} | {speed:,.0f}"
                    f" | {costs[0].num_images / speed * runs:,.0f} | {max(cost.memory for cost in costs):,.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
