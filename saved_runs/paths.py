"""Where the files of a run are."""

from pathlib import Path
from typing import NamedTuple


class RunFiles(NamedTuple):
    """The files of a run."""

    results: Path
    best_weights: Path
    checkpoint: Path
    lock: Path


def run_files(path: Path, name: str) -> RunFiles:
    """Where the files of the run `name` are below the folder `path`."""
    networks = path / "networks"
    return RunFiles(
        results=path / "results" / f"{name}.csv",
        best_weights=networks / f"{name}-best.pt",
        checkpoint=networks / f"{name}-last.pt",
        lock=networks / f"{name}.lock",
    )
