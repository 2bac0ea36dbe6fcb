"""What all commands share: the types of their flags, the parser, endings of one line, and signals.

Nothing here takes long to import, so that `--help` and a wrong flag are answered at once.
"""

import argparse
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

# what ends a command: Ctrl-C, a polite request, and, where there are terminals, one that was closed
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

Item = TypeVar("Item")

BEGUN: list[str] = []  # the commands that handle signals, or have

LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun, as one of several processes


class FlagError(ValueError):
    """A flag is wrong; the message names it."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises FlagError where it would print the list of all flags and end the program."""

    def error(self, message: str) -> NoReturn:
        raise FlagError(message)


def folder(text: str) -> Path:
    """The type of a flag that names a folder, which need not exist yet."""
    if text and not text.isprintable():
        raise argparse.ArgumentTypeError(f"must be one line of printable text, not {text!r}")
    try:
        path = Path(text).expanduser()
        there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    except (OSError, RuntimeError) as error:  # a name that is too long; a home that nobody has
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a folder: {error}") from None
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a folder: {there} is a file")
    return path


def file_name(text: str) -> str:
    """The type of a flag that takes a name which files can have on any system."""
    if (text and not re.fullmatch(r"\w[\w.+=-]*", text)) or len(text.encode()) > 200:
        raise argparse.ArgumentTypeError(
            f"must be at most 200 letters, digits and . _ + = - and start with a letter or digit, not {text!r}"
        )
    return text


def whole(minimum: int) -> Callable[[str], int]:
    """The type of a flag that takes a whole number of at least `minimum`."""

    def convert(text: str) -> int:
        if not re.fullmatch(r"\d{1,18}", text, re.ASCII) or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, not {text!r}")
        return int(text)

    return convert


def number(what: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    """The type of a flag that takes a number that is `allowed` (NaN must not be), which `what` puts into words."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")
        return value or 0.0  # not -0.0

    return convert


def as_typed(value: str | float | bool) -> str:
    """A value as one would type it after its flag: 100 for 100.0."""
    return str(value).removesuffix(".0")


def answer_at_once(program: str, parse: Callable[[], object]) -> None:
    """Answer `--help` and a wrong flag before what takes seconds is imported.

    A command calls it between its quick imports and the slow ones. Until its `main` handles signals, Ctrl-C ends the
    program in one line: nothing is to be saved yet, and an import may not pass an exception on.
    """

    def end_now(number: int, _: FrameType | None) -> None:
        if not BEGUN:  # or else it has ended: all is done and said
            os.write(2, f"{program}: stopped before it began\n".encode())
            os._exit(128 + number)

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as it is for a command in the background of a script
        signal.signal(signal.SIGINT, end_now)
    open_streams()
    if LAUNCHED and program == "train.py":
        return  # its processes answer together
    try:
        if LAUNCHED:
            raise FlagError(f"torchrun is for train.py; start {program} without it")
        parse()
    except FlagError as error:
        end(2, f"error: {error}", program)


def open_streams() -> None:
    """Let printing fail neither where a stream is closed, nor where its encoding lacks a letter such as γ or ±."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process lives
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(*lines: object) -> None:
    """Print lines to standard output, above a progress bar; where nobody reads them any more, say nothing from now on.

    A reader that has gone (`| head`) or a device that is full (`> /dev/full`) is no reason to end a run.
    """
    from tqdm import tqdm

    try:
        for line in lines:
            tqdm.write(str(line))
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def in_one_line(error: BaseException) -> str:
    """The kind of an error and what it says."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def how_to_resume(again: str) -> str:
    """What to say where a signal stops a command that saves what it has done."""
    return f"stopped; the epochs that are done are saved: run the same command {again} to resume"


def end(code: int, message: str, program: str) -> NoReturn:
    """End the program with one line on standard error."""
    with suppress(OSError):  # a closed terminal
        print(f"{program}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


@contextmanager
def one_line_endings(program: str, stopped: Callable[[], str] = lambda: "stopped") -> Iterator[None]:
    """Let errors and signals end a command with one line on standard error.

    The exit code is 2 for a wrong flag, 1 for any other error that the user can do something about, 130 for Ctrl-C, 143
    for SIGTERM and 129 for a closed terminal. An error that only a programmer can mend keeps its traceback.

    Args:
        program: the command's name.
        stopped: returns what to say where a signal stops it.
    """
    open_streams()
    try:
        with on_signals(interrupt):
            BEGUN.append(program)
            yield
    except KeyboardInterrupt as stop:
        end(128 + (stop.args[0] if stop.args else signal.SIGINT), stopped(), program)
    except (FloatingPointError, ValueError, OSError) as error:
        end(2 if isinstance(error, FlagError) else 1, f"error: {error}", program)
    except (RuntimeError, MemoryError) as error:
        words = r"out of memory|allocate memory|alloc_failed|memory object"  # torch has several ways to say it
        if not isinstance(error, MemoryError) and not re.search(words, str(error), re.IGNORECASE):
            raise
        end(1, "error: there is too little memory: give a smaller --batch_size or another --device", program)


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
    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    earlier = {number: signal.signal(number, first) for number in heard}
    try:
        yield
    finally:
        for number, handler in earlier.items():  # torchrun stops its other processes as soon as one has ended
            signal.signal(number, signal.SIG_IGN if LAUNCHED else handler)


def interrupt(number: int) -> NoReturn:
    """Raise KeyboardInterrupt with the number of a signal."""
    raise KeyboardInterrupt(number)
