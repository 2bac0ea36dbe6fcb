"""Whether the relative gradient of the convolutions tells the best γ beforehand: predictions, and runs that test them.

python results/digits-suggestion/measure.py predict
python results/digits-suggestion/measure.py run
python results/digits-suggestion/measure.py report
"""

import csv
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from statistics import mean, median, median_low
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent.parent / "cifar10-networks"))

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr, wilcoxon
from torch import Tensor, nn

from experiment.tuning import choose_learning_rates
from image_sets.batches import Batches
from reporting.tables import markdown
from run_settings import PAPER, Settings
from seeds import make_deterministic
from train import train
from training.preparation import construct, load_images, prepare

HERE = Path(__file__).parent
PLAIN, MORE = "plain_networks", "more_networks"
CONDITIONS = (  # network and batch size
    *((f"{PLAIN}:{name}", 64) for name in ("plain2", "wide2", "plain4", "plain8", "narrow_residual")),
    *((f"{MORE}:{name}", 64) for name in ("vgg", "dense", "depthwise", "pre_activation")),
    *((f"{PLAIN}:plain8", batch_size) for batch_size in (16, 256)),
    ("shufflenet_v2_x0_5", 64),
)
CIFAR10 = (  # the networks of results/cifar10-networks, and the stem that they have there
    *((f"{PLAIN}:{name}", "auto") for name in ("plain2", "wide2", "plain4", "plain8", "narrow_residual")),
    *((name, "auto") for name in ("shufflenet_v2_x0_5", "mobilenet_v3_small", "regnet_y_400mf")),
    ("resnet34", "own"),
)
BN_WEIGHTS = (1.0, 0.3, 0.1, 0.03)
LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
TUNING_SEEDS, SEEDS = (16, 17), (1, 2, 3, 4, 5)
RUNS, PREDICTIONS = HERE / "runs.csv", HERE / "predictions.csv"
KEY = ("network", "batch_size", "bn_weight", "learning_rate", "seed")
Runs = dict[tuple[str, ...], dict[str, str]]


def relative_gradient(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """‖∇W‖ / ‖W‖ of each convolution's weights, its mean over the batches, the lower median over the layers."""
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    ratios = []
    for images, labels in batches:
        network.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        ratios.append([(layer.weight.grad.norm() / layer.weight.norm()).item() for layer in convolutions])
    return median_low(map(mean, zip(*ratios, strict=True)))


def settings_of(network: str, batch_size: int, bn_weight: float, seed: int, **others: object) -> Settings:
    """The settings of a run: the baseline's where γ starts at 1, and else the method's."""
    method = PAPER["baseline"] if bn_weight == 1 else PAPER["proposed"] | {"bn_weight": bn_weight}
    others = {"dataset": "digits", "device": "cpu"} | others
    return prepare(Settings(network=network, batch_size=batch_size, seed=seed, **method, **others))


def suggest(network: str, batch_size: int, bn_weights: Sequence[float], **others: object) -> tuple[str, float]:
    """The relative gradient over 8 batches, its median over the seeds 1 to 3; the γ nearest to 0.03 / it in ratio."""
    found = []
    for seed in (1, 2, 3):
        settings = settings_of(network, batch_size, 1.0, seed, **others)
        make_deterministic(seed)
        images = load_images(settings)
        built = construct(settings, len(images.classes), images.size).train()
        found.append(relative_gradient(built, islice(Batches(images, "train", batch_size, True), 8)))
    suggested = 0.03 / median(found)
    return f"{median(found):.4f}", min(bn_weights, key=lambda g: max(g / suggested, suggested / g))


def predict(path: str) -> None:
    """Write what the rule predicts, before the runs. `path` has CIFAR-10 in images/."""
    with PREDICTIONS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["dataset", "network", "batch_size", "relative_gradient", "predicted_bn_weight"])
        for network, batch_size in CONDITIONS:
            writer.writerow(["digits", network, batch_size, *suggest(network, batch_size, BN_WEIGHTS)])
        for network, stem in CIFAR10:
            suggested = suggest(network, 128, (1.0, 0.3, 0.1), dataset="cifar10", stem=stem, path=path)
            writer.writerow(["cifar10", network, 128, *suggested])


def read(file: Path, key: tuple[str, ...]) -> Runs:
    """The lines of a file by their key."""
    with file.open(newline="") as lines:
        return {tuple(row[name] for name in key): row for row in csv.DictReader(lines)}


def make(network: str, batch_size: int, bn_weight: float, learning_rate: float, seed: int, runs: Runs) -> None:
    """Train once, and append the run's numbers to the file, unless they are there. A diverged run has accuracy 0."""
    key = (network, str(batch_size), f"{bn_weight:g}", f"{learning_rate:g}", str(seed))
    if key in runs:
        return
    with TemporaryDirectory() as path:
        others = {"num_epochs": 10, "split_seed": "seed", "debias": True, "checkpoint_seconds": 1e9}
        settings = settings_of(network, batch_size, bn_weight, seed, path=path, learning_rate=learning_rate, **others)
        try:
            results = train(settings)
            numbers = [results.val_accuracy, results.test_accuracy, results.columns["train_loss"][-1]]
        except FloatingPointError:
            numbers = [0.0, 0.0, float("nan")]
    row = [*key, *(f"{number:.4f}" for number in numbers)]
    with RUNS.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(row)
    runs[key] = dict(zip((*KEY, "val_accuracy", "test_accuracy", "train_loss"), row, strict=True))


def best_rate(network: str, batch_size: int, bn_weight: float, runs: Runs) -> float:
    """The learning rate with the best mean validation accuracy on the tuning seeds; the smaller one on a tie."""
    key = (network, str(batch_size), f"{bn_weight:g}")
    of_rates = {
        rate: {seed: float(runs[*key, f"{rate:g}", str(seed)]["val_accuracy"]) for seed in TUNING_SEEDS}
        for rate in LEARNING_RATES
    }
    return choose_learning_rates({network: of_rates})[network]


def run() -> None:
    """Make all runs that are missing."""
    torch.set_num_threads(1)
    if not RUNS.exists():
        RUNS.write_text(",".join((*KEY, "val_accuracy", "test_accuracy", "train_loss")) + "\n")
    runs = read(RUNS, KEY)
    for condition in CONDITIONS:
        for bn_weight in BN_WEIGHTS:
            for rate in LEARNING_RATES:
                for seed in TUNING_SEEDS:
                    make(*condition, bn_weight, rate, seed, runs)
            rate = best_rate(*condition, bn_weight, runs)
            for seed in SEEDS:
                make(*condition, bn_weight, rate, seed, runs)


IMAGES = 3.6 * len(SEEDS)  # a percent of the test images of all seeds


def report() -> list[str]:
    """The mean test accuracies at each γ, what the rule and constant choices of γ lose to the best γ, and the tests."""
    runs, predictions = read(RUNS, KEY), read(PREDICTIONS, ("dataset", "network", "batch_size"))
    header = ["network", "batch", "‖∇W‖/‖W‖", "predicted γ", *(f"γ = {g:g} (rate)" for g in BN_WEIGHTS)]
    rows = []
    lost: dict[str, list[int]] = {name: [] for name in ("the rule", *(f"always {g:g}" for g in BN_WEIGHTS))}
    gradients, best_bn_weights = [], []
    for network, batch_size in CONDITIONS:
        prediction = predictions["digits", network, str(batch_size)]
        rates = {g: best_rate(network, batch_size, g, runs) for g in BN_WEIGHTS}
        correct = {  # test images of all seeds: whole numbers, so that ties are ties
            g: sum(
                round(float(runs[network, str(batch_size), f"{g:g}", f"{rate:g}", str(s)]["test_accuracy"]) * 3.6)
                for s in SEEDS
            )
            for g, rate in rates.items()
        }
        predicted, best = float(prediction["predicted_bn_weight"]), max(correct.values())
        gradients.append(float(prediction["relative_gradient"]))
        best_bn_weights.append(max(correct, key=lambda g: (correct[g], g)))  # the larger one on a tie
        for name, losses in lost.items():
            losses.append(best - correct[predicted if name == "the rule" else float(name.removeprefix("always "))])
        row = [network.rpartition(":")[2], f"{batch_size}", prediction["relative_gradient"], f"{predicted:g}"]
        row += [f"{correct[g] / IMAGES:.2f} ({rates[g]:g})" for g in BN_WEIGHTS]
        rows.append(dict(zip(header, row, strict=True)))
    of_choices = [
        {"choice of γ": name, "mean loss": f"{mean(losses) / IMAGES:.2f}", "largest": f"{max(losses) / IMAGES:.2f}"}
        for name, losses in lost.items()
    ]
    lines = [markdown(rows, header), "", markdown(of_choices, list(of_choices[0]))]
    constant = min((name for name in lost if name != "the rule"), key=lambda name: mean(lost[name]))
    p_value = wilcoxon(lost["the rule"], lost[constant], alternative="less").pvalue
    correlation = spearmanr(gradients, best_bn_weights, alternative="less")
    lines += ["", f"the rule against {constant}: p = {p_value:.2g}"]
    return [*lines, f"Spearman's correlation {correlation.statistic:.2f}, p = {correlation.pvalue:.2g}"]


if __name__ == "__main__":
    print("\n".join({"predict": predict, "run": run, "report": report}[sys.argv[1]](*sys.argv[2:]) or []))
