"""The tests of this folder's plan, as a table for each question whose runs are there.

python results/cifar10-explanations/compare.py
"""

import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np
from scipy import stats

from command_line.flag_types import as_typed
from experiment.outcomes import Experiment, find_experiments
from reporting.comparison import Comparison
from reporting.tables import markdown
from saved_runs.by_seed import accuracy_by_seed
from saved_runs.results import Results, read_results
from t_test import apply_holm_correction, compare

HERE = Path(__file__).parent
DIFFERENCE = "{:+.2f} ({:+.2f} to {:+.2f})"  # with its 95 % interval
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
    """Test accuracies in percent (settings, seeds)."""
    names = [f"cifar10-{network}-num_epochs=5{RATES[rate]}{rest}" for network, rest in SETTINGS.values()]
    return np.array([[read_results(HERE / f"{name}-seed{n}.csv").test_accuracy for n in SEEDS] for name in names])


def contrast(values: np.ndarray, weights: tuple[int, ...]) -> tuple[float, tuple[float, float], float]:
    """A difference between settings in points, its 95 % interval, and its two-sided p-value, with pooled variance."""
    error = np.sqrt(values.var(axis=1, ddof=1).mean() * np.square(weights).sum() / len(SEEDS))
    freedom, difference = len(values) * (len(SEEDS) - 1), values.mean(axis=1) @ weights
    interval = stats.t.interval(0.95, freedom, difference, error)
    return difference, interval, 2 * stats.t.sf(abs(difference / error), freedom)


def beta_or_epsilon() -> str:
    """Question 1: a row for each learning rate."""
    rows, tests = [], []
    for rate in RATES:
        values = accuracies(rate)
        row = {"rate": rate}
        for name, of_seeds in zip(SETTINGS, values, strict=True):
            row[name] = f"{of_seeds.mean():.2f} ± {of_seeds.std(ddof=1):.2f}"
        for name, weights in CONTRASTS.items():
            difference, interval, p_value = contrast(values, weights)
            row[name] = DIFFERENCE.format(difference, *interval)
            if name != "interaction":
                tests.append(Comparison(name, {}, {}, interval, p_value))
        rows.append(row)
    apply_holm_correction(tests)
    for row in rows:
        row |= {f"p of {name}": f"{tests.pop(0).corrected_p_value:.2g}" for name in list(CONTRASTS)[:2]}
    return markdown(rows, list(rows[0]))


def tuned_experiment(folder: Path, network: str) -> Experiment | None:
    """The experiment of a folder with this network and tuned rates, if all its runs are there."""
    for experiment in find_experiments(folder):
        of_network = experiment.plan.tuning_runs and experiment.plan.common.network == network
        if of_network and experiment.runs and not experiment.left(experiment.runs):
            return experiment
    return None


def accuracies_by_method(experiment: Experiment) -> dict[str, dict[int, float]]:
    """Test accuracies in percent by method and seed."""
    return {method: accuracy_by_seed(runs) for method, runs in experiment.runs_by_method.items()}


def unpaired(
    name: str, ours: Iterable[float], theirs: Iterable[float], alternative: str = "two-sided"
) -> tuple[Comparison, float]:
    """Welch's test with its two-sided interval, and the difference of the means."""
    ours, theirs = list(ours), list(theirs)
    interval = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    p_value = stats.ttest_ind(ours, theirs, equal_var=False, alternative=alternative).pvalue
    return Comparison(name, {}, {}, interval, p_value), np.mean(ours) - np.mean(theirs)


def table_of_differences(experiment: Experiment, compared: Iterable[tuple[Comparison, float]]) -> str:
    """The chosen learning rates, and a row for each difference; those without a corrected p-value are descriptions."""
    rates = ", ".join(f"{method} {as_typed(rate)}" for method, rate in experiment.learning_rates.items())
    rows = [
        {
            "compared": test.method,
            "difference (95 % CI)": DIFFERENCE.format(difference, *test.interval),
            "p (Holm)": "" if np.isnan(test.corrected_p_value) else f"{test.corrected_p_value:.2g}",
        }
        for test, difference in compared
    ]
    return f"learning rates: {rates}\n\n{markdown(rows, list(rows[0]))}"


def last_layer(experiment: Experiment) -> str:
    """Question 2: what the method gains with torch's last layer, and this layer beside that of the paper's code."""
    earlier = tuned_experiment(HERE.parent / "cifar10-own-stem", "resnet18")
    ours, theirs = map(accuracies_by_method, (experiment, earlier))
    gain = compare("proposed - baseline", ours["proposed"], ours["baseline"])
    compared = [(gain, gain.difference)]
    for method in ("baseline", "proposed"):
        name = f"{method} - {method} of cifar10-own-stem"
        compared.append(unpaired(name, ours[method].values(), theirs[method].values()))
    apply_holm_correction([test for test, _ in compared[:2]])  # how the two `proposed` compare was not to be tested
    return table_of_differences(experiment, compared)


def last_layer_of_shufflenet(experiment: Experiment) -> str:
    """The later plan: what either method gains there, and how that differs from the gain with the larger last layer."""
    earlier = tuned_experiment(HERE.parent / "cifar10-networks", "shufflenet_v2_x0_5")
    ours, theirs = map(accuracies_by_method, (experiment, earlier))
    methods = ("proposed", "small0.3")
    gains, others = (
        [compare(f"{method} - baseline", of[method], of["baseline"]) for method in methods] for of in (ours, theirs)
    )
    apply_holm_correction(gains)
    name, compared = "baseline - baseline of cifar10-networks", [(gain, gain.difference) for gain in gains]
    compared.append(unpaired(name, ours["baseline"].values(), theirs["baseline"].values()))
    for method, gain, other in zip(methods, gains, others, strict=True):
        name = f"gain of {method} - its gain in cifar10-networks"
        compared.append(unpaired(name, gain.differences.values(), other.differences.values()))
    return table_of_differences(experiment, compared)


def runs_by_pair(ending: str) -> dict[tuple[float, float], dict[int, Results]]:
    """The runs of question 3 whose names end so but for the seed, by weight decay and rate, and by seed."""
    runs: dict[tuple[float, float], dict[int, Results]] = {}
    for folder, network in ((HERE, "variants.fast_resnet18"), (HERE.parent / "cifar10-own-stem", "resnet18")):
        for file in folder.glob(f"cifar10-{network}-num_epochs=5*-{ending}-seed*.csv"):
            run = read_results(file)
            pair = run.header["weight_decay"], run.header["learning_rate"]
            runs.setdefault(pair, {})[run.header["seed"]] = run
    return runs


def weight_decay() -> str | None:
    """Question 3: the validation accuracies of each pair, and best against best; None while runs are left."""
    rows, compared = [], {}
    for method, ending in (("baseline", "weight1-c1-dataset"), ("proposed", "weight0.1-c100-bn")):
        runs = runs_by_pair(ending)
        tuned = {pair: [runs[pair][n].val_accuracy for n in (16, 17) if n in runs[pair]] for pair in sorted(runs)}
        highest = max(values[0] for values in tuned.values())
        close = [pair for pair, values in tuned.items() if values[0] >= highest - 2]
        best = max(close, key=lambda pair: (np.mean(tuned[pair]), -pair[1]))
        seeds = [seed for seed in sorted(runs[best]) if seed < 16]
        if len(tuned) < 12 or len(seeds) < 5 or any(len(tuned[pair]) < 2 for pair in close):
            return None
        compared[method] = {seed: runs[best][seed].test_accuracy for seed in seeds}
        of_method = {decay: {"setting": method, "weight decay": as_typed(decay)} for decay, _ in tuned}
        for (decay, rate), values in tuned.items():
            text = f"{np.mean(values):.2f}" if (decay, rate) in close else f"({values[0]:.2f})"
            of_method[decay][as_typed(rate)] = f"**{text}**" if (decay, rate) == best else text
        rows += of_method.values()
    name, (theirs, ours) = "proposed - baseline", compared.values()
    if ours.keys() == theirs.keys():
        gain = compare(name, ours, theirs)
        difference = gain.difference
    else:
        gain, difference = unpaired(name, ours.values(), theirs.values(), "greater")
    means = ", ".join(f"{method} {np.mean(list(of.values())):.2f}" for method, of in compared.items())
    text = f"{means}; {DIFFERENCE.format(difference, *gain.interval)}, p {gain.p_value:.2g}"
    return f"{markdown(rows, list(rows[-1]))}\n\n{text}"


def larger_gamma(experiment: Experiment) -> str:
    """The plan of cifar10-own-stem-small0.3: γ = 0.3 beside both settings of cifar10-own-stem."""
    earlier = accuracies_by_method(tuned_experiment(HERE.parent / "cifar10-own-stem", "resnet18"))
    ours = accuracies_by_method(experiment)["small0.3"].values()
    compared = [
        unpaired("small0.3 - proposed", ours, earlier["proposed"].values()),
        unpaired("small0.3 - baseline", ours, earlier["baseline"].values(), "greater"),
    ]
    apply_holm_correction([test for test, _ in compared])
    return table_of_differences(experiment, compared)


if __name__ == "__main__":
    print(beta_or_epsilon())
    if table := weight_decay():
        print(f"\n{table}")
    for folder, network, table in (
        (HERE, "variants:torch_last_layer", last_layer),
        (HERE, "variants:shufflenet_torch_last_layer", last_layer_of_shufflenet),
        (HERE.parent / "cifar10-own-stem-small0.3", "resnet18", larger_gamma),
    ):
        if experiment := tuned_experiment(folder, network):
            print(f"\n{table(experiment)}")
