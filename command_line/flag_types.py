"""Flags: the parser, the types of their values, the error that names a wrong one."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn


class FlagError(ValueError):
    """A flag is wrong; the message names it."""


class SettingError(ValueError):
    """A setting of a run is wrong: `name` is also that of its flag, `problem` says what is wrong, and what to do."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(name, problem)  # so it survives pickle
        self.name, self.problem = name, problem

    def __str__(self) -> str:
        return f"{self.name}: {self.problem}"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises FlagError where it would print the list of all flags and end the program.

    Hyphens within a flag are taken as underscores, and a flag that does not exist is answered with one that is close.
    """

    def __init__(self, epilog: str = "", **options: Any) -> None:
        options |= {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(epilog=f"{epilog}\nUSAGE.md explains more.", **options)
        self.others: list[str] = []  # names of further flags that may be meant by one that does not exist

    @property
    def names(self) -> list[str]:
        """Those of its flags, without the hyphens."""
        return [option[2:] for action in self._actions for option in action.option_strings if option[:2] == "--"]

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([with_underscores(argument) for argument in given])

    def error(self, message: str) -> NoReturn:
        if flag := re.match(r"unrecognized arguments: --(\w+)", message):
            names = self.others + self.names
            short = [name for name in names if "".join(word[0] for word in name.split("_")) == flag[1]]  # lr
            if close := short or get_close_matches(flag[1], names, n=1):
                message += f": did you mean --{close[0]}?"
        raise FlagError(message)


def with_underscores(argument: str) -> str:
    """An argument of a command, with underscores for hyphens where it is a flag."""
    name, equals, value = argument[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value if argument[:2] == "--" and name else argument


def folder(text: str) -> Path:
    """The type of a flag that names a folder, which need not exist yet."""
    if text and not text.isprintable():
        raise argparse.ArgumentTypeError(f"must be one line of printable text, not {text!r}")
    try:
        path = Path(text).expanduser()
        there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    except (OSError, RuntimeError) as error:  # a name that is too long; a home that nobody has
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a folder: {error}") from None
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a folder: {there} is none")
    return path


def file_name(text: str) -> str:
    """The type of a flag that takes a name which files can have on any system."""
    if (text and not re.fullmatch(r"\w[\w.+=-]*", text)) or len(text.encode()) > 200:
        raise argparse.ArgumentTypeError(
            f"must be at most 200 letters, digits and . _ + = - and start with a letter or digit, not {text!r}"
        )
    return text


def whole(minimum: int) -> Callable[[str], int]:
    """The type of a flag that takes a whole number of at least `minimum`."""

    def convert(text: str) -> int:
        if not re.fullmatch(r"\d{1,18}", text, re.ASCII) or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, not {text!r}")
        return int(text)

    return convert


def number(what: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    """The type of a flag that takes a number that is `allowed` (NaN must not be), which `what` puts into words."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")
        return value or 0.0  # not -0.0

    return convert


def as_typed(value: str | float | bool) -> str:
    """A value as one would type it after its flag: 100 for 100.0."""
    return str(value).removesuffix(".0")
