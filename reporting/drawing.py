"""How every figure looks, and how it is written."""

import io
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from command_line.files import write_atomically


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as STEM.png and STEM.pdf; returns both. On an OSError, an older file is still there, and whole."""
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf")]
    for file in files:
        content = io.BytesIO()
        without_date = {"CreationDate": None} if file.suffix == ".pdf" else None  # the same file from the same data
        figure.savefig(content, format=file.suffix[1:], dpi=150, metadata=without_date)
        write_atomically(file, content.getvalue())
    return files


STROKES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)))


MARKERS = "osD^vP"  # one less than strokes: together they differ for 42 lines


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
