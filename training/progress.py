"""What a training tells: what it is, a bar while it trains, a line after each epoch."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from tqdm import tqdm

from image_sets.batches import Batches
from saved_runs.results import SETTLED, UNSETTLED
from saved_runs.run import Run

Report = Callable[[str], None]  # takes a line of text

BAR = "{desc}{postfix}, {rate_noinv_fmt}, {percentage:.0f} %, {remaining} left {bar}"


class Progress:
    """The lines and the bar of a training; a context manager, at whose end the bar is closed.

    Args:
        run: what is trained, after `Run.resume`.
        network: its network.
        train_batches: what an epoch trains on.
        world_size: how many processes share a batch.
        report: called with each line.
        show_bar: whether to draw a bar on standard error.

    Attributes:
        epoch: the one at work, counted from 1.
    """

    def __init__(
        self, run: Run, network: nn.Module, train_batches: Batches, world_size: int, report: Report, show_bar: bool
    ) -> None:
        self.run, self.network, self.batches = run, network, train_batches
        self.world_size, self.report, self.show_bar = world_size, report, show_bar
        self.epoch = run.epochs[0]

    def __enter__(self) -> "Progress":
        for line in introduce(self.run, self.network, self.batches):
            self.report(line)
        num_images = self.batches.num_images
        images = {"total": self.run.settings.num_epochs * num_images, "initial": (self.epoch - 1) * num_images}
        shown = {"desc": self.place, "unit": " images", "unit_scale": True, "bar_format": BAR}
        self.bar = tqdm(**images, **shown, disable=not self.show_bar)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    @property
    def place(self) -> str:
        """The epoch, and of how many."""
        return f"epoch {self.epoch}/{self.run.settings.num_epochs}"

    @contextmanager
    def training(self, epoch: int) -> Iterator[None]:
        """Within it, the epoch's training takes place."""
        self.epoch, start = epoch, time.perf_counter()
        self.bar.set_description_str(self.place, refresh=False)
        yield
        self.speed = self.batches.num_images / (time.perf_counter() - start)

    def step(self, loss: Tensor, num_images: int) -> None:
        """A training step was made, on so many images in this process."""
        if self.bar.update(self.world_size * num_images):  # only now and then is the bar drawn, and the loss needed
            self.bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)

    def after_epoch(self, train_loss: float, val_loss: float, val_accuracy: float, test_accuracy: float) -> None:
        """The epoch's numbers are known."""
        self.report(
            f"{self.place}: train loss {train_loss:.6f}, val loss {val_loss:.6f},"
            f" val accuracy {val_accuracy:.3f} %, test accuracy {test_accuracy:.3f} %, {self.speed:,.0f} images/s"
        )


def introduce(run: Run, network: nn.Module, train_batches: Batches) -> list[str]:
    """What a run does, in a line, with a second one where it is resumed and one where its first accuracies mislead."""
    settings = run.settings
    size = sum(parameter.numel() for parameter in network.parameters())
    images = f"{settings.dataset}, {train_batches.image_set.numbers}"
    what = f"{settings.network}, {size:,} parameters; {images}"
    lines = [f"{what}; {settings.device}, {settings.precision}"]
    if run.results:
        lines.append(f"{settings.run_name} resumes at epoch {run.epochs[0]} of {settings.num_epochs}")
    if run.epochs[0] * len(train_batches) < SETTLED:
        lines.append(f"an epoch has {len(train_batches)} steps: {UNSETTLED}")
    return lines
