"""Damage every file that the commands read, and give their flags bad values, hundreds of times each.

    python tests/fuzz.py

A command must finish with exactly the numbers of the undamaged files, or end with one line; never with a traceback.
The same --draws makes the same damage again, and another one makes other damage.
"""

import argparse
import contextlib
import copy
import faulthandler
import io
import itertools
import os
import random
import re
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import figures
import reproduce
import run_settings
import small
import t_test
import train
import trained_networks
from command_line.files import DamagedFileError
from experiment import making, plan
from image_sets import cifar
from saved_runs.results import read_results
from training import preparation

SMALL = ["--dataset", "digits", "--batch_size", "48", "--device", "cpu"]
NAMES = {"baseline": "weight1-c1-dataset", "proposed": "weight0.1-c100-bn"}
Numbers = dict[str, Any]  # what a command has found out, by what it is
drawn: Numbers = {}  # the numbers in the figures that a command has made


class FindingError(Exception):
    """A command has done what it must not do."""


# --- commands -------------------------------------------------------------------------------------------------------


def end_of(main: Callable, *argv: object) -> tuple[int, str, str]:
    """The exit code of a command, and what it has printed. FindingError where neither it nor a line is its end."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in argv])
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            raise FindingError(traceback.format_exc()) from None
    if code and not re.fullmatch(r"\w+\.py: [^\n]+\n", err.getvalue()):
        raise FindingError(f"it ended with code {code} and not with one line: {err.getvalue()!r}")
    return code, out.getvalue(), err.getvalue()


def rows(text: str) -> Numbers:
    """The rows of a printed table."""
    return {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}


def result_files(path: Path, setting: str) -> list[Path]:
    """Those of a setting, damaged or not."""
    return sorted((path / "results").glob(f"*{NAMES[setting]}-seed?.csv"))


def use_t_test(path: Path) -> Numbers | None:
    """The table of `t_test.py`, None where it ends with an error; so do all of these."""
    proposed, baseline = (result_files(path, setting) for setting in ("proposed", "baseline"))
    code, out, _ = end_of(t_test.main, "--proposed", *proposed, "--baseline", *baseline)
    return None if code else rows(out)


def use_figures(path: Path) -> Numbers | None:
    """What the figures show: a figure of weights may be left out."""
    drawn.clear()
    files = [*result_files(path, "baseline"), *result_files(path, "proposed")]
    code, _, _ = end_of(figures.main, *files, "--output", path / "figures")
    return None if code else dict(drawn)


def use_report(path: Path) -> Numbers | None:
    """The table of `reproduce.py --report`."""
    code, out, _ = end_of(reproduce.main, *SMALL, "--num_epochs", 2, "--seeds", "1-3", "--path", path, "--report")
    return None if code else rows(out)


def use_experiment(path: Path) -> Numbers | None:
    """The table of `reproduce.py`, and all that is in the result files after it."""
    code, out, _ = end_of(reproduce.main, *SMALL, "--num_epochs", 2, "--seeds", "1-3", "--path", path)
    if code:
        return None
    left = [file for setting in NAMES for file in result_files(path, setting)]
    return rows(out) | {file.name: all_numbers(file) for file in left}


def use_train(path: Path, *flags: object) -> Numbers | None:
    """The last line of `train.py`, and what its files hold then."""
    name = ["--name", "alone", "--path", path]
    code, out, _ = end_of(train.main, *SMALL, "--num_epochs", 4, *name, *flags)
    if code:
        return None
    best = path / "networks" / "alone-best.pt"
    weights = {name: value.tolist() for name, value in trained_networks.load_weights(best).items()}
    line = re.match(r"best epoch \d+: val accuracy \S+ %, test accuracy \S+ %", out.splitlines()[-1])
    return {"line": line[0], "numbers": all_numbers(path / "results" / "alone.csv"), "weights": weights}


def use_cifar10(path: Path) -> Numbers | None:
    """The same for images in the files of CIFAR-10, trained on anew."""
    return use_train(path, "--dataset", "cifar10", "--batch_size", 16, "--num_epochs", 1, "--restart")


def all_numbers(file: Path) -> list:
    """What is in a result file. FindingError where a command has left one that is damaged."""
    try:
        results = read_results(file)
    except DamagedFileError as error:
        raise FindingError(f"it finished, and left this behind: {error}") from None
    return [values.tolist() for values in results.columns.values()]


# --- damage ---------------------------------------------------------------------------------------------------------


def damage(content: bytes, others: list[bytes], draw: random.Random) -> tuple[str, bytes | Callable[[Path], None]]:
    """What is done to the content of a file, and what comes of it: other content, or what makes something else."""
    size, lines = max(1, len(content)), content.splitlines(keepends=True)
    place, line, length = draw.randrange(size), draw.randrange(max(1, len(lines))), draw.randrange(1, 600)
    digits = [n for n, byte in enumerate(content) if chr(byte).isdigit()] or [0]
    digit = draw.choice(digits)
    new_digit = draw.choice([d for d in b"0123456789" if d != content[digit : digit + 1][:1]])
    shuffled = draw.sample(lines, len(lines))
    kinds = {
        "a bit": lambda: content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :],
        "a digit": lambda: content[:digit] + bytes([new_digit]) + content[digit + 1 :],
        "a byte less": lambda: content[:place] + content[place + 1 :],
        "bytes more": lambda: content[:place] + draw.randbytes(draw.randrange(1, 9)) + content[place:],
        "cut short": lambda: content[:place],
        "zeros": lambda: content[:place] + bytes(min(length, size - place)) + content[place + length :],
        "a line less": lambda: b"".join(lines[:line] + lines[line + 1 :]),
        "a line twice": lambda: b"".join(lines[: line + 1] + lines[line:]),
        "a line elsewhere": lambda: b"".join(lines[:line] + lines[line + 1 :] + lines[line : line + 1]),
        "lines in any order": lambda: b"".join(shuffled),
        "line ends of Windows": lambda: content.replace(b"\n", b"\r\n"),
        "something behind it": lambda: content + draw.choice([b"\n", b"\0", b"1,2,3,4,5\n", draw.randbytes(50)]),
        "twice": lambda: content * 2,
        "empty": lambda: b"",
        "noise": lambda: draw.randbytes(length),
        "another file": lambda: draw.choice(others),
        "a folder": lambda: os.mkdir,
    }
    often = ["a digit"] * 6  # which is the hardest to notice
    kind = draw.choice([*kinds, *often])
    return kind, kinds[kind]()


def is_table(file: Path) -> bool:
    """Whether it is the table of an experiment, not the numbers of a run."""
    return file.suffix == ".csv" and "-seed" not in file.stem


class Folder:
    """Files that commands read and change, put back before each use."""

    def __init__(self, path: Path, *, without: str = "") -> None:
        self.path = path
        self.files = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
        if without:
            self.files = {file: content for file, content in self.files.items() if not re.search(without, file.name)}

    def put_back(self) -> None:
        """Let the folder hold its files, and no others."""
        for file in sorted(self.path.rglob("*"), reverse=True):
            if file.is_dir():
                if file in self.files:
                    file.rmdir()
            elif file not in self.files or not file.is_file():
                file.unlink()
        for file, content in self.files.items():
            if not file.exists() or file.read_bytes() != content:
                file.write_bytes(content)

    def try_damage(self, pattern: str, use: Callable, draw: random.Random, counts: Counter) -> None:
        """Damage one of the files whose names match, and use a command on it."""
        self.put_back()
        expected = use(self.path)
        assert expected, "the command fails on undamaged files"
        expected = copy.deepcopy(expected)
        self.put_back()
        file = draw.choice(sorted(file for file in self.files if re.search(pattern, file.name)))
        # weights bear no name; the table of an experiment is left out where result files are asked for
        others = [content for other, content in self.files.items() if other.suffix != ".pt" and not is_table(other)]
        kind, content = damage(self.files[file], others, draw)
        file.unlink()
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            content(file)
        faulthandler.dump_traceback_later(600, exit=True)  # where a command hangs
        try:
            found = use(self.path)
            if found is not None:
                drawn_less = use is use_figures and found.keys() < expected.keys()
                if any(found[name] != expected[name] for name in found) or not (
                    drawn_less or len(found) == len(expected)
                ):
                    raise FindingError(f"other numbers: {found}\nand not {expected}")
            end = "one line" if found is None else "same numbers" if len(found) == len(expected) else "fewer figures"
            counts[end] += 1
        except FindingError as finding:
            counts["FOUND"] += 1
            print(f"{use.__name__}, {file.name}, {kind}: {finding}", flush=True)
        finally:
            faulthandler.cancel_dump_traceback_later()


def make_folders(path: Path) -> Iterator[tuple[str, Folder, str, list[Callable], int]]:
    """What is damaged: its name, the folder, a pattern of file names, what reads them, and a share of all draws."""
    experiment = path / "experiment"
    assert use_experiment(experiment) and use_figures(experiment)
    whole = Folder(experiment)
    yield "result files", whole, r"-seed\d\.csv$", [use_t_test, use_figures, use_report, use_experiment], 30
    yield "tables", whole, r"num_epochs=2\.csv$", [use_report, use_experiment], 10
    yield "best weights", whole, r"-seed1-best\.pt$", [use_figures], 10
    yield "archives of γ and β", Folder(experiment, without=r"\.pt$"), r"^figure.*\.npz$", [use_figures], 10

    finished, stopped = path / "finished", path / "stopped"
    assert use_train(finished)
    yield "a finished run", Folder(finished), r"\.csv$", [use_train], 12  # its weights, train.py leaves alone

    with pytest.MonkeyPatch.context() as patch:
        small.stop_in_epoch(3, patch)
        assert end_of(train.main, *SMALL, "--num_epochs", 4, "--name", "alone", "--path", stopped)[0] == 130
    yield "a stopped run", Folder(stopped), r"\.(csv|pt)$", [use_train], 13

    images = path / "cifar10"
    small.write_small_cifar10(images / "images")
    yield "images", Folder(images), r"_batch|batch_|meta", [use_cifar10], 10


# --- flags ----------------------------------------------------------------------------------------------------------

BAD = ["", " ", "-", "--", "nan", "inf", "-inf", "-1", "0", "-0.0", "1.5", "1e999", "1e-999", "1_0", "0x10", "٣", "½"]
BAD += ["9" * 400, "-" + "9" * 30, "a\nb", "a\0b", "\ud800", "γ/β", "..", "/", "~nobody", "x" * 5000, "None", "true"]
BAD += ["cpu:99", "cuda:99", "meta", "mps", "tcp://x", "tcp://:0", "1-", "3-1", "1,,2", "baseline:c=1", "a:c="]
BAD += ["a:c=nan", "a:bn_weight=1e999", "/dev/null", "/dev/null/x", "/proc/x", "{}", "%s", "*", "resnet18 ", "CIFAR10"]


def try_flags(path: Path, draw: random.Random, number: int, counts: Counter) -> None:
    """Give the flags of all commands bad values. Nothing is trained: runs are finished, or not begun."""
    results = train.train(run_settings.parse([*SMALL, "--num_epochs", "1", "--path", str(path)]))
    train.train, whole_train = lambda *_, **__: results, train.train
    reproduce.make_runs, make_runs = lambda *_, **__: (_ for _ in ()), reproduce.make_runs
    [file] = (path / "results").glob("*.csv")
    bases = {
        train: ([*SMALL, "--path", path], run_settings.make_parser()),
        reproduce: ([*SMALL, "--path", path, "--seeds", "1"], plan.make_parser()),
        t_test: (["--proposed", file, "--baseline", file], t_test.make_parser()),
        figures: ([file, "--output", path], figures.make_parser()),
    }
    flags = [(command, flag) for command, (_, parser) in bases.items() for flag in parser._option_string_actions]
    flags = [pair for pair in flags if pair[1] not in ("-h", "--help")]
    pairs = list(itertools.product(flags, BAD))
    for (command, flag), value in draw.sample(pairs, number):
        try:
            code, _, _ = end_of(command.main, *bases[command][0], flag, value)
            counts["one line" if code else "finished"] += 1
        except FindingError as finding:
            counts["FOUND"] += 1
            print(f"{command.__name__}.py {flag} {value!r}: {finding}", flush=True)
    train.train, reproduce.make_runs = whole_train, make_runs


def note_figure(figure: Figure, stem: Path) -> list[Path]:
    """In place of `save`: what a figure shows."""
    shown: list[Any] = []
    for panel in figure.axes:
        shown += [line.get_xydata().tolist() for line in panel.lines] + [panel.get_title()]
        shown += [
            patch.get_path().vertices.tolist() + list(patch.get_window_extent().bounds) for patch in panel.patches
        ]
        shown += [np.ma.getdata(c.get_array()).tolist() for c in panel.collections if c.get_array() is not None]
    drawn[stem.name] = shown
    return [stem]


def refuse_to_download(*_: Any, **__: Any) -> None:
    """In place of what would use the network."""
    raise OSError("there is no network")


def construct_network(network_name: str, num_classes: int, *arguments: Any, **options: Any) -> nn.Module:
    """The small network, for images of any size."""
    network = small.construct_small_network(network_name, num_classes, *arguments, **options)
    network.insert(4, nn.AdaptiveAvgPool2d(6))
    return network


def main() -> None:
    """Damage files, give bad values, count; exit code 1 where a command did what it must not do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=700, help="how many damaged files")
    parser.add_argument("--values", type=int, default=500, help="how many bad values")
    parser.add_argument("--draws", type=int, default=0, help="seed of all draws")
    args = parser.parse_args()
    draw, found = random.Random(args.draws), 0
    small.train_small()
    preparation.construct_network = trained_networks.construct_network = construct_network
    making.make_run = small.make_run_here
    cifar.download_and_extract_archive = refuse_to_download
    figures.save = note_figure
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name, damaged, pattern, uses, share in make_folders(Path(folder)):
            counts = Counter()
            for n in range(args.files * share // 100):
                damaged.try_damage(pattern, uses[n % len(uses)], draw, counts)
            print(f"{name}: {dict(counts)}", flush=True)
            found += counts["FOUND"]
        counts = Counter()
        try_flags(Path(folder) / "flags", draw, args.values, counts)
        print(f"flags: {dict(counts)}", flush=True)
        found += counts["FOUND"]
    sys.exit(found > 0)


if __name__ == "__main__":
    main()
