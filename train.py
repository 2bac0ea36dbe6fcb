"""Train a network by the method of *Revisiting Batch Norm Initialization* (Davis and Frank, ECCV 2022).

    python train.py --dataset cifar10 --bn_weight 0.1 --c 100 --input_norm bn --seed 1

`train` is one whole run from top to bottom: data, network, parameter groups, optimizer, scheduler, epochs.
"""

import argparse
import math
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn, optim
from tqdm import tqdm

from checkpoint import apply_state, capture_state, lock_run, recover_run, run_files, save_run
from data import DATASETS, load_image_set, make_batches
from networks import INPUT_NORMS, NETWORKS, PRECISIONS, construct_network, speed_up
from results import COLUMNS, Results, Setting, write_results
from seeds import make_deterministic
from weight_decay_and_learning_rate import adjust_weight_decay_and_learning_rate

Batch = tuple[Tensor, Tensor]  # images and labels

SETTINGS = (  # what determines the numbers of a run
    *("dataset", "network", "batch_size", "num_epochs", "learning_rate", "scheduler", "momentum", "weight_decay"),
    *("bn_weight", "c", "input_norm", "seed"),
    *("precision", "compile", "allow_tf32"),
)


def make_parser() -> argparse.ArgumentParser:
    """Every option of a run: what it may be, what it is for, its default."""
    parser = Parser(prog="train.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    flag = parser.add_argument
    # from 1e-30 to 1e30: what float32 can hold, with room for a product of two
    positive = number("a number from 1e-30 to 1e30", lambda x: 1e-30 <= x <= 1e30)
    not_negative = number("0 or a number from 1e-30 to 1e30", lambda x: x == 0 or 1e-30 <= x <= 1e30)
    fraction = number("a number from 0 to below 1", lambda x: 0 <= x < 1)
    reduction = number("0 or 1 (no reduction) or a number from 1 to 1e30", lambda x: x == 0 or 1 <= x <= 1e30)

    flag("--path", default="", type=folder, help="folder of images/, networks/, results/ (default: the current one)")
    flag("--name", default="", type=file_name, help="name of the run's files (default: made from the settings)")
    flag("--dataset", default="cifar10", choices=DATASETS, help="images to train on (default: %(default)s)")
    flag("--network", default="resnet18", choices=NETWORKS, help="network to train (default: %(default)s)")
    flag("--batch_size", default=128, type=whole(1), help="images in a batch (default: %(default)s)")
    flag("--num_epochs", default=180, type=whole(1), help="passes over the training images (default: %(default)s)")
    flag("--learning_rate", default=0.1, type=positive, help="initial learning rate (default: %(default)s)")
    flag("--scheduler", default="cos", choices=("cos", "none"), help="cosine or constant rate (default: %(default)s)")
    flag("--momentum", default=0.9, type=fraction, help="momentum of SGD (default: %(default)s)")
    flag("--weight_decay", default=1e-4, type=not_negative, help="decay of the weights (default: %(default)s)")
    flag("--device", type=device, help="cpu, cuda, cuda:1 ... (default: cuda where there is one, else cpu)")
    flag("--checkpoint_seconds", default=60.0, type=not_negative, help="between checkpoints (default: %(default)g)")
    flag("--restart", action="store_true", help="start over, in place of what a run of this name left")
    # faster, at other roundings
    flag("--precision", default="float32", choices=PRECISIONS, help="of layers and activations (default: %(default)s)")
    flag("--compile", action="store_true", help="compile the network with torch.compile")
    flag("--allow_tf32", action="store_true", help="let a GPU round float32 inputs of products to 10 bits")
    # what the paper is about
    flag("--bn_weight", default=0.1, type=positive, help="initial scale of every batch norm (default: %(default)s)")
    flag("--c", default=100.0, type=reduction, help="divides the learning rate of the scales (default: %(default)g)")
    flag("--input_norm", default="bn", choices=INPUT_NORMS, help="what normalizes the images (default: %(default)s)")
    flag("--seed", default=1, type=whole(0), help="seed of every draw but the split's (default: %(default)s)")
    return parser


def train(
    settings: argparse.Namespace, report: Callable[[str], None] = lambda line: None, show_bar: bool = False
) -> Results:
    """Run the training that the flags describe, or what is left of it, and return what is in its result file.

    Where the files of the run are there already, it goes on after the last saved epoch, to the same numbers as if it
    had never been stopped. Whatever ends it, the epochs that are done are saved.

    Args:
        settings: what `parse` returns.
        report: called with one line of text where an earlier run goes on, and after every epoch.
        show_bar: whether to draw a progress bar on standard error.

    Raises:
        FloatingPointError: a loss is not finite.
        ValueError: the files are of a run with other settings, or a file is damaged.
        FileNotFoundError: the data cannot be had, or there is no compiler for `compile`.
        BlockingIOError: another process works on the same run.
        OSError: a file cannot be read or written.
        torch.OutOfMemoryError: the device has too little memory.
    """
    files = run_files(settings.path, settings.name)
    with lock_run(files):
        results, state = None, None
        if not settings.restart:
            results, state = recover_run(files, {name: getattr(settings, name) for name in SETTINGS})
        done = 0 if results is None else len(results.columns["epoch"])
        if done >= settings.num_epochs:
            report(f"{settings.name} is finished already")
            return results

        make_deterministic(settings.seed)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.allow_tf32
        image_set = load_image_set(settings.dataset, settings.path / "images", settings.device)
        train_batches, val_batches, test_batches = (
            make_batches(image_set, split, settings.batch_size, normalize=settings.input_norm == "dataset")
            for split in ("train", "val", "test")
        )

        network = construct_network(
            settings.network, len(image_set.classes), settings.dataset, settings.bn_weight, settings.input_norm
        ).to(settings.device)
        speed_up(network, settings.device, settings.precision, settings.compile)
        parameters = adjust_weight_decay_and_learning_rate(
            network, settings.weight_decay, settings.learning_rate, settings.c
        )
        optimizer = optim.SGD(parameters, momentum=settings.momentum, fused=settings.device.type == "cuda")
        if settings.scheduler == "cos":
            scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.num_epochs, eta_min=1e-8)
        else:
            scheduler = optim.lr_scheduler.ConstantLR(optimizer, factor=1)

        rows, best_weights, start, last_save = [], None, time.monotonic(), -math.inf
        if state is not None:
            apply_state(state, network, optimizer, scheduler)
            rows = list(zip(*(results.columns[name].tolist() for name in COLUMNS), strict=True))
            best_weights = state["best_weights"]
            start, last_save = start - results.settings["seconds"], start
            report(f"{settings.name} goes on with epoch {done + 1} of {settings.num_epochs}")

        saved = state
        num_images = len(train_batches.dataset)
        total, initial = settings.num_epochs * num_images, done * num_images
        bar = tqdm(total=total, initial=initial, unit="image", unit_scale=True, disable=not show_bar)
        stops = []  # signals: from here on they end the run between two steps, never in the middle of saving it
        with bar, on_signals(stops.append):
            try:
                for epoch in range(done + 1, settings.num_epochs + 1):
                    train_loss = train_one_epoch(network, until(stops, train_batches), optimizer, epoch, bar)
                    scheduler.step()
                    val_loss, val_accuracy = evaluate(network, until(stops, val_batches))
                    _, test_accuracy = evaluate(network, until(stops, test_batches))
                    check_finite(val_loss, f"the validation loss after epoch {epoch}")

                    rows.append((epoch, train_loss, val_loss, val_accuracy, test_accuracy))
                    columns = dict(zip(COLUMNS, map(np.array, zip(*rows, strict=True)), strict=True))
                    results = Results(describe(settings, time.monotonic() - start, results), columns)
                    if results.best_epoch == epoch:
                        best_weights = {name: value.cpu().clone() for name, value in network.state_dict().items()}
                    state = capture_state(results, best_weights, network, optimizer, scheduler)
                    if time.monotonic() - last_save > settings.checkpoint_seconds or epoch == settings.num_epochs:
                        save_run(files, state)
                        saved, last_save = state, time.monotonic()
                    else:
                        write_results(files.results, results)
                    report(
                        f"epoch {epoch}/{settings.num_epochs}: train loss {train_loss:.6f}, val loss {val_loss:.6f}, "
                        f"val accuracy {val_accuracy:.3f} %, test accuracy {test_accuracy:.3f} %"
                    )
            finally:
                if saved is not state:
                    save_run(files, state)
        return results


def until(stops: list[int], batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, or KeyboardInterrupt with the number of a signal as soon as there is one in `stops`."""
    for batch in batches:
        if stops:
            raise KeyboardInterrupt(stops[0])
        yield batch


def train_one_epoch(
    network: nn.Module, batches: Iterable[Batch], optimizer: optim.Optimizer, epoch: int, bar: tqdm
) -> float:
    """Train on every batch once; returns the mean loss of the batches. FloatingPointError where one is not finite."""
    network.train()
    bar.set_description(f"epoch {epoch}", refresh=False)
    losses = []
    for images, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images).float(), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if loss.device.type == "cpu":  # elsewhere, reading a loss would make every step wait for the device
            check_finite(loss.item(), f"the loss at epoch {epoch}, step {len(losses)}")
        if bar.update(len(labels)):  # only now and then is the bar drawn, and the loss needed
            bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
    values = torch.stack(losses).tolist()
    for step, loss in enumerate(values, start=1):
        check_finite(loss, f"the loss at epoch {epoch}, step {step}")
    return add_up(values) / len(values)


@torch.inference_mode()
def evaluate(network: nn.Module, batches: Iterable[Batch]) -> tuple[float, float]:
    """Loss (mean over the images) and accuracy (in percent) of a network on every batch, in evaluation mode."""
    network.eval()
    losses, correct, num_images = [], [], 0
    for images, labels in batches:
        num_images += len(labels)
        logits = network(images).float()
        losses.append(F.cross_entropy(logits, labels, reduction="sum"))
        correct.append((logits.argmax(1) == labels).sum())
    loss = add_up(torch.stack(losses).tolist()) / num_images
    return loss, torch.stack(correct).sum().item() / num_images * 100


def add_up(losses: list[float]) -> float:
    """The sum, added one by one: from Python 3.12 on, `sum` rounds otherwise."""
    total = 0.0
    for loss in losses:
        total += loss
    return total


def check_finite(loss: float, what: str) -> None:
    """FloatingPointError where a loss is not a finite number."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"{what} is {loss}: the training has diverged; try a smaller --learning_rate")


def describe(settings: argparse.Namespace, seconds: float, earlier: Results | None) -> dict[str, Setting]:
    """The settings of a run and what else produced its numbers, for the result file.

    Where a run went on in another place, the file names both.
    """
    produced = {
        "device": str(settings.device),
        "machine": machine_name(settings.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    for key, value in produced.items():
        places = earlier.settings[key].split(", then ") if earlier else []
        produced[key] = ", then ".join(places if places[-1:] == [value] else [*places, value])
    seed_and_flags = {name: getattr(settings, name) for name in SETTINGS}
    return {"name": settings.name, **seed_and_flags, **produced, "seconds": round(seconds, 1)}


def machine_name(device: torch.device) -> str:
    """The name of a GPU, or of a CPU what its rounding depends on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} with {instructions}, {torch.get_num_threads()} threads"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of a run from its flags, complete and checked. ValueError names the flag that is wrong."""
    parser = make_parser()
    settings = parser.parse_args(argv)
    if settings.device is None:
        settings.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not settings.name:
        values = (f"weight{short(settings.bn_weight)}", f"c{short(settings.c)}", settings.input_norm)
        modes = {"bfloat16": settings.precision != "float32", "compiled": settings.compile, "tf32": settings.allow_tf32}
        values += tuple(mode for mode, chosen in modes.items() if chosen)
        settings.name = "-".join((settings.dataset, settings.network, *values, f"seed{settings.seed}"))
    size = DATASETS[settings.dataset]
    if settings.batch_size > size.num_train:
        parser.error(
            f"argument --batch_size: {settings.dataset} has {size.num_train} training images,"
            f" fewer than a batch of {settings.batch_size}"
        )
    if (size.num_train - 1) % settings.batch_size == 0 and not trains_on_one_image(settings, size.pixels):
        parser.error(
            f"argument --batch_size: {settings.batch_size} leaves a last batch of one of the {size.num_train} training"
            f" images of {settings.dataset}, where batch norm cannot train on one; take another size"
        )
    return settings


def trains_on_one_image(settings: argparse.Namespace, pixels: int) -> bool:
    """Whether every batch norm of the network gets more than one value a channel from a single image."""
    with torch.device("meta"):  # shapes only: nothing is drawn or computed
        network = construct_network(settings.network, dataset=settings.dataset, input_norm=settings.input_norm)
        try:
            network(torch.empty(1, 3, pixels, pixels))
        except ValueError:
            return False
    return True


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ValueError where it would print the list of all flags and end the program."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def folder(text: str) -> Path:
    """The folder that `--path` names; it need not be there yet."""
    if text and not text.isprintable():
        raise argparse.ArgumentTypeError(f"must be one line of printable text, not {text!r}")
    try:
        path = Path(text).expanduser()
        there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    except (OSError, RuntimeError) as error:  # a name that is too long; a home that nobody has
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a folder: {error}") from None
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a folder: {there} is a file")
    return path


def file_name(text: str) -> str:
    """A name that files can have on any system."""
    if (text and not re.fullmatch(r"\w[\w.+=-]*", text)) or len(text.encode()) > 200:
        raise argparse.ArgumentTypeError(
            f"must be at most 200 letters, digits and . _ + = - and start with a letter or digit, not {text!r}"
        )
    return text


def device(text: str) -> torch.device:
    """A device that is there."""
    try:
        torch.empty(1, device=text).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # what torch raises differs by device
        here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used; here are: {', '.join(here)} ({reason})") from error
    return torch.device(text)


def whole(minimum: int) -> Callable[[str], int]:
    """The type of a flag that takes a whole number of at least `minimum`."""

    def convert(text: str) -> int:
        if not re.fullmatch(r"\d{1,18}", text, re.ASCII) or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, not {text!r}")
        return int(text)

    return convert


def number(what: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    """The type of a flag that takes a number that is `allowed` (NaN must not be), which `what` puts into words."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")
        return value or 0.0  # not -0.0

    return convert


def short(value: float) -> str:
    """A number as one would type it: 100 for 100.0."""
    return str(value).removesuffix(".0")


@contextmanager
def on_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Call `handle` with the number of the first SIGINT (Ctrl-C) or SIGTERM that comes.

    A second SIGINT ends the process at once. SIGTERM is then ignored: clusters repeat it while a run is being saved.
    """

    def first(number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        handle(number)

    if threading.current_thread() is not threading.main_thread():  # where Python cannot handle signals
        yield
        return
    earlier = {number: signal.signal(number, first) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def interrupt(number: int) -> NoReturn:
    """Raise KeyboardInterrupt with the number of a signal."""
    raise KeyboardInterrupt(number)


def main(argv: Sequence[str] | None = None) -> Results:
    """The command line. Returns the results of the run.

    Exit codes: 2 for a wrong flag, 1 where the run fails, 130 and 143 where Ctrl-C and SIGTERM stop it.
    """

    def report(line: str) -> None:
        tqdm.write(line)
        sys.stdout.flush()

    settings = None
    try:
        with on_signals(interrupt):
            settings = parse(argv)
            results = train(settings, report, show_bar=sys.stdout.isatty())
    except KeyboardInterrupt as stop:
        again = "without --restart" if settings and settings.restart else "again"
        end(
            128 + (stop.args[0] if stop.args else signal.SIGINT),
            f"stopped; the epochs that are done are saved: give the same command {again} to go on",
        )
    except (FloatingPointError, ValueError, OSError) as error:
        end(2 if settings is None else 1, f"error: {error}")
    except (RuntimeError, MemoryError) as error:
        words = r"out of memory|allocate memory|alloc_failed|memory object"
        full = isinstance(error, MemoryError) or re.search(words, str(error), re.IGNORECASE)
        if settings is None or not full:
            raise
        end(1, f"error: {settings.device} has too little memory: give a smaller --batch_size or another --device")
    files = run_files(settings.path, settings.name)
    weights = f", weights in {files.best_weights}" if files.best_weights.exists() else ""
    print(
        f"best epoch {results.best_epoch}: val accuracy {results.val_accuracy:.3f} %,"
        f" test accuracy {results.test_accuracy:.3f} %, {results.settings['seconds']:.1f} seconds;"
        f" numbers in {files.results}{weights}"
    )
    return results


def end(code: int, message: str, program: str = "train.py") -> NoReturn:
    """End the program with one line on standard error."""
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
