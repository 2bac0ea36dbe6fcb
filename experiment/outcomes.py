"""What has come of an experiment so far."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from command_line.endings import in_one_line
from command_line.files import DamagedFileError
from command_line.flag_types import as_typed
from experiment.plan import PlannedRun
from experiment.tuning import (
    Tuning,
    read_divergence,
)
from saved_runs.checkpoint import read_finished
from saved_runs.paths import run_files
from saved_runs.results import Results


@dataclass
class Outcomes:
    """What has come of an experiment so far.

    Attributes:
        finished: the results of runs, by name.
        failed: why runs have failed, by name.
        diverged: why runs of the tuning have diverged, by name; these have not failed.
        stops: numbers of the signals that have arrived.
    """

    finished: dict[str, Results] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    diverged: dict[str, str] = field(default_factory=dict)
    stops: list[int] = field(default_factory=list)

    def left(self, planned: Sequence[PlannedRun]) -> list[PlannedRun]:
        """Those of which nothing has come yet."""
        known = (self.finished, self.failed, self.diverged)
        return [run for run in planned if not any(run.settings.name in of for of in known)]


def read_runs(args: argparse.Namespace, planned: Sequence[PlannedRun], folder: Path, outcomes: Outcomes) -> None:
    """Find what is finished in a folder, and what is damaged or of another experiment.

    A damaged file beside a checkpoint is left to the run itself, which mends it.
    """
    for run in planned:
        name = run.settings.name
        checkpoint = run_files(run.settings.path, name).checkpoint
        try:
            results = read_finished(folder / f"{name}.csv", run.settings)
            diverged = read_divergence(folder, run.settings) if run.for_tuning else None
        except (ValueError, OSError) as error:
            if isinstance(error, DamagedFileError) and args.report is None and checkpoint.exists():
                continue
            outcomes.failed[name] = in_one_line(error)
            continue
        if results is not None:
            outcomes.finished[name] = replace(results, select=args.select)
        elif diverged is not None:
            outcomes.diverged[name] = diverged


def runs_by_setting(args: argparse.Namespace, outcomes: Outcomes) -> dict[str, dict[int, Results]]:
    """The finished runs to compare, by setting and seed."""
    runs: dict[str, dict[int, Results]] = {name: {} for name in args.settings}
    for run in args.runs:
        if run.settings.name in outcomes.finished:
            runs[run.setting][run.settings.seed] = outcomes.finished[run.settings.name]
    return runs


def tuning_so_far(args: argparse.Namespace, outcomes: Outcomes) -> Tuning:
    """The validation accuracies of the runs of the tuning that are there."""
    tuning = {name: {rate: {} for rate in args.learning_rates} for name in args.settings}
    for run in args.tuning_runs:
        name, accuracies = run.settings.name, tuning[run.setting][run.settings.learning_rate]
        if name in outcomes.finished:
            accuracies[run.settings.seed] = outcomes.finished[name].val_accuracy
        elif name in outcomes.diverged:
            accuracies[run.settings.seed] = None
    return tuning


def explain_failures(args: argparse.Namespace, outcomes: Outcomes) -> list[str]:
    """A line for each run that has failed, with how many runs of its kind are finished."""
    lines = []
    for run in (*args.tuning_runs, *args.runs):
        if reason := outcomes.failed.get(run.settings.name):
            rate = run.settings.learning_rate
            alike = [one for one in (args.tuning_runs if run.for_tuning else args.runs) if one.setting == run.setting]
            alike = [one.settings.name for one in alike if one.settings.learning_rate == rate]
            kind = f"{run.setting} at learning rate {as_typed(rate)}" if run.for_tuning else run.setting
            seeds = f"{len(outcomes.finished.keys() & alike)} of {len(alike)} seeds"
            lines.append(f"{kind}: {seeds}; seed {run.settings.seed} failed: {reason}")
    return lines
