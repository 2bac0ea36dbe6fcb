"""Notices that another process of a run has died, or its machine, whatever this process is waiting for."""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

SILENCE = timedelta(seconds=60)  # after which a process without a pulse counts as lost
BEAT = 1.0  # seconds between two beats
GRACE = 20.0  # seconds to come out of a computation with a process that is lost
ALIVE, LEAVING, FAILING = range(3)  # what a beat says; the largest of all processes counts


class Pulse:
    """A thread that meets those of all other processes once a second, as long as all take part.

    A process that dies closes its connections, which is noticed at once; a machine that fails does not, and is noticed
    after `SILENCE`. The main thread then has `GRACE` seconds to end by itself. Else the process ends where it is, as no
    exception reaches a thread that waits within Gloo or NCCL.

    Args:
        last_words: called before that; it says what has happened.

    Attributes:
        ending: to be set when the main thread is on its way to its end.
    """

    def __init__(self, last_words: Callable[[], None]) -> None:
        self.last_words = last_words
        self.group = dist.new_group(backend="gloo", timeout=SILENCE)
        self.state, self.next_beat, self.ending = ALIVE, threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.keep_beating, daemon=True)
        self.thread.start()

    def keep_beating(self) -> None:
        """Until one process leaves or fails, or is lost."""
        said = ALIVE
        with suppress(RuntimeError):
            while said == ALIVE:
                self.next_beat.wait(BEAT)
                state = torch.tensor(self.state)
                dist.all_reduce(state, dist.ReduceOp.MAX, group=self.group)
                said = state.item()
        if said != LEAVING and not self.ending.wait(GRACE):
            self.end_at_once()

    def stop(self, state: int) -> None:
        """Let the last beat say whether this process is `LEAVING`, as all are, or `FAILING`."""
        self.state = state
        self.ending.set()
        self.next_beat.set()
        self.thread.join(GRACE)
        if self.thread.is_alive():  # Python must not end with a thread in the middle of Gloo
            self.end_at_once()

    def end_at_once(self) -> NoReturn:
        """End this process, whatever its threads do, with exit code 1."""
        self.last_words()
        os._exit(1)
