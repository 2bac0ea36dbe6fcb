import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import settings
from command_line.settings import NAMED
from experiment import plan
from folders import make_folder
from training import preparation

ROOT = Path(__file__).parent.parent
README, USAGE, MODULES = ((ROOT / f"{name}.md").read_text() for name in ("README", "USAGE", "MODULES"))
NOT_OF_THE_PAPER = {"stem", "image_size", "no_flip", "workers", "precision", "compile", "equivalent", "tensorboard"}
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
EXAMPLES = [*EXAMPLE.findall(README), *EXAMPLE.findall(USAGE), *EXAMPLE.findall(MODULES)]


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
    text = re.search(rf"^## {section}\n(.*?)^## ", USAGE, re.DOTALL | re.MULTILINE)[1]
    table = dict(re.findall(r"^\| `(--\w+)` \| (.*?) \|", text, re.MULTILINE))
    flags = {action.option_strings[-1]: action.default for action in parser._actions}
    del flags["--help"]
    assert table.keys() == flags.keys()
    for flag, default in flags.items():
        if default not in ("", None, False) and not isinstance(default, list):
            assert type(default)(table[flag].strip("`")) == default


def test_settings_of_the_experiment_are_explained():
    rows = re.findall(r"^\| `([\w+]+)` \| ([\d.]+) \| ([\d.]+) \| `(\w+)` \|(?: `--equivalent (\S+)`)?", USAGE, re.M)
    assert {
        name: {"bn_weight": float(bn_weight), "c": float(c), "input_norm": input_norm}
        | ({"equivalent": equivalent} if equivalent else {})
        for name, bn_weight, c, input_norm, equivalent in rows
    } == NAMED


def test_command_of_the_paper_has_every_flag():
    command = USAGE.split("## The paper's training\n\n```\n")[1].split("```")[0].replace("\\\n", " ").split()
    assert command[:2] == ["python", "train.py"]
    arguments = [argument.strip("'").replace("cuda:0", "cpu") for argument in command[2:]]
    given, default = vars(preparation.parse(arguments)), vars(preparation.parse(["--device", "cpu"]))
    of_the_paper = set(default) - {"checkpoint_seconds", "restart", *NOT_OF_THE_PAPER}
    assert set(arguments[::2]) == {f"--{name}" for name in of_the_paper}
    assert {name for name in default if given[name] != default[name]} == {"name"}


def test_commands_for_a_network_and_images_of_ones_own(tmp_path):
    """As printed, in a folder with JPEGs of odd sizes and modes; every command ends with its results."""
    section = re.search(r"^## Your own network, your own images\n(.*?)^## ", USAGE, re.DOTALL | re.MULTILINE)[1]
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
