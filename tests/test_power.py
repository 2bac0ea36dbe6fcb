import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from reporting.power import detectable_difference, effect_size, power_of_test, seeds_needed, sign_flip_p_value

DIFFERENCES = [0.8, -0.3, 1.4, 0.6, 0.2, 1.1, -0.5, 0.9]
WITHOUT_SPREAD = [[], [1.0], [0.0, 0.0], [0.5, 0.5, 0.5], [95.1 - 94.0, 94.3 - 93.2]]


def enumerated(hundredths: list[int]) -> Fraction:
    """The share of all choices of signs with at least the observed sum, in whole numbers."""
    signs = itertools.product((1, -1), repeat=len(hundredths))
    sums = [sum(s * d for s, d in zip(choice, hundredths, strict=True)) for choice in signs]
    return Fraction(sum(total >= sum(hundredths) for total in sums), len(sums))


@given(st.lists(st.integers(-300, 300), min_size=2, max_size=9).filter(lambda d: len(set(d)) > 1))
def test_sign_flips_are_enumerated(hundredths):
    assert sign_flip_p_value([d / 100 for d in hundredths]) == pytest.approx(float(enumerated(hundredths)))


def test_ties_count_whatever_their_rounding_errors():
    assert sum([0.1, 0.2, -0.3]) > 0  # a rounding error
    assert sign_flip_p_value([0.1, 0.2, -0.3]) == 5 / 8


def test_sign_flips_of_18_pairs_are_exact_and_of_more_are_sampled():
    rising = list(range(1, 19))
    assert sign_flip_p_value(rising) == 2**-18
    generator = np.random.default_rng(1)
    many = generator.normal(0.3, 1, 25)
    sums = np.zeros(1)
    for difference in many:  # all 2^25 sums of one half, then how many of the others' reach it
        sums = np.concatenate([sums + difference, sums - difference]) if len(sums) < 2**13 else sums
    rest = np.zeros(1)
    for difference in many[13:]:
        rest = np.concatenate([rest + difference, rest - difference])
    reached = len(sums) - np.searchsorted(np.sort(sums), many.sum() - rest - 1e-9)
    exact = reached.sum() / 2**25
    standard_error = math.sqrt(exact * (1 - exact) / 2**18)
    assert sign_flip_p_value(many) == pytest.approx(exact, abs=4 * standard_error)
    assert sign_flip_p_value(many) == sign_flip_p_value(list(many))


def test_effect_size():
    mean = sum(DIFFERENCES) / 8
    deviation = math.sqrt(sum((d - mean) ** 2 for d in DIFFERENCES) / 7)
    assert effect_size(DIFFERENCES) == pytest.approx(mean / deviation)
    assert effect_size([-d for d in DIFFERENCES]) == pytest.approx(-mean / deviation)


def power_by_integral(effect: float, n: int, alpha: float = 0.05) -> float:
    """P(Z + √n·effect > t √(V / (n-1))) with Z normal and V χ²-distributed: what the t-test does, without its nct."""
    critical = stats.t.ppf(1 - alpha, n - 1)

    def found(v: float) -> float:
        return stats.norm.sf(critical * math.sqrt(v / (n - 1)) - math.sqrt(n) * effect) * stats.chi2.pdf(v, n - 1)

    low, high = stats.chi2.ppf([1e-13, 1 - 1e-13], n - 1)
    return integrate.quad(found, low, high, limit=500)[0]


@pytest.mark.parametrize(("effect", "n"), [(0.0, 5), (0.5, 15), (1.2, 4), (0.2, 100), (-0.3, 10)])
def test_power_beside_an_integral(effect, n):
    assert power_of_test(effect, n) == pytest.approx(power_by_integral(effect, n), abs=1e-7)


@pytest.mark.parametrize(("power", "alpha"), [(0.8, 0.05), (0.95, 0.05), (0.8, 0.01)])
@pytest.mark.parametrize("shift", [-0.3, 0.0, 1.0])
def test_seeds_needed(power, alpha, shift):
    differences = [d + shift for d in DIFFERENCES]
    n = seeds_needed(differences, power, alpha)
    effect = np.mean(differences) / np.std(differences, ddof=1)
    assert power_by_integral(effect, n, alpha) >= power
    assert n == 2 or power_by_integral(effect, n - 1, alpha) < power


def test_seeds_needed_for_known_effects():
    """As in published tables: 27 pairs for d_z = 0.5 and 156 for 0.2, one-sided at 0.05, with a power of 0.8."""
    plus_minus = np.array([1.0, -1.0] * 50) / np.std([1.0, -1.0] * 50, ddof=1)
    assert [seeds_needed(plus_minus + effect) for effect in (0.5, 0.2)] == [27, 156]


def test_no_number_of_seeds_is_enough():
    assert seeds_needed([-d for d in DIFFERENCES]) is None
    assert seeds_needed([1.0, -1.0]) is None
    assert seeds_needed([1.0, -1.0 + 1e-9]) is None  # more than there are


@pytest.mark.parametrize("n", [2, 5, 15, 100])
def test_detectable_difference(n):
    difference = detectable_difference(DIFFERENCES, n)
    assert power_by_integral(difference / np.std(DIFFERENCES, ddof=1), n) == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize("differences", WITHOUT_SPREAD)
def test_without_spread_nothing_is_claimed(differences):
    assert math.isnan(sign_flip_p_value(differences))
    assert math.isnan(effect_size(differences))
    assert seeds_needed(differences) is None
    assert math.isnan(detectable_difference(differences, 15))


def test_one_pair_detects_nothing():
    assert math.isnan(detectable_difference(DIFFERENCES, 1))
