"""Stand-ins for runs, without torch: as a program, one of them in place of train.py."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import run_settings
from command_line.endings import AT_WORK, DIVERGED
from command_line.signals import interrupt, on_signals, stop_at_end_of_input
from run_settings import Settings

COMMAND = [sys.executable, __file__]


def light_run(name: str, path: Path) -> Settings:
    """The settings of a stand-in."""
    return run_settings.parse(["--name", name, "--path", str(path)])


def begun(run: Settings) -> Path:
    """A file that is there once a run has begun; in it is the process."""
    return run.path / "begun" / run.run_name


def process_of(run: Settings) -> int:
    """The process that has begun a run, once it has."""
    deadline = time.monotonic() + 300
    while not begun(run).exists():
        assert time.monotonic() < deadline, f"{run.run_name} has not begun"
        time.sleep(0.01)
    return int(begun(run).read_text())


def make_run(run: Settings) -> None:
    """What happens depends on the first part of the run's name.

    'deadly' kills its process, 'unlucky' only the first time; 'slow' is never done, 'interrupted' only the first time,
    'patient' when 'unlucky' is; 'busy' is at work in another process the first time; the others end as they are called.
    The result file of one that is done has its device and its number of threads.
    """
    kind, first_time = run.run_name.split("-")[0], not begun(run).exists()
    begun(run).parent.mkdir(exist_ok=True)
    unfinished = begun(run).with_suffix(".tmp")
    unfinished.write_text(str(os.getpid()))
    unfinished.rename(begun(run))
    print("\rdecoding \r        \r\repoch 1/1  ", end="", file=sys.stderr, flush=True)  # as tqdm does
    if kind == "deadly" or (kind == "unlucky" and first_time):
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "broken":
        raise KeyError("x")
    codes = {"wrong": 2, "full": 1, "diverged": DIVERGED, "busy": AT_WORK}
    if kind in codes and (kind != "busy" or first_time):
        print("a warning\n\r        \rtrain.py: error: it is", kind, file=sys.stderr)
        sys.exit(codes[kind])
    if kind == "unlucky":
        (run.path / "done").touch()
    waiting = {"slow": True, "interrupted": first_time}
    while waiting.get(kind) or (kind == "patient" and not (run.path / "done").exists()):
        time.sleep(0.01)
    (run.path / "results").mkdir(exist_ok=True)
    header = f"# device: {run.device}\n# threads: {os.environ.get('OMP_NUM_THREADS')}\n"
    columns = "epoch,train_loss,val_loss,val_accuracy,test_accuracy\n1,1.0,1.0,50.0,50.0\n"
    (run.path / "results" / f"{run.run_name}.csv").write_text(header + columns)


def make_run_in_worker(*arguments: Any) -> Any:
    """`cluster.make_run_in_worker`, which makes a stand-in."""
    from experiment import cluster, run_process

    run_process.COMMAND = COMMAND
    return cluster.make_run_in_worker(*arguments)


def die(*_: Any) -> None:
    """In place of `cluster.make_run_in_worker`: the worker is lost."""
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """The command line: the flags of train.py."""
    stop_at_end_of_input()
    run = run_settings.parse()
    try:
        with on_signals(interrupt):
            make_run(run)
    except KeyboardInterrupt as stop:
        time.sleep(0.5)  # saves what it has
        begun(run).with_suffix(".saved").touch()
        sys.exit(128 + stop.args[0])


if __name__ == "__main__":
    main()
