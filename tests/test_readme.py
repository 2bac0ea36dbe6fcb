import re
from pathlib import Path

import numpy as np
import pandas
import pytest
from scipy import stats

import reproduce
import train
from t_test import EXPERIMENT

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(example, few_digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})


def test_every_module_has_an_example():
    modules = {file.stem for file in Path(train.__file__).parent.glob("*.py")}
    assert {re.findall(r"^(?:from|import) (\w+)", example, re.MULTILINE)[-1] for example in EXAMPLES} == modules


@pytest.mark.parametrize("parser", [train.make_parser(), reproduce.make_parser()], ids=["train", "reproduce"])
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
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| `(\w+)` \|", README, re.MULTILINE)
    assert {name: (float(bn_weight), float(c), input_norm) for name, bn_weight, c, input_norm in rows} == EXPERIMENT


def test_command_of_the_paper_has_every_flag():
    command = README.split("## The paper's training\n\n```\n")[1].split("```")[0].replace("\\\n", " ").split()
    assert command[:2] == ["python", "train.py"]
    arguments = [argument.strip("'").replace("cuda:0", "cpu") for argument in command[2:]]
    given, default = vars(train.parse(arguments)), vars(train.parse(["--device", "cpu"]))
    of_the_paper = set(default) - {"checkpoint_seconds", "restart", "precision", "compile", "allow_tf32"}
    assert set(arguments[::2]) == {f"--{name}" for name in of_the_paper}
    assert {name for name in default if given[name] != default[name]} == {"name"}


def committed_accuracies(files: str) -> list[float]:
    """Test accuracies at the best validation epoch, of the seeds 1 to 15 in this order."""
    found = (Path(train.__file__).parent / "results").glob(files)
    tables = {int(file.stem.rpartition("seed")[2]): pandas.read_csv(file, comment="#") for file in found}
    assert sorted(tables) == list(range(1, 16))
    return [tables[seed]["test_accuracy"][tables[seed]["val_accuracy"].idxmax()] for seed in sorted(tables)]


def test_table_of_modes_is_that_of_the_committed_files():
    rows = re.findall(r"^\| (neither|`[^|]*`) \| ([\d.]+ ± [\d.]+) \|(.*)\|(.*)\|$", README, re.MULTILINE)
    files = {
        "neither": "digits/*-weight0.1-c100-bn-seed*.csv",
        "`--precision bfloat16`": "digits-modes/*-weight0.1-c100-bn-bfloat16-seed*.csv",
        "`--compile`": "digits-modes/*-weight0.1-c100-bn-compiled-seed*.csv",
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
    assert [row[0] for row in rows] == list(EXPERIMENT)
    accuracies = {
        name: committed_accuracies(f"digits/*-weight{bn_weight:g}-c{c:g}-{input_norm}-seed*.csv")
        for name, (bn_weight, c, input_norm) in EXPERIMENT.items()
    }
    differences = {name: np.subtract(accuracies[name], accuracies["baseline"]) for name in list(EXPERIMENT)[1:]}
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
