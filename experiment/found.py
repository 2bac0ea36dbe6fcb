"""The experiments of which result files are in a folder, each as the flags of reproduce.py that ask for it."""

import argparse
import csv
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from command_line.files import read_file
from command_line.flag_types import as_typed
from command_line.settings import (
    COMPARED,
    DEFAULTS,
    NAMED,
    PAPER,
    WITHOUT_EFFECT,
    Value,
    compared,
    experiment_name,
    setting_name,
)
from experiment.plan import parse
from reporting.tables import is_table
from saved_runs.results import read_header

SHARED = [name for name in DEFAULTS if name not in (*WITHOUT_EFFECT, *COMPARED, "seed", "learning_rate")]


@dataclass
class Found:
    """A run, or the table of an experiment.

    Attributes:
        name: the `--name` of the experiment; empty where names are made from the settings.
        shared: the values of the flags in `SHARED`.
        rates: the learning rate; of a tuned experiment, those to choose from.
        settings: the values of the flags in `COMPARED`, by name of the setting.
        seeds: of a run; of the tuning of a table.
        count: how many seeds are in a table, 0 for a run.
        more: further flags of a table.
    """

    name: str
    shared: list[Value]
    rates: list[float]
    settings: dict[str, dict[str, Value]]
    seeds: list[int]
    count: int = 0
    more: Sequence[str] = ()

    def name_without_rate(self) -> str:
        """Of a run: the name of its experiment if that is tuned."""
        return self.name.removesuffix(f"-learning_rate={as_typed(self.rates[0])}")

    def has(self, run: "Found") -> bool:
        """Whether a run is one of the experiment of this table."""
        [values] = run.settings.values()
        alike = self.shared == run.shared and self.name in (run.name, run.name_without_rate())
        return alike and run.rates[0] in self.rates and values in self.settings.values()


def find_experiments(folder: Path) -> list[list[str]]:
    """The flags of each experiment: of those with a table, then of what other runs there are.

    Runs without a table are those of one experiment where they differ in no more than settings and seeds; or in the
    learning rate too, where it is being chosen. Only seeds of which there are runs are known to be planned.

    Raises:
        ValueError: a file begins as a table and goes on otherwise.
        OSError: a file cannot be read.
    """
    files = sorted(folder.glob("*.csv"))
    tables = [read_table(file) for file in files if is_table(file)]
    runs = [run for file in files if not is_table(file) and (run := read_run(file))]
    found = [(table, [run for run in runs if table.has(run)]) for table in tables]

    def others() -> list[Found]:
        return [run for run in runs if not any(run in of_table for _, of_table in found)]

    while tuned := find_tuning(others(), runs):
        found.append(tuned)
    for_tuning = [run for table, of_table in found for run in of_table if run.seeds[0] in table.seeds]
    while left := others():
        found.append(find_comparison(left))
    experiments = []
    for table, of_table in found:
        seeds = {run.seeds[0] for run in of_table if run not in for_tuning}
        if len(seeds) < table.count:
            seeds = {run.seeds[0] for run in of_table} - set(table.seeds)
        experiments.append([*flags_of(table), *(["--seeds", *ranges(seeds)] if seeds else [])])
    return experiments


def find_tuning(others: Sequence[Found], runs: Sequence[Found]) -> tuple[Found, list[Found]] | None:
    """An experiment whose learning rates are being chosen, with its runs: some of `others` have several of them.

    Its seeds are none of those that are compared by default: these would be several experiments.
    """
    compared_seeds = parse([]).seeds
    for first in others:
        name = first.name_without_rate()
        alike = [run for run in runs if (run.name_without_rate(), run.shared) == (name, first.shared)]
        alike = [run for run in alike if run.seeds[0] not in compared_seeds]
        alike = [run for run in alike if any(run.settings == other.settings for other in others)]
        rates, seeds = sorted({run.rates[0] for run in alike}), sorted({run.seeds[0] for run in alike})
        if first in alike and len({(*run.settings, *run.seeds) for run in alike}) < len(alike):
            more = tuning_flags(map(as_typed, rates), seeds)
            return Found(name, first.shared, rates, settings_of(alike), seeds, more=more), alike
    return None


def find_comparison(runs: Sequence[Found]) -> tuple[Found, list[Found]]:
    """The experiment of the first of these runs, with its runs."""
    first = runs[0]
    alike = [run for run in runs if (run.name, run.rates, run.shared) == (first.name, first.rates, first.shared)]
    return Found(first.name, first.shared, first.rates, settings_of(alike), []), alike


def settings_of(runs: Iterable[Found]) -> dict[str, dict[str, Value]]:
    """The settings of runs, those of the paper first."""
    settings = {name: values for run in runs for name, values in run.settings.items()}
    return {name: settings[name] for name in (*NAMED, *settings) if name in settings}


def tuning_flags(rates: Iterable[str], seeds: Collection[int]) -> list[str]:
    """The flags of the choice among learning rates."""
    return ["--learning_rates", *rates, "--tuning_seeds", *ranges(seeds)]


def read_run(file: Path) -> Found | None:
    """The run of a result file; None where it is none, or of no experiment, as its name tells."""
    head = read_header(read_file(file).decode(errors="replace").splitlines())
    values = DEFAULTS | {name: value for name, value in head.items() if name in DEFAULTS}
    settings = argparse.Namespace(**values)
    end = f"-{setting_name(settings)}-seed{settings.seed}"
    if not isinstance(head.get("seed"), int) or not file.stem.endswith(end):
        return None
    name = file.stem.removesuffix(end)
    name = "" if name == experiment_name(settings) else name
    shared = [values[one] for one in SHARED]
    return Found(name, shared, [values["learning_rate"]], name_setting(compared(values)), [settings.seed])


def read_table(file: Path) -> Found:
    """The experiment of a table. ValueError where it is damaged."""
    try:
        return table_in(file)
    except (KeyError, TypeError, ValueError, csv.Error):
        raise ValueError(f"{file} is not the table of an experiment, or damaged: remove it") from None


def table_in(file: Path) -> Found:
    """The same, with other errors."""
    lines = read_file(file).decode(errors="replace").splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    head = read_header(lines)
    values = DEFAULTS | {name: value for name, value in head.items() if name in DEFAULTS}
    settings, more, name = {}, [], file.stem
    for row in rows:
        if row["seeds"]:
            settings[row["setting"]] = {one: type(DEFAULTS[one])(row.get(one) or DEFAULTS[one]) for one in COMPARED}
        else:
            more += ["--contrast", row["setting"].removesuffix(f" vs {row['compared_with']}"), row["compared_with"]]
    if "select" in head:
        more += ["--select", head["select"]]
        name = name.removesuffix(f"-{head['select']}")
    rates, seeds = [values["learning_rate"]], []
    if "learning_rates" in head:
        texts, seeds = str(head["learning_rates"]).split("+"), [int(n) for n in str(head["tuning_seeds"]).split()]
        rates = [float(text) for text in texts]
        more += tuning_flags(texts, seeds)
        name = name.removesuffix(f"-learning_rates={head['learning_rates']}")
    name = "" if name == experiment_name(argparse.Namespace(**values)) else name
    count = max(int(row["seeds"] or 0) for row in rows)
    return Found(name, [values[one] for one in SHARED], rates, settings, seeds, count, more)


def name_setting(values: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """A setting by its name where it has one, else by that of its runs."""
    names = [name for name, of_name in NAMED.items() if compared(of_name) == values]
    return {next(iter(names), setting_name(argparse.Namespace(**values))): dict(values)}


def flags_of(table: Found) -> list[str]:
    """The flags of an experiment but for its seeds."""
    flags = ["--name", table.name] if table.name else []
    values = dict(zip(SHARED, table.shared, strict=True))
    if "--learning_rates" not in table.more:
        values["learning_rate"] = table.rates[0]
    for name, value in values.items():
        if value != DEFAULTS[name]:
            flags += [f"--{name}"] if value is True else [f"--{name}", as_typed(value)]
    settings, bn_weights = [], []
    for name, of_name in table.settings.items():
        proposed = {**compared(PAPER["proposed"]), "bn_weight": of_name["bn_weight"]}
        if name in NAMED:
            settings.append(name)
        elif name == f"bn_weight {as_typed(of_name['bn_weight'])}" and of_name == proposed:
            bn_weights.append(as_typed(of_name["bn_weight"]))
        else:
            settings.append(f"{name}:{','.join(f'{key}={as_typed(value)}' for key, value in of_name.items())}")
    flags += ["--settings", *settings] if settings != ["baseline", "proposed"] else []
    return [*flags, *(["--bn_weights", *bn_weights] if bn_weights else []), *table.more]


def ranges(seeds: Collection[int]) -> list[str]:
    """Seeds as `--seeds` takes them: 1-15 for the first fifteen."""
    first = [seed for seed in sorted(seeds) if seed - 1 not in seeds]
    last = [seed for seed in sorted(seeds) if seed + 1 not in seeds]
    return [f"{a}-{b}" if a < b else str(a) for a, b in zip(first, last, strict=True)]
