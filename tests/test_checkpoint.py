import errno
import fcntl
import hashlib
import io
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import train
from cluster import ENVIRONMENT
from command_line.signals import interrupt, on_signals
from kill_and_restart import FLAGS, finish, outcome, processes, same, start
from saved_runs import checkpoint, circumstances
from saved_runs import run as saved_run
from saved_runs.checkpoint import load_checkpoint, save_run
from saved_runs.lock import lock_run
from saved_runs.paths import run_files
from saved_runs.results import COLUMNS, Results, read_results, write_results
from saved_runs.run import Run
from seeds import make_deterministic, random_states
from small import stop_in_epoch
from trained_networks import load_weights
from training import preparation

UNSHARE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]  # a shell with mounts of its own


@pytest.fixture(autouse=True)
def fast(small_network):
    """What is tested here does not depend on the size of the network."""


@pytest.fixture(scope="session")
def alone(tmp_path_factory) -> Path:
    """A run that nobody has disturbed."""
    path = tmp_path_factory.mktemp("alone")
    assert finish(path, small=True) == 0
    return path


def run(path: Path, *flags: str):
    """The same run in this process."""
    return train.main([*FLAGS, "--path", str(path), *flags])


@pytest.fixture
def fails(capsys) -> Callable[..., str]:
    """A function like `run`, for a run that ends with exit code 1 and one line, which it returns."""

    def run_that_fails(path: Path, *flags: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(path, *flags)
        assert stop.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith("train.py: error: ") and error.count("\n") == 1
        return error

    return run_that_fails


def run_into_stop(epoch: int, monkeypatch, path: Path, *flags: str) -> None:
    """A run in this process that stops within an epoch; further ones do not."""
    with monkeypatch.context() as patch:
        stop_in_epoch(epoch, patch)
        with pytest.raises(SystemExit):
            run(path, *flags)


def run_killed_before_its_checkpoint_goes(monkeypatch, path: Path, *flags: str) -> Results:
    """A finished run that has left its checkpoint, as older versions did."""
    unlink = Path.unlink

    def kept(file: Path, **options: bool) -> None:
        if not file.name.endswith("-last.pt"):
            unlink(file, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", kept)
        return run(path, *flags)


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cos", "none"])  # the latter keeps its checkpoint
@pytest.mark.parametrize("checkpoint_seconds", ["0", "1e9"])
def test_stopped_and_continued_run_is_the_same_to_the_last_bit(
    tmp_path, monkeypatch, capsys, checkpoint_seconds, schedule
):
    flags = ["--scheduler", schedule]
    run(tmp_path / "alone", *flags)
    for epoch in (2, 4):
        with monkeypatch.context() as patch:
            stop_in_epoch(epoch, patch)
            with pytest.raises(SystemExit) as stop:
                run(tmp_path, *flags, "--checkpoint_seconds", checkpoint_seconds)
        assert stop.value.code == 130
        assert read_results(tmp_path / "results" / "x.csv").columns["epoch"].tolist() == list(range(1, epoch))
        make_deterministic(99)  # the next process does not know where the generators were
    capsys.readouterr()
    run(tmp_path, *flags)
    assert capsys.readouterr().out.splitlines()[1] == "x resumes at epoch 4 of 4"
    assert same(outcome(tmp_path), outcome(tmp_path / "alone"))
    assert (tmp_path / "networks" / "x-last.pt").exists() == (schedule == "none")


def test_stopped_run_in_bfloat16(tmp_path, monkeypatch):
    flags = ["--precision", "bfloat16", "--scheduler", "none"]
    run(tmp_path / "alone", *flags)
    run_into_stop(3, monkeypatch, tmp_path / "stopped", *flags)
    run(tmp_path / "stopped", *flags)
    assert same(outcome(tmp_path / "stopped"), outcome(tmp_path / "alone"))


@pytest.mark.parametrize(
    ("checkpoint_seconds", "deaths"),
    [
        ("0", [(1, "after replace"), (4, "half written")]),
        ("0", [(2, "before replace"), (3, "before fsync"), (3, "after replace")]),
        ("1e9", [(6, "after replace"), (1, "after replace"), (1, "before replace"), (1, "after replace")]),
    ],
    ids=["checkpoint", "all files", "last save"],
)
def test_killed_within_a_write(alone, tmp_path, checkpoint_seconds, deaths):
    for death in deaths:
        killed = finish(tmp_path, "--checkpoint_seconds", checkpoint_seconds, small=True, death=death)
        assert killed == -signal.SIGKILL
    assert finish(tmp_path, small=True) == 0
    assert same(outcome(tmp_path), outcome(alone))
    assert not list(tmp_path.rglob("*.tmp"))


MANY = ["--num_epochs", "100", "--checkpoint_seconds", "0.1"]


@pytest.fixture(scope="session")
def many_alone(tmp_path_factory) -> Path:
    """A longer run that nobody has disturbed."""
    path = tmp_path_factory.mktemp("many alone")
    assert finish(path, *MANY, small=True) == 0
    return path


def signal_in_epoch(path: Path, epoch: int, number: int, *flags: str) -> int:
    """Send a signal to a run of many epochs some time after it has reported `epoch`; returns its exit code."""
    output = path / "output"
    output.unlink(missing_ok=True)
    child = start(path, *MANY, *flags, small=True)
    while f"epoch {epoch}/100" not in (output.read_text() if output.exists() else ""):
        assert child.is_alive()
        time.sleep(0.001)
    os.kill(child.pid, number)
    child.join()
    return child.exitcode


def test_killed_at_any_moment(many_alone, tmp_path):
    for epoch in (1, 30, 70):
        assert signal_in_epoch(tmp_path, epoch, signal.SIGKILL) == -signal.SIGKILL
    assert finish(tmp_path, *MANY, small=True) == 0
    assert same(outcome(tmp_path), outcome(many_alone))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_say_how_to_go_on(many_alone, tmp_path, number, code):
    assert signal_in_epoch(tmp_path, 3, number, "--checkpoint_seconds", "1e9") == code
    *lines, last = (tmp_path / "output").read_text().splitlines()
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert last.startswith("train.py: stopped; ") and "same command again" in last
    saved = len(outcome(tmp_path)["columns"]["epoch"])
    assert saved == len(epochs)

    assert finish(tmp_path, *MANY, small=True) == 0
    assert f"x resumes at epoch {saved + 1} of 100" in (tmp_path / "output").read_text()
    assert same(outcome(tmp_path), outcome(many_alone))


def test_stop_during_the_last_save(many_alone, small_network, tmp_path, monkeypatch):
    """The signal comes while the end of the run is being saved, which then goes on to its end."""
    save_run = checkpoint.save_run

    def interrupted_save(files, state):
        if len(state["columns"]["epoch"]) == 100:
            os.kill(os.getpid(), signal.SIGTERM)
        save_run(files, state)

    monkeypatch.setattr(saved_run, "save_run", interrupted_save)
    run(tmp_path, *MANY, "--checkpoint_seconds", "1e9")
    assert same(outcome(tmp_path), outcome(many_alone))


def test_sigterm_again_while_saving_changes_nothing(tmp_path, monkeypatch):
    stops = []
    with on_signals(stops.append):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
    assert stops == [signal.SIGTERM]


def test_restarted_run_that_is_stopped_before_it_has_replaced_the_old_one(tmp_path, monkeypatch, capsys):
    run(tmp_path, "--num_epochs", "1")
    stop_in_epoch(1, monkeypatch)
    with pytest.raises(SystemExit):
        run(tmp_path, "--num_epochs", "1", "--restart")
    assert "run the same command again to resume" in capsys.readouterr().err


def test_stopped_run_with_restart_says_how_to_go_on(tmp_path, capsys):
    """Giving the same command once more would start over."""
    assert signal_in_epoch(tmp_path, 3, signal.SIGTERM, "--restart") == 143
    assert "the same command without --restart to resume" in (tmp_path / "output").read_text()


def test_result_file_is_there_between_checkpoints(tmp_path):
    assert signal_in_epoch(tmp_path, 10, signal.SIGKILL, "--checkpoint_seconds", "1e9") == -signal.SIGKILL
    assert len(load_checkpoint(tmp_path / "networks" / "x-last.pt")["columns"]["epoch"]) == 1
    assert len(read_results(tmp_path / "results" / "x.csv").columns["epoch"]) >= 10


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """A clock of one element by which every epoch takes a second."""
    now = [100.0]
    whole_epoch = train.train_one_epoch

    def epoch_of_a_second(*arguments):
        now[0] += 1
        return whole_epoch(*arguments)

    monkeypatch.setattr(saved_run.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train, "train_one_epoch", epoch_of_a_second)
    return now


def test_seconds_between_checkpoints(tmp_path, monkeypatch, now):
    saved = []
    save_run = checkpoint.save_run

    def noted_save(files, state):
        saved.append(state["columns"]["epoch"][-1])
        save_run(files, state)

    monkeypatch.setattr(saved_run, "save_run", noted_save)
    results = run(tmp_path, "--num_epochs", "9", "--checkpoint_seconds", "2.5")
    assert saved == [1, 4, 7, 9]
    assert results.header["seconds"] == 9


def test_result_file_is_finished_only_after_the_weights(tmp_path, monkeypatch):
    """Whoever finds a finished result file finds the weights that belong to it."""
    before = []
    save_run = checkpoint.save_run

    def noted_save(files, state):
        before.append(len(read_results(files.results).columns["epoch"]) if files.results.exists() else 0)
        save_run(files, state)

    monkeypatch.setattr(saved_run, "save_run", noted_save)
    run(tmp_path, "--num_epochs", "3", "--checkpoint_seconds", "1e9")
    assert before == [0, 2]


def test_seconds_add_up_over_restarts(tmp_path, monkeypatch, now):
    run_into_stop(3, monkeypatch, tmp_path)
    now[0] += 1000
    assert run(tmp_path).settings["seconds"] == 4


@pytest.mark.parametrize("file", ["networks/x-best.pt", "results/x.csv"])
def test_killed_after_the_last_checkpoint(alone, tmp_path, monkeypatch, file):
    """What the last save could not write any more is mended, and nothing is trained again."""
    run_into_stop(3, monkeypatch, tmp_path)
    before_the_save = (tmp_path / file).read_bytes()
    run_killed_before_its_checkpoint_goes(monkeypatch, tmp_path)
    (tmp_path / file).write_bytes(before_the_save)
    assert not same(outcome(tmp_path), outcome(alone))
    monkeypatch.setattr(train, "train_one_epoch", None)
    run(tmp_path)
    assert same(outcome(tmp_path), outcome(alone))


def interrupt_twice() -> None:
    """What a child process does: press Ctrl-C, and once more while the first is being dealt with."""
    with on_signals(interrupt):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)


def test_second_ctrl_c_ends_at_once():
    child = processes.Process(target=interrupt_twice)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGINT


def test_handlers_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run(tmp_path, "--num_epochs", "1")
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


# --- the same command again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cos", "none"])
def test_finished_run_trains_nothing(tmp_path, monkeypatch, capsys, schedule):
    flags = ["--num_epochs", "2", "--scheduler", schedule]
    first = run(tmp_path, *flags)
    last_line = capsys.readouterr().out.splitlines()[-1]
    before = outcome(tmp_path)
    monkeypatch.setattr(train, "train_one_epoch", None)
    monkeypatch.setattr(os, "replace", None)  # as on a full disk, or one that can only be read
    again = run(tmp_path, *flags)
    assert capsys.readouterr().out.splitlines() == ["x is finished already", last_line]
    assert again.header == first.header
    assert same(outcome(tmp_path), before)


def test_files_of_a_finished_run_that_are_lost(tmp_path, capsys):
    run(tmp_path, "--num_epochs", "2")
    before = outcome(tmp_path)
    (tmp_path / "results" / "x.csv").unlink()
    run(tmp_path, "--num_epochs", "2")
    assert same(outcome(tmp_path), before)
    (tmp_path / "networks" / "x-best.pt").unlink()
    capsys.readouterr()
    run(tmp_path, "--num_epochs", "2")
    captured = capsys.readouterr().out
    assert captured.startswith("x is finished already\n") and "weights" not in captured
    run(tmp_path, "--num_epochs", "2", "--restart")
    assert same(outcome(tmp_path), before)


def test_more_epochs(tmp_path, capsys, fails):
    run(tmp_path / "cos", "--num_epochs", "2")
    line = fails(tmp_path / "cos", "--num_epochs", "3")
    assert "num_epochs was 2, now 3" in line and "cosine schedule" in line

    constant = ["--scheduler", "none"]
    run(tmp_path / "constant", "--num_epochs", "2", *constant)
    capsys.readouterr()
    run(tmp_path / "constant", "--num_epochs", "4", *constant)
    assert capsys.readouterr().out.splitlines()[1] == "x resumes at epoch 3 of 4"
    assert "it has 4 epochs already" in fails(tmp_path / "constant", "--num_epochs", "3", *constant)
    run(tmp_path / "at once", "--num_epochs", "4", *constant)
    assert same(outcome(tmp_path / "constant"), outcome(tmp_path / "at once"))


def test_other_settings_are_listed(tmp_path, fails):
    run(tmp_path, "--num_epochs", "1")
    before = outcome(tmp_path)
    line = fails(tmp_path, "--num_epochs", "1", "--seed", "2", "--c", "10", "--batch_size", "24")
    assert "batch_size was 48, now 24; c was 100.0, now 10.0; seed was 1, now 2." in line
    assert "--restart" in line and "--name" in line
    assert same(outcome(tmp_path), before)
    run(tmp_path, "--num_epochs", "1", "--checkpoint_seconds", "7")  # which may differ


def test_every_setting_that_differs_is_listed(tmp_path, fails):
    run(tmp_path, "--num_epochs", "1")
    line = fails(tmp_path, "--num_epochs", "2", "--scheduler", "none")
    assert "num_epochs was 1, now 2; scheduler was cos, now none" in line


def test_files_of_before_a_flag(alone, tmp_path, monkeypatch, fails):
    """What they lack was at its default."""
    run_into_stop(3, monkeypatch, tmp_path)
    files = run_files(tmp_path, "x")
    state = load_checkpoint(files.checkpoint)
    del state["settings"]["split_seed"]
    save_run(files, state)
    assert "split_seed was 0, now 5." in fails(tmp_path, "--split_seed", "5")
    run(tmp_path)
    assert same(outcome(tmp_path), outcome(alone))

    results = read_results(files.results)
    del results.header["split_seed"]
    write_results(files.results, results)
    assert "split_seed was 0, now seed." in fails(tmp_path, "--split_seed", "seed")
    monkeypatch.setattr(train, "train_one_epoch", None)
    run(tmp_path)


def test_restart_replaces_the_old_run_after_its_first_epoch(tmp_path, monkeypatch):
    run(tmp_path, "--num_epochs", "2")
    before = outcome(tmp_path)
    other = ["--num_epochs", "2", "--seed", "2"]
    run_into_stop(1, monkeypatch, tmp_path, *other, "--restart")
    assert same(outcome(tmp_path), before)

    run_into_stop(2, monkeypatch, tmp_path, *other, "--restart")
    results = run(tmp_path, *other)
    assert results.header["seed"] == 2
    run(tmp_path / "new", *other)
    assert same(outcome(tmp_path), outcome(tmp_path / "new"))


@pytest.mark.parametrize("other", [[], ["--seed", "2"]], ids=["same settings", "other settings"])
def test_restart_that_dies_while_its_first_epoch_is_saved(tmp_path, monkeypatch, other):
    """The old run's finished result file must not be taken for the new run's."""
    run(tmp_path, "--num_epochs", "2")
    before = (tmp_path / "results" / "x.csv").read_bytes()

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_results", die)
        with pytest.raises(RuntimeError, match="no signal has arrived"):
            run(tmp_path, "--num_epochs", "2", *other, "--restart")
    made = []
    whole = train.train_one_epoch
    monkeypatch.setattr(train, "train_one_epoch", lambda *arguments: made.append(1) or whole(*arguments))
    results = run(tmp_path, "--num_epochs", "2", *other)
    assert len(made) == 1  # the second epoch
    assert results.header["seed"] == (2 if other else 1) and before
    run(tmp_path / "alone", "--num_epochs", "2", *other)
    assert same(outcome(tmp_path), outcome(tmp_path / "alone"))


def test_finished_run_does_not_need_its_checkpoint(tmp_path, monkeypatch, capsys, fails):
    run(tmp_path, "--num_epochs", "2")
    (tmp_path / "networks" / "x-last.pt").write_bytes(b"damaged")
    monkeypatch.setattr(train, "train_one_epoch", None)
    capsys.readouterr()
    run(tmp_path, "--num_epochs", "2")
    assert capsys.readouterr().out.startswith("x is finished already\n")
    (tmp_path / "results" / "x.csv").unlink()
    assert "x-last.pt is cut short, damaged" in fails(tmp_path, "--num_epochs", "2")


@pytest.mark.parametrize("checksum", [True, False], ids=["", "an older file, without a checksum"])
def test_changed_result_file_beside_its_checkpoint(tmp_path, monkeypatch, checksum):
    """The checkpoint knows better."""
    numbers = run_killed_before_its_checkpoint_goes(monkeypatch, tmp_path, "--num_epochs", "2").columns
    file = tmp_path / "results" / "x.csv"
    before = file.read_text()
    lines = before.splitlines(keepends=True)
    lines[-1] = re.sub(r"\d(?=\n)", lambda digit: str((int(digit[0]) + 5) % 10), lines[-1])
    file.write_text("".join(line for line in lines if checksum or "sha256" not in line))
    assert file.read_text() != before
    monkeypatch.setattr(train, "train_one_epoch", None)
    assert same(run(tmp_path, "--num_epochs", "2").columns, numbers)
    assert file.read_text() == before


def test_changed_result_file_without_its_checkpoint(tmp_path, fails):
    run(tmp_path, "--num_epochs", "2")
    file = tmp_path / "results" / "x.csv"
    changed = file.read_text().replace("# momentum: 0.9\n", "# momentum: 0.8\n")
    file.write_text(changed)
    line = fails(tmp_path, "--num_epochs", "2", "--momentum", "0.8")
    assert "x.csv was changed after it was written" in line and "remove it to start over" in line
    assert file.read_text() == changed


def test_result_file_without_its_checkpoint(tmp_path, monkeypatch, fails):
    run_into_stop(3, monkeypatch, tmp_path)
    (tmp_path / "networks" / "x-last.pt").unlink()
    line = fails(tmp_path)
    assert "x.csv has fewer than 4 epochs, and no " in line and "remove it to start over" in line


def test_finished_result_file_from_another_place(alone, tmp_path, monkeypatch, capsys):
    """The checkpoint that was left here is older, and must not undo it."""
    run_into_stop(3, monkeypatch, tmp_path)
    file = tmp_path / "results" / "x.csv"
    shutil.copy(alone / "results" / "x.csv", file)
    capsys.readouterr()
    run(tmp_path)
    assert capsys.readouterr().out.startswith("x is finished already")
    assert file.read_bytes() == (alone / "results" / "x.csv").read_bytes()


def test_finished_result_file_of_other_settings_beside_a_checkpoint(alone, tmp_path, monkeypatch, fails):
    run_into_stop(3, monkeypatch, tmp_path)
    file = tmp_path / "results" / "x.csv"
    results = read_results(alone / "results" / "x.csv")
    results.header["momentum"] = 0.5
    write_results(file, results)
    before = file.read_bytes()
    assert "momentum was 0.5, now 0.9" in fails(tmp_path)
    assert file.read_bytes() == before


def test_result_file_names_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr(circumstances, "code_version", lambda: "v1-dirty")
    assert run(tmp_path, "--num_epochs", "1", "--scheduler", "none").header["code"] == "v1-dirty"
    assert load_checkpoint(tmp_path / "networks" / "x-last.pt")["settings"]["code"] == "v1-dirty"


def test_code_version_without_a_repository(tmp_path, monkeypatch):
    modules = [tmp_path / name for name in ("saved_runs/circumstances.py", "train.py")]
    modules[0].parent.mkdir()
    for module in modules:
        module.write_text(f"# {module.name}")
    monkeypatch.setattr(circumstances, "__file__", str(modules[0]))
    expected = hashlib.sha256(b"# circumstances.py# train.py").hexdigest()[:12]
    assert circumstances.code_version.__wrapped__() == f"modules {expected}"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    version = circumstances.code_version.__wrapped__()
    assert commit.startswith(version) and len(version) >= 7
    modules[1].write_text("changed")
    assert circumstances.code_version.__wrapped__() == f"{version}-dirty"


def test_state_of_a_gpu_is_resumed_as_that_of_a_cpu(tmp_path):
    """The fused optimizer of a GPU rounds differently on a CPU."""
    networks = [torch.nn.Linear(2, 2) for _ in range(2)]
    optimizers = [
        torch.optim.SGD(network.parameters(), 0.1, 0.9, fused=fused)
        for network, fused in zip(networks, (True, False), strict=True)
    ]
    schedulers = [torch.optim.lr_scheduler.ConstantLR(optimizer) for optimizer in optimizers]
    networks[0](torch.ones(2)).sum().backward()
    optimizers[0].step()
    settings = preparation.parse([*FLAGS, "--path", str(tmp_path)])
    for epoch, parts in enumerate(zip(networks, optimizers, schedulers, strict=True), start=1):
        with Run(settings) as run:
            run.resume(*parts)
            if epoch == 1:
                run.record(epoch, 1.0, 1.0, 50.0, 50.0)
    assert [group["fused"] for group in optimizers[1].param_groups] == [False]
    momenta = [list(optimizer.state_dict()["state"].values()) for optimizer in optimizers]
    assert momenta[0] and same(*momenta)


def test_damaged_result_file_without_its_checkpoint(tmp_path, fails):
    run(tmp_path, "--num_epochs", "1")
    (tmp_path / "results" / "x.csv").write_text("something else\n")
    line = fails(tmp_path, "--num_epochs", "1")
    assert "x.csv is not a result file, or damaged, at line 1: remove it to start over" in line


def test_run_that_goes_on_elsewhere_names_both_places(tmp_path, monkeypatch):
    run_into_stop(2, monkeypatch, tmp_path)
    monkeypatch.setattr(circumstances.platform, "machine", lambda: "another machine")
    here, there = (results.header["machine"] for results in (read_results(tmp_path / "results/x.csv"), run(tmp_path)))
    assert there.startswith(f"{here}, then another machine with ")


# --- faults ---------------------------------------------------------------------------------------------------------


def test_two_runs_with_one_name(tmp_path):
    with lock_run(run_files(tmp_path, "x")):
        child = start(tmp_path, small=True)
        child.join()
        assert child.exitcode == 3
        assert "a process is at work on the run of" in (tmp_path / "output").read_text()
        assert finish(tmp_path, "--name", "y", small=True) == 0
    assert finish(tmp_path, small=True) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not inherit locks here")
def test_lock_is_free_although_a_process_of_the_run_still_lives(tmp_path):
    """As one that decodes images, a moment after the run was killed."""
    files, processes = run_files(tmp_path, "x"), multiprocessing.get_context("fork")
    with lock_run(files):
        begun, done = processes.Event(), processes.Event()
        child = processes.Process(target=lambda: begun.set() or done.wait(), daemon=True)
        child.start()
        begun.wait()
    with lock_run(files):
        assert child.is_alive()
    done.set()
    child.join()


def test_file_system_without_locks(tmp_path, monkeypatch, fails):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    number = errno.ENOLCK
    assert "cannot lock it: No locks available: " in fails(tmp_path)
    number = errno.ENOSYS
    with pytest.warns(UserWarning, match="falling back to SoftFileLock"):
        run(tmp_path / "other", "--num_epochs", "1")


def test_folder_that_can_only_be_read(tmp_path):
    """A finished run prints its last line there, and an unfinished one says in one line what it cannot write."""
    script = "mkdir -p it && mount --bind it it && mount -o remount,bind,ro it"
    if shutil.which("unshare") is None or subprocess.run([*UNSHARE, script], cwd=tmp_path).returncode:
        pytest.skip("this system lets nobody mount a file system of his own")
    first = run(tmp_path / "it", "--num_epochs", "1")
    (tmp_path / "run.py").write_text(
        "import sys, small, train\nsmall.train_small()\n"
        "*flags, finished, other = sys.argv[1:]\ntrain.main([*flags, finished])\ntrain.main([*flags, other])\n"
    )
    command = f"{sys.executable} run.py {' '.join(FLAGS)} --num_epochs 1 --path it --name"
    options = {"cwd": tmp_path, "env": ENVIRONMENT, "capture_output": True, "text": True}
    done = subprocess.run([*UNSHARE, f"{script}; {command} x y"], **options)
    assert done.returncode == 1
    assert f"test accuracy {first.test_accuracy:.3f} %" in done.stdout.splitlines()[-1]
    assert re.fullmatch(r"train.py: error: .*Read-only file system: 'it/networks/y.lock'\n", done.stderr)


@pytest.mark.parametrize("file", ["networks/x-last.pt", "networks/x-best.pt", "results/x.csv"])
def test_full_disk(alone, tmp_path, monkeypatch, fails, file):
    """From the second epoch on there is no room for one of the three files."""
    replace = os.replace

    def full(temporary: Path, target: Path) -> None:
        if target == tmp_path / file and target.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(temporary, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        line = fails(tmp_path, "--checkpoint_seconds", "0")
    assert "No space left on device" in line and str(tmp_path / file) in line
    assert not list(tmp_path.rglob("*.tmp"))
    read_results(tmp_path / "results" / "x.csv")
    torch.load(tmp_path / "networks" / "x-best.pt", weights_only=True)
    run(tmp_path)
    assert same(outcome(tmp_path), outcome(alone))


FILL_THE_DISK_IN_EPOCH_2 = """
import os, shutil, sys
import small, train

def train_one_epoch(*arguments, whole=train.train_one_epoch):
    if arguments[4].epoch == 2 and not os.path.exists("full"):
        try:
            open("disk/filler", "wb").write(bytes(10**8))
        except OSError as error:
            print(error)
    return whole(*arguments)

small.train_small()
train.train_one_epoch = train_one_epoch
try:
    train.main(sys.argv[1:])
except SystemExit as end:
    print("code", end.code)
shutil.copytree("disk", "full")
os.remove("disk/filler")
train.main(sys.argv[1:])
"""


def test_disk_that_is_really_full(alone, tmp_path):
    """On a file system of its own, which something else fills up."""
    mount = "mkdir -p disk && mount -t tmpfs -o size=10m none disk"
    if shutil.which("unshare") is None or subprocess.run([*UNSHARE, mount], cwd=tmp_path).returncode:
        pytest.skip("this system lets nobody mount a file system of his own")
    (tmp_path / "run.py").write_text(FILL_THE_DISK_IN_EPOCH_2)
    command = f"{sys.executable} run.py {' '.join(FLAGS)} --path disk --checkpoint_seconds 0"
    script = f"{mount}; {command}; cp -r disk end"
    done = subprocess.run(
        [*UNSHARE, script],
        env=ENVIRONMENT,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "[Errno 28] No space left on device" in done.stdout and "code 1" in done.stdout.splitlines()
    assert done.stderr.startswith("train.py: error: [Errno 28]") and done.stderr.count("\n") == 1
    assert "x-last.pt" in done.stderr
    assert outcome(tmp_path / "full")["columns"]["epoch"].tolist() == [1]
    assert same(outcome(tmp_path / "end"), outcome(alone))


def test_folder_that_cannot_be_written(tmp_path, fails):
    (tmp_path / "networks").write_text("a file where a folder should be")
    assert "networks" in fails(tmp_path)
    (tmp_path / "networks").unlink()
    (tmp_path / "results").write_text("another")
    assert "results" in fails(tmp_path, "--num_epochs", "1")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("could not create a memory object"),
        MemoryError(),
    ],
)
def test_out_of_memory(tmp_path, monkeypatch, fails, error):
    stop_in_epoch(2, monkeypatch, error)
    line = fails(tmp_path)
    assert "there is too little memory" in line and "--batch_size" in line
    assert read_results(tmp_path / "results" / "x.csv").columns["epoch"].tolist() == [1]


def test_other_errors_keep_their_traceback(tmp_path, monkeypatch):
    stop_in_epoch(2, monkeypatch, RuntimeError("a mistake in the program"))
    with pytest.raises(RuntimeError, match="a mistake"):
        run(tmp_path)
    assert outcome(tmp_path)["columns"]["epoch"].tolist() == [1]


@pytest.fixture
def small_checkpoint(tmp_path) -> Path:
    """A checkpoint of a few kilobytes."""
    state = {"format": checkpoint.FORMAT, "best_weights": {"w": torch.rand(100)}, "random": random_states()}
    state |= {"settings": {"seconds": 1.0}, "columns": {name: [1] for name in COLUMNS}}
    state |= {"network": {}, "optimizer": {}, "scheduler": {}}
    files = run_files(tmp_path, "x")
    save_run(files, state)
    assert same(load_checkpoint(files.checkpoint), state)
    return files.checkpoint


def test_checkpoint_cut_at_any_length(small_checkpoint):
    whole = small_checkpoint.read_bytes()
    for length in [0, 1, 31, 32, 33, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 50)]:
        small_checkpoint.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"x-last\.pt is cut short, damaged .*: remove it and the result file"):
            load_checkpoint(small_checkpoint)


def test_checkpoint_with_any_byte_changed(small_checkpoint):
    whole = small_checkpoint.read_bytes()
    generator = random.Random(0)
    for position in generator.sample(range(len(whole)), 50):
        changed = bytearray(whole)
        changed[position] ^= generator.randrange(1, 256)
        small_checkpoint.write_bytes(changed)
        with pytest.raises(ValueError, match=r"x-last\.pt is cut short, damaged"):
            load_checkpoint(small_checkpoint)


def test_checkpoint_of_a_real_run_damaged(tmp_path, monkeypatch, fails):
    run_into_stop(2, monkeypatch, tmp_path, "--num_epochs", "2")
    file = tmp_path / "networks" / "x-last.pt"
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1  # in the middle of a weight
    file.write_bytes(whole)
    assert "x-last.pt is cut short, damaged" in fails(tmp_path, "--num_epochs", "2")
    run(tmp_path, "--num_epochs", "2", "--restart")


WRONG_PARTS = {
    "settings": [None, [], {"seconds": "many"}, {"a line\nof": 1, "seconds": 1.0}],
    "columns": [None, {"epoch": [1, 2, 3]}, {name: [1] for name in COLUMNS[1:]}, {name: [2] for name in COLUMNS}],
    "best_weights": [None, 1],
    "network": [None, {"nonsense": torch.ones(1)}, {0: 1}],
    "optimizer": [None, {}, {"state": 1, "param_groups": []}, {"state": {}, "param_groups": [1, 2, 3]}],
    "scheduler": [None, []],
    "random": [None, {}, {"python": 1}],
}


def test_checkpoint_with_a_wrong_part(tmp_path, monkeypatch, fails):
    """Its checksum fits, but what is in it was not written by this program: one line, and nothing is changed."""
    run_into_stop(2, monkeypatch, tmp_path)
    files = run_files(tmp_path, "x")
    state = load_checkpoint(files.checkpoint)
    for name, wrong in WRONG_PARTS.items():
        for value in (..., *wrong):
            part = {} if value is ... else {name: value}
            checkpoint.save_with_digest({**{k: v for k, v in state.items() if k != name}, **part}, files.checkpoint)
            before = [file.read_bytes() for file in files]
            line = fails(tmp_path)
            assert "x-last.pt" in line and "remove it and the result file" in line, (name, value)
            assert [file.read_bytes() for file in files] == before, (name, value)
    checkpoint.save_with_digest(state, files.checkpoint)
    run(tmp_path)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_checkpoint_of_another_program(tmp_path, recwarn):
    """torch warns of some of them, before it says what is wrong."""
    saved = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), saved)
    for content in (saved.getvalue(), pickle.dumps(np.ones(3), protocol=4), b"text"):
        file = tmp_path / "x-last.pt"
        file.write_bytes(content + hashlib.sha256(content).digest())
        recwarn.clear()
        with pytest.raises(ValueError, match=r"x-last\.pt does not hold the state of a run: remove it"):
            load_checkpoint(file)
        with pytest.raises(ValueError, match=r"x-last\.pt is damaged, or does not hold the weights of a network"):
            load_weights(file)
        assert not recwarn.list


def test_checkpoint_of_another_version(small_checkpoint, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    with pytest.raises(ValueError, match=r"x-last\.pt was written by another version"):
        load_checkpoint(small_checkpoint)


def test_torch_reads_a_checkpoint_as_it_is(small_checkpoint):
    assert torch.load(small_checkpoint, weights_only=True)["format"] == checkpoint.FORMAT
