"""The files of a run, its results, and whether it is finished.

A result file is CSV: the run's settings as `# key: value` lines, then its numbers, one line an epoch. The last of the
`#` lines holds the SHA-256 of all other lines, so that a changed number is noticed; older files lack it.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from command_line.files import DamagedFileError, write_atomically
from run_settings import DATASETS, DEFAULTS, OWN_SEED, WITHOUT_EFFECT, Settings, Value, determining, differences

COLUMNS = ("epoch", "train_loss", "val_loss", "val_accuracy", "test_accuracy")
TYPES = (int, float, float, float, float)
CHECKSUM = "sha256"  # stands where the name of a setting does
SETTLING_STEPS = 88  # after which the start of running statistics weighs less than 1e-4, with torch's momentum of 0.1
REMEDY = "remove it to start over, or give another --name"


class RunFiles(NamedTuple):
    """The files of a run."""

    results: Path
    best_weights: Path
    checkpoint: Path
    lock: Path


def run_files(path: Path, name: str) -> RunFiles:
    """Where the files of the run `name` are below the folder `path`."""
    networks = path / "networks"
    return RunFiles(
        results=path / "results" / f"{name}.csv",
        best_weights=networks / f"{name}-best.pt",
        checkpoint=networks / f"{name}-last.pt",
        lock=networks / f"{name}.lock",
    )


@dataclass
class Results:
    """What a run has measured.

    Attributes:
        header: the settings and what else produced the numbers, by name.
        columns: an array for each name in `COLUMNS`, an element an epoch. `epoch` counts from 1; the losses are
            cross-entropies, `train_loss` the mean over batches, `val_loss` over images; the accuracies are in percent.
        select: the epoch of `test_accuracy`: "best" is that of the best validation accuracy, "last" the last one.
        checked: whether the file that they were read from, if any, has a checksum.
    """

    header: dict[str, Value]
    columns: dict[str, np.ndarray]
    select: str = "best"
    checked: bool = True

    @property
    def num_epochs(self) -> int:
        """The number of epochs that the run has made so far."""
        return len(self.columns["epoch"])

    @property
    def steps_per_epoch(self) -> int | None:
        """The number of training steps of an epoch; None where the settings do not say how many images there are."""
        settings = DEFAULTS | self.header
        if settings["dataset"] in DATASETS:
            num_train = DATASETS[settings["dataset"]].num_train
        elif noted := re.match(r"([\d,]+) training", str(settings.get("images"))):  # see `ImageSet.numbers`
            num_train = int(noted[1].replace(",", ""))
        else:
            return None
        return math.ceil(num_train / settings["batch_size"])

    @property
    def settling_steps(self) -> int:
        """For how many training steps accuracies say little, as batch norm's running statistics hold their start."""
        return 0 if self.header.get("debias") else self.header.get("settling_steps", SETTLING_STEPS)

    @property
    def settled(self) -> bool:
        """Whether the run has made at least `settling_steps` training steps; True if their number is unknown."""
        steps = self.steps_per_epoch
        return steps is None or self.num_epochs * steps >= self.settling_steps

    @property
    def finished(self) -> bool:
        """Whether the run has made all the epochs it was to make."""
        return self.num_epochs >= self.header.get("num_epochs", math.inf)

    @property
    def best_row(self) -> int:
        """Row of the epoch with the best validation accuracy, the first one on a tie. ValueError without epochs."""
        return int(np.argmax(self.columns["val_accuracy"]))

    @property
    def best_epoch(self) -> int:
        """The epoch with the best validation accuracy, counted from 1."""
        return int(self.columns["epoch"][self.best_row])

    @property
    def val_accuracy(self) -> float:
        """The best validation accuracy, in percent."""
        return float(self.columns["val_accuracy"][self.best_row])

    @property
    def test_accuracy(self) -> float:
        """The headline number: test accuracy in percent at the epoch that `select` says."""
        return float(self.columns["test_accuracy"][-1 if self.select == "last" else self.best_row])


def write_results(file: str | os.PathLike, results: Results) -> None:
    """Write `file` whole or not at all, creating its folder if it is missing. `read_results` gives the same back.

    Raises:
        ValueError: `read_results` would not: see `check_setting`; or the columns are of unequal length.
        OSError: the file cannot be written; an older one is then still there.
    """
    for key, value in results.header.items():
        check_setting(key, value)
    top = [line.encode() for line in header_lines(results.header)]
    rows = zip(*(results.columns[name].tolist() for name in COLUMNS), strict=True)
    texts = (COLUMNS, *(map(repr, row) for row in rows))  # repr: the shortest digits that give the same float back
    lines = [",".join(row).encode() for row in texts]
    lines = [*top, checksum_line([*top, *lines]), *lines]
    write_atomically(file, b"".join(line + b"\n" for line in lines))


def checksum_line(lines: Iterable[bytes]) -> bytes:
    """The line of a result file that holds the SHA-256 of all its other lines, each with its end."""
    digest = hashlib.sha256(b"".join(line + b"\n" for line in lines)).hexdigest()
    return f"# {CHECKSUM}: {digest}".encode()


def read_results(file: str | os.PathLike) -> Results:
    """Read a result file: settings with their types, columns as arrays (`epoch` int64, the others float64).

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it was changed after it was written, or is not a result file.
    """
    header: dict[str, Value] = {}
    rows: list[list[float]] | None = None  # None up to the line of their names
    *lines, rest = Path(file).read_bytes().replace(b"\r\n", b"\n").split(b"\n")
    if rest:
        raise DamagedFileError(f"{file} is not a result file, or cut short: its last line has no end")
    checksums = [line for line in lines if line.startswith(f"# {CHECKSUM}: ".encode())]
    if checksums and checksums != [checksum_line(line for line in lines if line not in checksums)]:
        raise DamagedFileError(f"{file} was changed after it was written: it does not fit its checksum")
    for number, line in enumerate(lines, start=1):
        if line in checksums:
            continue
        try:
            texts = line.decode().split(",")
            if rows is not None:
                rows.append([convert(text) for convert, text in zip(TYPES, texts, strict=True)])
                if rows[-1][0] != len(rows):
                    raise ValueError("not the next epoch")
            elif line.startswith(b"# "):
                key, value = line.decode()[2:].split(": ", 1)
                header[key] = from_text(value)
                check_setting(key, header[key])
            elif tuple(texts) == COLUMNS:
                rows = []
            else:
                raise ValueError("no line of a result file")
        except ValueError:
            raise DamagedFileError(f"{file} is not a result file, or damaged, at line {number}") from None
    if rows is None:
        raise DamagedFileError(f"{file} is not a result file: it has no line '{','.join(COLUMNS)}'")
    columns = zip(*rows, strict=True) if rows else [()] * len(COLUMNS)
    arrays = {name: np.array(c, dtype=kind) for name, c, kind in zip(COLUMNS, columns, TYPES, strict=True)}
    return Results(header, arrays, checked=bool(checksums))


def read_finished(file: Path, settings: Settings) -> Results | None:
    """What is in the result file of a run, None where there is no such file or it has not all epochs yet.

    ValueError where it is damaged, or of a run with other settings.
    """
    if not file.exists():
        return None
    try:
        results = read_results(file)
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}: {REMEDY}") from None
    check_settings(file, results, settings)
    return results if results.num_epochs >= settings.num_epochs else None


def check_settings(file: Path, earlier: Results, settings: Settings) -> None:
    """ValueError, with what differs, where a run with `settings` would not have had the `earlier` results."""
    unlike = differences(earlier.header, determining(settings))
    if settings.scheduler == "none" and "scheduler" not in unlike and settings.num_epochs >= earlier.num_epochs:
        unlike.pop("num_epochs", None)  # without a schedule, the epochs so far do not depend on how many follow
    if unlike:
        listed = "; ".join(f"{name} was {before}, now {now}" for name, (before, now) in unlike.items())
        reasons = {"cos": "the cosine schedule depends on it from the first epoch on"}
        reasons["none"] = f"it has {earlier.num_epochs} epochs already"
        reason = f" ({reasons[settings.scheduler]})" if list(unlike) == ["num_epochs"] else ""
        remedy = "Give another --name, the settings it had, or --restart to start over"
        raise ValueError(f"{file} is of a run with other settings: {listed}{reason}. {remedy}")


def check_setting(key: str, value: Value) -> None:
    """ValueError if `key` is not an identifier, or the checksum's; or if `value` is not of the type of this setting."""
    if not key.isidentifier() or key == CHECKSUM:
        raise ValueError(f"the name of a setting must be an identifier other than {CHECKSUM}, not {key!r}")
    if not isinstance(value, Value):
        raise ValueError(f"a setting must be text, a number, a bool or None, not {value!r}")
    default = None if key in WITHOUT_EFFECT or (key, value) == ("split_seed", OWN_SEED) else DEFAULTS.get(key)
    like_default = type(value) in (int, float) if isinstance(default, float) else type(value) is type(default)
    if default is not None and not like_default:
        raise ValueError(f"the setting {key} must be like {default!r}, not {value!r}")


def header_lines(header: Mapping[str, Value]) -> list[str]:
    """A header as the lines of a file."""
    return [f"# {name}: {to_text(value)}" for name, value in header.items()]


def read_header(lines: Iterable[str]) -> dict[str, Value]:
    """The header in the lines of a file, of which others are passed over."""
    texts = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# ") and ": " in line)
    return {name: from_text(text) for name, text in texts.items()}


def to_text(value: Value) -> str:
    """A setting's value in the file: JSON, but text stands without quotes where it reads back as the same text."""
    if isinstance(value, str) and value and value.isprintable() and value == value.strip() == from_text(value):
        return value
    return json.dumps(value)


def from_text(text: str) -> Value:
    """The setting that `to_text` wrote."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def unsettled(steps: int, settling_steps: int) -> str:
    """What to know of accuracies after so few training steps."""
    start = f"batch norm's running statistics still hold what they started from, for about {settling_steps} steps"
    return f"{steps} steps: {start}, and accuracies say little; --debias evaluates without that"
