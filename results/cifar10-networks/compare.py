"""Which networks the method helps: the verdicts of this folder's plan as a table, and the gain by network as a figure.

python results/cifar10-networks/compare.py
"""

import sys
from dataclasses import replace
from itertools import product
from math import nan
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from command_line.flag_types import as_typed
from experiment.outcomes import Experiment, find_experiments
from figures import forest_plot
from reporting.comparison import LEVEL, Comparison
from reporting.drawing import save
from reporting.tables import markdown
from saved_runs.by_seed import accuracy_by_seed
from t_test import apply_holm_correction, compare

HERE = Path(__file__).parent
NUM_COMPARISONS = 18  # nine networks, two each; those that are not made count with a p-value of 1
METHODS = {"proposed": "γ 0.1", "small0.3": "γ 0.3"}


def complete_experiments() -> dict[str, Experiment]:
    """The experiments of this folder whose runs are all there, by network."""
    complete = (found for found in find_experiments(HERE) if found.runs and not found.left(found.runs))
    return {experiment.plan.common.network.rpartition(":")[2]: experiment for experiment in complete}


def compare_networks(experiments: dict[str, Experiment], sign: int = 1) -> list[Comparison]:
    """Both methods beside the baseline in each network, Holm-corrected for all that were planned.

    With a `sign` of -1, the other way round: whether they harm.
    """
    comparisons = []
    for network, experiment in experiments.items():
        accuracies = {
            method: {seed: sign * accuracy for seed, accuracy in accuracy_by_seed(runs).items()}
            for method, runs in experiment.runs_by_method.items()
        }
        for method, label in METHODS.items():
            comparisons.append(compare(f"{network}, {label}", accuracies[method], accuracies["baseline"]))
    missing = [Comparison("not made", {}, {}, (nan, nan), nan) for _ in range(NUM_COMPARISONS - len(comparisons))]
    apply_holm_correction([*comparisons, *missing])
    return comparisons


def table(experiments: dict[str, Experiment]) -> str:
    """A row for each network and method: accuracies in percent and rates, gain in points, p, verdict."""
    helps, harms = compare_networks(experiments), compare_networks(experiments, sign=-1)
    pairs, rows = product(experiments.items(), METHODS.items()), []
    for c, other_way, ((network, experiment), (method, label)) in zip(helps, harms, pairs, strict=True):
        baseline = compare("baseline", accuracy_by_seed(experiment.runs_by_method["baseline"]), {})
        rates = {name: as_typed(experiment.learning_rates[name]) for name in (method, "baseline")}
        verdict = "helps" if c.corrected_p_value <= LEVEL else "undecided"
        verdict = "harms" if other_way.corrected_p_value <= LEVEL else verdict
        rows.append(
            {
                "network": network,
                "γ": label.removeprefix("γ "),
                "with the method (rate)": f"{c.mean:.2f} ± {c.deviation:.2f} ({rates[method]})",
                "without (rate)": f"{baseline.mean:.2f} ± {baseline.deviation:.2f} ({rates['baseline']})",
                "difference (95 % CI)": "{:+.2f} ({:+.2f} to {:+.2f})".format(c.difference, *c.interval),
                "p that it helps": f"{c.corrected_p_value:.2g}",
                "p that it harms": f"{other_way.corrected_p_value:.2g}",
                "verdict": verdict,
            }
        )
    return markdown(rows, list(rows[0]))


if __name__ == "__main__":
    found = complete_experiments()
    print(table(found))
    figure = forest_plot([replace(c, reference="without the method") for c in compare_networks(found)])
    figure.suptitle("gain in test accuracy on CIFAR-10, 5 epochs, five seeds", fontsize=10)
    save(figure, HERE / "gain-by-network")
