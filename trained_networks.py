"""Trained networks: their weights, and the networks themselves, ready to predict."""

import os
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms import Normalize

from command_line.files import has_digest
from equivalence import equivalent
from image_sets.cifar import CIFAR10_STATISTICS
from image_sets.loading import load_image_set
from networks import construct_network
from run_settings import DATASETS, DEFAULTS, Value, split_seed
from saved_runs.checkpoint import load_saved
from saved_runs.results import Results, read_results, run_files
from seeds import keep_random_states


def load_network(results_file: str | os.PathLike, weights_file: str | os.PathLike | None = None) -> nn.Module:
    """The trained network of a finished run, ready to predict: in evaluation mode, on the CPU, in float32.

    Args:
        results_file: the run's result file, FOLDER/results/NAME.csv.
        weights_file: its trained weights; by default FOLDER/networks/NAME-best.pt.

    Returns:
        A module from images, float (N, 3, H, W) with values in [0, 1], to logits (N, classes). It normalizes the images
        first where the run's `input_norm` is 'dataset'.

    For a network of your own, this imports the module that the result file names, from the current folder too. So load
    only result files that you trust.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a file is damaged, or does not say how many classes there are; the run is not finished; or the
            weights are of another network.
    """
    file = Path(results_file)
    folder = file.absolute().parent.parent
    run = read_results(file)
    settings = DEFAULTS | run.header
    if not run.finished:
        raise ValueError(f"{file} is not of a finished run: give its command again, which resumes it")
    network = rebuild_network(run, weights_file or run_files(folder, file.stem).best_weights)
    if settings["input_norm"] == "dataset":
        statistics = CIFAR10_STATISTICS
        if "mean" in settings:
            statistics = tuple([float(number) for number in settings[name].split()] for name in ("mean", "std"))
        elif settings["dataset"] != "cifar10":
            options = {"image_size": settings["image_size"], "split_seed": split_seed(settings)}
            image_set = load_image_set(settings["dataset"], folder / "images", **options)
            statistics = image_set.mean, image_set.std
        network = nn.Sequential(Normalize(*statistics), network).eval()
    return network


def rebuild_network(run: Results, weights_file: str | os.PathLike) -> nn.Module:
    """The network of a run with trained weights, in evaluation mode, on the CPU; draws no random numbers.

    It takes the images as in training: normalized where `input_norm` is 'dataset'. Raises the errors of `load_network`.
    """
    settings = DEFAULTS | run.header
    weights = load_weights(weights_file)
    arguments = {name: settings[name] for name in ("dataset", "input_norm", "stem")}
    first = weights.get("conv1.weight", weights.get("1.conv1.weight"))
    arguments["image_size"] = 32 if first is not None and first.shape[-1] == 3 else 224  # 3×3: for small images
    ignored = warnings.catch_warnings(action="ignore", category=UserWarning)  # of what initialization discards
    with ignored, torch.device("cpu"), keep_random_states():  # initial weights are drawn, but nobody sees them
        network = construct_network(settings["network"], find_num_classes(settings), **arguments)
    if settings["equivalent"] == "logits+rates":
        network, _ = equivalent(network, settings["bn_weight"])  # which has another eps
    try:
        network.load_state_dict(weights)
    except RuntimeError:  # its message has a line for each weight
        raise ValueError(
            f"{weights_file} does not hold the weights of a {settings['network']} for {settings['dataset']}"
            f" with input_norm {settings['input_norm']}"
        ) from None
    return network.eval()


def find_num_classes(settings: Mapping[str, Value]) -> int:
    """The number of classes of a run's data set; of a folder of images, by the `ImageSet.numbers` in its result file.

    ValueError where they are not in there.
    """
    if settings["dataset"] in DATASETS:
        return DATASETS[settings["dataset"]].num_classes
    found = re.search(r" of ([\d,]+) classes", str(settings.get("images", "")))
    if found is None:
        raise ValueError(f"the result file does not say how many classes the images of {settings['dataset']} have")
    return int(found[1].replace(",", ""))


def load_weights(file: str | os.PathLike) -> dict[str, Tensor]:
    """A `state_dict` from its file, on the CPU. ValueError where this is damaged, or holds something else."""
    content = Path(file).read_bytes()
    weights = None
    with suppress(Exception):  # which one depends on where the damage is
        if content[-22:-18] == b"PK\5\6" or has_digest(content):  # as other programs save a zip file, or as this one
            weights = load_saved(content)
    if not isinstance(weights, dict) or not any(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{file} is damaged, or does not hold the weights of a network")
    return weights
