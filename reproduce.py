"""The paper's experiment: settings × seeds, one run of train.py each, and a one-sided paired t-test over the seeds.

    python reproduce.py --dataset digits --num_epochs 5 --batch_size 64 --learning_rate 0.05 --seeds 1-15 --jobs 2

All flags of train.py go to every run. The same command resumes an experiment: finished runs are not made again.
"""

import argparse
import itertools
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from command_line import settings as flags
from command_line.endings import answer_at_once, end, how_to_resume, in_one_line, one_line_endings, say, warn
from command_line.signals import on_signals
from experiment.plan import PlannedRun, parse, plan_runs

if __name__ == "__main__":
    answer_at_once("reproduce.py", parse)  # before torch and scipy are imported, which takes seconds

from tqdm import tqdm

from experiment.cluster import ClusterError
from experiment.making import make_runs
from experiment.outcomes import Outcomes, explain_failures, read_runs, runs_by_setting, tuning_so_far
from experiment.tuning import (
    choose_learning_rates,
    divergence_file,
    explain_choice,
    note_divergence,
    tuning_columns,
    tuning_table,
)
from reporting.comparison import Comparison, is_contrast
from reporting.tables import (
    NARROW_TABLE_COLUMNS,
    read_table_size,
    selection_note,
    table,
    table_rows,
    tables,
    write_table,
)
from saved_runs.by_seed import mixed_circumstances, note_missing_checksums
from saved_runs.lock import lock_run
from saved_runs.paths import RunFiles, run_files
from saved_runs.results import Results
from t_test import compare_all


class Display:
    """A bar over the runs with the time left, under it the table; where there is no terminal, a line for each run."""

    def __init__(self, num_runs: int, num_finished: int, rows: Sequence[str]) -> None:
        self.on_terminal = sys.stderr.isatty()
        options = {"disable": not self.on_terminal, "leave": False, "dynamic_ncols": True, "mininterval": 0}
        self.bar = tqdm(total=num_runs, initial=num_finished, unit="run", smoothing=0, miniters=1, **options)
        numbered = enumerate(rows, start=1)
        self.lines = [tqdm(desc=row, bar_format="{desc}", position=position, **options) for position, row in numbered]
        self.place = itertools.count(num_finished + 1)

    def show(self, text: str, rows: Sequence[str], failed: bool) -> None:
        """Another run has ended, of which there is `text` to say; a terminal shows it where the run has failed."""
        place = f"{next(self.place)}/{self.bar.total}"
        if failed or not self.on_terminal:
            say(f"{place} {text}")
        self.bar.update()
        for line, row in zip(self.lines, rows, strict=True):
            line.set_description_str(row)

    def close(self) -> None:
        """Leave the terminal as it was."""
        for line in (*reversed(self.lines), self.bar):
            line.close()


def check_here(args: argparse.Namespace) -> None:
    """FlagError where this machine cannot make the runs of one of the settings; see `find_images` for the others."""
    from image_sets.folders import find_images
    from training.preparation import prepare  # networks are not needed where another machine makes the runs

    for run in {run.setting: run for run in args.tuning_runs or args.runs}.values():
        prepare(argparse.Namespace(**{**vars(run.settings), "device": args.device}))
    if args.first.dataset not in flags.DATASETS:
        find_images(args.path / "images" / args.first.dataset)


def train_here(settings: argparse.Namespace, stops: list[int]) -> Results:
    """Make a run in this process."""
    import train  # torch's networks are not needed where others make the runs

    return train.train(settings, stops=stops)


def compare_runs(args: argparse.Namespace, outcomes: Outcomes) -> list[Comparison]:
    """Compare the finished runs, with the baseline and as `--contrast` asks for."""
    return compare_all(runs_by_setting(args, outcomes), len(args.seeds), args.contrast)


def make_what_is_left(args: argparse.Namespace, planned: Sequence[PlannedRun], outcomes: Outcomes) -> None:
    """Make all runs of which nothing has come yet."""
    left = {run.settings.name: run for run in outcomes.left(planned)}
    if not left:
        return
    tuning = planned[0].for_tuning
    if args.first.restart:
        remove([run_files(run.settings.path, name) for name, run in left.items()])
        for run in left.values():
            divergence_file(args.path / "results", run.settings).unlink(missing_ok=True)

    def rows() -> list[str]:
        comparisons = [] if tuning else [c for c in compare_runs(args, outcomes) if not is_contrast(c)]
        return table(comparisons, NARROW_TABLE_COLUMNS).splitlines() if comparisons else []

    runs = [run.settings for run in left.values()]
    made = make_runs(runs, outcomes.stops, args.jobs, args.scheduler, args.device, train_here)
    display = Display(len(planned), len(planned) - len(left), rows())
    with on_signals(outcomes.stops.append), closing(display), closing(made):
        try:
            for settings, outcome in made:
                name = settings.name
                if isinstance(outcome, int):
                    outcomes.stops.append(outcome)
                    continue
                if isinstance(outcome, Results):
                    results = outcomes.finished[name] = replace(outcome, select=args.select)
                    accuracy = f"val accuracy {results.val_accuracy:.3f} %"
                    text = f"{name} {accuracy if tuning else f'test accuracy {results.test_accuracy:.3f} %'}"
                elif tuning and isinstance(outcome, FloatingPointError):
                    outcomes.diverged[name] = reason = in_one_line(outcome)
                    note_divergence(args.path / "results", settings, reason)
                    text = f"{name} counts as 0 %: {reason}"
                else:
                    outcomes.failed[name] = reason = in_one_line(outcome)
                    text = f"{name} failed: {reason}"
                display.show(text, rows(), failed=not isinstance(outcome, Results))
        except ClusterError as error:
            outcomes.failed["the experiment"] = str(error)


def remove(all_files: Sequence[RunFiles]) -> None:
    """Remove the files of runs, of all of them or, where another process is at work on one, of none."""
    for files in all_files:  # one after the other, as a process may not have so many files open at a time
        with lock_run(files):
            pass
    for files in all_files:
        with lock_run(files):
            for file in (files.results, files.best_weights, files.checkpoint):
                file.unlink(missing_ok=True)


def read_and_make(args: argparse.Namespace, planned: Sequence[PlannedRun], folder: Path, outcomes: Outcomes) -> None:
    """Find what has come of runs, and make the others unless only a report is asked for or a signal has arrived."""
    if args.report is not None or not args.first.restart:
        read_runs(args, planned, folder, outcomes)
    if planned and args.report is None and not outcomes.stops:
        make_what_is_left(args, planned, outcomes)


def list_runs(args: argparse.Namespace, folder: Path) -> None:
    """Print the commands of all runs that are known: of those to compare, once their learning rates are."""
    outcomes = Outcomes()
    read_runs(args, args.tuning_runs, folder, outcomes)
    lines = choose(args, outcomes)
    device = ["--device", args.device] if args.device else []
    say(*(shlex.join(["python", "train.py", *run.flags, *device]) for run in (*args.tuning_runs, *args.runs)))
    if not args.runs:
        warn(lines[-1], "reproduce.py")


def choose(args: argparse.Namespace, outcomes: Outcomes) -> list[str]:
    """Choose the learning rates where they are tuned, once all tuning runs are there; returns the report of it.

    This plans `args.runs`, and `args.tuned` is what the row of each setting in the table has of it.
    """
    args.tuned = {}
    if not args.tuning_runs:
        return []
    tuning = tuning_so_far(args, outcomes)
    left = sum(run.settings.name not in outcomes.finished | outcomes.diverged for run in args.tuning_runs)
    chosen = {} if left else choose_learning_rates(tuning)
    args.runs = plan_runs(args, chosen) if chosen else []
    args.tuned = {name: tuning_columns(tuning[name], rate) for name, rate in chosen.items()}
    return [tuning_table(tuning, chosen), *explain_choice(tuning, args.tuning_seeds, left)]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `one_line_endings` for its exit codes, of which 1 also means that a run failed."""
    with one_line_endings("reproduce.py"), ExitStack() as handlers:
        args = parse(argv)
        folder = Path(args.report or args.path / "results")
        if args.list:
            list_runs(args, folder)
            return
        stem, restart, outcomes = folder / args.table_name, args.first.restart, Outcomes()
        in_table = read_table_size(stem, args.shared)
        if args.report is None and not args.scheduler:
            check_here(args)
        read_and_make(args, args.tuning_runs, folder, outcomes)
        explained = choose(args, outcomes)
        read_and_make(args, args.runs, folder, outcomes)
        if outcomes.stops:
            handlers.enter_context(on_signals(outcomes.stops.append))  # another one is no reason to lose the table
        runs = runs_by_setting(args, outcomes)
        finished = sum(map(len, runs.values()))
        if outcomes == Outcomes():
            raise ValueError(f"{folder} has no finished {'tuning ' * bool(explained)}run of this experiment")
        comparisons = compare_runs(args, outcomes)
        texts = tables(comparisons) if args.runs else []
        compared = [run for seeds in runs.values() for run in seeds.values()]
        notes = (*explained, *selection_note(args.select), *note_missing_checksums(compared))
        text = "\n\n".join((*texts, *notes, *explain_failures(args, outcomes)))
        say(text, *mixed_circumstances(compared))
        if 0 < finished < in_table and not restart:
            say(f"{stem}.csv keeps its table of {in_table} finished runs: remove it to have this one written")
        elif finished:
            rows = table_rows(comparisons, args.settings)
            rows = [row | args.tuned.get(row["setting"], {}) for row in rows]
            write_table(stem, args.shared, rows, text)
            if not outcomes.stops:
                from figures import save_figures  # matplotlib is not needed where runs are made

                _, missing = save_figures(stem, runs, folder.parent / "networks", comparisons)
                say(*missing)
        for name, reason in outcomes.failed.items():
            warn(f"{name} failed: {reason}", "reproduce.py")
    if outcomes.stops:
        again = "without --restart" if restart else "again"
        end(128 + outcomes.stops[0], how_to_resume(again), "reproduce.py")
    if outcomes.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
