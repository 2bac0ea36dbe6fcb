"""A run as a thing on disk: its files, what is saved when, and what an earlier process has left behind.

Checkpoints and weights are what `torch.save` writes, followed by its SHA-256: torch itself notices a file that is cut
short, but not a changed byte in a weight. `torch.load` reads them as they are.
"""

import argparse
import copy
import io
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import nn, optim

from circumstances import code_version, describe_run
from command_line import on_signals, until_stopped
from lock import lock_run
from results import (
    COLUMNS,
    DamagedFileError,
    Results,
    add_digest,
    has_digest,
    read_results,
    remove_temporaries,
    write_atomically,
    write_results,
)
from seeds import random_states, set_random_states
from settings import RunFiles, Value, determining, differences, run_files
from tensorboard_curves import Curves

FORMAT = 1  # raise it when a change makes older checkpoints useless
REMEDY = "give --restart to start over, or another --name"


class Run:
    """A training run and its files, as a context manager: locked as long as it lasts, saved whatever ends it.

    What an earlier process has left of the run is found on entry, and `resume` puts it into the network and its
    optimizer; `epochs` are those that are left; `record` takes the numbers of each.

    Args:
        settings: what `train.parse` returns.
        stops: numbers of signals that have arrived, also while the run goes on: from `resume` on, the first one ends
            the run between two steps with KeyboardInterrupt, never in the middle of saving it. Those of this
            process are added to it.

    Raises:
        BlockingIOError: another process works on the same run. (All come on entry; this one also later, where somebody
            has removed the lock's file: then the other process goes on with the run, and this one writes nothing.)
        ValueError: the files are of a run with other settings, or one is damaged; the message says what to do.
        FileExistsError: there is the result file of an unfinished run, but no checkpoint.
        OSError: a file cannot be read or written.
    """

    def __init__(self, settings: argparse.Namespace, stops: list[int] | None = None) -> None:
        self.settings = settings
        self.stops = [] if stops is None else stops
        self.processes = 1  # that make the run together
        self.files = run_files(settings.path, settings.name)
        self.results: Results | None = None  # the numbers so far
        self.notes: dict[str, Value] = {}  # what else the result file shall say
        self.state: dict[str, Any] | None = None  # all that the epochs so far have led to
        self.saved_state: dict[str, Any] | None = None  # the same as it was at the last checkpoint
        self.last_save = -math.inf
        self.contexts = ExitStack()

    def __enter__(self) -> "Run":
        with ExitStack() as contexts:
            try:
                self.keep_lock = contexts.enter_context(lock_run(self.files))
            except OSError as error:
                if isinstance(error, BlockingIOError) or self.settings.restart:
                    raise
                self.results = read_finished(self.files.results, self.settings)
                if self.results is None:
                    raise
                return self  # a run that is finished needs no lock, and its folder need not be one that can be written
            for file in self.files:
                remove_temporaries(file)
            code_version()  # as it is now: it may be changed while the run goes on
            if not self.settings.restart:
                self.results, self.state = recover_run(self.files, self.settings)
                self.saved_state = self.state
            self.curves = contexts.enter_context(Curves(self.settings))
            self.contexts = contexts.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self.contexts:
            if self.saved_state is not self.state:
                self.keep_lock()
                save_run(self.files, self.state)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.results is not None and self.results.has_made(self.settings.num_epochs)

    @property
    def epochs(self) -> range:
        """The epochs that are left, counted from 1."""
        done = self.results.num_epochs if self.results else 0
        return range(done + 1, self.settings.num_epochs + 1)

    def resume(self, network: nn.Module, optimizer: optim.Optimizer, scheduler: optim.lr_scheduler.LRScheduler) -> None:
        """Put these three and all random generators into the state in which an earlier process has left the run."""
        self.parts = {"network": network, "optimizer": optimizer, "scheduler": scheduler}
        self.start = time.monotonic()
        if self.state is not None:
            for name, part in self.parts.items():
                try:
                    part.load_state_dict(self.state[name])
                except (RuntimeError, ValueError):  # the message has a line for each weight
                    raise ValueError(f"{self.files.checkpoint} is of a run with another {name}: {REMEDY}") from None
            for group in optimizer.param_groups:  # this goes with the device, which may be another one now
                group["fused"] = optimizer.defaults["fused"]
            set_random_states(self.state["random"])
            self.last_save = self.start
            self.start -= self.results.settings["seconds"]
        self.contexts.enter_context(on_signals(self.stops.append))

    def steps(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, one after the other; KeyboardInterrupt with the number of a signal that has arrived."""
        for batch in until_stopped(batches, self.stops):
            self.keep_lock()
            yield batch

    def record(self, *numbers: float) -> None:
        """Add the numbers of an epoch, in the order of `results.COLUMNS`, and save what is due.

        The result file is written after every epoch; the checkpoint after the first one, when `checkpoint_seconds` have
        passed since the last, and at the end.
        """
        self.keep_lock()
        self.curves.add(self.parts["network"], self.results, *numbers)  # first: so all that is saved is shown
        earlier = self.results.columns if self.results else dict.fromkeys(COLUMNS, np.array([], dtype=int))
        columns = {name: np.append(earlier[name], value) for name, value in zip(COLUMNS, numbers, strict=True)}
        described = describe_run(self.settings, time.monotonic() - self.start, self.results, self.processes)
        self.results = Results(described | self.notes, columns)
        if self.results.best_epoch == self.results.num_epochs:
            weights = self.parts["network"].state_dict()
            best_weights = {name: value.cpu().clone() for name, value in weights.items()}
        else:
            best_weights = self.state["best_weights"]
        self.state = {
            "format": FORMAT,
            "settings": self.results.settings,
            "columns": {name: column.tolist() for name, column in columns.items()},
            "best_weights": best_weights,
            **{name: copy.deepcopy(part.state_dict()) for name, part in self.parts.items()},
            "random": random_states(),
        }
        if self.saved_state is None:  # the results of a run that this one replaces must not stand beside its checkpoint
            self.files.results.unlink(missing_ok=True)
        if self.finished or time.monotonic() - self.last_save > self.settings.checkpoint_seconds:
            save_run(self.files, self.state)
            self.saved_state, self.last_save = self.state, time.monotonic()
        else:
            write_results(self.files.results, self.results)


def save_run(files: RunFiles, state: dict[str, Any]) -> None:
    """Write the state of a run as its checkpoint, then its best weights and its result file.

    The checkpoint comes first: from it, the other two can be mended.

    Raises:
        OSError: a file cannot be written. What was there before still is.
    """
    save_with_digest(state, files.checkpoint)
    write_outcome(files, state)


def write_outcome(files: RunFiles, state: dict[str, Any]) -> None:
    """Write the best weights and the result file of a run."""
    save_with_digest(state["best_weights"], files.best_weights)
    write_results(files.results, results_so_far(state))


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
    content = Path(file).read_bytes()
    if not has_digest(content):
        raise ValueError(f"the checkpoint {file} is cut short, damaged or none of this program's: {REMEDY}")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError):
        state = None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"the checkpoint {file} was written by another version of this program: {REMEDY}")
    return state


def recover_run(files: RunFiles, settings: argparse.Namespace) -> tuple[Results | None, dict[str, Any] | None]:
    """What an earlier process has left of a run: its results so far, and the state to resume from.

    Where the process was killed before it had written all files, best weights and result file are made to agree with
    the checkpoint. There may be neither results nor state; a finished run needs no state.

    Raises:
        ValueError: the settings were others, or a file is damaged; the message says what to do.
        FileExistsError: there is the result file of an unfinished run, but no checkpoint.
        OSError: a file cannot be read or written.
    """
    if not files.checkpoint.exists():
        results = read_finished(files.results, settings)
        if results is None and files.results.exists():
            raise FileExistsError(
                f"{files.results} has fewer than {settings.num_epochs} epochs, but there is no {files.checkpoint} to"
                f" resume from: {REMEDY}"
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


def read_finished(file: Path, settings: argparse.Namespace) -> Results | None:
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


def check_settings(file: Path, earlier: Results, settings: argparse.Namespace) -> None:
    """ValueError, with what differs, where a run with `settings` would not have had the `earlier` results."""
    unlike = differences(earlier.settings, determining(settings))
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
