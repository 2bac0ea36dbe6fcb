import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from t_test import evaluate

PROPOSED = [95.1, 94.8, 95.3, 95.0, 95.2]
BASELINE = [94.6, 94.7, 94.9, 95.1, 95.1]


def by_hand(d1, d2) -> float:
    """The test from its definition: t = mean / (s / √n), and the upper tail of Student's distribution."""
    differences = [float(a) - float(b) for a, b in zip(d1, d2, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    return stats.t.sf(mean / math.sqrt(variance / n), df=n - 1)


@pytest.mark.parametrize(
    "convert",
    [list, tuple, np.array, lambda d: torch.tensor(d, requires_grad=True, dtype=torch.float64)],
)
def test_p_value(convert):
    p_value = evaluate(convert(PROPOSED), convert(BASELINE))
    assert type(p_value) is float
    assert p_value == pytest.approx(by_hand(PROPOSED, BASELINE))


accuracies = st.floats(0, 100).map(lambda accuracy: round(accuracy, 2))


@given(st.lists(st.tuples(accuracies, accuracies), min_size=2, max_size=30))
def test_any_pairs_beside_scipy(pairs):
    d1, d2 = map(list, zip(*pairs, strict=True))
    differences = np.array(d1) - np.array(d2)
    assume(differences.std() > 1e-6 * max(1, abs(differences.mean())))
    expected = stats.ttest_1samp(differences, 0, alternative="greater").pvalue
    assert evaluate(d1, d2) == pytest.approx(expected, rel=1e-6)
    assert 0 <= evaluate(d1, d2) <= 1


def test_is_one_sided():
    assert evaluate(PROPOSED, BASELINE) < 0.1
    assert evaluate(BASELINE, PROPOSED) == pytest.approx(1 - evaluate(PROPOSED, BASELINE))


def test_is_paired():
    shift = np.array([0.0, 50.0, -20.0, 3.0, 7.0])
    assert evaluate(PROPOSED + shift, BASELINE + shift) == pytest.approx(evaluate(PROPOSED, BASELINE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_tensors(dtype):
    d1, d2 = torch.tensor(PROPOSED, dtype=dtype), torch.tensor(BASELINE, dtype=dtype)
    assert evaluate(d1, d2) == pytest.approx(by_hand(d1, d2))


def test_without_spread():
    assert math.isnan(evaluate(PROPOSED, PROPOSED))
    with pytest.warns(RuntimeWarning, match="nearly identical"):
        assert evaluate([1, 2, 3], [0, 1, 2]) == 0
    with pytest.warns(RuntimeWarning, match="nearly identical"):
        assert evaluate([0, 1, 2], [1, 2, 3]) == 1


@pytest.mark.parametrize(
    ("d1", "d2", "message"),
    [
        ([1, 2, 3], [1, 2], "as many values in d1 as in d2, not 3 and 2"),
        ([1], [2], "at least two pairs, not 1"),
        ([], [], "at least two pairs, not 0"),
        ([[1, 2], [3, 4]], [[1, 2], [3, 4]], "d1 must have one dimension, not 2"),
        ([1, 2], torch.zeros(2, 1), "d2 must have one dimension, not 2"),
        (1.0, 2.0, "d1 must have one dimension, not 0"),
        ([1, 2], [1, float("nan")], "d2 holds a value that is not a finite number"),
        ([1, float("inf")], [1, 2], "d1 holds a value that is not a finite number"),
        ([1, None], [1, 2], "d1 holds a value that is not a finite number"),
        (["a", "b"], [1, 2], "d1 must be a sequence of numbers"),
    ],
)
def test_bad_input(d1, d2, message):
    with pytest.raises(ValueError, match=message):
        evaluate(d1, d2)
