"""One method beside another, seed by seed, and what their paired differences say beside the t-test."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import nan

import numpy as np

LEVEL = 0.05  # a p-value of at most this is called significant
SIGN_FLIPS = 2**18  # all of up to 18 pairs, a sample of them beyond


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """p-value of the one-sided permutation test that the mean of paired differences is greater than 0.

    It is the share of all 2^n ways to choose the signs of n differences whose mean is at least the observed one, and
    assumes no distribution. Beyond 18 pairs it is estimated from 2^18 random choices, always the same ones: those of
    `scipy.stats.permutation_test` with `rng=0`, in less memory.
    """
    differences = np.asarray(differences, dtype=np.float64)
    scale, n = np.abs(differences).sum() or 1.0, len(differences)

    def reached(sums: np.ndarray) -> int:  # rounded, so that rounding errors do not tell ties apart
        return int(np.count_nonzero((sums / scale).round(9) >= (differences.sum() / scale).round(9)))

    if 2**n <= SIGN_FLIPS:
        sums = np.zeros(1)
        for difference in differences:
            sums = np.concatenate([sums + difference, sums - difference])
        return reached(sums) / len(sums)
    generator, count, left = np.random.default_rng(0), 0, SIGN_FLIPS
    while left:
        size = min(left, max(1, 2**20 // n))  # some MB at a time, however many pairs there are
        stays = generator.integers(2**32, size=(size, n), dtype=np.uint32) & 1
        count += reached(2 * (stays @ differences) - differences.sum())
        left -= size
    return (count + 1) / (SIGN_FLIPS + 1)


@dataclass
class Comparison:
    """One method beside another, seed by seed.

    Attributes:
        method: what it is called; of a contrast, "A vs B".
        accuracies: its test accuracies in percent, by seed; none for a contrast, whose methods have rows of their own.
        differences: its accuracy minus the other's, by seed, for the seeds that both have.
        interval: the 95 % confidence interval of the mean difference, two-sided; NaN where `p_value` is.
        p_value: of `t_test.evaluate`; NaN for fewer than two pairs too.
        corrected_p_value: the same after `t_test.apply_holm_correction`; NaN until then.
        planned: how many pairs are planned; 0 where it is not known.
        reference: the other method; None where it is compared with nothing.
        settled: whether all runs are; see `Results.settled`.
    """

    method: str
    accuracies: dict[int, float]
    differences: dict[int, float]
    interval: tuple[float, float]
    p_value: float
    corrected_p_value: float = nan
    planned: int = 0
    reference: str | None = "baseline"
    settled: bool = True

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
        """The number of seeds with a better accuracy than the other method's."""
        return sum(difference > 0 for difference in self.differences.values())

    @cached_property
    def sign_flip_p_value(self) -> float:
        """Of the function of this name, not corrected; NaN where `p_value` is."""
        return nan if np.isnan(self.p_value) else sign_flip_p_value(list(self.differences.values()))

    @property
    def effect_size(self) -> float:
        """Cohen's d_z: mean of the differences / their sample standard deviation; NaN where `p_value` is."""
        return nan if np.isnan(self.p_value) else self.difference / float(np.std([*self.differences.values()], ddof=1))

    @property
    def verdict(self) -> str:
        """What the corrected p-value says at the level of 0.05, or why it cannot say anything yet.

        It is "worse" where the whole interval, which is not corrected, lies below 0.
        """
        if len(self.differences) < self.planned:
            verdict = f"interim: {len(self.differences)} of {self.planned}"
        elif len(self.differences) < 2:
            verdict = "no test: under 2 pairs"
        elif np.isnan(self.p_value):
            verdict = "all differences are equal"
        elif self.interval[1] < 0:
            verdict = "worse"
        else:
            verdict = "significant" if self.corrected_p_value <= LEVEL else "not significant"
        return verdict if self.settled else f"{verdict}, unsettled"


def is_contrast(c: Comparison) -> bool:
    """Whether it is of two methods that were asked for beside the comparisons with the baseline."""
    return c.reference not in ("baseline", None)
