"""What the numbers of a run depend on besides its flags: the code, the machine, the versions of what it uses."""

import ast
import hashlib
import platform
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
import torchvision

from run_settings import Settings, Value, determining
from saved_runs.results import Results

ROOT = Path(__file__).parent.parent


def describe_run(settings: Settings, seconds: float, earlier: Results | None, processes: int = 1) -> dict[str, Value]:
    """The settings of a run and what else its numbers depend on, for the result file.

    Where a run was resumed in another place, the file names both.
    """
    circumstances = {
        "code": code_version(),
        "device": settings.device,
        "machine": machine_name(torch.device(settings.device)) + (f", {processes} processes" if processes > 1 else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    for key, value in circumstances.items():
        places = earlier.header.get(key, "unknown").split(", then ") if earlier else []
        circumstances[key] = ", then ".join(places if places[-1:] == [value] else [*places, value])
    return {"name": settings.run_name, **determining(settings), **circumstances, "seconds": round(seconds, 1)}


@cache
def code_version() -> str:
    """The commit of this project's repository, '-dirty' with changes; without a repository, a hash of its modules."""
    with suppress(OSError, subprocess.SubprocessError):
        if (ROOT / ".git").exists():
            command = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    modules = b"".join(file.read_bytes() for file in sorted((*ROOT.glob("*.py"), *ROOT.glob("*/*.py"))))
    return f"modules {hashlib.sha256(modules).hexdigest()[:12]}"


def network_code(network: str) -> str | None:
    """A hash of the code of a network of one's own, MODULE:FUNCTION, which must have been built before.

    It is of this module and of those that it imports, directly or not, from the folder that it was imported from; not
    of this project's own, which `code_version` names. Of an installed package such as timm, it is of all its modules.
    None where there is no file, as of torchvision's networks.
    """
    module, _, function = network.partition(":")
    name = getattr(sys.modules.get(module), "__file__", None) if function else None
    if name is None:
        return None
    file = Path(name).absolute()
    folder = file.parents[module.count(".") + (file.name == "__init__.py")]
    if folder.name in ("site-packages", "dist-packages"):  # following imports, torch among them, would take minutes
        files = {file, *(folder / module.partition(".")[0]).rglob("*.py")}
    else:
        project = imported_files(ROOT / "train.py", ROOT) if folder == ROOT else set()
        files = {file} | imported_files(file, folder) - project
    listed = sorted((file.relative_to(folder).as_posix(), file.read_bytes()) for file in files)
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:12]


def imported_files(file: Path, folder: Path) -> set[Path]:
    """The module in a file and those in a folder, in which it lies, that it imports, at any depth and in any line."""
    found, left = set(), [file]
    while left:
        file = left.pop()
        if file in found or not file.is_file():
            continue
        found.add(file)
        package = file.relative_to(folder).parts[:-1]
        with suppress(SyntaxError):  # of a file that has the name of a module from elsewhere
            for node in ast.walk(ast.parse(file.read_bytes())):
                names: list[list[str]] = []
                if isinstance(node, ast.Import):
                    names = [alias.name.split(".") for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    base = [*package[: len(package) + 1 - node.level]] if node.level else []
                    base += node.module.split(".") if node.module else []
                    names = [[*base, alias.name] for alias in node.names]
                for stem in (folder.joinpath(*parts[:n]) for parts in names for n in range(1, len(parts) + 1)):
                    left += [stem.with_name(f"{stem.name}.py"), stem / "__init__.py"]
    return found


def machine_name(device: torch.device) -> str:
    """The name of a GPU; of a CPU, what its rounding depends on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    instructions = torch.backends.cpu.get_cpu_capability()
    processor = f" ({name})" if (name := processor_name()) else ""
    return f"{platform.machine()} with {instructions}{processor}, {torch.get_num_threads()} threads"


@cache
def processor_name() -> str:
    """Vendor, family and model of the CPU, as two with the same instructions may round differently."""
    labels = {"vendor_id": "", "cpu family": "family ", "model": "model "}
    with suppress(OSError):  # as on systems other than Linux
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        found = {name.strip(): value.strip() for name, _, value in lines}  # of the last core, which is like the others
        return " ".join(label + found[name] for name, label in labels.items() if name in found)
    return platform.processor()
