"""Checkpoints, and what an earlier process has left of a run.

Checkpoints and weights are what `torch.save` writes, followed by its SHA-256: torch itself notices a file that is cut
short, but not a changed byte in a weight. `torch.load` reads them as they are.
"""

import io
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from command_line.files import DamagedFileError, add_digest, has_digest, read_file, write_atomically
from run_settings import Settings, determining, differences
from saved_runs.paths import RunFiles
from saved_runs.results import Results, format_results, read_results, write_results
from seeds import keep_random_states, set_random_states

FORMAT = 1  # raise it when a change makes older checkpoints useless
REMEDY = "remove it to start over, or give another --name"
REMOVE_BOTH = "remove it and the result file of its run to start over, or give another --name"


def save_run(files: RunFiles, state: dict[str, Any]) -> None:
    """Write the state of a run as its checkpoint, then its best weights and its result file.

    The checkpoint comes first: from it, the other two can be mended. It goes as soon as it is of no more use.

    Raises:
        OSError: a file cannot be written. What was there before still is.
    """
    save_with_digest(state, files.checkpoint)
    write_outcome(files, state)


def write_outcome(files: RunFiles, state: dict[str, Any]) -> None:
    """Write the best weights and the result file of a run. The checkpoint goes where it can never be resumed from."""
    save_with_digest(state["best_weights"], files.best_weights)
    results = results_so_far(state)
    write_results(files.results, results)
    if results.finished and results.header["scheduler"] != "none":  # only at a constant rate, more epochs may follow
        files.checkpoint.unlink(missing_ok=True)


def save_with_digest(content: dict[str, Any], file: Path) -> None:
    """Write what `torch.save` makes of `content`, followed by its SHA-256."""
    saved = io.BytesIO()
    torch.save(content, saved)
    add_digest(saved)
    write_atomically(file, saved.getbuffer())


def results_so_far(state: dict[str, Any]) -> Results:
    """The results in a state."""
    return Results(state["settings"], {name: np.array(column) for name, column in state["columns"].items()})


def load_checkpoint(file: str | os.PathLike) -> dict[str, Any]:
    """The state that `save_run` has saved, with all tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, cut short, or of another version of this program.
    """
    content = read_file(file)
    if not has_digest(content):
        raise ValueError(f"the checkpoint {file} is cut short, damaged or none of this program's: {REMOVE_BOTH}")
    try:
        state = load_saved(content)
        other_format = state["format"] != FORMAT
        if not other_format:
            check_state(state)
    except Exception as error:  # which one depends on what is missing, or of another type
        raise ValueError(f"the checkpoint {file} does not hold the state of a run: {REMOVE_BOTH}") from error
    if other_format:
        raise ValueError(f"the checkpoint {file} was written by another version of this program: {REMOVE_BOTH}")
    return state


def load_saved(content: bytes) -> Any:
    """What `torch.save` has made these bytes of, with tensors on the CPU. Raises whatever torch does."""
    with warnings.catch_warnings(action="ignore"):  # of what other programs have saved: the error says enough
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def check_state(state: dict[str, Any]) -> None:
    """Raise an error where this cannot be what `Run.record` has made. What is in its networks, `Run.resume` sees."""
    results = results_so_far(state)
    format_results(results)
    float(results.header["seconds"])
    with keep_random_states():
        set_random_states(state["random"])
    for name in ("best_weights", "network", "optimizer", "scheduler"):
        if not isinstance(state[name], dict):
            raise TypeError(name)


def recover_run(files: RunFiles, settings: Settings) -> tuple[Results | None, dict[str, Any] | None]:
    """What an earlier process has left of a run: its results so far, and the state to resume from.

    Where the process was killed before it had written all files, best weights and result file are made to agree with
    the checkpoint. There may be neither results nor state; a finished run needs no state, and most have no checkpoint.

    Raises:
        ValueError: the settings were others, or a file is damaged; the message says what to do.
        FileExistsError: there is the result file of an unfinished run, but no checkpoint.
        OSError: a file cannot be read or written.
    """
    if not files.checkpoint.exists():
        results = read_finished(files.results, settings)
        if results is None and files.results.exists():
            raise FileExistsError(
                f"{files.results} has fewer than {settings.num_epochs} epochs, and no {files.checkpoint} to resume"
                f" from: {REMEDY}"
            )
        return results, None
    try:
        state = load_checkpoint(files.checkpoint)
    except ValueError:  # a run that is finished does not need it
        with suppress(DamagedFileError):
            if (results := read_finished(files.results, settings)) is not None:
                return results, None
        raise
    results = results_so_far(state)
    check_settings(files.checkpoint, results, settings)
    if not results.has_made(settings.num_epochs):
        with suppress(DamagedFileError):  # it is written anew
            finished = read_finished(files.results, settings)
            if finished is not None:  # in another place, and the file was put here
                return finished, None
    write_outcome(files, state)
    return results, state


def read_finished(file: Path, settings: Settings) -> Results | None:
    """What is in the result file of a run, None where there is no such file or it has not all epochs yet.

    Raises:
        ValueError: the file is damaged, or of a run with other settings.
        OSError: it cannot be read.
    """
    if not file.exists():
        return None
    try:
        results = read_results(file)
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}: {REMEDY}") from None
    check_settings(file, results, settings)
    return results if results.has_made(settings.num_epochs) else None


def check_settings(file: Path, earlier: Results, settings: Settings) -> None:
    """ValueError, with what differs, where a run with `settings` would not have had the `earlier` results."""
    unlike = differences(earlier.header, determining(settings))
    constant = "scheduler" not in unlike and settings.scheduler == "none"
    if constant and settings.num_epochs >= earlier.num_epochs:
        unlike.pop("num_epochs", None)  # without a schedule, the epochs so far do not depend on how many follow
    if not unlike:
        return
    listed = "; ".join(f"{name} was {before}, now {now}" for name, (before, now) in unlike.items())
    hint = ""
    if list(unlike) == ["num_epochs"]:
        hint = " (the cosine schedule depends on it from the first epoch on)"
        if constant:
            hint = f" (it has {earlier.num_epochs} epochs already)"
    raise ValueError(
        f"{file} is of a run with other settings: {listed}{hint}."
        " Give another --name, the settings it had, or --restart to start over"
    )
