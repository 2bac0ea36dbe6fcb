"""Makes the runs of an experiment: each is `train.py` in a process of its own, here or started by a Dask worker."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path

from command_line.endings import AT_WORK, DIVERGED
from command_line.files import AtWorkError
from command_line.flag_types import FlagError
from command_line.signals import ARRIVED, STOP_AT_END_OF_INPUT, STOP_SIGNALS
from experiment.cluster import on_cluster
from run_settings import Settings, as_arguments
from saved_runs.results import Results, read_results, run_files

Outcome = Results | Exception | int  # of a run: its results, why it failed, or the number of the signal that stopped it

TRAIN = [sys.executable, str(Path(__file__).parent.parent / "train.py")]
ATTEMPTS = 3  # how many processes or workers a run may lose before it counts as failed
LOCK_SECONDS = 1  # until a run is tried again that another process is at work on
LOOK_SECONDS = 0.2  # between two looks at the runs
KEPT = 10_000  # bytes of what a process has written last on standard error

STOPPED: set[str] = set()  # the experiments whose runs are to stop in this process
BEING_MADE: list[str] = []  # the experiment of each run that this process is at work on


class LostError(Exception):
    """The process or the worker of a run is gone; the run can go on in another one."""


def make_run(run: Settings, experiment: str, **environment: str) -> Outcome:
    """Make a run, or what is left of it, in a process of its own, which Ctrl-C in a terminal does not reach.

    When the process's standard input ends, it stops after its next step and saves the run: as soon as the experiment is
    in `STOPPED`, and also where this process dies. `environment` has further variables for the process.
    """
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}  # where this process finds its modules, so may a user's own be
    variables = {**os.environ, **paths, STOP_AT_END_OF_INPUT: "1", **environment}
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "bufsize": 0}
    command = [*TRAIN, *as_arguments(run)]
    BEING_MADE.append(experiment)
    try:
        if experiment in STOPPED:  # it was waiting in a busy worker
            return signal.SIGTERM
        with subprocess.Popen(command, **streams, env=variables, start_new_session=True) as process:
            os.set_blocking(process.stderr.fileno(), False)
            errors, ended = b"", False
            while not ended:
                ended = process.poll() is not None
                if experiment in STOPPED:
                    process.stdin.close()
                errors = (errors + (process.stderr.read() or b""))[-KEPT:]
                time.sleep(0 if ended else LOOK_SECONDS)
    finally:
        BEING_MADE.remove(experiment)
    code = process.returncode
    if code == 0:
        return read_results(run_files(run.path, run.run_name).results)
    if (number := -code if code < 0 else code - 128) in STOP_SIGNALS:
        return number
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}  # most of the real-time signals have none
        return LostError(f"its process was killed by {names.get(-code, f'signal {-code}')}")
    if code == AT_WORK:
        time.sleep(LOCK_SECONDS)
    kinds = {2: FlagError, AT_WORK: AtWorkError, DIVERGED: FloatingPointError}
    return kinds.get(code, ChildProcessError)(reason_in(errors.decode(errors="replace"), code))


def reason_in(errors: str, code: int) -> str:
    """Why `train.py` has ended, from what it has written on standard error: its own line, or that of a traceback."""
    reasons = re.findall(r"(?:^|[\r\n])train\.py: error: ([^\r\n]+)", errors)
    lines = [line for line in errors.split("\n") if line.strip() and "\r" not in line]  # as there is in a bar
    return [f"it ended with exit code {code}", *lines, *reasons][-1]


def stop_runs(experiment: str) -> bool:
    """Stop the runs of an experiment in this process. Returns whether it is at work on one."""
    STOPPED.add(experiment)
    return experiment in BEING_MADE


class Here(ThreadPoolExecutor):
    """Places for runs on this machine: threads that wait, each with a device and a share of the cores.

    Without a `device`, they share out the GPUs.
    """

    def __init__(self, jobs: int, device: str | None) -> None:
        super().__init__(jobs)
        self.devices, self.environment = {str(place): device for place in range(jobs)}, {}
        if jobs > 1:
            import joblib  # it takes long, and most runs are made one by one
            import torch

            self.environment = {"OMP_NUM_THREADS": str(max(1, joblib.cpu_count() // jobs))}
            if device in (None, "cuda") and (num_gpus := torch.cuda.device_count()):
                self.devices = {place: f"cuda:{int(place) % num_gpus}" for place in self.devices}

    def places(self) -> Collection[str]:
        """The names of all places."""
        return self.devices.keys()

    def begin(self, place: str, make: Callable[..., Outcome], run: Settings) -> "Future[Outcome]":
        """Make a run at a place."""
        return self.submit(make, replace(run, device=self.devices[place]), **self.environment)

    def stop(self, places: Collection[str], stop: Callable[[], bool]) -> Collection[str]:
        """Stop the runs at places; returns where one is to be waited for."""
        stop()
        return places


def make_runs(
    runs: Sequence[Settings],
    jobs: int = 1,
    scheduler: str | None = None,
    device: str | None = None,
    report: Callable[[str], None] = lambda line: None,
    show: Callable[[Sequence[Settings]], None] = lambda at_work: None,
    stops: Sequence[int] = ARRIVED,
) -> Iterator[tuple[Settings, Outcome]]:
    """Make runs; yields each with what came of it, in the order in which they end.

    A run that loses its process or its worker goes on in another one. Where another process is at work on a run, it is
    tried again until that is done.

    Args:
        runs: their settings.
        jobs: how many to make at a time. They share out the cores and, without `device`, the GPUs of this machine.
        scheduler: address of the scheduler of a Dask cluster, each of whose workers makes one run at a time.
        device: of every run.
        report: called with a line where a run waits or a worker is of no use.
        show: called with the runs at work, again and again.
        stops: numbers of signals that have arrived. As soon as there is one, no further run begins, and those at work
            end after their next step and are saved; what comes of them is the number.

    Raises:
        FlagError: a flag is wrong, here or on the machine that makes the runs.
        ClusterError: there is no cluster, or it cannot make the runs.
    """
    experiment, told = uuid.uuid4().hex, False
    make, stop = partial(make_run, experiment=experiment), partial(stop_runs, experiment)
    waiting, losses, busy = deque(runs), Counter(), set()
    at_work: dict[str, tuple[Settings, Future[Outcome]]] = {}  # by place
    with on_cluster(scheduler, runs[0].path, report) if scheduler else Here(jobs, device) as pool:
        try:
            while at_work or (waiting and not stops):
                if stops and not told:
                    left, told = pool.stop(at_work.keys(), stop), True
                    at_work = {place: at_work[place] for place in left}
                places = pool.places()
                for place in sorted(set(places) - at_work.keys()):
                    if waiting and not stops:
                        run = waiting.popleft()
                        at_work[place] = run, pool.begin(place, make, replace(run, restart=False, device=device))
                show([run for run, _ in at_work.values()])
                if not at_work:  # there is no worker yet
                    time.sleep(LOOK_SECONDS)
                wait([future for _, future in at_work.values()], LOOK_SECONDS, FIRST_COMPLETED)
                for place, (run, future) in list(at_work.items()):
                    if future.done():
                        outcome = future.exception() or future.result()
                    elif place not in places:
                        outcome = LostError(f"its worker {place} is gone")
                    else:
                        continue
                    del at_work[place]
                    if isinstance(outcome, FlagError):
                        raise outcome
                    if isinstance(outcome, AtWorkError):
                        if run not in busy:
                            report(f"{run.run_name} waits: another process is at work on it")
                        busy.add(run)
                        waiting.append(run)
                    elif isinstance(outcome, LostError):
                        losses[run] += 1
                        if losses[run] < ATTEMPTS:
                            waiting.appendleft(run)
                        else:
                            yield run, ChildProcessError(f"it was lost {ATTEMPTS} times: {outcome}")
                    else:
                        yield run, stops[0] if stops and isinstance(outcome, int) else outcome
        finally:
            if not told:
                pool.stop(at_work.keys(), stop)
