"""The paper's test of significance: a one-sided paired t-test over seeds.

    python t_test.py --proposed results/*-weight0.1-c100-bn-seed*.csv --baseline results/*-weight1-c1-dataset-seed*.csv

`evaluate` is the test itself; the rest pairs runs by their seeds, and corrects for the number of comparisons.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from math import nan
from numbers import Real
from pathlib import Path
from typing import Any

import run_settings
from command_line.endings import answer_at_once, one_line, one_line_endings, say
from command_line.flag_types import Parser


def make_parser() -> Parser:
    """The flags of the command."""
    parser = Parser(prog="t_test.py", description=__doc__.rpartition("\n\n")[0])
    flag = parser.add_argument
    flag("--proposed", nargs="+", type=Path, required=True, metavar="FILE", help="result files, or one of accuracies")
    flag("--baseline", nargs="+", type=Path, required=True, metavar="FILE", help="those to compare with")
    selection_help = "test accuracy at the epoch of the best validation accuracy, or at the last (default: %(default)s)"
    flag("--select", default="best", choices=run_settings.SELECTIONS, help=selection_help)
    return parser


if __name__ == "__main__":
    answer_at_once("t_test.py", make_parser().parse_args)  # before numpy and scipy are imported

import numpy as np
from scipy.stats import ttest_rel

from reporting.comparison import Comparison, is_contrast
from reporting.tables import tables, without_tables
from saved_runs.by_seed import accuracy_by_seed, check_alike, note_unsettled, notes_on, read_by_seed, read_plain
from saved_runs.results import Results

REAL = Real | Decimal | np.bool_ | None  # what an array of objects may hold
HALF_UNITS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}  # relative; of all others, as of float64


def evaluate(d1: Any, d2: Any) -> float:
    """p-value of the one-sided paired t-test that the mean of `d1` is greater than the mean of `d2`.

    The paper calls a gain significant where the p-value is at most 0.05.

    Args:
        d1: n numbers, such as the test accuracies of the proposed method: a list of numbers or of tensors, an array, a
            tensor on any device, or a pandas Series.
        d2: n numbers that pair with them by position, such as the baseline's accuracies with the same seeds. Two
            Series must have the same labels in the same order.

    Returns:
        The p-value, between 0 and 1; NaN, which is never at most 0.05, where all differences are equal, or differ by no
        more than the rounding of the values' own types: 0.1 as float32 is 0.1 as float64.

    Raises:
        ValueError: the lengths or the labels differ, there are fewer than two pairs, an input does not have exactly
            one dimension, or a value is missing (NaN or masked), infinite, or no real number.
    """
    indices = [getattr(values, "index", None) for values in (d1, d2)]  # of a list, it is a method
    if all(hasattr(index, "equals") for index in indices) and not indices[0].equals(indices[1]):
        raise ValueError("d1 and d2 have different labels: align them first, as Series by d1.align(d2, join='inner')")
    (d1, rounding1), (d2, rounding2) = as_vector(d1, "d1"), as_vector(d2, "d2")
    if len(d1) != len(d2):
        raise ValueError(f"a paired test needs as many values in d1 as in d2, not {len(d1)} and {len(d2)}")
    if len(d1) < 2:
        raise ValueError(f"a paired test needs at least two pairs, not {len(d1)}")
    _, exponent = np.frexp(np.abs([d1, d2]).max())
    d1, d2 = np.ldexp(d1, -exponent), np.ldexp(d2, -exponent)  # exact; now no square is too small or too large
    if np.ptp(d1 - d2) <= 2 * (rounding1 * np.abs(d1).max() + rounding2 * np.abs(d2).max()):
        return nan
    return float(ttest_rel(d1, d2, alternative="greater").pvalue)


def as_vector(values: Any, name: str) -> tuple[np.ndarray, float]:
    """`values` as a float64 array of one dimension, and how far rounding may have moved one, relative to it.

    ValueError, naming `name`, where that cannot be.
    """
    if np.ma.is_masked(values):
        raise ValueError(f"{name} holds a masked value")
    try:
        numbers, rounding = plain_numbers(values)
        vector = np.asarray(numbers)
        if vector.dtype.kind not in "biufO" or not all(isinstance(value, REAL) for value in vector.flat):
            raise TypeError(f"this is a {type(values).__name__} of {vector.dtype}")
        vector = vector.astype(np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last of tensors that are not dense
        raise ValueError(f"{name} must be a list or an array of real numbers: {error}") from None
    if vector.ndim != 1:
        raise ValueError(f"{name} must have one dimension, not {vector.ndim}")
    if not np.isfinite(vector).all():
        raise ValueError(f"{name} holds a value that is not a finite number")
    return vector, rounding


def plain_numbers(values: Any) -> tuple[Any, float]:
    """The numbers of a tensor, or of those in a list, and their rounding: half a unit of the coarsest type, and more.

    A tensor is told without an import of torch, which takes seconds.
    """
    if isinstance(values, list | tuple):
        numbers, roundings = zip(*map(plain_numbers, values), strict=True) if values else ((), (0.0,))
        return numbers, max(roundings)
    name = str(getattr(values, "dtype", "")).lower().removeprefix("torch.")
    return values.tolist() if hasattr(values, "detach") else values, HALF_UNITS.get(name, 2.0**-53) + 2.0**-52


def compare(method: str, proposed: Mapping[int, float], baseline: Mapping[int, float]) -> Comparison:
    """Pair the test accuracies (percent, by seed) of a method with the baseline's, and test the difference.

    `corrected_p_value` is left NaN, because it depends on the other comparisons: see `apply_holm_correction`.
    """
    proposed, baseline = dict(proposed), dict(baseline)  # which a pandas.Series by seed may be, too
    seeds = sorted(proposed.keys() & baseline.keys())
    ours, theirs = [proposed[seed] for seed in seeds], [baseline[seed] for seed in seeds]
    differences = {seed: a - b for seed, a, b in zip(seeds, ours, theirs, strict=True)}
    p_value = evaluate(ours, theirs) if len(seeds) > 1 else nan
    interval = (nan, nan) if np.isnan(p_value) else ttest_rel(ours, theirs).confidence_interval(0.95)
    return Comparison(method, proposed, differences, tuple(map(float, interval)), p_value)


def apply_holm_correction(comparisons: Iterable[Comparison]) -> None:
    """Set each `corrected_p_value`, by Holm's step-down correction for the number of comparisons.

    Of m comparisons, the k-th smallest p-value is multiplied by m + 1 - k; it becomes at most 1 and at least the
    corrected value before it. One without a p-value counts as if it were 1.
    """
    tested = [c for c in comparisons if c.reference is not None]
    largest = 0.0
    for rank, comparison in enumerate(sorted(tested, key=lambda c: np.nan_to_num(c.p_value, nan=1.0))):
        largest = max(largest, min(1.0, (len(tested) - rank) * comparison.p_value))
        comparison.corrected_p_value = nan if np.isnan(comparison.p_value) else largest


def compare_all(
    runs: Mapping[str, Mapping[int, Results]], planned: int = 0, contrasts: Iterable[Sequence[str]] = ()
) -> list[Comparison]:
    """Compare every method with the one called 'baseline', if it is there, and the contrasts; corrected for them all.

    Args:
        runs: the finished runs by method and seed.
        planned: how many seeds are planned; until all are there, the verdict is "interim".
        contrasts: pairs of methods, of which the first is tested to be better than the second.

    Returns:
        A comparison for each method, in the same order, then one for each contrast. `reference` is None where
        there is nothing to compare with.
    """
    accuracies = {name: accuracy_by_seed(seeds) for name, seeds in runs.items()}
    others = ((name, "baseline" if name != "baseline" and "baseline" in runs else None) for name in runs)
    comparisons = []
    for one, other in (*others, *contrasts):
        c = replace(compare(one, accuracies[one], accuracies.get(other, {})), planned=planned, reference=other)
        c.settled = all(run.settled for method in (one, other) for run in runs.get(method, {}).values())
        comparisons.append(replace(c, method=f"{one} vs {other}", accuracies={}) if is_contrast(c) else c)
    apply_holm_correction(comparisons)
    return comparisons


def report(proposed_files: Sequence[Path], baseline_files: Sequence[Path], select: str = "best") -> str:
    """The tables of two groups of result files, or of two files for `read_plain`, and what to know about their pairs.

    ValueError where they cannot be compared.
    """
    files = [*proposed_files, *baseline_files]
    plain = list(map(read_plain, files)) if len(files) == 2 else []
    if None in plain and any(plain):
        what = "CSV with the columns seed and accuracy, or one number a line"
        raise ValueError(f"{files[plain.index(None)]} is not of accuracies, as the other file is: {what}")
    if any(plain):
        (proposed, by_seed), (baseline, also_by_seed) = plain
        if by_seed != also_by_seed or not (by_seed or len(proposed) == len(baseline)):
            raise ValueError(f"{files[0]} and {files[1]} need a column seed in both, or as many lines, to be paired")
        for file, accuracies in zip(files, (proposed, baseline), strict=True):
            if not 1 < max(accuracies.values()) <= 100:
                raise ValueError(f"{file} must have percent, with one above 1 and none above 100")
        if select != "best":
            raise ValueError("argument --select: files of accuracies have no epochs: leave it out")
        comparisons = [compare("baseline", baseline, {}), compare("proposed", proposed, baseline)]
        comparisons[0].reference = None
        apply_holm_correction(comparisons)
        lines = [] if by_seed else ["paired by line"]
    else:
        proposed = read_by_seed(proposed_files, "--proposed", select)
        baseline = read_by_seed(baseline_files, "--baseline", select)
        firsts = (next(iter(runs.values())) for runs in (proposed, baseline))
        check_alike(*firsts, "the files of --proposed and --baseline")
        runs = [*proposed.values(), *baseline.values()]
        comparisons = compare_all({"baseline": baseline, "proposed": proposed})
        lines = [*note_unsettled(runs), *notes_on(runs)]
    if alone := sorted(proposed.keys() ^ baseline.keys()):
        lines.append(f"seeds without a partner, which count in the means alone: {', '.join(map(str, alone))}")
    return "\n".join(["\n\n".join(tables(comparisons)), *lines])


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: compare two groups of result files; see `one_line_endings` for its exit codes."""
    with one_line_endings("t_test.py"):
        args = make_parser().parse_args(argv)
        (proposed, notes), (baseline, more) = without_tables(args.proposed), without_tables(args.baseline)
        say(report(proposed, baseline, args.select), *map(one_line, (*notes, *more)))


if __name__ == "__main__":
    main()
