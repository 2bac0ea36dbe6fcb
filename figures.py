"""Figures of an experiment, from its result files and trained weights.

    python figures.py results/*-seed*.csv --output results/figures

Each figure is a function that returns a `matplotlib.figure.Figure` without a window: a notebook shows it, `save` writes
it. All figures can be read in grey: lines differ in their strokes and markers too.
"""

import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from command_line import Parser, answer_at_once, folder, one_line_endings, say
from settings import COMPARED, DEFAULTS, PAPER


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
import scipy.stats
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from observations import LARGE, NormalizedValues, Weights, batch_norms, first_depth, initial_scale, observe_runs
from results import Results, read_results, write_atomically
from t_test import LEVEL, accuracy_by_seed, check_alike, compare, read_by_seed

Runs = Mapping[str, Mapping[int, Results]]  # finished runs by setting and seed

STROKES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = "osD^vP"  # one less than strokes: together they differ for 42 lines
DEPTH = "batch norm, from input to output (0: in front of the network)"


def make_axes(rows: int = 1, columns: int = 1, width: float = 5.5, height: float = 4.0, **options: Any) -> Any:
    """The axes of a new figure; each is `width` by `height` inches."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure.subplots(rows, columns, **options)


def line_style(index: int) -> dict[str, Any]:
    """Color, stroke and marker of the line of the setting with this index."""
    return {"color": f"C{index}", "linestyle": STROKES[index % len(STROKES)], "marker": MARKERS[index % len(MARKERS)]}


def label_axes(panel: Axes, xlabel: str, ylabel: str) -> None:
    """Label both axes of a panel whose x values are whole numbers, and give it a grid."""
    panel.set(xlabel=xlabel, ylabel=ylabel)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3)


def learning_curves(runs: Runs) -> Figure:
    """Test accuracy and training loss by epoch: mean ± standard deviation over the seeds. ValueError without runs."""
    if not any(runs.values()):
        raise ValueError("there are no runs")
    axes = make_axes(columns=2)
    for index, (setting, seeds) in enumerate(runs.items()):
        if not seeds:
            continue
        num_epochs = min(run.num_epochs for run in seeds.values())
        epochs = np.arange(1, num_epochs + 1)
        for panel, column in zip(axes, ("test_accuracy", "train_loss"), strict=True):
            values = np.array([run.columns[column][:num_epochs] for run in seeds.values()])
            mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else 0
            label = f"{setting} ({len(values)} seed{'s' * (len(values) > 1)})"
            panel.plot(epochs, mean, label=label, markevery=0.1 if num_epochs > 20 else 1, **line_style(index))
            panel.fill_between(epochs, mean - deviation, mean + deviation, color=f"C{index}", alpha=0.15, linewidth=0)
    label_axes(axes[0], "epoch", "test accuracy (%)")
    label_axes(axes[1], "epoch", "training loss (cross-entropy, nats)")
    axes[0].legend(title="mean ± standard deviation", fontsize=8, title_fontsize=8)
    return axes[0].figure


def paired_differences(runs: Runs, baseline: str = "baseline") -> Figure:
    """How far each seed's test accuracy exceeds the baseline's, with the mean and its 95 % confidence interval.

    ValueError where no seed has a run of the baseline and of another setting.
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
        handles["mean"] = panel.axhline(c.difference, color="C3", linestyle="--", linewidth=2, zorder=3)
        title = f"{c.setting}: {c.difference:+.2f}"
        if np.isfinite(c.interval).all():
            handles["95 % interval of the mean"] = panel.axhspan(*c.interval, color="C3", alpha=0.2, zorder=0)
            title += "\n({:+.2f} to {:+.2f})".format(*c.interval)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("seed")
        panel.tick_params(axis="x", labelsize=7)
    axes[0].figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
    axes[0].set_ylabel(f"test accuracy − {baseline}'s (percentage points)")
    return axes[0].figure


def accuracy_by_bn_weight(runs: Runs, baseline: str = "baseline") -> Figure:
    """Test accuracy by the initial γ, for all settings that have the c and input_norm of 'proposed'.

    It shows mean and standard deviation over the seeds, and a star where the paired t-test against the baseline gives
    p ≤ 0.05. ValueError where there are fewer than two such settings.
    """
    theirs = accuracy_by_seed(runs.get(baseline, {}))
    points = []
    for setting, seeds in runs.items():
        settings = DEFAULTS | next(iter(seeds.values())).settings if seeds else {}
        if all(settings.get(name) == PAPER["proposed"][name] for name in ("c", "input_norm")):
            points.append((settings["bn_weight"], compare(setting, accuracy_by_seed(seeds), theirs)))
    if len(points) < 2:
        raise ValueError("there are fewer than two bn_weights to compare")
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


def learned_scales_and_shifts(weights: Mapping[str, Weights], bn_weights: Mapping[str, float]) -> Figure:
    """Histograms of the learned γ and β of each batch norm, by depth, and where they started (Section 3).

    γ is divided by its initial value, so that settings with different ones can be compared.

    Args:
        weights: for each setting a `state_dict`, as in `networks/NAME-best.pt`.
        bn_weights: for each setting the initial γ of the batch norms; see `observations.initial_scale`.
    """
    scales, shifts = [], []  # for each setting the values by depth
    for setting, trained in weights.items():
        layers = list(batch_norms(trained))
        scales.append({depth: scale / initial_scale(depth, bn_weights[setting]) for depth, scale, _ in layers})
        shifts.append({depth: shift for depth, _, shift in layers})
    axes = make_axes(2, len(weights), squeeze=False, sharey="row", height=3.4)
    rows = ((scales, 1, "learned γ / its start"), (shifts, 0, "learned β"))
    for panels, (values, start, name) in zip(axes, rows, strict=True):
        draw_histograms(panels, values, start)
        for panel in panels:
            panel.axhline(start, color="C3", linestyle="--", linewidth=1, label="start")
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.set_xlabel(DEPTH)
        panels[0].set_ylabel(name)
    for panel, setting in zip(axes[0], weights, strict=True):
        panel.set_title(setting)
    axes[0][0].legend(loc="upper right", fontsize=8)
    return axes[0][0].figure


def draw_histograms(panels: Sequence[Axes], values: Sequence[Mapping[int, np.ndarray]], start: float) -> None:
    """Fill each panel with one setting's histograms, a column for each depth: the darker, the more of its values."""
    deviations = np.concatenate([layer - start for layers in values for layer in layers.values()])
    radius = 1.001 * np.abs(deviations).max()
    edges = start + radius * np.linspace(-1, 1, 122)  # an odd number of bins: one has the start in its middle
    for panel, layers in zip(panels, values, strict=True):
        shares = np.array([np.histogram(layer, edges)[0] / len(layer) for layer in layers.values()]).T
        depth_edges = np.arange(len(layers) + 1) + min(layers) - 0.5
        mesh = panel.pcolormesh(depth_edges, edges, shares, cmap="Greys", norm=PowerNorm(0.5, vmin=0, vmax=1))
        panel.set_ylim(start + deviations.min() - radius / 20, start + deviations.max() + radius / 20)
    bar = panels[0].figure.colorbar(mesh, ax=list(panels), pad=0.01, format=PercentFormatter(1))
    bar.set_label("share of the channels of a layer")


def normalized_values(measured: Mapping[str, Sequence[NormalizedValues]]) -> Figure:
    """How large normalized values get, by depth: the share beyond ±3, and the largest absolute one (Section 3)."""
    axes = make_axes(columns=2)
    for index, (setting, layers) in enumerate(measured.items()):
        depth = np.arange(len(layers)) + first_depth([layer.name for layer in layers])
        axes[0].plot(depth, [100 * layer.share_beyond_3 for layer in layers], label=setting, **line_style(index))
        axes[1].plot(depth, [layer.maximum for layer in layers], label=setting, **line_style(index))
    normal = 100 * 2 * scipy.stats.norm.sf(LARGE)
    axes[0].axhline(normal, color="0.5", linewidth=1, label=f"a normal variable: {normal:.2f} %")
    label_axes(axes[0], DEPTH, f"normalized values beyond ±{LARGE:g} (%)")
    label_axes(axes[1], DEPTH, "largest absolute normalized value")
    axes[1].set_ylim(bottom=0)
    axes[0].legend()
    return axes[0].figure


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as STEM.png and STEM.pdf; returns both. On an OSError, an older file is still there, and whole."""
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf")]
    for file in files:
        content = io.BytesIO()
        without_date = {"CreationDate": None} if file.suffix == ".pdf" else None  # the same file from the same data
        figure.savefig(content, format=file.suffix[1:], dpi=150, metadata=without_date)
        write_atomically(file, content.getvalue())
    return files


def save_figures(stem: Path, runs: Runs, networks: Path) -> tuple[list[Path], list[str]]:
    """Draw and write every figure that can be made. OSError where one cannot be written. Nothing is downloaded.

    Two figures show the trained networks of 'baseline' and 'proposed' with the smallest seed. Their γ and β are also
    written to STEM-scales-and-shifts.npz, from which that figure is drawn where the weights are missing.

    Args:
        stem: the folder, and how the names of the files begin.
        runs: the finished runs by setting and seed.
        networks: the folder with the trained weights, NAME-best.pt; `images` beside it has the data.

    Returns:
        The files of the figures; and a line for each figure of trained networks that cannot be made, with the reason.
        A figure that would compare more settings or seeds than there are is left out without one.
    """
    figures: dict[str, Figure] = {}
    for draw in (learning_curves, paired_differences, accuracy_by_bn_weight):
        with suppress(ValueError):  # there are too few settings or seeds for it
            figures[draw.__name__.replace("_", "-")] = draw(runs)
    first_runs = {name: seeds[min(seeds)] for name in ("baseline", "proposed") if (seeds := runs.get(name))}
    title = "\n".join(str(run.settings.get("name")) for run in first_runs.values())
    archive = stem.with_name(f"{stem.name}-scales-and-shifts.npz")
    weights, measured, missing = observe_runs(first_runs, title, networks, archive)
    if measured:
        figures["normalized-values"] = figure = normalized_values(measured)
        figure.suptitle(f"{title}\n128 test images", fontsize=9)
    if weights:
        bn_weights = {name: PAPER[name]["bn_weight"] for name in weights}
        figures["scales-and-shifts"] = figure = learned_scales_and_shifts(weights, bn_weights)
        figure.suptitle(title, fontsize=9)
    made = [file for name, figure in figures.items() for file in save(figure, stem.with_name(f"{stem.name}-{name}"))]
    return made, missing


def read_runs(files: Iterable[Path]) -> Runs:
    """Read result files by setting and seed. The paper's settings come first, under their names.

    OSError where a file cannot be read; ValueError where one is damaged or of an unfinished run, or where the runs
    differ in more than their seed and `COMPARED`.
    """
    groups: dict[str, list[Path]] = {name: [] for name in PAPER}
    for file in files:
        settings = DEFAULTS | read_results(file).settings
        values = {name: settings[name] for name in COMPARED}
        own_name = "γ {bn_weight}, c {c}, {input_norm}".format(**values)
        groups.setdefault(next((name for name in PAPER if PAPER[name] == values), own_name), []).append(file)
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
