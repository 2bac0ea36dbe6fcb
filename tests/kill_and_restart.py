"""Kill a run with SIGKILL again and again, give the same command each time, and compare with a run left alone.

    python tests/kill_and_restart.py --kills 20

Some of the kills come at moments spread evenly over the run, the others inside the writing of a file: with half of
it written, before and after it is flushed to the disk, before and after it takes the place of the old one.
"""

import argparse
import builtins
import io
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn import datasets

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from command_line import files
from saved_runs import results
from saved_runs.checkpoint import load_checkpoint
from small import load_few_digits, train_small

# A process that has imported what takes long and forks itself for every run: each starts at once, and none inherits
# threads.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["train", "small", "sklearn.model_selection"])

STEPS = ("half written", "before fsync", "after fsync", "before replace", "after replace")
NUM_EPOCHS = 4
FLAGS = ["--dataset", "digits", "--batch_size", "48", "--num_epochs", str(NUM_EPOCHS), "--name", "x", "--device", "cpu"]


def die() -> None:
    """What `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_write(number: int, step: str) -> None:
    """Let this process be killed within its `number`-th atomic write, counted from 1."""
    count = 0

    def counted_open(file: Path, mode: str) -> io.IOBase:
        nonlocal count
        count += 1
        stream = builtins.open(file, mode)  # noqa: SIM115 - the caller closes it
        if count == number and step == "half written":
            whole = stream.write

            def half(content: bytes) -> None:
                whole(content[: len(content) // 2])
                stream.flush()
                die()

            return Wrapped(stream, half)
        return stream

    def deadly(call: Callable, name: str) -> Callable:
        def wrapped(*arguments: Any) -> Any:
            if count == number and step == f"before {name}":
                die()
            result = call(*arguments)
            if count == number and step == f"after {name}":
                die()
            return result

        return wrapped

    files.open = counted_open
    os.fsync = deadly(os.fsync, "fsync")
    os.replace = deadly(os.replace, "replace")


class Wrapped:
    """A stream with another `write`."""

    def __init__(self, stream: io.IOBase, write: Callable[[bytes], None]) -> None:
        self.stream, self.write = stream, write

    def __enter__(self) -> "Wrapped":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stream.close()


def run(flags: list[str], output: str, small: bool, death: tuple[int, str] | None) -> None:
    """What a child process does: one run on a few digits, killed within a write where `death` says which."""
    sys.stdout = sys.stderr = open(output, "a")  # noqa: SIM115 - for as long as the process lives
    if small:
        train_small()
    else:
        datasets.load_digits = load_few_digits
    if death is not None:
        die_in_write(*death)
    train.main(flags)


def start(
    path: Path, *flags: str, small: bool = False, death: tuple[int, str] | None = None
) -> multiprocessing.Process:
    """A run in a process of its own, of a ResNet-18 or a small network. Its output is added to the file `output`."""
    path.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, "--path", str(path), *flags]
    child = processes.Process(target=run, args=(flags, str(path / "output"), small, death))
    child.start()
    return child


def finish(path: Path, *flags: str, small: bool = False, death: tuple[int, str] | None = None) -> int:
    """The exit code of a run: 0, or -SIGKILL where it was killed."""
    child = start(path, *flags, small=small, death=death)
    child.join()
    return child.exitcode


def outcome(path: Path) -> dict[str, Any]:
    """All numbers and weights that a run has left, those of its checkpoint included, if it has one."""
    file = path / "networks" / "x-last.pt"
    state = load_checkpoint(file) if file.exists() else {}
    for what_may_differ in ("settings", "format"):
        state.pop(what_may_differ, None)
    return {
        "columns": results.read_results(path / "results" / "x.csv").columns,
        "best": torch.load(path / "networks" / "x-best.pt", weights_only=True),
        "state": state,
    }


def same(one: Any, other: Any) -> bool:
    """Whether two nested structures of tensors, arrays and plain values are equal, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return one == other


def main() -> None:
    """Kill, restart, compare; exit code 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    kills = parser.parse_args().kills

    with tempfile.TemporaryDirectory() as folder:
        alone, path = Path(folder) / "alone", Path(folder) / "0"
        for restart in ([], ["--restart"]):  # the first also waits for the process that forks itself
            began = time.monotonic()
            assert finish(alone, *restart) == 0
            seconds = time.monotonic() - began
        expected = outcome(alone)

        hits = attempts = finished = 0
        while hits < kills:
            attempts += 1
            if attempts % 2:
                moment = seconds * (hits + 1) / (kills + 1)
                where = f"after {moment:.1f} of {seconds:.1f} seconds"
                child = start(path, "--checkpoint_seconds", str(attempts // 2 % 3))
                child.join(moment)
                child.kill()
                child.join()
                code = child.exitcode
            else:
                death = 1 + attempts % 7, STEPS[attempts // 2 % len(STEPS)]
                where = f"in write {death[0]}, {death[1]}"
                code = finish(path, "--checkpoint_seconds", "0", death=death)
            if code == -signal.SIGKILL:
                hits += 1
                print(f"kill {hits}: {where}", flush=True)
            else:  # it was finished before: compare, and begin another
                assert code == 0 and same(outcome(path), expected)
                finished += 1
                path = Path(folder) / str(finished)
        code = finish(path)
        equal = code == 0 and same(outcome(path), expected)
        print(f"{hits} kills in {finished + 1} runs; their numbers and weights are {'' if equal else 'NOT '}the same")
        sys.exit(not equal)


if __name__ == "__main__":
    main()
