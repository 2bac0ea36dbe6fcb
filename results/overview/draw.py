"""The figure of the README's results: the gain in each row of its table and after 180 epochs, from committed files.

python results/overview/draw.py
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from figures import forest_plot
from reporting.comparison import Comparison
from reporting.drawing import save
from saved_runs.by_seed import accuracy_by_seed, read_by_seed
from t_test import compare

RESULTS = Path(__file__).parent.parent
CIFAR10 = "cifar10-own-stem/cifar10-resnet18-num_epochs=5{}-stem=own"
DIGITS = "/digits-resnet18-batch_size=64-num_epochs="
SEEDS = range(1, 16)


def twenty_epochs(learning_rate: str) -> dict[str, range]:
    """The runs of 20 epochs on CIFAR-10: six seeds on a GPU, two on a CPU."""
    name = f"cifar10-own-stem-gpu/cifar10-resnet18-num_epochs=20{learning_rate}-stem=own"
    return {f"{name}-compile": range(1, 7), name: range(7, 9)}


ROWS = {  # the method's runs, then the baseline's where it has another learning rate: beginnings of names, with seeds
    "CIFAR-10, 5 epochs,\nthe paper's learning rate": [{CIFAR10.format(""): SEEDS}],
    "CIFAR-10, 5 epochs,\neach at the best of four rates": [
        {CIFAR10.format(""): SEEDS},
        {CIFAR10.format("-learning_rate=0.03"): SEEDS},
    ],
    "CIFAR-10, 20 epochs,\neach at the best of four rates": [
        twenty_epochs(""),
        twenty_epochs("-learning_rate=0.3"),
    ],
    "CIFAR-10 as in the paper,\n180 epochs": [{"cifar10/cifar10-resnet18-precision=bfloat16-compile": range(1, 2)}],
    "digits, 5 epochs,\nlearning rate 0.05": [{f"digits-why{DIGITS}5-learning_rate=0.05": SEEDS}],
    "digits, 5 epochs,\n0.05, 30 splits": [
        {f"digits-splits{DIGITS}5-learning_rate=0.05-split_seed=seed": range(1, 31)},
    ],
    "digits, 5 epochs,\neach at the best of six rates": [{f"digits-fair-rates{DIGITS}5-learning_rate=0.02": SEEDS}],
    "digits, 20 epochs,\nlearning rate 0.05": [{f"digits-20-epochs{DIGITS}20-learning_rate=0.05": SEEDS}],
}


def read_accuracies(experiments: dict[str, range], setting: str) -> dict[int, float]:
    """The test accuracies of a setting, in percent, by seed."""
    accuracies = {}
    for experiment, seeds in experiments.items():
        files = [RESULTS / f"{experiment}-{setting}-seed{seed}.csv" for seed in seeds]
        accuracies |= accuracy_by_seed(read_by_seed(files, experiment))
    return accuracies


def compare_all_rows() -> list[Comparison]:
    """The method beside the baseline in every experiment."""
    comparisons = []
    for label, experiments in ROWS.items():
        ours = read_accuracies(experiments[0], "weight0.1-c100-bn")
        theirs = read_accuracies(experiments[-1], "weight1-c1-dataset")
        comparisons.append(replace(compare(label, ours, theirs), reference="without the method"))
    return comparisons


if __name__ == "__main__":
    figure = forest_plot(compare_all_rows())
    figure.suptitle("gain in test accuracy, ResNet-18", fontsize=10)
    save(figure, RESULTS / "overview" / "forest")
