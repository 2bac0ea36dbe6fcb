"""The paper's experiment: settings × seeds, one run of train.py each, and a one-sided paired t-test over the seeds.

    python reproduce.py --dataset digits --num_epochs 5 --batch_size 64 --learning_rate 0.05 --seeds 1-15 --jobs 2

Every flag of train.py that is not the experiment's own goes to every run. A stopped experiment is resumed by the same
command: finished runs are not made again, the others continue from their checkpoints.
"""

import argparse
import itertools
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import settings as flags
from command_line import (
    FlagError,
    Parser,
    answer_at_once,
    as_typed,
    end,
    file_name,
    folder,
    how_to_resume,
    in_one_line,
    on_signals,
    one_line_endings,
    say,
    whole,
)
from settings import COMPARED, PAPER, SCHEDULES, Value, named_setting, scheduler, seed_range


@dataclass
class PlannedRun:
    """One run of the experiment.

    Attributes:
        setting: name of its setting.
        flags: of train.py, without `--path` and `--device`.
        settings: what `settings.parse` makes of them, with an absolute path.
    """

    setting: str
    flags: list[str]
    settings: argparse.Namespace


def make_parser() -> Parser:
    """The flags of the experiment itself."""
    parser = Parser(
        prog="reproduce.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other flags are those of train.py, see python train.py --help.",
        allow_abbrev=False,
    )
    flag = parser.add_argument
    settings_help = f"any of {', '.join(PAPER)}, or your own as NAME:bn_weight=0.2,c=50 (default: baseline proposed)"
    seeds_help = "such as 1-15 or 1 2 5-7 (default: 1-15)"
    default = [{name: PAPER[name]} for name in ("baseline", "proposed")]
    flag("--settings", nargs="+", default=default, type=named_setting, metavar="SETTING", help=settings_help)
    flag("--bn_weights", nargs="+", default=[], type=flags.positive, metavar="γ", help="proposed, with each of these")
    flag("--seeds", nargs="+", default=[seed_range("1-15")], type=seed_range, metavar="SEEDS", help=seeds_help)
    flag("--name", default="", type=file_name, help="beginning of all file names (default: made from the settings)")
    flag("--jobs", default=1, type=whole(1), help="runs at a time on this machine (default: %(default)s)")
    scheduler_help = "tcp://HOST:PORT of a Dask scheduler that gets the runs; cos and none are those of train.py"
    flag("--scheduler", action="append", default=[], type=scheduler, help=scheduler_help)
    flag("--device", help="device of every run (default: with --jobs, runs share out all GPUs; cpu without any)")
    flag("--list", action="store_true", help="print the commands of all runs instead of making them")
    report_help = "make no runs, only table and figures of the result files in FOLDER (default: results/ below --path)"
    flag("--report", nargs="?", const=False, type=folder, metavar="FOLDER", help=report_help)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, with `runs`, all runs in the order in which they are to be made. FlagError says what is wrong."""
    args, others = make_parser().parse_known_args(argv)
    for name in (*COMPARED, "seed"):
        if any(re.fullmatch(f"--{name}(=.*)?", other) for other in others):
            raise FlagError(f"argument --{name}: the experiment sets it: give --settings, --bn_weights or --seeds")
    others += [f"--scheduler={value}" for value in args.scheduler if value in SCHEDULES]
    args.scheduler = next((value for value in reversed(args.scheduler) if value not in SCHEDULES), None)
    if args.scheduler and args.jobs > 1:
        raise FlagError("argument --jobs: the cluster has its own number of workers: leave it out with --scheduler")

    names = [name for one in args.settings for name in one]
    args.settings = {name: values for one in args.settings for name, values in one.items()}
    for bn_weight in args.bn_weights:
        values = {**PAPER["proposed"], "bn_weight": bn_weight}
        if values not in args.settings.values():
            args.settings[f"bn_weight {as_typed(bn_weight)}"] = values
    distinct = {tuple(values.values()) for values in args.settings.values()}
    if len(distinct) < len(args.settings) or len(set(names)) < len(names):
        raise FlagError(f"argument --settings: two of {', '.join(names)} are the same")
    unique_seeds = dict.fromkeys(itertools.chain.from_iterable(args.seeds))
    # seed by seed, so that what is there after an interruption is a paired sample
    args.runs = [plan_run(args, name, seed, others) for seed in unique_seeds for name in args.settings]
    args.num_seeds = len(unique_seeds)
    first = args.runs[0].settings
    args.path = flags.parse(args.runs[0].flags).path
    args.name = args.name or flags.experiment_name(first)
    return args


def plan_run(args: argparse.Namespace, name: str, seed: int, others: list[str]) -> PlannedRun:
    """The run of a setting with a seed."""
    compared = [text for key, value in args.settings[name].items() for text in (f"--{key}", as_typed(value))]
    arguments = [*others, *compared, "--seed", str(seed)]
    if args.name:
        settings = flags.parse(arguments)
        arguments += ["--name", f"{args.name}-{flags.setting_name(settings)}-seed{seed}"]
    settings = flags.parse(arguments)
    settings.path = settings.path.absolute()
    return PlannedRun(name, arguments, settings)


if __name__ == "__main__":
    answer_at_once("reproduce.py", parse)  # before torch and scipy are imported, which takes seconds

from tqdm import tqdm

from checkpoint import read_finished
from lock import lock_run
from results import DamagedFileError, Results, read_table_size, write_table
from t_test import NARROW_TABLE_COLUMNS, Comparison, compare_all, mixed_circumstances, table
from workers import ClusterError, make_runs

Runs = dict[str, dict[int, Results]]  # finished runs, by setting and seed


def read_runs(args: argparse.Namespace, results_folder: Path, runs: Runs, failed: dict[str, str]) -> None:
    """Put what is finished in a folder into `runs`; into `failed`, what is damaged or of another experiment.

    A damaged file beside a checkpoint is left to the run itself, which mends it.
    """
    for run in args.runs:
        checkpoint = flags.run_files(run.settings.path, run.settings.name).checkpoint
        try:
            results = read_finished(results_folder / f"{run.settings.name}.csv", run.settings)
        except (ValueError, OSError) as error:
            if isinstance(error, DamagedFileError) and args.report is None and checkpoint.exists():
                continue
            failed[run.settings.name] = in_one_line(error)
            continue
        if results is not None:
            runs[run.setting][run.settings.seed] = results


class Display:
    """A bar over the runs with the time left, under it the table; where there is no terminal, a line for each run."""

    def __init__(self, num_runs: int, num_finished: int, comparisons: list[Comparison]) -> None:
        self.on_terminal = sys.stderr.isatty()
        options = {"disable": not self.on_terminal, "leave": False, "dynamic_ncols": True, "mininterval": 0}
        self.bar = tqdm(total=num_runs, initial=num_finished, unit="run", smoothing=0, miniters=1, **options)
        rows = enumerate(table(comparisons, NARROW_TABLE_COLUMNS).splitlines(), start=1)
        self.lines = [tqdm(desc=row, bar_format="{desc}", position=position, **options) for position, row in rows]
        self.place = itertools.count(num_finished + 1)

    def show(self, text: str, comparisons: list[Comparison], failed: bool) -> None:
        """Another run has ended, of which there is `text` to say; a terminal shows it where the run has failed."""
        place = f"{next(self.place)}/{self.bar.total}"
        if failed or not self.on_terminal:
            say(f"{place} {text}")
        self.bar.update()
        for line, row in zip(self.lines, table(comparisons, NARROW_TABLE_COLUMNS).splitlines(), strict=True):
            line.set_description_str(row)

    def close(self) -> None:
        """Leave the terminal as it was."""
        for line in (*reversed(self.lines), self.bar):
            line.close()


def check_here(args: argparse.Namespace) -> None:
    """FlagError where this machine cannot make the runs of one of the settings."""
    from train import prepare  # networks are not needed where another machine makes the runs

    for run in {run.setting: run for run in args.runs}.values():
        prepare(argparse.Namespace(**{**vars(run.settings), "device": args.device}))


def complete(args: argparse.Namespace, runs: Runs, failed: dict[str, str]) -> list[int]:
    """Make all runs that are neither finished nor failed; adds to both. Returns the signals that have arrived."""
    left = {run.settings.name: run for run in args.runs if run.settings.seed not in runs[run.setting]}
    left = {name: run for name, run in left.items() if name not in failed}
    if not left:
        return []
    if args.runs[0].settings.restart:
        remove([flags.run_files(run.settings.path, name) for name, run in left.items()])
    stops: list[int] = []
    outcomes = make_runs([run.settings for run in left.values()], stops, args.jobs, args.scheduler, args.device)
    display = Display(len(args.runs), len(args.runs) - len(left), compare_all(runs, args.num_seeds))
    with on_signals(stops.append), closing(display), closing(outcomes):
        try:
            for settings, outcome in outcomes:
                run = left[settings.name]
                if isinstance(outcome, int):
                    stops.append(outcome)
                    continue
                if isinstance(outcome, str):
                    failed[settings.name] = outcome
                    text = f"{settings.name} failed: {outcome}"
                else:
                    runs[run.setting][settings.seed] = outcome
                    text = f"{settings.name} test accuracy {outcome.test_accuracy:.3f} %"
                display.show(text, compare_all(runs, args.num_seeds), failed=settings.name in failed)
        except ClusterError as error:
            failed["the experiment"] = str(error)
    return stops


def remove(all_files: Sequence[flags.RunFiles]) -> None:
    """Remove the files of runs, of all of them or, where another process is at work on one, of none."""
    for files in all_files:  # one after the other, as a process may not have so many files open at a time
        with lock_run(files):
            pass
    for files in all_files:
        with lock_run(files):
            for file in (files.results, files.best_weights, files.checkpoint):
                file.unlink(missing_ok=True)


def table_rows(args: argparse.Namespace, comparisons: list[Comparison]) -> list[dict[str, Value]]:
    """The rows of the table with all digits; what a setting does not have, such as a p-value, is left out."""
    rows = []
    for c in comparisons:
        row = {"setting": c.setting, **args.settings[c.setting], "seeds": len(c.accuracies), "mean": c.mean}
        row |= {"standard_deviation": c.deviation}
        if c.setting != "baseline":
            row |= {"pairs": len(c.differences), "difference": c.difference, "lower": c.interval[0]}
            row |= {"upper": c.interval[1], "p_value": c.p_value, "corrected_p_value": c.corrected_p_value}
            row |= {"improved": c.improved, "verdict": c.verdict}
        rows.append({name: value for name, value in row.items() if value == value})  # NaN is not
    return rows


def explain(args: argparse.Namespace, runs: Runs, failed: dict[str, str]) -> list[str]:
    """A line for each run that has failed, with how many of its setting are finished."""
    lines = []
    for run in args.runs:
        if reason := failed.get(run.settings.name):
            seeds = f"{len(runs[run.setting])} of {args.num_seeds} seeds"
            lines.append(f"{run.setting}: {seeds}; seed {run.settings.seed} failed: {reason}")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `one_line_endings` for its exit codes, of which 1 also means that a run failed."""
    with one_line_endings("reproduce.py"), ExitStack() as handlers:
        args = parse(argv)
        if args.list:
            device = ["--device", args.device] if args.device else []
            say(*(shlex.join(["python", "train.py", *run.flags, *device]) for run in args.runs))
            return
        results = Path(args.report or args.path / "results")
        stem, restart = results / args.name, args.runs[0].settings.restart
        runs, failed, stops = {name: {} for name in args.settings}, {}, []
        shared = flags.determining(args.runs[0].settings)
        shared = {name: value for name, value in shared.items() if name not in (*COMPARED, "seed")}
        in_table = read_table_size(stem, shared)
        if args.report is not None or not restart:
            read_runs(args, results, runs, failed)
        if args.report is None:
            if not args.scheduler:
                check_here(args)
            if stops := complete(args, runs, failed):
                handlers.enter_context(on_signals(stops.append))  # another one is no reason to lose the table
        finished = sum(map(len, runs.values()))
        if not finished and not failed and not stops:
            raise ValueError(f"{results} has no finished run of this experiment")
        comparisons = compare_all(runs, args.num_seeds)
        lines = [table(comparisons), *explain(args, runs, failed)]
        say(*lines, *mixed_circumstances(run for seeds in runs.values() for run in seeds.values()))
        if 0 < finished < in_table and not restart:
            say(f"{stem}.csv keeps its table of {in_table} finished runs: remove it to have this one written")
        elif finished:
            write_table(stem, shared, table_rows(args, comparisons), "\n\n".join(lines))
            if not stops:
                from figures import save_figures  # matplotlib is not needed where runs are made

                _, missing = save_figures(stem, runs, results.parent / "networks")
                say(*missing)
        for name, reason in failed.items():
            print(f"reproduce.py: {name} failed: {reason}", file=sys.stderr)
    if stops:
        again = "without --restart" if restart else "again"
        end(128 + stops[0], how_to_resume(again), "reproduce.py")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
