"""The command of an experiment, in a file beside its results: by it, `--report FOLDER` knows what is in a folder."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from command_line.files import read_file
from command_line.flag_types import Parser
from experiment.plan import parse
from run_settings import DEFAULTS, SCHEDULES, WITHOUT_EFFECT

PROGRAM = ["python", "reproduce.py"]
ENDING = "-command.txt"  # of the name of the file; it begins as that of the table


def command_of(given: Sequence[str]) -> str:
    """The command of an experiment, but for the flags that say where and how its runs are made."""
    parser = Parser(add_help=False)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--jobs")
    parser.add_argument("--report", nargs="?")
    for name in set(WITHOUT_EFFECT) - {"name"}:
        parser.add_argument(f"--{name}", **{"action": "store_true"} if DEFAULTS[name] is False else {})
    parser.add_argument("--scheduler", action="append", default=[])
    others, lasting = parser.parse_known_args(given)
    schedules = [f"--scheduler={value}" for value in others.scheduler if value in SCHEDULES]
    return shlex.join([*PROGRAM, *lasting, *schedules])


def find_experiments(folder: Path) -> dict[str, argparse.Namespace]:
    """The experiments in a folder: the plan of each, to be reported, by its command.

    Raises:
        ValueError: what should be a command is none.
        OSError: a file cannot be read.
    """
    experiments = {}
    for file in sorted(folder.glob(f"*{ENDING}")):
        command = read_file(file).decode(errors="replace").strip()
        try:
            given = shlex.split(command)[len(PROGRAM) :]
            experiments[command] = parse([*given, "--report", str(folder)])
        except ValueError as error:
            raise ValueError(f"{file} is damaged: remove it, and give the flags of its experiment ({error})") from None
    return experiments
