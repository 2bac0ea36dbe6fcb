"""The parameter groups: a smaller learning rate for γ, and weight decay for weights alone (Section 4)."""

import math
import re
from collections.abc import Collection
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

NORMALIZATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm)  # _NormBase: batch norms and instance norms
if hasattr(nn, "RMSNorm"):  # from torch 2.4 on
    NORMALIZATIONS += (nn.RMSNorm,)
BIAS = "^bias(es)?(?![a-z]|_table)|(^|_)bias(_orig)?$"  # also in_proj_bias, bias_hh_l0, and a pruned one's bias_orig


def adjust_weight_decay_and_learning_rate(
    network: nn.Module,
    weight_decay: float = 1e-4,
    learning_rate: float = 0.1,
    c: float = 1,
    skip_list: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Sort the parameters of a network into the groups of the paper, for an optimizer such as `torch.optim.SGD`.

    In this order, empty ones left out:

    1. biases, the scales of torch's other normalization layers and what `skip_list` names: no weight decay, full rate;
    2. batch norm scales γ: no weight decay, rate `learning_rate / c`;
    3. the rest (weights of convolutional and linear layers, and what some networks have besides, such as tokens,
       tables of positions and scales of residual branches): `weight_decay`, full rate.

    What a parameter is follows from the type of the module that holds it and its name there, not from its shape. What a
    γ, a bias or a weight is computed from (in a parametrization, by pruning, by weight norm) goes where it would go
    itself. Frozen parameters (`requires_grad` is False) are left out, and one that several modules share appears once,
    in the group of the first.

    A schedule that multiplies all rates by one factor keeps the ratio c, as `LinearLR` and, with `eta_min` = 0,
    `CosineAnnealingLR` do. One that sets the rates needs those of the groups: `OneCycleLR(optimizer, max_lr=[g["lr"]
    for g in groups], ...)`.

    Args:
        network: any module but a scripted or exported one, whose layers have no types. It is left as it is.
        weight_decay: coefficient for the third group.
        learning_rate: rate of the first and third group, before any schedule.
        c: γ learns at 1/c of the rate, in the paper with c = 100; 0 or 1 for no reduction.
        skip_list: names, as in `network.named_parameters()`, of parameters of the third group that get no decay.

    Returns:
        Dictionaries with 'params' (a list), 'weight_decay', 'lr' and 'name': "biases", "batch norm scales", "weights".

    Raises:
        TypeError: `network` is not a module, or `weight_decay`, `learning_rate` or `c` not a number.
        ValueError: `weight_decay` or `learning_rate` is below 0 or not finite, `c` is neither 0 nor a finite number of
            at least 1, or `skip_list` names no parameter of `network`; or FSDP has made one flat parameter of several.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be a torch.nn.Module, not {type(network).__name__}: net, not net.parameters()")
    for name, value in {"weight_decay": weight_decay, "learning_rate": learning_rate}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, not {value!r}")
    if not (c == 0 or 1 <= c < math.inf):
        raise ValueError(f"c must be 0 or 1 (no reduction) or above 1, not {c!r}")
    weight_decay, learning_rate, c = map(float, (weight_decay, learning_rate, c))  # torch.load refuses an np.float64
    by_name = dict(network.named_parameters(remove_duplicate=False))
    skip_list = {skip_list} if isinstance(skip_list, str) else set(skip_list)
    unknown = skip_list - by_name.keys()
    if unknown:
        raise ValueError(f"in skip_list, but not in the network: {', '.join(sorted(unknown))}")
    skipped = {by_name[name] for name in skip_list}

    no_decay, batch_norm_scales, decay = [], [], []
    modules = dict(network.named_modules())
    for path, parameter in network.named_parameters():
        # what a tensor is computed from in a parametrization goes where the tensor would go
        holder, _, name = re.sub(r"(^|\.)parametrizations\.(\w+)\..*", r"\1\2", path).rpartition(".")
        module = modules[holder]
        if not parameter.requires_grad:
            continue
        if getattr(parameter, "_is_flat_param", False):
            raise ValueError(
                f"{path} is a flat parameter, of weights and biases alike: give FullyShardedDataParallel"
                " use_orig_params=True, or use fully_shard"
            )
        if isinstance(module, _BatchNorm) and re.fullmatch("weight(_orig|_g|_v)?", name):  # pruned, weight-normed
            batch_norm_scales.append(parameter)
        elif re.search(BIAS, name) or isinstance(module, NORMALIZATIONS) or parameter in skipped:
            no_decay.append(parameter)
        else:
            decay.append(parameter)

    reduced = learning_rate / max(c, 1)
    groups = [
        {"name": "biases", "params": no_decay, "weight_decay": 0.0, "lr": learning_rate},
        {"name": "batch norm scales", "params": batch_norm_scales, "weight_decay": 0.0, "lr": reduced},
        {"name": "weights", "params": decay, "weight_decay": weight_decay, "lr": learning_rate},
    ]
    return [group for group in groups if group["params"]]
