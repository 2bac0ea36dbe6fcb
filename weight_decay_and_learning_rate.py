"""The parameter groups: a smaller learning rate for the γ's, and weight decay for weights alone (Section 4)."""

import math
from collections.abc import Collection
from numbers import Real
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

NORMALIZATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # _NormBase: batch norms and instance norms


def adjust_weight_decay_and_learning_rate(
    network: nn.Module,
    weight_decay: float = 1e-4,
    learning_rate: float = 0.1,
    c: float = 1,
    skip_list: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Sort the parameters of a network into the groups of the paper, for an optimizer such as `torch.optim.SGD`.

    In this order, empty ones left out:

    1. biases, the scales of other normalization layers and whatever `skip_list` names: no weight decay, full rate;
    2. batch norm scales γ: no weight decay, rate `learning_rate / c`;
    3. the rest (weights of convolutional and linear layers, and what some networks have besides, such as tokens,
       tables of positions and scales of residual branches): `weight_decay`, full rate.

    What a parameter is follows from the type of the module that holds it, not from its shape. Frozen parameters
    (`requires_grad` is False) are left out, and one that several modules share appears once, in the group of the first.

    Args:
        network: any module. It is left as it is.
        weight_decay: coefficient for the third group.
        learning_rate: rate of the first and third group, before any schedule.
        c: the γ's learn at 1/c of the rate; 0 or 1 for no reduction.
        skip_list: names, as in `network.named_parameters()`, of parameters of the third group that get no decay.

    Returns:
        Dictionaries with 'params' (a list), 'weight_decay' and 'lr'.

    Raises:
        TypeError: `weight_decay`, `learning_rate` or `c` is no number, or `skip_list` is a text.
        ValueError: `weight_decay` or `learning_rate` is below 0 or not finite, `c` is neither 0 nor a finite number of
            at least 1, or `skip_list` names no parameter of `network`.
    """
    for name, value in {"weight_decay": weight_decay, "learning_rate": learning_rate, "c": c}.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, not {value!r}")
        if name != "c" and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, not {value!r}")
    if not (c == 0 or 1 <= c < math.inf):
        raise ValueError(f"c must be 0 or 1 (no reduction) or above 1, not {c!r}")
    if isinstance(skip_list, str):
        raise TypeError(f"skip_list must be a list of names, not the text {skip_list!r}")
    by_name = dict(network.named_parameters(remove_duplicate=False))
    skip_list = set(skip_list)
    unknown = skip_list - by_name.keys()
    if unknown:
        raise ValueError(f"skip_list names what is no parameter of the network: {', '.join(sorted(unknown))}")
    skipped = {by_name[name] for name in skip_list}

    no_decay, batch_norm_scales, decay = [], [], []
    seen = set()
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            if isinstance(module, _BatchNorm) and name == "weight":
                batch_norm_scales.append(parameter)
            elif is_bias(name) or isinstance(module, NORMALIZATIONS) or parameter in skipped:
                no_decay.append(parameter)
            else:
                decay.append(parameter)

    groups = [
        {"params": no_decay, "weight_decay": 0.0, "lr": learning_rate},
        {"params": batch_norm_scales, "weight_decay": 0.0, "lr": learning_rate / max(c, 1)},
        {"params": decay, "weight_decay": weight_decay, "lr": learning_rate},
    ]
    return [group for group in groups if group["params"]]


def is_bias(name: str) -> bool:
    """Whether a module calls this parameter a bias: `bias`, or as in attention and recurrent layers `in_proj_bias`,
    `bias_hh_l0`."""
    return name.startswith("bias") or name.endswith("bias")
