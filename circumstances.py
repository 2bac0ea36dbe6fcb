"""What the numbers of a run depend on besides its flags: the code, the machine, the versions of what it uses."""

import argparse
import hashlib
import platform
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
import torchvision

from results import Results
from settings import Value, determining


def describe_run(settings: argparse.Namespace, seconds: float, earlier: Results | None) -> dict[str, Value]:
    """The settings of a run and what else its numbers depend on, for the result file.

    Where a run was resumed in another place, the file names both.
    """
    circumstances = {
        "code": code_version(),
        "device": str(settings.device),
        "machine": machine_name(settings.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    for key, value in circumstances.items():
        places = earlier.settings.get(key, "unknown").split(", then ") if earlier else []
        circumstances[key] = ", then ".join(places if places[-1:] == [value] else [*places, value])
    return {"name": settings.name, **determining(settings), **circumstances, "seconds": round(seconds, 1)}


@cache
def code_version() -> str:
    """The commit of this project's repository, '-dirty' with changes; without a repository, a hash of its modules."""
    folder = Path(__file__).parent
    with suppress(OSError, subprocess.SubprocessError):
        if (folder / ".git").exists():
            command = ["git", "-C", folder, "describe", "--always", "--dirty"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    modules = b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))
    return f"modules {hashlib.sha256(modules).hexdigest()[:12]}"


def machine_name(device: torch.device) -> str:
    """The name of a GPU; of a CPU, what its rounding depends on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} with {instructions}, {torch.get_num_threads()} threads"
