"""A Dask cluster of processes of this machine, as a user would start it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from distributed import Client

TESTS = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS)))}


class Cluster:
    """A scheduler, and the workers that tests add to it. Its processes work in `folder`.

    Attributes:
        address: of the scheduler.
        scheduler: its process.
    """

    def __init__(self, folder: Path, processes: ExitStack) -> None:
        self.folder, self.processes = folder, processes
        self.file = folder / "scheduler.json"
        self.scheduler = self.start("scheduler", "--host", "127.0.0.1", "--port", "0")
        while not self.file.exists():
            assert self.scheduler.poll() is None, "the scheduler has not begun"
            time.sleep(0.05)
        self.address: str = json.loads(self.file.read_text())["address"]

    def start(self, kind: str, *arguments: str, **environment: str) -> subprocess.Popen:
        """Start a scheduler or a worker."""
        command = [sys.executable, "-m", "dask", kind, *arguments, "--scheduler-file", str(self.file), "--no-dashboard"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=self.folder, env=ENVIRONMENT | environment, **quiet)
        self.processes.enter_context(process)
        self.processes.callback(process.kill)
        return process

    def add_worker(self, *arguments: str, **environment: str) -> subprocess.Popen:
        """Start a worker of one thread, which is not started again when it is killed."""
        return self.start("worker", "--nthreads", "1", "--no-nanny", *arguments, **environment)

    def workers(self, number: int) -> set[str]:
        """The addresses of all workers, as soon as there are so many."""
        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(number)
            return set(client.nthreads())


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster without workers, which does not outlive the test."""
    with ExitStack() as processes:
        yield Cluster(folder, processes)
