import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
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
from experiment import making
from experiment.display import count_epochs
from experiment.making import make_runs
from kill_and_restart import same
from light import light_run, outcomes, process_of, saved, wait_until
from run_settings import Settings
from saved_runs.checkpoint import load_checkpoint
from saved_runs.lock import lock_run
from saved_runs.results import RunFiles, run_files

# --- stand-ins ------------------------------------------------------------------------------------------------------


@pytest.fixture
def light_runs(tmp_path, monkeypatch):
    """Make stand-ins in place of runs, and no temporary files."""
    monkeypatch.setattr(making, "TRAIN", light.COMMAND)
    monkeypatch.setattr(making, "LOCK_SECONDS", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))  # which there is not


def test_arguments_make_the_same_settings():
    for flags in (
        "--path /a/v1.0 --name x.0 --network a.b:c --c 0 --bn_weight 0.1 --learning_rate 1e-30 --no_flip --seed 0",
        "--image_size 8 --precision tf32 --compile --restart --weight_decay 0.30000000000000004 --scheduler none",
        "--split_seed seed",
    ):
        run = run_settings.parse(flags.split())
        assert run_settings.parse(run_settings.as_arguments(run)) == run


def test_every_outcome(light_runs, tmp_path):
    names, reported = ["deadly", "full", "broken", "diverged", "noisy", "busy", "unlucky"], []
    made = outcomes(tmp_path, *names, jobs=2, device="cpu", report=reported.append)
    threads = str(max(1, joblib.cpu_count() // 2))
    for name in ("busy", "unlucky"):
        assert made.pop(name).header == {"device": "cpu", "threads": threads, "restart": False}
    assert {name: f"{type(error).__name__}: {error}" for name, error in made.items()} == {
        "deadly": "ChildProcessError: it was lost 3 times: its process was killed by SIGKILL",
        "full": "ChildProcessError: it is full",
        "broken": "ChildProcessError: KeyError: 'x'",
        "diverged": "FloatingPointError: it is diverged",
        "noisy": "ChildProcessError: it ended with exit code 1",
    }
    assert reported == ["busy waits: another process is at work on it"]


@pytest.mark.skipif(not hasattr(signal, "SIGRTMAX"), reason="there are no real-time signals")
def test_signal_without_a_name(light_runs, tmp_path, monkeypatch):
    number = signal.SIGRTMAX - 1
    monkeypatch.setattr(making, "TRAIN", [sys.executable, "-c", f"import os; os.kill(os.getpid(), {number})"])
    assert str(outcomes(tmp_path, "a")["a"]) == f"it was lost 3 times: its process was killed by signal {number}"


def test_run_alone(light_runs, tmp_path, monkeypatch):
    """It does not begin anew where it is tried again, and has all cores."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    [(_, outcome)] = make_runs([light_run("a", tmp_path, "--restart")])
    assert outcome.header == {"device": None, "threads": None, "restart": False}


def test_error_that_is_none_of_the_run(light_runs, tmp_path, monkeypatch):
    """Such as that of a process limit, which is no lock."""

    def refuse(*_: Any, **__: Any) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert repr(outcomes(tmp_path, "a")["a"]) == "BlockingIOError('Resource temporarily unavailable')"


def test_wrong_flag_stops_all(light_runs, tmp_path):
    slow = light_run("slow", tmp_path)
    with pytest.raises(FlagError, match="it is wrong"):
        outcomes(tmp_path, "slow", "wrong", jobs=2)
    assert not light.begun(slow).exists() or saved(slow).exists()


def test_processes_share_out_two_gpus(light_runs, tmp_path, monkeypatch):
    """One that takes the place of another takes over its GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    made = outcomes(tmp_path, "unlucky", "patient", "patient-too", jobs=3)
    assert sorted(run.header["device"] for run in made.values()) == ["cuda:0", "cuda:0", "cuda:1"]
    assert outcomes(tmp_path, "a", jobs=2, device="cuda:2")["a"].header["device"] == "cuda:2"


def test_stop(light_runs, tmp_path):
    """As soon as the run has begun: what is at work is saved, and no further run begins."""
    slow, stops = light_run("slow", tmp_path), []

    def show(at_work: list[Settings]) -> None:
        if at_work and light.begun(at_work[0]).exists():
            stops.append(signal.SIGINT)

    assert outcomes(tmp_path, "slow", "never", stops=stops, show=show) == {"slow": signal.SIGINT}
    assert saved(slow).exists()


def test_stop_within_a_run_that_ends(tmp_path, monkeypatch):
    stops = []

    def make_run(run: Settings, experiment: str) -> str:
        if run.name == "b":
            stops.append(signal.SIGTERM)
        return "done"

    monkeypatch.setattr(making, "make_run", make_run)
    assert outcomes(tmp_path, "a", "b", "c", stops=stops) == {"a": "done", "b": "done"}


# --- experiments that are stopped ------------------------------------------------------------------------------------

PROGRAM = """
import sys
from pathlib import Path

import light
from command_line.signals import ARRIVED, catch_signals
from experiment import making

making.TRAIN, path = light.COMMAND, Path(sys.argv[1])
runs = [light.light_run(name, path) for name in sys.argv[2:]]
note = lambda at_work: ARRIVED and (path / "stopped").touch()
with catch_signals(raising=False):
    for run, outcome in making.make_runs(runs, jobs=2, device="cpu", show=note):
        print(run.name, outcome if isinstance(outcome, int) else "done", flush=True)
"""


class Experiment:
    """An experiment of stand-ins on a terminal of its own, in a program without a guard for its `__main__`."""

    def __init__(self, path: Path, *names: str) -> None:
        program = path / "program.py"
        program.write_text(PROGRAM)
        self.pid, self.terminal = pytest.importorskip("pty").fork()
        if self.pid == 0:
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
    process_of(light_run("slow", tmp_path))
    wait_until((tmp_path / "results" / "a.csv").exists)
    os.killpg(experiment.pid, signal.SIGINT)
    code, lines = experiment.end()
    assert (code, sorted(line.replace("^C", "") for line in lines)) == (0, ["a done", "slow 2"])
    assert saved(light_run("slow", tmp_path)).exists()


@pytest.mark.parametrize("how", ["Ctrl-C twice", "kill -9"])
def test_processes_do_not_outlive_the_experiment(how, tmp_path):
    names = ("slow-to-save", "slow-to-save-too")
    experiment = Experiment(tmp_path, *names)
    runs = [light_run(name, tmp_path) for name in names]
    processes = [psutil.Process(process_of(run)) for run in runs]
    if how == "kill -9":
        os.kill(experiment.pid, signal.SIGKILL)
    else:
        os.killpg(experiment.pid, signal.SIGINT)
        wait_until((tmp_path / "stopped").exists)
        os.killpg(experiment.pid, signal.SIGINT)
    code, lines = experiment.end()
    assert (code, [line for line in lines if line.strip("^C")]) == (-9 if how == "kill -9" else -2, [])
    (tmp_path / "save").touch()
    psutil.wait_procs(processes)
    assert all(saved(run).exists() for run in runs)


# --- trainings ------------------------------------------------------------------------------------------------------

GATE_AT = 70  # the batch in which a run waits until a gate is open; an epoch has 27
NETWORK = """
import os
from pathlib import Path

from light import wait_until
from small import stochastic_depth


def gated(num_classes):
    network, batches = stochastic_depth(num_classes), []

    def wait_at_gate(network, images):
        batches.extend([None] * network.training)
        if len(batches) == {GATE_AT}:
            wait_until(Path(os.environ["GATE"]).exists)

    network.register_forward_pre_hook(wait_at_gate)
    return network
"""


def training(path: Path, *flags: str) -> Settings:
    """The settings of a training on digits, whose numbers follow from the draws of Python's own generator, too."""
    what = "--dataset digits --batch_size 48 --network gates:gated --learning_rate 0.01 --num_epochs 5"
    how = "--scheduler none --device cpu --checkpoint_seconds 1e9"
    return run_settings.parse([*what.split(), *how.split(), "--path", str(path), *flags])


def checkpoint(run: Settings) -> dict:
    """The checkpoint of a run, without what it says of time and place."""
    state = load_checkpoint(run_files(run.path, run.run_name).checkpoint)
    return {name: value for name, value in state.items() if name not in ("settings", "header")}


def is_free(files: RunFiles) -> bool:
    """Whether no process is at work on a run."""
    with suppress(BlockingIOError), lock_run(files):
        return True
    return False


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

sys.path.append(sys.argv[1])
runs = [run_settings.parse([*sys.argv[2:], "--seed", seed]) for seed in "12"]
list(make_runs(runs, jobs=2, device="cpu"))
"""


def test_killed_run_and_killed_experiment(one_of_two, tmp_path, monkeypatch):
    """Of both comes in the end, bit for bit, what comes of undisturbed runs in this process.

    The runs of the killed experiment save all that they have done since the last checkpoint, that of the first epoch.
    """
    gate = tmp_path / "gate"
    gate.touch()
    monkeypatch.setenv("GATE", str(gate))
    (tmp_path / "gates.py").write_text(NETWORK.replace("{GATE_AT}", str(GATE_AT)))
    monkeypatch.syspath_prepend(tmp_path)
    alone, runs = ([training(tmp_path / path, "--seed", seed) for seed in "12"] for path in ("alone", "disturbed"))
    for run in alone:
        train.train(run)
    gate.unlink()
    flags = run_settings.as_arguments(training(tmp_path / "disturbed"))
    environment = ENVIRONMENT | {"GATE": str(gate)}
    with subprocess.Popen([sys.executable, "-c", TRAININGS, tmp_path, *flags], env=environment) as experiment:
        try:
            for run in runs:
                wait_until(lambda run=run: count_epochs(run) == 2)  # both wait at the gate
            children = psutil.Process(experiment.pid).children()
            [process] = [child for child in children if "--seed=2" in child.cmdline()]
            process.kill()
            wait_until(lambda: count_epochs(runs[1]) == 3)  # it goes on from its first epoch up to the gate
        finally:
            experiment.kill()
            gate.touch()
    for run in runs:
        wait_until(lambda run=run: is_free(run_files(run.path, run.run_name)))
        assert len(checkpoint(run)["columns"]["epoch"]) == count_epochs(run) > 1
    assert all(outcome.num_epochs == 5 for _, outcome in make_runs(runs, jobs=2, device="cpu"))
    assert all(same(checkpoint(ours), checkpoint(theirs)) for ours, theirs in zip(runs, alone, strict=True))
