import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas
import psutil
import pytest
from scipy import stats

import light
import reproduce
import train
from checkpoint import load_checkpoint, lock_run, run_files
from results import Results, read_results

FOLDER = Path(__file__).parent
FLAGS = ["--dataset", "digits", "--batch_size", "48", "--num_epochs", "2"]
FIGURES = ("learning-curves", "paired-differences", "scales-and-shifts", "normalized-values")
BASELINE, PROPOSED = "digits-resnet18-weight1-c1-dataset", "digits-resnet18-weight0.1-c100-bn"


def run(path: Path, *flags: str) -> int:
    """An experiment in this process; returns its exit code."""
    try:
        reproduce.main([*FLAGS, "--path", str(path), "--device", "cpu", *flags])
    except SystemExit as stop:
        return stop.code
    return 0


def cells(*flags: str) -> list[reproduce.Cell]:
    return reproduce.parse([*FLAGS, *flags]).cells


# --- what is run ----------------------------------------------------------------------------------------------------


def test_order_is_seed_by_seed():
    assert [(cell.setting, cell.seed) for cell in cells("--seeds", "1-2", "7")] == [
        (setting, seed) for seed in (1, 2, 7) for setting in ("baseline", "proposed")
    ]
    assert len(cells()) == 30


def test_settings_of_the_paper():
    found = {
        cell.setting: (cell.run.bn_weight, cell.run.c, cell.run.input_norm)
        for cell in cells("--settings", "baseline", "proposed", "init", "rate", "input", "--seeds", "1")
    }
    assert found == {
        "baseline": (1, 1, "dataset"),
        "proposed": (0.1, 100, "bn"),
        "init": (0.1, 1, "bn"),
        "rate": (1, 100, "bn"),
        "input": (1, 1, "bn"),
    }


def test_own_settings_and_sweep():
    found = cells("--settings", "proposed", "half:bn_weight=0.5,c=50", "--bn_weights", "0.01", "0.1", "--seeds", "3")
    assert [(cell.setting, cell.run.bn_weight, cell.run.c, cell.run.input_norm) for cell in found] == [
        ("proposed", 0.1, 100, "bn"),
        ("half", 0.5, 50, "bn"),
        ("bn_weight 0.01", 0.01, 100, "bn"),  # 0.1 is there already, as proposed
    ]


def test_names_of_runs_are_those_of_train():
    for cell in cells("--precision", "bfloat16", "--seeds", "1"):
        assert cell.name == train.parse(["--device", "cpu", *cell.flags]).name
    assert reproduce.parse([*FLAGS, "--precision", "bfloat16"]).name == "digits-resnet18-bfloat16"
    named = cells("--name", "mine", "--seeds", "1")
    assert [cell.name for cell in named] == ["mine-weight1-c1-dataset-seed1", "mine-weight0.1-c100-bn-seed1"]


def test_flags_of_train_pass_through(capsys):
    flags = ["--momentum=0.8", "--scheduler", "none", "--seeds", "5", "--list", "--device", "cpu"]
    assert run(Path("some where"), *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line, bn_weight in zip(lines, (1, 0.1), strict=True):
        program, script, *arguments = shlex.split(line)
        assert (program, script) == ("python", "train.py")
        settings = train.parse(arguments)
        assert (settings.momentum, settings.scheduler, settings.seed) == (0.8, "none", 5)
        assert (settings.bn_weight, settings.path, settings.num_epochs) == (bn_weight, Path("some where"), 2)


def test_commands_for_another_machine(tmp_path, monkeypatch, capsys):
    """This one needs neither the device nor the compiler."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    flags = [*FLAGS, "--seeds", "3", "--device", "cuda", "--compile", "--path", str(tmp_path)]
    reproduce.main([*flags, "--list"])
    assert re.findall(r"--seed 3 .*--device cuda$", capsys.readouterr().out, re.MULTILINE) != []
    with pytest.raises(SystemExit):
        reproduce.main([*flags, "--report"])
    assert "has no finished run of this experiment" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--settings", "nonsense"], "'nonsense' is none of baseline"),
        (["--settings", "a:bn_weight=x"], "'bn_weight=x' is no bn_weight, c, input_norm=VALUE"),
        (["--settings", "a:momentum=0.5"], "'momentum=0.5' is no bn_weight"),
        (["--settings", "a:bn_weight=-1"], "argument --bn_weight: must be a number from 1e-30"),
        (["--settings", "a:input_norm=x"], "input_norm is one of bn, dataset"),
        (["--settings", "baseline:c=5"], "needs a name of its own"),
        (["--settings", ":c=5"], "needs a name of its own"),
        (["--settings", "init", "a:c=1"], "two of init, a are the same"),
        (["--settings", "a:c=2", "a:c=3"], "two of a, a are the same"),
        (["--seeds", "3-1"], "not '3-1'"),
        (["--seeds", "one"], "not 'one'"),
        (["--seeds", "88265-999999999"], "seeds above 88265 repeat the draws"),
        (["--name", "x" * 190], "must be at most 200 letters"),
        (["--jobs", "0"], "argument --jobs: must be a whole number of at least 1"),
        (["--seed", "1"], "argument --seed: the experiment sets it"),
        (["--c=5"], "argument --c: the experiment sets it"),
        (["--nonsense"], "--nonsense"),
        (["--num_epochs", "0"], "argument --num_epochs"),
        (["--scheduler", "tcp://127.0.0.1:1", "--jobs", "2"], "argument --jobs: the cluster has its own"),
        (["--scheduler", "linear"], "argument --scheduler: invalid choice: 'linear'"),
    ],
)
def test_wrong_flag(flags, message, tmp_path, capsys):
    assert run(tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("reproduce.py: error: ") and error.count("\n") == 1


# --- running it -----------------------------------------------------------------------------------------------------


def test_experiment(small_network, tmp_path, capsys):
    assert run(tmp_path, "--seeds", "1-3") == 0
    accuracies = {}
    for setting, name in (("baseline", BASELINE), ("proposed", PROPOSED)):
        accuracies[setting] = []
        for seed in (1, 2, 3):
            table = pandas.read_csv(tmp_path / "results" / f"{name}-seed{seed}.csv", comment="#")
            accuracies[setting].append(table["test_accuracy"][table["val_accuracy"].idxmax()])
    ours, theirs = accuracies["proposed"], accuracies["baseline"]
    summary = pandas.read_csv(tmp_path / "results" / "digits-resnet18.csv", comment="#").set_index("setting")
    assert summary["mean"].tolist() == pytest.approx([np.mean(theirs), np.mean(ours)])
    assert summary["standard_deviation"].tolist() == pytest.approx([np.std(theirs, ddof=1), np.std(ours, ddof=1)])
    expected = stats.ttest_1samp(np.subtract(ours, theirs), 0, alternative="greater").pvalue
    assert summary.loc["proposed", "p_value"] == pytest.approx(expected)
    assert summary.loc["proposed", "pairs"] == 3
    assert "# dataset: digits\n" in (tmp_path / "results" / "digits-resnet18.csv").read_text()
    shown = capsys.readouterr().out
    assert shown.endswith((tmp_path / "results" / "digits-resnet18.md").read_text())
    assert shown.startswith(f"1/6 {BASELINE}-seed1 test accuracy {theirs[0]:.3f} %\n2/6 {PROPOSED}-seed1 test")
    figures = {file.name for file in (tmp_path / "results").glob("*.png")}
    assert figures == {f"digits-resnet18-{name}.png" for name in FIGURES}


@pytest.fixture
def no_figures(monkeypatch):
    """They take seconds."""
    monkeypatch.setattr(reproduce, "save_figures", lambda *arguments: None)


def test_finished_runs_are_not_run_again(small_network, no_figures, tmp_path, monkeypatch, capsys):
    assert run(tmp_path, "--seeds", "1") == 0
    first = (tmp_path / "results" / f"{PROPOSED}-seed1.csv").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", None)
        assert run(tmp_path, "--seeds", "1") == 0
    capsys.readouterr()
    assert run(tmp_path, "--seeds", "1-2") == 0
    assert capsys.readouterr().out.startswith("3/4 ")
    assert run(tmp_path, "--seeds", "1", "--restart") == 0
    assert (tmp_path / "results" / f"{PROPOSED}-seed1.csv").stat().st_mtime_ns > first


def test_one_failure_does_not_stop_the_others(small_network, no_figures, tmp_path, monkeypatch, capsys):
    whole = train.train

    def fails_with_seed_2(settings):
        if (settings.seed, settings.bn_weight) == (2, 1):
            raise FloatingPointError("a loss is not\nfinite")
        return whole(settings)

    monkeypatch.setattr(train, "train", fails_with_seed_2)
    assert run(tmp_path, "--seeds", "1-3") == 1
    captured = capsys.readouterr()
    assert captured.err == f"reproduce.py: {BASELINE}-seed2 failed: FloatingPointError: a loss is not finite\n"
    assert len(list((tmp_path / "results").glob("*seed*.csv"))) == 5
    rows = {line.split("|")[1].strip(): line for line in captured.out.splitlines() if line.startswith("|")}
    assert " of 2 " in rows["proposed"]


def test_files_of_another_experiment_are_left_alone(small_network, no_figures, tmp_path, capsys):
    assert run(tmp_path, "--seeds", "1") == 0
    assert run(tmp_path, "--seeds", "1", "--momentum", "0.5") == 1
    assert "momentum was 0.9, now 0.5" in capsys.readouterr().err
    assert run(tmp_path, "--seeds", "1", "--momentum", "0.5", "--name", "half") == 0


def test_report(small_network, tmp_path, monkeypatch, capsys):
    assert run(tmp_path, "--seeds", "1-2") == 0
    committed = tmp_path / "elsewhere"
    (tmp_path / "results").rename(committed)
    capsys.readouterr()
    monkeypatch.setattr(train, "train", None)
    assert run(tmp_path, "--report", str(committed), "--seeds", "1-5") == 0
    assert " of 2 " in capsys.readouterr().out
    assert (committed / "digits-resnet18-paired-differences.pdf").exists()
    assert run(tmp_path, "--report") == 1
    assert f"{tmp_path / 'results'} has no finished run of this experiment" in capsys.readouterr().err


@contextmanager
def interrupted_at_seed_2(monkeypatch) -> Iterator[None]:
    """SIGTERM comes when the first run with seed 2 begins."""
    whole = train.train

    def interrupted(settings):
        if settings.seed == 2:
            raise KeyboardInterrupt(signal.SIGTERM)
        return whole(settings)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train", interrupted)
        yield


def test_interrupted_experiment_goes_on(small_network, no_figures, tmp_path, monkeypatch, capsys):
    with interrupted_at_seed_2(monkeypatch):
        assert run(tmp_path, "--seeds", "1-3") == 143
    captured = capsys.readouterr()
    assert captured.err.startswith("reproduce.py: stopped;")
    assert "it takes two pairs with the baseline, not 1" in captured.out
    assert len(list((tmp_path / "results").glob("*seed*.csv"))) == 2
    assert run(tmp_path, "--seeds", "1-3") == 0
    assert len(list((tmp_path / "results").glob("*seed*.csv"))) == 6


ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (FOLDER.parent, FOLDER)))}


@contextmanager
def start(path: Path, *flags: str, **options: Any) -> Iterator[subprocess.Popen]:
    """An experiment in other processes, which does not outlive a failing test."""
    command = [sys.executable, FOLDER / "small_experiment.py", *FLAGS, "--path", path, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ENVIRONMENT}
    with subprocess.Popen(command, text=True, **(pipes | options)) as experiment:
        try:
            yield experiment
        finally:
            experiment.kill()


def test_signal_before_a_training_begins(small_network, tmp_path, monkeypatch):
    def load(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(train, "load_image_set", load)
    assert run(tmp_path, "--seeds", "1-3") == 130
    assert not list((tmp_path / "results").glob("*seed*"))


def test_run_of_another_process_is_waited_for(small_network, tmp_path):
    [cell, _] = cells("--seeds", "1", "--path", str(tmp_path))
    files = run_files(cell.run.path, cell.name)
    with ThreadPoolExecutor() as pool, lock_run(files):
        waiting = pool.submit(reproduce.run_cell, cell, "cpu")
        with pytest.raises(TimeoutError):
            waiting.result(timeout=3)
    assert waiting.result()[1].test_accuracy == read_results(files.results).test_accuracy


def test_restarted_experiment_goes_on_without_the_flag(small_network, no_figures, tmp_path, monkeypatch, capsys):
    assert run(tmp_path, "--seeds", "1-3") == 0
    with interrupted_at_seed_2(monkeypatch):
        assert run(tmp_path, "--seeds", "1-3", "--restart") == 143
    assert "give the same command without --restart to go on" in capsys.readouterr().err
    assert len(list((tmp_path / "results").glob("*seed*.csv"))) == 2  # what was there before is gone
    assert run(tmp_path, "--seeds", "1-3") == 0
    assert capsys.readouterr().out.startswith("3/6 ")


def test_terminal_shows_bar_and_table(tmp_path):
    main, child = pty.openpty()
    os.set_blocking(main, False)
    fcntl.ioctl(main, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with start(tmp_path, "--seeds", "1-2", "--device", "cpu", stderr=child) as experiment:
        shown = b""
        while experiment.poll() is None:
            time.sleep(0.05)
            with suppress(BlockingIOError):
                shown += os.read(main, 100_000)
        os.close(main)
        os.close(child)
        table = experiment.stdout.read()
    assert experiment.returncode == 0
    text = shown.decode()
    assert re.search(r"50%.*2/4 \[\d\d:\d\d<\d\d:\d\d", text)  # the time left
    header = r"\| setting  \| seeds \| test accuracy \(%\) \| difference \| p +\| p \(Holm\) \|"
    assert re.search(header, text) and "| proposed | 1 " in text
    assert table.startswith("| setting ")  # nothing but the table at the end


# --- several processes ----------------------------------------------------------------------------------------------

MANY = ["--num_epochs", "150", "--checkpoint_seconds", "0.1", "--seeds", "1-2", "--settings", "baseline", "init"]
THREADS = {"OMP_NUM_THREADS": str(max(1, joblib.cpu_count() // 2))}  # what each of two processes gets


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Iterator[dict[str, Results]]:
    """The numbers of an undisturbed experiment with as many threads as each of two processes gets."""
    path = tmp_path_factory.mktemp("alone")
    environment = {**ENVIRONMENT, **THREADS}
    with start(path, *MANY, "--device", "cpu", env=environment) as experiment:
        _, error = experiment.communicate()
    assert experiment.returncode == 0, error
    return numbers(path)


def numbers(path: Path) -> dict[str, list]:
    """All numbers of all runs."""
    runs = {file.name: read_results(file) for file in (path / "results").glob("*seed*.csv")}
    return {name: {key: column.tolist() for key, column in run.columns.items()} for name, run in runs.items()}


def process_at_work(path: Path, epochs: int) -> psutil.Process:
    """A process that is in the middle of a run which has made that many epochs."""
    for _ in range(6000):
        time.sleep(0.01)
        for file in (path / "results").glob("*seed*.csv"):
            if epochs < len(read_results(file).columns["epoch"]) < 120:
                lock = path / "networks" / f"{file.stem}.lock"
                for process in psutil.process_iter():
                    try:
                        if any(Path(opened.path) == lock for opened in process.open_files()):
                            return process
                    except (psutil.Error, OSError):
                        continue
    raise TimeoutError


@pytest.fixture
def light_runs(monkeypatch):
    """Stand-ins for runs, of which other processes know at once."""
    monkeypatch.setattr(reproduce, "run_cell", light.run_cell)
    monkeypatch.setattr(reproduce, "run_in_worker", light.run_cell)


def test_killed_process_and_stopped_experiment(alone, tmp_path):
    flags = [*MANY, "--jobs", "2", "--device", "cpu"]
    with start(tmp_path, *flags) as experiment:
        process_at_work(tmp_path, 10).kill()
        assert process_at_work(tmp_path, 30).ppid() == experiment.pid
        experiment.terminate()
        _, error = experiment.communicate(timeout=300)
    assert experiment.returncode == 143
    assert "\nreproduce.py: stopped; the epochs that are done are saved: give the same command again" in f"\n{error}"
    assert numbers(tmp_path) != alone
    with start(tmp_path, *flags) as experiment:
        _, error = experiment.communicate(timeout=300)
    assert experiment.returncode == 0, error
    assert numbers(tmp_path) == alone
    for file in (tmp_path / "results").glob("*seed*.csv"):
        assert str(read_results(file).settings["machine"]).endswith(f", {THREADS['OMP_NUM_THREADS']} threads")


def test_stopped_experiment_with_an_idle_process(tmp_path):
    flags = ["--num_epochs", "400", "--checkpoint_seconds", "1e9", "--seeds", "1-3", "--settings", "baseline"]
    with start(tmp_path, *flags, "--jobs", "2", "--device", "cpu") as experiment:
        files = [tmp_path / "results" / f"{BASELINE}-seed{seed}.csv" for seed in (1, 2, 3)]
        while [len(read_results(file).columns["epoch"]) for file in files if file.exists()] < [400, 400, 5]:
            assert experiment.poll() is None
            time.sleep(0.01)
        experiment.terminate()
        _, error = experiment.communicate(timeout=300)
    assert experiment.returncode == 143, error
    state = load_checkpoint(tmp_path / "networks" / f"{BASELINE}-seed3-last.pt")
    assert 1 < len(state["columns"]["epoch"]) < 400  # more than the first epoch, whose checkpoint comes at once
    assert len(state["columns"]["epoch"]) == len(read_results(files[2]).columns["epoch"])


def test_run_that_kills_its_process_does_not_stop_the_others(light_runs):
    names = ["a", "deadly", "deadly too", "b", "c", "d"]
    outcomes = {cell.name: outcome for cell, outcome in reproduce.run_here(list(map(light.Cell, names)), 2, None, [])}
    killed = "its process was killed 3 times, perhaps for lack of memory"
    assert outcomes == {name: killed if name.startswith("deadly") else "done" for name in names}


@contextmanager
def cluster(folder: Path, **environment: str) -> Iterator[tuple[str, Callable[[], subprocess.Popen]]]:
    """The address of a Dask scheduler on this machine, and a function that starts one worker more."""
    file = folder / "scheduler.json"
    home = folder / "home"
    home.mkdir()
    options = {"env": {**ENVIRONMENT, **THREADS, **environment}, "cwd": home}
    with (folder / "cluster.log").open("w") as log, ExitStack() as stack:

        def dask(*arguments: str) -> subprocess.Popen:
            command = [sys.executable, "-m", "dask", *arguments, "--scheduler-file", str(file), "--no-dashboard"]
            process = stack.enter_context(subprocess.Popen(command, stdout=log, stderr=log, **options))
            stack.callback(process.kill)
            return process

        scheduler = dask("scheduler", "--host", "127.0.0.1", "--port", "0")
        while not file.exists():
            assert scheduler.poll() is None, Path(log.name).read_text()
            time.sleep(0.1)
        yield json.loads(file.read_text())["address"], lambda: dask("worker", "--nthreads", "1", "--no-nanny")


def test_cluster_with_a_killed_worker(alone, tmp_path):
    path = tmp_path / "shared"
    with cluster(tmp_path) as (address, start_worker):
        worker = start_worker()
        with start(Path("shared"), *MANY, "--scheduler", address, cwd=tmp_path) as experiment:
            assert process_at_work(path, 10).pid == worker.pid
            start_worker()
            worker.kill()
            out, error = experiment.communicate(timeout=300)
    assert experiment.returncode == 0, error
    assert numbers(path) == alone
    assert "4/4 " in out


def run_light(address: str, path: Path, *names: str) -> dict[str, reproduce.Outcome]:
    """What comes of stand-ins for runs on a cluster, by name."""
    outcomes = reproduce.run_on_cluster([light.Cell(name, path) for name in names], address, None)
    return {cell.name: outcome for cell, outcome in outcomes}


def test_cluster_that_gives_up_a_run(light_runs, tmp_path):
    with cluster(tmp_path, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="0") as (address, start_worker):
        start_worker(), start_worker()
        outcomes = run_light(address, tmp_path, "deadly", "a", "b", "c")
    # Dask may blame runs that it had given to the same worker, too
    killed = {name for name, outcome in outcomes.items() if outcome.startswith("KilledWorker: ")}
    assert outcomes.keys() == {"deadly", "a", "b", "c"} and "deadly" in killed
    assert {outcomes[name] for name in outcomes.keys() - killed} == {"done"}


def test_cluster_whose_scheduler_dies(light_runs, tmp_path):
    with cluster(tmp_path) as (address, start_worker):
        start_worker(), start_worker()
        port = int(address.rpartition(":")[2])
        listening = {c.laddr.port: c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        killer = threading.Timer(4, psutil.Process(listening[port]).kill)
        killer.start()
        with pytest.raises(reproduce.ClusterError, match=f"the scheduler at {address} is gone"):
            run_light(address, tmp_path, "slow", "slower", "slow too")


def test_cluster_without_the_project(light_runs, tmp_path):
    with cluster(tmp_path, PYTHONPATH="") as (address, start_worker):
        start_worker()
        with pytest.raises(
            reproduce.ClusterError, match=f"PYTHONPATH={FOLDER.parent}: tcp://.*, {address} cannot import reproduce"
        ):
            run_light(address, tmp_path, "a")


def test_cluster_that_does_not_share_the_folder(light_runs, tmp_path, monkeypatch):
    with cluster(tmp_path) as (address, start_worker):
        start_worker()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "touch", lambda path: None)  # what is made here is not there
            with pytest.raises(
                reproduce.ClusterError, match=f"{tmp_path} must be a folder that all workers share; not so for tcp"
            ):
                run_light(address, tmp_path, "a")


def test_cluster_that_is_not_there(tmp_path, capsys):
    assert run(tmp_path, "--scheduler", "tcp://127.0.0.1:1") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "tcp://127.0.0.1:1" in error


# --- devices --------------------------------------------------------------------------------------------------------


def test_every_run_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    with ExitStack() as stack:
        first, second, third = (stack.enter_context(reproduce.own_device(None, lambda: 2)) for _ in range(3))
        assert (first, second, third) == ("cuda:0", "cuda:1", "cuda:0")
        with reproduce.own_device("cpu", lambda: 2) as chosen:
            assert chosen == "cpu"
    with reproduce.own_device("cuda", lambda: 2) as free_again:
        assert free_again == "cuda:0"
    with reproduce.own_device(None, lambda: 0) as none:
        assert none == "cpu"


def test_gpus_of_a_job_are_told_from_those_of_another(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    chosen = []
    with ExitStack() as stack:
        for visible in ("0,1", "2,3", "0,1"):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
            chosen.append(stack.enter_context(reproduce.own_device(None, lambda: 2)))
    assert chosen == ["cuda:0", "cuda:0", "cuda:1"]
