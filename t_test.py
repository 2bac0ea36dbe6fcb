"""The paper's test of significance: a one-sided paired t-test over seeds.

    python t_test.py --proposed results/*-weight0.1-c100-bn-*.csv --baseline results/*-weight1-c1-dataset-*.csv

`evaluate` is the test itself; the rest pairs runs by their seeds and puts what comes out into a table.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_rel

from results import Results, read_results

LEVEL = 0.05  # a p-value of at most this much is called significant
COMPARED = ("bn_weight", "c", "input_norm")  # the settings that the paper compares
CIRCUMSTANCES = ("machine", "python", "torch", "torchvision")  # what else may change the numbers

EXPERIMENT = {  # what the paper compares, by name
    "baseline": (1.0, 1.0, "dataset"),
    "proposed": (0.1, 100.0, "bn"),
    "init": (0.1, 1.0, "bn"),
    "rate": (1.0, 100.0, "bn"),
    "input": (1.0, 1.0, "bn"),
}


def evaluate(d1: Any, d2: Any) -> float:
    """p-value of the one-sided paired t-test that the mean of `d1` is greater than the mean of `d2`.

    The paper calls a gain significant where the p-value is at most 0.05.

    Args:
        d1: n numbers, such as the test accuracies of the proposed method: a list, an array, or a tensor on any device.
        d2: n numbers that pair with them, such as the baseline's accuracies with the same seeds.

    Returns:
        The p-value, between 0 and 1. Where `d1` and `d2` are identical there is nothing to test: it is NaN, which no
        comparison with 0.05 takes for significant. Where all differences are equal but not 0, it is 0 or 1, and
        scipy warns that the data have no spread.

    Raises:
        ValueError: the lengths differ, there are fewer than two pairs, an input does not have exactly one dimension,
            or a value is missing (NaN) or infinite.
    """
    d1, d2 = as_vector(d1, "d1"), as_vector(d2, "d2")
    if len(d1) != len(d2):
        raise ValueError(f"a paired test needs as many values in d1 as in d2, not {len(d1)} and {len(d2)}")
    if len(d1) < 2:
        raise ValueError(f"a paired test needs at least two pairs, not {len(d1)}")
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(ttest_rel(d1, d2, alternative="greater").pvalue)


def as_vector(values: Any, name: str) -> np.ndarray:
    """`values` as a float64 array of one dimension; ValueError, naming `name`, where that cannot be."""
    if hasattr(values, "detach"):  # a tensor: recognized without importing torch, which takes seconds
        values = values.detach().cpu().double()
    try:
        vector = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a sequence of numbers: {error}") from None
    if vector.ndim != 1:
        raise ValueError(f"{name} must have one dimension, not {vector.ndim}")
    if not np.isfinite(vector).all():
        raise ValueError(f"{name} holds a value that is not a finite number")
    return vector


@dataclass
class Comparison:
    """One setting beside the baseline, seed by seed.

    Attributes:
        setting: what it is called.
        accuracies: its test accuracies in percent, by seed.
        differences: what they exceed the baseline's by, by seed, for the seeds that both have.
        interval: the 95 % confidence interval of the mean difference, two-sided; NaN for fewer than two pairs.
        p_value: of `evaluate`; NaN for fewer than two pairs, and where all differences are equal.
        corrected_p_value: the same after Holm's correction over all comparisons that were made with it.
    """

    setting: str
    accuracies: dict[int, float]
    differences: dict[int, float]
    interval: tuple[float, float]
    p_value: float
    corrected_p_value: float = nan

    @property
    def mean(self) -> float:
        """Mean of the accuracies."""
        return float(np.mean(list(self.accuracies.values()))) if self.accuracies else nan

    @property
    def deviation(self) -> float:
        """Sample standard deviation of the accuracies."""
        return float(np.std(list(self.accuracies.values()), ddof=1)) if len(self.accuracies) > 1 else nan

    @property
    def difference(self) -> float:
        """Mean of the differences."""
        return float(np.mean(list(self.differences.values()))) if self.differences else nan

    @property
    def improved(self) -> int:
        """The number of seeds with a better accuracy than the baseline's."""
        return sum(difference > 0 for difference in self.differences.values())

    @property
    def verdict(self) -> str:
        """What the corrected p-value says at the level of 0.05, or why there is none."""
        if len(self.differences) < 2:
            return f"no test: it takes two pairs with the baseline, not {len(self.differences)}"
        if np.isnan(self.p_value):
            return "no test: all differences are equal"
        return "significantly better" if self.corrected_p_value <= LEVEL else "not significant"


def compare(setting: str, proposed: Mapping[int, float], baseline: Mapping[int, float]) -> Comparison:
    """Pair the test accuracies (percent, by seed) of a setting with the baseline's, and test the difference.

    `corrected_p_value` is left NaN: it depends on the other comparisons, see `correct`.
    """
    seeds = sorted(proposed.keys() & baseline.keys())
    ours, theirs = [proposed[seed] for seed in seeds], [baseline[seed] for seed in seeds]
    differences = {seed: a - b for seed, a, b in zip(seeds, ours, theirs, strict=True)}
    interval, p_value = (nan, nan), nan
    if len(seeds) > 1 and np.ptp(list(differences.values())) > 1e-9:  # without spread, a t-test would claim anything
        p_value = evaluate(ours, theirs)
        interval = tuple(map(float, ttest_rel(ours, theirs).confidence_interval(0.95)))
    return Comparison(setting, dict(proposed), differences, interval, p_value)


def correct(comparisons: Iterable[Comparison]) -> None:
    """Set the p-values after Holm's step-down correction for the number of comparisons.

    With m comparisons, the k-th smallest p-value is multiplied by m + 1 - k, and is at least as large as the
    corrected value before it. Those with fewer than two pairs do not count.
    """
    made = [c for c in comparisons if len(c.differences) > 1]
    largest = 0.0
    for rank, comparison in enumerate(sorted(made, key=lambda c: np.nan_to_num(c.p_value, nan=1.0))):
        largest = max(largest, min(1.0, (len(made) - rank) * comparison.p_value))
        comparison.corrected_p_value = largest if comparison.p_value == comparison.p_value else nan


def accuracies(runs: Mapping[int, Results]) -> dict[int, float]:
    """The test accuracy (percent) of each seed, at the epoch of its best validation accuracy."""
    return {seed: run.test_accuracy for seed, run in runs.items()}


def compare_all(runs: Mapping[str, Mapping[int, Results]]) -> list[Comparison]:
    """Every setting beside the one called 'baseline', with p-values corrected for the number of comparisons."""
    baseline = accuracies(runs.get("baseline", {}))
    comparisons = [compare(name, accuracies(of), {} if name == "baseline" else baseline) for name, of in runs.items()]
    correct(comparisons)
    return comparisons


HEADER = (
    *("setting", "seeds", "test accuracy (%)", "pairs", "difference", "95 % interval"),
    *("p", "p (Holm)", "improved", "verdict"),
)
SHORT = tuple(name for name in HEADER if name not in ("pairs", "95 % interval", "improved", "verdict"))


def table(comparisons: Sequence[Comparison], columns: Sequence[str] = HEADER, baseline: str = "baseline") -> str:
    """The comparisons as a table in Markdown, whose columns are aligned. The baseline has no comparison."""
    rows = [dict(zip(columns, columns, strict=True))]
    for c in comparisons:
        row = {"setting": c.setting, "seeds": f"{len(c.accuracies)}"}
        row["test accuracy (%)"] = f"{c.mean:.2f} ± {c.deviation:.2f}".replace("nan", "–")
        if c.setting != baseline:
            numbers = {"difference": f"{c.difference:+.2f}", "95 % interval": "{:+.2f} to {:+.2f}".format(*c.interval)}
            numbers |= {"p": f"{c.p_value:.2g}", "p (Holm)": f"{c.corrected_p_value:.2g}"}
            row |= {name: "–" if "nan" in number else number for name, number in numbers.items()}
            pairs = len(c.differences)
            row |= {"pairs": f"{pairs}", "improved": f"{c.improved} of {pairs}", "verdict": c.verdict}
        rows.append(row)
    widths = {name: max(len(row.get(name, "")) for row in rows) for name in columns}
    rows.insert(1, {name: "-" * width for name, width in widths.items()})
    return "\n".join(f"| {' | '.join(row.get(name, '').ljust(widths[name]) for name in columns)} |" for row in rows)


def by_seed(files: Iterable[Path], of: str) -> dict[int, Results]:
    """Read the result files of one setting. ValueError where they are not runs of one setting with distinct seeds."""
    runs: dict[int, Results] = {}
    for file in files:
        run = read_results(file)
        seed, epochs = run.settings.get("seed"), run.settings.get("num_epochs")
        if seed is None or epochs is None:
            raise ValueError(f"{file} does not say with which seed and num_epochs it was made")
        if len(run.columns["epoch"]) < epochs:
            raise ValueError(f"{file} is of an unfinished run: {len(run.columns['epoch'])} of {epochs} epochs")
        if seed in runs:
            raise ValueError(f"{file} has seed {seed}, and so has another file of {of}: give one file a seed")
        check_alike(run, next(iter(runs.values()), run), f"{file} and the first file of {of}", apart_from=())
        runs[seed] = run
    return runs


def check_alike(one: Results, other: Results, of: str, apart_from: Sequence[str] = COMPARED) -> None:
    """ValueError, with what differs, where two runs have other settings than their seed and `apart_from` unlike."""
    names = (one.settings | other.settings).keys() - {"name", "seed", "seconds", "device", *CIRCUMSTANCES, *apart_from}
    unlike = [name for name in sorted(names) if one.settings.get(name) != other.settings.get(name)]
    if unlike:
        listed = "; ".join(f"{name} {one.settings.get(name)} and {other.settings.get(name)}" for name in unlike)
        more = f" in more than {', '.join(apart_from)}" if apart_from else ""
        raise ValueError(f"{of} differ{more}: {listed}")


def mixed_circumstances(runs: Iterable[Results]) -> list[str]:
    """A line for each of `CIRCUMSTANCES` in which the runs are not all alike: the test is sound, but less sharp."""
    runs = list(runs)
    found = {name: sorted({str(run.settings.get(name)) for run in runs}) for name in CIRCUMSTANCES}
    return [f"not all runs have the same {name}: {'; '.join(values)}" for name, values in found.items() if values[1:]]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: compare two groups of result files. Exit code 1 where they cannot be compared."""
    parser = argparse.ArgumentParser(description="One-sided paired t-test over the seeds of result files.")
    add = parser.add_argument
    add("--proposed", nargs="+", type=Path, required=True, metavar="FILE", help="result files, one a seed")
    add("--baseline", nargs="+", type=Path, required=True, metavar="FILE", help="those they shall be better than")
    args = parser.parse_args(argv)
    try:
        proposed, baseline = by_seed(args.proposed, "--proposed"), by_seed(args.baseline, "--baseline")
        first, second = next(iter(proposed.values())), next(iter(baseline.values()))
        check_alike(first, second, "the files of --proposed and --baseline")
    except (OSError, ValueError) as error:
        print(f"t_test.py: error: {error}", file=sys.stderr)
        sys.exit(1)
    print(table(compare_all({"baseline": baseline, "proposed": proposed})))
    for line in mixed_circumstances([*proposed.values(), *baseline.values()]):
        print(line)
    alone = sorted(proposed.keys() ^ baseline.keys())
    if alone:
        print(f"seeds without a partner, which do not count: {', '.join(map(str, alone))}")


if __name__ == "__main__":
    main()
