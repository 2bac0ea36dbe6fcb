"""The networks of the paper: torchvision's ResNets with scaled batch norms and a batch norm in front of them."""

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision import models

from batch_norm import ScaleBatchNorm2d
from settings import INPUT_NORMS, NETWORKS, PRECISIONS, STEMS

SMALL_IMAGE_DATASETS = ("cifar10", "digits")
SIGMA_ACT = 0.58  # standard deviation of a rectified standard normal variable, sqrt((1 - 1/π) / 2)


def reinit_network(network: nn.Module, fan: str = "in", activation_function: type[nn.Module] = nn.ReLU) -> None:
    """Draw the weights of all `nn.Conv2d` and `nn.Linear` anew, in the order of `network.modules()`.

    Convolutions get Kaiming's normal initialization. Linear layers get the uniform one of the paper's code: bound
    √(6 / fan) with ReLU, and √(1 / fan), torch's own, with LeakyReLU. Everything else, biases among it, is left as
    it is. Draws from torch's global generator.

    Args:
        network: any module, changed in place.
        fan: 'in' or 'out', whether the variance is kept in the forward or in the backward pass.
        activation_function: `nn.ReLU`, or `nn.LeakyReLU` with its default slope of 0.01.

    Raises:
        ValueError: `fan` or `activation_function` is none of these.
    """
    if fan not in ("in", "out"):
        raise ValueError(f"fan must be 'in' or 'out', not {fan!r}")
    if activation_function not in (nn.ReLU, nn.LeakyReLU):
        raise ValueError(f"activation_function must be nn.ReLU or nn.LeakyReLU, not {activation_function!r}")
    mode = f"fan_{fan}"
    nonlinearity = "relu" if activation_function is nn.ReLU else "leaky_relu"
    # `a`, the slope below 0, has a meaning for leaky_relu alone: torch ignores it for relu.
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, a=0.01, mode=mode, nonlinearity=nonlinearity)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), mode=mode, nonlinearity=nonlinearity)


def zero_biases(network: nn.Module) -> None:
    """Set the `bias` of every layer that has one to 0: convolutions, linear layers, normalizations. In place."""
    for module in network.modules():
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            nn.init.zeros_(module.bias)


def construct_network(
    network_name: str = "resnet18",
    num_classes: int = 10,
    dataset: str = "cifar10",
    bn_weight: float = 1.0,
    input_norm: str = "bn",
    stem: str = "auto",
) -> nn.Module:
    """Build a network of the paper with its initial weights, drawn from torch's global generator.

    Args:
        network_name: one of `NETWORKS`.
        num_classes: number of outputs.
        dataset: the images it is for.
        bn_weight: where γ starts in every batch norm.
        input_norm: 'bn' puts a batch norm in front that normalizes the images. Its γ starts at `bn_weight` · σ_act, as
            if the images were rectified activations of a layer before; its β stays 0. The result is then
            `nn.Sequential(input_norm, network)`, so that the names of all weights start with `0.` or `1.`.
            'dataset' leaves normalization with the statistics of the data set to whoever prepares the images.
        stem: the first layers. 'small': a 3×3 convolution with stride 1, and no max pooling; 'own': torchvision's own;
            'auto': 'small' where the images are small (`SMALL_IMAGE_DATASETS`), 'own' for any other data set.

    Returns:
        A module from images, float (N, 3, H, W) with values in [0, 1] ('bn') or normalized ('dataset'), to logits
        (N, num_classes).

    Raises:
        ValueError: `network_name`, `input_norm`, `stem` or `bn_weight` is not among the choices.
    """
    if network_name not in NETWORKS:
        raise ValueError(f"network_name must be one of {', '.join(NETWORKS)}, not {network_name!r}")
    if input_norm not in INPUT_NORMS:
        raise ValueError(f"input_norm must be one of {', '.join(INPUT_NORMS)}, not {input_norm!r}")
    if stem not in STEMS:
        raise ValueError(f"stem must be one of {', '.join(STEMS)}, not {stem!r}")

    norm_layer = partial(ScaleBatchNorm2d, bn_weight=bn_weight)
    network = models.get_model(network_name, num_classes=num_classes, norm_layer=norm_layer)
    if stem == "small" or (stem == "auto" and dataset in SMALL_IMAGE_DATASETS):
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        network.maxpool = nn.Identity()
    reinit_network(network)
    zero_biases(network)

    if input_norm == "bn":
        input_layer = ScaleBatchNorm2d(3, bn_weight=bn_weight * SIGMA_ACT)
        input_layer.bias.requires_grad = False
        network = nn.Sequential(input_layer, network)
    return network


def trains_on_one_image(network_name: str, pixels: int, **arguments: Any) -> bool:
    """Whether every batch norm of a network gets more than one value a channel from a batch of a single image.

    Args:
        network_name: one of `NETWORKS`.
        pixels: height and width of the image.
        **arguments: further ones of `construct_network`.
    """
    with torch.device("meta"):  # shapes only: nothing is drawn or computed
        network = construct_network(network_name, **arguments)
        try:
            network(torch.empty(1, 3, pixels, pixels))
        except ValueError:
            return False
    return True


def speed_up(network: nn.Module, precision: str = "float32", compiled: bool = False) -> None:
    """Prepare a network for the modes that are faster, with different rounding. In place.

    Weights, their gradients, the statistics of batch norm and the names in `state_dict` stay as they are. A copy of the
    network (`copy.deepcopy`) is not compiled.

    Args:
        network: any module, on the device where it will compute.
        precision: one of `PRECISIONS`. For 'bfloat16', the channels of a pixel are put next to each other in memory.
        compiled: whether to compile it, with CUDA graphs on a GPU, for each size of the batches that it is called
            with. `network.forward` stays as it is: for a short last batch, compiling would take longer than it saves.

    Raises:
        ValueError: `precision` is not one of `PRECISIONS`.
        FileNotFoundError: there is no compiler to compile with.
    """
    check_precision(precision)
    if precision == "bfloat16":
        network.to(memory_format=torch.channels_last)
    if compiled:
        if not any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))):
            raise FileNotFoundError("there is no C++ compiler here: install g++, let CXX name one, or do not compile")
        # for how many kinds of networks and batches a process compiles: torch computes without compiling after that
        torch.compiler.config.recompile_limit = 64
        on_gpu = any(parameter.is_cuda for parameter in network.parameters())
        network.compile(mode="reduce-overhead" if on_gpu else "default", dynamic=False)


@contextmanager
def use_precision(precision: str) -> Iterator[None]:
    """Let torch compute float32 products and convolutions in this precision, whatever was set before.

    'float32' and 'bfloat16' are torch's own settings: a GPU rounds the inputs of convolutions, but not of products, to
    the 10 bits of tf32. 'tf32' rounds both, 'strict' neither. A CPU computes in full float32 in any case.

    Raises:
        ValueError: `precision` is not one of `PRECISIONS`.
    """
    check_precision(precision)
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


def check_precision(precision: str) -> None:
    """ValueError where this is not one of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
