"""Makes the runs of an experiment: in this process, in processes of this machine, or on a Dask cluster."""

import io
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from queue import SimpleQueue

from command_line.flag_types import FlagError
from command_line.signals import interrupt, on_signals
from experiment.cluster import ClusterError, make_runs_on_cluster
from experiment.run_process import LOCK_SECONDS, Outcome, Tell, make_run_in_process
from run_settings import Settings
from saved_runs.results import Results

Made = Iterator[tuple[Settings, Outcome]]
CURSOR_MOVES = re.compile(r"\n*(\x1b\[A)*")  # to where a bar is


def make_runs(
    runs: Sequence[Settings],
    stops: list[int],
    jobs: int = 1,
    scheduler: str | None = None,
    device: str | None = None,
    train: Callable[..., Results] | None = None,
    tell: Tell = lambda run, bar: None,
) -> Made:
    """Make runs; yields each with what came of it, in the order in which they end.

    Args:
        runs: what `settings.parse` returns for each, with an absolute path.
        stops: where a handler of signals puts their numbers. As soon as there is one, no further run begins, and those
            at work end after their next step and are saved; what comes of them is the number.
        jobs: how many runs to make at a time, each in a process of its own. They share out the cores and the GPUs of
            this machine.
        scheduler: address of the scheduler of a Dask cluster, each of whose workers makes one run at a time.
        device: device of every run. Without it, the accelerator that torch finds, else the CPU.
        train: `train.train`, to make the runs in this process where `jobs` is 1.
        tell: called with a run and an empty text when it begins, then with the bar of its training as often as it is
            drawn anew; where each run is a process of its own, in other threads.

    Raises:
        FlagError: a flag is wrong, here or on the machine that makes the runs.
        ClusterError: there is no cluster, or it cannot make the runs.
    """
    if scheduler is not None:
        made = make_runs_on_cluster(runs, stops, scheduler, device, tell)
    elif jobs == 1 and train is not None:
        made = make_runs_here(runs, stops, device, train, tell)
    else:
        made = make_runs_in_processes(runs, stops, jobs, device, tell)
    try:
        for run, outcome in made:
            if isinstance(outcome, FlagError):
                raise outcome
            yield run, outcome
    except ClusterError:
        if not stops:  # or else nothing more was expected of the cluster
            raise
    finally:
        made.close()


def make_runs_here(
    runs: Sequence[Settings],
    stops: list[int],
    device: str | None,
    train: Callable[..., Results],
    tell: Tell,
) -> Made:
    """`make_runs` in this process, one after the other."""
    for run in runs:
        if stops:
            return
        tell(run, "")
        with redirect_stderr(BarReader(partial(tell, run))):
            outcome = make_run_here(run, stops, device, train)
        yield run, outcome
        if isinstance(outcome, int):  # a stop, perhaps one that no handler has noted
            return


def make_run_here(run: Settings, stops: list[int], device: str | None, train: Callable[..., Results]) -> Outcome:
    """Make one run in this process, or what is left of it; wait where another process is at work on it."""
    try:
        from training.devices import find_device  # torch takes seconds to import, and nothing else here needs it

        settings = replace(run, device=str(find_device(device)), restart=False)
        while not stops:
            try:
                with on_signals(interrupt):  # until the training handles signals itself
                    return train(settings, stops=stops)
            except BlockingIOError:
                time.sleep(LOCK_SECONDS)
        return stops[0]
    except KeyboardInterrupt as stop:
        if stop.args:  # the number of a signal
            return int(stop.args[0])
        return RuntimeError("KeyboardInterrupt was raised, but no signal has arrived")
    except Exception as error:  # whatever it is, the other runs go on
        return error


class BarReader(io.TextIOBase):
    """A standard error that passes on what is written to it, except for bars: with these, it calls `tell`."""

    encoding = "utf-8"  # or else bars are drawn in ASCII

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell, self.stderr = tell, sys.stderr

    def write(self, text: str) -> int:
        if text.startswith("\r"):
            self.tell(text.strip())
        elif not CURSOR_MOVES.fullmatch(text):
            self.stderr.write(text)
        return len(text)


def make_runs_in_processes(
    runs: Sequence[Settings], stops: list[int], jobs: int, device: str | None, tell: Tell
) -> Made:
    """`make_runs` in processes of this machine, `jobs` at a time."""
    import joblib

    num_threads = max(1, joblib.cpu_count() // jobs)
    devices: SimpleQueue[str | None] = SimpleQueue()
    for place in range(jobs):
        devices.put(device_of(place, device))
    closed: list[int] = []  # with a number, too, as soon as nobody waits for the runs any more

    def stopped() -> int:
        return next(iter(stops or closed), 0)

    def make(run: Settings) -> Outcome | None:
        if stopped():
            return None
        free = devices.get()
        try:
            return make_run_in_process(run, free, stopped, partial(tell, run), OMP_NUM_THREADS=str(num_threads))
        finally:
            devices.put(free)

    with ThreadPoolExecutor(jobs) as threads:
        being_made = {threads.submit(make, run): run for run in runs}
        try:
            for future in as_completed(being_made):
                if (outcome := future.result()) is not None:
                    yield being_made[future], outcome
        finally:
            closed.append(signal.SIGTERM)


def device_of(place: int, device: str | None) -> str | None:
    """The device of the runs at one of the places of `jobs`: the GPUs in turns where there are some."""
    if device in (None, "cuda"):
        import torch

        if num_gpus := torch.cuda.device_count():
            return f"cuda:{place % num_gpus}"
    return device
