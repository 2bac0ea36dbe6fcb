import itertools
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from reporting.comparison import sign_flip_p_value


def enumerated(hundredths: list[int]) -> Fraction:
    """The share of all choices of signs with at least the observed sum, in whole numbers."""
    signs = itertools.product((1, -1), repeat=len(hundredths))
    sums = [sum(s * d for s, d in zip(choice, hundredths, strict=True)) for choice in signs]
    return Fraction(sum(total >= sum(hundredths) for total in sums), len(sums))


@given(st.lists(st.integers(-300, 300), min_size=1, max_size=9))
def test_sign_flips_are_enumerated(hundredths):
    assert sign_flip_p_value([d / 100 for d in hundredths]) == pytest.approx(float(enumerated(hundredths)))


def test_ties_count_whatever_their_rounding_errors():
    assert sum([0.1, 0.2, -0.3]) > 0  # a rounding error
    assert sign_flip_p_value([0.1, 0.2, -0.3]) == 5 / 8


def test_sign_flips_of_18_pairs_are_exact():
    assert sign_flip_p_value(list(range(1, 19))) == 2**-18


def test_sign_flips_of_many_pairs_are_those_of_scipy():
    """To the last digit, and near what a normal distribution of the mean gives."""
    few, many = (np.random.default_rng(1).normal(0, 1, n) for n in (19, 400))
    many += 1.5 / np.sqrt(400) - many.mean()

    def mean(values: np.ndarray, axis: int) -> np.ndarray:
        return values.mean(axis=axis)

    options = {"permutation_type": "samples", "n_resamples": 2**18, "batch": 2**12, "rng": 0, "vectorized": True}
    assert sign_flip_p_value(few) == stats.permutation_test((few,), mean, alternative="greater", **options).pvalue
    normal = stats.norm.sf(many.sum() / np.sqrt((many**2).sum()))
    assert 0.01 < normal < 0.2 and sign_flip_p_value(many) == pytest.approx(normal, abs=0.003)


def test_sign_flips_of_thousands_of_pairs_take_little_memory():
    many = np.random.default_rng(1).normal(0.03, 1, 1000)
    tracemalloc.start()
    try:
        sign_flip_p_value(many)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50e6
