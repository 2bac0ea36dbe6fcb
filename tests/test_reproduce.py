import errno
import os
import re
import shlex
import shutil
import signal
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pandas
import pytest
from scipy import stats

import figures
import reproduce
import run_settings
import train
from experiment import display, outcomes
from experiment.plan import PlannedRun, parse
from light import wait_until
from run_settings import Settings
from saved_runs.lock import lock_run
from saved_runs.results import Results, read_results, run_files, write_results

pytestmark = pytest.mark.usefixtures("small_network", "runs_here")

FOLDER = Path(__file__).parent
FLAGS = ["--dataset", "digits", "--batch_size", "48", "--num_epochs", "2"]
FIGURES = ("forest", "learning-curves", "scales-and-shifts", "normalized-values")
EXPERIMENT = "digits-resnet18-batch_size=48-num_epochs=2"
BASELINE, PROPOSED = f"{EXPERIMENT}-weight1-c1-dataset", f"{EXPERIMENT}-weight0.1-c100-bn"


def run(path: Path, *flags: str) -> int:
    """An experiment in this process; returns its exit code."""
    try:
        reproduce.main([*FLAGS, "--path", str(path), "--device", "cpu", *flags])
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def no_figures(monkeypatch):
    """They take seconds."""
    monkeypatch.setattr(figures, "save_figures", lambda *arguments: ([], []))


VAL_ACCURACIES = {  # of the first epoch, by bn_weight and learning rate; 17 gains 1 on 16
    (1.0, 0.01): 60.0,
    (1.0, 0.1): 70.0,
    (1.0, 0.4): 72.0,
    (0.1, 0.01): 80.0,
    (0.1, 0.1): 71.0,
    (0.1, 0.4): 80.0,
}


def fake_train(settings: Settings) -> Results:
    """Results without a training: the first epoch is the best on validation, the second on the test."""
    val_accuracy = VAL_ACCURACIES.get((settings.bn_weight, settings.learning_rate), 50.0) + settings.seed % 2
    gain, order = (3, 21) if settings.input_norm == "bn" else (0, 7)
    test_accuracy = 50 + gain + (order * settings.seed) % 5 + settings.seed / (9 + settings.c)
    columns = {"train_loss": [1.0, 0.5], "val_loss": [1.0, 1.0], "val_accuracy": [val_accuracy, 10.0]}
    columns |= {"epoch": [1, 2], "test_accuracy": [test_accuracy, 90 - test_accuracy / 2]}
    columns = {name: np.array(values) for name, values in columns.items()}
    results = Results({**run_settings.determining(settings), "name": settings.run_name}, columns)
    write_results(run_files(settings.path, settings.run_name).results, results)
    return results


@pytest.fixture
def no_training(monkeypatch, no_figures):
    """Runs and figures take seconds."""
    monkeypatch.setattr(train, "train", fake_train)


def accuracies_in(folder: Path, runs: str, epoch: int) -> list[float]:
    """Test accuracies of the runs with the seeds 1 to 4 at an epoch."""
    return [read_results(folder / f"{runs}-seed{seed}.csv").columns["test_accuracy"][epoch - 1] for seed in range(1, 5)]


def read_summary(file: Path) -> pandas.DataFrame:
    """The table with all digits, by method."""
    return pandas.read_csv(file, comment="#").set_index("setting")


def p_value(ours: list[float], theirs: list[float]) -> float:
    return stats.ttest_1samp(np.subtract(ours, theirs), 0, alternative="greater").pvalue


# --- flags ----------------------------------------------------------------------------------------------------------


def test_flags_of_train_pass_through(capsys):
    flags = ["--momentum=0.8", "--scheduler", "none", "--seeds", "5", "--list", "--device", "cpu"]
    assert run(Path("some where"), *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line, bn_weight in zip(lines, (1, 0.1), strict=True):
        program, script, *arguments = shlex.split(line)
        assert (program, script) == ("python", "train.py")
        of_run = run_settings.parse(arguments)
        assert (of_run.momentum, of_run.scheduler, of_run.seed) == (0.8, "none", 5)
        assert (of_run.bn_weight, of_run.path, of_run.num_epochs) == (bn_weight, Path("some where").absolute(), 2)


def test_commands_for_another_machine(tmp_path, monkeypatch, capsys):
    """This one needs neither the device nor the compiler."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    flags = [*FLAGS, "--seeds", "3", "--device", "cuda", "--compile", "--path", str(tmp_path)]
    reproduce.main([*flags, "--list"])
    assert re.findall(r"--seed 3 .*--device cuda$", capsys.readouterr().out, re.MULTILINE) != []
    with pytest.raises(SystemExit):
        reproduce.main([*flags, "--report", str(tmp_path)])
    assert "has no finished run of this experiment" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        (["--jobs", "3", "--device", "cuda:1"], (3, None, "cuda:1")),
        (["--cluster", "tcp://127.0.0.1:1"], (1, "tcp://127.0.0.1:1", None)),
    ],
)
def test_where_runs_are_made(flags, where, tmp_path, monkeypatch):
    asked = []

    def make_runs(runs, *arguments):
        asked.append((len(runs), arguments[:3]))
        yield from ()

    monkeypatch.setattr(reproduce, "make_runs", make_runs)
    monkeypatch.setattr(reproduce, "check_here", lambda *_: None)
    with suppress(SystemExit):  # as there is nothing to report
        reproduce.main([*FLAGS, "--path", str(tmp_path), "--seeds", "1-2", *flags])
    assert asked == [(4, where)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--settings", "nonsense"], "'nonsense' is none of baseline"),
        (["--settings", "a:bn_weight=x"], "'bn_weight=x' is no bn_weight, c, input_norm, equivalent=VALUE"),
        (["--settings", "a:bn_weight=-1"], "argument --settings: 'a:bn_weight=-1': bn_weight: must be a number from"),
        (["--settings", "baseline:c=5"], "needs a name of its own"),
        (["--settings", "a:c=0", "b:c=1"], "a and b have the same bn_weight, c,"),  # neither reduces the rate
        (["--settings", "a:c=2", "a:c=3"], "two of a, a have the same name: remove or rename one"),
        (["--bn_weights", "0.1", "nan"], "argument --bn_weights: must be a number from 1e-30 to 1e30, not 'nan'"),
        (["--seeds", "3-1"], "not '3-1'"),
        (["--seeds", "88265-999999999"], "seeds above 88265 repeat the draws"),
        (["--name", "x" * 190], "must be at most 200 letters"),
        (["--jobs", "0"], "argument --jobs: must be a whole number of at least 1"),
        (["--seed", "1"], "argument --seed: the experiment sets it"),
        (["--nonsense"], "--nonsense"),
        (["--job", "2"], "unrecognized arguments: --job 2: did you mean --jobs?"),
        (["--momenta", "0.5"], "unrecognized arguments: --momenta 0.5: did you mean --momentum?"),
        (["--cluster", "tcp://127.0.0.1:1", "--jobs", "2"], "argument --jobs: the cluster has its own"),
        (["--cluster", "cos"], "argument --cluster: must be the address of a Dask scheduler, tcp://HOST:PORT"),
        (["--scheduler", "linear"], "argument --scheduler: invalid choice: 'linear'"),
    ],
)
def test_wrong_flag(flags, message, tmp_path, capsys):
    assert run(tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("reproduce.py: error: ") and error.count("\n") == 1


# --- running it -----------------------------------------------------------------------------------------------------


def test_experiment(tmp_path, capsys):
    assert run(tmp_path, "--seeds", "1-3") == 0
    accuracies = []
    for name in (PROPOSED, BASELINE):
        tables = [pandas.read_csv(tmp_path / f"results/{name}-seed{seed}.csv", comment="#") for seed in (1, 2, 3)]
        accuracies.append([table["test_accuracy"][table["val_accuracy"].idxmax()] for table in tables])
    ours, theirs = accuracies
    summary = read_summary(tmp_path / "results" / f"{EXPERIMENT}.csv")
    assert summary["mean"].tolist() == pytest.approx([np.mean(theirs), np.mean(ours)])
    assert summary["standard_deviation"].tolist() == pytest.approx([np.std(theirs, ddof=1), np.std(ours, ddof=1)])
    assert summary.loc["proposed", "p_value"] == pytest.approx(p_value(ours, theirs))
    assert summary.loc["proposed", "pairs"] == 3
    assert "# dataset: digits\n" in (tmp_path / "results" / f"{EXPERIMENT}.csv").read_text()
    shown, *written = capsys.readouterr().out.split("\nwritten: ")
    assert shown.endswith((tmp_path / "results" / f"{EXPERIMENT}.md").read_text())
    first, second = f"{BASELINE}-seed1", f"{PROPOSED}-seed1"
    assert re.match(
        rf"""6 runs of 2 epochs, 1 at a time; 0 are finished in {re.escape(str(tmp_path))}/results
{re.escape(first)} begins
1/6 {re.escape(first)} test accuracy {theirs[0]:.3f} % \(about \d\d:\d\d left\)
{re.escape(second)} begins
2/6 {re.escape(second)} test accuracy""",
        shown,
    )
    made = {file.name for file in (tmp_path / "results").glob("*.png")}
    assert made == {f"{EXPERIMENT}-{name}.png" for name in FIGURES}
    named = {Path(file.strip()) for file in written}
    assert named == {
        file for file in (tmp_path / "results").glob(f"{EXPERIMENT}*") if not re.search("seed|npz", file.name)
    }


def test_finished_runs_are_not_run_again(no_training, tmp_path, capsys):
    assert run(tmp_path, "--seeds", "1") == 0
    first = (tmp_path / "results" / f"{PROPOSED}-seed1.csv").stat().st_mtime_ns
    capsys.readouterr()
    assert run(tmp_path, "--seeds", "1-2") == 0
    assert "; 2 are finished in " in (shown := capsys.readouterr().out) and "\n3/4 " in shown and "\n2/4 " not in shown
    assert run(tmp_path, "--seeds", "1", "--restart") == 0
    assert (tmp_path / "results" / f"{PROPOSED}-seed1.csv").stat().st_mtime_ns > first


def test_every_seed_with_a_split_of_its_own(no_figures, tmp_path):
    assert run(tmp_path, "--seeds", "1-3", "--split_seed", "seed") == 0
    own, accuracies = f"{EXPERIMENT}-split_seed=seed", {}
    for name in ("weight1-c1-dataset", "weight0.1-c100-bn"):
        runs = [read_results(tmp_path / "results" / f"{own}-{name}-seed{seed}.csv") for seed in (1, 2, 3)]
        accuracies[name] = [of.test_accuracy for of in runs]
    same = train.main([*FLAGS, "--path", str(tmp_path), "--device", "cpu", "--seed", "3", "--split_seed", "3"])
    other = train.main([*FLAGS, "--path", str(tmp_path), "--device", "cpu", "--seed", "3"])
    assert all((same.columns[name] == column).all() for name, column in runs[-1].columns.items())
    assert (other.columns["val_loss"] != runs[-1].columns["val_loss"]).all()
    row = pandas.read_csv(tmp_path / "results" / f"{own}.csv", comment="#").set_index("setting").loc["proposed"]
    assert (row["pairs"], row["p_value"]) == (3, pytest.approx(p_value(*reversed(accuracies.values()))))


def test_one_failure_does_not_stop_the_others(no_training, tmp_path, monkeypatch, capsys):
    def fails_with_seed_2(settings):
        if (settings.seed, settings.bn_weight) == (2, 1):
            raise FloatingPointError("a loss is not\nfinite")
        return fake_train(settings)

    monkeypatch.setattr(train, "train", fails_with_seed_2)
    assert run(tmp_path, "--seeds", "1-3") == 1
    captured = capsys.readouterr()
    assert captured.err == f"reproduce.py: {BASELINE}-seed2 failed: FloatingPointError: a loss is not finite\n"
    assert len(list((tmp_path / "results").glob("*seed*.csv"))) == 5
    table = captured.out.split("\n\n")[0]
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("|")}
    assert " of 2 " in rows["proposed"] and "interim: 2 of 3" in rows["proposed"]


def test_data_that_cannot_be_had_end_it_before_any_run(no_training, no_network, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        reproduce.main(["--path", str(tmp_path), "--device", "cpu", "--seeds", "1-3"])
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"reproduce\.py: error: CIFAR-10 is not in .*no route to host.*\n", err)
    assert not (tmp_path / "networks").exists()


def test_what_is_needed_is_tried_before_a_run_is_removed(no_training, tmp_path, monkeypatch, capsys):
    """Where no run is left to make, nothing is needed."""
    flags = ["--seeds", "1", "--device", "cuda:99"]
    assert run(tmp_path, "--seeds", "1") == 0
    files = {file: file.read_bytes() for file in (tmp_path / "results").iterdir()}
    assert run(tmp_path, *flags) == 0
    capsys.readouterr()
    assert run(tmp_path, *flags, "--restart") == 2
    assert capsys.readouterr().err.startswith("reproduce.py: error: argument --device: 'cuda:99' is not one of cpu")
    assert {file: file.read_bytes() for file in files} == files


def test_first_two_runs_that_fail_alike_end_it(no_training, tmp_path, monkeypatch, capsys):
    """But not where a run has finished, or one fails for another reason."""
    begun = []

    def full(settings):
        begun.append(settings.run_name)
        raise OSError(errno.ENOSPC, "No space left", f"{settings.run_name}.csv")

    def each_for_itself(settings):
        begun.append(settings.run_name)
        raise FloatingPointError(f"the loss of step {len(begun)} is nan")

    monkeypatch.setattr(train, "train", full)
    assert run(tmp_path, "--seeds", "1-3") == 1
    captured = capsys.readouterr()
    reason = "OSError: [Errno 28] No space left: 'NAME.csv'"
    assert captured.err == f"reproduce.py: error: the first 2 runs failed alike: {reason}\n"
    assert begun == [f"{BASELINE}-seed1", f"{PROPOSED}-seed1"] and "| baseline" not in captured.out
    monkeypatch.setattr(train, "train", each_for_itself)
    assert run(tmp_path, "--seeds", "1-3") == 1 and len(begun) == 2 + 6
    monkeypatch.setattr(train, "train", fake_train)
    assert run(tmp_path, "--seeds", "4") == 0
    capsys.readouterr()
    monkeypatch.setattr(train, "train", full)
    assert run(tmp_path, "--seeds", "1-2", "4") == 1 and len(begun) == 2 + 6 + 4
    assert capsys.readouterr().err.count(" failed: OSError: [Errno 28] No space left") == 4


def test_files_of_another_experiment_are_left_alone(no_training, tmp_path, capsys):
    assert run(tmp_path, "--seeds", "1", "--name", "mine") == 0
    assert run(tmp_path, "--seeds", "1", "--name", "mine", "--momentum", "0.5") == 1
    assert (
        "mine.csv is of other settings: momentum 0.9, here 0.5. Move it away, or give another --name"
        in capsys.readouterr().err
    )
    (tmp_path / "results" / "mine.csv").unlink()
    assert run(tmp_path, "--seeds", "1", "--name", "mine", "--momentum", "0.5") == 1
    assert "momentum was 0.9, now 0.5" in capsys.readouterr().err
    assert run(tmp_path, "--seeds", "1", "--momentum", "0.5") == 0


def test_table_is_kept_where_less_would_replace_it(no_training, tmp_path, capsys):
    assert run(tmp_path, "--seeds", "1-2") == 0
    tables = [tmp_path / "results" / f"{EXPERIMENT}{end}" for end in (".csv", ".md", "-command.txt")]
    before = [file.read_bytes() for file in tables]
    capsys.readouterr()
    assert run(tmp_path, "--seeds", "1", "--report") == 0
    less = "keeps its table, which has more runs (2 of baseline, 2 of proposed): ask for these too"
    assert less in capsys.readouterr().out
    assert run(tmp_path, "--seeds", "1-3", "--settings", "baseline", "init") == 0
    assert "keeps its table, which has more runs (2 of proposed): ask for these too" in capsys.readouterr().out
    assert run(tmp_path, "--seeds", "8-9", "--report") == 1
    assert "has no finished run of this experiment" in capsys.readouterr().err
    assert [file.read_bytes() for file in tables] == before
    assert run(tmp_path, "--seeds", "1", "--restart") == 0
    assert [file.read_bytes() for file in tables] != before


def test_table_written_in_the_meantime_is_kept(no_training, tmp_path, monkeypatch, capsys):
    """Another command is done while this one makes its runs."""
    make, others = reproduce.make_runs, []

    def make_runs(*arguments, **options):
        monkeypatch.setattr(reproduce, "make_runs", make)
        others.append(run(tmp_path, "--seeds", "1-2"))
        yield from make(*arguments, **options)

    monkeypatch.setattr(reproduce, "make_runs", make_runs)
    assert run(tmp_path, "--seeds", "1", "--settings", "baseline", "init") == 0 and others == [0]
    assert "keeps its table, which has more runs (2 of baseline, 2 of proposed)" in capsys.readouterr().out


def test_table_of_other_values_under_the_same_name_is_kept(no_training, tmp_path, capsys):
    assert run(tmp_path, "--seeds", "1", "--settings", "mine:bn_weight=0.2") == 0
    assert run(tmp_path, "--seeds", "1", "--settings", "mine:bn_weight=0.3") == 0
    assert "keeps its table, which has more runs (1 of mine)" in capsys.readouterr().out
    assert run(tmp_path, "--seeds", "1", "--settings", "mine:bn_weight=0.3", "same:bn_weight=0.2") == 0
    assert "keeps its table" not in capsys.readouterr().out


def test_table_does_not_replace_a_run(no_training, tmp_path, capsys):
    fake_train(run_settings.parse([*FLAGS, "--path", str(tmp_path), "--name", "exp"]))
    before = (tmp_path / "results" / "exp.csv").read_bytes()
    capsys.readouterr()
    assert run(tmp_path, "--seeds", "1", "--name", "exp") == 1
    error = capsys.readouterr().err
    assert "exp.csv is not the table of an experiment: move it away, or give another --name" in error
    assert (tmp_path / "results" / "exp.csv").read_bytes() == before
    assert not list((tmp_path / "results").glob("*seed*"))


def test_restart_removes_nothing_where_a_run_is_at_work(no_training, tmp_path, monkeypatch, capsys):
    """It has one lock at a time: a process may not have as many files open as there are runs."""
    locked, most = [], []

    @contextmanager
    def counted_lock(files):
        with lock_run(files):
            locked.append(files)
            most.append(len(locked))
            yield
            locked.remove(files)

    monkeypatch.setattr(outcomes, "lock_run", counted_lock)
    assert run(tmp_path, "--seeds", "1-2") == 0
    files = {file: file.read_bytes() for file in tmp_path.rglob("*seed*") if file.suffix != ".lock"}
    with lock_run(run_files(tmp_path, f"{PROPOSED}-seed2")):
        assert run(tmp_path, "--seeds", "1-2", "--restart") == 3
    assert "a process is at work on the run of" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in files} == files
    assert run(tmp_path, "--seeds", "1", "--restart") == 0
    assert max(most) == 1


def test_changed_result_file(no_training, tmp_path, capsys):
    """Nothing is concluded from it."""
    assert run(tmp_path, "--seeds", "1-2") == 0
    file = tmp_path / "results" / f"{PROPOSED}-seed2.csv"
    file.write_text(re.sub(r"\d(?=\n\Z)", lambda digit: str((int(digit[0]) + 5) % 10), file.read_text()))
    assert run(tmp_path, "--seeds", "1-2", "--report") == 1
    assert f"{file} was changed after it was written" in capsys.readouterr().err


def test_folder_that_can_only_be_read(no_training, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    assert run(tmp_path, "--seeds", "1-2") == 0
    table = capsys.readouterr().out.splitlines()[-14:]
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        patch.setattr(os, "replace", refuse)
        assert run(tmp_path, "--seeds", "1-2") == 0
        done = "4 runs of 2 epochs, 1 at a time; 4 are finished"
        assert capsys.readouterr().out.splitlines() == [f"{done} in {tmp_path}/results", *table]
        summary = tmp_path / "results" / f"{EXPERIMENT}.csv"
        summary.unlink()
        assert run(tmp_path, "--seeds", "1-2") == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1:] == table[:-4]
    assert captured.err == f"reproduce.py: error: [Errno 30] cannot write it: Read-only file system: '{summary}'\n"


def test_report(no_training, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(figures, "save_figures", lambda stem, *_: ([], drawn.append(stem.parent) or []))
    assert run(tmp_path, "--seeds", "1-2") == 0
    committed = tmp_path / "elsewhere"
    (tmp_path / "results").rename(committed)
    capsys.readouterr()
    monkeypatch.setattr(train, "train", None)
    assert run(tmp_path, "--report", str(committed), "--seeds", "1-5") == 0
    assert " of 2 " in capsys.readouterr().out
    assert drawn == [tmp_path / "results", committed]
    (tmp_path / "results").mkdir()
    for flags, kind in (([], ""), (RATES, "tuning ")):
        assert run(tmp_path, *flags, "--report") == 1
        assert f"{tmp_path / 'results'} has no finished {kind}run of this experiment" in capsys.readouterr().err


@contextmanager
def stopped_at_seed(seed: int, monkeypatch) -> Iterator[None]:
    """SIGTERM arrives when the first run with this seed begins, which ends."""
    whole = train.train

    def stopped(settings):
        if settings.seed == seed:
            os.kill(os.getpid(), signal.SIGTERM)
            raise KeyboardInterrupt(signal.SIGTERM)
        return whole(settings)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train", stopped)
        yield


def test_stopped_experiment_goes_on(no_training, tmp_path, monkeypatch, capsys):
    """Another signal does not cost the table: clusters repeat it."""

    def send(_):
        os.kill(os.getpid(), signal.SIGTERM)
        return []

    with stopped_at_seed(2, monkeypatch), monkeypatch.context() as patch:
        patch.setattr(reproduce, "notes_on", send)
        assert run(tmp_path, "--seeds", "1-3") == 143
    captured = capsys.readouterr()
    assert captured.err.startswith("reproduce.py: stopped: run the same")
    assert "| interim: 1 of 3" in captured.out and (tmp_path / "results" / f"{EXPERIMENT}.md").exists()
    assert len(list((tmp_path / "results").glob("*seed*.csv"))) == 2
    assert run(tmp_path, "--seeds", "1-3") == 0
    assert len(list((tmp_path / "results").glob("*seed*.csv"))) == 6
    capsys.readouterr()
    with stopped_at_seed(2, monkeypatch):
        assert run(tmp_path, "--seeds", "1-3", "--restart") == 143
    assert "run the same command again, without --restart" in capsys.readouterr().err
    assert len(list((tmp_path / "results").glob("*seed*.csv"))) == 2  # what was there before is gone
    assert run(tmp_path, "--seeds", "1-3") == 0
    assert capsys.readouterr().out.startswith("6 runs of 2 epochs, 1 at a time; 2 are finished in ")


# --- what is reported -----------------------------------------------------------------------------------------------


def test_contrasts(no_training, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(figures, "save_figures", lambda *of: ([], drawn.extend(c.method for c in of[3]) or []))
    flags = ["--seeds", "1-4", "--settings", "baseline", "proposed", "init", "--contrast", "proposed", "init"]
    assert run(tmp_path, *flags) == 0
    runs = {"baseline": BASELINE, "proposed": PROPOSED, "init": f"{EXPERIMENT}-weight0.1-c1-bn"}
    accuracies = {name: accuracies_in(tmp_path / "results", of, epoch=1) for name, of in runs.items()}
    pairs = {"proposed": "baseline", "init": "baseline", "proposed vs init": "init"}
    assert drawn == ["baseline", "proposed", "init", "proposed vs init"]
    summary = read_summary(tmp_path / "results" / f"{EXPERIMENT}.csv")
    assert summary["compared_with"].dropna().to_dict() == pairs
    p_values = {name: p_value(accuracies[name.split()[0]], accuracies[other]) for name, other in pairs.items()}
    assert summary["p_value"].dropna().to_dict() == pytest.approx(p_values)
    ordered = sorted(p_values.values())
    for name, p in p_values.items():
        holm = min(1, max((3 - j) * q for j, q in enumerate(ordered) if q <= p))
        assert summary.loc[name, "corrected_p_value"] == pytest.approx(holm)
    assert summary["seeds"].sum() == 12
    better = np.subtract(accuracies["proposed"], accuracies["baseline"])
    assert summary.loc["proposed", "effect_size"] == pytest.approx(better.mean() / better.std(ddof=1))
    assert summary.loc["proposed", "sign_flip_p_value"] == 2**-4  # all are better
    text = (tmp_path / "results" / f"{EXPERIMENT}.md").read_text()
    _, contrasts, certainty, short = text.split("\n\n")
    assert short.startswith("runs of 54 steps: batch norm's running statistics")  # 2 epochs of 27
    assert contrasts.splitlines()[2].startswith("| proposed vs init | ")
    assert [line.split("|")[1].strip() for line in certainty.splitlines()[2:]] == list(pairs)
    assert max(len(line) for line in text.splitlines() if line.startswith("|")) <= 120
    capsys.readouterr()
    assert run(tmp_path, *flags, "--report") == 0  # reads its own table
    assert capsys.readouterr().out.startswith(f"{text}\nwritten: ")


def test_last_epoch_has_a_table_of_its_own(no_training, tmp_path, capsys):
    assert run(tmp_path, "--seeds", "1-4") == 0
    best = [(tmp_path / "results" / f"{EXPERIMENT}.{kind}").read_bytes() for kind in ("csv", "md")]
    assert run(tmp_path, "--seeds", "1-4", "--report", "--select", "last") == 0
    assert [(tmp_path / "results" / f"{EXPERIMENT}.{kind}").read_bytes() for kind in ("csv", "md")] == best
    summary = read_summary(tmp_path / "results" / f"{EXPERIMENT}-last.csv")
    ours, theirs = (accuracies_in(tmp_path / "results", runs, epoch=2) for runs in (PROPOSED, BASELINE))
    assert summary["mean"].tolist() == pytest.approx([np.mean(theirs), np.mean(ours)])
    assert summary.loc["proposed", "p_value"] == pytest.approx(p_value(ours, theirs))
    note = "The test accuracies are those of the last epoch.\n"
    assert (tmp_path / "results" / f"{EXPERIMENT}-last.md").read_text().endswith(note)
    assert note not in best[1].decode()
    assert "# select: last\n" in (tmp_path / "results" / f"{EXPERIMENT}-last.csv").read_text()
    capsys.readouterr()
    assert run(tmp_path, "--seeds", "5", "--select", "last") == 0
    accuracy = read_results(tmp_path / "results" / f"{BASELINE}-seed5.csv").columns["test_accuracy"][1]
    assert f"{BASELINE}-seed5 test accuracy {accuracy:.3f} %" in capsys.readouterr().out


# --- learning rates to choose from ----------------------------------------------------------------------------------


RATES = ("--learning_rates", "0.4", "0.01", "0.1", "--tuning_seeds", "16-17")
TUNED = f"{EXPERIMENT}-learning_rates=0.01+0.1+0.4"
CHOSEN_BASELINE = f"{EXPERIMENT}-learning_rate=0.4-weight1-c1-dataset"
CHOSEN_PROPOSED = f"{EXPERIMENT}-learning_rate=0.01-weight0.1-c100-bn"


def test_every_method_is_compared_at_its_own_rate(no_training, tmp_path, capsys):
    assert run(tmp_path, "--seeds", "1-4", *RATES) == 0
    folder = tmp_path / "results"
    made = {file.name for file in folder.glob("*-seed[1-4].csv")}
    assert made == {f"{name}-seed{n}.csv" for name in (CHOSEN_BASELINE, CHOSEN_PROPOSED) for n in range(1, 5)}
    assert len(list(folder.glob("*-seed1[67].csv"))) == 12
    summary = read_summary(folder / f"{TUNED}.csv")
    assert summary["learning_rate"].to_dict() == {"baseline": 0.4, "proposed": 0.01}  # the smaller one on a tie
    for bn_weight, method in ((1.0, "baseline"), (0.1, "proposed")):
        for rate in (0.01, 0.1, 0.4):
            mean = VAL_ACCURACIES[bn_weight, rate] + 0.5
            assert summary.loc[method, f"val_accuracy_at_{rate}"] == mean
            remark = "chosen" if summary.loc[method, "learning_rate"] == rate else ""
            row = rf"\| {method} \| {rate} +\| 2 +\| {mean:.2f} +\| {remark} +\|\n"
            assert re.search(row, (folder / f"{TUNED}.md").read_text())
    ours, theirs = accuracies_in(folder, CHOSEN_PROPOSED, epoch=1), accuracies_in(folder, CHOSEN_BASELINE, epoch=1)
    assert summary.loc["proposed", "p_value"] == pytest.approx(p_value(ours, theirs))
    assert "over the seeds 16, 17; a tie goes" in (folder / f"{TUNED}.md").read_text()
    assert "# learning_rates: 0.01+0.1+0.4\n# tuning_seeds: 16 17\n" in (folder / f"{TUNED}.csv").read_text()
    assert not (folder / f"{EXPERIMENT}.csv").exists()
    shown = capsys.readouterr().out
    assert "1/12 " in shown and "1/8 " in shown and max(map(len, shown.split("\n\n")[3].splitlines())) <= 120
    assert not re.search(r"seed1[67] test accuracy", shown)  # they have no part in the choice


def test_stopped_tuning_goes_on(no_training, tmp_path, monkeypatch, capsys):
    with stopped_at_seed(17, monkeypatch):
        assert run(tmp_path, "--seeds", "1-2", *RATES) == 143
    captured = capsys.readouterr()
    assert captured.err.startswith("reproduce.py: stopped:")
    assert "The learning rates are not chosen yet: 6 of 12 tuning runs are left.\n" in captured.out
    assert "| chosen" not in captured.out and "test accuracy" not in captured.out
    assert len(list((tmp_path / "results").glob("*.csv"))) == 6
    assert run(tmp_path, "--seeds", "1-2", *RATES, "--report") == 0
    assert "6 of 12 tuning runs are left" in capsys.readouterr().out
    assert run(tmp_path, "--seeds", "1-2", *RATES) == 0
    assert capsys.readouterr().out.startswith("12 tuning runs of 2 epochs, 1 at a time; 6 are finished in ")


def test_signal_at_the_end_of_the_tuning_leaves_the_other_runs_alone(no_training, tmp_path, monkeypatch, capsys):
    assert run(tmp_path, "--seeds", "1-2", *RATES) == 0
    chosen = {file: file.stat().st_mtime_ns for file in (tmp_path / "results").glob("*-seed[12].csv")}

    def stopped_after_the_last(settings):
        if (settings.seed, settings.learning_rate, settings.bn_weight) == (17, 0.4, 0.1):
            os.kill(os.getpid(), signal.SIGTERM)
        return fake_train(settings)

    monkeypatch.setattr(train, "train", stopped_after_the_last)
    assert run(tmp_path, "--seeds", "1-2", *RATES, "--restart") == 143
    assert "run the same command again, without --restart" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in chosen} == chosen


def test_commands_of_a_tuned_experiment(no_training, tmp_path, monkeypatch, capsys):
    flags = ["--seeds", "1-2", *RATES]
    assert run(tmp_path, *flags, "--list") == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == captured.out.count("python train.py") == 12
    assert captured.err == "reproduce.py: The learning rates are not chosen yet: 12 of 12 tuning runs are left.\n"
    for line in captured.out.splitlines():
        fake_train(run_settings.parse(shlex.split(line)[2:]))
    assert run(tmp_path, *flags, "--list") == 0
    captured = capsys.readouterr()
    assert (captured.out.count("\n"), captured.err) == (16, "")
    names = [run_settings.parse(shlex.split(line)[2:]).run_name for line in captured.out.splitlines()[12:]]
    assert names == [f"{name}-seed{n}" for n in (1, 2) for name in (CHOSEN_BASELINE, CHOSEN_PROPOSED)]


def diverging(settings: Settings) -> Results:
    """The runs of the baseline's best rate diverge with seed 17."""
    if (settings.bn_weight, settings.learning_rate, settings.seed) == (1.0, 0.4, 17):
        raise FloatingPointError("the loss at epoch 1, step 2 is nan")
    return fake_train(settings)


def test_diverged_tuning_run_counts_as_nothing(no_training, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "train", diverging)
    assert run(tmp_path, "--seeds", "1-2", *RATES) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "seed17 counts as 0 %: FloatingPointError: the loss at epoch 1, step 2 is nan (about " in captured.out
    text = (tmp_path / "results" / f"{TUNED}.md").read_text()
    assert re.search(r"\| baseline \| 0.4 +\| 2 +\| 36.00 +\| 1 diverged +\|", text)  # of 72 and 0
    assert "A tuning run that diverged counts as 0 %." in text
    summary = read_summary(tmp_path / "results" / f"{TUNED}.csv")
    assert summary["learning_rate"].to_dict() == {"baseline": 0.1, "proposed": 0.01}
    monkeypatch.setattr(train, "train", None)  # it is known now, elsewhere too
    (tmp_path / "results").rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert run(tmp_path, "--seeds", "1-2", *RATES, "--report", str(tmp_path / "elsewhere")) == 0
    assert capsys.readouterr().out.startswith(f"{text}\nwritten: ")
    (tmp_path / "elsewhere").rename(tmp_path / "results")
    monkeypatch.setattr(train, "train", fake_train)
    assert run(tmp_path, "--seeds", "1-2", *RATES, "--restart") == 0
    assert read_summary(tmp_path / "results" / f"{TUNED}.csv").loc["baseline", "learning_rate"] == 0.4
    assert not list((tmp_path / "results").glob("*diverged*"))


def test_nothing_is_chosen_where_a_tuning_run_fails(no_training, tmp_path, monkeypatch, capsys):
    def fails(settings):
        if (settings.learning_rate, settings.seed) == (0.1, 17):
            raise OSError("no space left")
        return fake_train(settings)

    monkeypatch.setattr(train, "train", fails)
    assert run(tmp_path, "--seeds", "1-2", *RATES) == 1
    captured = capsys.readouterr()
    assert "The learning rates are not chosen yet: 2 of 12 tuning runs are left.\n" in captured.out
    assert captured.err.count("failed: OSError: no space left") == 2
    assert not list((tmp_path / "results").glob("*-seed[12].csv"))


# --- experiments in a folder -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["--settings", "init", "other:c=50", "--contrast", "other", "init", "--seeds=1", "--select", "last"],
        ["--seeds", "1-2", *RATES, "--name", "mine", "--no_flip"],
    ],
    ids=" ".join,
)
def test_folder_of_one_experiment(flags, no_training, tmp_path, capsys):
    """Its command is that of the experiment, without what says where and how the runs are made."""
    how = ["--jobs=1", "--checkpoint_seconds", "5", "--tensorboard", "--scheduler", "none"]
    assert run(tmp_path, *how, *flags) == 0
    results = tmp_path / "results"
    [text] = [file.read_text() for file in results.glob("*.md")]
    assert capsys.readouterr().out.endswith("-command.txt\n")
    reproduce.main(["--report", str(results)])
    command, report = capsys.readouterr().out.split("\n", 1)
    given = ["python", "reproduce.py", *FLAGS, "--scheduler", "none", *flags, "--report", str(results)]
    assert shlex.split(command) == given
    assert report.startswith(text)


def test_folder_of_several_experiments(no_training, tmp_path, monkeypatch, capsys):
    """One is finished; of two, a run is finished and the command was killed. Another text says nothing."""
    results, problems = tmp_path / "results", []
    for _ in range(2):
        with pytest.raises(SystemExit):
            reproduce.main(["--report", str(results)])
        problems.append(capsys.readouterr().err)
        results.mkdir(exist_ok=True)
    assert problems == [
        f"reproduce.py: error: argument --report: there is no folder {results}\n",
        f"reproduce.py: error: {results} has no command of an experiment: give its flags\n",
    ]
    assert run(tmp_path, "--seeds", "1-2") == 0
    assert run(tmp_path, "--seeds", "1") == 0  # of which there is more
    monkeypatch.setattr(display.Display, "end", Mock(side_effect=OSError))
    for flags in (["--name", "mine", "--seeds", "1-3,7"], RATES):
        assert run(tmp_path, *flags) == 1
    (results / "notes.txt").write_text("python reproduce.py doesn't")
    capsys.readouterr()
    reproduce.main(["--report", str(results)])
    lines = capsys.readouterr().out.splitlines()
    end = f" --report {results}"
    common = "python reproduce.py " + shlex.join(FLAGS)
    assert lines == [
        f"{EXPERIMENT}: baseline, proposed; seeds 1-2; 4 of 4 runs are finished",
        f"{common} --seeds 1-2{end}",
        "",
        f"{TUNED}: baseline, proposed; seeds 1-15; 1 of 12 tuning runs are finished",
        f"{common} {shlex.join(RATES)}{end}",
        "",
        "mine: baseline, proposed; seeds 1-3 7; 1 of 8 runs are finished",
        f"{common} --name mine --seeds 1-3,7{end}",
        "",
    ]
    (file := results / "empty-command.txt").touch()
    with pytest.raises(SystemExit):
        reproduce.main(["--report", str(results)])
    assert f"error: {file} is damaged: remove it" in capsys.readouterr().err


# --- signals and terminals -------------------------------------------------------------------------------------------


def test_time_left(tmp_path, monkeypatch, capsys):
    """In 60 seconds, two epochs are made; of one run, there was an epoch before."""
    now = 0.0
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=lambda: now))
    (tmp_path / "results").mkdir()
    a, b, *_ = planned = parse([*FLAGS, "--path", str(tmp_path), "--seeds", "1-2"]).runs

    def write_epochs(run: PlannedRun, number: int) -> None:
        rows = ["# seed: 1", "epoch,train_loss", *(f"{epoch},0.5" for epoch in range(1, number + 1)), "3,0"]
        run_files(tmp_path, run.settings.run_name).results.write_text("\n".join(rows))  # the last one is not whole

    write_epochs(b, 1)
    shown = display.Display({run.settings.run_name: run for run in planned}, 2, [])
    shown.show([a.settings, b.settings])
    write_epochs(a, 2)
    now = 60.0
    shown.end(a.settings.run_name, "has ended", [], failed=False)
    assert capsys.readouterr().out.endswith("3/6 has ended (about 02:30 left)\n")  # 60 s · 5 / 2


def test_terminal_shows_all_that_moves(no_training, tmp_path, monkeypatch, capsys):
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    shown = b""

    def shows(words: str) -> bool:
        return words.encode() in shown

    def train_by_epochs(settings: Settings) -> Results:
        method = "proposed" if settings.bn_weight < 1 else "baseline"
        wait_until(lambda: shows(f"{method}, seed {settings.seed}: epoch 1/2"))
        file = run_files(settings.path, settings.run_name).results
        file.parent.mkdir(exist_ok=True)
        file.write_text("epoch\n1,0.5\n")
        wait_until(lambda: shows(f"{method}, seed {settings.seed}: epoch 2/2"))
        return fake_train(settings)

    monkeypatch.setattr(train, "train", train_by_epochs)
    main, child = pty.openpty()
    fcntl.ioctl(main, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    def read() -> None:  # as long as something is shown: a terminal holds little that is not read
        nonlocal shown
        with suppress(OSError):  # the other end is closed
            while piece := os.read(main, 10_000):
                shown += piece

    reader = threading.Thread(target=read)
    reader.start()
    with monkeypatch.context() as patch, open(child, "w") as terminal:
        patch.setattr(sys, "stderr", terminal)
        assert run(tmp_path, "--seeds", "1-2") == 0
    reader.join()
    os.close(main)
    text = shown.decode()
    assert re.search(r" 62%.*2/4 \[\d\d:\d\d, about \d\d:\d\d left\]", text)  # two runs and a half
    assert re.search(r"\r\d\d:\d\d baseline, seed 1: epoch 1/2", text)
    header = r"\| setting  \| seeds \| accuracy \(%\) \| difference \| p +\| p \(Holm\) \|"
    assert re.search(header, text) and "| proposed | 1 " in text
    assert "/results\n| setting " in capsys.readouterr().out  # nothing but the table at the end
