"""Save and restore a run so that it can be stopped at any moment and goes on as if it never had been.

A checkpoint is what `torch.save` writes, with the SHA-256 of that behind it: torch itself notices a file that is cut
short, but not a changed byte in a weight. `torch.load` reads it as it is.
"""

import copy
import hashlib
import io
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import filelock
import numpy as np
import torch
from torch import nn, optim

from results import Results, Setting, read_results, write_atomically, write_results

FORMAT = 1  # raise it when a change makes older checkpoints useless
REMEDY = "give --restart to start over, or another --name"
DIGEST_SIZE = hashlib.sha256().digest_size


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


@contextmanager
def lock_run(files: RunFiles) -> Iterator[None]:
    """Keep every other process from working on the same run. The lock is free again when the process ends.

    Raises:
        BlockingIOError: another process has it.
    """
    files.lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(files.lock, timeout=0):
            yield
    except filelock.Timeout:
        raise BlockingIOError(
            f"another process is at work on the run of {files.results}: wait for it, or give another --name"
        ) from None


def capture_state(
    results: Results,
    best_weights: dict[str, torch.Tensor],
    network: nn.Module,
    optimizer: optim.Optimizer,
    scheduler: optim.lr_scheduler.LRScheduler,
) -> dict[str, Any]:
    """A copy of all that it takes to go on from here, the states of the random generators included."""
    return {
        "format": FORMAT,
        "settings": results.settings,
        "columns": {name: column.tolist() for name, column in results.columns.items()},
        "best_weights": best_weights,
        "network": copy.deepcopy(network.state_dict()),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "scheduler": copy.deepcopy(scheduler.state_dict()),
        "random": random_states(),
    }


def apply_state(
    state: dict[str, Any],
    network: nn.Module,
    optimizer: optim.Optimizer,
    scheduler: optim.lr_scheduler.LRScheduler,
) -> None:
    """Put all three and the random generators into the state that `capture_state` has copied."""
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    for group in optimizer.param_groups:  # what goes with the device, which may be another one now
        group["fused"] = optimizer.defaults["fused"]
    scheduler.load_state_dict(state["scheduler"])
    set_random_states(state["random"])


def save_run(files: RunFiles, state: dict[str, Any]) -> None:
    """Write the state of a run as its checkpoint, then its best weights and its result file.

    The checkpoint comes first: from it, the other two can be mended.

    Raises:
        OSError: a file cannot be written. What was there before still is.
    """
    content = io.BytesIO()
    torch.save(state, content)
    content.write(hashlib.sha256(content.getbuffer()).digest())
    write_atomically(files.checkpoint, content.getbuffer())
    write_outcome(files, state)


def write_outcome(files: RunFiles, state: dict[str, Any]) -> None:
    """Write the best weights and the result file of a run."""
    content = io.BytesIO()
    torch.save(state["best_weights"], content)
    write_atomically(files.best_weights, content.getbuffer())
    write_results(files.results, results_so_far(state))


def results_so_far(state: dict[str, Any]) -> Results:
    """The results in a state."""
    return Results(state["settings"], {name: np.array(column) for name, column in state["columns"].items()})


def load_checkpoint(file: str | os.PathLike) -> dict[str, Any]:
    """The state that `save_run` has saved, with all tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, cut short, or of another version of this program.
    """
    content = Path(file).read_bytes()
    saved, digest = content[:-DIGEST_SIZE], content[-DIGEST_SIZE:]
    if hashlib.sha256(saved).digest() != digest:
        raise ValueError(f"the checkpoint {file} is cut short, damaged or none of this program's: {REMEDY}")
    try:
        state = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError):
        state = None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"the checkpoint {file} was written by another version of this program: {REMEDY}")
    return state


def recover_run(files: RunFiles, settings: dict[str, Setting]) -> tuple[Results | None, dict[str, Any] | None]:
    """What a run with these files and settings has left behind.

    Best weights and result file are made to agree with the checkpoint, where the run was killed before they did.

    Args:
        files: the files of the run.
        settings: what determines its numbers, `num_epochs` and `scheduler` among it.

    Returns:
        The results so far, None where there are none; and the state to go on from, None where there is none or where
        the result file says that the run was finished without this checkpoint.

    Raises:
        ValueError: the settings were others, or a file is damaged; the message says what to do.
        FileExistsError: there is the result file of an unfinished run, but no checkpoint.
        OSError: a file cannot be read or written.
    """
    if files.checkpoint.exists():
        state = load_checkpoint(files.checkpoint)
        results = results_so_far(state)
        check_settings(files, results, settings)
        if len(results.columns["epoch"]) < settings["num_epochs"]:
            with suppress(ValueError):  # a damaged result file is written anew
                finished = read_finished(files, settings)
                if finished is not None:  # in another place, and the file was put here
                    return finished, None
        write_outcome(files, state)
        return results, state
    if not files.results.exists():
        return None, None
    try:
        results = read_results(files.results)
    except ValueError as error:
        raise ValueError(f"{error}: {REMEDY}") from None
    check_settings(files, results, settings)
    epochs = len(results.columns["epoch"])
    if epochs < settings["num_epochs"]:
        raise FileExistsError(
            f"{files.results} has {epochs} epochs, but there is no {files.checkpoint} to go on from: {REMEDY}"
        )
    return results, None


def read_finished(files: RunFiles, settings: dict[str, Setting]) -> Results | None:
    """What is in the result file of a run, None where there is no such file or it has not all epochs yet.

    Raises:
        ValueError: the file is damaged, or of a run with other settings.
        OSError: it cannot be read.
    """
    if not files.results.exists():
        return None
    results = read_results(files.results)
    check_settings(files, results, settings)
    return results if len(results.columns["epoch"]) >= settings["num_epochs"] else None


def check_settings(files: RunFiles, earlier: Results, settings: dict[str, Setting]) -> None:
    """ValueError, with what differs, where a run with `settings` would not have come to the `earlier` results."""
    unlike = {key: value for key, value in settings.items() if earlier.settings.get(key) != value}
    epochs = len(earlier.columns["epoch"])
    constant = earlier.settings.get("scheduler") == settings["scheduler"] == "none"
    if constant and settings["num_epochs"] >= epochs:
        unlike.pop("num_epochs", None)  # without a schedule, the epochs so far do not depend on how many follow
    if not unlike:
        return
    listed = "; ".join(f"{key} was {earlier.settings.get(key)}, now {value}" for key, value in unlike.items())
    hint = ""
    if list(unlike) == ["num_epochs"]:
        hint = " (the cosine schedule depends on it from the first epoch on)"
        if constant:
            hint = f" (it has {epochs} epochs already)"
    raise ValueError(
        f"{files.results} is of a run with other settings: {listed}{hint}."
        " Give another --name, the settings it had, or --restart to start over"
    )


def random_states() -> dict[str, Any]:
    """The states of all global random generators: Python's, NumPy's, torch's on the CPU and, once used, on CUDA."""
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Set all global random generators to what `random_states` gave. CUDA devices that are not here are left out."""
    random.setstate(states["python"])
    numpy_state = dict(states["numpy"])
    numpy_state["state"] = dict(numpy_state["state"], key=np.array(numpy_state["state"]["key"], dtype=np.uint32))
    np.random.set_state(numpy_state)
    torch.set_rng_state(states["torch"])
    for device in range(min(len(states["cuda"]), torch.cuda.device_count())):
        torch.cuda.set_rng_state(states["cuda"][device], device)
