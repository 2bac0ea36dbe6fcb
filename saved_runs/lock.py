"""One process at a time works on a run: a lock that is held as long as its process lives."""

from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from command_line.files import AtWorkError
from saved_runs.results import RunFiles


@contextmanager
def lock_run(files: RunFiles) -> Iterator[None]:
    """Keep every other process from working on the same run. AtWorkError where one does already.

    The lock is free again when the process ends.
    """
    files.lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(files.lock, blocking=False).acquire()
    except Timeout:
        problem = f"a process is at work on the run of {files.results} already"
        raise AtWorkError(f"{problem}: wait for it, or give another --name") from None
    except OSError as error:
        raise OSError(error.errno, f"cannot lock it: {error.strerror}", str(files.lock)) from error
    with lock:
        yield
