"""How every figure looks, and how it is written."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from command_line.files import write_atomically
from run_settings import NAMED

COLORS = (*(f"C{n}" for n in range(7)), "black", "C9", "C8", "navy", "C7", "magenta", "gold")
STROKES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = "osD^vP"  # one less than strokes: together they differ for 42 lines


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as STEM.png and STEM.pdf; returns both. On an OSError, an older file is still there, and whole."""
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf")]
    for file in files:
        content = io.BytesIO()
        without_date = {"CreationDate": None} if file.suffix == ".pdf" else None  # the same file from the same data
        figure.savefig(content, format=file.suffix[1:], dpi=150, metadata=without_date)
        write_atomically(file, content.getvalue())
    return files


def make_axes(rows: int = 1, columns: int = 1, width: float = 4.5, height: float = 4.0, **options: Any) -> Any:
    """The axes of a new figure; each is `width` by `height` inches."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure.subplots(rows, columns, **options)


def line_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Color, stroke and marker of lines by name: the methods of `NAMED` have theirs, others take the next."""
    kinds = {"color": COLORS, "linestyle": STROKES, "marker": MARKERS}
    places = enumerate(dict.fromkeys([*NAMED, *names]))
    return {name: {kind: choices[place % len(choices)] for kind, choices in kinds.items()} for place, name in places}


def label_axes(panel: Axes, xlabel: str, ylabel: str) -> None:
    """Label both axes of a panel whose x values are whole numbers, and give it a grid."""
    panel.set(xlabel=xlabel, ylabel=ylabel)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3)


def add_legend(figure: Figure, handles: Mapping[str, Artist] | None = None, title: str | None = None) -> None:
    """Put a legend below all panels, where it hides no data: of these artists by name, by default of all labelled."""
    if handles is None:
        pairs = (zip(*panel.get_legend_handles_labels(), strict=True) for panel in reversed(figure.axes))
        handles = {name: artist for of_panel in pairs for artist, name in of_panel}
    options = {"ncols": min(4, len(handles)), "fontsize": 8, "title": title, "title_fontsize": 8}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", **options)


def make_logarithmic(panel: Axes, values: np.ndarray, largest: float = np.inf) -> None:
    """Give a panel a logarithmic y axis for these values above 0, at most up to `largest`.

    Its ticks are plain numbers, close enough together that one can read a difference off.
    """
    above = values[values > 0] if (values > 0).any() else np.ones(1)
    low, high = above.min() / 1.1, min(above.max() * 1.1, largest)
    decades = np.log10(high / low)
    if decades < 1:
        ticks = MaxNLocator(10, steps=[1, 2, 5, 10]).tick_values(low, high)
    else:
        powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
        ticks = np.outer(powers, (1, 1.5, 2, 3, 5, 7) if decades < 2.3 else (1, 2, 5) if decades < 6 else (1,)).ravel()
    panel.set_ylim(low, high)
    panel.set_yscale("log")
    panel.set_yticks(ticks[(ticks >= low) & (ticks <= high)])
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_locator(NullLocator())
