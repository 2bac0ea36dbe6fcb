"""One setting beside another, seed by seed."""

from dataclasses import dataclass
from functools import cached_property
from math import nan

import numpy as np

from reporting.power import LEVEL, detectable_difference, effect_size, seeds_needed, sign_flip_p_value


@dataclass
class Comparison:
    """One setting beside another, seed by seed.

    Attributes:
        setting: what it is called; of a contrast, "A vs B".
        accuracies: its test accuracies in percent, by seed; none for a contrast, whose settings have rows of their own.
        differences: its accuracy minus the other's, by seed, for the seeds that both have.
        interval: the 95 % confidence interval of the mean difference, two-sided.
        p_value: of `t_test.evaluate`. Like the interval, NaN for fewer than two pairs and where all differences are
            equal.
        corrected_p_value: the p-value after Holm's correction for all comparisons made together; NaN until
            `t_test.apply_holm_correction` sets it.
        planned: how many pairs are planned; 0 where it is not known.
        reference: the other setting; None where it is compared with nothing.
    """

    setting: str
    accuracies: dict[int, float]
    differences: dict[int, float]
    interval: tuple[float, float]
    p_value: float
    corrected_p_value: float = nan
    planned: int = 0
    reference: str | None = "baseline"

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
        """The number of seeds with a better accuracy than the other setting's."""
        return sum(difference > 0 for difference in self.differences.values())

    @cached_property
    def sign_flip_p_value(self) -> float:
        """p-value of `power.sign_flip_p_value`, not corrected. It takes up to a second."""
        return sign_flip_p_value(list(self.differences.values()))

    @property
    def effect_size(self) -> float:
        """Cohen's d_z of `power.effect_size`."""
        return effect_size(list(self.differences.values()))

    @property
    def seeds_needed(self) -> int | None:
        """How many seeds it would take at this effect size: see `power.seeds_needed`."""
        return seeds_needed(list(self.differences.values()))

    @property
    def detectable_difference(self) -> float:
        """What as many pairs as are planned can find: see `power.detectable_difference`."""
        return detectable_difference(list(self.differences.values()), self.planned or len(self.differences))

    @property
    def verdict(self) -> str:
        """What the corrected p-value says at the level of 0.05, or why it cannot say anything yet."""
        if len(self.differences) < self.planned:
            return f"interim: {len(self.differences)} of {self.planned}"
        if len(self.differences) < 2:
            return "no test: under 2 pairs"
        if np.isnan(self.p_value):
            return "no test: all are equal"
        return "significant" if self.corrected_p_value <= LEVEL else "not significant"


def is_contrast(c: Comparison) -> bool:
    """Whether it is of two settings that were asked for beside the comparisons with the baseline."""
    return c.reference not in ("baseline", None)
