"""The result file: the settings of a run as `# key: value` lines, then its numbers, one line an epoch, as CSV."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

COLUMNS = ("epoch", "train_loss", "val_loss", "val_accuracy", "test_accuracy")

Setting = str | int | float | bool | None


@dataclass
class Results:
    """What a run has measured.

    Attributes:
        settings: the flags and what else produced the numbers, by name.
        columns: an array for each name in `COLUMNS`, an element an epoch. `epoch` counts from 1; the losses are
            cross-entropies, `train_loss` the mean over batches, `val_loss` over images; the accuracies are in percent.
    """

    settings: dict[str, Setting]
    columns: dict[str, np.ndarray]

    @property
    def num_epochs(self) -> int:
        """The number of epochs that the run has made so far."""
        return len(self.columns["epoch"])

    @property
    def finished(self) -> bool:
        """Whether the run has made all the epochs it was to make."""
        return self.num_epochs >= self.settings["num_epochs"]

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
        """The headline number: test accuracy in percent at the epoch of the best validation accuracy."""
        return float(self.columns["test_accuracy"][self.best_row])


def write_results(file: str | os.PathLike, results: Results) -> None:
    """Write `file` whole or not at all, creating its folder where it is missing. `read_results` gives the same back.

    Raises:
        ValueError: a setting's name is not an identifier, its value is not a plain one (text, number, bool, None), or
            the columns are not those of `COLUMNS`, of equal length.
        OSError: the file cannot be written; an older one is then still there.
    """
    if set(results.columns) != set(COLUMNS):
        raise ValueError(f"columns must be {', '.join(COLUMNS)}, not {', '.join(results.columns)}")
    lines = [f"# {check_key(key)}: {to_text(value)}" for key, value in results.settings.items()]
    lines.append(",".join(COLUMNS))
    for row in zip(*(results.columns[name].tolist() for name in COLUMNS), strict=True):
        lines.append(",".join(map(repr, row)))  # repr: the shortest digits that give the same float back
    write_atomically(file, ("\n".join(lines) + "\n").encode())


def read_results(file: str | os.PathLike) -> Results:
    """Read a result file: settings with their types, columns as arrays (`epoch` int64, the others float64).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a result file, or damaged; the message names the line.
    """
    settings: dict[str, Setting] = {}
    header = None
    rows = []
    *lines, rest = Path(file).read_bytes().replace(b"\r\n", b"\n").split(b"\n")
    if rest:
        raise ValueError(f"{file} is not a result file, or cut short: its last line has no end")
    for number, line in enumerate(lines, start=1):
        try:
            line = line.decode()
            if header is None and line.startswith("# "):
                key, value = line[2:].split(": ", 1)
                settings[check_key(key)] = from_text(value)
            elif header is None:
                header = tuple(line.split(","))
                if header != COLUMNS:
                    raise ValueError
            else:
                epoch, *numbers = line.split(",")
                rows.append((int(epoch), *map(float, numbers)))
                if len(rows[-1]) != len(COLUMNS):
                    raise ValueError
        except ValueError:
            raise ValueError(f"{file} is not a result file, or damaged, at line {number}") from None
    if header is None:
        raise ValueError(f"{file} is not a result file: it has no line '{','.join(COLUMNS)}'")
    columns = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
    types = [np.int64] + [np.float64] * (len(COLUMNS) - 1)
    return Results(settings, {name: np.array(c, dtype=t) for name, c, t in zip(COLUMNS, columns, types, strict=True)})


def check_key(key: str) -> str:
    """`key`, or ValueError where it could not be told from its value in the file."""
    if not key.isidentifier():
        raise ValueError(f"the name of a setting must be an identifier, not {key!r}")
    return key


def to_text(value: Setting) -> str:
    """A setting's value in the file: JSON, but text stands without quotes where it reads back as the same text."""
    if not isinstance(value, Setting):
        raise ValueError(f"a setting must be text, a number, a bool or None, not {value!r}")
    if isinstance(value, str) and value and value.isprintable() and value == value.strip() == from_text(value):
        return value
    return json.dumps(value)


def from_text(text: str) -> Setting:
    """The setting that `to_text` wrote."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def write_atomically(file: str | os.PathLike, content: bytes) -> None:
    """Put `content` into `file` so that at any moment, a crash included, it holds all the old or all the new.

    A file that holds it already is left alone, so that nothing fails where there is nothing to do.
    """
    file = Path(file)
    if file.exists() and file.stat().st_size == len(content) and file.read_bytes() == content:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp")  # one name: what a crash leaves behind, the next write takes over
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError as error:  # of a full disk, Python does not say which file it was
        raise OSError(error.errno, f"cannot write it: {error.strerror or error}", str(file)) from error
    finally:
        temporary.unlink(missing_ok=True)
