"""A run in a process of its own: nothing else draws from its random generators, and nothing else dies with it."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from command_line.endings import AT_WORK, DIVERGED, SHOW_BAR
from command_line.flag_types import FlagError
from command_line.signals import STOP_AT_END_OF_INPUT, STOP_SIGNALS
from run_settings import Settings, as_arguments
from saved_runs.paths import run_files
from saved_runs.results import Results, read_results

Outcome = Results | Exception | int  # of a run: its results, why it failed, or the number of the signal that stopped it
Tell = Callable[[Settings, str], None]  # takes a run at work and its bar

COMMAND = [sys.executable, str(Path(__file__).parent.parent / "train.py")]
ERROR = "train.py: error: "  # how its last line begins
BAR = re.compile(r"\r([^\r\n]*[^\r\n ]) *\r?$")  # at the end of what is on standard error, as tqdm draws it
BAR_SECONDS = 0.5  # between two drawings
ATTEMPTS = 3  # how many processes a run may lose before it counts as failed
LOCK_SECONDS = 1  # between two looks whether another process is still at work on a run
POLL_SECONDS = 0.1


def make_run_in_process(
    run: Settings,
    device: str | None,
    stopped: Callable[[], int],
    tell: Callable[[str], None] = lambda bar: None,
    **environment: str,
) -> Outcome:
    """Make a run, or what is left of it, in a process of its own.

    Where another process is at work on it, such as one that a killed experiment has left behind, it waits. A run whose
    process is killed goes on in another one.

    Args:
        run: what `settings.parse` returns, with an absolute path.
        device: of the run; None for the one that it finds.
        stopped: returns the number of a signal as soon as one is to stop the run, which ends after its next step and is
            saved; 0 before.
        tell: called with the bar of the run as often as it is drawn anew; first, with an empty one.
        environment: further variables for the process.
    """
    if run.network.startswith("__main__:"):
        name = run.network.removeprefix("__main__:")
        where = f"{run.network} is in the program that starts the runs, and each is a process of its own"
        return FlagError(f"argument --network: {where}: put it into a file, such as my_networks:{name}")
    command = [*COMMAND, *as_arguments(replace(run, restart=False, device=device))]
    killed = 0
    while not stopped():
        code, line = call(command, stopped, tell, environment)
        number = -code if code < 0 else code - 128
        if number in STOP_SIGNALS:
            return stopped() or number
        if code == 0:
            return read_results(run_files(run.path, run.run_name).results)
        if code == 2:
            return FlagError(line)
        if code == DIVERGED:
            return FloatingPointError(line)
        if code == AT_WORK:
            time.sleep(LOCK_SECONDS)
        elif code > 0:
            return ChildProcessError(line)
        elif (killed := killed + 1) == ATTEMPTS:
            return ChildProcessError(f"its process was killed {ATTEMPTS} times by {signal.Signals(number).name}")
    return stopped()


def call(
    command: list[str], stopped: Callable[[], int], tell: Callable[[str], None], environment: dict[str, str]
) -> tuple[int, str]:
    """Run a command to its end: its exit code, negative for a signal, and what the last line of its errors says.

    Ctrl-C in a terminal does not reach it. It stops when its standard input ends, so also where this process dies.
    """
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}  # where this process finds its modules, so may a user's own be
    bars = {SHOW_BAR: "1", "TQDM_MININTERVAL": str(BAR_SECONDS)}
    environment = {**os.environ, **paths, **bars, STOP_AT_END_OF_INPUT: "1", **environment}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # so a kill leaves nothing
        file = Path(folder) / "errors"
        stream, written = file.open("wb"), file.open("rb")  # each has a position of its own
    with stream, written:
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": stream}
        with subprocess.Popen(command, **streams, env=environment, start_new_session=True) as process:
            tell(bar := "")
            while process.poll() is None and not stopped():
                time.sleep(POLL_SECONDS)
                if (drawn := read_bar(written)) != bar:
                    tell(bar := drawn)
        written.seek(0)
        lines = re.split(r"[\r\n]+", written.read().decode(errors="replace").rstrip())
    said = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    return process.returncode, (said or lines)[-1]  # without a word of its own, it is a traceback's last line


def read_bar(stream: BinaryIO) -> str:
    """The bar at the end of what a process has written; empty where there is none."""
    end = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, end - 1000))
    found = BAR.search(stream.read().decode(errors="replace"))
    return found[1] if found else ""
