"""What the paper observes in a trained network: γ and β by depth, and how large normalized values get."""

import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms import Normalize

from batch_norm import SIGMA_ACT
from command_line.files import add_digest, has_digest, write_atomically
from image_sets.loading import ImageSet, load_image_set
from reporting.drawing import add_legend, label_axes, line_styles, make_axes
from run_settings import DEFAULTS, split_seed
from saved_runs.results import Results
from trained_networks import rebuild_network

Weights = Mapping[str, Any]  # a state_dict, or arrays under the same names

LARGE = 3.0  # a normalized value beyond ±3 is called large
NORMALIZED = ".normalized"  # ends the names of normalized values in an archive


# --- γ and β --------------------------------------------------------------------------------------------------------


def batch_norms(weights: Weights) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Depth, γ (C,) and β (C,) of every batch norm that has both, in the order of the `state_dict` of a network."""
    layers = [name.removesuffix(".running_mean") for name in weights if name.endswith(".running_mean")]
    layers = [layer for layer in layers if {f"{layer}.weight", f"{layer}.bias"} <= weights.keys()]
    for depth, layer in enumerate(layers, start=first_depth(layers)):
        yield depth, as_array(weights[f"{layer}.weight"]), as_array(weights[f"{layer}.bias"])


def as_array(values: Any) -> np.ndarray:
    """A tensor of any floating-point type on any device, or an array, as an array of float32."""
    return torch.as_tensor(values).detach().float().cpu().numpy()


def first_depth(layers: Sequence[str]) -> int:
    """The depth of the first of a network's batch norms, from their names: 0 in front of the network, 1 within it."""
    first, later = layers[:1], layers[1:]
    return 0 if first == ["0"] and all(layer.startswith("1.") for layer in later) else 1


def batch_norm_arrays(weights: Weights) -> dict[str, np.ndarray]:
    """All that belongs to batch norms in a `state_dict`, under the same names, but for their counts of batches."""
    layers = [name.removesuffix(".running_mean") for name in weights if name.endswith(".running_mean")]
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias", "running_mean", "running_var")]
    return {name: as_array(weights[name]) for name in names if name in weights}


# --- normalized values ----------------------------------------------------------------------------------------------


class NormalizedValues(NamedTuple):
    """How large the outputs of one batch norm's normalization are, before γ and β."""

    name: str  # of the batch norm in its network
    share_beyond_3: float  # how many are beyond ±3, from 0 to 1
    maximum: float  # of their absolute values


NUM_MEASURED = 128  # test images on which normalized values are measured


@torch.no_grad()
def measure_normalized_values(network: nn.Module, images: Tensor) -> list[NormalizedValues]:
    """How large normalized values get in each batch norm of a network, in the order of computation (Section 3).

    A copy of the network, any module, takes these images in evaluation mode.
    """
    network, measured = copy.deepcopy(network).eval(), []

    def measure(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        statistics = (None if values is None else values.float() for values in (layer.running_mean, layer.running_var))
        of_batch = layer.running_mean is None
        normalized = F.batch_norm(inputs[0].float(), *statistics, training=of_batch, eps=layer.eps).abs()
        share = (normalized > LARGE).float().mean().item()
        measured.append(NormalizedValues(name, share, normalized.max().item()))

    for name, layer in network.named_modules():
        if isinstance(layer, _BatchNorm):
            layer.register_forward_pre_hook(partial(measure, name))
    network(images)
    return measured


def measure_run(run: Results, network: nn.Module, image_set: ImageSet) -> list[NormalizedValues]:
    """`measure_normalized_values` of a run's network on some test images of its data set, prepared as in training."""
    [images] = image_set.take([image_set.sample("test", NUM_MEASURED)])
    images = images.float() / 255
    if (DEFAULTS | run.header)["input_norm"] == "dataset":
        images = Normalize(image_set.mean, image_set.std)(images)
    return measure_normalized_values(network, images)


# --- both, of the runs of an experiment -----------------------------------------------------------------------------


class Observations(NamedTuple):
    """What `observe_runs` found out, by method. A dictionary is empty where the files did not allow it."""

    weights: dict[str, dict[str, np.ndarray]]  # see `batch_norm_arrays`
    normalized_values: dict[str, list[NormalizedValues]]
    missing: list[str]  # a line on what is left out, with the reason


def save_observations(file: Path, runs: Mapping[str, Results], found: Observations) -> None:
    """Write what is observed of runs to a compressed NumPy archive, with their names as its title.

    It takes some hundred kB, where the weights take some hundred MB. OSError where it cannot be written.
    """
    arrays = {f"{method}/{name}": values for method, arrays in found.weights.items() for name, values in arrays.items()}
    for method, layers in found.normalized_values.items():
        arrays |= {f"{method}/{layer.name}{NORMALIZED}": np.array(layer[1:]) for layer in layers}
    content = io.BytesIO()
    np.savez_compressed(content, title="\n".join(map(name_of, runs.values())), **arrays)
    add_digest(content)  # NumPy reads the archive as it is
    write_atomically(file, content.getvalue())


def load_observations(file: Path, runs: Mapping[str, Results]) -> Observations:
    """What `save_observations` wrote of runs, or of some of them. ValueError where it is damaged, or of other runs.

    Older files have no normalized values.
    """
    content, found = file.read_bytes(), Observations({}, {}, [])
    try:
        if not has_digest(content):
            raise ValueError("its checksum")
        with np.load(io.BytesIO(content)) as archive:
            arrays = {name: archive[name] for name in archive.files}
        names = str(arrays.pop("title")).splitlines()
    except Exception as error:  # which one depends on where the damage is
        raise ValueError(f"{file} is damaged, or does not hold the γ and β of trained networks") from error
    if not set(names) <= set(map(name_of, runs.values())):
        raise ValueError(f"{file} is of other runs: {', '.join(names)}")
    for key, values in arrays.items():
        method, _, name = key.partition("/")
        if name.endswith(NORMALIZED):
            measured = NormalizedValues(name.removesuffix(NORMALIZED), *values.tolist())
            found.normalized_values.setdefault(method, []).append(measured)
        else:
            found.weights.setdefault(method, {})[name] = values
    return found


def name_of(run: Results) -> str:
    """The name of a run."""
    return str(run.header.get("name"))


def observe_runs(
    runs: Mapping[str, Results],
    networks: Path,
    archive: Path,
    own_network: str | None = None,
    output: Path | None = None,
) -> Observations:
    """The learned γ and β and the normalized values of trained networks, as far as their files allow.

    OSError where the archive cannot be written.

    Args:
        runs: for each method a finished run, all of one data set.
        networks: the folder with their weights, NAME-best.pt; `images` beside it has the data. Nothing is downloaded.
        archive: read where weights are missing.
        own_network: MODULE:FUNCTION that may be imported. Code of another module is not run, as nobody asked for it.
        output: the folder in which the archive is written where there are weights and images; by default, its own.
    """
    found, trained = Observations({}, {}, []), {}
    if not runs:
        return found
    try:
        for method, run in runs.items():
            network = str(run.header.get("network", DEFAULTS["network"]))
            if ":" in network and network != own_network:
                raise ValueError(f"{network} is imported only where it is given as --network")
            trained[method] = rebuild_network(run, networks / f"{name_of(run)}-best.pt")
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError):
            return load_observations(archive, runs)
        return found._replace(missing=[f"no figures of trained networks: {reason(error)}"])
    found.weights.update({method: batch_norm_arrays(network.state_dict()) for method, network in trained.items()})
    load = cache(partial(load_image_set, folder=networks.parent / "images", download=False))
    try:
        for method, run in runs.items():
            header = DEFAULTS | run.header
            options = {"split_seed": split_seed(header), "statistics": header["input_norm"] == "dataset"}
            image_set = load(header["dataset"], image_size=header["image_size"], **options)
            found.normalized_values[method] = measure_run(run, trained[method], image_set)
    except (OSError, ValueError) as error:
        return found._replace(normalized_values={}, missing=[f"no normalized values: {reason(error)}"])
    save_observations((output or archive.parent) / archive.name, runs, found)
    return found


def reason(error: OSError | ValueError) -> str:
    """What an error says; of a missing file, without its number."""
    return f"there is no {error.filename}" if isinstance(error, FileNotFoundError) and error.filename else str(error)


# --- figures --------------------------------------------------------------------------------------------------------

DEPTH = "batch norm, by depth (0: in front of the network)"


def learned_scales_and_shifts(weights: Mapping[str, Weights], bn_weights: Mapping[str, float]) -> Figure:
    """How far γ and β went from where they started, by depth, all methods on one scale (Section 3).

    Both are divided by the γ that their batch norm started with. A marker is at the median of the channels, a thick bar
    goes from the 5 % to the 95 % quantile, and a thin one from the smallest to the largest value. Values of the batch
    norm in front of the network that go beyond the scale of the others are written above.

    Args:
        weights: for each method a `state_dict`, as in `networks/NAME-best.pt`.
        bn_weights: for each method the initial γ of the batch norms; of that in front of the network, it is 0.58 of it.
    """
    panels, styles = make_axes(2, width=9, height=3.4, sharex=True), line_styles(weights)
    offsets = 0.24 * (np.arange(len(weights)) - (len(weights) - 1) / 2)
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for offset, (method, trained) in zip(offsets, weights.items(), strict=True):
        depths, quantiles = [], []
        for depth, scale, shift in batch_norms(trained):
            values = np.array((scale, shift)) / (bn_weights[method] * (1 if depth else SIGMA_ACT))
            depths.append(depth)
            quantiles.append(np.quantile(values, (0, 0.05, 0.5, 0.95, 1), axis=1))
        if not depths:
            raise ValueError(f"{method} has no batch norm with γ, β and running statistics")
        depths, quantiles = np.array(depths), np.array(quantiles)
        found[method] = depths, quantiles
        places = depths + offset
        style = styles[method] | {"linestyle": "none", "markeredgecolor": "black", "markersize": 4}
        for panel, (lowest, low, median, high, highest) in zip(panels, quantiles.transpose(2, 1, 0), strict=True):
            panel.vlines(places, lowest, highest, color=style["color"], linewidth=0.8)
            panel.vlines(places, low, high, color=style["color"], linewidth=3, alpha=0.6)
            panel.plot(places, median, label=method, **style)
    for place, (panel, start, name) in enumerate(zip(panels, (1, 0), ("γ", "β"), strict=True)):
        panel.axhline(start, color="black", linestyle="--", linewidth=0.8, zorder=0, label="start")
        label_axes(panel, "", f"learned {name} / initial γ")
        within = [quantiles[depths > 0, :, place].ravel() for depths, quantiles in found.values()]
        within = np.concatenate([*within, [start]])
        margin = 0.05 * np.ptp(within) or 0.05
        low, high = within.min() - margin, within.max() + margin
        panel.set_ylim(low, high)
        at_input = {method: quantiles[0] for method, (depths, quantiles) in found.items() if depths[0] == 0}
        ends = {method: quantiles[[0, -1], place] for method, quantiles in at_input.items()}
        texts = [f"{method} {a:.1f} to {b:.1f}" for method, (a, b) in ends.items() if a < low or b > high]
        if texts:
            panel.set_title(f"batch norm 0, off the scale: {', '.join(texts)}", loc="left", fontsize=8)
    panels[1].set_xlabel(DEPTH)
    add_legend(panels[0].figure, title="median, 5 to 95 % of the channels, all of them")
    return panels[0].figure


def normalized_values(measured: Mapping[str, Sequence[NormalizedValues]]) -> Figure:
    """How large normalized values get, by depth: the share beyond ±3, and the largest absolute one (Section 3)."""
    axes, styles = make_axes(columns=2), line_styles(measured)
    for method, layers in measured.items():
        depth = np.arange(len(layers)) + first_depth([layer.name for layer in layers])
        axes[0].plot(depth, [100 * layer.share_beyond_3 for layer in layers], label=method, **styles[method])
        axes[1].plot(depth, [layer.maximum for layer in layers], label=method, **styles[method])
    normal = 100 * 2 * scipy.stats.norm.sf(LARGE)
    axes[0].axhline(normal, color="0.5", linewidth=1, label=f"a normal variable: {normal:.2f} %")
    label_axes(axes[0], DEPTH, f"normalized values beyond ±{LARGE:g} (%)")
    label_axes(axes[1], DEPTH, "largest absolute normalized value")
    axes[1].set_ylim(bottom=0)
    add_legend(axes[0].figure)
    return axes[0].figure
