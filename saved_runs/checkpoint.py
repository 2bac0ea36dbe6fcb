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
from torch import nn, optim

from command_line.files import DamagedFileError, add_digest, has_digest, write_atomically
from run_settings import Settings
from saved_runs.results import REMEDY, Results, RunFiles, check_settings, read_finished, write_results

FORMAT = 1  # raise it when a change makes older checkpoints useless
REMOVE_BOTH = "remove it and the result file of its run to start over, or give another --name"


def save_run(files: RunFiles, state: dict[str, Any]) -> None:
    """Write the state of a run as its checkpoint, then its best weights and its result file.

    The checkpoint comes first: from it, the other two can be mended. It goes as soon as it is of no more use. On an
    OSError, what was there before still is.
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
    """The state that `save_run` has saved, with all tensors on the CPU. ValueError where the file is of no use."""
    content = Path(file).read_bytes()
    with suppress(Exception):  # which one depends on what is in it
        if has_digest(content) and (state := load_saved(content))["format"] == FORMAT:
            return state
    raise ValueError(
        f"the checkpoint {file} is cut short, damaged or of another version of this program: {REMOVE_BOTH}"
    )


def load_saved(content: bytes) -> Any:
    """What `torch.save` has made these bytes of, with tensors on the CPU. Raises whatever torch does."""
    with warnings.catch_warnings(action="ignore"):  # of what other programs have saved: the error says enough
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def parameter_names(network: nn.Module, optimizer: optim.Optimizer) -> list[str]:
    """The names of an optimizer's parameters, in the order of its `state_dict`; "" for one not of the network."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return [names.get(id(parameter), "") for group in optimizer.param_groups for parameter in group["params"]]


def check_parameters(file: Path, state: dict[str, Any], network: nn.Module, optimizer: optim.Optimizer) -> None:
    """ValueError where the optimizer in the state of a checkpoint has other parameters, or in another order.

    Its momentum goes by position: that of one would be taken for that of another. Checkpoints of early versions do not
    name them, and pass.
    """
    names = parameter_names(network, optimizer)
    for position, (before, now) in enumerate(zip(state.get("parameters", names), names, strict=False)):
        if before != now:
            raise ValueError(
                f"{file} has the momentum of {before} where that of {now} should be (parameter {position}): let the"
                " network make its layers in the same order each time, from a list and not from a set, and give"
                " --restart to start over"
            )


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
    if results.num_epochs < settings.num_epochs:
        with suppress(DamagedFileError):  # it is written anew
            finished = read_finished(files.results, settings)
            if finished is not None:  # in another place, and the file was put here
                return finished, None
    write_outcome(files, state)
    return results, state
