"""Signals that stop a command: every one is noted, and loops end where they want to when one has arrived."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

# what ends a command: Ctrl-C, a polite request, and, where there are terminals, one that was closed
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun, as one of several processes
STOP_AT_END_OF_INPUT = "STOP_AT_END_OF_INPUT"  # in the environment of a run whose standard input another process holds

ARRIVED: list[int] = []  # numbers of the signals that have arrived within `catch_signals`
CATCHING: list[bool] = []  # whether the signals raise, for each `catch_signals` around the code at work

Item = TypeVar("Item")


@contextmanager
def catch_signals(raising: bool) -> Iterator[None]:
    """Put the numbers of `STOP_SIGNALS` that arrive into `ARRIVED`, which is empty again after the outermost one.

    With `raising`, the first one raises KeyboardInterrupt with its number as well. Python drops what is raised within a
    finalizer, so code that goes on calls `raise_if_stopped` now and then. A second Ctrl-C ends the process at once;
    clusters repeat the other signals while a run is being saved. A signal that is ignored already, as by nohup, stays
    so. Outside the main thread, where Python cannot handle signals, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: handler for number in STOP_SIGNALS if (handler := signal.getsignal(number)) != signal.SIG_IGN}
    CATCHING.append(raising)
    try:
        for number in earlier:
            signal.signal(number, handle)
        yield
    finally:
        CATCHING.pop()
        if CATCHING or not LAUNCHED:  # torchrun stops its other processes as soon as one has ended
            for number, handler in earlier.items():
                signal.signal(number, handler)
        if not CATCHING:
            ARRIVED.clear()


def handle(number: int, _: FrameType | None) -> None:
    """Note that a signal has arrived, and stop what is at work if it is to be stopped at once."""
    if number == signal.SIGINT and number in ARRIVED and not LAUNCHED:  # torchrun may repeat a Ctrl-C
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    ARRIVED.append(number)
    if CATCHING[-1:] == [True] and len(ARRIVED) == 1:
        raise KeyboardInterrupt(number)


def raise_if_stopped() -> None:
    """KeyboardInterrupt with the number of the first signal that has arrived, if one has."""
    if ARRIVED:
        raise KeyboardInterrupt(ARRIVED[0])


def until_stopped(items: Iterable[Item]) -> Iterator[Item]:
    """The items, one after the other; KeyboardInterrupt as soon as a signal has arrived."""
    for item in items:
        raise_if_stopped()
        yield item


def stop_at_end_of_input() -> None:
    """Stop this process, as SIGTERM does, when its standard input ends, if its environment asks for that.

    Whoever has started it holds the other end, and stops it by closing that: also where it is killed itself.
    """

    def wait() -> None:
        while os.read(0, 1):  # not by sys.stdin, which has a lock that forked processes would find taken
            pass
        if signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
            ARRIVED.append(signal.SIGTERM)
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    if os.environ.pop(STOP_AT_END_OF_INPUT, None):
        threading.Thread(target=wait, daemon=True).start()
