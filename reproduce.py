"""The paper's experiment: settings × seeds, one run of train.py each, and a one-sided paired t-test over the seeds.

    python reproduce.py --dataset digits --num_epochs 5 --batch_size 64 --learning_rate 0.05 --seeds 1-15 --jobs 2

Every flag of train.py that is not the experiment's own goes to every run. A stopped experiment goes on with the same
command: finished runs are not run again, the others continue from their checkpoints.
"""

import argparse
import csv
import importlib.util
import io
import itertools
import logging
import multiprocessing
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from joblib import Parallel, delayed, parallel_config
from tqdm import tqdm

import train
from checkpoint import lock_run, read_finished, run_files
from figures import save_figures
from networks import INPUT_NORMS
from results import Results, to_text, write_atomically
from seeds import MAX_SEED
from t_test import COMPARED, EXPERIMENT, SHORT, Comparison, compare_all, mixed_circumstances, table

Outcome = Results | str | int  # of a run: its results, why it failed, or the signal that stopped it
Runs = dict[str, dict[int, Results]]  # finished runs, by setting and seed

ATTEMPTS = 3  # how often a run may lose its process before it counts as failed
MISSED: list[int] = []  # signals that came while this process had no run
ONE_RUN = threading.Lock()  # the random generators are the process's: two runs in it would not be reproducible


@dataclass
class Cell:
    """One run of the experiment: a setting with a seed.

    Attributes:
        setting: name of the setting.
        flags: of train.py, without `--path` and `--device`.
        run: what `train.parse` makes of them, with a path that holds wherever a process is at home.
    """

    setting: str
    flags: list[str]
    run: argparse.Namespace

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.run.seed

    @property
    def name(self) -> str:
        """The name of its files."""
        return self.run.name


def make_parser() -> argparse.ArgumentParser:
    """The options of the experiment itself."""
    parser = train.Parser(
        prog="reproduce.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other flags are those of train.py, see python train.py --help.",
        allow_abbrev=False,
    )
    flag = parser.add_argument
    names = ", ".join(EXPERIMENT)
    settings_help = f"any of {names}, or your own as NAME:bn_weight=0.2,c=50 (default: baseline proposed)"
    flag(
        "--settings",
        nargs="+",
        default=[setting("baseline"), setting("proposed")],
        type=setting,
        metavar="SETTING",
        help=settings_help,
    )
    flag("--bn_weights", nargs="+", default=[], type=float, metavar="γ", help="proposed, with each of these bn_weights")
    flag(
        "--seeds",
        nargs="+",
        default=[seeds("1-15")],
        type=seeds,
        metavar="SEEDS",
        help="such as 1-15 or 1 2 5-7 (default: 1-15)",
    )
    flag("--name", default="", type=train.file_name, help="beginning of all file names (default: data set and network)")
    flag("--jobs", default=1, type=train.whole(1), help="runs at a time on this machine (default: %(default)s)")
    scheduler_help = "tcp://HOST:PORT of a Dask scheduler that gets the runs; cos and none are those of train.py"
    flag("--scheduler", action="append", default=[], help=scheduler_help)
    flag("--device", help="device of every run (default: for each a GPU of its own where there are any, else cpu)")
    flag("--list", action="store_true", help="print the commands of all runs instead of running them")
    report_help = "run nothing, make table and figures of the result files in FOLDER (default: results/ below --path)"
    flag("--report", nargs="?", const="", metavar="FOLDER", help=report_help)
    return parser


def setting(text: str) -> dict[str, tuple[float, float, str]]:
    """A setting's name with its bn_weight, c and input_norm, from its name or NAME:bn_weight=0.2,c=50."""
    name, colon, rest = text.partition(":")
    if not colon:
        if name not in EXPERIMENT:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(EXPERIMENT)}, and has no :bn_weight=...")
        return {name: EXPERIMENT[name]}
    values = dict(zip(COMPARED, EXPERIMENT["proposed"], strict=True))
    for part in rest.split(","):
        key, _, value = part.partition("=")
        try:
            values[key] = type(values[key])(value)
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(f"{text!r}: {part!r} is no {', '.join(values)}=VALUE") from None
    if name in EXPERIMENT or train.file_name(name) == "":
        raise argparse.ArgumentTypeError(f"{text!r} needs a name of its own before the colon")
    if values["input_norm"] not in INPUT_NORMS:
        raise argparse.ArgumentTypeError(f"{text!r}: input_norm is one of {', '.join(INPUT_NORMS)}")
    return {name: tuple(values.values())}


def seeds(text: str) -> list[int]:
    """Seeds from 7, 1-15 or 1,3,5-7."""
    numbers = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part, re.ASCII)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise argparse.ArgumentTypeError(f"seeds are whole numbers and ranges such as 1-15, not {text!r}")
        if int(match[2] or match[1]) > MAX_SEED:
            raise argparse.ArgumentTypeError(f"seeds above {MAX_SEED} repeat the draws of smaller ones, not {text!r}")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return numbers


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with `cells`, all runs in the order in which they are to be made. ValueError says what is wrong."""
    args, others = make_parser().parse_known_args(argv)
    for flag in (*(f"--{name}" for name in COMPARED), "--seed"):
        if any(re.fullmatch(f"{flag}(=.*)?", other) for other in others):
            raise ValueError(f"argument {flag}: the experiment sets it: give --settings, --bn_weights or --seeds")
    addresses = [value for value in args.scheduler if "://" in value]
    others += [f"--scheduler={value}" for value in args.scheduler if value not in addresses]
    args.scheduler = addresses[-1] if addresses else None
    if args.scheduler and args.jobs > 1:
        raise ValueError("argument --jobs: the cluster has its own number of workers: leave it out with --scheduler")

    names = [name for one in args.settings for name in one]
    args.settings = {name: values for one in args.settings for name, values in one.items()}
    for bn_weight in args.bn_weights:
        values = (bn_weight, *EXPERIMENT["proposed"][1:])
        if values not in args.settings.values():
            args.settings[f"bn_weight {train.short(bn_weight)}"] = values
    if len(set(args.settings.values())) < len(args.settings) or len(set(names)) < len(names):
        raise ValueError(f"argument --settings: two of {', '.join(names)} are the same")
    unique = dict.fromkeys(itertools.chain.from_iterable(args.seeds))
    # seed by seed, so that what is there after an interruption is a paired sample
    args.cells = [make_cell(args, name, seed, others) for seed in unique for name in args.settings]
    first = args.cells[0].run
    args.path = first.path
    args.name = args.name or first.name.replace(values_name(first), "").removesuffix(f"-seed{first.seed}")
    return args


def make_cell(args: argparse.Namespace, name: str, seed: int, others: list[str]) -> Cell:
    """The run of a setting with a seed."""
    bn_weight, c, input_norm = args.settings[name]
    flags = [*others, "--bn_weight", train.short(bn_weight), "--c", train.short(c), "--input_norm", input_norm]
    flags += ["--seed", str(seed)]
    elsewhere = args.list or args.report is not None or args.scheduler  # where this machine's devices do not matter
    here = ["--device", args.device] if args.device and not elsewhere else ["--device", "cpu"]
    run = train.parse([*flags, *here])
    if args.name:
        flags += ["--name", f"{args.name}{values_name(run)}-seed{seed}"]
        run = train.parse([*flags, *here])
    run.path = run.path.absolute()
    return Cell(name, flags, run)


def values_name(run: argparse.Namespace) -> str:
    """What the name of a run has in it of the setting."""
    return f"-weight{train.short(run.bn_weight)}-c{train.short(run.c)}-{run.input_norm}"


def read_runs(cells: list[Cell], folder: Path, runs: Runs, failed: dict[str, str]) -> None:
    """Put what is finished in a folder into `runs`, and into `failed` what is there but not of this experiment."""
    for cell in cells:
        files = run_files(cell.run.path, cell.name)
        files = files._replace(results=folder / files.results.name)
        try:
            results = read_finished(files, {name: getattr(cell.run, name) for name in train.SETTINGS})
        except (ValueError, OSError) as error:
            failed[cell.name] = describe(error)
            continue
        if results is not None:
            runs[cell.setting][cell.seed] = results


def run_cell(cell: Cell, device: str | None) -> tuple[Cell, Outcome]:
    """Make one run in this process, or what is left of it. Returns the cell and what came of it.

    Where another process is at work on the run, such as one that a stopped experiment has left behind, it waits.
    """
    flags = [flag for flag in cell.flags if flag != "--restart"]  # the experiment as a whole does that
    try:
        with train.on_signals(train.interrupt), ONE_RUN, own_device(device) as own:
            settings = train.parse([*flags, "--path", str(cell.run.path), "--device", own])
            while True:
                try:
                    return cell, train.train(settings)
                except BlockingIOError:
                    time.sleep(1)
    except KeyboardInterrupt as stop:
        return cell, stop.args[0] if stop.args else signal.SIGINT
    except Exception as error:  # whatever it is, the other runs go on
        return cell, describe(error)


def run_in_worker(cell: Cell, device: str | None) -> tuple[Cell, Outcome]:
    """`run_cell` in a process that makes nothing but runs: a signal that comes between two stops the next one.

    It must not end the process: with it, joblib would end all others, which are saving their runs.
    """
    if MISSED:
        return cell, MISSED[0]
    try:
        return run_cell(cell, device)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: MISSED.append(number))


def describe(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextmanager
def own_device(device: str | None, count: Callable[[], int] = torch.cuda.device_count) -> Iterator[str]:
    """The device to run on: `device` itself, or the GPU of this machine that the fewest runs are using, or the CPU.

    A run has its GPU for as long as it holds a lock file, which the system lets go whatever ends the process.
    """
    if device not in (None, "cuda") or not count():
        yield device or "cpu"
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else range(count())
    with ExitStack() as stack:
        for row, index in ((row, index) for row in itertools.count() for index in range(count())):
            file = f"batch-norm-initialization-{os.getuid()}-cuda{names[index]}-{row}.lock"
            try:
                stack.enter_context(FileLock(Path(tempfile.gettempdir()) / file, timeout=0))
                break
            except Timeout:  # another run has it
                continue
        yield f"cuda:{index}"


def run_here(cells: list[Cell], jobs: int, device: str | None, stops: list[int]) -> Iterator[tuple[Cell, Outcome]]:
    """Make the runs in `jobs` processes that share the cores; yields what `run_cell` returns, as they finish.

    Where a process is killed, its run goes on from its checkpoint in another one. After an entry in `stops`, no
    further run begins.
    """
    run = run_cell if jobs == 1 else run_in_worker
    groups, killed = [list(cells)], Counter()
    while groups and not stops:
        left = groups.pop(0)
        waiting = itertools.takewhile(lambda _: not stops, tuple(left))
        parallel = Parallel(n_jobs=jobs, pre_dispatch="n_jobs", batch_size=1, return_as="generator_unordered")
        try:
            for cell, outcome in parallel(delayed(run)(cell, device) for cell in waiting):
                left.remove(cell)
                yield cell, outcome
        except BrokenProcessPool:  # all processes are gone, and nothing says whose fault it was
            suspects, others = left[:jobs], left[jobs:]
            if len(left) == 1:
                killed[left[0].name] += 1
            if killed[left[0].name] == ATTEMPTS:
                yield left[0], f"its process was killed {ATTEMPTS} times, perhaps for lack of memory"
            else:
                groups = [*([suspect] for suspect in suspects), *([others] if others else []), *groups]


class ClusterError(Exception):
    """A cluster cannot make the runs."""


def run_on_cluster(cells: list[Cell], address: str, device: str | None) -> Iterator[tuple[Cell, Outcome]]:
    """Make the runs on the workers of a Dask cluster; yields what `run_cell` returns, as they finish.

    Where a worker is lost, Dask gives its run to another one, which goes on from the checkpoint.

    Raises:
        ClusterError: there is no scheduler, or its workers cannot do it; the message says what to change.
    """
    import distributed  # these take a second, and nothing else needs them
    from joblib._dask import DaskDistributedBackend

    class Backend(DaskDistributedBackend):
        """joblib's own, but for two things."""

        def effective_n_jobs(self, n_jobs: int) -> int:
            return max(2, super().effective_n_jobs(n_jobs))  # with one worker, joblib would do all the work here

        def submit(self, func: Any, callback: Callable | None = None) -> Future:
            future = super().submit(func, callback)
            [(_, (cell, *_), _)] = func.items  # a task that Dask gives up fails, where joblib would wait forever
            future.add_done_callback(lambda done: done.exception() and callback([(cell, describe(done.exception()))]))
            return future

        def retrieve_result_callback(self, out: Any) -> Any:
            return out if isinstance(out, list) else super().retrieve_result_callback(out)

    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what goes wrong is reported here, in one line
    try:
        with distributed.Client(address, timeout=10, set_as_default=False) as client:
            check_cluster(client, cells[0].run.path)
            with parallel_config(backend=Backend(client=client)):
                parallel = Parallel(n_jobs=-1, pre_dispatch="all", batch_size=1, return_as="generator_unordered")
                yield from parallel(delayed(run_cell)(cell, device) for cell in cells)
    except CancelledError as error:
        raise ClusterError(f"the scheduler at {address} is gone: start it, then give the same command again") from error
    except OSError as error:
        raise ClusterError(f"there is no scheduler at {address}: {error}") from error


def check_cluster(client: Any, path: Path) -> None:
    """ClusterError where there are no workers, or some that cannot make runs whose files belong below `path`."""
    try:
        client.wait_for_workers(1, timeout=30)
    except TimeoutError:
        raise ClusterError(f"{client.scheduler.address} has no workers: start some with dask worker") from None
    path.mkdir(parents=True, exist_ok=True)
    probe = path / f"probe-{uuid.uuid4().hex}.tmp"
    probe.touch()
    try:
        seen = client.run(Path.exists, probe, on_error="return")
    finally:
        probe.unlink(missing_ok=True)
    blind = [address for address, sees in seen.items() if sees is not True]
    if blind:
        raise ClusterError(f"{path} must be a folder that all workers share; not so for {', '.join(blind)}")
    module = Path(__file__).stem
    found = client.run(importlib.util.find_spec, module, on_error="return")
    found[client.scheduler.address] = client.run_on_scheduler(importlib.util.find_spec, module)
    lost = [address for address, spec in found.items() if getattr(spec, "loader", None) is None]
    if lost:
        variable = f"PYTHONPATH={Path(__file__).parent}"
        raise ClusterError(f"start scheduler and workers with {variable}: {', '.join(lost)} cannot import {module}")


class Display:
    """A bar over the runs with the time left, under it the table; where there is no terminal, a line a run."""

    def __init__(self, num_runs: int, num_finished: int, comparisons: list[Comparison]) -> None:
        self.on_terminal = sys.stderr.isatty()
        options = {"disable": not self.on_terminal, "leave": False, "dynamic_ncols": True, "mininterval": 0}
        self.bar = tqdm(total=num_runs, initial=num_finished, unit="run", smoothing=0, miniters=1, **options)
        rows = enumerate(table(comparisons, SHORT).splitlines(), start=1)
        self.lines = [tqdm(desc=row, bar_format="{desc}", position=position, **options) for position, row in rows]
        self.place = itertools.count(num_finished + 1)

    def show(self, text: str, comparisons: list[Comparison], failed: bool = False) -> None:
        """Of one more run there is `text` to say; a terminal shows it where the run has failed."""
        place = f"{next(self.place)}/{self.bar.total}"
        if failed or not self.on_terminal:
            tqdm.write(f"{place} {text}")
            sys.stdout.flush()
        self.bar.update()
        for line, row in zip(self.lines, table(comparisons, SHORT).splitlines(), strict=True):
            line.set_description_str(row)

    def close(self) -> None:
        """Leave the terminal as it was."""
        for line in (*reversed(self.lines), self.bar):
            line.close()


def make_runs(args: argparse.Namespace, runs: Runs, failed: dict[str, str]) -> list[int]:
    """Make all runs that are neither finished nor failed; adds to both. Returns the signals that came."""
    stops: list[int] = []
    cells = [cell for cell in args.cells if cell.seed not in runs[cell.setting] and cell.name not in failed]
    if not cells:
        return stops
    if cells[0].run.restart:
        for files in (run_files(cell.run.path, cell.name) for cell in cells):
            with lock_run(files):
                for file in (files.results, files.best_weights, files.checkpoint):
                    file.unlink(missing_ok=True)

    def stop(number: int) -> None:
        stops.append(number)
        children = multiprocessing.active_children()
        for child in children:  # the runs save what they have, and end
            os.kill(child.pid, signal.SIGTERM)
        if args.scheduler or not children:
            train.interrupt(number)

    if args.scheduler:
        outcomes = run_on_cluster(cells, args.scheduler, args.device)
    else:
        outcomes = run_here(cells, args.jobs, args.device, stops)
    display = Display(len(args.cells), len(args.cells) - len(cells), compare_all(runs))
    with train.on_signals(stop), closing(outcomes), closing(display):
        try:
            for cell, outcome in outcomes:
                if isinstance(outcome, int):
                    stops.append(outcome)
                elif isinstance(outcome, str):
                    failed[cell.name] = outcome
                    display.show(f"{cell.name} failed: {outcome}", compare_all(runs), failed=True)
                else:
                    runs[cell.setting][cell.seed] = outcome
                    display.show(f"{cell.name} test accuracy {outcome.test_accuracy:.3f} %", compare_all(runs))
        except KeyboardInterrupt as interrupt:
            stops.append(interrupt.args[0])
        except ClusterError as error:
            failed["the experiment"] = str(error)
    return stops


def write_comparisons(file: Path, args: argparse.Namespace, comparisons: list[Comparison]) -> None:
    """Write the table as CSV, below the settings that all runs share, and as Markdown."""
    text = io.StringIO()
    for name in train.SETTINGS:
        if name not in (*COMPARED, "seed"):
            text.write(f"# {name}: {to_text(getattr(args.cells[0].run, name))}\n")
    writer = csv.writer(text, lineterminator="\n")
    columns = [*("setting", *COMPARED, "seeds", "mean", "standard_deviation", "pairs", "difference", "lower", "upper")]
    columns += ["p_value", "corrected_p_value", "improved", "verdict"]
    writer.writerow(columns)
    for c in comparisons:
        row = [c.setting, *args.settings[c.setting], len(c.accuracies), c.mean, c.deviation]
        if c.setting != "baseline":
            row += [
                len(c.differences),
                c.difference,
                *c.interval,
                c.p_value,
                c.corrected_p_value,
                c.improved,
                c.verdict,
            ]
        row += [""] * (len(columns) - len(row))
        writer.writerow("" if value != value else value for value in row)  # NaN: an empty field
    write_atomically(file.with_name(f"{file.name}.csv"), text.getvalue().encode())
    write_atomically(file.with_name(f"{file.name}.md"), f"{table(comparisons)}\n".encode())


def main(argv: Sequence[str] | None = None) -> None:
    """The command line.

    Exit codes: 2 for a wrong flag, 1 where a run failed, 130 and 143 where Ctrl-C and SIGTERM stop it.
    """
    try:
        args = parse(argv)
    except ValueError as error:
        train.end(2, f"error: {error}", "reproduce.py")
    if args.list:
        for cell in args.cells:
            print(shlex.join(["python", "train.py", *cell.flags, *(["--device", args.device] if args.device else [])]))
        return
    folder = Path(args.report or args.path / "results")
    stops, runs, failed = [], {name: {} for name in args.settings}, {}
    try:
        if args.report is not None or not args.cells[0].run.restart:
            read_runs(args.cells, folder, runs, failed)
        if args.report is None:
            stops = make_runs(args, runs, failed)
        elif not any(runs.values()) and not failed:
            raise ValueError(f"{folder} has no finished run of this experiment")
        comparisons = compare_all(runs)
        print(table(comparisons))
        for line in mixed_circumstances(run for seeds in runs.values() for run in seeds.values()):
            print(line)
        for name, reason in failed.items():
            print(f"reproduce.py: {name} failed: {reason}", file=sys.stderr)
        write_comparisons(folder / args.name, args, comparisons)
        if not stops:
            save_figures(folder / args.name, runs, folder.parent / "networks")
    except (OSError, ValueError) as error:
        train.end(1, f"error: {error}", "reproduce.py")
    if stops:
        again = "without --restart" if args.cells[0].run.restart else "again"
        saved = (
            "runs that workers have begun go to their end" if args.scheduler else "the epochs that are done are saved"
        )
        train.end(128 + stops[0], f"stopped; {saved}: give the same command {again} to go on", "reproduce.py")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    from reproduce import main  # so that other processes find everything of this file by its import

    main()
