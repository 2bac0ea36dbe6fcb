"""Figures of networks: learned γ and β, and how large normalized values get; and how the axes of every figure look."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from observations import LARGE, NormalizedValues, Weights, batch_norms, first_depth, initial_scale

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


def learned_scales_and_shifts(weights: Mapping[str, Weights], bn_weights: Mapping[str, float]) -> Figure:
    """How far γ and β went from where they started, by depth, all settings on one scale (Section 3).

    Both are divided by the γ that their batch norm started with, so that settings with different ones can be compared.
    For each setting and batch norm, a marker is at the median of the channels, a thick bar goes from the 5 % to the
    95 % quantile, and a thin one from the smallest to the largest value.

    Args:
        weights: for each setting a `state_dict`, as in `networks/NAME-best.pt`.
        bn_weights: for each setting the initial γ of the batch norms; see `observations.initial_scale`.
    """
    panels = make_axes(2, width=9, height=3.4, sharex=True)
    offsets = 0.24 * (np.arange(len(weights)) - (len(weights) - 1) / 2)
    for index, (setting, trained) in enumerate(weights.items()):
        layers = [
            (d, np.array((scale, shift)) / initial_scale(d, bn_weights[setting]))
            for d, scale, shift in batch_norms(trained)
        ]
        depths = offsets[index] + [depth for depth, _ in layers]
        quantiles = np.array([np.quantile(values, (0, 0.05, 0.5, 0.95, 1), axis=1) for _, values in layers])
        for panel, (lowest, low, median, high, highest) in zip(panels, quantiles.transpose(2, 1, 0), strict=True):
            panel.vlines(depths, lowest, highest, color=f"C{index}", linewidth=0.8)
            panel.vlines(depths, low, high, color=f"C{index}", linewidth=3, alpha=0.6)
            style = line_style(index) | {"linestyle": "none", "markeredgecolor": "black", "markersize": 4}
            panel.plot(depths, median, label=setting, **style)
    for panel, start, name in zip(panels, (1, 0), ("learned γ / initial γ", "learned β / initial γ"), strict=True):
        panel.axhline(start, color="black", linestyle="--", linewidth=0.8, zorder=0, label="start")
        label_axes(panel, "", name)
    panels[1].set_xlabel(DEPTH)
    figure = panels[0].figure
    title = "median, 5 to 95 % of the channels, all of them"
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8, title=title, title_fontsize=8)
    return figure


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
