"""An experiment: its plan, and what has come of it so far."""

import argparse
import shlex
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from command_line.endings import in_one_line
from command_line.files import DamagedFileError, write_atomically
from command_line.flag_types import as_typed
from experiment.plan import PROGRAM, PlannedRun, parse, plan_runs
from experiment.tuning import (
    Tuning,
    choose_learning_rates,
    divergence_file,
    explain_choice,
    mean_accuracy,
    note_divergence,
    read_divergence,
    tuning_table,
)
from run_settings import Value
from saved_runs.lock import lock_run
from saved_runs.results import Results, read_finished, run_files

ENDING = "-command.txt"  # of the name of the file with the command; it begins as that of the table


class Experiment:
    """A plan, as `plan.parse` returns it, and what has come of it so far; `command` is what `command_of` returns."""

    def __init__(self, plan: argparse.Namespace, command: str) -> None:
        self.plan, self.command = plan, command
        self.folder: Path = plan.report or plan.common.path / "results"  # of the result files
        self.runs: list[PlannedRun] = plan.runs  # to compare; none as long as their learning rates are not chosen
        self.learning_rates: dict[str, float] = {}  # those that are chosen, by method
        self.restarts: bool = plan.report is None and plan.common.restart  # whether its runs are made anew
        self.finished: dict[str, Results] = {}  # by the name of the run, as the next two
        self.failed: dict[str, str] = {}  # why
        self.diverged: dict[str, str] = {}  # why, of runs of the tuning; these have not failed

    def write_command(self) -> Path:
        """Write the command beside the results, by which `find_experiments` finds the experiment; returns the file."""
        file = self.folder / f"{self.plan.table_name}{ENDING}"
        write_atomically(file, f"{self.command}\n".encode())
        return file

    @property
    def report_command(self) -> str:
        """The command that reports what is in the folder."""
        return f"{self.command} --report {shlex.quote(str(self.folder))}"

    def read(self, planned: Sequence[PlannedRun]) -> None:
        """Find which runs are finished, and which files are damaged or of another experiment.

        A damaged file beside a checkpoint is left to the run itself, which mends it.
        """
        for run in planned:
            name = run.settings.run_name
            checkpoint = run_files(run.settings.path, name).checkpoint
            try:
                results = read_finished(self.folder / f"{name}.csv", run.settings)
                diverged = read_divergence(self.folder, run.settings) if run.for_tuning else None
            except (ValueError, OSError) as error:
                if isinstance(error, DamagedFileError) and self.plan.report is None and checkpoint.exists():
                    continue
                self.failed[name] = in_one_line(error)
                continue
            if results is not None:
                self.finished[name] = replace(results, select=self.plan.select)
            elif diverged is not None:
                self.diverged[name] = diverged

    def left(self, planned: Sequence[PlannedRun]) -> dict[str, PlannedRun]:
        """The runs of which nothing has come yet, by name."""
        known = self.finished | self.failed | self.diverged
        return {run.settings.run_name: run for run in planned if run.settings.run_name not in known}

    def num_done(self, planned: Sequence[PlannedRun]) -> int:
        """How many of these runs are finished, or have diverged in the tuning."""
        known = self.finished | self.diverged
        return sum(run.settings.run_name in known for run in planned)

    def note(self, run: PlannedRun, outcome: Results | Exception) -> str:
        """Note what has come of a run that was made; returns a line on it."""
        name = run.settings.run_name
        if isinstance(outcome, Results):
            results = self.finished[name] = replace(outcome, select=self.plan.select)
            if not (self.folder / f"{self.plan.table_name}.csv").exists():  # or else its command is beside it
                self.write_command()
            if run.for_tuning:
                return f"{name} val accuracy {results.val_accuracy:.3f} %"
            return f"{name} test accuracy {results.test_accuracy:.3f} %"
        # what another process has said names the kind of its error where that says more
        reason = str(outcome) if isinstance(outcome, ChildProcessError) else in_one_line(outcome)
        if run.for_tuning and isinstance(outcome, FloatingPointError):
            self.diverged[name] = reason
            note_divergence(self.folder, run.settings, reason)
            return f"{name} counts as 0 %: {reason}"
        self.failed[name] = reason
        return f"{name} failed: {reason}"

    @property
    def tuning(self) -> Tuning:
        """The validation accuracies of the runs of the tuning that are there."""
        tuning = {name: {rate: {} for rate in self.plan.learning_rates} for name in self.plan.methods}
        known = dict.fromkeys(self.diverged) | {name: run.val_accuracy for name, run in self.finished.items()}
        for method, _, settings, _ in self.plan.tuning_runs:
            if settings.run_name in known:
                tuning[method][settings.learning_rate][settings.seed] = known[settings.run_name]
        return tuning

    def choose_learning_rates(self) -> list[str]:
        """Choose them where they are tuned, once all tuning runs are there, and plan `runs`. Returns lines on it."""
        if not self.plan.tuning_runs:
            return []
        left = len(self.plan.tuning_runs) - self.num_done(self.plan.tuning_runs)
        if not left:
            self.learning_rates = choose_learning_rates(self.tuning)
            self.runs = plan_runs(self.plan, self.learning_rates)
        table = tuning_table(self.tuning, self.learning_rates)
        return [table, *explain_choice(self.tuning, self.plan.tuning_seeds, left)]

    def tuning_of(self, method: str) -> dict[str, Value]:
        """What the row of a method in the table has of its tuning: its rate, and mean validation accuracies at all."""
        if method not in self.learning_rates:
            return {}
        means = {f"val_accuracy_at_{as_typed(rate)}": mean_accuracy(of) for rate, of in self.tuning[method].items()}
        return {"learning_rate": self.learning_rates[method], **means}

    @property
    def runs_by_method(self) -> dict[str, dict[int, Results]]:
        """The finished runs to compare, by method and seed."""
        runs: dict[str, dict[int, Results]] = {name: {} for name in self.plan.methods}
        for run in self.runs:
            if run.settings.run_name in self.finished:
                runs[run.method][run.settings.seed] = self.finished[run.settings.run_name]
        return runs


def find_experiments(folder: Path) -> list[Experiment]:
    """The experiments in a folder, to be reported, with what has come of their runs.

    ValueError where what should be a command is none.
    """
    experiments: dict[str, Experiment] = {}  # by command
    for file in sorted(folder.glob(f"*{ENDING}")):
        command = file.read_bytes().decode(errors="replace").strip()
        try:
            words = shlex.split(command)
            if words[: len(PROGRAM)] != PROGRAM:
                raise ValueError(f"it does not begin with {' '.join(PROGRAM)}")
            plan = parse([*words[len(PROGRAM) :], "--report", str(folder)])
        except ValueError as error:
            raise ValueError(f"{file} is damaged: remove it, and give the flags of its experiment ({error})") from None
        experiments[command] = experiment = Experiment(plan, command)
        experiment.read(plan.tuning_runs)
        experiment.choose_learning_rates()
        experiment.read(experiment.runs)
    return list(experiments.values())


def remove(runs: Collection[PlannedRun]) -> None:
    """Remove the files of runs, of all of them or, where another process is at work on one, of none."""
    all_files = [run_files(run.settings.path, run.settings.run_name) for run in runs]
    for files in all_files:  # one after the other, as a process may not have so many files open at a time
        with lock_run(files):
            pass
    for run, files in zip(runs, all_files, strict=True):
        with lock_run(files):
            for file in (files.results, files.best_weights, files.checkpoint):
                file.unlink(missing_ok=True)
        divergence_file(files.results.parent, run.settings).unlink(missing_ok=True)
