"""The networks of the paper: torchvision's ResNets with scaled batch norms and a batch norm in front of them."""

import math
import os
import shutil
from functools import partial

import torch
from torch import Tensor, nn
from torchvision import models

from batch_norm import ScaleBatchNorm2d

NETWORKS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
INPUT_NORMS = ("bn", "dataset")
PRECISIONS = ("float32", "bfloat16")
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
) -> nn.Module:
    """Build a network of the paper with its initial weights, drawn from torch's global generator.

    Args:
        network_name: one of `NETWORKS`.
        num_classes: number of outputs.
        dataset: the images it is for. Where they are small (`SMALL_IMAGE_DATASETS`), the first convolution is 3×3 with
            stride 1 and there is no max pooling; for any other name the stem is torchvision's own.
        bn_weight: where γ starts in every batch norm.
        input_norm: 'bn' puts a batch norm in front that normalizes the images. Its γ starts at `bn_weight` · σ_act, as
            if the images were rectified activations of a layer before; its β stays 0. The result is then
            `nn.Sequential(input_norm, network)`, so that the names of all weights start with `0.` or `1.`.
            'dataset' leaves normalization with the statistics of the data set to whoever prepares the images.

    Returns:
        A module from images, float (N, 3, H, W) with values in [0, 1] ('bn') or normalized ('dataset'), to logits
        (N, num_classes).

    Raises:
        ValueError: `network_name`, `input_norm` or `bn_weight` is not among the choices.
    """
    if network_name not in NETWORKS:
        raise ValueError(f"network_name must be one of {', '.join(NETWORKS)}, not {network_name!r}")
    if input_norm not in INPUT_NORMS:
        raise ValueError(f"input_norm must be one of {', '.join(INPUT_NORMS)}, not {input_norm!r}")

    norm_layer = partial(ScaleBatchNorm2d, bn_weight=bn_weight)
    network = models.get_model(network_name, num_classes=num_classes, norm_layer=norm_layer)
    if dataset in SMALL_IMAGE_DATASETS:
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        network.maxpool = nn.Identity()
    reinit_network(network)
    zero_biases(network)

    if input_norm == "bn":
        input_layer = ScaleBatchNorm2d(3, bn_weight=bn_weight * SIGMA_ACT)
        input_layer.bias.requires_grad = False
        network = nn.Sequential(input_layer, network)
    return network


def speed_up(network: nn.Module, device: torch.device, precision: str = "float32", compiled: bool = False) -> None:
    """Let a network compute faster from now on, at the price of other roundings. In place.

    Weights, their gradients and the statistics of batch norm stay float32, and the names in `state_dict` the same.

    Args:
        network: any module; its output has the type `precision`.
        device: where it is.
        precision: 'bfloat16' for layers and activations in bfloat16 where torch's autocast finds that safe, with the
            channels of an image next to each other in memory; 'float32' leaves both as they are.
        compiled: whether to compile it, with CUDA graphs on a GPU. As that takes up to minutes, it is done for the size
            of the first batch in training and of the first in evaluation; others, such as a short last one, are
            computed as they are without it.

    Raises:
        ValueError: `precision` is none of `PRECISIONS`.
        FileNotFoundError: there is no compiler to compile with.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if compiled:
        if not any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))):
            raise FileNotFoundError("there is no C++ compiler here: install g++, let CXX name one, or do not compile")
        # how many kinds of networks and GPUs a process may compile for; beyond it, torch silently does without
        torch.compiler.config.recompile_limit = 64
        eager, sizes = network.forward, {}
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        fast = torch.compile(eager, mode=mode, dynamic=False)

        def forward(images: Tensor) -> Tensor:
            size = sizes.setdefault(network.training, len(images))
            return (fast if len(images) == size else eager)(images)

        network.forward = forward
    if precision == "bfloat16":
        network.to(memory_format=torch.channels_last)
        # around what is compiled, so that further networks of a process are not compiled anew
        network.forward = torch.autocast(device.type, torch.bfloat16)(network.forward)
