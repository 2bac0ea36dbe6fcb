import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
from scipy import stats

import plan
import settings
import train
from folders import make_folder
from settings import NAMED, PAPER

ROOT = Path(__file__).parent.parent
README, MODULES, BENCHMARKS = ((ROOT / name).read_text() for name in ("README.md", "MODULES.md", "benchmarks/README.md"))
NOT_OF_THE_PAPER = {"stem", "image_size", "no_flip", "workers", "precision", "compile", "equivalent", "tensorboard"}
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
EXAMPLES = [*EXAMPLE.findall(README), *EXAMPLE.findall(MODULES)]


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(example, few_digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})


def test_every_module_has_an_example():
    sections = re.findall(r"^## `(\w+)\.py`\n(.*?)(?=^## |\Z)", MODULES, re.DOTALL | re.MULTILINE)
    assert {name for name, _ in sections} == {file.stem for file in ROOT.glob("*.py")}
    for name, text in sections:
        [example] = EXAMPLE.findall(text)
        assert re.search(rf"^(from|import) {name}\b", example, re.MULTILINE)


def test_modules_import_only_what_stands_below_them():
    order = re.findall(r"^\| \[(\w+)\.py\]", MODULES, re.MULTILINE)
    assert sorted(order) == sorted(file.stem for file in ROOT.glob("*.py"))
    for place, name in enumerate(order):
        nodes = list(ast.walk(ast.parse((ROOT / f"{name}.py").read_text())))
        imports = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        imports |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert not imports & set(order[: place + 1]), name


@pytest.mark.parametrize("parser", [settings.make_parser(), plan.make_parser()], ids=["train", "reproduce"])
def test_every_flag_is_explained(parser):
    section = "The paper's training" if parser.prog == "train.py" else "The paper's experiment"
    text = re.search(rf"^## {section}\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)[1]
    table = dict(re.findall(r"^\| `(--\w+)` \| (.*?) \|", text, re.MULTILINE))
    flags = {action.option_strings[-1]: action.default for action in parser._actions}
    del flags["--help"]
    assert table.keys() == flags.keys()
    for flag, default in flags.items():
        if default not in ("", None, False) and not isinstance(default, list):
            assert type(default)(table[flag].strip("`")) == default


def test_settings_of_the_experiment_are_explained():
    rows = re.findall(r"^\| `([\w+]+)` \| ([\d.]+) \| ([\d.]+) \| `(\w+)` \|(?: `--equivalent (\S+)`)?", README, re.M)
    assert {
        name: {"bn_weight": float(bn_weight), "c": float(c), "input_norm": input_norm}
        | ({"equivalent": equivalent} if equivalent else {})
        for name, bn_weight, c, input_norm, equivalent in rows
    } == NAMED


def test_command_of_the_paper_has_every_flag():
    command = README.split("## The paper's training\n\n```\n")[1].split("```")[0].replace("\\\n", " ").split()
    assert command[:2] == ["python", "train.py"]
    arguments = [argument.strip("'").replace("cuda:0", "cpu") for argument in command[2:]]
    given, default = vars(train.parse(arguments)), vars(train.parse(["--device", "cpu"]))
    of_the_paper = set(default) - {"checkpoint_seconds", "restart", *NOT_OF_THE_PAPER}
    assert set(arguments[::2]) == {f"--{name}" for name in of_the_paper}
    assert {name for name in default if given[name] != default[name]} == {"name"}


def test_commands_for_a_network_and_images_of_ones_own(tmp_path):
    """As printed, in a folder with JPEGs of odd sizes and modes; every command ends with its results."""
    section = re.search(r"^## Your own network, your own images\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)[1]
    [example] = re.findall(r"^```\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    make_folder(tmp_path / "images" / "flowers")
    commands = example.replace("python ", f"{sys.executable} {ROOT}/").replace("--num_epochs 5", "--num_epochs 1")
    commands = commands.replace(".py --", ".py --device cpu --")
    run = subprocess.run(["bash", "-ec", commands], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("best epoch 1: ") == 2 and "| proposed | 3 " in run.stdout
    results = {file.name for file in (tmp_path / "results").iterdir()}
    own = "flowers-my_networks.small-batch_size=16-num_epochs=1-image_size=32-weight0.1-c100-bn-seed1.csv"
    experiment = "flowers-mobilenet_v3_small-batch_size=16-num_epochs=1"
    assert {own, f"{experiment}.md", f"{experiment}-paired-differences.png"} <= results
    assert f"{experiment}-normalized-values.png" in results  # which needs networks and images
    assert len(results) > 9


def committed_accuracies(files: str) -> list[float]:
    """Test accuracies at the best validation epoch, of the seeds 1 to 15 in this order."""
    found = (Path(train.__file__).parent / "results").glob(files)
    tables = {int(file.stem.rpartition("seed")[2]): pandas.read_csv(file, comment="#") for file in found}
    assert sorted(tables) == list(range(1, 16))
    return [tables[seed]["test_accuracy"][tables[seed]["val_accuracy"].idxmax()] for seed in sorted(tables)]


def test_table_of_modes_is_that_of_the_committed_files():
    rows = re.findall(r"^\| (neither|`[^|]*`) \| ([\d.]+ ± [\d.]+) \|(.*)\|(.*)\|$", BENCHMARKS, re.MULTILINE)
    files = {
        "neither": "digits/*-weight0.1-c100-bn-seed*.csv",
        "`--precision bfloat16`": "digits-modes/*-precision=bfloat16-weight0.1-c100-bn-seed*.csv",
        "`--compile`": "digits-modes/*-compile-weight0.1-c100-bn-seed*.csv",
    }
    assert [row[0] for row in rows] == list(files)
    accuracies = {mode: committed_accuracies(of) for mode, of in files.items()}
    for mode, mean_and_deviation, difference, interval in rows:
        assert mean_and_deviation == f"{np.mean(accuracies[mode]):.2f} ± {np.std(accuracies[mode], ddof=1):.2f}"
        if mode != "neither":
            differences = np.subtract(accuracies[mode], accuracies["neither"])
            low, high = stats.t.interval(0.95, 14, differences.mean(), stats.sem(differences))
            assert (difference, interval) == (f" {differences.mean():+.2f} ", f" {low:+.2f} to {high:+.2f} ")


def test_table_of_digits_is_that_of_the_committed_files():
    rows = re.findall(r"^\| (\w+) +\| (\d+) +\| (.*) \|$", README, re.MULTILINE)
    assert [row[0] for row in rows] == list(PAPER)
    accuracies = {
        name: committed_accuracies(f"digits/*-weight{bn_weight:g}-c{c:g}-{input_norm}-seed*.csv")
        for name, (bn_weight, c, input_norm) in ((name, values.values()) for name, values in PAPER.items())
    }
    differences = {name: np.subtract(accuracies[name], accuracies["baseline"]) for name in list(PAPER)[1:]}
    p_values = {name: stats.ttest_1samp(d, 0, alternative="greater").pvalue for name, d in differences.items()}
    ordered = sorted(p_values.values())
    for name, seeds, row in rows:
        fields = [field.strip() for field in row.split("|")]
        assert seeds == "15"
        assert fields[0] == f"{np.mean(accuracies[name]):.2f} ± {np.std(accuracies[name], ddof=1):.2f}"
        if name == "baseline":
            continue
        low, high = stats.t.interval(0.95, 14, differences[name].mean(), stats.sem(differences[name]))
        holm = min(1, max((4 - j) * p for j, p in enumerate(ordered) if p <= p_values[name]))
        verdict = "significantly better" if holm <= 0.05 else "not significant"
        assert fields[1:] == [
            *("15", f"{differences[name].mean():+.2f}", f"{low:+.2f} to {high:+.2f}", f"{p_values[name]:.2g}"),
            *(f"{holm:.2g}", f"{(differences[name] > 0).sum()} of 15", verdict),
        ]


def test_sentences_about_cifar10_are_those_of_the_committed_files():
    folder = ROOT / "results" / "cifar10-own-stem"
    runs = {name: {} for name in ("weight0.1-c100-bn", "weight1-c1-dataset")}
    seconds = []
    for name, of_setting in runs.items():
        for file in folder.glob(f"cifar10-resnet18-num_epochs=5-stem=own-{name}-seed*.csv"):
            table = pandas.read_csv(file, comment="#")
            of_setting[int(file.stem.rpartition("seed")[2])] = table["test_accuracy"][table["val_accuracy"].idxmax()]
            seconds.append(float(re.search(r"^# seconds: (.*)$", file.read_text(), re.MULTILINE)[1]))
    proposed, baseline = runs.values()
    seeds = sorted(proposed.keys() & baseline.keys())
    assert seeds == list(range(1, len(seeds) + 1)) and len(seeds) >= 8
    ours, theirs = (np.array([of[seed] for seed in seeds]) for of in (proposed, baseline))
    low, high = stats.t.interval(0.95, len(seeds) - 1, (ours - theirs).mean(), stats.sem(ours - theirs))
    p_value = f"{stats.ttest_1samp(ours - theirs, 0, alternative='greater').pvalue:.2g}"
    text = " ".join(README.split("### CIFAR-10, five epochs")[1].split("###")[0].split())
    means = [f"{of.mean():.2f} ± {of.std(ddof=1):.2f} %" for of in (ours, theirs)]
    sentence = (
        f"accuracy is {means[0]} (mean ± standard deviation over {len(seeds)} seeds), without it {means[1]}: a"
        f" difference of {(ours - theirs).mean():.2f} percentage points (95 % interval {low:.2f} to {high:.2f},"
        f" p = {p_value})."
    )
    assert sentence in text
    assert f"A run took {np.median(seconds):,.0f} seconds in the median" in text
    first_screen = " ".join(README.split("## The method")[0].split())
    assert f"{ours.mean():.2f} % with the paper's method and {theirs.mean():.2f} % without" in first_screen
    assert f"({len(seeds)} of 15 seeds, p = {p_value};" in first_screen


def test_first_screen_is_that_of_the_committed_files():
    first_screen = " ".join(README.split("## The method")[0].split())
    sentence = (
        r"a ResNet-18 reaches ([\d.]+) % with it and ([\d.]+) % without: a gain of ([\d.]+) percentage points"
        r" \(95 % interval ([\d.]+) to ([\d.]+), 15 seeds, p = ([\d.]+)\)"
    )
    proposed = committed_accuracies("digits/*-weight0.1-c100-bn-seed*.csv")
    baseline = committed_accuracies("digits/*-weight1-c1-dataset-seed*.csv")
    gains = np.subtract(proposed, baseline)
    low, high = stats.t.interval(0.95, 14, gains.mean(), stats.sem(gains))
    p_value = stats.ttest_1samp(gains, 0, alternative="greater").pvalue
    expected = [f"{x:.2f}" for x in (np.mean(proposed), np.mean(baseline), gains.mean(), low, high)]
    assert list(re.search(sentence, first_screen).groups()) == [*expected, f"{p_value:.2g}"]
