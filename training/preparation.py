"""What is prepared and checked before a training: settings, images, network."""

import argparse
import copy
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from command_line import settings as flags
from command_line.endings import in_one_line
from command_line.flag_types import FlagError
from equivalence import rewrite
from image_sets.folders import Size
from image_sets.loading import ImageSet, load_image_set
from networks import construct_network
from saved_runs.tensorboard_curves import check_tensorboard
from seeds import keep_random_states
from training.world import ALONE, OneProcess

LARGEST_TRIED = 512  # pixels of images that are tried where a network cannot take smaller ones


def check_images(network: nn.Module, height: int, width: int, num_classes: int) -> None:
    """Check that a network can train on images of this size.

    Raises:
        ValueError: it cannot compute a batch of two, with the next square size that works; or what it computes are no
            logits (2, num_classes).
    """
    try:
        logits = try_images(network, 2, height, width)
    except Exception as error:
        pixels = find_size(network, min(height, width))
        hint = f"the next size that works is {pixels}×{pixels}" if pixels else f"up to {LARGEST_TRIED}, none seems to"
        what = f"cannot train on images of {height}×{width} pixels; {hint}"
        raise ValueError(f"{what} ({in_one_line(error)})") from error
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (2, num_classes):
        raise ValueError(f"computes {shape} for 2 images, not logits {(2, num_classes)}")


def find_size(network: nn.Module, minimum: int) -> int | None:
    """The smallest height and width, from a minimum to `LARGEST_TRIED`, of images that a network can train on."""
    with suppress(Exception):
        shapes = copy.deepcopy(network).to("meta").train()  # computes nothing but shapes, which takes little time
        for pixels in range(minimum, LARGEST_TRIED + 1):
            with suppress(Exception):
                compute_random_images(shapes, 2, pixels, pixels, "meta")
                try_images(network, 2, pixels, pixels)
                return pixels
    return None


def try_images(network: nn.Module, num_images: int, height: int, width: int) -> Any:
    """What a network in training mode computes of random images (num_images, 3, height, width), on the CPU.

    A copy of it does: the network, and the random generators too, stay as they are. Raises what the network raises.
    """
    return compute_random_images(copy.deepcopy(network).cpu().train(), num_images, height, width, "cpu")


def compute_random_images(network: nn.Module, num_images: int, height: int, width: int, device: str) -> Any:
    """What a network on that device computes of them, without gradients."""
    with keep_random_states(), torch.no_grad(), torch.device(device):
        return network(torch.rand(num_images, 3, height, width))


def load_images(settings: argparse.Namespace, **options: Any) -> ImageSet:
    """The data set of a run; `options` are further ones of `load_image_set`."""
    options |= {"image_size": settings.image_size, "flip": not settings.no_flip, "workers": settings.workers}
    options |= {"statistics": settings.input_norm == "dataset"}
    return load_image_set(settings.dataset, settings.path / "images", settings.device, **options)


def construct(settings: argparse.Namespace, num_classes: int, size: Size | None) -> nn.Module:
    """The network of a run, for images of this height and width, with its initial weights, on the CPU.

    FlagError where there is no such network.
    """
    arguments = {name: getattr(settings, name) for name in ("dataset", "bn_weight", "input_norm", "stem")}
    if settings.equivalent == "logits":
        arguments["bn_weight"] = 1.0
    try:
        return construct_network(settings.network, num_classes, **arguments, image_size=size)
    except ValueError as error:
        raise FlagError(f"argument --network: {error}") from error


def parse(argv: Sequence[str] | None = None, world: OneProcess = ALONE) -> argparse.Namespace:
    """The settings of a run from its flags, complete and checked. FlagError names what is wrong."""
    return prepare(flags.parse(argv), world)


def prepare(settings: argparse.Namespace, world: OneProcess = ALONE) -> argparse.Namespace:
    """The same settings, with a device. FlagError where they are wrong in a way that only torch can tell."""
    if settings.tensorboard:
        check_tensorboard()
    settings.device = world.device(settings.device)
    known = flags.DATASETS.get(settings.dataset)
    folder = settings.path / "images" / settings.dataset
    if not known and not folder.is_dir():
        built_in = ", ".join(flags.DATASETS)
        raise FlagError(f"argument --dataset: {settings.dataset} is none of {built_in}, and there is no {folder}")
    size = None  # the images of a folder are not known yet
    if known:
        pixels = settings.image_size or known.pixels
        size = (pixels, pixels)
    with keep_random_states():
        network = construct(settings, 10, size)
    if settings.equivalent != "no":
        rewrite(network, settings)
    if known:
        check_network(settings, network, size, known.num_train, num_classes=10)
    return settings


def check_network(
    settings: argparse.Namespace, network: nn.Module, size: Size, num_train: int, num_classes: int
) -> None:
    """FlagError where a run's network cannot train on so many images of this height and width."""
    try:
        check_images(network, *size, num_classes)
    except ValueError as error:
        raise FlagError(f"argument --network: {settings.network} {error}") from error
    if (num_train - 1) % settings.batch_size == 0:
        try:
            try_images(network, 1, *size)
        except Exception as error:
            raise FlagError(
                f"argument --batch_size: {settings.batch_size} leaves a last batch of one of the {num_train} training"
                f" images of {settings.dataset}, where {settings.network} cannot train on one; take another size"
            ) from error
