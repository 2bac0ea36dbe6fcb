"""Figures of an experiment, from its result files and trained weights.

    python figures.py results/*-seed*.csv --output results/figures

Each figure is a function that returns a `matplotlib.figure.Figure` without a window: a notebook shows it, `save` writes
it. All figures can be read in grey: lines differ in their strokes and markers too.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from command_line.endings import answer_at_once, one_line_endings, say
from command_line.flag_types import Parser, folder
from command_line.settings import DEFAULTS, NAMED, PAPER, compared


def make_parser() -> Parser:
    """The flags of the command."""
    parser = Parser(prog="figures.py", description="Draw the figures of an experiment.", allow_abbrev=False)
    flag = parser.add_argument
    flag("files", nargs="+", type=Path, metavar="FILE", help="result files of finished runs")
    flag("--output", type=folder, required=True, help="folder for the figures")
    flag("--networks", type=folder, help="folder of the trained weights (default: networks/ beside the files' folder)")
    return parser


if __name__ == "__main__":
    answer_at_once("figures.py", make_parser().parse_args)  # before matplotlib and torch are imported

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from batch_norm import SETTLED
from observations import learned_scales_and_shifts, normalized_values, observe_runs
from reporting.comparison import Comparison, is_contrast
from reporting.drawing import label_axes, line_style, make_axes, save
from saved_runs.by_seed import accuracy_by_seed, check_alike, read_by_seed
from saved_runs.results import Results, read_results
from t_test import LEVEL, compare, compare_all

Runs = Mapping[str, Mapping[int, Results]]  # finished runs by setting and seed

SHOWN = ("baseline", "proposed", "init")  # the settings whose trained networks are shown


def learning_curves(runs: Runs) -> Figure:
    """Test error and training loss by epoch: the median over the seeds, and their middle half. ValueError without runs.

    Both axes are logarithmic: an error of 0 is below them.
    """
    if not any(runs.values()):
        raise ValueError("there are no runs")
    axes, shown = make_axes(columns=2), ([], [])
    for index, (setting, seeds) in enumerate(runs.items()):
        if not seeds:
            continue
        num_epochs = min(run.num_epochs for run in seeds.values())
        epochs = np.arange(1, num_epochs + 1)
        errors = [100 - run.columns["test_accuracy"][:num_epochs] for run in seeds.values()]
        losses = [run.columns["train_loss"][:num_epochs] for run in seeds.values()]
        for panel, values, of_panel in zip(axes, (errors, losses), shown, strict=True):
            low, median, high = quartiles = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
            of_panel.append(quartiles.ravel())
            label = f"{setting} ({len(values)} seed{'s' * (len(values) > 1)})"
            panel.plot(epochs, median, label=label, markevery=0.1 if num_epochs > 20 else 1, **line_style(index))
            panel.fill_between(epochs, low, high, color=f"C{index}", alpha=0.15, linewidth=0)
    for panel, of_panel, name in zip(
        axes, shown, ("test error (%)", "training loss (cross-entropy, nats)"), strict=True
    ):
        label_axes(panel, "epoch", name)
        make_logarithmic(panel, np.concatenate(of_panel))
    axes[0].set_ylim(top=min(100, axes[0].get_ylim()[1]))
    axes[0].set_title(
        f"For about {SETTLED} steps, evaluation uses running statistics\nof batch norm that have not settled.",
        fontsize=9,
    )
    figure, title = axes[0].figure, "median, middle half of the seeds"
    handles, names = axes[1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8, title=title, title_fontsize=8)
    return figure


def make_logarithmic(panel: Axes, values: np.ndarray) -> None:
    """Give a panel a logarithmic y axis with plain numbers, from the smallest of the values above 0 to the largest."""
    above = values[values > 0] if (values > 0).any() else np.ones(1)
    panel.set_ylim(above.min() / 1.2, above.max() * 1.2)
    panel.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")
    panel.yaxis.set_major_formatter(plain)
    panel.yaxis.set_minor_formatter(plain)
    panel.grid(alpha=0.15, which="minor")


def forest_plot(comparisons: Sequence[Comparison]) -> Figure:
    """The mean difference of each comparison with its 95 % confidence interval, and a dot for each seed.

    The rows are in the order of the comparisons, without those that have no pairs, as the baseline has none with
    itself. A contrast shows the first setting minus the second. ValueError where no comparison has pairs.
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
        style = {"color": "black", "markersize": 7, "linestyle": "none"}
        [handles["mean"]] = panel.plot([c.difference], [row], marker="D", **style)
        panel.annotate(text, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    panel.axvline(0, color="black", linestyle="--", linewidth=1, zorder=1)
    names = [c.setting if is_contrast(c) else f"{c.setting} vs {c.reference}" for c in comparisons]
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.3, -0.4)  # the first at the top
    panel.set_xlabel("difference in test accuracy (percentage points)")
    panel.grid(alpha=0.3, axis="x")
    panel.figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return panel.figure


def paired_differences(runs: Runs, baseline: str = "baseline") -> Figure:
    """How far each seed's test accuracy exceeds the baseline's, with the mean and its 95 % confidence interval.

    A circle marks a difference of 0. ValueError where no seed has a run of the baseline and of another setting.
    """
    theirs = accuracy_by_seed(runs.get(baseline, {}))
    comparisons = [compare(name, accuracy_by_seed(of), theirs) for name, of in runs.items() if name != baseline]
    comparisons = [c for c in comparisons if c.differences]
    if not comparisons:
        raise ValueError(f"there is no seed with a run of {baseline} and of another setting")
    axes = make_axes(columns=len(comparisons), width=max(2.6, 5.5 / len(comparisons)), sharey=True, squeeze=False)[0]
    handles: dict[str, Artist] = {}
    for panel, c in zip(axes, comparisons, strict=True):
        names, values = list(map(str, c.differences)), list(c.differences.values())
        colors = ["0.4" if value > 0 else "0.85" for value in values]
        panel.bar(names, values, color=colors, edgecolor="black", linewidth=0.8, zorder=2)
        panel.axhline(0, color="black", linewidth=0.8, zorder=3)
        same = [name for name, value in zip(names, values, strict=True) if value == 0]
        if same:
            style = {"color": "white", "markeredgecolor": "black", "marker": "o", "linestyle": "none", "zorder": 4}
            [handles["no difference"]] = panel.plot(same, [0] * len(same), **style)
        handles["mean"] = panel.axhline(c.difference, color="C3", linestyle="--", linewidth=2, zorder=3)
        title = f"{c.setting}: {c.difference:+.2f}"
        if np.isfinite(c.interval).all():
            handles["95 % interval of the mean"] = panel.axhspan(*c.interval, color="C3", alpha=0.2, zorder=0)
            title += "\n({:+.2f} to {:+.2f})".format(*c.interval)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("seed")
        panel.tick_params(axis="x", labelsize=7)
    axes[0].figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    axes[0].set_ylabel(f"test accuracy − {baseline}'s (percentage points)")
    return axes[0].figure


def accuracy_by_bn_weight(runs: Runs, baseline: str = "baseline") -> Figure:
    """Test accuracy by the initial γ, for all settings that have the c and input_norm of 'proposed'.

    It shows mean and standard deviation over the seeds, and a star where the paired t-test against the baseline gives
    p ≤ 0.05. ValueError where they have fewer than three values of γ.
    """
    theirs = accuracy_by_seed(runs.get(baseline, {}))
    points = []
    for setting, seeds in runs.items():
        if not seeds:
            continue
        values = compared(next(iter(seeds.values())).settings)
        if values == compared({**PAPER["proposed"], "bn_weight": values["bn_weight"]}):
            points.append((values["bn_weight"], compare(setting, accuracy_by_seed(seeds), theirs)))
    if len({weight for weight, _ in points}) < 3:
        raise ValueError("there are fewer than three bn_weights to compare")
    weights, comparisons = zip(*sorted(points, key=lambda point: point[0]), strict=True)
    panel = make_axes()
    means, deviations = [c.mean for c in comparisons], [np.nan_to_num(c.deviation) for c in comparisons]
    panel.errorbar(weights, means, deviations, color="black", marker="o", capsize=3, label="c = 100, input_norm bn")
    for weight, mean, c in zip(weights, means, comparisons, strict=True):
        if c.p_value <= LEVEL:
            panel.annotate("*", (weight, mean), (5, 2), textcoords="offset points", fontsize=18)
    if theirs:
        panel.axhline(np.mean(list(theirs.values())), color="C3", linestyle="--", label=baseline)
    panel.set(xscale="log", xlabel="initial γ (bn_weight)", ylabel="test accuracy (%), mean ± standard deviation")
    panel.set_xticks(weights, [f"{weight:g}" for weight in weights], minor=False)
    panel.minorticks_off()
    panel.set_title(f"* p ≤ {LEVEL} against {baseline} (not corrected)", fontsize=9)
    panel.grid(alpha=0.3)
    panel.legend()
    return panel.figure


def save_figures(
    stem: Path, runs: Runs, networks: Path, comparisons: Sequence[Comparison] | None = None
) -> tuple[list[Path], list[str]]:
    """Draw and write every figure that can be made. OSError where one cannot be written. Nothing is downloaded.

    Two figures show trained networks, those of `SHOWN` with the smallest seed. Their γ and β are also written to
    STEM-scales-and-shifts.npz, from which that figure is drawn where the weights are missing.

    Args:
        stem: the folder, and how the names of the files begin.
        runs: the finished runs by setting and seed.
        networks: the folder with the trained weights, NAME-best.pt; `images` beside it has the data.
        comparisons: what `forest_plot` shows; by default every setting beside the baseline.

    Returns:
        The files of the figures; and a line for each figure of trained networks that cannot be made, with the reason.
        A figure that would compare more settings or seeds than there are is left out without one.
    """
    figures: dict[str, Figure] = {}
    for draw in (learning_curves, paired_differences, accuracy_by_bn_weight):
        with suppress(ValueError):  # there are too few settings or seeds for it
            figures[draw.__name__.replace("_", "-")] = draw(runs)
    with suppress(ValueError):
        figures["forest"] = forest_plot(compare_all(runs) if comparisons is None else comparisons)
    first_runs = {name: seeds[min(seeds)] for name in SHOWN if (seeds := runs.get(name))}
    names = {setting: str(run.settings.get("name")) for setting, run in first_runs.items()}
    archive = stem.with_name(f"{stem.name}-scales-and-shifts.npz")
    weights, measured, missing = observe_runs(first_runs, "\n".join(names.values()), networks, archive)
    if measured:
        figures["normalized-values"] = figure = normalized_values(measured)
        figure.suptitle("\n".join([*names.values(), "128 test images"]), fontsize=9)
    if weights:
        bn_weights = {setting: PAPER[setting]["bn_weight"] for setting in weights}
        figures["scales-and-shifts"] = figure = learned_scales_and_shifts(weights, bn_weights)
        figure.suptitle("\n".join(names[setting] for setting in weights), fontsize=9)
    made = [file for name, figure in figures.items() for file in save(figure, stem.with_name(f"{stem.name}-{name}"))]
    return made, missing


def read_runs(files: Iterable[Path]) -> Runs:
    """Read result files by setting and seed. The paper's settings come first, under their names.

    OSError where a file cannot be read; ValueError where one is damaged or of an unfinished run, or where the runs
    differ in more than their seed and `COMPARED`.
    """
    named = {name: compared(values) for name, values in NAMED.items()}
    groups: dict[str, list[Path]] = {name: [] for name in named}
    for file in files:
        values = compared(read_results(file).settings)
        own_name = "γ {bn_weight}, c {c}, {input_norm}".format(**values)
        own_name += f", {values['equivalent']}" * (values["equivalent"] != DEFAULTS["equivalent"])
        groups.setdefault(next((name for name in named if named[name] == values), own_name), []).append(file)
    runs = {name: read_by_seed(group, name) for name, group in groups.items() if group}
    first, *others = (next(iter(seeds.values())) for seeds in runs.values())
    for other in others:
        check_alike(first, other, "the runs")
    return runs


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: draw what can be drawn, print the files, and say on standard error what is missing and why.

    See `one_line_endings` for its exit codes.
    """
    with one_line_endings("figures.py"):
        args = make_parser().parse_args(argv)
        networks = args.networks or args.files[0].parent.parent / "networks"
        made, missing = save_figures(args.output / "figure", read_runs(args.files), networks)
        say(*made)
        for line in missing:
            print(f"figures.py: {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
