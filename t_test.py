"""The paper's test of significance: a one-sided paired t-test over seeds."""

from typing import Any

import numpy as np
from scipy.stats import ttest_rel


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
    if hasattr(values, "detach"):  # a tensor: recognised without importing torch, which takes seconds
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
