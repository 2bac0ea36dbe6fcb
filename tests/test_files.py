"""Files that are written whole or not at all; and what the commands do with one that they may not read."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import figures
import reproduce
import t_test
import train
from command_line.files import MACHINE, write_atomically
from run_settings import PAPER
from saved_runs.results import COLUMNS, Results, write_results

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, lambda file: file.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_what_is_no_file_is_replaced(make):
    file = Path("x.csv")
    make(file)
    write_atomically(file, b"new")
    assert not file.is_symlink() and file.read_bytes() == b"new"


def experiment() -> list[Path]:
    """The result files of the proposed method and the baseline, as reproduce.py leaves them, with the same seed."""
    files = []
    for method, name in {"proposed": "weight0.1-c100-bn", "baseline": "weight1-c1-dataset"}.items():
        files.append(Path("results", f"digits-resnet18-num_epochs=1-{name}-seed1.csv"))
        header = {"dataset": "digits", "network": "resnet18", "seed": 1, "num_epochs": 1} | PAPER[method]
        columns = {name: np.array([1 if name == "epoch" else 50.0]) for name in COLUMNS}
        write_results(files[-1], Results(header, columns))
    return files


DIGITS = ["--dataset", "digits", "--num_epochs", "1", "--device", "cpu"]
RUN = "digits-resnet18-num_epochs=1-weight1-c1-dataset-seed1"
COMMANDS = {
    "t_test.py": lambda ours, theirs: t_test.main(["--proposed", ours, "--baseline", theirs]),
    "figures.py": lambda ours, theirs: figures.main([ours, theirs, "--output", "figures"]),
    "reproduce.py": lambda *_: reproduce.main([*DIGITS, "--seeds", "1", "--report"]),
    "train.py": lambda *_: train.main([*DIGITS, "--bn_weight", "1", "--c", "1", "--input_norm", "dataset"]),
}
CASES = [(command, f"results/{RUN}.csv") for command in COMMANDS]
CASES += [("reproduce.py", "results/digits-resnet18-num_epochs=1.csv"), ("train.py", f"networks/{RUN}-last.pt")]


@pytest.mark.parametrize(("command", "name"), CASES)
def test_command_ends_in_one_line(small_network, capsys, monkeypatch, command, name):
    files, file = experiment(), Path(name)
    file.unlink(missing_ok=True)
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    forbid_reading(file, monkeypatch)
    with pytest.raises(SystemExit, match="1"):
        COMMANDS[command](*map(str, files))
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and file.stem in error and "Permission denied" in error


def forbid_reading(forbidden: Path, monkeypatch) -> None:
    """As its mode would, but for root too."""
    read_bytes = Path.read_bytes

    def read(file: Path) -> bytes:
        if file.name == forbidden.name:
            raise PermissionError(13, "Permission denied", str(file))
        return read_bytes(file)

    monkeypatch.setattr(Path, "read_bytes", read)


def test_name_with_control_characters_is_escaped(capsys):
    ours, theirs = map(str, experiment())
    Path("\x1b[31m.csv").write_text("setting,bn_weight,c\n")
    t_test.main(["--proposed", ours, "\x1b[31m.csv", "--baseline", theirs])
    assert capsys.readouterr().out.endswith("\n\\x1b[31m.csv is the table of an experiment, and left out\n")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, call):
    file = tmp_path / "file"
    write_atomically(file, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_two_processes_that_write_one_file(tmp_path, monkeypatch):
    """One begins to write while the other is in the middle of it: neither gets what the other wrote."""
    file, replace, found = tmp_path / "file", os.replace, []

    def other_writes_too(temporary, target):
        monkeypatch.setattr(os, "replace", replace)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", os.getppid)
            write_atomically(file, b"other")
        found.append(file.read_bytes())
        replace(temporary, target)

    monkeypatch.setattr(os, "replace", other_writes_too)
    write_atomically(file, b"one")
    assert (found, file.read_bytes()) == ([b"other"], b"one")
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_process_leaves_goes_with_the_next_write(tmp_path):
    names = ("y.csv", f"y.csv.{MACHINE}-{os.getppid()}.tmp", f"x[1].csv.y.csv.{MACHINE}-1.tmp", "x[1].csv.mine.tmp")
    others = {tmp_path / name for name in names}
    for other in others:
        other.touch()
    file = tmp_path / "x[1].csv"
    code = "import os, sys; from command_line import files; os.replace = lambda *_: os.kill(os.getpid(), 9); "
    command = [sys.executable, "-c", code + "files.write_atomically(sys.argv[1], b'new')", file]
    killed = subprocess.run(command, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    [left] = set(tmp_path.iterdir()) - others
    assert left.suffix == ".tmp" and left.read_bytes() == b"new"
    write_atomically(file, b"new")
    assert set(tmp_path.iterdir()) == others | {file}
    left.touch()
    write_atomically(file, b"new")  # nothing else is to do
    assert set(tmp_path.iterdir()) == others | {file}
