"""Signals that stop a command, and loops that end where they want to when one arrives."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, TypeVar

# what ends a command: Ctrl-C, a polite request, and, where there are terminals, one that was closed
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


Item = TypeVar("Item")


LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun, as one of several processes
STOP_AT_END_OF_INPUT = "STOP_AT_END_OF_INPUT"  # in the environment of a run whose standard input another process holds


def until_stopped(items: Iterable[Item], stops: Sequence[int]) -> Iterator[Item]:
    """The items, one after the other; KeyboardInterrupt as soon as `stops` has the number of a signal."""
    for item in items:
        if stops:
            raise KeyboardInterrupt(stops[0])
        yield item


@contextmanager
def on_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Call `handle` with the number of the first of `STOP_SIGNALS` that arrives.

    A second Ctrl-C ends the process at once; the others are ignored then, as clusters repeat them while a run is being
    saved. A signal that is ignored already, as by nohup, stays so. Outside the main thread, where Python cannot handle
    signals, this does nothing.
    """

    def first(number: int, _: FrameType | None) -> None:
        for other in earlier:
            at_once = other == signal.SIGINT and not LAUNCHED  # torchrun may repeat a Ctrl-C
            signal.signal(other, signal.SIG_DFL if at_once else signal.SIG_IGN)
        handle(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: handler for number in STOP_SIGNALS if (handler := signal.getsignal(number)) != signal.SIG_IGN}
    try:
        for number in earlier:
            signal.signal(number, first)
        yield
    finally:
        for number, handler in earlier.items():  # torchrun stops its other processes as soon as one has ended
            signal.signal(number, signal.SIG_IGN if LAUNCHED else handler)


def interrupt(number: int) -> NoReturn:
    """Raise KeyboardInterrupt with the number of a signal."""
    raise KeyboardInterrupt(number)


def stop_at_end_of_input() -> None:
    """Stop this process, as SIGTERM does, when its standard input ends, if its environment asks for that.

    Whoever has started it holds the other end, and stops it by closing that: also where it is killed itself.
    """

    def wait() -> None:
        while os.read(0, 1):  # not by sys.stdin, which has a lock that forked processes would find taken
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ.pop(STOP_AT_END_OF_INPUT, None):
        threading.Thread(target=wait, daemon=True).start()
