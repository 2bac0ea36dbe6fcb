"""One training run on all processes that torchrun has started; alone, everything here does nothing.

Every process builds the same network and draws the same order, flips and augmentations as one process would; of each
batch it computes a share. Batch norm has the statistics of the whole batch, DistributedDataParallel averages the
gradients, and the loss of a share is weighted so that this gives the gradient of the whole batch's mean loss. The first
process alone has files, prints, and has the last word on random generators.

A process that dies closes its connections, and torchrun ends the others. A machine that falls silent is noticed when an
exchange with it takes longer than `EXCHANGE`.
"""

import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from command_line.flag_types import SettingError
from command_line.signals import LAUNCHED
from image_sets.batches import Batch
from seeds import random_states, set_random_states
from training.devices import find_device
from training.synchronized_batch_norm import WholeBatch, synchronize

EXCHANGE = timedelta(minutes=10)
LOADING = timedelta(hours=2)  # while another process downloads or decodes images
ENDING = timedelta(minutes=1)  # while the first one saves the run
LOST = (
    "a process of this run has died or does not answer: run the same command again (without --restart), with any number"
    " of processes, to resume after the last saved epoch"
)
# errors that end a command with one line, and in all processes alike
EXPECTED = (KeyboardInterrupt, FloatingPointError, ValueError, OSError)

GROUPS: dict[timedelta, dist.ProcessGroup] = {}  # all processes, by how long they wait for each other
Result = TypeVar("Result")


def rank() -> int:
    """Which process this is; 0 is the first one, which has the files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined() -> Iterator[None]:
    """Take part in the run of all processes that torchrun has started. ConnectionError if one of them is lost."""
    if not LAUNCHED:
        yield
        return
    nn.SyncBatchNorm.forward = _BatchNorm.forward  # torch's own refuses a CPU; `synchronize` does its work
    own_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]) and dist.is_nccl_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if own_gpus else "gloo", timeout=EXCHANGE)
        GROUPS.update({time: dist.new_group(backend="gloo", timeout=time) for time in (EXCHANGE, LOADING, ENDING)})
    except RuntimeError as error:
        raise ConnectionError(f"the processes cannot reach each other: {error}") from error
    try:
        with redirect_stdout(open(os.devnull, "w") if rank() else sys.stdout):
            yield
    except EXPECTED:
        silence(rank() > 0)
        with suppress(RuntimeError):  # torchrun ends the others as soon as one has ended
            dist.barrier(GROUPS[ENDING])
            leave()
        raise
    except RuntimeError as error:
        if not re.search("gloo|nccl|DistStore", f"{error!r}", re.IGNORECASE):
            raise
        silence(int(os.environ["LOCAL_RANK"]) > 0)
        raise ConnectionError(LOST) from None
    leave()


def leave() -> None:
    """End this process's part in the run."""
    dist.destroy_process_group()
    GROUPS.clear()


def silence(quiet: bool) -> None:
    """Let nothing that this process still prints be seen, as another one says the same."""
    if quiet:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives


def device_of(name: str | None) -> torch.device:
    """The device on which this process computes; every one has a GPU of its own if there are enough."""
    if size() > 1:
        if name not in (None, "cpu", "cuda"):
            raise SettingError("device", f"several processes compute on cpu, or on cuda with a GPU each, not on {name}")
        on_gpu = name != "cpu" and torch.cuda.is_available()
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}" if on_gpu else name or "cpu"
    return find_device(name)


def agree(work: Callable[[], Result], patience: timedelta = EXCHANGE) -> Result:
    """What `work` returns here, when all processes have done theirs; an error of one is raised in all."""
    if size() == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except EXPECTED as caught:
        error = caught
    group, failed = GROUPS[patience], torch.tensor(int(error is not None))
    dist.all_reduce(failed, dist.ReduceOp.MAX, group=group)
    if failed:
        errors = [None] * size()
        dist.all_gather_object(errors, error, group=group)
        raise next(error for error in errors if error is not None)
    return result


def check_same(values: dict[str, Any]) -> None:
    """ValueError in all processes, with the names of what differs, unless all have the same values."""
    first = from_first(values)
    differ = [name for name, value in values.items() if first.get(name) != value]

    def check() -> None:
        if differ:
            names, remedy = ", ".join(differ), "start them all with the same command, versions and images"
            raise ValueError(f"the processes differ in {names}: {remedy}")

    agree(check)


def in_turn(load: Callable[[], Result]) -> Result:
    """What `load` returns in each process: first in the first one, then in one of each machine, then in the rest.

    So a file is written, as by a download, before others read it.
    """
    own_turn = 0 if rank() == 0 else 1 if os.environ["LOCAL_RANK"] == "0" else 2
    loaded = [agree(load if turn == own_turn else lambda: None, LOADING) for turn in range(3 if size() > 1 else 1)]
    return loaded[own_turn]


def share(part: Tensor) -> Tensor:
    """This process's part of a tensor with one entry per image of a batch; parts differ by at most one entry."""
    return part[len(part) * rank() // size() : len(part) * (rank() + 1) // size()]


def in_step(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches; in several processes, all are at the same one, with the order and the flips that the first draws.

    A signal that one of them gets, or an image that is damaged, ends all at the same step.
    """
    if size() == 1:
        yield from batches
        return
    set_random_states(from_first(random_states()))
    remaining = iter(batches)
    batch = agree(lambda: next(remaining, None))
    if rank():  # from here on, dropout differs between the processes
        seed = torch.randint(2**32, (rank(),))[-1].item()
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
    while batch is not None:
        if len(batch[1]):  # or else this process has no share of the last images of an evaluation
            yield batch
        batch = agree(lambda: next(remaining, None))


def mean(loss: Tensor, num_images: int) -> Tensor:
    """The mean loss of the whole batch, from the mean loss of this process's share of so many images."""
    if size() == 1:
        return loss
    here = loss.detach()
    total_loss, number = sums = torch.stack([here * num_images, torch.full_like(here, num_images)])
    dist.all_reduce(sums)
    # the value is the mean of all; the gradient that of this share's part of it, times the number of processes, by
    # which DistributedDataParallel divides
    return total_loss / number + (loss - here) * (size() * num_images / number)


def total(*numbers: float) -> tuple[float, ...]:
    """The sum over the processes of each number."""
    if size() == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return tuple(sums.tolist())


def from_first(value: Any) -> Any:
    """What the first process has."""
    values = [value]
    if size() > 1:
        dist.broadcast_object_list(values, group=GROUPS[EXCHANGE])
    return values[0]


class Replica(DistributedDataParallel):
    """`DistributedDataParallel` for networks with `nn.SyncBatchNorm` too, which it refuses on a CPU."""

    def _passing_sync_batchnorm_handle(self, module: nn.Module) -> None:
        """It only refuses."""

    def forward(self, images: Tensor) -> Any:
        with WholeBatch():  # for a network that calls `F.batch_norm` outside of a layer
            return super().forward(images)


def replicate(network: nn.Module) -> nn.Module:
    """The network as it is trained: it computes a share, and its gradients become those of the whole batch.

    SettingError where a batch norm cannot have the statistics of the whole batch.
    """
    if size() == 1:
        return network
    try:
        synchronize(network)
    except ValueError as error:
        raise SettingError("network", str(error)) from error
    return Replica(network)
