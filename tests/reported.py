"""Numbers of the committed result files, computed from them without this project's modules."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas
from scipy import stats

RESULTS = Path(__file__).parent.parent / "results"
SETTINGS = {  # as in the names of files
    "baseline": "weight1-c1-dataset",
    "proposed": "weight0.1-c100-bn",
    "init": "weight0.1-c1-bn",
    "rate": "weight1-c100-bn",
    "input": "weight1-c1-bn",
    "logits": "weight0.1-c1-bn-logits",
    "logits+rates": "weight0.1-c100-bn-logits+rates",
}
SWEEP = {
    f"bn_weight {weight}": f"weight{weight}-c100-bn" for weight in ("0.01", "0.05", "0.1", "0.25", "0.5", "0.75", "1")
}
SMALL_03 = {"small0.3": "weight0.3-c100-bn"}
SMALL_START = {"small start": SETTINGS["input"]}  # of another network
DIGITS = "digits-resnet18-batch_size=64-num_epochs=5"


@cache
def read_runs(folder: str, experiment: str, setting: str) -> dict[int, pandas.DataFrame]:
    """The tables of a setting's result files, by seed."""
    files = (RESULTS / folder).glob(f"{experiment}-{(SETTINGS | SWEEP | SMALL_03 | SMALL_START)[setting]}-seed*.csv")
    runs = {int(re.search(r"seed(\d+)$", file.stem)[1]): file for file in files}
    return {seed: pandas.read_csv(runs[seed], comment="#") for seed in sorted(runs)}


def best(run: pandas.DataFrame) -> float:
    """Test accuracy at the epoch of the best validation accuracy, the first one on a tie."""
    return run["test_accuracy"][run["val_accuracy"].idxmax()]


def best_on_last_tie(run: pandas.DataFrame) -> float:
    """The same, of the last one on a tie."""
    return run["test_accuracy"][run["val_accuracy"][::-1].idxmax()]


def last(run: pandas.DataFrame) -> float:
    """Test accuracy at the last epoch."""
    return run["test_accuracy"].iloc[-1]


def accuracies(folder: str, experiment: str, setting: str, select=best, num_seeds: int = 15) -> np.ndarray:
    """Test accuracies (%) of the seeds from 1 on, in this order; besides, there may be runs with tuning seeds."""
    runs, seeds = read_runs(folder, experiment, setting), range(1, num_seeds + 1)
    assert list(runs)[:num_seeds] == [*seeds], (folder, setting)
    return np.array([select(runs[seed]) for seed in seeds])


@dataclass(frozen=True)
class Tuned:
    """An experiment whose settings have learning rates of their own, chosen on seeds that are not compared.

    Attributes:
        folder: with the result files.
        experiment: how their names begin; "{}" is where the rate stands.
        rates: those tried, from the smallest.
        seeds: those to choose on.
        num_seeds: how many, from 1 on, are compared.
    """

    folder: str
    experiment: str
    rates: tuple[str, ...]
    seeds: range
    num_seeds: int = 15

    def at(self, rate: str) -> str:
        """How the names of the runs at this rate begin."""
        return self.experiment.format("" if rate == "0.1" else f"-learning_rate={rate}")

    def mean_val_accuracy(self, rate: str, setting: str) -> float:
        """Mean over the seeds of the best validation accuracy of a run (%)."""
        runs = read_runs(self.folder, self.at(rate), setting)
        return np.mean([runs[seed]["val_accuracy"].max() for seed in self.seeds])

    def chosen_rate(self, setting: str) -> str:
        """The rate with the highest mean of the best validation accuracies, the smallest one on a tie."""
        return max(self.rates, key=lambda rate: round(self.mean_val_accuracy(rate, setting), 9))

    def at_chosen_rate(self, setting: str) -> str:
        """How the names of a setting's runs at its own rate begin."""
        return self.at(self.chosen_rate(setting))

    def leads(self, setting: str, other: str) -> list[float]:
        """At each rate, by how much the mean validation accuracy of a setting is above that of another one."""
        return [self.mean_val_accuracy(rate, setting) - self.mean_val_accuracy(rate, other) for rate in self.rates]

    def accuracies(self, setting: str, select=best) -> np.ndarray:
        """Test accuracies of a setting at its chosen rate."""
        return accuracies(self.folder, self.at_chosen_rate(setting), setting, select, self.num_seeds)


DIGITS_TUNED = Tuned(
    "digits-fair-rates", f"{DIGITS}{{}}", ("0.005", "0.01", "0.02", "0.05", "0.1", "0.2"), range(16, 21)
)
DIGITS_SMALL_START = Tuned(
    "digits-small-start",
    DIGITS_TUNED.experiment.replace("resnet18", "small_start.resnet18"),
    DIGITS_TUNED.rates,
    DIGITS_TUNED.seeds,
)
CIFAR10_TUNED = Tuned(
    "cifar10-own-stem", "cifar10-resnet18-num_epochs=5{}-stem=own", ("0.01", "0.03", "0.1", "0.3"), range(16, 18)
)
TORCH_LAST_LAYER = Tuned(
    "cifar10-explanations",
    "cifar10-variants.torch_last_layer-num_epochs=5{}",
    CIFAR10_TUNED.rates,
    CIFAR10_TUNED.seeds,
    num_seeds=5,
)
CIFAR10_LONG = Tuned(
    "cifar10-own-stem-gpu",
    "cifar10-resnet18-num_epochs=20{}-stem=own-compile",
    ("0.01", "0.03", "0.1", "0.3"),
    range(16, 17),
)
NETWORKS = {  # those of which all runs are there, with their rates
    network.rpartition(".")[2]: Tuned(
        "cifar10-networks", f"cifar10-{network}-num_epochs=5{{}}", rates, range(16, 17), num_seeds=5
    )
    for network, rates in {
        "mobilenet_v3_small": ("0.01", "0.03", "0.1", "0.3"),
        "plain_networks.narrow_residual": ("0.01", "0.03", "0.1", "0.3"),
        "plain_networks.plain2": ("0.03", "0.1", "0.3", "1", "3"),
        "plain_networks.plain4": ("0.03", "0.1", "0.3", "1"),
        "plain_networks.plain8": ("0.03", "0.1", "0.3"),
        "regnet_y_400mf": ("0.01", "0.03", "0.1", "0.3"),
        "shufflenet_v2_x0_5": ("0.01", "0.03", "0.1", "0.3"),
    }.items()
}


def interval(differences: np.ndarray) -> tuple[float, float]:
    """The two-sided 95 % confidence interval of their mean."""
    return stats.t.interval(0.95, len(differences) - 1, differences.mean(), stats.sem(differences))


def p_value(differences: np.ndarray) -> float:
    """Of the one-sided t-test that their mean is above 0."""
    return stats.ttest_1samp(differences, 0, alternative="greater").pvalue


def spread(values: np.ndarray) -> str:
    """Mean and sample standard deviation, as the README prints them."""
    return f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"
