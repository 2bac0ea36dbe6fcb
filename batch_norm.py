"""Batch norm whose scale γ starts below 1 (Section 4 of the paper), in a layer and in any network."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy


# The base is nn.BatchNorm2d's own base, not nn.BatchNorm2d: torchvision's constructors set γ to 1 in whatever is an
# nn.BatchNorm2d after they have built the network, and bn_weight would silently be lost.
class ScaleBatchNorm2d(_BatchNorm):
    """Batch normalization over (N, C, H, W) whose scale γ starts at `bn_weight` and whose shift β starts at 0.

    In everything else it is `torch.nn.BatchNorm2d`: the same formula, buffers and `state_dict` names. Two kinds of code
    need `nn.BatchNorm2d` and `initialize_scales` instead: what looks for `nn.BatchNorm2d`, as timm's
    `freeze_batch_norm_2d` does; and constructors that set γ themselves, as timm's ResNets without
    `zero_init_last=False`.

    Args:
        num_features: number of channels C. `num_feature`, the spelling in the paper's repository, is understood too.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics, or None for their cumulative average.
        affine: whether there are γ and β at all; without them `bn_weight` has no effect.
        bn_weight: where every element of γ starts. The paper proposes a value below 1, such as 0.1.
        device, **batch_norm_arguments: further arguments of `torch.nn.BatchNorm2d`, such as `track_running_stats` and
            `dtype`.

    Raises:
        TypeError: `num_features` is missing, or not an integer.
        ValueError: `bn_weight` is not a finite number above 0 that the `dtype` can hold, or the input of `forward` does
            not have 4 dimensions.
    """

    def __init__(
        self,
        num_features: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        bn_weight: float = 1.0,
        *,
        num_feature: int | None = None,
        device: torch.device | str | int | None = None,  # by its name here, nn.utils.skip_init knows that there is one
        **batch_norm_arguments: Any,
    ) -> None:
        if (num_features is None) == (num_feature is None):
            raise TypeError("ScaleBatchNorm2d needs num_features, the number of channels, exactly once")
        channels = index(num_feature if num_features is None else num_features)
        check_bn_weight(bn_weight, batch_norm_arguments.get("dtype") or torch.get_default_dtype())
        self.bn_weight = float(bn_weight)  # before the constructor of torch, which calls reset_parameters
        super().__init__(channels, eps, momentum, affine, device=device, **batch_norm_arguments)
        self.__module__ = _BatchNorm.__module__  # by this attribute, torch.fx knows the layers that it does not trace

    def reset_parameters(self) -> None:
        """Reset the running statistics, set γ to `bn_weight` and β to 0."""
        super().reset_parameters()
        if self.affine:
            nn.init.constant_(self.weight, self.bn_weight)

    _check_input_dim = nn.BatchNorm2d._check_input_dim

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bn_weight={self.bn_weight}"


def initialize_scales(network: nn.Module, bn_weight: float) -> list[str]:
    """Set γ to `bn_weight` and β to 0 in every batch norm of a network that has a γ. In place.

    Batch norms are torch's, `nn.SyncBatchNorm` included, and all classes derived from them; also those at the end of
    residual blocks, whose γ some networks start at 0. Nothing else changes.

    This is for training from scratch: a trained network loses with γ and β what it has learned. A UserWarning says so
    where one seems to be trained, and where the layer of `prepend_input_norm`, whose γ should start lower, is in it.

    Args:
        network: any module.
        bn_weight: where every element of γ starts. The paper proposes a value below 1, such as 0.1.

    Returns:
        The names of these batch norms, as in `network.named_modules()`.

    Raises:
        ValueError: there is no such batch norm; one is lazy, or computes γ or β from other parameters; or `bn_weight`
            is not a finite number above 0 that their types can hold. Nothing is changed then.
    """
    modules = network.named_modules()
    layers = {name: layer for name, layer in modules if isinstance(layer, _BatchNorm) and layer.weight is not None}
    if not layers:
        raise ValueError("there is no batch norm with a scale γ in the network")
    for name, layer in layers.items():
        if is_lazy(layer.weight):
            raise ValueError(
                f"the batch norm {name!r} is lazy and has no γ yet: let the network compute a batch in eval mode first"
            )
        check_plain(layer, name, "weight")
        check_plain(layer, name, "bias")
        check_bn_weight(bn_weight, layer.weight.dtype)
    if any(map(is_trained, layers.values())):
        warnings.warn(
            "the network seems to have been trained, and loses with its γ and β what it has learned: the method is for"
            " training from scratch; to fine-tune a network, leave initialize_scales out",
            stacklevel=2,
        )
    if any(isinstance(module, NormalizesImages) for module in network.modules()):
        warnings.warn(
            f"the γ of the input layer starts at {bn_weight:g} now, and not at {bn_weight:g} · {SIGMA_ACT}: call"
            " initialize_scales before prepend_input_norm",
            stacklevel=2,
        )
    for layer in layers.values():
        nn.init.constant_(layer.weight, bn_weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        if isinstance(layer, ScaleBatchNorm2d):
            layer.bn_weight = float(bn_weight)  # for reset_parameters
    return list(layers)


def is_trained(layer: _BatchNorm) -> bool:
    """Whether a batch norm has seen batches, or its running variances, or γ where it has none, are not all the same."""
    state = (layer.num_batches_tracked, layer.weight if layer.running_var is None else layer.running_var)
    known = [tensor for tensor in state if tensor is not None and not tensor.is_meta]
    return any(tensor > 0 if tensor.dim() == 0 else (tensor != tensor[:1]).any() for tensor in known)


def check_plain(layer: nn.Module, layer_name: str, name: str) -> None:
    """ValueError where a tensor of a layer is computed from other ones, so that setting it would have no effect."""
    tensor = getattr(layer, name, None)
    if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter) and name not in layer._buffers:
        raise ValueError(
            f"the {name} of layer {layer_name!r} is computed from other parameters, as by a parametrization, pruning or"
            " weight norm: set the initial values first, and add that afterwards"
        )


def check_bn_weight(bn_weight: float, dtype: torch.dtype) -> None:
    """ValueError where this is not a finite number above 0 that the type can hold."""
    held = torch.finfo(dtype)  # beyond this range, numbers become 0 or infinite, or lose digits
    if not held.smallest_normal <= bn_weight <= held.max:
        raise ValueError(f"bn_weight must be a finite number above 0 that {dtype} can hold, not {bn_weight!r}")


SIGMA_ACT = 0.58  # standard deviation of a rectified standard normal variable, sqrt((1 - 1/π) / 2)


class NormalizesImages(nn.Sequential):
    """What `prepend_input_norm` returns: `nn.Sequential(input_norm, network)` that has the network's attributes, too.

    So `num_classes`, `default_cfg` or `set_grad_checkpointing` of a network of timm are found as before, and a new `fc`
    takes the place of the old one. What begins with an underscore or with `forward` is not passed on:
    `forward_features` would compute without the input layer. Names of weights that the network gives, as timm's
    `no_weight_decay`, lack the `1.` in front.
    """

    def forward(self, images: Tensor) -> Any:
        for module in self:  # as nn.Sequential does, whose own forward torch 2.11 does not compile
            images = module(images)
        return images

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith(("_", "forward")):
                raise
            return getattr(super().__getattr__("1"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        is_own = name in self.__dict__ or name in self._modules or hasattr(type(self), name)
        if is_own or not hasattr(self, name):
            super().__setattr__(name, value)
        else:  # a layer of its own would come behind the network
            setattr(self[1], name, value)


def prepend_input_norm(network: nn.Module, bn_weight: float, num_channels: int | None = None) -> NormalizesImages:
    """Put a batch norm in front of a network that normalizes its images (Section 4 of the paper).

    Its γ starts at `bn_weight` · σ_act, as if the images were rectified activations of a layer before; its β is frozen
    at 0. It is made on the device and of the type of the network's first floating-point parameter, and in its mode.
    Call `initialize_scales` before this, not after. A UserWarning says where there is such a layer already.

    Args:
        network: any module.
        bn_weight: where γ starts in the network itself.
        num_channels: of the images, (N, num_channels, H, W). By default as many as the first `nn.Conv2d` in
            `network.modules()` takes; 3 where there is none, or a lazy one that does not know it yet.

    Returns:
        An `nn.Sequential` of a `ScaleBatchNorm2d` and the network, so that the names of all weights start with `0.` or
        `1.`. Attributes of the network are found in it, too; see `NormalizesImages`.

    Raises:
        ValueError: `bn_weight` is not a finite number above 0 that the type can hold.
    """
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    check_bn_weight(bn_weight, like.dtype)
    if any(isinstance(module, NormalizesImages) for module in network.modules()):
        warnings.warn("the network has an input layer already, and gets a second one", stacklevel=2)
    if num_channels is None:
        first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
        num_channels = getattr(first, "in_channels", 0) or 3
    input_norm = ScaleBatchNorm2d(num_channels, bn_weight=bn_weight * SIGMA_ACT, device=like.device, dtype=like.dtype)
    input_norm.bias.requires_grad = False
    whole = NormalizesImages(input_norm, network)
    whole.training = input_norm.training = network.training  # and the layers within stay in the modes they are in
    return whole


@contextmanager
def debias_running_statistics(network: nn.Module) -> Iterator[None]:
    """Within it, the running statistics of batch norms are free of the values that they started from, 0 and 1.

    After t batches with momentum m, these still weigh r = (1 - m)^t. So the mean becomes mean / (1 - r), the variance
    (variance - r) / (1 - r): the weighted averages of the batches alone, exact but for rounding. No image is needed.

        with debias_running_statistics(network):
            evaluate(network.eval())
            torch.save(network.state_dict(), "evaluated.pt")

    At its end, the statistics are as before, for the training to go on. Layers stay as they are that have no running
    statistics or no momentum (None or 0), or have seen no batch. The result is wrong where the momentum has changed,
    where statistics did not start at 0 and 1 (as those of `equivalence.equivalent`), and where they are free of their
    start already, as those saved above.

    Raises:
        ValueError: a running variance is below r, and so did not start at 1. Nothing is changed then.
    """
    statistics, debiased = [], []
    for name, layer in network.named_modules():
        if not isinstance(layer, _BatchNorm) or layer.running_mean is None or layer.momentum is None:
            continue
        start_left = (1 - layer.momentum) ** int(layer.num_batches_tracked)
        if start_left == 1:
            continue
        mean, variance = (s.detach().to("cpu", torch.float64) for s in (layer.running_mean, layer.running_var))
        variance = (variance - start_left) / (1 - start_left)
        if (variance < -1e-3).any():  # less may be rounding
            raise ValueError(
                f"the running variance of layer {name!r} did not start at 1: it cannot be freed of its start"
            )
        statistics += [layer.running_mean, layer.running_var]
        debiased += [mean / (1 - start_left), variance.clamp(min=0)]
    raw = [statistic.clone() for statistic in statistics]
    for statistic, value in zip(statistics, debiased, strict=True):
        statistic.copy_(value)
    try:
        yield
    finally:
        for statistic, value in zip(statistics, raw, strict=True):
            statistic.copy_(value)


def steps_until_start_is_gone(network: nn.Module) -> int:
    """After how many steps the start of all running statistics weighs less than 0.0001 in them; 0 where there are none.

    It follows from the smallest momentum of the batch norms: 88 steps for 0.1, the default, and 917 for 0.01.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]
    momenta = [layer.momentum for layer in layers if layer.momentum]
    return math.ceil(math.log(1e-4) / math.log1p(-min(*momenta, 0.9999))) if momenta else 0
