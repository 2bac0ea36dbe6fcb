"""The plan of an experiment: its flags, and the runs that they ask for.

Nothing here takes long to import, so that `--help` and a wrong flag are answered at once.
"""

import argparse
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import run_settings
from command_line.flag_types import FlagError, Parser, SettingError, as_typed, file_name, folder, whole
from run_settings import COMPARED, DEFAULTS, MAX_SEED, NAMED, PAPER, SELECTIONS, WITHOUT_EFFECT, Settings, Value

EXAMPLES = """All other flags are those of train.py, see python train.py --help. The same command resumes an experiment.

examples:
  python reproduce.py --dataset digits --num_epochs 5 --batch_size 64 --learning_rate 0.05 --jobs 2  # 15 minutes
  python reproduce.py --settings baseline init rate input --list  # the paper's ablations: the command of each run
  python reproduce.py --report results  # the experiments in a folder
"""
PROGRAM = ["python", "reproduce.py"]


class PlannedRun(NamedTuple):
    """One run of the experiment."""

    method: str  # what it trains with, by name
    flags: list[str]  # of train.py, without --device
    settings: Settings  # what `run_settings.parse` makes of them
    for_tuning: bool  # whether it is there to choose a learning rate, not to be compared


def make_parser() -> Parser:
    """The flags of the experiment itself."""
    description = "The paper's experiment: settings × seeds, one run of train.py each, and a paired t-test over seeds."
    parser = Parser(prog="reproduce.py", usage="%(prog)s [FLAG ...]", description=description, epilog=EXAMPLES)
    comparison, files = (parser.add_argument_group(t).add_argument for t in ("the comparison", "files and devices"))
    methods_help = f"any of {', '.join(NAMED)}, or your own as NAME:bn_weight=0.2,c=50 (default: baseline proposed)"
    seeds_help = "such as 1-15 or 1 2 5-7 (default: 1-15)"
    default = [(name, PAPER[name]) for name in ("baseline", "proposed")]
    methods = {"dest": "methods", "metavar": "SETTING", "type": named_method, "default": default}
    comparison("--settings", nargs="+", **methods, help=methods_help)
    positives = {"nargs": "+", "default": [], "type": run_settings.positive}
    comparison("--bn_weights", **positives, metavar="γ", help="also proposed with each of these γ")
    comparison("--seeds", nargs="+", default=[seed_range("1-15")], type=seed_range, metavar="SEEDS", help=seeds_help)
    contrast = {"action": "append", "nargs": 2, "default": [], "metavar": ("SETTING", "OTHER")}
    comparison("--contrast", **contrast, help="also test whether SETTING is better than OTHER; may be repeated")
    selection_help = "test accuracy at the epoch of the best validation accuracy, or at the last (default: %(default)s)"
    comparison("--select", default="best", choices=SELECTIONS, help=selection_help)
    rates_help = "choose each method's learning rate among these, on the tuning seeds"
    comparison("--learning_rates", **positives, metavar="RATE", help=rates_help)
    tuning_help = "seeds to choose it on, none of --seeds (default: 16-20)"
    comparison("--tuning_seeds", nargs="+", type=seed_range, default=[], metavar="SEEDS", help=tuning_help)
    files("--name", default="", type=file_name, help="beginning of all file names (default: made from the settings)")
    files("--jobs", default=1, type=whole(1), help="runs at a time on this machine (default: %(default)s)")
    files("--cluster", type=cluster, metavar="tcp://HOST:PORT", help="Dask scheduler whose workers make the runs")
    files("--device", help="device of every run (default: with --jobs, runs share out all GPUs; cpu without any)")
    files("--list", action="store_true", help="print the commands of all runs instead")
    report_help = "make no runs: table and figures of those in FOLDER (default: results/ below --path)"
    files("--report", nargs="?", const=True, type=folder, metavar="FOLDER", help=report_help)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of the experiment, and its plan. FlagError or SettingError says what is wrong.

    Returns:
        The flags, with `seeds` and `tuning_seeds` as lists, `report` as a folder or None, and besides

        - `methods`: those of `--settings` and `--bn_weights`: their settings of `COMPARED`, by name.
        - `runs`: all runs to compare, in the order in which they are to be made; none as long as their learning rates
          are to be chosen.
        - `tuning_runs`: the runs on which the rates are chosen.
        - `common`: settings with what all these runs share.
        - `shared`: what determines the numbers of all runs to compare, by name.
        - `table_name`: how the names of the table and the figures begin.
    """
    parser = make_parser()
    args, args.others = parser.parse_known_args(argv)
    given = {argument.partition("=")[0] for argument in args.others}
    for name in (*COMPARED, "seed"):
        if f"--{name}" in given:
            raise FlagError(f"argument --{name}: the experiment sets it: give --settings, --bn_weights or --seeds")
    if "--learning_rate" in given and args.learning_rates:
        raise FlagError("argument --learning_rate: --learning_rates has the rates: leave it out")
    if args.cluster and args.jobs > 1:
        raise FlagError("argument --jobs: the cluster has its own number of workers: leave it out with --cluster")
    plan_methods(args)
    check_contrasts(args)
    plan_seeds(args)
    args.common = run_settings.parse(args.others, parser)
    rates = args.learning_rates = sorted(set(args.learning_rates))
    args.runs = [] if rates else plan_runs(args)
    args.tuning_runs = [plan_run(args, n, seed, x) for seed in args.tuning_seeds for x in rates for n in args.methods]
    args.report = args.common.path / "results" if args.report is True else args.report
    if args.report is not None and not args.report.is_dir():
        raise FlagError(f"argument --report: there is no folder {args.report}")
    determining = run_settings.determining(args.common)
    args.shared = {name: value for name, value in determining.items() if name not in (*COMPARED, "seed")}
    name_table(args)
    return args


def command_of(given: Sequence[str]) -> str:
    """The command of an experiment, but for the flags that say where and how its runs are made."""
    parser = Parser(add_help=False)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--report", nargs="?")
    for name in {"cluster", "jobs", *WITHOUT_EFFECT} - {"name"}:
        parser.add_argument(f"--{name}", **{"action": "store_true"} if DEFAULTS.get(name) is False else {})
    _, lasting = parser.parse_known_args(given)
    return shlex.join([*PROGRAM, *lasting])


def name_table(args: argparse.Namespace) -> None:
    """Name the table by what sets it apart from others of the same runs, and put that into `args.shared`, too."""
    parts = [args.name or run_settings.experiment_name(args.common)]
    if args.learning_rates:
        del args.shared["learning_rate"]
        args.shared["learning_rates"] = "+".join(map(as_typed, args.learning_rates))
        args.shared["tuning_seeds"] = " ".join(map(str, sorted(args.tuning_seeds)))
        parts.append(f"learning_rates={args.shared['learning_rates']}")
    if args.select != "best":
        args.shared["select"] = args.select
        parts.append(args.select)
    try:
        args.table_name = file_name("-".join(parts))
    except argparse.ArgumentTypeError:
        raise FlagError("argument --name: the name of the table would be too long: give a shorter one") from None


def plan_methods(args: argparse.Namespace) -> None:
    """Put the methods of all flags together. FlagError where two have the same name or the same settings."""
    names = [name for name, _ in args.methods]
    args.methods = dict(args.methods)
    if len(args.methods) < len(names):
        raise FlagError(f"argument --settings: two of {', '.join(names)} have the same name: remove or rename one")
    for bn_weight in args.bn_weights:
        values = PAPER["proposed"] | {"bn_weight": bn_weight}
        if values not in args.methods.values():
            args.methods[f"bn_weight {as_typed(bn_weight)}"] = values
    first: dict[tuple[Value, ...], str] = {}
    for name, values in args.methods.items():
        other = first.setdefault(tuple(values.values()), name)
        if other != name:
            raise FlagError(f"argument --settings: {other} and {name} have the same {', '.join(values)}: remove one")


def check_contrasts(args: argparse.Namespace) -> None:
    """Keep every contrast once. FlagError where one is not of two methods."""
    args.contrast = list(dict.fromkeys(map(tuple, args.contrast)))
    for one, other in args.contrast:
        for name in (one, other):
            if name not in args.methods:
                raise FlagError(f"argument --contrast: {name!r} is none of {', '.join(args.methods)}: see --settings")
        if one == other or other == "baseline":
            why = "every setting is compared with it anyway" if one != other else "there is nothing to compare"
            raise FlagError(f"argument --contrast: {one} and {other}: {why}")


def plan_seeds(args: argparse.Namespace) -> None:
    """Make lists of distinct seeds of both flags. FlagError where seeds to choose on are among those to compare."""
    if args.tuning_seeds and not args.learning_rates:
        raise FlagError("argument --tuning_seeds: there is nothing to choose without --learning_rates")
    if args.learning_rates and not args.tuning_seeds:
        args.tuning_seeds = [seed_range("16-20")]
    args.seeds, args.tuning_seeds = distinct(args.seeds), distinct(args.tuning_seeds)
    if both := set(args.seeds) & set(args.tuning_seeds):
        problem = "must not be among --seeds too: a rate chosen on them suits them"
        raise FlagError(f"argument --tuning_seeds: {', '.join(map(str, sorted(both)))} {problem}")


def plan_runs(args: argparse.Namespace, learning_rates: Mapping[str, float] = {}) -> list[PlannedRun]:
    """The runs to compare, seed by seed, so that what is there after an interruption is a paired sample.

    Methods are compared at these learning rates where they have been chosen.
    """
    return [plan_run(args, name, seed, learning_rates.get(name)) for seed in args.seeds for name in args.methods]


def plan_run(args: argparse.Namespace, method: str, seed: int, learning_rate: float | None = None) -> PlannedRun:
    """The run of a method with a seed, at a learning rate of its own where there is one."""
    values = args.methods[method] | {"seed": seed}
    values |= {} if learning_rate is None else {"learning_rate": learning_rate}
    settings = replace(args.common, **values)
    flags = [*args.others, *(text for name, value in values.items() for text in (f"--{name}", as_typed(value)))]
    if args.name:
        unusual = learning_rate not in (None, DEFAULTS["learning_rate"])
        parts = [f"learning_rate={as_typed(learning_rate)}"] if unusual else []
        name = "-".join((args.name, *parts, run_settings.method_name(settings), f"seed{seed}"))
        flags, settings = [*flags, "--name", name], replace(settings, name=name)
    return PlannedRun(method, flags, settings, for_tuning=seed in args.tuning_seeds)


def named_method(text: str) -> tuple[str, dict[str, Value]]:
    """The type of a flag that takes a method: its name, with the settings of `COMPARED` that make it up."""
    name, colon, rest = text.partition(":")
    if not colon:
        if name not in NAMED:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(NAMED)}, and has no :bn_weight=...")
        return name, NAMED[name]
    values = PAPER["proposed"] | {"equivalent": DEFAULTS["equivalent"]}
    for part in rest.split(","):
        key, _, value = part.partition("=")
        try:
            values[key] = type(values[key])(value)
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(f"{text!r}: {part!r} is no {', '.join(COMPARED)}=VALUE") from None
    if name in NAMED or file_name(name) == "":
        raise argparse.ArgumentTypeError(f"{text!r} needs a name of its own before the colon")
    try:
        Settings(**values)
    except SettingError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    values = run_settings.compared(values)
    if values["equivalent"] == DEFAULTS["equivalent"]:
        del values["equivalent"]  # as in the paper's methods
    return name, values


def seed_range(text: str) -> list[int]:
    """The type of a flag that takes seeds: 7, 1-15 or 1,3,5-7."""
    numbers = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise argparse.ArgumentTypeError(f"seeds are whole numbers and ranges such as 1-15, not {text!r}")
        if last > MAX_SEED:
            raise argparse.ArgumentTypeError(f"seeds above {MAX_SEED} repeat the draws of smaller ones, not {text!r}")
        numbers += range(first, last + 1)
    return numbers


def distinct(parts: Iterable[Sequence[int]]) -> list[int]:
    """The seeds that a flag takes in several parts, each of them once."""
    return list(dict.fromkeys(seed for part in parts for seed in part))


def ranges(seeds: Collection[int]) -> list[str]:
    """Seeds as `--seeds` takes them: 1-15 for the first fifteen."""
    first = [seed for seed in sorted(seeds) if seed - 1 not in seeds]
    last = [seed for seed in sorted(seeds) if seed + 1 not in seeds]
    return [f"{a}-{b}" if a < b else str(a) for a, b in zip(first, last, strict=True)]


def cluster(text: str) -> str:
    """The type of a flag that takes the address of a Dask scheduler."""
    address = re.fullmatch(r"tcp://(?:[\w.-]+|\[[\da-fA-F:.]+\]):(\d{1,5})", text, re.ASCII)
    if not (address and 0 < int(address[1]) < 2**16):
        raise argparse.ArgumentTypeError(f"must be the address of a Dask scheduler, tcp://HOST:PORT, not {text!r}")
    return text
