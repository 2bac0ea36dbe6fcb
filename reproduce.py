"""The paper's experiment: settings × seeds, one run of train.py each, and a one-sided paired t-test over the seeds.

    python reproduce.py --dataset digits --num_epochs 5 --batch_size 64 --learning_rate 0.05 --seeds 1-15 --jobs 2

All flags of train.py go to every run. The same command resumes an experiment: finished runs are not made again.
"""

import shlex
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace

from command_line.endings import HOW_TO_RESUME, answer_at_once, end, one_line_endings, say, shows_bar, warn
from command_line.signals import ARRIVED, catch_signals
from experiment.plan import PlannedRun, command_of, parse, ranges

if __name__ == "__main__":
    answer_at_once("reproduce.py", parse)  # before torch and scipy are imported, which takes seconds

from experiment.cluster import ClusterError
from experiment.display import Display
from experiment.making import make_runs
from experiment.outcomes import Experiment, find_experiments, remove
from reporting import tables
from reporting.comparison import Comparison, is_contrast
from run_settings import DATASETS
from saved_runs.by_seed import note_unsettled, notes_on
from saved_runs.results import Results
from t_test import compare_all


def check_here(experiment: Experiment, runs: Sequence[PlannedRun]) -> None:
    """Raises as `train.train` does where this machine cannot begin to train with a method: images are loaded, too.

    Also ValueError where finished runs are of other images, or of a network with other code, than those that follow.
    """
    from training.preparation import construct, load_images, prepare  # not needed where other machines make the runs
    from training.run import change_since, own_notes
    from training.trial import check_network

    device, methods = experiment.plan.device, {run.method: run for run in runs}.values()
    methods = [prepare(replace(run.settings, device=device)) for run in methods]
    most = max(methods, key=lambda settings: settings.input_norm == "dataset")  # which needs their statistics, too
    images = load_images(replace(most, device="cpu"), say, shows_bar())
    for settings in methods:
        check_network(settings, construct(settings, len(images.classes), images.size), images)
    notes = own_notes(most, images)
    for results in experiment.finished.values():
        if change := change_since(results, notes):
            raise ValueError(f"{change}: give --restart to make all runs anew, or another --name")


def compare(experiment: Experiment) -> list[Comparison]:
    """Compare the finished runs, with the baseline and as `--contrast` asks for."""
    return compare_all(experiment.runs_by_method, len(experiment.plan.seeds), experiment.plan.contrast)


def make(experiment: Experiment, planned: Sequence[PlannedRun]) -> None:
    """Find what has come of runs, and make the others unless only a report is asked for or a signal has arrived."""
    plan = experiment.plan
    if not experiment.restarts:
        experiment.read(planned)
    if plan.report is not None or not planned:
        return
    left, num_done = experiment.left(planned), experiment.num_done(planned)
    is_own = plan.common.dataset not in DATASETS or ":" in plan.common.network  # which may have changed
    if (left or is_own) and not (ARRIVED or plan.cluster):
        check_here(experiment, planned)
    epochs = f"{plan.common.num_epochs} epoch{'s' * (plan.common.num_epochs > 1)}"
    how = f"on {plan.cluster}" if plan.cluster else f"{plan.jobs} at a time"
    kind = "tuning runs" if planned[0].for_tuning else "runs"
    say(f"{len(planned)} {kind} of {epochs}, {how}; {num_done} are finished in {experiment.folder}")
    if ARRIVED or not left:
        return
    if experiment.restarts:
        remove(left.values())

    def rows() -> list[str]:
        comparisons = [] if planned[0].for_tuning else [c for c in compare(experiment) if not is_contrast(c)]
        return tables.table(comparisons, tables.NARROW_TABLE_COLUMNS).splitlines() if comparisons else []

    display = Display(left, num_done, rows())
    runs = [run.settings for run in left.values()]
    made = make_runs(runs, plan.jobs, plan.cluster, plan.device, say, display.show)
    with catch_signals(raising=False), closing(display), closing(made):
        try:
            for settings, outcome in made:
                if isinstance(outcome, int):
                    ARRIVED.append(outcome)  # at the run itself
                    continue
                text = experiment.note(left[settings.run_name], outcome)
                display.end(settings.run_name, text, rows(), failed=not isinstance(outcome, Results))
                reasons = {reason.replace(name, "NAME") for name, reason in experiment.failed.items()}
                if len(experiment.failed) > 1 == len(reasons) and not experiment.finished:
                    raise ChildProcessError(f"the first {len(experiment.failed)} runs failed alike: {reasons.pop()}")
        except ClusterError as error:
            if not ARRIVED:  # or else nothing more was expected of the cluster
                experiment.failed["the experiment"] = str(error)


def list_runs(experiment: Experiment) -> None:
    """Print the commands of all runs that are known: of those to compare, once their learning rates are."""
    plan = experiment.plan
    experiment.read(plan.tuning_runs)
    lines = experiment.choose_learning_rates()
    device = ["--device", plan.device] if plan.device else []
    say(*(shlex.join(["python", "train.py", *run.flags, *device]) for run in (*plan.tuning_runs, *experiment.runs)))
    if not experiment.runs:
        warn(lines[-1], "reproduce.py")


def list_experiments(experiments: Iterable[Experiment]) -> None:
    """Print what experiments there are in a folder, each with the command that reports it."""
    for experiment in experiments:
        plan = experiment.plan
        planned, kind = (experiment.runs, "runs") if experiment.runs else (plan.tuning_runs, "tuning runs")
        done = f"{experiment.num_done(planned)} of {len(planned)} {kind} are finished"
        if experiment.failed:
            done += f", {len(experiment.failed)} cannot be read"
        what = f"{', '.join(plan.methods)}; seeds {' '.join(ranges(plan.seeds))}"
        say(f"{plan.table_name}: {what}; {done}", experiment.report_command, "")


def report(experiment: Experiment, tuning: Sequence[str], own_network: str | None) -> None:
    """Print what has come of an experiment and of the choice of its learning rates; write its table and figures.

    Without --restart, an earlier table is not replaced by one that lacks some of its runs. Trained weights are drawn of
    torchvision's networks and of `own_network`, whose module is imported.
    """
    plan, runs, comparisons = experiment.plan, experiment.runs_by_method, compare(experiment)
    stem, to_compare = experiment.folder / plan.table_name, [run for seeds in runs.values() for run in seeds.values()]
    notes = [*note_unsettled(experiment.finished.values()), *tuning, *notes_on(to_compare)]
    text = "\n\n".join([*(tables.tables(comparisons) if to_compare else []), *notes])
    if text:
        say(text)
    for name, reason in experiment.failed.items():
        warn(f"{name} failed: {reason}", "reproduce.py")
    if not to_compare:
        return
    now = {tables.values_of(plan.methods[name]): len(seeds) for name, seeds in runs.items()}
    earlier = tables.read_table_seeds(stem, plan.shared).items()  # which another command may have written by now
    fewer = [f"{number} of {name}" for values, (name, number) in earlier if number > now.get(values, 0)]
    if fewer and not experiment.restarts:
        say(f"{stem}.csv keeps its table, which has more runs ({', '.join(fewer)}): ask for these too, or remove it")
        return
    rows = [row | experiment.tuning_of(row["setting"]) for row in tables.table_rows(comparisons, plan.methods)]
    written = [*tables.write_table(stem, plan.shared, rows, text), experiment.write_command()]
    if not ARRIVED:
        from figures import save_figures  # matplotlib is not needed where runs are made

        networks = experiment.folder.absolute().parent / "networks"
        made, missing = save_figures(stem, runs, networks, comparisons, own_network)
        say(*missing)
        written += made
    say("", *(f"written: {file}" for file in written))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `one_line_endings` for its exit codes, of which 1 also means that a run failed."""
    given = sys.argv[1:] if argv is None else argv
    with one_line_endings("reproduce.py"):
        plan = parse(given)
        experiment, own_network = Experiment(plan, command_of(given)), plan.common.network
        if plan.report is not None and sum(word.startswith("-") for word in given) == 1:
            found = find_experiments(plan.report)
            if not found:
                raise ValueError(f"{plan.report} has no command of an experiment: give its flags")
            if len(found) > 1:
                list_experiments(found)
                return
            [experiment], own_network = found, None  # who looks into a folder imports nothing that it names
            plan = experiment.plan
            say(experiment.report_command)
        if plan.list:
            list_runs(experiment)
            return
        tables.read_table_seeds(experiment.folder / plan.table_name, plan.shared)  # refuses one of other settings
        make(experiment, plan.tuning_runs)
        tuning = experiment.choose_learning_rates()
        make(experiment, experiment.runs)
        if not (experiment.finished or experiment.diverged or experiment.failed or ARRIVED):
            kind = "tuning " if tuning else ""
            hint = "give --report and the folder alone to see what it has"
            raise ValueError(f"{experiment.folder} has no finished {kind}run of this experiment: {hint}")
        report(experiment, tuning, own_network)
        if ARRIVED:
            end(128 + ARRIVED[0], HOW_TO_RESUME, "reproduce.py")
    if experiment.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
