"""What paired differences say beside the t-test: an exact p-value, the size of the effect, and how many seeds it takes.

The verdict stays that of the paper's t-test. These numbers help to judge it, and to plan: seeds needed at the observed
effect are an estimate, as uncertain as the effect itself.
"""

from collections.abc import Sequence
from math import nan

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from run_settings import MAX_SEED

LEVEL = 0.05  # a p-value of at most this is called significant
POWER = 0.8  # how probable it should be to find an effect that is there
SIGN_FLIPS = 2**18  # all of up to 18 pairs, a sample of them beyond


def have_spread(differences: Sequence[float]) -> bool:
    """Whether there are two differences that are not equal: without spread, a test would claim anything."""
    return len(differences) > 1 and bool(np.ptp(differences) > 1e-9)


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """p-value of the one-sided permutation test that the mean of paired differences is greater than 0.

    If a setting made no difference, each pair could as well have come out the other way round. The p-value is the share
    of all 2^n ways to choose the signs of n differences whose mean is at least the observed one. It assumes no
    distribution; with n pairs it is at least 1/2^n. Beyond 18 pairs it is estimated from 2^18 random choices, the same
    ones at every call.

    Returns:
        The p-value; NaN where there are fewer than two differences or all are equal.
    """
    if not have_spread(differences):
        return nan
    differences = np.asarray(differences, dtype=np.float64)
    scale = np.abs(differences).sum()

    def mean(values: np.ndarray, axis: int) -> np.ndarray:
        return (values.sum(axis=axis) / scale).round(9)  # so that rounding errors do not tell ties apart

    options = {"permutation_type": "samples", "n_resamples": SIGN_FLIPS, "batch": 2**14, "rng": 0}
    test = stats.permutation_test((differences,), mean, alternative="greater", vectorized=True, **options)
    return float(test.pvalue)


def effect_size(differences: Sequence[float]) -> float:
    """Cohen's d_z: mean of paired differences / their sample standard deviation. NaN where they have no spread."""
    return float(np.mean(differences) / np.std(differences, ddof=1)) if have_spread(differences) else nan


def power_of_test(effect: float, num_seeds: int, alpha: float = LEVEL) -> float:
    """How probable it is that the one-sided paired t-test with `num_seeds` pairs finds a true effect size.

    Its t statistic then has a noncentral t distribution, with `effect` · √`num_seeds` as its noncentrality.
    """
    freedom = num_seeds - 1
    return float(stats.nct.sf(stats.t.isf(alpha, freedom), freedom, effect * np.sqrt(num_seeds)))


def seeds_needed(differences: Sequence[float], power: float = POWER, alpha: float = LEVEL) -> int | None:
    """How many pairs the one-sided paired t-test needs if the true effect size is the observed one.

    Args:
        differences: paired differences, one a seed.
        power: how probable it should be that the p-value is at most `alpha`.
        alpha: the level of the test.

    Returns:
        The smallest number of pairs; None where the mean is not above 0, the differences have no spread, or more pairs
        are needed than there are distinct seeds.
    """
    effect, fewest, most = effect_size(differences), 2, MAX_SEED + 1
    if not effect > 0 or power_of_test(effect, most, alpha) < power:
        return None
    while fewest < most:  # bisection: the power grows with the number of pairs
        middle = (fewest + most) // 2
        fewest, most = (fewest, middle) if power_of_test(effect, middle, alpha) >= power else (middle + 1, most)
    return fewest


def detectable_difference(
    differences: Sequence[float], num_seeds: int, power: float = POWER, alpha: float = LEVEL
) -> float:
    """The true mean difference that `num_seeds` pairs find with this power, if they scatter as the observed ones do.

    Returns:
        The smallest such difference, in the unit of the differences; NaN where these have no spread or `num_seeds` is
        below 2.
    """
    if num_seeds < 2 or not have_spread(differences):
        return nan
    enough = 1.0
    while power_of_test(enough, num_seeds, alpha) < power:
        enough *= 2
    effect = brentq(lambda effect: power_of_test(effect, num_seeds, alpha) - power, 0, enough)
    return float(effect * np.std(differences, ddof=1))
