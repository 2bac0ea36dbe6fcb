"""What is tried on a copy of the network before a training: whether it can train, be saved, and be resumed."""

import copy
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    check_saving(settings, network)
    with refusing("network", f"{settings.network} cannot be copied"):
        trial = copy.deepcopy(network).cpu().train()
    height, width = image_set.size
    with refusing("network", f"{settings.network} cannot train on two images of {height}×{width} pixels"):
        logits = try_images(trial, 2, image_set.size)
    check_logits(settings, logits, num_classes)
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


def check_logits(settings: Settings, logits: Any, num_classes: int) -> None:
    """SettingError where a network computes this for two images, and cannot be trained with it."""
    what = None
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (2, num_classes):
        what = f"{shape} for 2 images, not logits {(2, num_classes)}"
    elif not logits.is_floating_point():
        what = f"logits of type {logits.dtype}, not real numbers"
    elif not logits.isfinite().all():
        what = "values that are not finite before its first step"
    elif not logits.requires_grad:
        what = "logits from which no gradient leads to its parameters"
    if what:
        raise SettingError("network", f"{settings.network} computes {what}")


def check_saving(settings: Settings, network: nn.Module) -> None:
    """SettingError where the `state_dict` holds what could be saved, but not be loaded again."""
    for name, value in network.state_dict().items():
        if isinstance(value, Tensor):
            continue
        kind = f"of type {type(value).__name__}, cannot be loaded with weights_only=True"
        with refusing("network", f"{settings.network} cannot be resumed: {name} in its state_dict, {kind}"):
            torch.save(value, saved := io.BytesIO())
            load_saved(saved.getvalue())


def check_state(settings: Settings, trial: nn.Module, image_set: ImageSet) -> None:
    """SettingError where the `state_dict` of a network that has seen batches does not hold all that it computes with.

    Such a run could not be resumed to the same numbers, and its saved weights would be of another network.
    """
    with keep_random_states():
        try_images(trial, 2, image_set.size)
        anew = construct(settings, len(image_set.classes), image_set.size)
        anew.load_state_dict(trial.state_dict())
        differing = unlike_modules(trial, anew)
        for training in (False, True):
            outputs = [try_images(network.train(training), 2, image_set.size, seed=1) for network in (trial, anew)]
            if not torch.equal(*outputs):
                where = f": see {', '.join(differing[:3])}" if differing else ""
                problem = "what it computes depends on more than its state_dict, so it cannot be saved and resumed"
                remedy = "keep that in a buffer or in get_extra_state"
                raise SettingError("network", f"{settings.network}: {problem}{where}; {remedy}")


def unlike_modules(one: nn.Module, other: nn.Module) -> list[str]:
    """Names and types of the modules that differ between two networks, though their `state_dict` is the same."""
    pairs = zip(one.named_modules(), other.modules(), strict=False)
    differing = {name: type(here) for (name, here), there in pairs if attributes(here) != attributes(there)}
    return [f"{name or 'the network'} ({kind.__name__})" for name, kind in differing.items()]


def attributes(module: nn.Module) -> dict[str, bytes]:
    """What a module holds besides what is in its `state_dict`, as far as it can be compared."""
    values = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    values |= {name: module.get_buffer(name) for name in module._non_persistent_buffers_set}
    found = {}
    for name, value in values.items():
        with suppress(Exception):  # what cannot be pickled cannot be compared
            found[name] = pickle.dumps(value.tolist() if isinstance(value, Tensor) else value)
    return found


def try_images(network: nn.Module, num_images: int, size: Size, seed: int = 0) -> Any:
    """What a network on the CPU computes of random images (num_images, 3, *size), drawn with this seed.

    Random generators stay as they are. Raises what the network raises.
    """
    with keep_random_states(), torch.enable_grad():
        torch.manual_seed(seed)
        return network(torch.rand(num_images, 3, *size))
