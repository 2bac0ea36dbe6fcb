"""The workers of a Dask cluster as places for the runs of an experiment. Every question to it has a time limit."""

import logging
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from command_line.endings import in_one_line
from run_settings import Settings

if TYPE_CHECKING:
    from distributed import Client

ANSWER_SECONDS = 10  # how long a scheduler or a worker may take to answer
WORKER_SECONDS = 30  # how long it may take until there is a worker


class ClusterError(Exception):
    """A cluster cannot make the runs; the message says in one line what to change."""


def ask(question: Callable[..., Any], *arguments: Any, **options: Any) -> Future:
    """What a function returns, as soon as it does: in a thread, which may wait forever and keeps no program alive."""
    answer: Future = Future()

    def find() -> None:
        try:
            answer.set_result(question(*arguments, **options))
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=find, daemon=True).start()
    return answer


class Cluster:
    """The workers of a Dask cluster as places for runs, one at a time each.

    All files of the runs are below `path`; `report` is called with a line where a worker is of no use.
    """

    def __init__(self, client: "Client", path: Path, report: Callable[[str], None]) -> None:
        self.client, self.path, self.report = client, path, report
        self.problems: dict[str, str] = {}  # why a worker cannot make runs; empty where it can
        self.deadline = time.monotonic() + WORKER_SECONDS

    def places(self) -> Collection[str]:
        """The addresses of the workers that can make runs. Those that join later and cannot are left alone.

        ClusterError where there is no worker, or one of the first cannot make runs.
        """
        alive = set(ask(self.client.nthreads).result(ANSWER_SECONDS))
        if not self.problems and not alive and time.monotonic() > self.deadline:
            raise ClusterError(f"{self.client.scheduler.address} has no workers: start some with dask worker")
        if new := alive - self.problems.keys():
            found = self.find_problems(new)
            problems = [f"{worker}: {problem}" for worker, problem in found.items() if problem]
            if problems and not self.problems:
                raise ClusterError("; ".join(problems))
            for problem in problems:
                self.report(f"no runs for a worker that has joined: {problem}")
            self.problems |= found
        return [worker for worker in alive if not self.problems[worker]]

    def begin(self, place: str, make: Callable[..., Any], run: Settings) -> Future:
        """Make a run in a worker."""
        return self.client.get_executor(pure=False, workers=[place]).submit(make, run)

    def stop(self, places: Collection[str], stop: Callable[[], bool]) -> Collection[str]:
        """Stop the runs in workers; returns where one is to be waited for. Workers that do not answer are named."""
        answers = self.ask_workers(places, stop) if self.client.status == "running" else {}
        for worker, answer in answers.items():
            if isinstance(answer, TimeoutError):
                self.report(f"the worker {worker} does not answer: its run may go on")
        return [worker for worker, answer in answers.items() if answer is True]

    def ask_workers(self, workers: Collection[str], function: Callable[[], Any]) -> dict[str, Any]:
        """What a function returns in each worker, or the error that it raises: TimeoutError without an answer."""
        questions = {w: ask(self.client.run, function, workers=[w], on_error="return") for w in workers}
        wait(questions.values(), ANSWER_SECONDS)
        answers = {}
        for worker, question in questions.items():
            try:
                answers |= question.result(timeout=0)
            except OSError as error:  # TimeoutError is one, too
                answers[worker] = error
        return answers

    def find_problems(self, workers: Collection[str]) -> dict[str, str]:
        """Why workers cannot make runs, and what to change, by their addresses; empty where they can."""
        path, package, project = self.path, __package__, Path(__file__).parent.parent
        probe = path / f"probe-{uuid.uuid4().hex}.tmp"

        def look() -> str:  # it is sent as it stands, to where this module may be unknown
            if getattr(find_spec(package), "loader", None) is None:
                return f"it cannot import {package}: start scheduler and workers with PYTHONPATH={project}"
            return "" if probe.exists() else f"{path} must be a folder that all workers share"

        try:
            path.mkdir(parents=True, exist_ok=True)
            probe.touch()
            answers = self.ask_workers(workers, look)
        except OSError as error:
            raise ClusterError(in_one_line(error)) from error
        finally:
            probe.unlink(missing_ok=True)
        silence = f"it does not answer within {ANSWER_SECONDS} seconds"
        answers = {worker: silence if isinstance(a, TimeoutError) else a for worker, a in answers.items()}
        return {worker: in_one_line(a) if isinstance(a, Exception) else a for worker, a in answers.items()}


@contextmanager
def on_cluster(scheduler: str, path: Path, report: Callable[[str], None]) -> Iterator[Cluster]:
    """The cluster of a scheduler. ClusterError where that does not answer, or not any more."""
    from distributed import Client

    for name in ("distributed", "distributed.client", "tornado.application"):  # Dask gives each a level of its own
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what goes wrong is reported here, in one line
    again = "start it, then run the same command again"
    try:
        client = ask(Client, scheduler, timeout=ANSWER_SECONDS, set_as_default=False).result(ANSWER_SECONDS)
    except OSError as error:
        raise ClusterError(f"no Dask scheduler answers at {scheduler}: {again}") from error
    try:
        with client:
            yield Cluster(client, path, report)
    except (CancelledError, OSError) as error:  # what Dask raises where the scheduler is gone
        reason = in_one_line(error)
        raise ClusterError(f"the Dask scheduler at {scheduler} does not answer any more: {again} ({reason})") from error
