"""Batch norm with the statistics of a whole batch, of which every process has a share.

Each layer stays what it is, with all that it does besides: `synchronize` changes no more than what its own `forward`
gets from `F.batch_norm` in training. On GPUs that is what `nn.SyncBatchNorm` computes, elsewhere what this module does.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase, sync_batch_norm
from torch.overrides import TorchFunctionMode

ONE_PROCESS_ONLY = "so that it can be trained in one process only: start train.py without torchrun"


def synchronize(network: nn.Module) -> None:
    """Let every batch norm of a network train with mean and variance of the shares of all processes. In place.

    What it changes is `forward` of these layers, as an attribute: classes, parameters, buffers and hooks stay. Shares
    may be of different sizes, a single image included. In evaluation a layer computes what it did, to the last bit.

    Args:
        network: any module. Other layers that compute with statistics of a batch do so with those of a share.

    Raises:
        ValueError: a layer cannot share its statistics; or, in its `forward`, it does not get them from `F.batch_norm`,
            or the whole batch has a single value for a channel.
    """
    for name, layer in network.named_modules():
        if isinstance(layer, _BatchNorm):
            if layer.running_mean is None:
                raise ValueError(f"batch norm {name!r} has no running statistics, {ONE_PROCESS_ONLY}")
            layer.forward = partial(forward, layer, layer.forward, name)
        elif isinstance(layer, _NormBase) and layer.running_mean is not None:
            raise ValueError(f"instance norm {name!r} has running statistics, {ONE_PROCESS_ONLY}")


def forward(layer: _BatchNorm, own_forward: Callable, name: str, *inputs: Any, **named: Any) -> Any:
    """What a layer computes, with the statistics of the whole batch in training."""
    if not layer.training:
        return own_forward(*inputs, **named)
    with WholeBatch() as whole_batch:
        outputs = own_forward(*inputs, **named)
    if not whole_batch.used:
        raise ValueError(f"batch norm {name!r} does not call torch's F.batch_norm, {ONE_PROCESS_ONLY}")
    return outputs


class WholeBatch(TorchFunctionMode):
    """Within it, `F.batch_norm` takes the statistics of all processes; `used` is whether it was called."""

    used = False

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: Sequence = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is F.batch_norm:
            self.used, function = True, self.batch_norm
        return function(*args, **(kwargs or {}))

    def batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training or running_mean is None:  # without running ones, it normalizes weights, not images
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        compute = sync_batch_norm.apply if input.is_cuda else batch_norm
        whole = dist.group.WORLD, dist.get_world_size()
        return compute(input, weight, bias, running_mean, running_var, eps, momentum, *whole)


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    momentum: float,
    process_group: dist.ProcessGroup,
    world_size: int,
) -> Tensor:
    """Batch norm of a share (N, C, ...) with the statistics of the whole batch, which become part of the running ones.

    It has the arguments of torch's own for GPUs. The mean comes first, then the mean of the squared deviations from it:
    a variance as a difference of two large numbers would lose its digits. Sums are of float32, as is all else, whatever
    autocast says. The running variance is the unbiased one of the whole batch. What one process computes on the whole
    batch differs by rounding: sums are added up in another order.
    """
    values = input.to(torch.promote_types(input.dtype, torch.float32))
    others = [0, *range(2, input.dim())]  # all dimensions but that of the channels
    shape = [1, -1] + [1] * (input.dim() - 2)
    channels = input.shape[1]
    number = values.new_tensor([input.numel() // channels])
    sums, count = AddUp.apply(torch.cat([values.sum(others), number]), process_group).split([channels, 1])
    if count <= 1:
        raise ValueError("batch norm cannot train on a batch with one value for a channel")
    mean = sums / count
    deviations = values - mean.view(shape)
    variance = AddUp.apply(deviations.square().sum(others), process_group) / count
    with torch.no_grad():
        for running, of_batch in ((running_mean, mean), (running_var, variance * (count / (count - 1)))):
            running.mul_(1 - momentum).add_(of_batch, alpha=momentum)
    normalized = deviations * (variance + eps).rsqrt().view(shape)
    if weight is not None:
        normalized = normalized * weight.view(shape)
    if bias is not None:
        normalized = normalized + bias.view(shape)
    return normalized.to(input.dtype)


class AddUp(torch.autograd.Function):
    """The sum of a tensor over the processes, with its gradient: what each contributes goes into the losses of all."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        context.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return AddUp.apply(gradient, context.group), None
