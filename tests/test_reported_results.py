"""Every number of the README's results is that of the committed result files."""

import re
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from torch import nn

from image_sets.batches import Batches
from image_sets.loading import load_image_set
from networks import construct_network
from reported import (
    CIFAR10_TUNED,
    DIGITS,
    DIGITS_TUNED,
    RESULTS,
    SETTINGS,
    SWEEP,
    Tuned,
    accuracies,
    best,
    best_on_last_tie,
    interval,
    last,
    p_value,
    power,
    read_runs,
    spread,
)
from seeds import make_deterministic

ROOT = Path(__file__).parent.parent
README, MORE, BENCHMARKS = ((ROOT / folder / "README.md").read_text() for folder in ("", "results", "benchmarks"))
MODULES = (ROOT / "MODULES.md").read_text()
FIRST_SCREEN = README.split("## Two commands")[0]
PAPER = ("baseline", "proposed", "init", "rate", "input")
CIFAR10 = CIFAR10_TUNED.at("0.1")
AT_005 = f"{DIGITS}-learning_rate=0.05"
LONG = AT_005.replace("num_epochs=5", "num_epochs=20")


def lines_of(title: str, file: str = MORE) -> str:
    """The text of a section, as it is."""
    return re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", file, re.DOTALL | re.MULTILINE)[1]


def section(title: str, file: str = MORE) -> str:
    """The text of a section, in one line."""
    return " ".join(lines_of(title, file).split())


def holm(p: float, p_values: list[float]) -> float:
    """A p-value after Holm's correction, which is one of these."""
    return min(1, max((len(p_values) - j) * q for j, q in enumerate(sorted(p_values)) if q <= p))


def read_seconds(files: Iterable[Path]) -> list[float]:
    """How long the runs took."""
    return [float(re.search(r"^# seconds: (.*)$", file.read_text(), re.MULTILINE)[1]) for file in files]


def test_table_of_modes():
    rows = re.findall(r"^\| (neither|`[^|]*`) \| ([\d.]+ ± [\d.]+) \|(.*)\|(.*)\|$", BENCHMARKS, re.MULTILINE)
    modes = {
        "neither": ("digits", AT_005),
        "`--precision bfloat16`": ("digits-modes", f"{AT_005}-precision=bfloat16"),
        "`--compile`": ("digits-modes", f"{AT_005}-compile"),
    }
    assert [row[0] for row in rows] == list(modes)
    of_mode = {mode: accuracies(*of, "proposed") for mode, of in modes.items()}
    for mode, mean_and_deviation, difference, between in rows:
        assert mean_and_deviation == spread(of_mode[mode])
        if mode != "neither":
            differences = of_mode[mode] - of_mode["neither"]
            assert difference == f" {differences.mean():+.2f} "
            low, high = interval(differences)
            assert between == f" {low:+.2f} to {high:+.2f} "
            assert high > 0  # USAGE.md says that no cost is established


def check_tables(text: str, of_setting: dict[str, np.ndarray], contrasts: tuple[tuple[str, str], ...] = ()) -> None:
    """Every cell of a table of settings, whose first row is the baseline's, and of the table of contrasts below it."""
    rows = re.findall(r"^\| ([\w+ .]+?) +\| (.*) \|$", text, re.MULTILINE)
    pairs = {name: (name, "baseline") for name in of_setting if name != "baseline"}
    pairs |= {f"{one} vs {other}": (one, other) for one, other in contrasts}
    assert [name for name, _ in rows] == [
        "setting",
        "baseline",
        *list(of_setting)[1:],
        *["setting"] * bool(contrasts),
    ] + [f"{one} vs {other}" for one, other in contrasts]
    differences = {name: of_setting[one] - of_setting[other] for name, (one, other) in pairs.items()}
    p_values = {name: p_value(of) for name, of in differences.items()}
    for name, row in rows:
        fields = [field.strip() for field in row.split("|")]
        if name in of_setting:
            assert fields[:2] == ["15", spread(of_setting[name])]
            fields = fields[2:]
        if name in pairs:
            of, corrected = differences[name], holm(p_values[name], list(p_values.values()))
            assert fields == [
                "{:+.2f} ({:+.2f} to {:+.2f})".format(of.mean(), *interval(of)),
                *(f"{p_values[name]:.2g}", f"{corrected:.2g}", f"{(of > 0).sum()} of 15"),
                "significant" if corrected <= 0.05 else "not significant",
            ]


def test_digits():
    of_setting = {name: accuracies("digits", AT_005, name) for name in PAPER}
    check_tables(lines_of("Digits, five epochs"), of_setting)


def check_tuning(text: str, tuned: Tuned, settings: tuple[str, ...]) -> None:
    """Every cell of a table of the rates that were tried."""
    rows = [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["setting", *tuned.rates]
    for row, name in zip(rows[2:], settings, strict=True):
        means = [f"{tuned.mean_val_accuracy(rate, name):.2f}" for rate in tuned.rates]
        chosen = tuned.rates.index(tuned.chosen_rate(name))
        means[chosen] = f"**{means[chosen]}**"
        assert row == [name, *means]


def test_fair_rates_of_cifar10():
    settings = ("baseline", "proposed")
    _, tuning, results = re.split(r"\n\n(?=\| setting)", lines_of("CIFAR-10 at fair rates"))
    check_tuning(tuning.split("\n\n")[0], CIFAR10_TUNED, settings)
    of_setting = {name: CIFAR10_TUNED.accuracies(name) for name in settings}
    check_tables(results, of_setting)
    fair = of_setting["proposed"] - of_setting["baseline"]
    ours, theirs = (accuracies("cifar10-own-stem", CIFAR10, name) for name in ("proposed", "baseline"))
    text = section("CIFAR-10 at fair rates")
    sentence = "at the paper's rate for both, `proposed` gains {:.2f}, at fair rates {:.2f}."
    assert sentence.format((ours - theirs).mean(), fair.mean()) in text
    p_values = [p_value(ours - theirs), p_value(fair)]
    corrected = "p = {:.2g} and {:.2g}."
    assert corrected.format(*(holm(p, p_values) for p in p_values)) in text
    by_rate = [CIFAR10_TUNED.mean_val_accuracy(rate, "proposed") for rate in CIFAR10_TUNED.rates]
    ahead = [
        of - CIFAR10_TUNED.mean_val_accuracy(rate, "baseline")
        for of, rate in zip(by_rate, CIFAR10_TUNED.rates, strict=True)
    ]
    assert "by {:.1f}, {:.1f}, {:.1f} and {:.1f} points".format(*ahead) in text


def test_fair_rates_of_digits():
    title, rates = "Digits at fair rates", DIGITS_TUNED.rates
    settings = (*PAPER, "logits")
    _, tuning, *results = re.split(r"\n\n(?=\| setting)", lines_of(title))
    check_tuning(tuning.split("\n\n")[0], DIGITS_TUNED, settings)
    of_setting = {name: DIGITS_TUNED.accuracies(name) for name in settings}
    check_tables("\n\n".join(results), of_setting, (("proposed", "logits"),))
    gains = {name: of - of_setting["baseline"] for name, of in of_setting.items()}
    at_005 = accuracies("digits", AT_005, "proposed") - accuracies("digits", AT_005, "baseline")
    text = section(title)
    assert f"`proposed` gains {gains['proposed'].mean():.2f}, and {at_005.mean():.2f} where both have 0.05." in text
    assert f"`logits` gains {gains['logits'].mean():.2f}, and" in text
    assert of_setting["init"].argmin() == 13 and f"the 14th with {of_setting['init'].min():.2f} %;" in text
    init, baseline = (DIGITS_TUNED.accuracies(name, last) for name in ("init", "baseline"))
    by_last = "by the last epoch its gain is {:.2f}, between {:.2f} and {:.2f}."
    assert by_last.format((init - baseline).mean(), *interval(init - baseline)) in text
    assert [name for name in settings if DIGITS_TUNED.chosen_rate(name) == rates[0]] == ["rate"]
    at_02 = "at 0.2, the validation accuracy of `proposed` is {:.2f} %, that of the baseline {:.2f} %."
    means = {name: DIGITS_TUNED.mean_val_accuracy("0.2", name) for name in settings}
    assert at_02.format(means["proposed"], means["baseline"]) in text
    assert min(means[name] for name in ("proposed", "init", "logits")) > means["baseline"]


def test_what_gains():
    title = "What of the method gains"
    of_setting = {name: accuracies("digits-why", AT_005, name) for name in SETTINGS}
    contrasts = (("proposed", "logits"), ("proposed", "logits+rates"), ("proposed", "rate"))
    check_tables(lines_of(title), of_setting, (*contrasts, ("init", "input"), ("logits", "input")))
    text = section(title)
    deviation = (of_setting["proposed"] - of_setting["logits"]).std(ddof=1)
    found = float(re.search(r"with 15 seeds, one of ([\d.]+) between", text)[1])
    assert power((found - 0.005) / deviation, 15) < 0.8 < power((found + 0.005) / deviation, 15)
    gains = [
        (accuracies(folder, AT_005, "proposed") - accuracies(folder, AT_005, "baseline")).mean()
        for folder in ("digits-why", "digits")
    ]
    assert "a gain of {:.2f} here and of {:.2f} on the CPU of".format(*gains) in text
    assert of_setting["init"].argmin() == 13 and f"the 14th with {of_setting['init'].min():.2f} %." in text


def last_loss(folder: str, experiment: str, setting: str) -> float:
    """The median over the seeds of the training loss in the last epoch."""
    return np.median([run["train_loss"].iloc[-1] for run in read_runs(folder, experiment, setting).values()])


def test_sweep():
    title = "Which γ to start with"
    of_setting = {name: accuracies("digits-sweep", AT_005, name) for name in ("baseline", *SWEEP)}
    check_tables(lines_of(title), of_setting)
    gains = {name: (of_setting[name] - of_setting["baseline"]).mean() for name in SWEEP}
    assert set(sorted(gains, key=gains.get)[-2:]) == {"bn_weight 0.05", "bn_weight 0.1"}
    losses = {name: last_loss("digits-sweep", AT_005, name) for name in of_setting}
    assert f"about the same, {gains['bn_weight 0.25']:.2f} and {gains['bn_weight 0.5']:.2f};" in section(title)
    slow = losses.pop("bn_weight 0.01")
    sentence = f"is {slow:.2f} in the median, that of all others at most {max(losses.values()):.2f}."
    assert sentence in section(title)


def test_more_epochs():
    of_setting = {name: accuracies("digits-20-epochs", LONG, name) for name in ("baseline", "proposed")}
    check_tables(lines_of("More epochs"), of_setting)
    text = section("More epochs")
    gain, short, by_last = (
        accuracies(folder, experiment, "proposed", select) - accuracies(folder, experiment, "baseline", select)
        for folder, experiment, select in (
            ("digits-20-epochs", LONG, best),
            ("digits-why", AT_005, best),
            ("digits-20-epochs", LONG, last),
        )
    )
    less = "where it is {:.2f}: by {:.2f} ({:.2f} to {:.2f};"
    assert less.format(short.mean(), (short - gain).mean(), *interval(short - gain)) in text
    assert "last epoch it is {:.2f} ({:.2f} to {:.2f}).".format(by_last.mean(), *interval(by_last)) in text
    losses = "is {:.3f} in the median, the baseline's {:.3f}."
    assert losses.format(*(last_loss("digits-20-epochs", LONG, name) for name in ("proposed", "baseline"))) in text


def learned(folder: str, setting: str, kind: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Learned γ / initial γ, or β: in the network's batch norms, and in that in front of it where there is one."""
    start = 1 if setting == "baseline" else 0.1
    of_network, of_images = [], []
    [file] = (RESULTS / folder).glob("*.npz")
    with np.load(file) as arrays:
        for name in arrays:
            if name.startswith(f"{setting}/") and name.endswith("running_mean"):
                values = arrays[name.replace("running_mean", kind)]
                in_front = "/0." in name
                scale = 1 if kind == "bias" else 0.58 * start if in_front else start
                (of_images if in_front else of_network).append(values / scale)
    return np.concatenate(of_network), of_images


def test_learned_scales():
    text = " ".join(MORE.split())
    for folder, sentence in {
        "digits-why": "they are {:.2f} to {:.2f} times what they were (seed 1), and",
        "digits-20-epochs": "and {:.2f} to {:.2f} times after [20 epochs]",
    }.items():
        of_network, of_images = learned(folder, "proposed", "weight")
        proposed = np.concatenate([of_network, *of_images])
        assert sentence.format(proposed.min(), proposed.max()) in text
    baseline, none = learned("digits-why", "baseline", "weight")
    assert f"In the baseline they are {baseline.min():.2f} to {baseline.max():.2f} times that" in text and not none
    init, [of_input] = learned("digits-why", "init", "weight")
    by_init = "{:.2f} to {:.2f} times in the batch norms of the network, and up to {:.2f} times in that for the images."
    assert by_init.format(init.min(), init.max(), of_input.max()) in text
    (ours, _), (theirs, _) = (learned("digits-why", name, "bias") for name in ("proposed", "baseline"))
    shifts = "between {:.2f} and {:.2f} in `proposed`, {:.2f} and {:.2f} in the baseline."
    assert shifts.format(ours.min(), ours.max(), theirs.min(), theirs.max()) in text


def test_how_sure_it_is():
    text = section("How sure that is")
    gains = {
        select: accuracies("digits", AT_005, "proposed", select) - accuracies("digits", AT_005, "baseline", select)
        for select in (best, best_on_last_tie, last)
    }
    gain = gains[best]
    assert f"the gain of `proposed` is {gain.mean():.2f} percentage points." in text
    by_last = "By the accuracies of the last epoch it is {:.2f} as well (95 % interval {:.2f} to {:.2f})"
    assert by_last.format(gains[last].mean(), *interval(gains[last])) in text
    flipped = np.array(list(product((1, -1), repeat=15))) @ gain
    assert f"flips signs gives p = {np.mean(flipped >= gain.sum() - 1e-9):.2g}." in text
    tables = [table for name in PAPER for table in read_runs("digits", AT_005, name).values()]
    ties = sum((table["val_accuracy"] == table["val_accuracy"].max()).sum() > 1 for table in tables)
    assert f"In {ties} of the {len(tables)} runs" in text
    on_last = gains[best_on_last_tie]
    assert "the gain is {:.2f} ({:.2f} to {:.2f})".format(on_last.mean(), *interval(on_last)) in text
    baseline, without = accuracies("digits", AT_005, "baseline"), np.delete(gain, 3)
    assert baseline.argmin() == 3
    sentence = "the fourth, where the baseline has {:.2f} %, it is {:.2f} ({:.2f} to {:.2f})."
    assert sentence.format(baseline[3], without.mean(), *interval(without)) in text
    size = gain.mean() / gain.std(ddof=1)
    needed = next(n for n in range(2, 99) if power(size, n) >= 0.8)
    assert f"The effect size is {size:.2f}, for which {needed} seeds give a power of 0.8." in text


def read_mechanism(folder: str) -> list[dict[str, list[float]]]:
    """The numbers of the two tables of `mechanism.py`, by their first cell, or first two."""
    tables = []
    for text in (RESULTS / "mechanism" / folder / "mechanism.md").read_text().split("\n\n"):
        rows = [re.split(r" *\| *", row.strip("| ")) for row in text.splitlines()[2:]]
        keys = [row[0] if len(tables) == 0 else f"{row[0]} {row[1]}" for row in rows]
        numbers = [[float(cell.strip("°")) for cell in row[1 + len(tables) :]] for row in rows]
        tables.append(dict(zip(keys, numbers, strict=True)))
    return tables


def test_mechanism():
    text = section("What a small γ does")
    at_first, by_step = read_mechanism("cifar10-own-stem")
    (logits, _, gradient, *_), (small_logits, _, small_gradient, *_) = at_first["1"], at_first["0.1"]
    assert f"deviation of {logits:g} with γ = 1 and of {small_logits:g} with γ = 0.1" in text
    assert f"has a norm of {gradient:g} and of {small_gradient:g}." in text
    angles = [by_step[f"{name} {step}"][2] for step in (10, 352) for name in ("baseline", "proposed")]
    turned = "by {:.1f} degrees (median), the method by {:.1f}; in the first epoch, by {:.1f} and {:.1f}."
    assert turned.format(*angles) in text
    anew = "epoch is {:.1f} and {:.1f} %."
    assert anew.format(*(by_step[f"{name} 352"][1] for name in ("baseline", "proposed"))) in text


def test_mechanism_among_the_modules():
    at_first, by_step = read_mechanism("digits")
    rows = re.findall(r"^\| ([\d.]+) \| (.*) \|$", lines_of("`mechanism.py`", MODULES), re.MULTILINE)
    found = {bn_weight: [float(number) for number in numbers.split(" | ")] for bn_weight, numbers in rows}
    assert found == {bn_weight: numbers[:3] for bn_weight, numbers in at_first.items()}
    text = section("`mechanism.py`", MODULES)
    sentence = (
        "at step 20, `proposed` has a test accuracy of {:.1f} % with running statistics and of {:.1f} % with statistics"
        " estimated anew (`baseline`: {:.1f} % and {:.1f} %); at step 100, {:.1f} % and {:.1f} %"
        " ({:.1f} % and {:.1f} %)."
    )
    of = [by_step[f"{name} {step}"] for step in (20, 100) for name in ("proposed", "baseline")]
    assert sentence.format(*(number for numbers in of for number in numbers[:2])) in text
    turned = "have turned by {:.1f}° at step 100, in the median over the convolutions, those of `baseline` by {:.1f}°."
    assert turned.format(*(numbers[2] for numbers in of[2:])) in text


def test_initialization_of_the_mechanism():
    """The committed numbers for digits are what a plain computation gives, but for rounding that depends on the CPU."""
    at_first, _ = read_mechanism("digits")
    image_set = load_image_set("digits")
    for bn_weight, (deviation, loss, *gradients) in at_first.items():
        make_deterministic(1)
        network = construct_network("resnet18", 10, "digits", float(bn_weight))
        images, labels = next(iter(Batches(image_set, "train", 64, normalize=False)))
        logits = network(images)
        of_batch = F.cross_entropy(logits, labels)
        of_batch.backward()
        convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
        norms = [convolutions[place].weight.grad.norm().item() for place in (0, len(convolutions) // 2, -1)]
        found = [logits.std(correction=0).item(), of_batch.item(), *norms]
        assert found == pytest.approx([deviation, loss, *gradients], rel=0.06)  # they have two digits


def test_first_screen():
    def at(folder: str, experiment: str) -> Callable[[str], np.ndarray]:
        return partial(accuracies, folder, experiment)

    def p_values(of: Callable[[str], np.ndarray], *pairs: str) -> list[float]:
        """Of all comparisons of an experiment, each "one other" or, with the baseline, "one"."""
        return [p_value(of(one) - of(*other or ["baseline"])) for one, *other in map(str.split, pairs)]

    why, fair, long = at("digits-why", AT_005), DIGITS_TUNED.accuracies, at("digits-20-epochs", LONG)
    cifar10, cifar10_fair = at("cifar10-own-stem", CIFAR10), CIFAR10_TUNED.accuracies
    both = p_values(cifar10, "proposed") + p_values(cifar10_fair, "proposed")
    settings = ("proposed", "init", "rate", "input", "logits")
    contrasts = ("proposed logits", "proposed logits+rates", "proposed rate", "init input", "logits input")
    expected = [
        ("CIFAR-10, torchvision's own first layers, 5 epochs, the paper's learning rate", cifar10, both),
        ("the same, each with the best of four learning rates", cifar10_fair, both),
        (
            "the 8×8 digits of scikit-learn, 5 epochs, learning rate 0.05",
            why,
            p_values(why, *settings, "logits+rates", *contrasts),
        ),
        (
            "digits, 5 epochs, each with the best of six learning rates",
            fair,
            p_values(fair, *settings, "proposed logits"),
        ),
        ("digits, 20 epochs, learning rate 0.05", long, p_values(long, "proposed")),
    ]
    _, *rows = re.findall(r"^\| ([^|]*) \| (.*) \|$", FIRST_SCREEN, re.MULTILINE)
    for row, (name, of, compared) in zip(rows, expected, strict=True):
        ours, theirs = of("proposed"), of("baseline")
        gain, (low, high) = (ours - theirs).mean(), interval(ours - theirs)
        corrected = holm(p_value(ours - theirs), compared)
        cells = f"{ours.mean():.2f} | {theirs.mean():.2f} | {gain:.2f} ({low:.2f} to {high:.2f}) | {corrected:.2g}"
        assert row == (name, cells)

    text = " ".join(FIRST_SCREEN.split())
    gains = [(of("proposed") - of("baseline")).mean() for of in (why, long, at("digits", AT_005))]
    assert "the gain is {:.2f} with 5 epochs and {:.2f} with 20.".format(*gains) in text
    assert f"on another CPU, has a gain of {gains[2]:.2f} where this one has {gains[0]:.2f}." in text
    logits = fair("logits") - fair("baseline")
    assert "gains {:.2f} ({:.2f} to {:.2f}), each with".format(logits.mean(), *interval(logits)) in text
    assert holm(p_value(logits), expected[3][2]) <= 0.05
