"""How every command begins and ends: a wrong flag is answered at once, an error is one line.

Nothing here takes long to import, so that `--help` and a wrong flag are answered at once.
"""

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import NoReturn

from command_line.files import AtWorkError
from command_line.flag_types import FlagError, SettingError
from command_line.signals import LAUNCHED, STOP_SIGNALS, catch_signals

# where a signal stops a command that saves what it has done
HOW_TO_RESUME = "stopped: run the same command again, without --restart, to go on after the last finished epoch"
AT_WORK, DIVERGED = 3, 4  # exit codes of what an experiment must tell from other errors
LONGEST_LINE = 1000  # letters of an error that are shown


def answer_at_once(program: str, parse: Callable[[], object]) -> None:
    """Answer `--help` and a wrong flag before a command imports what takes seconds, which a terminal is told."""
    if LAUNCHED and program == "train.py":
        return  # its processes answer together
    with one_line_endings(program):
        if LAUNCHED:
            raise FlagError(f"torchrun is for train.py; start {program} without it")
        parse()
        missing = [name for name in ("torch", "torchvision", "scipy", "sklearn", "tqdm") if find_spec(name) is None]
        if missing or sys.version_info < (3, 11):
            what = f"this is {platform.python_version()}" + (f", without {', '.join(missing)}" if missing else "")
            end(1, f"error: {what}; it takes Python 3.11 or newer and pip install -r requirements.txt", program)
        if shows_bar():
            warn("starting, which takes some seconds", program)


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


def shows_bar() -> bool:
    """Whether somebody sees progress bars on standard error."""
    return sys.stderr.isatty()


def in_one_line(error: BaseException) -> str:
    """The kind of an error and what it says."""
    return one_line(f"{type(error).__name__}: {error}")


def one_line(text: str) -> str:
    """A text in one line that a terminal shows as it is; of a very long one, the beginning and the end."""
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"


def warn(message: str, program: str) -> None:
    """Print a message as one line to standard error."""
    with suppress(OSError):  # a closed terminal
        print(f"{program}: {one_line(message)}", file=sys.stderr, flush=True)


def end(code: int, message: str, program: str) -> NoReturn:
    """End the program with one line on standard error."""
    warn(message, program)
    sys.exit(code)


@contextmanager
def one_line_endings(program: str, stopped: str = "stopped") -> Iterator[None]:
    """Let errors and signals end a command with one line on standard error.

    The exit code is 2 for a wrong flag, 3 where another process is at work on the run, 4 where the training has
    diverged, 1 for any other error that the user can do something about, 130 for Ctrl-C, 143 for SIGTERM and 129 for a
    closed terminal. An error that only a programmer can mend keeps its traceback. `stopped` is what to say where a
    signal stops it.
    """
    open_streams()
    with catch_signals(raising=True):
        try:
            yield
        except KeyboardInterrupt as stop:
            if not stop.args or stop.args[0] not in STOP_SIGNALS:  # a module of the user's may raise it
                raise RuntimeError("KeyboardInterrupt was raised, but no signal has arrived") from stop
            end(128 + stop.args[0], stopped, program)
        except (FloatingPointError, ValueError, OSError) as error:
            codes = {FlagError: 2, SettingError: 2, AtWorkError: AT_WORK, FloatingPointError: DIVERGED}
            code = next((codes[kind] for kind in codes if isinstance(error, kind)), 1)
            what = f"argument --{error.name}: {error.problem}" if isinstance(error, SettingError) else error
            end(code, f"error: {what}", program)
        except (RuntimeError, MemoryError) as error:
            words = r"out of memory|allocate memory|alloc_failed|create a memory object"  # torch's ways to say it
            if not isinstance(error, MemoryError) and not re.search(words, str(error), re.IGNORECASE):
                raise
            trains = program in ("train.py", "reproduce.py", "mechanism.py")
            remedy = ": give a smaller --batch_size or another --device" if trains else ""
            end(1, f"error: there is too little memory{remedy}", program)
