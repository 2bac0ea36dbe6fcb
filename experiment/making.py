"""The engine of the experiment: makes runs in processes of this machine, or on a Dask cluster.

A run that loses its process goes on from its checkpoint in another one. The processes live as long as the experiment,
so that what torch has compiled for one run serves the next.
"""

import argparse
import logging
import math
import os
import signal
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent import futures
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line.endings import in_one_line
from command_line.signals import STOP_SIGNALS, interrupt, on_signals
from saved_runs.results import Results

if TYPE_CHECKING:
    from distributed import Client, Future, LocalCluster

Outcome = Results | str | int  # of a run: its results, why it failed, or the number of the signal that stopped it
Runs = Sequence[argparse.Namespace]

ATTEMPTS = 3  # how many processes a run may lose before it counts as failed
CONNECT_SECONDS = 10  # how long a scheduler may take to let us in
ANSWER_SECONDS = 30  # how long it may take to answer, and to have a worker
LOCK_SECONDS = 1  # between two looks whether another process is still at work on a run
POLL_SECONDS = 0.1

LOCAL = {  # Dask's configuration for the processes of this machine
    "distributed.deploy.lost-worker-timeout": "1 day",  # to come back; a process takes long to start on a busy machine
    "distributed.nanny.pre-spawn-environ": {},  # it is for many small tasks, and slows down the allocation of memory
    "distributed.worker.daemon": False,  # so that a run may have processes of its own, to decode images
    "distributed.scheduler.worker-ttl": None,  # an experiment may be suspended for as long as one likes
    "distributed.worker.profile.enabled": False,
}

# in a worker, by experiment: signals that stop its runs, and the names of those that have begun
STOPS: dict[str, list[int]] = {}
BEGUN: dict[str, list[str]] = {}
ONE_RUN = threading.Lock()  # the random generators are the process's: two runs at a time would share their draws


class ClusterError(Exception):
    """A cluster cannot make the runs; the message says in one line what to change."""


def make_runs(
    runs: Runs, stops: list[int], jobs: int = 1, scheduler: str | None = None, device: str | None = None
) -> Iterator[tuple[argparse.Namespace, Outcome]]:
    """Make runs; yields each with what came of it, in the order in which they end.

    Args:
        runs: what `settings.parse` returns for each, with an absolute path.
        stops: where a handler of signals puts their numbers. As soon as there is one, no further run begins, and those
            at work end after their next step and are saved; what comes of them is the number.
        jobs: how many runs to make at a time. One is made in this process, more are made in processes of their own,
            which share out the cores and the GPUs of this machine.
        scheduler: address of the scheduler of a Dask cluster, whose workers make one run each at a time.
        device: device of every run. Without it, the accelerator that torch finds, else the CPU.

    Raises:
        ClusterError: there is no cluster, or it cannot make the runs.
    """
    if jobs == 1 and scheduler is None:
        outcomes = make_runs_here(runs, stops, device)
    else:
        outcomes = make_runs_with_dask(runs, stops, jobs, scheduler, device)
    try:
        yield from outcomes
    except ClusterError:
        if not stops:  # or else nothing more was expected of the cluster
            raise


def make_runs_here(runs: Runs, stops: list[int], device: str | None) -> Iterator[tuple[argparse.Namespace, Outcome]]:
    """`make_runs` in this process, one after the other."""
    for run in runs:
        if stops:
            return
        outcome = make_run(run, device, stops)
        yield run, outcome
        if isinstance(outcome, int):  # a stop, perhaps one that no handler has noted
            return


def make_run(settings: argparse.Namespace, device: str | None, stops: list[int]) -> Outcome:
    """Make one run in this process, or what is left of it.

    Where another process is at work on it, such as one that a killed experiment has left behind, it waits.
    """
    try:
        import train  # it takes seconds, and nothing else here needs it
        from training.devices import find_device

        values = {**vars(settings), "device": find_device(device), "restart": False}
        while not stops:
            try:
                with on_signals(interrupt):  # until the training handles signals itself
                    return train.train(argparse.Namespace(**values), stops=stops)
            except BlockingIOError:
                time.sleep(LOCK_SECONDS)
        return stops[0]
    except KeyboardInterrupt as stop:
        return int(stop.args[0] if stop.args else signal.SIGINT)
    except Exception as error:  # whatever it is, the other runs go on
        return in_one_line(error)


def make_run_in_worker(
    make: Callable[..., Outcome], run: argparse.Namespace, device: str | None, experiment: str, num_threads: int | None
) -> Outcome:
    """Call `make_run` in a worker. With `num_threads`, it is one of several on this machine: they share its GPUs."""
    if num_threads is not None:
        import torch
        from distributed import get_worker, process

        process.os = argparse.Namespace(_exit=save_and_exit)  # Dask calls it where the experiment is gone
        torch.set_num_threads(num_threads)
        if device in (None, "cuda") and (num_gpus := torch.cuda.device_count()):
            device = f"cuda:{get_worker().name % num_gpus}"  # processes of this machine have numbers from 0 on as names
    stops = STOPS.setdefault(experiment, [])
    while not ONE_RUN.acquire(timeout=POLL_SECONDS):
        if stops:
            return stops[0]
    try:
        BEGUN.setdefault(experiment, []).append(run.name)
        return make(run, device, stops)
    finally:
        ONE_RUN.release()


def save_and_exit(code: int) -> None:
    """In place of `os._exit`: first let the run at work in this process, if any, be saved."""
    for stops in STOPS.values():
        stops.append(signal.SIGTERM)
    with ONE_RUN:
        os._exit(code)


def stop_runs(experiment: str, number: int) -> list[str]:
    """Stop the runs of an experiment in this worker. Returns the names of those that have begun; no other will."""
    STOPS.setdefault(experiment, []).append(number)
    return BEGUN.get(experiment, [])


def make_runs_with_dask(
    runs: Runs, stops: list[int], jobs: int, scheduler: str | None, device: str | None
) -> Iterator[tuple[argparse.Namespace, Outcome]]:
    """`make_runs` on the cluster of a scheduler, or on one of `jobs` processes of this machine.

    A worker is given a run when it is done with the one before, so that its loss costs no other run.
    """
    from dask.system import CPU_COUNT

    experiment = uuid.uuid4().hex
    num_threads = None if scheduler else max(1, CPU_COUNT // jobs)
    waiting, losses = deque(runs), Counter()
    running: dict[str, tuple[argparse.Namespace, Future]] = {}  # by address of the worker
    known, usable, told = set(), set(), False  # workers; whether they have been told to stop
    deadline = time.monotonic() + ANSWER_SECONDS
    with connect(min(jobs, len(runs)), scheduler, stops) as client:
        while running or (waiting and not stops):
            alive = set(ask(client.nthreads))
            if stops and not told:
                begun = ask(client.run, stop_runs, experiment, stops[0], workers=list(running), on_error="ignore")
                running = {a: pair for a, pair in running.items() if pair[0].name in begun.get(a, ())}
                told = True
            if not known and not alive and time.monotonic() > deadline:
                raise ClusterError(f"{scheduler} has no workers: start some with dask worker")
            if new := alive - known:
                problem = find_problem(client, new, runs[0].path)
                if problem and not known:  # one that joins later and is of no use is left alone
                    raise ClusterError(problem)
                usable |= set() if problem else new
                known |= new
            for address in (usable & alive) - running.keys():
                if waiting and not stops:
                    arguments = (make_run, waiting[0], device, experiment, num_threads)
                    future = client.submit(make_run_in_worker, *arguments, pure=False, workers=[address])
                    running[address] = waiting.popleft(), future
            for address, (run, future) in list(running.items()):
                if not future.done() and address in alive:
                    continue
                del running[address]
                outcome = outcome_of(future) if future.done() else None
                losses[run.name] += outcome is None
                if losses[run.name] == ATTEMPTS:
                    outcome = f"its process was killed {ATTEMPTS} times, perhaps for lack of memory"
                if outcome is None:
                    waiting.appendleft(run)
                else:
                    yield run, outcome
            time.sleep(POLL_SECONDS)


def outcome_of(future: "Future") -> Outcome | None:
    """What came of a run that is done, None where its process was lost."""
    from distributed import KilledWorker

    try:
        return future.result(timeout=CONNECT_SECONDS)
    except (KilledWorker, TimeoutError):  # TimeoutError: the process was lost before it could hand over its results
        return None
    except futures.CancelledError:
        raise
    except Exception as error:
        return in_one_line(error)


@contextmanager
def connect(jobs: int, scheduler: str | None, stops: list[int]) -> "Iterator[Client]":
    """A client of a scheduler, or of `jobs` processes of this machine. ClusterError where the scheduler is gone."""
    import dask
    from distributed import Client

    for name in ("distributed", "distributed.client", "tornado.application"):  # Dask gives each a level of its own
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what goes wrong is reported here, in one line
    with ExitStack() as stack:
        cluster = scheduler
        if scheduler is None:
            stack.enter_context(dask.config.set(LOCAL))
            resource_tracker.ensure_running()  # before Python 3.12, the thread that starts it gets signals again
            cluster = stack.enter_context(ask(start_processes, jobs, seconds=math.inf))
        try:
            options = {"timeout": CONNECT_SECONDS, "set_as_default": False}
            client = ask(Client, cluster, **options, seconds=CONNECT_SECONDS + 1, stops=stops)
            yield stack.enter_context(client)
        except (futures.CancelledError, OSError) as error:
            message = f"no Dask scheduler answers at {scheduler}: start it, then run the same command again"
            raise ClusterError(message) from error


def start_processes(jobs: int) -> "LocalCluster":
    """A cluster of `jobs` processes of this machine."""
    from distributed import LocalCluster

    options = {"n_workers": jobs, "threads_per_worker": 1, "processes": True, "memory_limit": 0}
    options |= {"host": "127.0.0.1", "dashboard_address": ":0", "silence_logs": logging.CRITICAL}
    for _ in range(ATTEMPTS):
        with suppress(RuntimeError):  # one of them is lost before it is there
            return LocalCluster(**options)
    raise ClusterError(f"{jobs} processes cannot be started, perhaps for lack of memory: give a smaller --jobs")


def ask(
    function: Callable, *arguments: Any, seconds: float = ANSWER_SECONDS, stops: Sequence[int] = (), **options: Any
) -> Any:
    """Call one of Dask's functions, which may wait forever. TimeoutError where it takes too long or a stop arrives.

    It is called in a thread to which the system hands no signals. The processes that it starts inherit that: Ctrl-C in
    a terminal reaches them, too, but they are to stop when they are told.
    """
    answer = futures.Future()

    def call() -> None:
        if hasattr(signal, "pthread_sigmask"):  # not on Windows
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            answer.set_result(function(*arguments, **options))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    deadline = time.monotonic() + seconds
    while not futures.wait([answer], timeout=POLL_SECONDS).done and not stops and time.monotonic() < deadline:
        pass
    return answer.result(timeout=0)


def find_problem(client: "Client", workers: Collection[str], path: Path) -> str | None:
    """Why some of the workers cannot make runs whose files belong below `path`, and what to change."""
    probe = path / f"probe-{uuid.uuid4().hex}.tmp"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        return in_one_line(error)
    try:
        seen = ask(client.run, Path.exists, probe, workers=list(workers), on_error="return")
    finally:
        probe.unlink(missing_ok=True)
    if blind := [address for address, sees in seen.items() if sees is not True]:
        return f"{path} must be a folder that all workers share; not so for {', '.join(blind)}"
    folder, module = Path(__file__).parent.parent, __package__
    found = ask(client.run, find_spec, module, workers=list(workers), on_error="return")
    found[client.scheduler.address] = ask(client.run_on_scheduler, find_spec, module)
    if lost := [address for address, spec in found.items() if getattr(spec, "loader", None) is None]:
        return f"start scheduler and workers with PYTHONPATH={folder}: {', '.join(lost)} cannot import {module}"
    return None
