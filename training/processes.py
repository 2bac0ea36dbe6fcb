"""The processes that torchrun has started, on one machine or many, to make one training run.

Every process builds the same network and draws the same order, flips and augmentations as one process would; of each
batch it computes a share. Batch norm has the statistics of the whole batch, DistributedDataParallel averages the
gradients, and the loss of a share is weighted so that this gives the gradient of the whole batch's mean loss. The first
process alone has files, the bar and the last word on random generators.

No exchange has a time limit, as a data set may take an hour to download: `pulse.Pulse` notices a process that is lost.
"""

import itertools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import joblib
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from command_line.flag_types import SettingError
from command_line.signals import STOP_SIGNALS
from image_sets.loading import ImageSet
from run_settings import Settings, determining
from saved_runs.circumstances import code_version
from saved_runs.run import Run
from training.devices import find_device
from training.pulse import FAILING, LEAVING, Pulse
from training.shared_run import SharedRun
from training.synchronized_batch_norm import sync_batch_norms_as_others, synchronize
from training.world import World

FOR_EVER = timedelta(days=365)
JOINING = timedelta(minutes=5)  # for all processes to be there: imports may take long
ENDING = 30.0  # seconds in which processes wait for each other at the end, as the first one may be saving

RUNS = itertools.count()
LOST = (
    "a process of this run has died or does not answer: run the same command again (without --restart), with any number"
    " of processes, to resume after the last saved epoch"
)
# errors that end a command with one line
EXPECTED = (KeyboardInterrupt, FloatingPointError, ValueError, OSError)

Result = TypeVar("Result")


class Processes(World):
    """All processes of a run.

    Attributes:
        first: whether this is the process that prints and writes files.
        rank, size: which process this is, from 0, and how many there are.
        group: those that compute together; with NCCL where each has a GPU of its own, with Gloo otherwise.
    """

    def __init__(self) -> None:
        store, self.rank, self.size = next(dist.rendezvous("env://", timeout=JOINING))
        self.store = dist.PrefixStore(f"run {next(RUNS)}", store)  # what it holds outlives a run
        dist.init_process_group("gloo", store=self.store, rank=self.rank, world_size=self.size, timeout=JOINING)
        self.first, self.local_rank = self.rank == 0, int(os.environ["LOCAL_RANK"])
        self.pulse = Pulse(self.say_lost)
        self.control = dist.new_group(backend="gloo", timeout=FOR_EVER)
        self.group: dist.ProcessGroup | None = None
        self.shared: BaseException | None = None  # the error with which all processes end

    def device(self, name: str | None) -> torch.device:
        if name in (None, "cuda") and torch.cuda.is_available():
            name = f"cuda:{self.local_rank % torch.cuda.device_count()}"
        if name is not None and name.partition(":")[0] not in ("cpu", "cuda"):
            raise SettingError("device", f"several processes compute on cpu or cuda, not on {name}")
        return find_device(name or "cpu")

    def run(self, settings: Settings, stops: list[int] | None) -> Run:
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "code": code_version()}
        self.check_alike(
            {
                "name": settings.run_name,
                "device": torch.device(settings.device).type,
                **determining(settings),
                **versions,
            }
        )
        if settings.compile:
            raise SettingError("compile", "it is for one process, without torchrun")
        if settings.workers is None:
            workers = max(1, joblib.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"]))
            settings = replace(settings, workers=workers)
        gpu = None
        if torch.device(settings.device).type == "cuda":
            torch.cuda.set_device(settings.device)
            gpu = str(torch.cuda.get_device_properties(settings.device).uuid)
        gpus = self.gather(gpu)
        own_gpus = None not in gpus and len(set(gpus)) == self.size and dist.is_nccl_available()
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # it would end the process without a word
        self.group = dist.new_group(backend="nccl" if own_gpus else "gloo", timeout=FOR_EVER)
        return SharedRun(self, settings, stops)

    def together(self, work: Callable[[], Result]) -> Result:
        result, error = None, None
        try:
            result = work()
        except EXPECTED as caught:
            error = caught
        failed = torch.tensor(int(error is not None))
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=self.control)
        if failed:
            self.shared = next(error for error in self.gather(error) if error is not None)
            raise self.shared
        return result

    def load(self, load_images: Callable[[], ImageSet], batch_size: int) -> ImageSet:
        own_turn = 0 if self.first else 1 if self.local_rank == 0 else 2
        loaded = [self.together(load_images if turn == own_turn else lambda: None) for turn in range(3)]
        self.check_images(loaded[own_turn], batch_size)
        return loaded[own_turn]

    def check_alike(self, values: dict[str, object]) -> None:
        """SettingError where these differ between processes."""
        here, *others = self.gather(values)
        for rank, there in enumerate(others, start=1):
            for name, value in here.items():
                if there[name] != value:
                    raise ValueError(
                        f"the processes differ: {name} is {value} in the first one, {there[name]} in process {rank};"
                        " start them all with the same command, versions and images"
                    )

    def check_images(self, image_set: ImageSet, batch_size: int) -> None:
        """Where the processes have other images, or one has none of a training batch or of a whole split."""
        self.check_alike(image_set.notes)
        num_images = {name: len(indices) for name, indices in image_set.splits.items()}
        for name, number in num_images.items():
            if number < self.size:
                raise SettingError("dataset", f"split {name} has {number} images, fewer than {self.size} processes")
        last = num_images["train"] % batch_size or batch_size
        if last < self.size:
            batch = f"a last batch of {last}" if last < batch_size else f"a batch of {batch_size}"
            raise SettingError("batch_size", f"{batch} leaves no image for some of the {self.size} processes")

    def share(self, part: Tensor) -> Tensor:
        return share(part, self.rank, self.size)

    def replicate(self, network: nn.Module, settings: Settings) -> nn.Module:
        super().replicate(network, settings)
        synchronize(network, self.group)
        return Replica(network, process_group=self.group)

    def mean(self, loss: Tensor, num_images: int) -> Tensor:
        here = loss.detach()
        total, number = sums = torch.stack([here * num_images, torch.full_like(here, num_images)])
        dist.all_reduce(sums, group=self.group)
        # the value is the mean of all; the gradient that of this share's part of it, times the number of processes,
        # by which DistributedDataParallel divides
        return total / number + (loss - here) * (self.size * num_images / number)

    def sum(self, *numbers: float) -> tuple[float, ...]:
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums, group=self.control)
        return tuple(sums.tolist())

    def gather(self, value: Any) -> list[Any]:
        """What each process has, in the order of ranks."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_first(self, value: Any) -> Any:
        """What the first process has."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def say_lost(self) -> None:
        """Say that a process is lost, where no other one of this machine has."""
        if self.claim():
            os.write(2, f"train.py: error: {LOST}\n".encode())

    def claim(self) -> bool:
        """Whether this process is the one of its machine to say that another one is lost."""
        try:
            self.store.set_timeout(timedelta(seconds=5))
            return self.store.add(f"lost/{os.environ['GROUP_RANK']}", 1) == 1
        except RuntimeError:  # the store's machine may be the lost one
            return True

    def leave(self, error: BaseException | None) -> None:
        """End this process's part in the run. ConnectionError where `error` is that another process is lost."""
        self.pulse.ending.set()
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # torchrun sends one when the first process ends
        lost = isinstance(error, RuntimeError) and re.search("gloo|nccl|DistStore", f"{error!r}", re.IGNORECASE)
        common = SettingError | ValueError | FloatingPointError | KeyboardInterrupt | SystemExit  # what ends all alike
        agreed = error in (None, self.shared) or isinstance(error, common)
        met = not lost and agreed and self.wait_for_all()
        self.pulse.stop(LEAVING if met else FAILING)
        if lost:
            silence(not self.claim())
            raise ConnectionError(LOST) from None
        if met:
            dist.destroy_process_group()
        silence(met and not self.first and error is not None)

    def wait_for_all(self) -> bool:
        """Wait for all processes to be here; whether they are."""
        deadline = time.monotonic() + ENDING
        with suppress(RuntimeError):
            here = self.store.add("ending", 1)
            while here < self.size and time.monotonic() < deadline:
                time.sleep(0.02)
                here = self.store.add("ending", 0)
            return here >= self.size
        return False


class Replica(DistributedDataParallel):
    """`DistributedDataParallel` for networks with `nn.SyncBatchNorm` too, which it refuses on a CPU."""

    def _passing_sync_batchnorm_handle(self, module: nn.Module) -> None:
        """It only refuses."""


def share(part: Tensor, rank: int, size: int) -> Tensor:
    """What process `rank` of `size` takes of a batch: the shares follow each other, and differ by one at the most."""
    return part[len(part) * rank // size : len(part) * (rank + 1) // size]


def silence(quiet: bool) -> None:
    """Let nothing that this process still prints be seen, as another one says the same."""
    if quiet:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives


@contextmanager
def join() -> Iterator[Processes]:
    """The processes that torchrun has started, of which the first one alone prints. ConnectionError if one is lost."""
    try:
        world = Processes()
    except RuntimeError as error:
        raise ConnectionError(f"the processes cannot reach each other: {error}") from error
    with sync_batch_norms_as_others(), redirect_stdout(sys.stdout if world.first else open(os.devnull, "w")):
        try:
            yield world
        except BaseException as error:
            world.leave(error)
            raise
        world.leave(None)
