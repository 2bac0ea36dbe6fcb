"""Stand-ins for runs, without torch: as a program, one of them in place of train.py."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import run_settings
from command_line.endings import AT_WORK, DIVERGED
from command_line.signals import catch_signals, raise_if_stopped, stop_at_end_of_input
from run_settings import Settings
from saved_runs.results import COLUMNS, header_lines

COMMAND = [sys.executable, __file__]


def wait_until(condition: Callable[[], object], seconds: float = 300) -> None:
    """Wait for what must come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come true"
        time.sleep(0.01)


def light_run(name: str, path: Path, *flags: str) -> Settings:
    """The settings of a stand-in."""
    return run_settings.parse(["--name", name, "--path", str(path), *flags])


def outcomes(path: Path, *names: str, **options: Any) -> dict[str, Any]:
    """What comes of stand-ins, by name."""
    from experiment.making import make_runs

    made = make_runs([light_run(name, path) for name in names], **options)
    return {run.name: outcome for run, outcome in made}


def begun(run: Settings) -> Path:
    """A file that is there once a run has begun; in it is the process."""
    return run.path / "begun" / run.name


def saved(run: Settings) -> Path:
    """A file that is there once a run was stopped and has saved what it has."""
    return begun(run).with_suffix(".saved")


def process_of(run: Settings) -> int:
    """The process that has begun a run, once it has."""
    wait_until(begun(run).exists)
    return int(begun(run).read_text())


def make_run(run: Settings) -> None:
    """What happens depends on the first part of the run's name.

    'deadly' kills its process, 'unlucky' only the first time; 'slow' is never done, 'interrupted' only the first time,
    and is done the second time once the first has saved it, 'patient' when 'unlucky' is; 'busy' is at work in another
    process the first time; 'noisy' writes more than a pipe holds, and ends after a bar; the others end as they are
    called. The header of one that is done has its device, its number of threads, and whether it was to start over.
    """
    kind, first_time = run.name.split("-")[0], not begun(run).exists()
    begun(run).parent.mkdir(exist_ok=True)
    unfinished = begun(run).with_suffix(".tmp")
    unfinished.write_text(str(os.getpid()))
    unfinished.rename(begun(run))
    if kind == "deadly" or (kind == "unlucky" and first_time):
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "broken":
        raise KeyError("x")
    codes = {"wrong": 2, "full": 1, "diverged": DIVERGED, "busy": AT_WORK}
    if kind in codes and (kind != "busy" or first_time):
        print("a warning\n\rdecoding 10%\r            \rtrain.py: error: it is", kind, file=sys.stderr)
        sys.exit(codes[kind])
    if kind == "noisy":
        for percent in range(20_000):
            print(f"\rdownloading {percent / 200:.0f}%", end="", file=sys.stderr)
        print(file=sys.stderr)
        sys.exit(1)
    if kind == "unlucky":
        (run.path / "done").touch()
    goes_on = {"patient": (run.path / "done").exists, "slow": lambda: False}
    goes_on["interrupted"] = goes_on["slow"] if first_time else saved(run).exists
    wait_until(lambda: raise_if_stopped() or goes_on.get(kind, lambda: True)())
    (run.path / "results").mkdir(exist_ok=True)
    header = {"device": run.device, "threads": os.environ.get("OMP_NUM_THREADS"), "restart": run.restart}
    lines = [*header_lines(header), ",".join(COLUMNS), "1,1.0,1.0,50.0,50.0", ""]
    (run.path / "results" / f"{run.name}.csv").write_text("\n".join(lines))


def make_run_in_worker(*arguments: Any, **options: Any) -> Any:
    """`making.make_run`, which makes a stand-in."""
    from experiment import making

    making.TRAIN = COMMAND
    return making.make_run(*arguments, **options)


def die(*_: Any, **__: Any) -> None:
    """In place of `making.make_run`: the worker is lost."""
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """The command line: the flags of train.py."""
    run = run_settings.parse()
    try:
        with catch_signals(raising=True):
            stop_at_end_of_input()
            make_run(run)
    except KeyboardInterrupt as stop:
        if run.name.startswith("slow-to-save"):
            wait_until((run.path / "save").exists)
        saved(run).touch()
        sys.exit(128 + stop.args[0])


if __name__ == "__main__":
    main()
