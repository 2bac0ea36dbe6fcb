"""Devices, precision, compilation."""

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import Tensor, nn

from batch_norm import debias_running_statistics
from command_line.flag_types import SettingError
from run_settings import Settings


def find_device(name: str | None) -> torch.device:
    """The device of that name, by default the accelerator that torch finds, else the CPU. SettingError if missing."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    try:
        device = torch.device(name if name is not None else accelerator or "cpu")
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # what torch raises differs by device
        found = ["cpu", *(f"{accelerator.type}:{n}" for n in range(torch.accelerator.device_count()) if accelerator)]
        problem = "cannot be used" if name in found else f"is not one of {', '.join(found)}"
        reason = str(error).partition("\n")[0]
        raise SettingError("device", f"{name!r} {problem} ({reason})") from error
    return device


def keep_freed_memory() -> None:
    """Let this process keep memory that is freed for what is allocated next, if its C library is glibc.

    From 32 MiB on, as activations of 128 × 64 × 32 × 32 in float32 have, glibc gives every block back to the system,
    which clears it anew at every step. Numbers stay the same.
    """
    trim_threshold, mmap_max = -1, -4  # as in malloc.h
    with suppress(AttributeError, OSError, TypeError):  # another C library, or none that Python finds
        c_library = ctypes.CDLL(None)
        c_library.mallopt(mmap_max, 0)
        c_library.mallopt(trim_threshold, 2**31 - 1)


def speed_up(network: nn.Module, precision: str = "float32", compiled: bool = False) -> None:
    """Prepare a network, and this process, for fast training; some modes round differently. In place.

    Weights, their gradients, the statistics of batch norm and the names in `state_dict` stay as they are. A copy of the
    network (`copy.deepcopy`) is not compiled.

    Args:
        network: any module, on the device where it will compute.
        precision: as in `Settings`. For 'bfloat16', the channels of a pixel are put next to each other in memory.
        compiled: whether to compile it, with CUDA graphs on a GPU, for each size of the batches that it is called
            with. `torch.compiler.set_stance("force_eager")` spares a size that comes too seldom, such as that of a
            short last batch.

    Raises:
        FileNotFoundError: there is no compiler to compile with.
    """
    on_gpu = any(parameter.is_cuda for parameter in network.parameters())
    if not on_gpu:
        keep_freed_memory()
    if precision == "bfloat16":
        for weight in filter(lambda parameter: parameter.dim() == 4, network.parameters()):
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    if compiled:
        if not any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))):
            raise FileNotFoundError("there is no C++ compiler here: install g++, let CXX name one, or do not compile")
        # for how many kinds of networks and batches a process compiles: torch computes without compiling after that
        torch.compiler.config.recompile_limit = 64
        network.compile(mode="reduce-overhead" if on_gpu else "default", dynamic=False)


def compute_logits(network: nn.Module, images: Tensor, settings: Settings) -> Tensor:
    """The network's outputs (N, classes), in float32 whatever the precision is."""
    short = settings.compile and len(images) != settings.batch_size  # compiling for it would take longer than it saves
    with (
        torch.compiler.set_stance("force_eager") if short else nullcontext(),
        torch.autocast(images.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"),
    ):
        return network(images).float()


@contextmanager
def evaluating(network: nn.Module, settings: Settings) -> Iterator[None]:
    """Within it, a network is as it is evaluated: in evaluation mode; with `debias`, without its statistics' start."""
    network.eval()
    with debias_running_statistics(network) if settings.debias else nullcontext():
        yield


@contextmanager
def use_precision(precision: str) -> Iterator[None]:
    """Let torch compute float32 products and convolutions in this precision, whatever was set before.

    'float32' and 'bfloat16' are torch's own settings: a GPU rounds the inputs of convolutions, but not of products, to
    the 10 bits of tf32. 'tf32' rounds both, 'strict' neither. A CPU computes in full float32 in any case.
    """
    convolutions = "ieee" if precision == "strict" else "tf32"
    products = "tf32" if precision == "tf32" else "ieee"
    backends = torch.backends
    wanted = {backends.cuda.matmul: products, backends.cudnn.conv: convolutions, backends.cudnn.rnn: convolutions}
    wanted |= {backends.mkldnn.matmul: "ieee", backends.mkldnn.conv: "ieee"}
    earlier = {backend: backend.fp32_precision for backend in wanted}
    try:
        for backend, value in wanted.items():
            backend.fp32_precision = value
        yield
    finally:
        for backend, value in earlier.items():
            backend.fp32_precision = value
