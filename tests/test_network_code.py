"""What identifies the code of a network of one's own."""

import importlib
import shutil
import sys
from itertools import count

import pytest

from saved_runs import circumstances
from saved_runs.circumstances import ROOT, imported_files, network_code

NUMBERS = count()
USED = {
    "NAME.py": "import torch, json\nfrom NAME_parts.layers import Block\n\ndef net(num_classes): import NAME_late\n",
    "NAME_parts/__init__.py": "",
    "NAME_parts/layers.py": "from . import sizes\nfrom NAME_parts import absolute\nBlock = sizes.WIDTH\n",
    "NAME_parts/sizes.py": "from .deeper.more import *\n",
    "NAME_parts/deeper/more.py": "from ..absolute import WIDTH\n",
    "NAME_parts/absolute.py": "WIDTH = 8\n",
    "NAME_late.py": "import NAME\n",  # in a circle
}
UNUSED = {"NAME_other.py": "", "NAME_parts/other.py": "", "json/other.py": ""}


@pytest.fixture
def own(tmp_path, monkeypatch) -> str:
    """The name of a module, which is imported, with others around it."""
    name = f"own_code_{next(NUMBERS)}"
    for file, code in (USED | UNUSED).items():
        path = tmp_path / file.replace("NAME", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code.replace("NAME", name))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(name)
    return name


def test_what_it_depends_on(own, tmp_path):
    before = network_code(f"{own}:net")
    assert before == network_code(f"{own}:another") and len(before) == 12
    for file in USED | UNUSED:
        path = tmp_path / file.replace("NAME", own)
        code = path.read_text()
        path.write_text(f"{code}# changed")
        assert (network_code(f"{own}:net") == before) == (file in UNUSED), file
        path.write_text(code)
    (tmp_path / "torch.py").write_text("this is no Python")
    assert network_code(f"{own}:net") != before  # as if it were the one that is imported


def test_installed_package(tmp_path, monkeypatch):
    """Its own modules alone count, and are not followed to others that are installed."""
    name, folder = f"own_code_{next(NUMBERS)}", tmp_path / "site-packages"
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(f"import {name}_other\n")
    (folder / name / "more.py").write_text("")
    (folder / f"{name}_other.py").write_text("")
    monkeypatch.syspath_prepend(folder)
    importlib.import_module(name)
    for file, counts in {f"{name}/more.py": True, f"{name}_other.py": False}.items():
        before = network_code(f"{name}:net")
        (folder / file).write_text("# changed")
        assert (network_code(f"{name}:net") != before) == counts


def test_module_in_a_package(own, tmp_path):
    (tmp_path / f"{own}_parts" / "__init__.py").write_text(f"from {own}_parts.other import *\n")
    for network in (f"{own}_parts.sizes:net", f"{own}_parts:net"):  # the former imports from the package
        for file, counts in {"other": True, "layers": False}.items():
            before = network_code(network)
            with (tmp_path / f"{own}_parts" / f"{file}.py").open("a") as stream:
                stream.write("# changed")
            assert (network_code(network) != before) == counts


def test_another_place_changes_nothing(own, tmp_path, monkeypatch):
    before = network_code(f"{own}:net")
    place = tmp_path / "elsewhere"
    shutil.copytree(tmp_path, place, ignore=shutil.ignore_patterns("elsewhere", "__pycache__"))
    shutil.rmtree(tmp_path / f"{own}_parts")
    assert network_code(f"{own}:net") != before
    monkeypatch.setattr(sys.modules[own], "__file__", str(place / f"{own}.py"))
    assert network_code(f"{own}:net") == before


def test_networks_without_code_of_their_own():
    assert network_code("resnet18") is None
    assert network_code("sys:exit") is None  # built in, as what is in a notebook has no file either
    assert network_code("never_imported:net") is None


def test_modules_of_this_project_are_not_a_network_s_own(own, tmp_path, monkeypatch):
    """Where it lies beside them and imports them: they change with every version."""
    assert {ROOT / "batch_norm.py", ROOT / "saved_runs" / "lock.py"} <= imported_files(ROOT / "train.py", ROOT)
    monkeypatch.setattr(circumstances, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text(f"from {own}_parts import sizes\n")
    before = network_code(f"{own}:net")
    for file, counts in {"parts/absolute": False, "parts/sizes": False, "parts/layers": True}.items():
        with (tmp_path / f"{own}_{file}.py").open("a") as stream:
            stream.write("# changed")
        assert (network_code(f"{own}:net") != before) == counts
