"""What the numbers of a run depend on besides its flags: the code, the machine, the versions of what it uses."""

import hashlib
import platform
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
import torchvision

from run_settings import Settings, Value, determining
from saved_runs.results import Results


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
    folder = Path(__file__).parent.parent
    with suppress(OSError, subprocess.SubprocessError):
        if (folder / ".git").exists():
            command = ["git", "-C", folder, "describe", "--always", "--dirty"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    modules = b"".join(file.read_bytes() for file in sorted((*folder.glob("*.py"), *folder.glob("*/*.py"))))
    return f"modules {hashlib.sha256(modules).hexdigest()[:12]}"


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
