"""One process at a time works on a run: a lock that is held as long as a process lives, also if its file is removed."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from filelock import lock_descriptor

from saved_runs.paths import RunFiles

HELD: set[int] = set()  # the descriptors of this process's locks


def let_go(descriptor: int) -> None:
    """Close the descriptor of a lock."""
    HELD.discard(descriptor)
    os.close(descriptor)


def let_go_of_all() -> None:
    """In a forked process, such as one that decodes images: a lock is free when the process that took it ends."""
    for descriptor in list(HELD):
        let_go(descriptor)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=let_go_of_all)


@contextmanager
def lock_run(files: RunFiles) -> Iterator[Callable[[], None]]:
    """Keep every other process from working on the same run. The lock is free again when the process ends.

    Yields a function to call often, and before each write: if somebody has removed the lock's file, it makes a new one.

    Raises:
        BlockingIOError: another process has the lock, or has taken it since its file was removed.
        OSError: the file cannot be made, or not be locked.
    """
    with ExitStack() as descriptors:
        lock = take_lock(files, descriptors)

        def keep() -> None:
            nonlocal lock
            try:
                ours = os.path.samestat(files.lock.stat(), os.fstat(lock))
            except FileNotFoundError:
                lock = take_lock(files, descriptors)
                return
            except OSError:  # a disk that does not answer: if it is for good, the next write will say so
                return
            if not ours:
                raise BlockingIOError(
                    f"{files.lock} was removed, and another process is at work on the run of {files.results} now"
                )

        yield keep


def take_lock(files: RunFiles, descriptors: ExitStack) -> int:
    """Lock the lock's file of a run, made if it is missing; returns its descriptor, which `descriptors` closes."""
    files.lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(files.lock, os.O_RDWR | os.O_CREAT, 0o666)
        HELD.add(descriptor)
        descriptors.callback(let_go, descriptor)
        taken = lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            message = f"{files.lock.parent} is on a file system that cannot lock files: give a --path on another one"
            raise OSError(message) from error
        raise
    if not taken:
        raise BlockingIOError(
            f"another process is at work on the run of {files.results}: wait for it, or give another --name"
        )
    return descriptor
