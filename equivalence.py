"""The paper's method as a network with γ = 1 that starts with smaller logits, and learns at other rates."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batch_norm import check_bn_weight
from seeds import keep_random_states
from weight_decay_and_learning_rate import adjust_weight_decay_and_learning_rate

HOMOGENEOUS = (  # what passes a factor above 0 on, or, with a bias or statistics, can be made to
    *(nn.Conv2d, nn.Linear, _BatchNorm, nn.ReLU, nn.LeakyReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    *(nn.Identity, nn.Sequential, nn.Flatten, nn.Dropout),
)

Groups = list[dict[str, Any]]


def equivalent(
    network: nn.Module,
    bn_weight: float,
    weight_decay: float = 1e-4,
    learning_rate: float = 0.1,
    c: float = 100,
    images: Tensor | None = None,
) -> tuple[nn.Module, Groups]:
    """The network with batch norms at γ = 1 that trains as one with batch norms at γ = `bn_weight` = γ0 does.

    All that a batch norm of the given network passes on is γ0 times what it is in the other one. Convolutions, ReLU,
    pooling and sums pass this factor on, and the next batch norm removes it: its eps, in relation to the variance, is
    then 1/γ0² times as large. Only the last layer does not remove it. So the other network has γ / γ0, β / γ0 and
    biases / γ0, γ0 times the weights of the last layer, and otherwise the same weights. Where a parameter of the given
    network is s times that of the other one, the other's learning rate is 1/s² times, its weight decay s² times as
    large. With γ0 = 0.1 and c = 100, γ learns at the usual rate, β at 100 times it, and the last layer's weights at a
    hundredth, with 100 times the weight decay.

    Both compute the same logits and losses, in both modes, before and after every step of SGD, but for rounding, if:

    - Every layer is one of `HOMOGENEOUS`, of which the last `nn.Linear` gives the logits, and every batch norm has γ
      and β. What `forward` does besides is homogeneous too, such as sums, concatenations and means.
    - The first batch norm, in the order of `network.modules()`, is computed first, and all later layers with a bias or
      statistics depend on the images only through batch norms.
    - No layer is used twice, and no two share weights.
    - A schedule multiplies all learning rates by the same factor, which `CosineAnnealingLR` does with `eta_min` = 0.

    Args:
        network: any module; it is left as it is. Its γ may have any values, as those of the input layer have.
        bn_weight: γ0.
        weight_decay, learning_rate, c: what the given network is trained with, see
            `adjust_weight_decay_and_learning_rate`.
        images: a batch, random ones too, on which both are tried, as only that shows what `forward` does besides.

    Returns:
        The other network, and its parameter groups for `torch.optim.SGD`, those with a factor s named after it.

    Raises:
        ValueError: a layer is not one of `HOMOGENEOUS`, a batch norm lacks γ or β, there is no linear layer, or
            `bn_weight` is not above 0; or the logits of `images` differ.
    """
    other = copy.deepcopy(network)
    leaves = [module for module in other.modules() if isinstance(module, _BatchNorm) or not list(module.children())]
    known = {layer.forward for layer in HOMOGENEOUS}  # a layer derived from one of them may do more
    unlike = {type(leaf).__name__ for leaf in leaves if type(leaf).forward not in known}
    if unlike:
        names = ", ".join(sorted(unlike))
        raise ValueError(f"cannot rewrite this network with γ = 1: f(s·x) may differ from s·f(x) for {names}")
    last = last_layer(other)
    check_bn_weight(bn_weight, last.weight.dtype)
    scales = {last.weight: 1 / bn_weight}
    scaled = False  # whether what a layer takes has the factor
    for layer in leaves:
        if isinstance(layer, _BatchNorm):
            if layer.weight is None or layer.bias is None:
                raise ValueError("cannot rewrite this network with γ = 1: a batch norm lacks γ or β")
            scales |= {layer.weight: bn_weight, layer.bias: bn_weight}
            if scaled:
                layer.eps /= bn_weight**2
                if layer.running_mean is not None:
                    layer.running_mean /= bn_weight
                    layer.running_var /= bn_weight**2
            scaled = True
        elif scaled and layer is not last and getattr(layer, "bias", None) is not None:
            scales[layer.bias] = bn_weight
    groups = rescale(other, scales, weight_decay, learning_rate, c)
    if images is not None:
        check_logits(network, other, images)
    return other, groups


def check_logits(network: nn.Module, other: nn.Module, images: Tensor) -> None:
    """ValueError where two networks compute other logits of the same images. Nothing is drawn or changed.

    Copies of them are tried in float64, so that only their weights are rounded, and in training mode: in evaluation
    mode, new batch norms let all values become so small that every function is homogeneous.
    """
    logits = []
    for trial in (network, other):
        with keep_random_states(), torch.no_grad():  # both draw the same, as for dropout
            try:
                logits.append(copy.deepcopy(trial).cpu().double().train()(images.cpu().double()))
            except RuntimeError as error:
                raise ValueError(f"the network with γ = 1 cannot be checked in float64: {error}") from error
    if not torch.allclose(*logits, rtol=0, atol=1e-4 * logits[0].abs().max().item()):
        raise ValueError("cannot rewrite this network with γ = 1: forward is not homogeneous (torch.tanh, for example)")


def logits_alone(
    network: nn.Module, bn_weight: float, weight_decay: float = 1e-4, learning_rate: float = 0.1, c: float = 1
) -> tuple[nn.Module, Groups]:
    """What `equivalent` makes of the last layer alone: a copy of a network, and its parameter groups.

    The weights of the last `nn.Linear` are `bn_weight` times as large, and learn as they do there; all else is as it
    was. ValueError where there is no linear layer, or `bn_weight` is not above 0.
    """
    other = copy.deepcopy(network)
    weight = last_layer(other).weight
    check_bn_weight(bn_weight, weight.dtype)
    return other, rescale(other, {weight: 1 / bn_weight}, weight_decay, learning_rate, c)


def last_layer(network: nn.Module) -> nn.Linear:
    """The last linear layer, in the order of `network.modules()`. ValueError where there is none."""
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError("there is no linear layer that gives the logits")
    return layers[-1]


def rescale(
    network: nn.Module, scales: Mapping[nn.Parameter, float], weight_decay: float, learning_rate: float, c: float
) -> Groups:
    """Divide parameters by their scales, in place, and make the parameter groups with which they train as before."""
    if not all(isinstance(parameter, nn.Parameter) for parameter in scales):
        raise ValueError("cannot rewrite this network with γ = 1: a layer computes its weights from other parameters")
    with torch.no_grad():
        for parameter, scale in scales.items():
            parameter /= scale
    groups = []
    for group in adjust_weight_decay_and_learning_rate(network, weight_decay, learning_rate, c):
        for scale in sorted({scales.get(parameter, 1.0) for parameter in group["params"]}):
            parameters = [parameter for parameter in group["params"] if scales.get(parameter, 1.0) == scale]
            rates = {"weight_decay": group["weight_decay"] * scale**2, "lr": group["lr"] / scale**2}
            name = group["name"] if scale == 1 else f"{group['name']} ({scale:g})"
            groups.append({"name": name, "params": parameters, **rates})
    return groups
