"""β's rate or ε: the tests of this folder's plan, as a table with a row for each learning rate that is complete.

python results/cifar10-explanations/compare.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np
from scipy import stats

from reporting.comparison import Comparison
from reporting.tables import markdown
from saved_runs.results import read_results
from t_test import apply_holm_correction

HERE = Path(__file__).parent
SEEDS = (18, 19, 20)
RATES = {"0.3": "-learning_rate=0.3", "0.1": ""}  # how they stand in the names of result files
SETTINGS = {  # how these names begin, and end but for the seed
    "proposed": ("resnet18", "-stem=own-weight0.1-c100-bn"),
    "slow_shift": ("variants.slow_shift", "-weight0.1-c100-bn"),
    "small_epsilon": ("variants.small_epsilon", "-weight0.1-c100-bn"),
    "logits": ("resnet18", "-stem=own-weight0.1-c1-bn-logits"),
}
CONTRASTS = {  # the weights of the settings, in their order
    "slow_shift - proposed": (-1, 1, 0, 0),
    "small_epsilon - proposed": (-1, 0, 1, 0),
    "interaction": (1, -1, -1, 1),
}


def accuracies(rate: str) -> np.ndarray:
    """Test accuracies in percent (settings, seeds). FileNotFoundError where a run is missing."""
    return np.array(
        [
            [
                read_results(HERE / f"cifar10-{network}-num_epochs=5{RATES[rate]}{rest}-seed{seed}.csv").test_accuracy
                for seed in SEEDS
            ]
            for network, rest in SETTINGS.values()
        ]
    )


def contrast(values: np.ndarray, weights: tuple[int, ...]) -> tuple[float, tuple[float, float], float]:
    """A difference between settings in points, its 95 % interval, and its two-sided p-value, with pooled variance."""
    error = np.sqrt(values.var(axis=1, ddof=1).mean() * np.square(weights).sum() / len(SEEDS))
    freedom, difference = len(values) * (len(SEEDS) - 1), values.mean(axis=1) @ weights
    interval = stats.t.interval(0.95, freedom, difference, error)
    return difference, interval, 2 * stats.t.sf(abs(difference / error), freedom)


if __name__ == "__main__":
    complete = {}
    for rate in RATES:
        try:
            complete[rate] = accuracies(rate)
        except FileNotFoundError as error:
            print(f"the rate {rate} is not complete: {error}", file=sys.stderr)
    rows, tests = [], []
    for rate, values in complete.items():
        means, deviations = values.mean(axis=1), values.std(axis=1, ddof=1)
        row = {"rate": rate}
        row |= {
            name: f"{mean:.2f} ± {deviation:.2f}"
            for name, mean, deviation in zip(SETTINGS, means, deviations, strict=True)
        }
        for name, weights in CONTRASTS.items():
            difference, interval, p_value = contrast(values, weights)
            row[name] = "{:+.2f} ({:+.2f} to {:+.2f})".format(difference, *interval)
            if name != "interaction":
                tests.append(Comparison(name, {}, {}, interval, p_value))
        rows.append(row)
    planned = 2 * len(RATES)
    apply_holm_correction(
        [*tests, *(Comparison("not made", {}, {}, (0, 0), np.nan) for _ in range(planned - len(tests)))]
    )
    for row in rows:
        row |= {f"p of {name}": f"{tests.pop(0).corrected_p_value:.2g}" for name in list(CONTRASTS)[:2]}
    print(markdown(rows, list(rows[0])) if rows else "")
