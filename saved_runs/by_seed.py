"""The finished runs of a method by seed, read from their result files, and whether they can be compared."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import run_settings
from saved_runs.results import Results, read_results, unsettled

IDENTITIES = {"network_code": "network's code", "image_hash": "images"}  # by the name of the hash in a header
CIRCUMSTANCES = ("images", "machine", "python", "torch", "torchvision")  # what else may change the numbers


def accuracy_by_seed(runs: Mapping[int, Results]) -> dict[int, float]:
    """The test accuracy of each run, in percent, at the epoch that `Results.select` says."""
    return {seed: run.test_accuracy for seed, run in runs.items()}


def read_by_seed(files: Iterable[Path], group: str, select: str = "best") -> dict[int, Results]:
    """Read the finished runs of one method, by seed.

    Args:
        files: their result files.
        group: what error messages call these files together.
        select: which epoch's test accuracy counts, "best" or "last".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is damaged or of an unfinished run, two have the same seed, or their settings differ.
    """
    runs: dict[int, Results] = {}
    for file in files:
        run = replace(read_results(file), select=select)
        seed, num_epochs = run.header.get("seed"), run.header.get("num_epochs")
        if not isinstance(seed, int) or not isinstance(num_epochs, int):
            raise ValueError(f"{file} does not say with which seed and num_epochs it was made")
        if not run.finished:
            raise ValueError(f"{file} is of an unfinished run: {run.num_epochs} of {num_epochs} epochs")
        check_alike(run, next(iter(runs.values()), run), f"{file} and the first file of {group}", apart_from=())
        if seed in runs:
            raise ValueError(f"{file} has seed {seed}, and so has another file of {group}: give one file for each seed")
        runs[seed] = run
    return runs


def read_plain(file: Path) -> tuple[dict[int, float], bool] | None:
    """Accuracies by seed, or else by line, and whether they are by seed; None where a file is not about them.

    Such a file has columns with a first line of names, `accuracy` and perhaps `seed` among them; or a number a line.
    ValueError where one of the numbers is wrong.
    """
    text = file.read_bytes().decode("utf-8-sig", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    names = [name.strip(' "') for name in lines[0].split(",")]
    if not (lines[1:] if "accuracy" in names else re.fullmatch(r"\s*[\d.]+\s*", lines[0])):
        return None
    columns = [names.index(name) for name in ("seed", "accuracy") if name in names] or None
    try:
        if len({line.count(",") for line in lines}) > 1:
            raise ValueError("not all lines have as many columns")
        numbers = np.loadtxt(lines[bool(columns) :], delimiter=",", usecols=columns, ndmin=2, quotechar='"')
        seeds = numbers[:, 0] if "seed" in names else np.arange(1, len(numbers) + 1)
        accuracies = dict(zip(map(int, seeds), numbers[:, -1].tolist(), strict=True))
        if sorted(accuracies) != sorted(seeds) or not np.isfinite(numbers).all():
            raise ValueError("there must be one finite number for each seed")
    except ValueError as error:
        raise ValueError(f"{file}: {str(error).partition(' at row')[0]}") from None
    return accuracies, "seed" in names


def check_alike(one: Results, other: Results, which: str, apart_from: Sequence[str] = run_settings.COMPARED) -> None:
    """ValueError, with all that differs, where two runs differ in a setting other than the seed and `apart_from`.

    `which` is what the message calls the two runs.
    """
    unlike = run_settings.differences(one.header, other.header, apart_from=("seed", *apart_from))
    if unlike:
        listed = "; ".join(f"{name} {ours} and {theirs}" for name, (ours, theirs) in sorted(unlike.items()))
        more = f" in more than {', '.join(apart_from)}" if apart_from else ""
        raise ValueError(f"{which} differ{more}: {listed}")


def notes_on(runs: Iterable[Results]) -> list[str]:
    """What to know of runs that are compared: that the last epoch counts, missing checksums, what is not the same.

    Where code or images differ, of which the header has a hash, the line names the runs that differ from most: these
    numbers are not of the same thing. With other `CIRCUMSTANCES`, the test is sound, but less sharp.
    """
    runs, lines = list(runs), []
    if any(run.select == "last" for run in runs):
        lines.append("The test accuracies are those of the last epoch.")
    if missing := sum(not run.checked for run in runs):
        lines.append(f"{missing} of {len(runs)} result files have no checksum to compare their numbers with")
    for key, what in IDENTITIES.items():
        known = [run for run in runs if key in run.header]  # older files have none
        usual = Counter(run.header[key] for run in known).most_common(1)
        others = [str(run.header.get("name")) for run in known if run.header[key] != usual[0][0]]
        lines += [f"not of the same {what} as the other runs: {', '.join(others)}"] if others else []
    found = {name: sorted({str(run.header.get(name)) for run in runs}) for name in CIRCUMSTANCES}
    several = {name: values for name, values in found.items() if len(values) > 1}
    return lines + [f"not all runs have the same {name}: {'; '.join(values)}" for name, values in several.items()]


def note_unsettled(runs: Iterable[Results]) -> list[str]:
    """A line where some of the runs are so short that batch norm's running statistics have not settled."""
    shortest = min((run for run in runs if not run.settled), key=lambda run: run.num_epochs, default=None)
    if shortest is None:
        return []
    return [f"runs of {unsettled(shortest.num_epochs * shortest.steps_per_epoch, shortest.settling_steps)}"]
