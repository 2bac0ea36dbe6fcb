"""Figures of an experiment, from its result files and trained weights.

    python figures.py results

Each figure is a function that returns a `matplotlib.figure.Figure` without a window: a notebook shows it, `save` writes
it. All figures can be read in grey: lines differ in their strokes and markers too.
"""

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from command_line.endings import answer_at_once, one_line_endings, say, warn
from command_line.flag_types import Parser, as_typed, folder
from run_settings import DEFAULTS, NAMED, OWN_SEED, PAPER, compared, describe_network


def make_parser() -> Parser:
    """The flags of the command."""
    parser = Parser(prog="figures.py", description=__doc__.rpartition("\n\n")[0])
    flag = parser.add_argument
    flag("files", nargs="+", type=Path, metavar="FILE", help="result files of finished runs, or an experiment's folder")
    flag("--output", type=folder, help="folder for the figures (default: that of the files)")
    flag("--network", help="your own MODULE:FUNCTION, to draw its trained weights: its code is run")
    flag("--networks", type=folder, help="folder of the trained weights (default: networks/ beside the files' folder)")
    return parser


if __name__ == "__main__":
    answer_at_once("figures.py", make_parser().parse_args)  # before matplotlib and torch are imported

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from experiment.outcomes import find_experiments
from observations import NUM_MEASURED, learned_scales_and_shifts, normalized_values, observe_runs
from reporting.comparison import Comparison, is_contrast
from reporting.drawing import add_legend, label_axes, line_styles, make_axes, make_logarithmic, save
from reporting.tables import without_tables
from saved_runs.by_seed import check_alike, read_by_seed
from saved_runs.results import Results, read_results
from t_test import compare_all

Runs = Mapping[str, Mapping[int, Results]]  # finished runs by method and seed

SHOWN = ("baseline", "proposed", "init")  # the methods whose trained networks are shown


def learning_curves(runs: Runs) -> Figure:
    """Test error and training loss by epoch: the median over the seeds, and their middle half. ValueError without runs.

    Both axes are logarithmic: an error of 0 is below them.
    """
    if not any(runs.values()):
        raise ValueError("there are no runs")
    axes, shown, styles = make_axes(columns=2), ([], []), line_styles(runs)
    for method, seeds in runs.items():
        if not seeds:
            continue
        num_epochs = min(run.num_epochs for run in seeds.values())
        epochs = np.arange(1, num_epochs + 1)
        errors = [100 - run.columns["test_accuracy"][:num_epochs] for run in seeds.values()]
        losses = [run.columns["train_loss"][:num_epochs] for run in seeds.values()]
        for panel, values, of_panel in zip(axes, (errors, losses), shown, strict=True):
            low, median, high = quartiles = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
            of_panel.append(quartiles.ravel())
            label = f"{method} ({len(values)} seed{'s' * (len(values) > 1)})"
            panel.plot(epochs, median, label=label, markevery=0.1 if num_epochs > 20 else 1, **styles[method])
            panel.fill_between(epochs, low, high, color=styles[method]["color"], alpha=0.15, linewidth=0)
    label_axes(axes[0], "epoch", "test error (%), log scale")
    label_axes(axes[1], "epoch", "training loss (nats), log scale")
    make_logarithmic(axes[0], np.concatenate(shown[0]), largest=100)
    make_logarithmic(axes[1], np.concatenate(shown[1]))
    first = next(run for seeds in runs.values() for run in seeds.values())
    if first.steps_per_epoch and first.steps_per_epoch < first.settling_steps:
        note = f"An epoch has {first.steps_per_epoch} steps. For about {first.settling_steps} steps, evaluation uses\n"
        axes[0].set_title(f"{note}running statistics of batch norm that have not settled.", fontsize=8)
    several = any(len(seeds) > 1 for seeds in runs.values())
    add_legend(axes[0].figure, title="median and middle half of the seeds" if several else None)
    return axes[0].figure


def forest_plot(comparisons: Sequence[Comparison]) -> Figure:
    """The mean difference of each comparison with its 95 % confidence interval, and a dot for each seed.

    Comparisons without pairs are left out. ValueError where none has pairs.
    """
    comparisons = [c for c in comparisons if c.differences]
    if not comparisons:
        raise ValueError("there is no comparison with a pair of runs")
    panel = make_axes(width=7, height=1.2 + 0.6 * len(comparisons))
    handles: dict[str, Artist] = {}
    for row, c in enumerate(comparisons):
        values = np.round(list(c.differences.values()), 9)
        ties = np.array([np.count_nonzero(values[:place] == value) for place, value in enumerate(values)])
        heights = row + 0.2 + ties * min(0.1, 0.4 / max(ties.max(), 1))  # equal ones below each other
        style = {"color": "white", "markeredgecolor": "0.4", "markersize": 4, "linestyle": "none"}
        [handles["one seed"]] = panel.plot(values, heights, marker="o", **style)
        text = f"{c.difference:+.2f}"
        if np.isfinite(c.interval).all():
            handles["95 % interval of the mean"] = panel.hlines(row, *c.interval, color="black", linewidth=2.5)
            text += " ({:+.2f} to {:+.2f})".format(*c.interval)
        text += f"\n{len(values)} pairs" if len(values) > 1 else "\none pair"
        style = {"color": "black", "markersize": 7, "linestyle": "none"}
        [handles["mean"]] = panel.plot([c.difference], [row], marker="D", **style)
        panel.annotate(text, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    panel.axvline(0, color="black", linestyle="--", linewidth=1, zorder=1)
    names = [c.method if is_contrast(c) else f"{c.method} vs {c.reference}" for c in comparisons]
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.3, -0.4)  # the first at the top
    panel.set_xlabel("difference in test accuracy (percentage points)")
    panel.grid(alpha=0.3, axis="x")
    add_legend(panel.figure, handles)
    return panel.figure


def accuracy_by_bn_weight(runs: Runs, comparisons: Sequence[Comparison] | None = None) -> Figure:
    """Test accuracy by the initial γ, for all methods that have the c and input_norm of 'proposed'.

    It shows mean and standard deviation over the seeds, and a star where the verdict of the comparison, by default with
    the baseline alone, is "significant". ValueError where they have fewer than three values of γ.
    """
    of_method = {c.method: c for c in (compare_all(runs) if comparisons is None else comparisons)}
    panel, points = make_axes(width=5.5), []
    for method, seeds in runs.items():
        values = compared(next(iter(seeds.values())).header) if seeds else {}
        if seeds and values == compared({**PAPER["proposed"], "bn_weight": values["bn_weight"]}):
            c = of_method[method]
            points.append((values["bn_weight"], c.mean, np.nan_to_num(c.deviation)))
            if c.verdict == "significant":
                panel.annotate("*", points[-1][:2], (5, 2), textcoords="offset points", fontsize=18)
    if len({weight for weight, *_ in points}) < 3:
        raise ValueError("there are fewer than three bn_weights to compare")
    weights, means, deviations = zip(*sorted(points), strict=True)
    panel.errorbar(weights, means, deviations, color="black", marker="o", capsize=3, label="c = 100, input_norm bn")
    if runs.get("baseline"):
        color = line_styles(runs)["baseline"]["color"]
        panel.axhline(of_method["baseline"].mean, color=color, linestyle="--", label="baseline")
    panel.set(xscale="log", xlabel="initial γ, log scale", ylabel="test accuracy (%), mean ± standard deviation")
    panel.set_xticks(weights, [f"{weight:g}" for weight in weights], minor=False)
    panel.minorticks_off()
    panel.set_title("* significant gain over baseline, p-values corrected by Holm", fontsize=9)
    panel.grid(alpha=0.3)
    add_legend(panel.figure)
    return panel.figure


def describe(runs: Iterable[Results]) -> str:
    """What all these runs are of: network, data set, epochs, learning rate and whether each seed has its own split."""
    headers = [DEFAULTS | run.header for run in runs]
    first, rates = headers[0], {header["learning_rate"] for header in headers}
    epochs = f"{first['num_epochs']} epoch{'s' * (first['num_epochs'] != 1)}"
    rate = f"learning rate {as_typed(*rates)}" if len(rates) == 1 else "each setting at its own learning rate"
    split = ", a split for each seed" if first["split_seed"] == OWN_SEED else ""
    return f"{describe_network(first)}, {epochs}, {rate}{split}"


def save_figures(
    stem: Path,
    runs: Runs,
    networks: Path,
    comparisons: Sequence[Comparison] | None = None,
    own_network: str | None = None,
    output: Path | None = None,
) -> tuple[list[Path], list[str]]:
    """Draw and write every figure that can be made. OSError where one cannot be written. Nothing is downloaded.

    Two figures show trained networks, those of `SHOWN` with the smallest seed. What they show is also written to
    ...-scales-and-shifts.npz, and where the weights are missing, they are drawn from such a file of `stem`.

    Args:
        stem: the folder of the results, and how the names of the files begin.
        runs: the finished runs by method and seed.
        networks: the folder with the trained weights, NAME-best.pt; `images` beside it has the data.
        comparisons: what `forest_plot` shows; by default every method beside the baseline.
        own_network: MODULE:FUNCTION that may be imported to draw its trained weights; see `observe_runs`.
        output: the folder for the files; by default, that of `stem`.

    Returns:
        The files of the figures; and a line on figures of trained networks that cannot be made, with the reason. A
        figure that would compare more methods or seeds than there are is left out without one.
    """
    comparisons = compare_all(runs) if comparisons is None else comparisons
    title = describe(run for seeds in runs.values() for run in seeds.values())
    first_runs = {name: seeds[min(seeds)] for name in SHOWN if (seeds := runs.get(name))}
    seeds_shown = sorted({run.header["seed"] for run in first_runs.values()})
    of_seed = f"{title}, seed {' and '.join(map(str, seeds_shown))}"
    output = output or stem.parent
    archive = stem.with_name(f"{stem.name}-scales-and-shifts.npz")
    weights, measured, missing = observe_runs(first_runs, networks, archive, own_network, output)
    bn_weights = {method: PAPER[method]["bn_weight"] for method in weights}
    figures: dict[str, tuple[Callable[[], Figure], str]] = {
        "learning-curves": (lambda: learning_curves(runs), title),
        "accuracy-by-bn-weight": (lambda: accuracy_by_bn_weight(runs, comparisons), title),
        "forest": (lambda: forest_plot(comparisons), title),
    }
    if measured:
        of_images = f"{of_seed}; at most {NUM_MEASURED} test images"
        figures["normalized-values"] = lambda: normalized_values(measured), of_images
    if weights:
        figures["scales-and-shifts"] = lambda: learned_scales_and_shifts(weights, bn_weights), of_seed
    made = []
    for name, (draw, title) in figures.items():
        with suppress(ValueError):  # there are too few methods or seeds for it
            figure = draw()
            figure.suptitle(textwrap.fill(title, int(11 * figure.get_figwidth())), fontsize=10)
            made += save(figure, output / f"{stem.name}-{name}")
    return made, missing


def read_runs(files: Iterable[Path]) -> Runs:
    """Read result files by method and seed. The paper's methods come first, under their names.

    ValueError where a file is damaged or of an unfinished run, or runs differ in more than their seed and `COMPARED`.
    """
    named = {name: compared(values) for name, values in NAMED.items()}
    groups: dict[str, list[Path]] = {name: [] for name in named}
    for file in files:
        values = compared(read_results(file).header)
        own_name = f"γ {as_typed(values['bn_weight'])}, c {as_typed(values['c'])}, {values['input_norm']}"
        if values["equivalent"] != DEFAULTS["equivalent"]:
            own_name += f", {values['equivalent']}"
        groups.setdefault(next((name for name in named if named[name] == values), own_name), []).append(file)
    runs = {name: read_by_seed(group, name) for name, group in groups.items() if group}
    first, *others = (next(iter(seeds.values())) for seeds in runs.values())
    for other in others:
        check_alike(first, other, "the runs")
    return runs


def read_experiment(results: Path) -> tuple[str, Runs, list[Comparison]]:
    """How the file names of the experiment in a folder begin, its finished runs by method, and their comparisons.

    ValueError where there are several experiments, or none, or no finished runs; or a file is damaged.
    """
    found = find_experiments(results)
    if len(found) != 1:
        how = f"reproduce.py --report {results} lists the commands that draw them" if found else "give result files"
        raise ValueError(f"{results} has {len(found)} experiments: {how}")
    [experiment] = found
    plan, runs = experiment.plan, experiment.runs_by_method
    if experiment.failed or not any(runs.values()):
        raise ValueError(next(iter(experiment.failed.values()), f"{results} has no finished runs to compare"))
    return plan.table_name, runs, compare_all(runs, len(plan.seeds), plan.contrast)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: draw what can be drawn, print the files, and say on standard error what is missing and why."""
    with one_line_endings("figures.py"):
        args = make_parser().parse_args(argv)
        results, name, comparisons, tables = args.files[0], "figure", None, []
        if results.is_dir() and len(args.files) == 1:
            name, runs, comparisons = read_experiment(results)
        else:
            results, (files, tables) = results.parent, without_tables(args.files)
            runs = read_runs(files)
        networks = args.networks or results.absolute().parent / "networks"
        made, missing = save_figures(results / name, runs, networks, comparisons, args.network, args.output)
        say(*made)
        for line in (*tables, *missing):
            warn(line, "figures.py")


if __name__ == "__main__":
    main()
