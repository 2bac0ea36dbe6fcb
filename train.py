"""Train a network by the method of *Revisiting Batch Norm Initialization* (Davis and Frank, ECCV 2022).

    python train.py --dataset cifar10 --bn_weight 0.1 --c 100 --input_norm bn --seed 1

`train` is one whole run from top to bottom: data, network, parameter groups, optimizer, schedule, epochs. Its settings
are in `run_settings.py`; what is checked before, saved, and shared between processes, in `training/`.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial, reduce
from operator import add

import run_settings
from command_line.endings import HOW_TO_RESUME, answer_at_once, one_line_endings, say, shows_bar
from command_line.signals import stop_at_end_of_input

if __name__ == "__main__":
    answer_at_once("train.py", run_settings.parse)  # before torch is imported, which takes seconds

import torch
import torch.nn.functional as F
from torch import nn, optim

from image_sets.batches import Batch, Batches
from run_settings import Settings
from saved_runs.results import Results, run_files
from seeds import make_deterministic
from training import together
from training.devices import compute_logits, evaluating, speed_up, use_precision
from training.preparation import construct, load_images, prepare, rewrite
from training.run import Report, Run
from training.trial import check_network
from weight_decay_and_learning_rate import adjust_weight_decay_and_learning_rate


def train(settings: Settings, report: Report = lambda line: None, show_bar: bool = False) -> Results:
    """Run the training that the settings describe, or what is left of it, and return what is in its result file.

    A run that was stopped is resumed after the last saved epoch, to the same numbers as if it had never been stopped.
    Whatever ends it, the epochs that are done are saved.

    Args:
        settings: such as `Settings(dataset="digits", num_epochs=5)`.
        report: called with each line to show: some at the start, one after every epoch, and warnings.
        show_bar: whether to draw a progress bar on standard error.

    Raises:
        FloatingPointError: a loss is not finite.
        ValueError: a setting is wrong (SettingError); a file is of a run with other settings, or damaged.
        OSError: the data cannot be had, a file not read or written; AtWorkError: another process works on the run.
    """
    settings = prepare(settings)
    with Run(settings, report, show_bar) as run, use_precision(settings.precision):
        if run.finished_before(partial(load_images, settings)):
            return run.results
        make_deterministic(settings.seed)
        image_set = load_images(settings, report, show_bar)
        train_batches, val_batches, test_batches = (
            Batches(image_set, split, settings.batch_size, settings.input_norm == "dataset", together.share)
            for split in ("train", "val", "test")
        )

        network = construct(settings, len(image_set.classes), image_set.size, report)
        check_network(settings, network, image_set, report)
        network.to(settings.device)
        groups = adjust_weight_decay_and_learning_rate(
            network, settings.weight_decay, settings.learning_rate, settings.c
        )
        if settings.equivalent != "no":
            network, groups = rewrite(network, settings)
        optimizer = optim.SGD(groups, momentum=settings.momentum, fused=settings.device.startswith("cuda"))
        if settings.scheduler == "cos":
            scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.num_epochs, eta_min=1e-8)
        else:
            scheduler = optim.lr_scheduler.ConstantLR(optimizer, factor=1)

        run.resume(network, optimizer, scheduler, image_set)
        speed_up(network, settings.precision, settings.compile)
        replica = together.replicate(network)
        for epoch in run.epochs:
            train_loss = train_one_epoch(replica, run.steps(train_batches), optimizer, settings)
            scheduler.step()
            val_loss, val_accuracy = measure(network, run.steps(val_batches), settings)
            _, test_accuracy = measure(network, run.steps(test_batches), settings)
            check_finite(val_loss, f"the validation loss after epoch {epoch}")
            run.record(epoch, train_loss, val_loss, val_accuracy, test_accuracy)
        return run.results


def train_one_epoch(
    network: nn.Module, batches: Iterable[Batch], optimizer: optim.Optimizer, settings: Settings
) -> float:
    """Train on every batch once; returns the mean loss of the batches. FloatingPointError where one is not finite."""
    network.train()
    losses = []
    for images, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(compute_logits(network, images, settings), labels)
        loss = together.mean(loss, len(labels))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if loss.device.type == "cpu":  # elsewhere, reading a loss would make every step wait for the device
            check_finite(loss.item(), f"the loss of step {len(losses)}")
    values = torch.stack(losses).tolist()
    for step, loss in enumerate(values, start=1):
        check_finite(loss, f"the loss of step {step}")
    return reduce(add, values) / len(values)  # one by one: from Python 3.12 on, `sum` rounds differently


@torch.no_grad()
def measure(network: nn.Module, batches: Iterable[Batch], settings: Settings) -> tuple[float, float]:
    """Loss (mean over the images) and accuracy (in percent) of a network on every batch, in evaluation mode."""
    losses, correct, num_images = [], [], 0
    with evaluating(network, settings):
        for images, labels in batches:
            num_images += len(labels)
            logits = compute_logits(network, images, settings)
            losses.append(F.cross_entropy(logits, labels, reduction="sum"))
            correct.append((logits.argmax(1) == labels).sum())
    loss, num_correct = reduce(add, torch.stack(losses).tolist()), torch.stack(correct).sum().item()
    loss, num_correct, num_images = together.total(loss, num_correct, num_images)
    return loss / num_images, num_correct / num_images * 100


def check_finite(loss: float, what: str) -> None:
    """FloatingPointError where a loss is not a finite number."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"{what} is {loss}: the training has diverged; try a smaller learning_rate")


def main(argv: Sequence[str] | None = None) -> Results:
    """The command line; see `one_line_endings` for its exit codes. Returns the results of the run."""
    with one_line_endings("train.py", HOW_TO_RESUME), together.joined():
        stop_at_end_of_input()
        settings = together.agree(lambda: run_settings.parse(argv))
        files = run_files(settings.path, settings.run_name)
        results = train(settings, say, show_bar=together.rank() == 0 and shows_bar())
        weights = f", weights in {files.best_weights}" if files.best_weights.exists() else ""
        say(
            f"best epoch {results.best_epoch}: val accuracy {results.val_accuracy:.3f} %,"
            f" test accuracy {results.test_accuracy:.3f} %, {results.header.get('seconds')} seconds;"
            f" numbers in {files.results}{weights}"
        )
    return results


if __name__ == "__main__":
    main()
