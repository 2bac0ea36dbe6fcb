"""Images that are too large to be kept decoded: streamed by several processes, ahead of time."""

import atexit
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from multiprocessing.util import Finalize

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from command_line.endings import in_one_line
from command_line.signals import STOP_SIGNALS
from image_sets.folders import Images, Size, get_image, resize

Key = tuple[int, int | None]  # which image, and the seed of its augmentation, None for none

MARGIN = 256 / 224  # for evaluation, images are resized by this much more before their centre is cropped


class StreamedImages:
    """Images that are decoded anew each time, ahead of time, by so many processes; with `workers` = 0 by this one.

    For training, a random part of an image is resized (torchvision's RandomResizedCrop) and, with `flip`, mirrored half
    of the time; both follow the seed in its key alone, whichever process does it. For evaluation, an image is resized
    and its centre cropped.
    """

    def __init__(self, images: Images, size: Size, flip: bool, workers: int, pin_memory: bool = False) -> None:
        self.size = size
        self.plan = Plan()
        options = {"batch_sampler": self.plan, "collate_fn": stack, "pin_memory": pin_memory}
        options |= {"num_workers": workers, "persistent_workers": workers > 0, "worker_init_fn": leave_signals}
        options |= {"generator": torch.Generator()}  # it draws seeds for its processes, which nothing here depends on
        with warnings.catch_warnings(action="ignore"):  # of more processes than cores, which someone asked for
            self.loader = DataLoader(Decoder(images, size, flip), **options)
        # at exit, before torch's own function for it, after which it leaves the processes to Python
        atexit.register(Finalize(self, end_workers, [self.loader]))

    def batches(self, keys: Iterable[Sequence[Key]]) -> Iterator[Tensor]:
        """A batch for each of the `keys`, uint8 (n, 3, H, W), on the CPU.

        Raises:
            ValueError: a file does not hold a whole image; or another pass has begun, and has the processes now.
            ChildProcessError: a process that decodes was killed.
        """
        self.plan.keys = keys
        try:
            iterator = start(self.loader)
            while True:
                batch = next(iterator, None)
                if self.loader.num_workers and self.plan.keys is not keys:
                    raise ValueError("two loops share one pool of workers: finish the first, or load with workers=0")
                if batch is None:
                    return
                if isinstance(batch, str):
                    raise ValueError(batch)
                yield batch
        except (RuntimeError, ConnectionError, EOFError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise ChildProcessError(
                f"a process that decodes images was lost ({in_one_line(error)}); fewer workers take less memory"
            ) from error


class Decoder(Dataset):
    """What a process does with the key of an image; see `StreamedImages`."""

    def __init__(self, images: Images, size: Size, flip: bool) -> None:
        self.images, self.size = images, size
        self.augment = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(0.5 * flip)])

    def __getitem__(self, key: Key) -> Tensor | str:
        """One image, uint8 (3, H, W), or what is wrong with it: errors would lose their form between processes."""
        index, seed = key
        try:
            return get_image(self.images, index, partial(self.fit, seed))
        except (OSError, ValueError) as error:
            return str(error)

    def fit(self, seed: int | None, image: Tensor) -> Tensor:
        """The image as it is for evaluation, or for training by its seed."""
        if seed is None:
            return resize(image, self.size, MARGIN)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.augment(image)


class Plan(Sampler):
    """The keys of the batches to come, for a DataLoader that keeps its processes from one epoch to the next."""

    keys: Iterable[Sequence[Key]] = ()

    def __iter__(self) -> Iterator[Sequence[Key]]:
        return iter(self.keys)


def stack(items: Sequence[Tensor | str]) -> Tensor | str:
    """The images of a batch in one tensor, or the first complaint."""
    if not items:  # the share of a process in a batch of fewer images than processes
        return torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    return next((item for item in items if isinstance(item, str)), None) or torch.stack(items)


def start(loader: DataLoader) -> Iterator[Tensor | str]:
    """An iterator of a DataLoader that finds out about a dead process when it waits for it.

    A handler of torch's would raise the news wherever the program is, in the middle of saving a run as well.
    """
    earlier = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    with warnings.catch_warnings(action="ignore"):  # as above
        iterator = iter(loader)
    if earlier is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, earlier)
    return iterator


def leave_signals(_: int) -> None:
    """Let a process leave the signals that stop a run to its parent, after whose end torch ends it within seconds."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers(loader: DataLoader) -> None:
    """End the processes of a DataLoader, which do not heed the signal by which Python would end them."""
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()
        loader._iterator = None
