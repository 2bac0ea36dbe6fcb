"""The layer alone, in a world of one process; tests/test_data_parallel.py has the shares of several."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from batch_norm import ScaleBatchNorm2d
from networks import construct_network
from training.synchronized_batch_norm import SynchronizedBatchNorm, synchronize


@pytest.fixture(autouse=True)
def world_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (ScaleBatchNorm2d(5, bn_weight=0.1, dtype=torch.float64), (6, 5, 4, 3)),
        (nn.BatchNorm2d(5, momentum=None, eps=0.1, dtype=torch.float64), (1, 5, 4, 3)),
        (nn.BatchNorm2d(5, affine=False, dtype=torch.float64), (6, 5, 4, 3)),
        (nn.BatchNorm2d(5, track_running_stats=False, dtype=torch.float64), (6, 5, 4, 3)),
        (nn.BatchNorm1d(5, dtype=torch.float64), (6, 5)),
        (nn.BatchNorm3d(5, dtype=torch.float64), (2, 5, 2, 3, 2)),
    ],
    ids=["scaled", "average", "without scale", "without statistics", "1d", "3d"],
)
def test_computes_what_torch_does(layer, shape):
    """Outputs, gradients and running statistics, over two batches and in evaluation."""
    torch.manual_seed(0)
    expected = copy.deepcopy(layer)
    layer = SynchronizedBatchNorm(layer)
    for _ in range(2):
        images = torch.randn(shape, dtype=torch.float64) * 3 + 100
        gradient = torch.randn(shape, dtype=torch.float64)
        ours, theirs = (images.clone().requires_grad_() for _ in range(2))
        for batch_norm, inputs in ((layer, ours), (expected, theirs)):
            batch_norm.zero_grad()
            batch_norm(inputs).backward(gradient)
        torch.testing.assert_close(layer(images), expected(images))
        torch.testing.assert_close(ours.grad, theirs.grad)
        for one, other in zip(layer.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
        torch.testing.assert_close(layer.state_dict(), expected.state_dict())
    assert torch.equal(layer.load_state_dict(expected.state_dict()) and layer.eval()(images), expected.eval()(images))


def test_small_deviations_from_a_large_mean():
    """Where the difference of two sums of squares would have no digits left."""
    images = 1e4 + torch.arange(8.0).view(8, 1, 1, 1)
    normalized = SynchronizedBatchNorm(nn.BatchNorm2d(1, eps=0))(images)
    deviations = torch.arange(8.0, dtype=torch.float64) - 3.5
    torch.testing.assert_close(normalized.flatten().double(), deviations / deviations.square().mean().sqrt())


def test_outputs_have_the_type_of_inputs():
    layer = SynchronizedBatchNorm(nn.BatchNorm2d(3))
    assert layer(torch.rand(4, 3, 2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.float32


def test_single_value_and_wrong_dimensions():
    layer = SynchronizedBatchNorm(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="one value for a channel"):
        layer(torch.rand(1, 3, 1, 1))
    with pytest.raises(ValueError, match="at least 2D"):
        layer(torch.rand(3))


@pytest.mark.parametrize("convert", [synchronize, nn.SyncBatchNorm.convert_sync_batchnorm], ids=["CPU", "GPU"])
def test_network_keeps_its_parameters(convert):
    """γ starts where it did, the input layer's β stays frozen, and names and objects are the same."""
    network = construct_network("resnet18", dataset="digits", bn_weight=0.1)
    before, state = dict(network.named_parameters()), list(network.state_dict())
    convert(network)
    after = dict(network.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert list(network.state_dict()) == state
    layers = [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    assert len(layers) == 21 and {type(layer) for layer in layers} <= {SynchronizedBatchNorm, nn.SyncBatchNorm}
    assert all((layer.weight == 0.1).all() for layer in layers[1:]) and not layers[0].bias.requires_grad
