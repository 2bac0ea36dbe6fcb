"""The command of an experiment, in a file beside its results: by it, `--report FOLDER` knows what is in a folder."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from command_line.files import read_file
from command_line.flag_types import Parser
from command_line.settings import SCHEDULES
from experiment.plan import parse

BEGIN = "python reproduce.py "


def command_of(given: Sequence[str]) -> str:
    """The command of an experiment, but for the flags that say where and how its runs are made."""
    parser = Parser(add_help=False, allow_abbrev=False)
    for name in ("list", "restart", "tensorboard"):
        parser.add_argument(f"--{name}", action="store_true")
    for name in ("path", "jobs", "device", "checkpoint_seconds", "workers"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--report", nargs="?")
    parser.add_argument("--scheduler", action="append", default=[])
    others, lasting = parser.parse_known_args(given)
    schedules = [f"--scheduler={value}" for value in others.scheduler if value in SCHEDULES]
    return BEGIN + shlex.join([*lasting, *schedules])


def find_experiments(folder: Path) -> dict[str, argparse.Namespace]:
    """The experiments in a folder: the plan of each, to be reported, by its command.

    Raises:
        ValueError: a file begins as that of a command and goes on otherwise.
        OSError: a file cannot be read.
    """
    experiments = {}
    for file in sorted(folder.glob("*.txt")):
        command = read_file(file).decode(errors="replace").removesuffix("\n")
        if command.startswith(BEGIN):
            try:
                experiments[command] = parse([*shlex.split(command.removeprefix(BEGIN)), "--report", str(folder)])
            except ValueError as error:
                raise ValueError(f"{file} has no command of an experiment, remove it: {error}") from None
    return experiments
