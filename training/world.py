"""The processes that train a network together: one, unless torchrun has started more."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from command_line.signals import LAUNCHED
from image_sets.loading import ImageSet
from run_settings import Settings
from saved_runs.run import Run
from training.devices import find_device, speed_up

Result = TypeVar("Result")


class World:
    """The processes of a run. This is a world of one, where there is little to do; `processes.Processes` has many.

    Attributes:
        first: whether this is the process that prints and writes files.
        size: how many processes there are.
    """

    first, size = True, 1

    def device(self, name: str | None) -> torch.device:
        """The device on which this process computes, where the flags have `name`. SettingError if it is missing."""
        return find_device(name)

    def run(self, settings: Settings, stops: list[int] | None) -> Run:
        """The run on disk. SettingError where these processes cannot make it together."""
        return Run(settings, stops)

    def together(self, work: Callable[[], Result]) -> Result:
        """What `work` returns here, when all processes have done theirs; an error of one ends all with that error."""
        return work()

    def load(self, load_images: Callable[[], ImageSet], batch_size: int) -> ImageSet:
        """The images of a run, loaded by the first process, then by one of each machine, then by the rest.

        So a file is written, as by a download, before others read it. SettingError where images are not the same, or
        where a process would have none of a training batch or of a whole split.
        """
        return load_images()

    def share(self, part: Tensor) -> Tensor:
        """This process's share of what there is for each image of a batch, its images in the same order."""
        return part

    def replicate(self, network: nn.Module, settings: Settings) -> nn.Module:
        """The network as it is trained, fast: it computes a share; its gradients become those of the whole batch."""
        speed_up(network, settings.precision, settings.compile)
        return network

    def mean(self, loss: Tensor, num_images: int) -> Tensor:
        """The mean loss of the whole batch, from the mean loss of a share of so many images."""
        return loss

    def sum(self, *numbers: float) -> tuple[float, ...]:
        """The sum over the processes of each number."""
        return numbers


ALONE = World()


@contextmanager
def join() -> Iterator[World]:
    """The world of this process, as long as it takes part. ConnectionError where another process is lost."""
    if not LAUNCHED:
        yield ALONE
        return
    from training import processes  # which nothing but torchrun needs

    with processes.join() as world:
        yield world
