import errno
import fcntl
import hashlib
import io
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import train
from image_sets.batches import Batches
from kill_and_restart import FLAGS, finish, outcome, same, start
from saved_runs import checkpoint, circumstances
from saved_runs.checkpoint import load_checkpoint, save_run, save_with_digest
from saved_runs.lock import AtWorkError, lock_run
from saved_runs.results import read_results, run_files, write_results
from seeds import make_deterministic
from small import prepared, stop_in_epoch
from trained_networks import load_weights
from training import preparation
from training import run as saved_run
from training.run import Run


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


# --- going on -------------------------------------------------------------------------------------------------------


def die(*_) -> None:
    """What happens in place of a function, as far as the files are concerned, where a process is killed in it."""
    raise KeyboardInterrupt


CONSTANT = ["--scheduler", "none"]  # which keeps the checkpoint


@pytest.mark.parametrize(
    ("seconds", "flags"), [("0", []), ("1e9", [*CONSTANT, "--precision", "bfloat16"]), ("0", ["--debias"])]
)
def test_stopped_and_continued_run_is_the_same_to_the_last_bit(tmp_path, monkeypatch, capsys, seconds, flags):
    run(tmp_path / "alone", *flags)
    for epoch in (2, 4):
        with monkeypatch.context() as patch:
            stop_in_epoch(epoch, patch)
            with pytest.raises(SystemExit) as stop:
                run(tmp_path, *flags, "--checkpoint_seconds", seconds)
        assert stop.value.code == 130
        assert read_results(tmp_path / "results" / "x.csv").columns["epoch"].tolist() == list(range(1, epoch))
        make_deterministic(99)  # the next process does not know where the generators were
    capsys.readouterr()
    run(tmp_path, *flags)
    assert capsys.readouterr().out.splitlines()[1] == "x resumes at epoch 4 of 4"
    assert same(outcome(tmp_path), outcome(tmp_path / "alone"))
    assert (tmp_path / "networks" / "x-last.pt").exists() == (flags[:2] == CONSTANT)


@pytest.mark.parametrize(
    ("checkpoint_seconds", "deaths"),
    [
        ("0", [(1, "after replace"), (4, "half written"), (2, "before replace"), (3, "before fsync")]),
        ("1e9", [(6, "after replace"), (1, "before replace"), (1, "after replace")]),
    ],
    ids=["all files", "last save"],
)
def test_killed_within_a_write(alone, tmp_path, checkpoint_seconds, deaths):
    for death in deaths:
        killed = finish(tmp_path, "--checkpoint_seconds", checkpoint_seconds, small=True, death=death)
        assert killed == -signal.SIGKILL
    assert finish(tmp_path, small=True) == 0
    assert same(outcome(tmp_path), outcome(alone))
    assert not list(tmp_path.rglob("*.tmp"))


def test_killed_at_any_moment(tmp_path):
    many = ["--num_epochs", "40", "--checkpoint_seconds", "0.1"]
    run(tmp_path / "alone", *many)
    file = tmp_path / "results" / "x.csv"
    for epoch in (1, 20):
        child = start(tmp_path, *many, small=True)
        while child.is_alive() and not (file.exists() and read_results(file).num_epochs >= epoch):
            time.sleep(0.001)
        child.kill()
        child.join()
    assert finish(tmp_path, *many, small=True) == 0
    assert same(outcome(tmp_path), outcome(tmp_path / "alone"))


def test_signal_saves_and_says_how_to_go_on(alone, tmp_path, monkeypatch, capsys):
    whole, epochs = train.train_one_epoch, count(1)

    def epoch_with_a_signal(*arguments):
        loss = whole(*arguments)
        if next(epochs) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train, "train_one_epoch", epoch_with_a_signal)
        run(tmp_path, "--checkpoint_seconds", "1e9")
    assert stop.value.code == 143
    error = capsys.readouterr().err
    assert error.startswith("train.py: stopped: ") and "run the same command again, without --restart" in error
    assert outcome(tmp_path)["columns"]["epoch"].tolist() == [1, 2]
    run(tmp_path)
    assert same(outcome(tmp_path), outcome(alone))


def test_stop_during_the_last_save(alone, tmp_path, monkeypatch):
    """The signal comes while the end of the run is being saved, which then goes on to its end."""
    save_run = checkpoint.save_run

    def interrupted_save(files, state):
        if len(state["columns"]["epoch"]) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        save_run(files, state)

    monkeypatch.setattr(saved_run, "save_run", interrupted_save)
    run(tmp_path, "--checkpoint_seconds", "1e9")
    assert same(outcome(tmp_path), outcome(alone))


def test_signal_after_the_last_step_ends_a_loop_over_runs(alone, tmp_path):
    """Without a command around it, nobody else would ask for it, and the next run would begin."""

    def interrupt_at_the_end(line: str) -> None:
        if line.startswith("epoch 4/4"):
            os.kill(os.getpid(), signal.SIGTERM)

    settings = prepared([*FLAGS, "--path", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt, match=str(int(signal.SIGTERM))):
        train.train(settings, interrupt_at_the_end)
    assert same(outcome(tmp_path), outcome(alone))


def test_seconds_between_checkpoints(tmp_path, monkeypatch):
    """By a clock on which every epoch takes a second. The result file is written last: it finds its weights there."""
    now, saved = 100.0, []
    whole_epoch, save_run = train.train_one_epoch, checkpoint.save_run

    def epoch_of_a_second(*arguments):
        nonlocal now
        now += 1
        return whole_epoch(*arguments)

    def noted_save(files, state):
        before = read_results(files.results).num_epochs if files.results.exists() else 0
        saved.append((state["columns"]["epoch"][-1], before))
        save_run(files, state)

    monkeypatch.setattr(saved_run.time, "monotonic", lambda: now)
    monkeypatch.setattr(train, "train_one_epoch", epoch_of_a_second)
    monkeypatch.setattr(saved_run, "save_run", noted_save)
    flags = ["--num_epochs", "9", "--checkpoint_seconds", "2.5", *CONSTANT]
    assert run(tmp_path, *flags).header["seconds"] == 9
    assert saved == [(1, 0), (4, 3), (7, 6), (9, 8)]
    now += 1000
    assert run(tmp_path, *flags, "--num_epochs", "10").header["seconds"] == 10


@pytest.mark.parametrize("function", ["write_outcome", "write_results"])
def test_killed_within_the_last_save(tmp_path, monkeypatch, function):
    """What it could not write any more is mended, and nothing is trained again."""
    flags = ["--num_epochs", "1"]
    run(tmp_path / "alone", *flags)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no signal has arrived"):
        patch.setattr(checkpoint, function, die)
        run(tmp_path, *flags)
    assert not (tmp_path / "results" / "x.csv").exists()
    monkeypatch.setattr(train, "train_one_epoch", None)
    run(tmp_path, *flags)
    assert same(outcome(tmp_path), outcome(tmp_path / "alone"))


# --- the same command again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cos", "none"])
def test_finished_run_trains_and_writes_nothing(tmp_path, monkeypatch, capsys, fails, schedule):
    """It does not need its checkpoint either."""

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    flags = ["--num_epochs", "2", "--scheduler", schedule]
    first = run(tmp_path, *flags)
    last_line = capsys.readouterr().out.splitlines()[-1]
    before = outcome(tmp_path)
    monkeypatch.setattr(train, "train_one_epoch", None)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        again = run(tmp_path, *flags)
        assert capsys.readouterr().out.splitlines() == ["x is finished already", last_line]
    assert again.header == first.header
    assert same(outcome(tmp_path), before)
    (tmp_path / "networks" / "x-last.pt").write_bytes(b"damaged")
    run(tmp_path, *flags)
    (tmp_path / "results" / "x.csv").unlink()
    assert "x-last.pt is cut short, damaged" in fails(tmp_path, *flags)


def test_files_of_a_finished_run_that_are_lost(tmp_path, capsys):
    flags = ["--num_epochs", "2"]
    run(tmp_path, *flags)
    before = outcome(tmp_path)
    (tmp_path / "results" / "x.csv").unlink()
    run(tmp_path, *flags)
    assert same(outcome(tmp_path), before)
    (tmp_path / "networks" / "x-best.pt").unlink()
    capsys.readouterr()
    run(tmp_path, *flags)
    captured = capsys.readouterr().out
    assert captured.startswith("x is finished already\n") and "weights" not in captured
    run(tmp_path, *flags, "--restart")
    assert same(outcome(tmp_path), before)


def test_more_epochs(tmp_path, capsys, fails):
    run(tmp_path / "cos", "--num_epochs", "2")
    line = fails(tmp_path / "cos", "--num_epochs", "3")
    assert "num_epochs was 2, now 3" in line and "cosine schedule" in line

    run(tmp_path / "constant", "--num_epochs", "2", *CONSTANT)
    capsys.readouterr()
    run(tmp_path / "constant", "--num_epochs", "4", *CONSTANT)
    assert capsys.readouterr().out.splitlines()[1] == "x resumes at epoch 3 of 4"
    assert "it has 4 epochs already" in fails(tmp_path / "constant", "--num_epochs", "3", *CONSTANT)
    run(tmp_path / "at once", "--num_epochs", "4", *CONSTANT)
    assert same(outcome(tmp_path / "constant"), outcome(tmp_path / "at once"))


def test_other_settings_are_listed(tmp_path, fails):
    run(tmp_path, "--num_epochs", "1")
    before = outcome(tmp_path)
    line = fails(tmp_path, "--num_epochs", "1", "--seed", "2", "--c", "10", "--batch_size", "24")
    assert "batch_size was 48, now 24; c was 100.0, now 10.0; seed was 1, now 2." in line
    assert "--restart" in line and "--name" in line
    line = fails(tmp_path, "--num_epochs", "2", "--scheduler", "none")
    assert "num_epochs was 1, now 2; scheduler was cos, now none" in line
    assert same(outcome(tmp_path), before)
    run(tmp_path, "--num_epochs", "1", "--checkpoint_seconds", "7")  # which may differ


def test_files_of_before(alone, tmp_path, monkeypatch, fails):
    """A setting that they lack was at its default, and their optimizer does not name its parameters."""
    run_into_stop(3, monkeypatch, tmp_path)
    files = run_files(tmp_path, "x")
    state = load_checkpoint(files.checkpoint)
    del state["settings"]["split_seed"], state["parameters"]
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
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no signal has arrived"):
        patch.setattr(checkpoint, "write_results", die)
        run(tmp_path, "--num_epochs", "2", *other, "--restart")
    made = []
    whole = train.train_one_epoch
    monkeypatch.setattr(train, "train_one_epoch", lambda *arguments: made.append(1) or whole(*arguments))
    run(tmp_path, "--num_epochs", "2", *other)
    assert len(made) == 1  # the second epoch
    run(tmp_path / "alone", "--num_epochs", "2", *other)
    assert same(outcome(tmp_path), outcome(tmp_path / "alone"))


@pytest.mark.parametrize("checksum", [True, False], ids=["", "an older file, without a checksum"])
def test_changed_result_file_beside_its_checkpoint(tmp_path, monkeypatch, checksum):
    """The checkpoint knows better."""
    flags = ["--num_epochs", "2", "--scheduler", "none"]
    numbers = run(tmp_path, *flags).columns
    file = tmp_path / "results" / "x.csv"
    before = file.read_text()
    lines = before.splitlines(keepends=True)
    lines[-1] = re.sub(r"\d(?=\n)", lambda digit: str((int(digit[0]) + 5) % 10), lines[-1])
    file.write_text("".join(line for line in lines if checksum or "sha256" not in line))
    assert file.read_text() != before
    monkeypatch.setattr(train, "train_one_epoch", None)
    assert same(run(tmp_path, *flags).columns, numbers)
    assert file.read_text() == before


@pytest.mark.parametrize(("old", "new"), [("# momentum: 0.9\n", "# momentum: 0.8\n"), ("# sha256: ", "something else")])
def test_changed_result_file_without_its_checkpoint(tmp_path, fails, old, new):
    run(tmp_path, "--num_epochs", "2")
    file = tmp_path / "results" / "x.csv"
    changed = file.read_text().replace(old, new)
    file.write_text(changed)
    line = fails(tmp_path, "--num_epochs", "2", "--momentum", "0.8")
    problem = "was changed after it was written" if "momentum" in old else "is not a result file, or damaged, at line"
    assert f"x.csv {problem}" in line and "remove it to start over" in line
    assert file.read_text() == changed


def test_result_file_without_its_checkpoint(tmp_path, monkeypatch, fails):
    run_into_stop(3, monkeypatch, tmp_path)
    (tmp_path / "networks" / "x-last.pt").unlink()
    line = fails(tmp_path)
    assert "x.csv has fewer than 4 epochs, and no " in line and "remove it to start over" in line


def test_finished_result_file_from_another_place(alone, tmp_path, monkeypatch, fails):
    """The checkpoint that was left here is older, and must not undo it."""
    run_into_stop(3, monkeypatch, tmp_path)
    monkeypatch.setattr(train, "train_one_epoch", None)
    file, results = tmp_path / "results" / "x.csv", read_results(alone / "results" / "x.csv")
    write_results(file, replace(results, header=results.header | {"momentum": 0.5}))
    other = file.read_bytes()
    assert "momentum was 0.5, now 0.9" in fails(tmp_path)
    assert file.read_bytes() == other
    write_results(file, results)
    assert same(run(tmp_path).columns, results.columns)
    assert same(read_results(file).columns, results.columns)


def test_result_file_names_the_code(tmp_path, monkeypatch):
    """By a commit, or where there is none by a hash of all modules."""
    modules = [tmp_path / name for name in ("saved_runs/circumstances.py", "train.py")]
    modules[0].parent.mkdir()
    for module in modules:
        module.write_text(f"# {module.name}")
    monkeypatch.setattr(circumstances, "ROOT", tmp_path)
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
    monkeypatch.setattr(circumstances, "code_version", lambda: "v1-dirty")
    assert run(tmp_path, "--num_epochs", "1").header["code"] == "v1-dirty"


def test_run_that_goes_on_elsewhere_names_both_places(tmp_path, monkeypatch):
    run_into_stop(2, monkeypatch, tmp_path)
    monkeypatch.setattr(circumstances.platform, "machine", lambda: "another machine")
    here, there = (results.header["machine"] for results in (read_results(tmp_path / "results/x.csv"), run(tmp_path)))
    assert there.startswith(f"{here}, then another machine with ")


# --- faults ---------------------------------------------------------------------------------------------------------


def test_two_runs_with_one_name(tmp_path, capsys):
    flags = ["--num_epochs", "1"]
    with lock_run(run_files(tmp_path, "x")), pytest.raises(SystemExit, match="3"):
        run(tmp_path, *flags)
    assert "a process is at work on the run of" in capsys.readouterr().err
    with lock_run(run_files(tmp_path, "x")):
        run(tmp_path, *flags, "--name", "y")
    run(tmp_path, *flags)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not inherit locks here")
def test_lock_is_free_although_a_process_of_the_run_still_lives(tmp_path):
    """As one that decodes images, a moment after the run was killed."""
    files, forked = run_files(tmp_path, "x"), multiprocessing.get_context("fork")
    with lock_run(files):
        begun, done = forked.Event(), forked.Event()
        child = forked.Process(target=lambda: begun.set() or done.wait(), daemon=True)
        child.start()
        begun.wait()
        with pytest.raises(AtWorkError, match=r"a process is at work on the run of .*x\.csv already"), lock_run(files):
            pass
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


@pytest.mark.parametrize("file", ["networks/x-last.pt", "networks/x-best.pt", "results/x.csv"])
def test_full_disk(alone, tmp_path, monkeypatch, fails, file):
    """From the second epoch on there is no room for one of the three files."""
    put = os.replace

    def full(temporary: Path, target: Path) -> None:
        if target == tmp_path / file and target.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        put(temporary, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        line = fails(tmp_path, "--checkpoint_seconds", "0")
    assert "No space left on device" in line and str(tmp_path / file) in line
    assert not list(tmp_path.rglob("*.tmp"))
    read_results(tmp_path / "results" / "x.csv")
    torch.load(tmp_path / "networks" / "x-best.pt", weights_only=True)
    run(tmp_path)
    assert same(outcome(tmp_path), outcome(alone))


def test_folder_that_cannot_be_written(tmp_path, fails):
    (tmp_path / "networks").write_text("a file where a folder should be")
    assert "networks" in fails(tmp_path)
    (tmp_path / "networks").unlink()
    (tmp_path / "results").write_text("another")
    assert "results" in fails(tmp_path, "--num_epochs", "1")


def test_out_of_memory(tmp_path, monkeypatch, fails):
    stop_in_epoch(2, monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"))
    line = fails(tmp_path)
    assert "there is too little memory" in line and "--batch_size" in line
    assert read_results(tmp_path / "results" / "x.csv").columns["epoch"].tolist() == [1]


def test_damaged_checkpoint(tmp_path, monkeypatch, fails):
    run_into_stop(2, monkeypatch, tmp_path, "--num_epochs", "2")
    file = tmp_path / "networks" / "x-last.pt"
    whole = file.read_bytes()
    middle = len(whole) // 2  # within a weight
    for damaged in (b"", whole[:middle], whole[:-1], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]):
        file.write_bytes(damaged)
        line = fails(tmp_path, "--num_epochs", "2")
        assert "x-last.pt is cut short, damaged" in line and "remove it and the result file" in line
        assert file.read_bytes() == damaged
    run(tmp_path, "--num_epochs", "2", "--restart")


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_checkpoint_of_another_program(tmp_path, recwarn):
    """torch warns of some of them, before it says what is wrong."""
    saved = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), saved)
    for content in (saved.getvalue(), pickle.dumps(np.ones(3), protocol=4), b"text"):
        file = tmp_path / "x-last.pt"
        file.write_bytes(content + hashlib.sha256(content).digest())
        recwarn.clear()
        with pytest.raises(ValueError, match=r"x-last\.pt is .* of another version of this program: remove it"):
            load_checkpoint(file)
        with pytest.raises(ValueError, match=r"x-last\.pt is damaged, or does not hold the weights of a network"):
            load_weights(file)
        assert not recwarn.list
    save_with_digest({"format": checkpoint.FORMAT + 1}, file)
    assert torch.load(file, weights_only=True) == {"format": checkpoint.FORMAT + 1}
    with pytest.raises(ValueError, match=r"x-last\.pt is .* of another version"):
        load_checkpoint(file)


class Branches(nn.Module):
    """Two branches of the same shapes, in the order that the caller gives, as the hashes of their names would."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(2, 2))


@pytest.fixture
def resume_branches(tmp_path) -> Callable[..., torch.optim.Optimizer]:
    """A function that resumes a run of two branches, or makes its first epoch, and returns the optimizer."""
    settings = prepared([*FLAGS, "--path", str(tmp_path)])
    image_set = preparation.load_images(settings)

    def go_on(*names: str, begin: bool = False, fused: bool = False) -> torch.optim.Optimizer:
        network = Branches(*names)
        biases, weights = ([getattr(branch, kind) for branch in network.children()] for kind in ("bias", "weight"))
        optimizer = torch.optim.SGD([{"params": biases}, {"params": weights}], 0.1, 0.9, fused=fused)
        with Run(settings) as run:
            run.resume(network, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), image_set)
            if begin:
                for _ in run.steps(Batches(image_set, "train", len(image_set.splits["train"]), False)):
                    (network.a(torch.ones(2)).sum() + 3 * network.b(torch.ones(2)).sum()).backward()
                    optimizer.step()
                run.record(1, 1.0, 1.0, 50.0, 50.0)
        return optimizer

    return go_on


def test_loop_of_ones_own(tmp_path):
    """Its optimizer may lack what SGD has, and a run that is finished says so."""
    settings = prepared([*FLAGS, "--num_epochs", "2", "--path", str(tmp_path)])
    image_set, seen = preparation.load_images(settings), []
    for stops in (True, False, False):
        network, lines = nn.Linear(2, 2), []
        optimizer = torch.optim.RMSprop(network.parameters())
        with Run(settings, lines.append) as run:
            run.resume(network, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), image_set)
            for epoch in run.epochs[: 1 if stops else None]:
                for _ in run.steps(Batches(image_set, "train", len(image_set.splits["train"]), False)):
                    network(torch.ones(2)).sum().backward()
                    optimizer.step()
                seen.append(epoch)
                run.record(epoch, 1.0, 1.0, 50.0, 50.0)
    assert seen == [1, 2] and lines == [f"{settings.run_name} is finished already"]


def test_state_of_a_gpu_is_resumed_as_that_of_a_cpu(resume_branches):
    """The fused optimizer of a GPU rounds differently on a CPU."""
    begun = resume_branches("a", "b", begin=True, fused=True)
    resumed = resume_branches("a", "b")
    assert [group["fused"] for group in resumed.param_groups] == [False, False]
    assert same(resumed.state_dict()["state"], begun.state_dict()["state"])


def test_optimizer_is_not_resumed_for_parameters_in_another_order(tmp_path, resume_branches):
    momenta = resume_branches("a", "b", begin=True).state_dict()["state"]
    assert [momenta[n]["momentum_buffer"].flatten()[0].item() for n in range(4)] == [1, 3, 1, 3]
    state = load_checkpoint(tmp_path / "networks" / "x-last.pt")
    assert state["parameters"] == ["a.bias", "b.bias", "a.weight", "b.weight"]
    with pytest.raises(ValueError, match=r"x-last\.pt has the momentum of a\.bias where that of b\.bias should be"):
        resume_branches("b", "a")
    assert same(resume_branches("a", "b").state_dict()["state"], momenta)
