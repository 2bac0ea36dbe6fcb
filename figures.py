"""Figures of an experiment, from its result files and trained weights alone.

    python figures.py results/*-seed*.csv --output results/figures

Every function returns a `matplotlib.figure.Figure` that belongs to no window: a notebook shows it, `save` writes it.
All figures can be read in grey: lines differ in their strokes and markers too.
"""

import argparse
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data import ImageSet, load_image_set, make_batches
from networks import SIGMA_ACT, construct_network
from results import Results, read_results, write_atomically
from t_test import COMPARED, EXPERIMENT, LEVEL, accuracies, by_seed, check_alike, compare

Runs = Mapping[str, Mapping[int, Results]]  # by setting and seed

STROKES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = "osD^vP"  # one less than strokes: together they differ for 42 lines
DEPTH = "batch norm, from input to output (0: in front of the network)"
LARGE = 3.0  # a normalized value beyond it is called large


def make_axes(rows: int = 1, columns: int = 1, width: float = 5.5, height: float = 4.0, **options: Any) -> Any:
    """Axes of a new figure that belongs to no window."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure.subplots(rows, columns, **options)


def style(index: int) -> dict[str, Any]:
    """How the line of a setting is drawn."""
    return {"color": f"C{index}", "linestyle": STROKES[index % len(STROKES)], "marker": MARKERS[index % len(MARKERS)]}


def learning_curves(runs: Runs) -> Figure:
    """Test accuracy and training loss by epoch: the mean over the seeds, and one standard deviation around it."""
    axes = make_axes(columns=2)
    for index, (setting, seeds) in enumerate(runs.items()):
        if not seeds:
            continue
        num_epochs = min(len(run.columns["epoch"]) for run in seeds.values())
        epochs = np.arange(1, num_epochs + 1)
        for panel, column in zip(axes, ("test_accuracy", "train_loss"), strict=True):
            values = np.array([run.columns[column][:num_epochs] for run in seeds.values()])
            mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else 0
            label = f"{setting} ({len(values)} seed{'s' * (len(values) > 1)})"
            panel.plot(epochs, mean, label=label, markevery=0.1 if num_epochs > 20 else 1, **style(index))
            panel.fill_between(epochs, mean - deviation, mean + deviation, color=f"C{index}", alpha=0.15, linewidth=0)
    for panel, name in zip(axes, ("test accuracy (%)", "training loss (cross-entropy, nats)"), strict=True):
        panel.set(xlabel="epoch", ylabel=name)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    axes[0].legend(title="mean ± standard deviation", fontsize=8, title_fontsize=8)
    return axes[0].figure


def paired_differences(runs: Runs, baseline: str = "baseline") -> Figure:
    """What each seed gains in test accuracy over the baseline, with the mean and its 95 % confidence interval.

    Raises:
        ValueError: no seed has both the baseline and another setting.
    """
    theirs = accuracies(runs.get(baseline, {}))
    comparisons = [compare(name, accuracies(of), theirs) for name, of in runs.items() if name != baseline]
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
        mean = panel.axhline(c.difference, color="C3", linestyle="--", linewidth=2, zorder=3)
        handles["mean"] = mean
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
    """Test accuracy against where γ starts, for all settings with the c and input_norm of 'proposed'.

    Mean and standard deviation over the seeds; a star where the paired t-test against the baseline has p ≤ 0.05.

    Raises:
        ValueError: there are fewer than two such settings.
    """
    theirs = accuracies(runs.get(baseline, {}))
    points = []
    for setting, seeds in runs.items():
        bn_weight, *others = values_of(next(iter(seeds.values()))) if seeds else (None,)
        if tuple(others) == EXPERIMENT["proposed"][1:]:
            points.append((bn_weight, compare(setting, accuracies(seeds), theirs)))
    if len(points) < 2:
        raise ValueError("there are fewer than two bn_weights to compare")
    points.sort(key=lambda point: point[0])
    weights, comparisons = map(list, zip(*points, strict=True))
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


Weights = Mapping[str, Any]  # a state_dict, or arrays with the names of one


def batch_norms(weights: Weights) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Depth, γ (C,) and β (C,) of every batch norm in a `state_dict`, in its order; see `first_depth`."""
    layers = [name.removesuffix(".running_mean") for name in weights if name.endswith(".running_mean")]
    for depth, layer in enumerate(layers, start=first_depth(layers)):
        yield depth, np.asarray(weights[f"{layer}.weight"]), np.asarray(weights[f"{layer}.bias"])


def first_depth(layers: Sequence[str]) -> int:
    """What to number the first of a network's batch norms: 0 in front of the network, 1 within it."""
    return 0 if layers[0] == "0" else 1


def learned_scales_and_shifts(weights: Mapping[str, Weights], bn_weights: Mapping[str, float]) -> Figure:
    """Histograms of the learned γ and β of each batch norm, by depth, against where they started (Section 3).

    γ is shown relative to its start, so that settings with different starts can be compared.

    Args:
        weights: for each setting the trained weights, as `networks/NAME-best.pt` has them.
        bn_weights: for each setting, where γ started; the batch norm in front of a network, at 0.58 of it.
    """
    rows: tuple[list, list] = ([], [])  # for γ and β, for each setting the values by depth
    for setting, trained in weights.items():
        layers = {depth: layer for depth, *layer in batch_norms(trained)}
        starts = {depth: bn_weights[setting] * (1 if depth else SIGMA_ACT) for depth in layers}
        rows[0].append({depth: scale / starts[depth] for depth, (scale, _) in layers.items()})
        rows[1].append({depth: shift for depth, (_, shift) in layers.items()})
    axes = make_axes(2, len(weights), squeeze=False, sharey="row", height=3.4)
    for panels, settings, start, name in zip(axes, rows, (1, 0), ("learned γ / its start", "learned β"), strict=True):
        draw_histograms(panels, settings, start)
        for panel in panels:
            panel.axhline(start, color="C3", linestyle="--", linewidth=1, label="start")
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.set_xlabel(DEPTH)
        panels[0].set_ylabel(name)
    for panel, setting in zip(axes[0], weights, strict=True):
        panel.set_title(setting)
    axes[0][0].legend(loc="upper right", fontsize=8)
    return axes[0][0].figure


def draw_histograms(panels: Sequence[Axes], settings: Sequence[Mapping[int, np.ndarray]], start: float) -> None:
    """For each setting a panel, in it for each depth a histogram: the darker, the larger the share of its values."""
    deviations = np.concatenate([values - start for layers in settings for values in layers.values()])
    radius = 1.001 * np.abs(deviations).max()
    edges = start + radius * np.linspace(-1, 1, 122)  # an odd number of bins: one has the start in its middle
    for panel, layers in zip(panels, settings, strict=True):
        shares = np.array([np.histogram(values, edges)[0] / len(values) for values in layers.values()]).T
        depth_edges = np.arange(len(layers) + 1) + min(layers) - 0.5
        mesh = panel.pcolormesh(depth_edges, edges, shares, cmap="Greys", norm=PowerNorm(0.5, vmin=0, vmax=1))
        panel.set_ylim(start + deviations.min() - radius / 20, start + deviations.max() + radius / 20)
    bar = panels[0].figure.colorbar(mesh, ax=list(panels), pad=0.01, format=PercentFormatter(1))
    bar.set_label("share of the channels of a layer")


class NormalizedValues(NamedTuple):
    """How large the outputs of one batch norm's normalization are, before γ and β."""

    name: str
    share_beyond_3: float
    maximum: float


@torch.inference_mode()
def measure_normalized_values(network: nn.Module, images: Tensor) -> list[NormalizedValues]:
    """How large normalized values get in each batch norm of a network, in the order in which they compute.

    Args:
        network: any module; it computes in evaluation mode, so with the running statistics.
        images: one batch of what it takes.
    """
    measured, hooks = [], []

    def measure(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        normalized = F.batch_norm(inputs[0].float(), layer.running_mean, layer.running_var, eps=layer.eps).abs()
        share = (normalized > LARGE).float().mean().item()
        measured.append(NormalizedValues(name, share, normalized.max().item()))

    for name, layer in network.named_modules():
        if isinstance(layer, _BatchNorm):
            hooks.append(layer.register_forward_pre_hook(partial(measure, name)))
    training = network.training
    network.eval()
    try:
        network(images)
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return measured


def normalized_values(measured: Mapping[str, Sequence[NormalizedValues]]) -> Figure:
    """How large normalized values get by depth, for each setting: the share beyond 3, and the largest (Section 3)."""
    axes = make_axes(columns=2)
    for index, (setting, layers) in enumerate(measured.items()):
        depth = np.arange(len(layers)) + first_depth([layer.name for layer in layers])
        axes[0].plot(depth, [100 * layer.share_beyond_3 for layer in layers], label=setting, **style(index))
        axes[1].plot(depth, [layer.maximum for layer in layers], label=setting, **style(index))
    normal = 100 * 2 * scipy.stats.norm.sf(LARGE)
    axes[0].axhline(normal, color="0.5", linewidth=1, label=f"a normal variable: {normal:.2f} %")
    axes[0].set_ylabel(f"normalized values beyond ±{LARGE:g} (%)")
    axes[1].set_ylabel("largest absolute normalized value")
    axes[1].set_ylim(bottom=0)
    for panel in axes:
        panel.set_xlabel(DEPTH)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    axes[0].legend()
    return axes[0].figure


def values_of(run: Results) -> tuple[float, float, str]:
    """What the paper compares, of one run: bn_weight, c, input_norm."""
    return tuple(run.settings.get(name) for name in COMPARED)


def measure_run(run: Results, weights: Weights, image_set: ImageSet, num_images: int = 128) -> list[NormalizedValues]:
    """`measure_normalized_values` of a trained run on the first test images of its data set."""
    batches = make_batches(image_set, "test", num_images, normalize=run.settings["input_norm"] == "dataset")
    network, dataset = run.settings["network"], run.settings["dataset"]
    network = construct_network(network, len(image_set.classes), dataset, input_norm=run.settings["input_norm"])
    network.load_state_dict(weights)
    return measure_normalized_values(network, next(iter(batches))[0])


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as STEM.png and STEM.pdf; returns both."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf")]
    for file in files:
        without_date = {"CreationDate": None} if file.suffix == ".pdf" else None  # the same file from the same data
        figure.savefig(file, dpi=150, metadata=without_date)
    return files


def save_figures(stem: Path, runs: Runs, networks: Path) -> list[Path]:
    """Make every figure for which there is what it needs.

    The γ and β that a figure shows are written to STEM-scales-and-shifts.npz, from which it can be made where the
    weights are not: they are some hundred kB instead of some hundred MB.

    Args:
        stem: how the names of the files begin.
        runs: the results by setting and seed.
        networks: the folder with the trained weights, NAME-best.pt; `images` beside it has the data.

    Returns:
        The files of the figures.
    """
    made = []
    if any(runs.values()):
        made += save(learning_curves(runs), stem.with_name(f"{stem.name}-learning-curves"))
    for make in (paired_differences, accuracy_by_bn_weight):
        try:
            figure = make(runs)
        except ValueError:  # there are too few settings or seeds for it
            continue
        made += save(figure, stem.with_name(f"{stem.name}-{make.__name__.replace('_', '-')}"))

    firsts = {name: seeds[min(seeds)] for name in ("baseline", "proposed") if (seeds := runs.get(name))}
    weights: dict[str, Weights] = {}
    files = {name: networks / f"{run.settings['name']}-best.pt" for name, run in firsts.items()}
    archive = stem.with_name(f"{stem.name}-scales-and-shifts.npz")
    title = ", ".join(run.settings["name"] for run in firsts.values())
    if files and all(file.exists() for file in files.values()):
        weights = {name: torch.load(file, map_location="cpu", weights_only=True) for name, file in files.items()}
        arrays = {f"{name}/{key}": value for name, of in weights.items() for key, value in batch_norm_arrays(of)}
        content = io.BytesIO()
        np.savez_compressed(content, title=title, **arrays)
        write_atomically(archive, content.getvalue())
        [dataset] = {run.settings["dataset"] for run in firsts.values()}
        image_set = load_image_set(dataset, networks.parent / "images")
        measured = {name: measure_run(firsts[name], of, image_set) for name, of in weights.items()}
        figure = normalized_values(measured)
        figure.suptitle(f"{title}; 128 test images", fontsize=9)
        made += save(figure, stem.with_name(f"{stem.name}-normalized-values"))
    elif archive.exists():
        with np.load(archive) as arrays:
            if arrays["title"] == title:  # it is of these runs
                for key in (key for key in arrays.files if key != "title"):
                    setting, _, name = key.partition("/")
                    weights.setdefault(setting, {})[name] = arrays[key]
    if weights:
        figure = learned_scales_and_shifts(weights, {name: EXPERIMENT[name][0] for name in weights})
        figure.suptitle(title, fontsize=9)
        made += save(figure, stem.with_name(f"{stem.name}-scales-and-shifts"))
    return made


def batch_norm_arrays(weights: Weights) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of all that belongs to batch norms in a `state_dict`, the counts of batches left out."""
    layers = {name.rpartition(".")[0] for name in weights if name.endswith(".running_mean")}
    for name, value in weights.items():
        layer, _, kind = name.rpartition(".")
        if layer in layers and kind != "num_batches_tracked":
            yield name, np.asarray(value)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Exit code 1 where a file cannot be read or written."""
    parser = argparse.ArgumentParser(description="Figures of an experiment, from its result files.")
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="result files of runs")
    add("--output", type=Path, required=True, help="folder for the figures")
    add("--networks", type=Path, help="folder of the trained weights (default: networks/ beside the files' folder)")
    args = parser.parse_args(argv)
    names = {values: name for name, values in EXPERIMENT.items()}
    groups: dict[str, list[Path]] = {name: [] for name in EXPERIMENT}
    try:
        for file in args.files:
            bn_weight, c, input_norm = values_of(read_results(file))
            name = names.get((bn_weight, c, input_norm), f"γ {bn_weight}, c {c}, {input_norm}")
            groups.setdefault(name, []).append(file)
        runs = {name: by_seed(files, name) for name, files in groups.items() if files}
        first, *others = (next(iter(seeds.values())) for seeds in runs.values())
        for other in others:
            check_alike(first, other, "the runs")
        made = save_figures(args.output / "figure", runs, args.networks or args.files[0].parent.parent / "networks")
    except (OSError, ValueError) as error:
        print(f"figures.py: error: {error}", file=sys.stderr)
        sys.exit(1)
    for file in made:
        print(file)


if __name__ == "__main__":
    main()
