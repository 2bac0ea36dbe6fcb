"""How long what grows with an experiment takes: its plan, its result files, its test, a folder of images.

    python benchmarks/growth.py

prints a table with a row for each size. Times that grow faster than the size are a mistake.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiment.plan import parse
from image_sets.batches import draw_order
from image_sets.folders import find_images
from reporting.comparison import sign_flip_p_value
from run_settings import Settings, determining
from saved_runs.by_seed import read_by_seed
from saved_runs.results import COLUMNS, Results, write_results

SIZES = (100, 1_000, 10_000)


def plan(folder: Path, size: int) -> Callable[[], object]:
    """Plan an experiment of so many runs."""
    return lambda: parse(["--seeds", f"1-{size // 2}"])


def results(folder: Path, size: int) -> Callable[[], object]:
    """Read so many result files of 180 epochs."""
    columns = {name: np.arange(1, 181, dtype=int if name == "epoch" else float) for name in COLUMNS}
    for seed in range(size):
        write_results(folder / f"{seed}.csv", Results({**determining(Settings()), "seed": seed}, columns))
    return lambda: read_by_seed(folder.glob("*.csv"), "these")


def sign_flips(folder: Path, size: int) -> Callable[[], object]:
    """Test so many differences by flipping their signs."""
    differences = np.random.default_rng(0).normal(0.1, 1, size)
    return lambda: sign_flip_p_value(differences)


def images(folder: Path, size: int) -> Callable[[], object]:
    """Find so many images in a folder."""
    for part in ("train", "test"):
        for label in range(10):
            (folder / part / str(label)).mkdir(parents=True)
            for index in range(size // 20):
                Image.new("L", (8, 8)).save(folder / part / str(label) / f"{index}.png")
    return lambda: find_images(folder)


def order(folder: Path, size: int) -> Callable[[], object]:
    """Draw the order of an epoch of so many images."""
    return lambda: draw_order(size, shuffle=True)


def main() -> None:
    """The command line."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"| | {' | '.join(f'{size:,}' for size in SIZES)} |\n|---|{'---|' * len(SIZES)}")
    for prepare in (plan, results, sign_flips, images, order):
        seconds = []
        for size in SIZES:
            with tempfile.TemporaryDirectory() as folder:
                work = prepare(Path(folder), size)
                start = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - start)
        what = prepare.__doc__.rstrip(".")
        print(f"| {what} | {' | '.join(f'{value:.4f} s' for value in seconds)} |")


if __name__ == "__main__":
    main()
