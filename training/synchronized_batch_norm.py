"""Batch norm with the statistics of a whole batch, of which every process has a share, where torch has none.

`nn.SyncBatchNorm` computes on GPUs only. `SynchronizedBatchNorm` takes its place on the CPU.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm


class SynchronizedBatchNorm(_BatchNorm):
    """Batch norm over (N, C, ...) that is trained with mean and variance of the shares of all processes together.

    The mean comes first, then the mean of the squared deviations from it: a variance as a difference of two large
    numbers would lose its digits. Sums are of float32, as is all else, whatever autocast says. Shares may be of
    different sizes, a single image included. The running variance is the unbiased one of the whole batch, as in torch's
    batch norm. What one process computes on the whole batch differs by rounding: sums are added up in another order.
    In evaluation it computes what torch's batch norm does, to the last bit.

    Args:
        layer: the batch norm whose place it takes. Parameters and buffers are the same objects, under the same names.
        group: the processes; all of those that torch.distributed knows, by default.

    Raises:
        ValueError: the whole batch has a single value for a channel (in `forward`).
    """

    def __init__(self, layer: _BatchNorm, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum, affine=False, track_running_stats=False)
        self.affine, self.track_running_stats = layer.affine, layer.track_running_stats
        self._parameters, self._buffers = layer._parameters, layer._buffers
        self.training = layer.training
        self.group = group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        others = [0, *range(2, input.dim())]  # all dimensions but that of the channels
        shape = [1, -1] + [1] * (input.dim() - 2)
        number = values.new_tensor([input.numel() // input.shape[1]])
        sums, count = add_up(torch.cat([values.sum(others), number]), self.group).split([self.num_features, 1])
        if count <= 1:
            raise ValueError("batch norm cannot train on a batch with one value for a channel")
        mean = sums / count
        deviations = values - mean.view(shape)
        variance = add_up(deviations.square().sum(others), self.group) / count
        if self.track_running_stats:
            self.update(mean.detach(), variance.detach() * (count / (count - 1)))
        normalized = deviations * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normalized = normalized * self.weight.view(shape) + self.bias.view(shape)
        return normalized.to(input.dtype)

    @torch.no_grad()
    def update(self, mean: Tensor, variance: Tensor) -> None:
        """Bring the running statistics closer to those of a batch; the variance is the unbiased one."""
        self.num_batches_tracked.add_(1)
        weight = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        for running, of_batch in ((self.running_mean, mean), (self.running_var, variance)):
            running.mul_(1 - weight).add_(of_batch, alpha=weight)


class AddUp(torch.autograd.Function):
    """The sum of a tensor over the processes, with its gradient: what each contributes goes into the losses of all."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        context.group = group
        return total(tensor, group)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return total(gradient, context.group), None


def total(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of a tensor over the processes."""
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(tensor, group=group)
    return tensor


add_up = AddUp.apply


def synchronize(network: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Put a `SynchronizedBatchNorm` in the place of every batch norm within a network. In place."""
    for name, layer in network.named_children():
        if isinstance(layer, _BatchNorm):
            setattr(network, name, SynchronizedBatchNorm(layer, group))
        else:
            synchronize(layer, group)
