"""A run: its files, its lines and bar, its signals. Locked as long as it lasts, resumed to the last bit."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn, optim
from tqdm import tqdm

from batch_norm import steps_until_start_is_gone
from command_line.signals import CATCHING, catch_signals, raise_if_stopped, until_stopped
from image_sets.batches import Batch, Batches
from image_sets.loading import ImageSet
from run_settings import DATASETS, Settings, Value
from saved_runs.checkpoint import FORMAT, REMOVE_BOTH, check_parameters, parameter_names, recover_run, save_run
from saved_runs.circumstances import code_version, describe_run, network_code
from saved_runs.lock import lock_run
from saved_runs.results import COLUMNS, SETTLING_STEPS, Results, run_files, unsettled, write_results
from saved_runs.tensorboard_curves import Curves
from seeds import random_states, set_random_states
from training import together
from training.devices import evaluating

Report = Callable[[str], None]  # takes a line of text

BAR = "{desc}, {rate_noinv_fmt}, {percentage:.0f} %, {remaining} left {bar}"


class Run:
    """A training run and its files, as a context manager: locked as long as it lasts, saved whatever ends it.

    What an earlier process has left of the run is found on entry, and `resume` puts it into the network and its
    optimizer; `epochs` are those that are left; `record` takes the numbers of each. Several processes that make the run
    together all have what is in its files, but the first one alone has the files.

    Args:
        settings: what `preparation.prepare` returns.
        report: called with each line to show: some at the start, one after every epoch, and warnings.
        show_bar: whether to draw a progress bar on standard error.

    Raises:
        AtWorkError: another process works on the same run.
        ValueError: the files are of a run with other settings, or one is damaged; the message says what to do.
        FileExistsError: there is the result file of an unfinished run, but no checkpoint.
        OSError: a file cannot be read or written.
    """

    def __init__(self, settings: Settings, report: Report = lambda line: None, show_bar: bool = False) -> None:
        self.settings, self.report, self.show_bar = settings, report, show_bar
        self.files = run_files(settings.path, settings.run_name)
        self.is_main_process = together.rank() == 0
        self.results: Results | None = None  # the numbers so far
        self.notes: dict[str, Value] = {}  # further lines of the header of the result file
        self.state: dict[str, Any] | None = None  # what it takes to resume
        self.saved_state: dict[str, Any] | None = None  # the same as it was at the last checkpoint
        self.last_save = -math.inf
        self.contexts = ExitStack()

    def __enter__(self) -> "Run":
        together.agree(self.open_files if self.is_main_process else lambda: None)
        self.results, self.state = together.from_first((self.results, self.state))
        return self

    def open_files(self) -> None:
        """Lock the run and find what an earlier process has left of it."""
        with ExitStack() as contexts:
            contexts.enter_context(lock_run(self.files))
            code_version()  # as it is now: it may be changed while the run goes on
            if not self.settings.restart:
                self.results, self.state = recover_run(self.files, self.settings)
                self.saved_state = self.state
            self.curves = contexts.enter_context(closing(Curves(self.settings)))
            self.contexts = contexts.pop_all()

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        with self.contexts:
            if self.is_main_process and self.saved_state is not self.state:
                save_run(self.files, self.state)
            if error is None and CATCHING == [False]:  # nobody else asks for a signal that came after the last step
                raise_if_stopped()
        if isinstance(error, SystemExit):  # or else the command would end as if all were well
            raise RuntimeError(f"{self.settings.network} has ended the program by sys.exit({error.code})") from error

    def finished_before(self, load_images: Callable[[], ImageSet]) -> bool:
        """Whether there is nothing left to train; if so, report it, and what has changed since then."""
        if self.epochs:
            return False
        image_set = None
        if self.results.header.get("image_hash"):
            with suppress(ValueError, OSError):  # of images that are not there any more, nothing is asked
                image_set = load_images()
        change = change_since(self.results, own_notes(self.settings, image_set))
        self.report(f"{self.settings.run_name} is finished already" + (f"; {change}" if change else ""))
        return True

    @property
    def epochs(self) -> range:
        """The epochs that are left, counted from 1."""
        done = self.results.num_epochs if self.results else 0
        return range(done + 1, self.settings.num_epochs + 1)

    def resume(
        self,
        network: nn.Module,
        optimizer: optim.Optimizer,
        scheduler: optim.lr_scheduler.LRScheduler,
        image_set: ImageSet,
    ) -> None:
        """Put these three and all random generators into the state in which an earlier process has left the run.

        From here on, a signal ends the run between two steps, never in the middle of saving it.
        """
        self.notes = own_notes(self.settings, image_set)
        if self.results and (change := change_since(self.results, self.notes)):
            raise ValueError(f"{change}: give --restart to start over, or another --name")
        settling_steps = steps_until_start_is_gone(network)
        if settling_steps != SETTLING_STEPS:
            self.notes["settling_steps"] = settling_steps
        self.parts = {"network": network, "optimizer": optimizer, "scheduler": scheduler}
        self.start = time.monotonic()
        if self.state is not None:
            check_parameters(self.files.checkpoint, self.state, network, optimizer)
            for name, part in self.parts.items():
                try:
                    part.load_state_dict(self.state[name])
                except Exception:  # which one depends on what differs; of weights, it has a line for each
                    problem = f"is of a run with another {name}: {REMOVE_BOTH}"
                    raise ValueError(f"{self.files.checkpoint} {problem}") from None
            if "fused" in optimizer.defaults:  # it goes with the device, which may be another one now
                for group in optimizer.param_groups:
                    group["fused"] = optimizer.defaults["fused"]
            set_random_states(self.state["random"])
            self.last_save = self.start
            self.start -= self.results.header["seconds"]
        self.introduce(network, image_set, settling_steps)
        self.contexts.enter_context(catch_signals(raising=False))

    def introduce(self, network: nn.Module, image_set: ImageSet, settling_steps: int) -> None:
        """Report what the run does and where its first accuracies mislead, and draw the bar."""
        settings, num_images = self.settings, len(image_set.splits["train"])
        if not self.epochs:
            self.report(f"{settings.run_name} is finished already")
            return
        size = sum(parameter.numel() for parameter in network.parameters())
        images = f"{settings.dataset}, {image_set.numbers}"
        where = f"{settings.device}, {settings.precision}; files in {settings.path}"
        self.report(f"{settings.network}, {size:,} parameters; {images}; {where}")
        if self.results:
            self.report(f"{settings.run_name} resumes at epoch {self.epochs[0]} of {settings.num_epochs}")
        num_steps = math.ceil(num_images / settings.batch_size)
        if self.epochs[0] * num_steps < settling_steps and not settings.debias:
            self.report(f"an epoch has {unsettled(num_steps, settling_steps)}")
        images = {"total": settings.num_epochs * num_images, "initial": (self.epochs[0] - 1) * num_images}
        options = {"unit": " images", "unit_scale": True, "bar_format": BAR, "disable": not self.show_bar}
        self.bar = self.contexts.enter_context(tqdm(**images, **options))

    def steps(self, batches: Batches) -> Iterator[Batch]:
        """The batches, one after the other; KeyboardInterrupt with the number of a signal that has arrived."""
        start = time.perf_counter()
        if batches.training:
            self.bar.set_description_str(f"epoch {self.epochs[0]}/{self.settings.num_epochs}", refresh=False)
        for images, labels in together.in_step(until_stopped(batches)):
            yield images, labels
            if batches.training:
                self.bar.update(len(labels) * together.size())
        if batches.training:
            if self.settings.device.startswith("cuda"):  # it is behind: with CUDA graphs, by many steps
                torch.cuda.synchronize(self.settings.device)
            self.speed = batches.num_images / (time.perf_counter() - start)

    def record(self, epoch: int, train_loss: float, val_loss: float, val_accuracy: float, test_accuracy: float) -> None:
        """Report the numbers of an epoch, add them to the results, and save what is due.

        The result file is written after every epoch; the checkpoint after the first one, when `checkpoint_seconds` have
        passed since the last, and at the end; see `save_run`.
        """
        numbers = (epoch, train_loss, val_loss, val_accuracy, test_accuracy)
        before = self.results.columns if self.results else dict.fromkeys(COLUMNS, np.array([], dtype=int))
        columns = {name: np.append(before[name], value) for name, value in zip(COLUMNS, numbers, strict=True)}
        described = describe_run(self.settings, time.monotonic() - self.start, self.results, together.size())
        self.results = Results(described | self.notes, columns)
        together.agree(self.save if self.is_main_process else lambda: None)
        self.report(
            f"epoch {epoch}/{self.settings.num_epochs}: train loss {train_loss:.6f}, val loss {val_loss:.6f},"
            f" val accuracy {val_accuracy:.3f} %, test accuracy {test_accuracy:.3f} %, {self.speed:,.0f} images/s"
        )

    def save(self) -> None:
        """Save what is due after an epoch."""
        self.curves.add(self.parts["network"], self.results)  # first: so all that is saved is shown
        if self.results.best_epoch == self.results.num_epochs:
            with evaluating(self.parts["network"], self.settings):  # the checkpoint has the statistics as they are
                best_weights = {
                    name: value.cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
                    for name, value in self.parts["network"].state_dict().items()
                }
        else:
            best_weights = self.state["best_weights"]
        self.state = {
            "format": FORMAT,
            "settings": self.results.header,
            "columns": {name: column.tolist() for name, column in self.results.columns.items()},
            "best_weights": best_weights,
            **{name: copy.deepcopy(part.state_dict()) for name, part in self.parts.items()},
            "parameters": parameter_names(self.parts["network"], self.parts["optimizer"]),
            "random": random_states(),
        }
        if self.saved_state is None:  # the results of a run that this one replaces must not stand beside its checkpoint
            self.files.results.unlink(missing_ok=True)
        if not self.epochs or time.monotonic() - self.last_save > self.settings.checkpoint_seconds:
            save_run(self.files, self.state)
            self.saved_state, self.last_save = self.state, time.monotonic()
        else:
            write_results(self.files.results, self.results)


def change_since(begun: Results, notes: Mapping[str, Value]) -> str | None:
    """What has changed since a run was begun, if anything has. Files of early versions do not say all of it."""
    for name, now in notes.items():
        if (before := begun.header.get(name, now)) != now:
            kind, setting = ("code", "network") if name == "network_code" else ("images", "dataset")
            since = f"since {begun.header['name']} was begun: {name} was {before}, now {now}"
            return f"the {kind} of {begun.header[setting]} changed {since}"
    return None


def own_notes(settings: Settings, image_set: ImageSet | None) -> dict[str, Value]:
    """What a result file says of images and of a network of one's own."""
    notes = dict(image_set.notes) if image_set and settings.dataset not in DATASETS else {}
    code = network_code(settings.network)
    return notes | {"network_code": code} if code else notes
