"""What a training starts from: settings that are complete, images, the network with its initial weights."""

import os
import sys
import warnings
from dataclasses import replace
from difflib import get_close_matches
from importlib.util import find_spec

import joblib
import torch
import torchvision
from torch import Tensor, nn

from command_line.flag_types import SettingError
from command_line.signals import raise_if_stopped
from equivalence import Groups, equivalent, logits_alone
from image_sets.folders import Size, class_names, find_parts
from image_sets.loading import ImageSet, load_image_set
from networks import construct_network
from run_settings import DATASETS, Settings, absolute, determining, how_to_name, split_seed
from saved_runs.circumstances import code_version, network_code
from seeds import keep_random_states
from training import together
from training.run import Report

# what this process has imported of networks of one's own: the module's spec, which a reload replaces, and its code
IMPORTED: dict[str, tuple[object, str | None]] = {}


def prepare(settings: Settings) -> Settings:
    """The same settings with a device, the same in all processes that make the run.

    SettingError where they are wrong in a way that takes torch or images to tell. Whether the network can train on the
    images is left to `check_network`.
    """
    settings = together.agree(lambda: complete(settings))
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "code": code_version()}
    kind_of_device = settings.device.partition(":")[0]
    together.check_same({"name": settings.name, "device": kind_of_device, **determining(settings), **versions})
    raise_if_stopped()
    return settings


def complete(settings: Settings) -> Settings:
    """What `prepare` does in one process."""
    if settings.tensorboard and find_spec("tensorboard") is None:
        raise SettingError("tensorboard", "there is no TensorBoard here: pip install tensorboard")
    if settings.compile and together.size() > 1:
        raise SettingError("compile", "it is for one process, without torchrun")
    device = str(together.device_of(settings.device))
    settings = replace(settings, device=device)
    if settings.dataset in DATASETS:
        known = DATASETS[settings.dataset]
        num_classes, pixels = known.num_classes, settings.image_size or known.pixels
        size = (pixels, pixels)
    else:
        folder = settings.path / "images" / settings.dataset
        if not folder.is_dir():
            close = get_close_matches(settings.dataset.lower(), DATASETS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known without one are {', '.join(DATASETS)}"
            here = absolute(settings.dataset)  # a folder of this name may be in the current one
            problem = how_to_name(here, folder.parent) if here.is_dir() else f"there is no folder {folder}: {hint}"
            raise SettingError("dataset", problem)
        train, _ = find_parts(folder)
        num_classes, size = len(class_names(train)), None  # which takes longer to find
    with keep_random_states():
        network = construct(settings, num_classes, size)
    if settings.equivalent != "no":
        rewrite(network, settings)
    return settings


def load_images(settings: Settings, report: Report = lambda line: None, show_bar: bool = False) -> ImageSet:
    """The data set of a run, the same in all processes that make it; see `load_image_set`.

    SettingError where one of these would have no image of a training batch or of a whole split.
    """
    workers = settings.workers
    if workers is None and together.size() > 1:  # torchrun gives each process one thread
        workers = max(1, joblib.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"]))
    options = {
        "image_size": settings.image_size,
        "flip": not settings.no_flip,
        "split_seed": split_seed(vars(settings)),
        "workers": workers,
        "statistics": settings.input_norm == "dataset",
    }
    where = settings.dataset, settings.path / "images", settings.device
    image_set = together.in_turn(lambda: load_image_set(*where, **options, report=report, show_bar=show_bar))
    raise_if_stopped()
    together.check_same(image_set.notes)
    fewer = f"fewer than {together.size()} processes"
    for name, indices in image_set.splits.items():
        if len(indices) < together.size():
            raise SettingError("dataset", f"split {name} has {len(indices)} images, {fewer}")
    last = len(image_set.splits["train"]) % settings.batch_size or settings.batch_size
    if last < together.size():
        raise SettingError("batch_size", f"{settings.batch_size} leaves {last} images in a batch, {fewer}")
    return image_set


def construct(settings: Settings, num_classes: int, size: Size | None, report: Report = lambda line: None) -> nn.Module:
    """The network of a run, for images of this height and width, with its initial weights, on the CPU.

    `report` is called with what there is to warn of. SettingError where there is no such network.
    """
    arguments = {name: getattr(settings, name) for name in ("dataset", "bn_weight", "input_norm", "stem")}
    if settings.equivalent == "logits":
        arguments["bn_weight"] = 1.0
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            network = construct_network(settings.network, num_classes, **arguments, image_size=size)
    except ValueError as error:
        raise SettingError("network", f"{error}") from error
    check_import(settings.network)
    for warning in caught:
        report(f"{settings.network}: {warning.message}")
    return network


def check_import(network: str) -> None:
    """SettingError where the code of a network of one's own is not what this process has imported, as in a notebook."""
    spec, code = getattr(sys.modules.get(network.partition(":")[0]), "__spec__", None), network_code(network)
    imported_spec, imported_code = IMPORTED.get(network, (spec, code))
    if spec is imported_spec and code != imported_code:
        raise SettingError("network", f"the code of {network} has changed since it was imported: start Python anew")
    IMPORTED[network] = spec, code


def rewrite(network: nn.Module, settings: Settings, images: Tensor | None = None) -> tuple[nn.Module, Groups]:
    """The network that `equivalent` asks to train in place of that of a run, and its parameter groups.

    Its γ start at 1, but for the input layer's. SettingError where there is no such network; with `images`, the logits
    of both are compared.
    """
    rates = settings.weight_decay, settings.learning_rate, settings.c
    try:
        if settings.equivalent == "logits":
            return logits_alone(network, settings.bn_weight, *rates)
        return equivalent(network, settings.bn_weight, *rates, images=images)
    except ValueError as error:
        raise SettingError("equivalent", f"{settings.network}: {error}") from error
