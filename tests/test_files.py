"""Files that are written whole or not at all; and what the commands do where there is no plain file, or one they may
not read."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import figures
import reproduce
import t_test
import train
from command_line.files import check_plain, read_file, remove_temporaries, write_atomically
from folders import make_folder
from image_sets.folders import find_images, own_size, read_image
from image_sets.loading import load_image_set
from run_settings import PAPER
from saved_runs.results import COLUMNS, Results, write_results

SPECIAL = {
    "pipe": os.mkfifo,
    "socket": lambda file: socket.socket(socket.AF_UNIX).bind(str(file)),
    "device": lambda file: file.symlink_to("/dev/zero"),
}


@pytest.fixture(autouse=True)
def watchdog(tmp_path, monkeypatch) -> Iterator[None]:
    """A test that waits for a pipe ends. Names are relative, as that of a socket must be short."""

    def end(*_):
        pytest.exit("a test hangs")

    monkeypatch.chdir(tmp_path)
    earlier = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, earlier)


@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("use", [read_file, read_image, lambda file: own_size([file]), lambda file: write(file)])
def test_what_is_no_plain_file_is_refused(make, use):
    file = Path("x.png")
    make(file)
    before = file.lstat()
    with pytest.raises(OSError, match=r"^x.png is a pipe, a socket or a device, where a file should be$"):
        use(file)
    assert file.lstat() == before


def write(file: Path) -> None:
    write_atomically(file, b"new")


def test_files_and_folders_are_plain():
    Path("file").touch()
    Path("link").symlink_to("file")
    Path("broken").symlink_to("nothing")
    for name in ("file", "link", "broken", "nothing", "."):
        check_plain(name)


def experiment() -> list[Path]:
    """The result files of the proposed setting and the baseline, as reproduce.py leaves them, with the same seed."""
    files = []
    for setting, name in {"proposed": "weight0.1-c100-bn", "baseline": "weight1-c1-dataset"}.items():
        files.append(Path("results", f"digits-resnet18-num_epochs=1-{name}-seed1.csv"))
        settings = {"dataset": "digits", "network": "resnet18", "seed": 1, "num_epochs": 1} | PAPER[setting]
        columns = {name: np.array([1 if name == "epoch" else 50.0]) for name in COLUMNS}
        write_results(files[-1], Results(settings, columns))
    return files


DIGITS = ["--dataset", "digits", "--num_epochs", "1", "--device", "cpu"]
BASELINE = ["--bn_weight", "1", "--c", "1", "--input_norm", "dataset"]
RUN = "digits-resnet18-num_epochs=1-weight1-c1-dataset-seed1"
COMMANDS = {
    "t_test.py": lambda ours, theirs: t_test.main(["--proposed", ours, "--baseline", theirs]),
    "figures.py": lambda ours, theirs: figures.main([ours, theirs, "--output", "figures"]),
    "reproduce.py": lambda *_: reproduce.main([*DIGITS, "--seeds", "1", "--report"]),
    "train.py": lambda *_: train.main([*DIGITS, *BASELINE]),
    "train.py --restart": lambda *_: train.main([*DIGITS, *BASELINE, "--restart"]),
}
CASES = [(command, f"results/{RUN}.csv", how) for command in [*COMMANDS][:4] for how in ("pipe", "permission")]
CASES += [("reproduce.py", "results/digits-resnet18-num_epochs=1.csv", how) for how in ("pipe", "permission")]
CASES += [("train.py", f"networks/{RUN}-last.pt", how) for how in ("pipe", "permission")]
CASES += [("train.py --restart", f"networks/{RUN}-best.pt", "pipe")]


@pytest.mark.parametrize(("command", "name", "trouble"), CASES)
def test_command_ends_in_one_line(small_network, capsys, monkeypatch, command, name, trouble):
    files, file = experiment(), Path(name)
    file.unlink(missing_ok=True)
    file.parent.mkdir(exist_ok=True)
    if trouble == "pipe":
        os.mkfifo(file)
    else:
        file.write_text("")
        forbid_reading(file, monkeypatch)
    with pytest.raises(SystemExit, match="1"):
        COMMANDS[command](*map(str, files))
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and file.stem in error
    assert ("is a pipe" if trouble == "pipe" else "Permission denied") in error


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


@pytest.mark.parametrize("image_size", [16, 66], ids=["kept", "streamed"])
def test_pipe_among_images(image_size):
    folder = make_folder(Path("small"), num_train=30, num_test=6, size=(16, 16))
    file = find_images(folder).files[0]
    file.unlink()
    os.mkfifo(file)
    with pytest.raises((OSError, ValueError), match=f"{file.name} is a pipe"):
        load_image_set("small", "", image_size=image_size, workers=0)


def test_pipe_in_place_of_statistics():
    file = make_folder(Path("small"), num_train=30, num_test=6, size=(16, 16)) / "statistics-16x16.json"
    os.mkfifo(file)
    with pytest.raises(OSError, match=r"statistics-16x16.json is a pipe"):
        load_image_set("small", "")
    assert file.is_fifo()


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
        write_atomically(file, b"other")
        found.append(file.read_bytes())
        replace(temporary, target)

    monkeypatch.setattr(os, "replace", other_writes_too)
    write_atomically(file, b"one")
    assert (found, file.read_bytes()) == ([b"other"], b"one")
    assert list(tmp_path.iterdir()) == [file]


def test_what_killed_processes_leave_is_removed(tmp_path, monkeypatch):
    def die(*_, **__):
        raise OSError

    names = ("x.csv", "x.csv.12345.tmp", "y.csv.12345678.tmp", "x.csv.y.csv.12345678.tmp")
    others = [tmp_path / name for name in names]
    for other in others:
        other.touch()
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", die)
        patch.setattr(Path, "unlink", die)
        write_atomically(tmp_path / "x.csv", b"new")
    assert len(list(tmp_path.iterdir())) == 5
    remove_temporaries(tmp_path / "x.csv")
    assert sorted(tmp_path.iterdir()) == sorted(others)
