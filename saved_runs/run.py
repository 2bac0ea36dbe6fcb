"""A run as a thing on disk: locked as long as it lasts, saved whatever ends it, resumed to the last bit."""

import copy
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
from torch import Tensor, nn, optim

from command_line.files import check_plain, remove_temporaries
from command_line.signals import on_signals, until_stopped
from run_settings import DATASETS, Settings, Value
from saved_runs.checkpoint import (
    FORMAT,
    REMOVE_BOTH,
    read_finished,
    recover_run,
    save_run,
)
from saved_runs.circumstances import code_version, describe_run
from saved_runs.lock import lock_run
from saved_runs.paths import run_files
from saved_runs.results import COLUMNS, Results, write_results
from saved_runs.tensorboard_curves import Curves
from seeds import random_states, set_random_states


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
        BlockingIOError: another process works on the same run.
        ValueError: the files are of a run with other settings, or one is damaged; the message says what to do.
        FileExistsError: there is the result file of an unfinished run, but no checkpoint.
        OSError: a file cannot be read or written.
    """

    def __init__(self, settings: Settings, stops: list[int] | None = None) -> None:
        self.settings = settings
        self.stops = [] if stops is None else stops
        self.processes = 1  # that make the run together
        self.files = run_files(settings.path, settings.run_name)
        self.results: Results | None = None  # the numbers so far
        self.notes: dict[str, Value] = {}  # what else the result file shall say
        self.state: dict[str, Any] | None = None  # all that the epochs so far have led to
        self.saved_state: dict[str, Any] | None = None  # the same as it was at the last checkpoint
        self.last_save = -math.inf
        self.contexts = ExitStack()

    def __enter__(self) -> "Run":
        with ExitStack() as contexts:
            try:
                contexts.enter_context(lock_run(self.files))
            except OSError as error:
                if isinstance(error, BlockingIOError) or self.settings.restart:
                    raise
                self.results = read_finished(self.files.results, self.settings)
                if self.results is None:
                    raise
                return self  # a run that is finished needs no lock, and its folder need not be one that can be written
            for file in self.files:
                check_plain(file)
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
                except Exception:  # which one depends on what differs; of weights, it has a line for each
                    raise ValueError(
                        f"{self.files.checkpoint} is of a run with another {name}: {REMOVE_BOTH}"
                    ) from None
            for group in optimizer.param_groups:  # this goes with the device, which may be another one now
                group["fused"] = optimizer.defaults["fused"]
            set_random_states(self.state["random"])
            self.last_save = self.start
            self.start -= self.results.header["seconds"]
        self.contexts.enter_context(on_signals(self.stops.append))

    def note_images(self, notes: dict[str, Value]) -> None:
        """Let the result file say what the images of a folder are like. ValueError where others were resumed with."""
        if self.settings.dataset in DATASETS:
            return
        earlier = self.results.header if self.results else {}
        for name, note in notes.items():
            if (before := earlier.get(name, note)) != note:
                changed = (
                    f"the images of {self.settings.dataset} have changed since {self.settings.run_name} was stopped"
                )
                remedy = "give --restart to start over, or another --name"
                raise ValueError(f"{changed}: {name} were {before}, now {note}: {remedy}")
        self.notes.update(notes)

    def steps(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, one after the other; KeyboardInterrupt with the number of a signal that has arrived."""
        return until_stopped(batches, self.stops)

    def record(self, *numbers: float) -> None:
        """Add the numbers of an epoch, in the order of `results.COLUMNS`, and save what is due.

        The result file is written after every epoch; the checkpoint after the first one, when `checkpoint_seconds` have
        passed since the last, and at the end; see `save_run`.
        """
        self.curves.add(self.parts["network"], self.results, *numbers)  # first: so all that is saved is shown
        earlier = self.results.columns if self.results else dict.fromkeys(COLUMNS, np.array([], dtype=int))
        columns = {name: np.append(earlier[name], value) for name, value in zip(COLUMNS, numbers, strict=True)}
        described = describe_run(self.settings, time.monotonic() - self.start, self.results, self.processes)
        self.results = Results(described | self.notes, columns)
        if self.results.best_epoch == self.results.num_epochs:
            weights = self.parts["network"].state_dict()
            best_weights = {
                name: value.cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
                for name, value in weights.items()
            }
        else:
            best_weights = self.state["best_weights"]
        self.state = {
            "format": FORMAT,
            "settings": self.results.header,
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
