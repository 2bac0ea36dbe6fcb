"""Makes the runs of an experiment on a Dask cluster: each in a process of its own, which a worker starts and watches.

A run that loses its worker goes on from its checkpoint on another one.
"""

import logging
import signal
import time
import uuid
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from command_line.endings import in_one_line
from experiment.run_process import ATTEMPTS, POLL_SECONDS, Outcome, Tell, make_run_in_process
from run_settings import Settings

if TYPE_CHECKING:
    from distributed import Client, Future, Worker

CONNECT_SECONDS = 10  # how long a scheduler may take to let us in
ANSWER_SECONDS = 30  # how long it may take to answer, and to have a worker

STOPPED: set[str] = set()  # in a worker: the experiments whose runs are to stop


class ClusterError(Exception):
    """A cluster cannot make the runs; the message says in one line what to change."""


def make_run_in_worker(run: Settings, device: str | None, experiment: str) -> Outcome:
    """Make a run in a process that a worker starts, until the experiment is stopped; its bar becomes an event."""
    from distributed import get_worker

    worker = get_worker()

    def stopped() -> int:
        return int(signal.SIGTERM) if experiment in STOPPED else 0

    return make_run_in_process(run, device, stopped, lambda bar: worker.log_event(experiment, [run.run_name, bar]))


def stop_runs(experiment: str, dask_worker: "Worker") -> set[str]:
    """Stop the runs of an experiment in this worker. Returns the keys of the tasks at work in it; no other will be."""
    STOPPED.add(experiment)
    return {task.key for task in dask_worker.state.executing}


def make_runs_on_cluster(
    runs: Sequence[Settings],
    stops: list[int],
    scheduler: str,
    device: str | None,
    tell: Tell = lambda run, bar: None,
) -> Iterator[tuple[Settings, Outcome]]:
    """`make_runs` on the cluster of a scheduler.

    A worker is given a run when it is done with the one before, so that its loss costs no other run.
    """
    experiment = uuid.uuid4().hex
    waiting, losses = deque(runs), Counter()
    running: dict[str, tuple[Settings, Future]] = {}  # by address of the worker
    known, usable, told = set(), set(), False  # workers; whether they have been told to stop
    bars: dict[str, str] = {}  # the last one of each run, by its name
    deadline = time.monotonic() + ANSWER_SECONDS
    with connect(scheduler, stops) as client:
        client.subscribe_topic(experiment, lambda event: bars.update([event[1]]))
        while running or (waiting and not stops):
            alive = set(client.nthreads())
            if stops and not told:
                at_work = client.run(stop_runs, experiment, workers=list(running), on_error="ignore")
                running = {a: pair for a, pair in running.items() if pair[1].key in at_work.get(a, ())}
                told = True
            if not known and not alive and time.monotonic() > deadline:
                raise ClusterError(f"{scheduler} has no workers: start some with dask worker")
            if new := alive - known:
                problems = find_problems(client, new, runs[0].path)
                if problems and not known:  # those that join later and are of no use are left alone
                    raise ClusterError("; ".join(dict.fromkeys(problems.values())))
                usable |= new - problems.keys()
                known |= new
            for address in (usable & alive) - running.keys():
                if waiting and not stops:
                    arguments = (make_run_in_worker, waiting[0], device, experiment)
                    future = client.submit(*arguments, pure=False, workers=[address])
                    running[address] = waiting.popleft(), future
            for address, (run, future) in list(running.items()):
                if run.run_name in bars:
                    tell(run, bars.pop(run.run_name))
                if not future.done() and address in alive:
                    continue
                del running[address]
                outcome = outcome_of(future) if future.done() else None
                losses[run.run_name] += outcome is None
                if losses[run.run_name] == ATTEMPTS:
                    outcome = ChildProcessError(f"its worker was lost {ATTEMPTS} times")
                if outcome is None:
                    waiting.appendleft(run)
                else:
                    yield run, stops[0] if stops and isinstance(outcome, int) else outcome
            time.sleep(POLL_SECONDS)


def outcome_of(future: "Future") -> Outcome | None:
    """What came of a run that is done, None where its worker was lost."""
    from distributed import KilledWorker

    try:
        return future.result(timeout=CONNECT_SECONDS)
    except (KilledWorker, TimeoutError):  # TimeoutError: the worker was lost before it could hand over its results
        return None
    except futures.CancelledError:
        raise
    except Exception as error:
        return error


@contextmanager
def connect(scheduler: str, stops: list[int]) -> "Iterator[Client]":
    """A client of a scheduler. ClusterError where that is gone."""
    from distributed import Client

    for name in ("distributed", "distributed.client", "tornado.application"):  # Dask gives each a level of its own
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what goes wrong is reported here, in one line
    found: futures.Future[Client] = futures.Future()

    def find() -> None:  # in a thread: it may wait forever for somebody who listens there and says nothing
        try:
            found.set_result(Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False))
        except Exception as error:
            found.set_exception(error)

    Thread(target=find, daemon=True).start()
    deadline = time.monotonic() + CONNECT_SECONDS + 1
    while not found.done() and not stops and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    again = "start it, then run the same command again"
    try:
        client = found.result(timeout=0)
    except OSError as error:  # TimeoutError is one, too
        raise ClusterError(f"no Dask scheduler answers at {scheduler}: {again}") from error
    try:
        with client:
            yield client
    except (futures.CancelledError, OSError) as error:  # what Dask raises where the scheduler is gone
        reason = in_one_line(error)
        raise ClusterError(f"the Dask scheduler at {scheduler} does not answer any more: {again} ({reason})") from error


def find_problems(client: "Client", workers: Collection[str], path: Path) -> dict[str, str]:
    """Why workers cannot make runs whose files belong below `path`, and what to change, by their addresses."""
    probe = path / f"probe-{uuid.uuid4().hex}.tmp"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        return dict.fromkeys(workers, in_one_line(error))
    try:
        seen = client.run(Path.exists, probe, workers=list(workers), on_error="return")
    finally:
        probe.unlink(missing_ok=True)
    folder, module = Path(__file__).parent.parent, __package__
    found = client.run(find_spec, module, workers=list(workers), on_error="return")
    of_scheduler = {client.scheduler.address: client.run_on_scheduler(find_spec, module)}
    problems = {}
    for worker, sees in seen.items():
        specs = {worker: found.get(worker)} | of_scheduler
        lost = [address for address, spec in specs.items() if getattr(spec, "loader", None) is None]
        if isinstance(sees, Exception):
            problems[worker] = f"whether all workers share {path} cannot be seen: {worker}: {in_one_line(sees)}"
        elif not sees:
            problems[worker] = f"{path} must be a folder that all workers share; not so for {worker}"
        elif lost:
            problems[worker] = (
                f"start scheduler and workers with PYTHONPATH={folder}: {', '.join(lost)} cannot import {module}"
            )
    return problems
