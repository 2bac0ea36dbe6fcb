"""The networks: torchvision's and one's own, with scaled batch norms and a batch norm in front of them."""

import difflib
import importlib
import math
import os
import random
import sys
import warnings
from collections.abc import Callable
from contextlib import chdir, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torchvision import models

from batch_norm import check_plain, initialize_scales, prepend_input_norm
from command_line.endings import in_one_line
from run_settings import DATASETS, INPUT_NORMS, SMALL_IMAGE, STEMS
from seeds import keep_random_states


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
        ValueError: `fan` or `activation_function` is none of these, or a layer computes its weights from others.
    """
    if fan not in ("in", "out"):
        raise ValueError(f"fan must be 'in' or 'out', not {fan!r}")
    if activation_function not in (nn.ReLU, nn.LeakyReLU):
        raise ValueError(f"activation_function must be nn.ReLU or nn.LeakyReLU, not {activation_function!r}")
    options = {"mode": f"fan_{fan}", "nonlinearity": "relu" if activation_function is nn.ReLU else "leaky_relu"}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            check_plain(module, name, "weight")
        if isinstance(module, nn.Conv2d):  # `a` is the slope below 0 of leaky_relu; torch ignores it for relu
            nn.init.kaiming_normal_(module.weight, a=0.01, **options)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), **options)


def zero_biases(network: nn.Module) -> None:
    """Set the `bias` of every layer that has one to 0: convolutions, linear layers, normalizations. In place.

    ValueError where a layer computes its bias from other parameters.
    """
    for name, module in network.named_modules():
        check_plain(module, name, "bias")
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            nn.init.zeros_(module.bias)


def construct_network(
    network_name: str = "resnet18",
    num_classes: int = 10,
    dataset: str = "cifar10",
    bn_weight: float = 1.0,
    input_norm: str = "bn",
    stem: str = "auto",
    image_size: int | tuple[int, int] | None = None,
) -> nn.Module:
    """Build a network with its initial weights, drawn from torch's global generator.

    Args:
        network_name: a classification network of torchvision that has batch norms, whose weights are drawn by
            `reinit_network` and `zero_biases`; or 'package.module:function', for what your own
            `function(num_classes=...)` returns, with its weights, but for γ and β. The module is imported, from the
            current folder too. All layers train, unless its own `train()` keeps some frozen.
        num_classes: number of outputs.
        dataset: the images it is for.
        bn_weight: where γ starts in every batch norm, by `initialize_scales`.
        input_norm: 'bn' puts a batch norm in front, by `prepend_input_norm`; 'dataset' expects normalized images.
        stem: the first layers of torchvision's ResNets, ResNeXts and Wide ResNets. 'small': a 3×3 convolution with
            stride 1, and no max pooling; 'own': those it has; 'auto': 'small' for images of at most `SMALL_IMAGE`
            pixels, unless the function is your own.
        image_size: height and width of the images in pixels, or one number for both; by default those of `dataset`,
            which counts as large where it is not in `DATASETS`.

    Returns:
        A module from images, float (N, 3, H, W) with values in [0, 1] ('bn') or normalized ('dataset'), to logits
        (N, num_classes).

    Raises:
        ValueError: an argument is wrong; or the network cannot be built, has no batch norm, or nothing to train.
    """
    if input_norm not in INPUT_NORMS:
        raise ValueError(f"input_norm must be one of {', '.join(INPUT_NORMS)}, not {input_norm!r}")
    if stem not in STEMS:
        raise ValueError(f"stem must be one of {', '.join(STEMS)}, not {stem!r}")
    own = ":" in network_name
    network = call_function(network_name, num_classes) if own else build_network(network_name, num_classes)

    if image_size is None:
        image_size = DATASETS[dataset].pixels if dataset in DATASETS else math.inf
    pixels = max(image_size) if isinstance(image_size, tuple) else image_size
    is_resnet = isinstance(network, models.ResNet)
    if stem == "small" and not is_resnet:
        raise ValueError(f"{network_name} is none of torchvision's ResNets, for which alone there is a small stem")
    if stem == "small" or (stem == "auto" and is_resnet and not own and pixels <= SMALL_IMAGE):
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
        network.maxpool = nn.Identity()
    if not own:
        reinit_network(network)
        zero_biases(network)
    try:
        initialize_scales(network, bn_weight)
    except ValueError as error:
        raise ValueError(f"{network_name}: {error}") from error
    return prepend_input_norm(network, bn_weight, num_channels=3) if input_norm == "bn" else network


def build_network(network_name: str, num_classes: int) -> nn.Module:
    """A classification network of torchvision, without auxiliary heads. ValueError if unknown or without batch norm."""
    names = models.list_models(module=models)
    if network_name not in names:
        close = difflib.get_close_matches(network_name.lower(), names, n=3)
        hint = f"close are {', '.join(close)}" if close else "resnet18 is one, and MODULE:FUNCTION your own"
        raise ValueError(f"torchvision has no classification network {network_name!r}: {hint}")
    with_auxiliary_heads = network_name in ("googlenet", "inception_v3")
    options = {"aux_logits": False, "init_weights": False} if with_auxiliary_heads else {}
    with suppress(NotImplementedError), torch.device("meta"):  # RegNets, which all have some, cannot be built there
        if not any(isinstance(m, _BatchNorm) for m in models.get_model(network_name, **options).modules()):
            other = f"{network_name}_bn" if f"{network_name}_bn" in names else "one that has some"
            raise ValueError(f"{network_name} has no batch norm, which the method is about: take {other}")
    return models.get_model(network_name, num_classes=num_classes, **options)


def find_function(name: str) -> Callable[..., Any]:
    """The function 'package.module:function', whose module is imported. ValueError where there is none."""
    module_name, _, function_name = name.partition(":")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # last, so that nothing in it takes the place of another module
    try:
        with chdir("."):  # the current folder stays, whatever the module does
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{module_name} cannot be imported: {in_one_line(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        file = getattr(module, "__file__", None) or "built in"
        in_models = callable(getattr(getattr(module, "models", None), function_name, None))  # as in timm
        hint = f": give {module_name}.models:{function_name}" if in_models else ""
        raise ValueError(f"{module_name} ({file}) has no function {function_name}{hint}")
    return function


def call_function(name: str, num_classes: int) -> nn.Module:
    """The network that a function 'package.module:function' returns. ValueError where there is none to train."""
    function = find_function(name)
    try:  # without gradients: what is computed with them, as by torch.nn.utils.weight_norm, cannot be copied
        with chdir("."), torch.no_grad():
            network = function(num_classes=num_classes)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name} cannot be called with num_classes={num_classes}: {in_one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name} returns {type(network).__name__}, which is not a torch.nn.Module")
    if any(map(is_lazy, network.parameters())):
        raise ValueError(f"{name} returns lazy layers, without weights as yet: let the network compute a batch first")
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(f"{name} returns a network in which nothing requires gradients: there is nothing to train")
    return network


def find_seed_problem(network_name: str, num_classes: int) -> str | None:
    """What is wrong, in one line, where the initial weights of one's own network do not follow from the seed alone.

    The function is called twice from one state of the global random generators, and once from another. They stay as
    they are. ValueError where it returns no network.
    """
    if ":" not in network_name:
        return None
    built: list[tuple[nn.Module, Tensor]] = []  # networks, and the state in which each leaves torch's generator
    with keep_random_states(), warnings.catch_warnings(action="ignore"):
        find_function(network_name)  # importing its module may draw, too, but only once
        for seed in (1, 1, 2):
            for set_seed in (random.seed, np.random.seed, torch.manual_seed):
                set_seed(seed)
            built.append((call_function(network_name, num_classes), torch.get_rng_state()))
    (one, after_one), (again, after_again), (other, after_other) = built
    if set(one.parameters()) & set(again.parameters()):
        return f"{network_name} returns the same weights at every call: another run of this process trains them further"
    if not same_weights(one, again) or not torch.equal(after_one, after_again):
        return f"{network_name} draws otherwise at every call: no run can be repeated; use torch's global generator"
    if same_weights(one, other):
        return f"{network_name} gives the same weights with every seed"
    if torch.equal(after_one, after_other):
        return f"{network_name} seeds torch's generator: what is drawn later, such as batches, is alike with every seed"
    return None


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks have equal parameters and buffers, under the same names."""
    first, second = one.state_dict(), other.state_dict()
    tensors = {name: value for name, value in first.items() if isinstance(value, Tensor)}
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in tensors.items())
