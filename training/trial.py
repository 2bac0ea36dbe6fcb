"""What is tried on a copy of the network before a training: whether it can train, be saved, and be resumed."""

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from command_line.endings import in_one_line
from command_line.flag_types import SettingError
from image_sets.folders import Size
from image_sets.loading import ImageSet
from networks import find_seed_problem
from run_settings import Settings, check_batch_size
from saved_runs.checkpoint import load_saved
from seeds import keep_random_states
from training.preparation import construct, rewrite
from training.run import Report


def check_network(
    settings: Settings, network: nn.Module, image_set: ImageSet, report: Report = lambda line: None
) -> None:
    """SettingError where a run's network cannot train on batches of these images, or not be resumed.

    Nothing is drawn or changed. `report` is called with what there is to warn of.
    """
    num_train, num_classes = len(image_set.splits["train"]), len(image_set.classes)
    check_batch_size(settings, num_train)
    with refusing("network", f"{settings.network} cannot be copied"):
        trial = copy.deepcopy(network).cpu().train()
    height, width = image_set.size
    with refusing("network", f"{settings.network} cannot train on two images of {height}×{width} pixels"):
        logits = try_images(trial, 2, image_set.size)
    check_output(settings, logits, num_classes)
    if (num_train - 1) % settings.batch_size == 0:
        last = f"a last batch of one of the {num_train} training images of {settings.dataset}"
        with refusing("batch_size", f"{settings.batch_size} leaves {last}, and {settings.network} cannot train on one"):
            try_images(trial, 1, image_set.size)
    if ":" in settings.network:  # torchvision's need not be built once more to know it
        check_state(settings, trial, image_set)
    if settings.equivalent != "no":
        with keep_random_states():
            rewrite(trial, settings, torch.rand(2, 3, *image_set.size))
    if problem := find_seed_problem(settings.network, num_classes):
        report(problem)


@contextmanager
def refusing(name: str, problem: str) -> Iterator[None]:
    """SettingError of this setting where what is within it fails, or ends the program."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise SettingError(name, f"{problem}: {in_one_line(error)}") from error


def check_output(settings: Settings, logits: Any, num_classes: int, training: bool = True) -> None:
    """SettingError where a network computes this for two images, and cannot be trained or evaluated with it."""
    what = None
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (2, num_classes):
        what = f"{shape} for 2 images, not logits {(2, num_classes)}"
    elif not logits.is_floating_point():
        what = f"logits of type {logits.dtype}, not real numbers"
    elif not logits.isfinite().all():
        what = "values that are not finite before its first step"
    elif training and not logits.requires_grad:
        what = "logits from which no gradient leads to its parameters"
    if what:
        raise SettingError("network", f"{settings.network} computes {what}{'' if training else ' in evaluation mode'}")


def check_state(settings: Settings, trial: nn.Module, image_set: ImageSet) -> None:
    """SettingError where a network does not compute the same when its `state_dict` has been saved and loaded.

    Such a run could not be resumed to the same numbers, and its saved weights would be of another network.
    """
    with keep_random_states():
        try_images(trial, 2, image_set.size)
        anew = construct(settings, len(image_set.classes), image_set.size)
        with refusing("network", f"{settings.network} cannot be saved and resumed"):
            torch.save(trial.state_dict(), saved := io.BytesIO())
            anew.load_state_dict(load_saved(saved.getvalue()))
        for training in (False, True):
            with refusing("network", f"{settings.network} cannot be {'trained' if training else 'evaluated'}"):
                outputs = [try_images(network.train(training), 2, image_set.size, seed=1) for network in (trial, anew)]
            check_output(settings, outputs[0], len(image_set.classes), training)
            if not torch.equal(*outputs):
                problem = "what it computes depends on more than its state_dict, so it cannot be saved and resumed"
                remedy = "keep that in a buffer or in get_extra_state"
                raise SettingError("network", f"{settings.network}: {problem}; {remedy}")


def try_images(network: nn.Module, num_images: int, size: Size, seed: int = 0) -> Any:
    """What a network on the CPU computes of random images (num_images, 3, *size), drawn with this seed.

    Random generators stay as they are. Raises what the network raises.
    """
    with keep_random_states(), torch.enable_grad():
        torch.manual_seed(seed)
        return network(torch.rand(num_images, 3, *size))
