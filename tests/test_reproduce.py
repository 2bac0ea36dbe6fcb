import errno
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from scipy import stats

import figures
import reproduce
import train
from lock import lock_run
from settings import run_files

FOLDER = Path(__file__).parent
FLAGS = ["--dataset", "digits", "--batch_size", "48", "--num_epochs", "2"]
FIGURES = ("learning-curves", "paired-differences", "scales-and-shifts", "normalized-values")
EXPERIMENT = "digits-resnet18-batch_size=48-num_epochs=2"
BASELINE, PROPOSED = f"{EXPERIMENT}-weight1-c1-dataset", f"{EXPERIMENT}-weight0.1-c100-bn"


def run(path: Path, *flags: str) -> int:
    """An experiment in this process; returns its exit code."""
    try:
        reproduce.main([*FLAGS, "--path", str(path), "--device", "cpu", *flags])
    except SystemExit as stop:
        return stop.code
    return 0


def planned(*flags: str) -> list[reproduce.PlannedRun]:
    return reproduce.parse([*FLAGS, *flags]).runs


# --- what is run ----------------------------------------------------------------------------------------------------


def test_order_is_seed_by_seed():
    assert [(run.setting, run.settings.seed) for run in planned("--seeds", "1-2", "7")] == [
        (setting, seed) for seed in (1, 2, 7) for setting in ("baseline", "proposed")
    ]
    assert len(planned()) == 30


def test_settings_of_the_paper():
    found = {
        run.setting: (run.settings.bn_weight, run.settings.c, run.settings.input_norm)
        for run in planned("--settings", "baseline", "proposed", "init", "rate", "input", "--seeds", "1")
    }
    assert found == {
        "baseline": (1, 1, "dataset"),
        "proposed": (0.1, 100, "bn"),
        "init": (0.1, 1, "bn"),
        "rate": (1, 100, "bn"),
        "input": (1, 1, "bn"),
    }


def test_own_settings_and_sweep():
    found = planned("--settings", "proposed", "half:bn_weight=0.5,c=50", "--bn_weights", "0.01", "0.1", "--seeds", "3")
    assert [(run.setting, run.settings.bn_weight, run.settings.c, run.settings.input_norm) for run in found] == [
        ("proposed", 0.1, 100, "bn"),
        ("half", 0.5, 50, "bn"),
        ("bn_weight 0.01", 0.01, 100, "bn"),  # 0.1 is there already, as proposed
    ]


def test_names_of_runs_are_those_of_train():
    for run in planned("--precision", "bfloat16", "--seeds", "1"):
        assert run.settings.name == train.parse(["--device", "cpu", *run.flags]).name
    assert (
        reproduce.parse([*FLAGS, "--precision", "bfloat16"]).name
        == "digits-resnet18-batch_size=48-num_epochs=2-precision=bfloat16"
    )
    named = planned("--name", "mine", "--seeds", "1")
    assert [run.settings.name for run in named] == ["mine-weight1-c1-dataset-seed1", "mine-weight0.1-c100-bn-seed1"]


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
        (["--settings", "a:c=0", "b:c=1"], "two of a, b are the same"),  # neither reduces the rate
        (["--settings", "a:c=2", "a:c=3"], "two of a, a are the same"),
        (["--bn_weights", "0.1", "nan"], "argument --bn_weights: must be a number from 1e-30 to 1e30, not 'nan'"),
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
        (["--scheduler", "linear"], "argument --scheduler: must be cos, none or the address of a Dask scheduler"),
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
    summary = pandas.read_csv(tmp_path / "results" / f"{EXPERIMENT}.csv", comment="#").set_index("setting")
    assert summary["mean"].tolist() == pytest.approx([np.mean(theirs), np.mean(ours)])
    assert summary["standard_deviation"].tolist() == pytest.approx([np.std(theirs, ddof=1), np.std(ours, ddof=1)])
    expected = stats.ttest_1samp(np.subtract(ours, theirs), 0, alternative="greater").pvalue
    assert summary.loc["proposed", "p_value"] == pytest.approx(expected)
    assert summary.loc["proposed", "pairs"] == 3
    assert "# dataset: digits\n" in (tmp_path / "results" / f"{EXPERIMENT}.csv").read_text()
    shown = capsys.readouterr().out
    assert shown.endswith((tmp_path / "results" / f"{EXPERIMENT}.md").read_text())
    assert shown.startswith(f"1/6 {BASELINE}-seed1 test accuracy {theirs[0]:.3f} %\n2/6 {PROPOSED}-seed1 test")
    made = {file.name for file in (tmp_path / "results").glob("*.png")}
    assert made == {f"{EXPERIMENT}-{name}.png" for name in FIGURES}


@pytest.fixture
def no_figures(monkeypatch):
    """They take seconds."""
    monkeypatch.setattr(figures, "save_figures", lambda *arguments: ([], []))


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

    def fails_with_seed_2(settings, **options):
        if (settings.seed, settings.bn_weight) == (2, 1):
            raise FloatingPointError("a loss is not\nfinite")
        return whole(settings, **options)

    monkeypatch.setattr(train, "train", fails_with_seed_2)
    assert run(tmp_path, "--seeds", "1-3") == 1
    captured = capsys.readouterr()
    assert captured.err == f"reproduce.py: {BASELINE}-seed2 failed: FloatingPointError: a loss is not finite\n"
    assert len(list((tmp_path / "results").glob("*seed*.csv"))) == 5
    rows = {line.split("|")[1].strip(): line for line in captured.out.splitlines() if line.startswith("|")}
    assert " of 2 " in rows["proposed"] and "interim: 2 of 3 pairs" in rows["proposed"]
    line = "baseline: 2 of 3 seeds; seed 2 failed: FloatingPointError: a loss is not finite\n"
    assert (tmp_path / "results" / f"{EXPERIMENT}.md").read_text().endswith(f"|\n\n{line}")


def test_files_of_another_experiment_are_left_alone(small_network, no_figures, tmp_path, capsys):
    assert run(tmp_path, "--seeds", "1", "--name", "mine") == 0
    assert run(tmp_path, "--seeds", "1", "--name", "mine", "--momentum", "0.5") == 1
    assert "mine.csv is of other settings, and is kept: momentum 0.9, here 0.5" in capsys.readouterr().err
    (tmp_path / "results" / "mine.csv").unlink()
    assert run(tmp_path, "--seeds", "1", "--name", "mine", "--momentum", "0.5") == 1
    assert "momentum was 0.9, now 0.5" in capsys.readouterr().err
    assert run(tmp_path, "--seeds", "1", "--momentum", "0.5") == 0


def test_table_is_kept_where_less_would_replace_it(small_network, no_figures, tmp_path, capsys):
    assert run(tmp_path, "--seeds", "1-2") == 0
    tables = [tmp_path / "results" / f"{EXPERIMENT}.{kind}" for kind in ("csv", "md")]
    before = [file.read_bytes() for file in tables]
    capsys.readouterr()
    assert run(tmp_path, "--seeds", "1", "--report") == 0
    assert "keeps its table of 4 finished runs: remove it" in capsys.readouterr().out
    assert run(tmp_path, "--seeds", "8-9", "--report") == 1
    assert "has no finished run of this experiment" in capsys.readouterr().err
    assert [file.read_bytes() for file in tables] == before
    assert run(tmp_path, "--seeds", "1", "--restart") == 0
    assert [file.read_bytes() for file in tables] != before


def test_table_does_not_replace_a_run(small_network, no_figures, tmp_path, capsys):
    train.main([*FLAGS, "--path", str(tmp_path), "--device", "cpu", "--name", "exp"])
    before = (tmp_path / "results" / "exp.csv").read_bytes()
    capsys.readouterr()
    assert run(tmp_path, "--seeds", "1", "--name", "exp") == 1
    error = capsys.readouterr().err
    assert "exp.csv is not the table of an experiment, and is kept: give another --name" in error
    assert (tmp_path / "results" / "exp.csv").read_bytes() == before
    assert not list((tmp_path / "results").glob("*seed*"))


def test_restart_removes_nothing_where_a_run_is_at_work(small_network, no_figures, tmp_path, capsys):
    assert run(tmp_path, "--seeds", "1-2") == 0
    files = {file: file.read_bytes() for file in tmp_path.rglob("*seed*") if file.suffix != ".lock"}
    with lock_run(run_files(tmp_path, f"{PROPOSED}-seed2")):
        assert run(tmp_path, "--seeds", "1-2", "--restart") == 1
    assert "another process is at work" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in files} == files


def test_restart_opens_one_lock_at_a_time(small_network, no_figures, tmp_path, monkeypatch):
    """A process may not have as many files open as there are runs."""
    locked, most = [], []

    @contextmanager
    def counted_lock(files):
        with lock_run(files):
            locked.append(files)
            most.append(len(locked))
            yield
            locked.remove(files)

    assert run(tmp_path, "--seeds", "1") == 0
    monkeypatch.setattr(reproduce, "lock_run", counted_lock)
    assert run(tmp_path, "--seeds", "1", "--restart") == 0
    assert max(most) == 1


def test_changed_result_file(small_network, no_figures, tmp_path, monkeypatch, capsys):
    """Its run's checkpoint mends it; without one, nothing is concluded from it."""
    assert run(tmp_path, "--seeds", "1-2") == 0
    file = tmp_path / "results" / f"{PROPOSED}-seed2.csv"
    before = file.read_text()
    changed = re.sub(r"\d(?=\n\Z)", lambda digit: str((int(digit[0]) + 5) % 10), before)
    file.write_text(changed)
    monkeypatch.setattr(train, "train_one_epoch", None)
    assert run(tmp_path, "--seeds", "1-2", "--report") == 1
    assert f"{file} was changed after it was written" in capsys.readouterr().err
    assert run(tmp_path, "--seeds", "1-2") == 0
    assert file.read_text() == before
    file.write_text(changed)
    (tmp_path / "networks" / f"{PROPOSED}-seed2-last.pt").unlink()
    capsys.readouterr()
    assert run(tmp_path, "--seeds", "1-2") == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and f"{file} was changed after it was written" in captured.err
    assert "--restart" in captured.err and "interim: 1 of 2 pairs" in captured.out
    assert file.read_text() == changed


def test_folder_that_can_only_be_read(small_network, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    assert run(tmp_path, "--seeds", "1-2") == 0
    table = capsys.readouterr().out.splitlines()[-4:]
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        patch.setattr(os, "replace", refuse)
        assert run(tmp_path, "--seeds", "1-2") == 0
        assert capsys.readouterr().out.splitlines() == table
        summary = tmp_path / "results" / f"{EXPERIMENT}.csv"
        summary.unlink()
        assert run(tmp_path, "--seeds", "1-2") == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines() == table
    assert captured.err == f"reproduce.py: error: [Errno 30] cannot write it: Read-only file system: '{summary}'\n"


def test_report(small_network, tmp_path, monkeypatch, capsys):
    assert run(tmp_path, "--seeds", "1-2") == 0
    committed = tmp_path / "elsewhere"
    (tmp_path / "results").rename(committed)
    capsys.readouterr()
    monkeypatch.setattr(train, "train", None)
    assert run(tmp_path, "--report", str(committed), "--seeds", "1-5") == 0
    assert " of 2 " in capsys.readouterr().out
    assert (committed / f"{EXPERIMENT}-paired-differences.pdf").exists()
    assert run(tmp_path, "--report") == 1
    assert f"{tmp_path / 'results'} has no finished run of this experiment" in capsys.readouterr().err


@contextmanager
def interrupted_at_seed_2(monkeypatch) -> Iterator[None]:
    """SIGTERM comes when the first run with seed 2 begins."""
    whole = train.train

    def interrupted(settings, **options):
        if settings.seed == 2:
            raise KeyboardInterrupt(signal.SIGTERM)
        return whole(settings, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train", interrupted)
        yield


def test_interrupted_experiment_goes_on(small_network, no_figures, tmp_path, monkeypatch, capsys):
    with interrupted_at_seed_2(monkeypatch):
        assert run(tmp_path, "--seeds", "1-3") == 143
    captured = capsys.readouterr()
    assert captured.err.startswith("reproduce.py: stopped;")
    assert "| interim: 1 of 3 pairs |" in captured.out
    assert len(list((tmp_path / "results").glob("*seed*.csv"))) == 2
    assert run(tmp_path, "--seeds", "1-3") == 0
    assert len(list((tmp_path / "results").glob("*seed*.csv"))) == 6


def test_another_sigterm_does_not_cost_the_table(small_network, no_figures, tmp_path, monkeypatch, capsys):
    """Clusters repeat it."""

    def send(_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        return []

    monkeypatch.setattr(reproduce, "mixed_circumstances", send)
    with interrupted_at_seed_2(monkeypatch):
        assert run(tmp_path, "--seeds", "1-3") == 143
    captured = capsys.readouterr()
    assert "| interim: 1 of 3 pairs |" in captured.out and captured.err.startswith("reproduce.py: stopped; the epochs")
    assert (tmp_path / "results" / f"{EXPERIMENT}.md").exists()


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


def test_restarted_experiment_goes_on_without_the_flag(small_network, no_figures, tmp_path, monkeypatch, capsys):
    assert run(tmp_path, "--seeds", "1-3") == 0
    with interrupted_at_seed_2(monkeypatch):
        assert run(tmp_path, "--seeds", "1-3", "--restart") == 143
    assert "run the same command without --restart to resume" in capsys.readouterr().err
    assert len(list((tmp_path / "results").glob("*seed*.csv"))) == 2  # what was there before is gone
    assert run(tmp_path, "--seeds", "1-3") == 0
    assert capsys.readouterr().out.startswith("3/6 ")


def test_terminal_shows_bar_and_table(tmp_path):
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
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
