"""Every number of the README's results is that of the committed result files."""

import re
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from torch import nn

from data import Batches, load_image_set
from networks import construct_network
from reported import (
    DIGITS,
    RESULTS,
    SETTINGS,
    SWEEP,
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
FIRST_SCREEN = " ".join(README.split("## The method")[0].split())
PAPER = ("baseline", "proposed", "init", "rate", "input")
AT_005 = f"{DIGITS}-learning_rate=0.05"
TUNING_SEEDS = range(16, 21)


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
            assert between == " {:+.2f} to {:+.2f} ".format(*interval(differences))


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


def test_table_of_digits():
    text = lines_of("Digits, five epochs", README)
    check_tables(text, {name: accuracies("digits", AT_005, name) for name in PAPER})
    files = [file for name in PAPER for file in RESULTS.glob(f"digits/{AT_005}-{SETTINGS[name]}-seed*.csv")]
    assert len(files) == 75 and f"({np.median(read_seconds(files)):.0f} seconds a run in the median)" in text


def at_rate(rate: str) -> str:
    """How the names of the digits runs at this learning rate begin."""
    return DIGITS if rate == "0.1" else f"{DIGITS}-learning_rate={rate}"


def mean_val_accuracy(rate: str, name: str) -> float:
    """Mean over the tuning seeds of the best validation accuracy of a run (%)."""
    runs = read_runs("digits-fair-rates", at_rate(rate), name)
    return np.mean([runs[seed]["val_accuracy"].max() for seed in TUNING_SEEDS])


def accuracies_at(rate: str, name: str, select=best) -> np.ndarray:
    """Test accuracies of a setting at its chosen rate."""
    return accuracies("digits-fair-rates", at_rate(rate), name, select)


def test_fair_rates():
    title = "Is it more than a better learning rate?"
    text = lines_of(title)
    tuning, *results = re.split(r"\n\n(?=\| setting)", text)[1:]
    rates = ("0.005", "0.01", "0.02", "0.05", "0.1", "0.2")
    settings = (*PAPER, "logits")
    means = {name: {rate: mean_val_accuracy(rate, name) for rate in rates} for name in settings}
    chosen = {name: max(rates, key=lambda rate, of=of: round(of[rate], 9)) for name, of in means.items()}
    rows = [re.split(r" *\| *", line.strip("| ")) for line in tuning.split("\n\n")[0].splitlines()[2:]]
    for row, name in zip(rows, settings, strict=True):
        cells = [f"{means[name][rate]:.2f}" for rate in rates]
        assert row == [name, *(f"**{x}**" if rate == chosen[name] else x for rate, x in zip(rates, cells, strict=True))]
    of_setting = {name: accuracies_at(chosen[name], name) for name in settings}
    check_tables("\n\n".join(results), of_setting, (("proposed", "logits"),))
    gains = {name: of - of_setting["baseline"] for name, of in of_setting.items()}
    at_005 = accuracies("digits", AT_005, "proposed") - accuracies("digits", AT_005, "baseline")
    text = section(title)
    assert f"`proposed` gains {gains['proposed'].mean():.2f}, and {at_005.mean():.2f} where both have 0.05." in text
    assert f"`logits` gains {gains['logits'].mean():.2f}, and" in text
    assert of_setting["init"].argmin() == 13 and f"the 14th with {of_setting['init'].min():.2f} %;" in text
    init, baseline = (accuracies_at(chosen[name], name, last) for name in ("init", "baseline"))
    by_last = "by the last epoch its gain is {:.2f}, between {:.2f} and {:.2f}."
    assert by_last.format((init - baseline).mean(), *interval(init - baseline)) in text
    assert chosen["rate"] == rates[0] and max(rates[0] == rate for name, rate in chosen.items() if name != "rate") == 0
    at_02 = "at 0.2, the validation accuracy of `proposed` is {:.2f} %, that of the baseline {:.2f} %."
    assert at_02.format(means["proposed"]["0.2"], means["baseline"]["0.2"]) in text
    assert min(means[name]["0.2"] for name in ("proposed", "init", "logits")) > means["baseline"]["0.2"]
    best_of_six = "and of {:.2f} ({:.2f} to {:.2f}) where each has the best of six learning rates."
    assert best_of_six.format(gains["proposed"].mean(), *interval(gains["proposed"])) in FIRST_SCREEN
    as_much = "can tell: {:.2f} ({:.2f} to {:.2f})."
    assert as_much.format(gains["logits"].mean(), *interval(gains["logits"])) in FIRST_SCREEN
    proposed, baseline, logits = (spread(of_setting[name]) for name in ("proposed", "baseline", "logits"))
    why = section("Why, and how sure that is", README)
    assert f"`proposed` has {proposed} %, the baseline {baseline} %." in why and f"and has {logits} %," in why


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


def test_sweep():
    title = "Which γ to start with"
    of_setting = {name: accuracies("digits-sweep", AT_005, name) for name in ("baseline", *SWEEP)}
    check_tables(lines_of(title), of_setting)
    gains = {name: (of_setting[name] - of_setting["baseline"]).mean() for name in SWEEP}
    assert set(sorted(gains, key=gains.get)[-2:]) == {"bn_weight 0.05", "bn_weight 0.1"}
    assert of_setting["bn_weight 0.25"].mean() >= of_setting["bn_weight 0.5"].mean()
    losses = {
        name: np.median([run["train_loss"].iloc[-1] for run in read_runs("digits-sweep", AT_005, name).values()])
        for name in of_setting
    }
    slow = losses.pop("bn_weight 0.01")
    sentence = f"is {slow:.2f} in the median, that of all others at most {max(losses.values()):.2f}."
    assert sentence in section(title)


def test_learned_scales():
    text = " ".join(MORE.split())
    [file] = (RESULTS / "digits-why").glob("*.npz")
    of_network, of_images = {}, {}  # learned γ / initial γ: in the network's batch norms, in that in front of it
    with np.load(file) as arrays:
        for setting, start in {"baseline": 1, "proposed": 0.1, "init": 0.1}.items():
            names = [name.replace("running_mean", "weight") for name in arrays if name.endswith("running_mean")]
            names = [name for name in names if name.startswith(f"{setting}/")]
            of_network[setting] = np.concatenate([arrays[name] / start for name in names if "/0." not in name])
            of_images[setting] = [arrays[name] / (0.58 * start) for name in names if "/0." in name]
    proposed, baseline = np.concatenate([of_network["proposed"], *of_images["proposed"]]), of_network["baseline"]
    assert f"they are {proposed.min():.2f} to {proposed.max():.2f} times what they were (seed 1)." in text
    assert f"In the baseline they are {baseline.min():.2f} to {baseline.max():.2f} times that" in text
    init, [of_input] = of_network["init"], of_images["init"]
    by_init = "{:.2f} to {:.2f} times in the batch norms of the network, and up to {:.2f} times in that for the images."
    assert by_init.format(init.min(), init.max(), of_input.max()) in text
    assert not of_images["baseline"]


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
    turned = (
        f"the baseline turns its convolutions by {angles[2]:.0f} degrees, the method by {angles[3]:.0f} (one seed)."
    )
    assert turned in section("Why, and how sure that is", README)


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


def test_sentences_about_cifar10():
    folder, experiment = "cifar10-own-stem", "cifar10-resnet18-num_epochs=5-stem=own"
    ours, theirs = (accuracies(folder, experiment, name) for name in ("proposed", "baseline"))
    names = [f"{folder}/{experiment}-{SETTINGS[name]}-seed*.csv" for name in ("proposed", "baseline")]
    seconds = read_seconds(file for name in names for file in RESULTS.glob(name))
    gains = ours - theirs
    text = section("CIFAR-10, five epochs", README)
    low, high = interval(gains)
    sentence = (
        f"accuracy is {spread(ours)} % (mean ± standard deviation over {len(gains)} seeds), without it {spread(theirs)}"
        f" %: a difference of {gains.mean():.2f} percentage points (95 % interval {low:.2f} to {high:.2f},"
        f" p = {p_value(gains):.2g})."
    )
    assert sentence in text
    assert f"A run took {np.median(seconds):,.0f} seconds in the median" in text
    assert f"{ours.mean():.2f} % with the paper's method and {theirs.mean():.2f} % without" in FIRST_SCREEN
    assert f"(p = {p_value(gains):.2g};" in FIRST_SCREEN and "with 15 seeds each" in FIRST_SCREEN


def test_first_screen():
    sentence = (
        r"a ResNet-18 reaches ([\d.]+) % with it and ([\d.]+) % without: a gain of ([\d.]+) percentage points"
        r" \(95 % interval ([\d.]+) to ([\d.]+), p = ([\d.]+)\)"
    )
    proposed, baseline = (accuracies("digits", AT_005, name) for name in ("proposed", "baseline"))
    gains = proposed - baseline
    expected = [f"{x:.2f}" for x in (proposed.mean(), baseline.mean(), gains.mean(), *interval(gains))]
    assert list(re.search(sentence, FIRST_SCREEN).groups()) == [*expected, f"{p_value(gains):.2g}"]
