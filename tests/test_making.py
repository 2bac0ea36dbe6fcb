import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import joblib
import psutil
import pytest
import torch

import light
import run_settings
import train
from cluster import ENVIRONMENT
from command_line.flag_types import FlagError
from experiment import making, run_process
from experiment.making import make_runs
from experiment.run_process import Outcome
from light import begun, light_run, process_of
from run_settings import Settings
from saved_runs.checkpoint import load_checkpoint
from saved_runs.lock import lock_run
from saved_runs.paths import RunFiles, run_files
from saved_runs.results import Results, read_results


def wait_until(condition: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- in this process ------------------------------------------------------------------------------------------------


def small_run(path: Path, *flags: str) -> Settings:
    """The settings of a run on digits."""
    return run_settings.parse(["--dataset", "digits", "--batch_size", "48", "--path", str(path), *flags])


def make_here(run: Settings, stops: list[int], device: str = "cpu") -> Outcome:
    """What comes of a run in this process."""
    [(_, outcome)] = make_runs([run], stops, device=device, train=train.train)
    return outcome


def test_run_does_not_begin_anew(small_network, tmp_path):
    run = small_run(tmp_path, "--num_epochs", "2", "--restart")
    first = make_here(run, [])
    assert first.num_epochs == 2 and run.restart
    file = run_files(tmp_path, run.name).results
    written = file.stat().st_mtime_ns
    assert make_here(run, []).test_accuracy == read_results(file).test_accuracy
    assert file.stat().st_mtime_ns == written


def test_what_a_run_raises(tmp_path):
    def fail(run: Settings, stops: list[int]) -> Results:
        raise {"a": FloatingPointError, "b": KeyError, "c": KeyboardInterrupt}[run.name](run.name)

    runs = [light_run(name, tmp_path) for name in "abcd"]
    made = [outcome for _, outcome in make_runs(runs[:2], [], train=fail)]
    assert list(map(repr, made)) == ["FloatingPointError('a')", "KeyError('b')"]

    def interrupted(run: Settings, stops: list[int]) -> Results:
        raise KeyboardInterrupt(*numbers)

    numbers = [signal.SIGINT]
    made = make_runs(runs, [], train=interrupted)  # which no handler has noted
    assert list(made) == [(runs[0], signal.SIGINT)]
    numbers.clear()  # as a module of the user's may do
    made = [outcome for _, outcome in make_runs(runs, [], train=interrupted)]
    assert len(made) == 4 and all(isinstance(outcome, RuntimeError) for outcome in made)
    with pytest.raises(FlagError, match="'nonsense' is not one of"):
        make_here(small_run(tmp_path), [], device="nonsense")


def test_no_run_begins_after_a_stop(tmp_path):
    begun, stops = [], []

    def stopped_in_the_second(run: Settings, stops: list[int]) -> str:
        begun.append(run.name)
        if len(begun) == 2:
            stops.append(signal.SIGTERM)
        return "done"

    runs = [light_run(name, tmp_path) for name in "abc"]
    assert [run.name for run, _ in make_runs(runs, stops, train=stopped_in_the_second)] == begun == ["a", "b"]


def test_stopped_run(small_network, tmp_path):
    run = small_run(tmp_path, "--num_epochs", "1000")
    stops = []
    with ThreadPoolExecutor() as pool:
        being_made = pool.submit(make_here, run, stops)
        wait_until(run_files(tmp_path, run.name).checkpoint.exists)
        stops.append(signal.SIGTERM)
        assert being_made.result(timeout=10) == signal.SIGTERM


def test_run_of_another_process_is_waited_for(small_network, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "LOCK_SECONDS", 0.01)
    run, stops = small_run(tmp_path, "--num_epochs", "2"), []
    with ThreadPoolExecutor() as pool, lock_run(run_files(tmp_path, run.name)):
        waiting, stopped = (pool.submit(make_here, run, of) for of in ([], stops))
        stops.append(signal.SIGINT)
        assert stopped.result(timeout=10) == signal.SIGINT
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.3)
    assert waiting.result().num_epochs == 2


def test_import_is_quick():
    code = "import sys, experiment.making; sys.exit(bool({'torch', 'distributed', 'joblib'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT).returncode == 0


# --- in processes of their own: stand-ins ---------------------------------------------------------------------------


@pytest.fixture
def light_runs(monkeypatch):
    """Make stand-ins in place of runs."""
    monkeypatch.setattr(run_process, "COMMAND", light.COMMAND)
    monkeypatch.setattr(run_process, "LOCK_SECONDS", 0.01)


def outcomes(path: Path, *names: str, stops: list[int] | None = None, **options: Any) -> dict[str, Outcome]:
    """What comes of stand-ins, by name."""
    runs = [light_run(name, path) for name in names]
    return {run.name: outcome for run, outcome in make_runs(runs, [] if stops is None else stops, **options)}


def test_arguments_make_the_same_settings():
    for flags in (
        "--dataset digits",
        "--path /a/v1.0 --name x.0 --network a.b:c --c 0 --bn_weight 0.1 --learning_rate 1e-30 --no_flip --seed 0",
        "--image_size 8 --precision tf32 --compile --restart --weight_decay 0.30000000000000004 --scheduler none",
        "--split_seed 3",
        "--split_seed seed",
    ):
        run = run_settings.parse(flags.split())
        assert run_settings.parse(run_settings.as_arguments(run)) == run


def test_every_outcome(light_runs, tmp_path):
    made = outcomes(tmp_path, "deadly", "full", "broken", "diverged", "busy", "unlucky", jobs=2, device="cpu")
    threads = max(1, joblib.cpu_count() // 2)
    for name in ("busy", "unlucky"):
        assert made.pop(name).header == {"device": "cpu", "threads": threads}
    assert {name: f"{type(error).__name__}: {error}" for name, error in made.items()} == {
        "deadly": "ChildProcessError: its process was killed 3 times by SIGKILL",
        "full": "ChildProcessError: it is full",
        "broken": "ChildProcessError: KeyError: 'x'",
        "diverged": "FloatingPointError: it is diverged",
    }


def test_wrong_flag_stops_all(light_runs, tmp_path):
    slow = light_run("slow", tmp_path)
    with pytest.raises(FlagError, match="it is wrong"):
        outcomes(tmp_path, "slow", "wrong", jobs=2)
    assert not begun(slow).exists() or begun(slow).with_suffix(".saved").exists()


def test_processes_share_out_two_gpus(light_runs, tmp_path, monkeypatch):
    """One that takes the place of another takes over its GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    made = outcomes(tmp_path, "unlucky", "patient", "patient-too", jobs=3)
    assert sorted(run.header["device"] for run in made.values()) == ["cuda:0", "cuda:0", "cuda:1"]
    assert outcomes(tmp_path, "a", jobs=2, device="cuda:2")["a"].settings["device"] == "cuda:2"


def test_stop(light_runs, tmp_path):
    """As soon as the run has told where it is."""
    stops, told = [], []

    def stop() -> None:
        try:
            wait_until(lambda: ("slow", "epoch 1/1") in told, seconds=60)
        finally:
            stops.append(signal.SIGINT)

    threading.Thread(target=stop).start()
    made = outcomes(tmp_path, "slow", "never", stops=stops, tell=lambda run, bar: told.append((run.name, bar)))
    assert told == [("slow", ""), ("slow", "epoch 1/1")]
    assert made == {"slow": signal.SIGINT} and begun(light_run("slow", tmp_path)).with_suffix(".saved").exists()


def test_function_of_the_calling_program(tmp_path):
    run = small_run(tmp_path, "--network", "__main__:net")
    with pytest.raises(FlagError, match=r"__main__:net is in the program .* such as my_networks:net"):
        list(make_runs([run], [], jobs=2))


PROGRAM = """
import sys
from pathlib import Path
from typing import Any

import light
from command_line.signals import on_signals
from experiment import run_process
from experiment.making import make_runs

run_process.COMMAND, stops = light.COMMAND, []
runs = [light.light_run(name, Path(sys.argv[1])) for name in sys.argv[2:]]
with on_signals(stops.append):
    for run, outcome in make_runs(runs, stops, jobs=2, device="cpu"):
        print(run.name, outcome if isinstance(outcome, int) else "done", flush=True)
"""


class Experiment:
    """An experiment of stand-ins on a terminal of its own, in a program without a guard for its `__main__`."""

    def __init__(self, path: Path, *names: str) -> None:
        program = path / "program.py"
        program.write_text(PROGRAM)
        self.pid, self.terminal = pytest.importorskip("pty").fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored here
            os.execve(sys.executable, [sys.executable, program, str(path), *names], ENVIRONMENT)

    def end(self) -> tuple[int, list[str]]:
        """Its exit code, negative for a signal, and the lines on the terminal, once no process writes there."""
        shown = b""
        with suppress(OSError):  # Linux raises it when all of its processes are gone, others read nothing more
            while piece := os.read(self.terminal, 10_000):
                shown += piece
        os.close(self.terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), shown.decode().splitlines()


def test_ctrl_c_in_a_terminal(tmp_path):
    experiment = Experiment(tmp_path, "a", "slow")
    process_of(light_run("a", tmp_path)), process_of(light_run("slow", tmp_path))
    wait_until((tmp_path / "results" / "a.csv").exists)
    os.killpg(experiment.pid, signal.SIGINT)
    code, lines = experiment.end()
    assert (code, sorted(line.replace("^C", "") for line in lines)) == (0, ["a done", "slow 2"])
    assert begun(light_run("slow", tmp_path)).with_suffix(".saved").exists()


@pytest.mark.parametrize("names", [("SIGINT", "SIGINT"), ("SIGKILL",)], ids=["Ctrl-C twice", "kill -9"])
def test_processes_do_not_outlive_the_experiment(names, tmp_path):
    experiment = Experiment(tmp_path, "slow", "slow-too")
    runs = [light_run(name, tmp_path) for name in ("slow", "slow-too")]
    processes = [psutil.Process(process_of(run)) for run in runs]
    numbers = [getattr(signal, name) for name in names]
    for number in numbers:
        os.killpg(experiment.pid, number) if number == signal.SIGINT else os.kill(experiment.pid, number)
        time.sleep(0.1)
    assert experiment.end() == (-numbers[-1], [])
    psutil.wait_procs(processes, timeout=10)
    assert not any(process.is_running() for process in processes)
    assert all(begun(run).with_suffix(".saved").exists() for run in runs)


# --- in processes of their own: trainings ---------------------------------------------------------------------------

RANDOM = [
    "--network",
    "small:stochastic_depth",
    "--learning_rate",
    "0.01",
]  # whose numbers follow from the draws of Python's own generator


def epochs_of(run: Settings) -> int:
    """How many epochs are in the result file of a run."""
    file = run_files(run.path, run.name).results
    return read_results(file).num_epochs if file.exists() else 0


def checkpoint(run: Settings) -> dict:
    """The checkpoint of a run, without what it says of time and place."""
    state = load_checkpoint(run_files(run.path, run.name).checkpoint)
    return {name: value for name, value in state.items() if name != "settings"}


def equal(ours: Any, theirs: Any) -> bool:
    """Whether two checkpoints, or parts of them, are the same to the last bit."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.fixture
def one_of_two() -> Iterator[None]:
    """Compute here with as many threads as each of two processes gets."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, joblib.cpu_count() // 2))
    yield
    torch.set_num_threads(threads)


TRAININGS = """
import sys

import run_settings
from experiment.making import make_runs

runs = [run_settings.parse([*sys.argv[1:], "--seed", seed]) for seed in "12"]
list(make_runs(runs, [], jobs=2, device="cpu"))
"""


def test_killed_run_and_killed_experiment(one_of_two, tmp_path):
    """Of both comes in the end, bit for bit, what comes of undisturbed runs in this process.

    The runs of the killed experiment save all that they have done since the last checkpoint, that of the first epoch.
    """
    flags = [*RANDOM, "--num_epochs", "40", "--checkpoint_seconds", "1e9", "--scheduler", "none"]
    alone, runs = ([small_run(tmp_path / path, *flags, "--seed", n) for n in "12"] for path in ("alone", "disturbed"))
    list(make_runs(alone, [], device="cpu", train=train.train))
    command = [sys.executable, "-c", TRAININGS, "--dataset", "digits", "--batch_size", "48", *flags]
    with subprocess.Popen([*command, "--path", tmp_path / "disturbed"], env=ENVIRONMENT) as experiment:
        try:
            for run in runs:
                wait_until(lambda run=run: epochs_of(run) > 5)
            children = psutil.Process(experiment.pid).children()
            [process] = [child for child in children if f"--name={runs[0].name}" in child.cmdline()]
            process.kill()
            killed_at = epochs_of(runs[0])
            wait_until(lambda: epochs_of(runs[0]) > killed_at)
        finally:
            experiment.kill()
    for run in runs:
        wait_until(lambda run=run: is_free(run_files(run.path, run.name)))
        assert len(checkpoint(run)["columns"]["epoch"]) == epochs_of(run) > 5
    assert all(outcome.num_epochs == 40 for _, outcome in make_runs(runs, [], jobs=2, device="cpu"))
    assert all(equal(checkpoint(ours), checkpoint(theirs)) for ours, theirs in zip(runs, alone, strict=True))


def is_free(files: RunFiles) -> bool:
    """Whether no process is at work on a run."""
    with suppress(BlockingIOError), lock_run(files):
        return True
    return False
