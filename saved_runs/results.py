"""The results of a run and their file.

It is CSV: the run's settings as `# key: value` lines, then its numbers, one line an epoch. The last of the `#` lines
holds the SHA-256 of all other lines, so that a changed number is noticed; older files lack it.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from command_line.files import DamagedFileError, read_file, write_atomically
from run_settings import DATASETS, DEFAULTS, OWN_SEED, WITHOUT_EFFECT, Value

COLUMNS = ("epoch", "train_loss", "val_loss", "val_accuracy", "test_accuracy")
CHECKSUM = "sha256"  # stands where the name of a setting does
SETTLED = 100  # training steps after which running statistics have forgotten where they started
UNSETTLED = f"for about {SETTLED} steps, batch norm's running statistics have not settled, and accuracies say little"


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
    def finished(self) -> bool:
        """Whether the run has made all the epochs it was to make."""
        return self.has_made(self.header.get("num_epochs", math.inf))

    def has_made(self, num_epochs: float) -> bool:
        """Whether a run of that many epochs would be finished with this."""
        return self.num_epochs >= num_epochs

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
        ValueError: the results cannot have come from a run; see `format_results`.
        OSError: the file cannot be written; an older one is then still there.
    """
    write_atomically(file, format_results(results))


def format_results(results: Results) -> bytes:
    """What the result file holds.

    ValueError where the results cannot have come from a run: the name of a setting is not an identifier or its value
    not of its kind (see `check_setting`), the columns are not those of `COLUMNS`, of equal length, or a row is
    impossible (see `check_row`).
    """
    if set(results.columns) != set(COLUMNS):
        raise ValueError(f"columns must be {', '.join(COLUMNS)}, not {', '.join(results.columns)}")
    for key, value in results.header.items():
        check_setting(key, value)
    header = [line.encode() for line in header_lines(results.header)]
    lines = [",".join(COLUMNS).encode()]
    rows = zip(*(results.columns[name].tolist() for name in COLUMNS), strict=True)
    for number, row in enumerate(rows, start=1):
        check_row(row, number, results.header)
        lines.append(",".join(map(repr, row)).encode())  # repr: the shortest digits that give the same float back
    lines = [*header, checksum_line([*header, *lines]), *lines]
    return b"".join(line + b"\n" for line in lines)


def checksum_line(lines: Iterable[bytes]) -> bytes:
    """The line of a result file that holds the SHA-256 of all its other lines, each with its end."""
    digest = hashlib.sha256(b"".join(line + b"\n" for line in lines)).hexdigest()
    return f"# {CHECKSUM}: {digest}".encode()


def read_results(file: str | os.PathLike) -> Results:
    """Read a result file: settings with their types, columns as arrays (`epoch` int64, the others float64).

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it was changed after it was written, or what is in it cannot have come from a run.
    """
    settings: dict[str, Value] = {}
    header = None
    rows = []
    *lines, rest = read_file(file).replace(b"\r\n", b"\n").split(b"\n")
    if rest:
        raise DamagedFileError(f"{file} is not a result file, or cut short: its last line has no end")
    checksums = [line for line in lines if line.startswith(f"# {CHECKSUM}: ".encode())]
    if checksums and checksums != [checksum_line(line for line in lines if line not in checksums)]:
        raise DamagedFileError(f"{file} was changed after it was written: it does not fit its checksum")
    for number, line in enumerate(lines, start=1):
        if line in checksums:
            continue
        try:
            line = line.decode()
            if header is None and line.startswith("# "):
                key, value = line[2:].split(": ", 1)
                settings[key] = from_text(value)
                check_setting(key, settings[key])
            elif header is None:
                header = tuple(line.split(","))
                if header != COLUMNS:
                    raise ValueError
            else:
                if not re.fullmatch(r"\d{1,18}(,-?\d[\d.e+-]*)+", line, re.ASCII):
                    raise ValueError
                epoch, *numbers = line.split(",")
                rows.append((int(epoch), *map(float, numbers)))
                check_row(rows[-1], len(rows), settings)
        except ValueError:
            raise DamagedFileError(f"{file} is not a result file, or damaged, at line {number}") from None
    if header is None:
        raise DamagedFileError(f"{file} is not a result file: it has no line '{','.join(COLUMNS)}'")
    columns = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
    types = [np.int64] + [np.float64] * (len(COLUMNS) - 1)
    arrays = {name: np.array(c, dtype=t) for name, c, t in zip(COLUMNS, columns, types, strict=True)}
    return Results(settings, arrays, checked=bool(checksums))


def check_setting(key: str, value: Value) -> None:
    """ValueError where `key` is no identifier or that of the checksum, or `value` not what this flag can have."""
    if not key.isidentifier() or key == CHECKSUM:
        raise ValueError(f"the name of a setting must be an identifier other than {CHECKSUM}, not {key!r}")
    if not isinstance(value, Value):
        raise ValueError(f"a setting must be text, a number, a bool or None, not {value!r}")
    default = DEFAULTS.get(key)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return
    if (key, value) == ("split_seed", OWN_SEED):
        return
    if default is not None and type(value) is not type(default) and key not in WITHOUT_EFFECT:
        raise ValueError(f"the setting {key} must be like {default!r}, not {value!r}")


def check_row(row: Sequence[float], number: int, settings: Mapping[str, Value]) -> None:
    """ValueError where a run with these settings cannot have had these numbers (of `COLUMNS`) in epoch `number`."""
    epoch, *losses, val_accuracy, test_accuracy = row
    possible = (
        len(row) == len(COLUMNS)
        and type(epoch) is int
        and all(type(value) in (int, float) for value in row)
        and epoch == number <= settings.get("num_epochs", number)
        and all(0 <= loss < math.inf for loss in losses)
        and 0 <= val_accuracy <= 100
        and 0 <= test_accuracy <= 100
    )
    if not possible:
        raise ValueError(f"these cannot be the numbers of epoch {number}: {', '.join(map(repr, row))}")


def header_lines(settings: Mapping[str, Value]) -> list[str]:
    """The lines by which a file says its settings."""
    return [f"# {name}: {to_text(value)}" for name, value in settings.items()]


def read_header(lines: Iterable[str]) -> dict[str, Value]:
    """The settings in the lines of a file, of which others are passed over."""
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
