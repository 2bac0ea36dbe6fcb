"""Stand-ins for runs, in a module that other processes import at once; as a program, an experiment of them."""

import multiprocessing
import os
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from command_line.signals import on_signals
from experiment import making


def light_run(name: str, path: Path = Path()) -> Namespace:
    """What the engine needs of a run."""
    return Namespace(name=name, path=path)


def make_run(run: Namespace, device: str | None, stops: list[int]) -> str | int:
    """In place of `making.make_run`: what happens depends on the first word of the run's name.

    'deadly' kills its process, 'unlucky' only the first time; 'slow' is never done, 'patient' when 'unlucky' is;
    'parent' starts a process of its own. Where a run has begun there is a file of its name, in which is the process.
    """
    kind, files = run.name.split()[0], run.path / "begun"
    files.mkdir(exist_ok=True)
    first_time = not (files / run.name).exists()
    (files / f"{run.name}.tmp").write_text(str(os.getpid()))
    (files / f"{run.name}.tmp").rename(files / run.name)
    if kind == "deadly" or (kind == "unlucky" and first_time):
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "parent":
        child = multiprocessing.Process(target=(files / f"{run.name}'s child").touch)
        child.start()
        child.join()
    if kind == "unlucky":
        (files / "done").touch()
    while kind == "slow" or (kind == "patient" and not (files / "done").exists()):
        if stops:
            time.sleep(0.5)  # saves what it has
            (files / f"{run.name} saved").touch()
            return stops[0]
        time.sleep(0.01)
    return f"done on {device}"


def make_run_in_worker(*arguments: Any) -> str | int:
    """`making.make_run_in_worker` on two GPUs, and without torch, whose import takes seconds."""
    cuda = SimpleNamespace(device_count=lambda: 2)
    sys.modules["torch"] = SimpleNamespace(cuda=cuda, set_num_threads=lambda number: None)
    return making.make_run_in_worker(*arguments)


def process_of(run: Namespace) -> int:
    """The process that has begun a run, once it has."""
    deadline = time.monotonic() + 60
    while not (file := run.path / "begun" / run.name).exists():
        assert time.monotonic() < deadline, f"{run.name} has not begun"
        time.sleep(0.01)
    return int(file.read_text())


def main(path: str, *names: str) -> None:
    """Make stand-ins in two processes, stopped by signals; prints what comes of each."""
    making.make_run, making.make_run_in_worker = make_run, make_run_in_worker
    stops: list[int] = []
    with on_signals(stops.append):
        for run, outcome in making.make_runs([light_run(name, Path(path)) for name in names], stops, jobs=2):
            print(run.name, outcome, flush=True)


if __name__ == "__main__":
    import light  # so that other processes find everything of this file by its import

    light.main(*sys.argv[1:])
