import argparse
import ast
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import run_settings
from experiment import plan
from folders import make_folder
from run_settings import NAMED
from small import prepared

ROOT = Path(__file__).parent.parent
README, USAGE, MODULES = ((ROOT / f"{name}.md").read_text() for name in ("README", "USAGE", "MODULES"))
NOT_OF_THE_PAPER = {"stem", "image_size", "no_flip", "split_seed", "workers", "precision", "compile", "equivalent"}
NOT_OF_THE_PAPER |= {"tensorboard", "debias"}
TEXTS = [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README.md"), *ROOT.glob("results/*/README.md")]
FOLDERS = sorted(file.parent.name for file in ROOT.glob("*/__init__.py"))
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
EXAMPLES = [*EXAMPLE.findall(README), *EXAMPLE.findall(USAGE), *EXAMPLE.findall(MODULES)]


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(example, small_network, runs_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    links = re.findall(r"\]\(([^)\s]+)\)", file.read_text())
    for path, _, title in (link.partition("#") for link in links if "://" not in link):
        target = file.parent / path if path else file
        assert target.exists(), path
        if title:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert title in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def modules() -> dict[str, Path]:
    """Every module of the project, by name."""
    files = [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).glob("[!_]*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


def test_every_module_has_its_place():
    """A section with an example for each module at the top level, and for each folder, which names all in it."""
    sections = dict(re.findall(r"^## `(\w+)(?:\.py|/)`\n(.*?)(?=^## |\Z)", MODULES, re.DOTALL | re.MULTILINE))
    assert sections.keys() == {name.partition(".")[0] for name in modules()}
    for room, text in sections.items():
        [example] = EXAMPLE.findall(text)
        assert re.search(rf"^(from|import) {room}\b", example, re.MULTILINE), room
        if room in FOLDERS:
            named = re.findall(r"`(\w+)`", text.partition("```")[0])
            assert {f"{room}.{name}" for name in named} >= {name for name in modules() if name.startswith(f"{room}.")}


def imported(file: Path) -> set[str]:
    """The modules that a file imports, within functions and under TYPE_CHECKING too."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, file
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_modules_import_only_what_stands_below_them():
    rows = MODULES.split("| floor | |\n")[1].split("\n\n")[0].splitlines()[1:]
    floors = [[room.removesuffix(".py").strip("/") for room in re.findall(r"`([\w./]+)`", row)] for row in rows]
    found = modules()
    assert sorted(itertools.chain(*floors)) == sorted({name.partition(".")[0] for name in found})
    floor_of = {room: floor for floor, rooms in enumerate(floors) for room in rooms}
    for name, file in found.items():
        room = name.partition(".")[0]
        for other in {one.partition(".")[0] for one in imported(file)} & floor_of.keys() - {room}:
            assert floor_of[other] > floor_of[room], f"{name} imports {other}"


def test_no_circles():
    """Neither between rooms, which the floors forbid, nor between the modules of a folder."""
    found = modules()
    below = {name: imported(file) & found.keys() for name, file in found.items()}
    while free := {name for name, others in below.items() if not others}:
        below = {name: others - free for name, others in below.items() if name not in free}
    assert not below


@pytest.mark.parametrize("name", ["batch_norm", "weight_decay_and_learning_rate"])
def test_files_to_copy_need_nothing_but_torch(name):
    roots = {module.partition(".")[0] for module in imported(ROOT / f"{name}.py")}
    assert roots <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("parser", [run_settings.make_parser(), plan.make_parser()], ids=["train", "reproduce"])
def test_every_flag_is_explained(parser):
    section = "The paper's training" if parser.prog == "train.py" else "The paper's experiment"
    text = re.search(rf"^## {section}\n(.*?)^## ", USAGE, re.DOTALL | re.MULTILINE)[1]
    table = dict(re.findall(r"^\| `(--\w+)` \| (.*?) \|", text, re.MULTILINE))
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    flags = {action.option_strings[-1]: action.default for action in shown}
    del flags["--help"]
    assert table.keys() == flags.keys()
    for flag, default in flags.items():
        if default not in ("", None, False) and not isinstance(default, list | Path):
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
    given, default = vars(prepared(arguments)), vars(prepared(["--device", "cpu"]))
    of_the_paper = set(default) - {"checkpoint_seconds", "restart", *NOT_OF_THE_PAPER}
    assert set(arguments[::2]) == {f"--{name}" for name in of_the_paper}
    assert {name for name in default if given[name] != default[name]} == {"name"}


def test_commands_for_a_network_and_images_of_ones_own(tmp_path):
    """In a folder with JPEGs of odd sizes and modes, all but as printed; every command ends with its results."""
    section = re.search(r"^## Your own network, your own images\n(.*?)^## ", USAGE, re.DOTALL | re.MULTILINE)[1]
    example, experiment = re.findall(r"^```\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    planned = plan.parse(shlex.split(experiment.replace("\\\n", " "))[2:])
    runs = len(planned.tuning_runs) + len(planned.seeds) * len(planned.methods)
    assert (
        f"each at the best of {['one', 'two', 'three'][len(planned.learning_rates) - 1]} rates, in {runs} runs"
        in section
    )
    make_folder(tmp_path / "images" / "flowers")
    commands = example.replace("python ", f"{sys.executable} {ROOT}/").replace("--num_epochs 5", "--num_epochs 1")
    commands = re.sub(r"(train|reproduce)\.py", r"\1.py --device cpu", commands).replace("--seeds 1-3", "--seeds 1")
    run = subprocess.run(["bash", "-ec", commands], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("best epoch 1: ") == 2 and "| proposed | 1 " in run.stdout
    results = {file.name for file in (tmp_path / "results").iterdir()}
    experiment = "flowers-my_networks.small-batch_size=16-num_epochs=1-image_size=32"
    assert {f"{experiment}-weight0.1-c100-bn-seed1.csv", f"{experiment}.md", f"{experiment}-forest.png"} <= results
    assert f"{experiment}-normalized-values.png" in results  # which needs networks and images


def test_array_job(tmp_path):
    """Without SLURM: one of its tasks, of a short run of a small network."""
    section = USAGE.split("### On a cluster\n")[1]
    [example] = re.findall(r"^```\n(.*?^sbatch array.sh\n)```$", section, re.DOTALL | re.MULTILINE)
    assert "#SBATCH --array=1-30 " in example
    for name in ("train.py", "reproduce.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = example.replace("--num_epochs 5", "--num_epochs 1 --device cpu --network shufflenet_v2_x0_5")
    commands = commands.replace("sbatch", "SLURM_ARRAY_TASK_ID=30 bash")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(["bash", "-ec", commands], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    listed = (tmp_path / "runs.txt").read_text().splitlines()
    assert len(listed) == len(set(listed)) == 30
    [result] = tmp_path.glob("results/*.csv")
    assert result.name.endswith("-weight0.1-c100-bn-seed15.csv")
