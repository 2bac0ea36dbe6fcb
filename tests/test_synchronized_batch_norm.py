"""The layers alone, in a world of one process; tests/test_data_parallel.py has the shares of several."""

import copy
import inspect

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import sync_batch_norm
from torch.nn.utils import parametrize

from batch_norm import ScaleBatchNorm2d
from networks import construct_network
from training import synchronized_batch_norm
from training.synchronized_batch_norm import synchronize
from training.together import Replica


@pytest.fixture(autouse=True)
def world_of_one(monkeypatch):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", nn.BatchNorm2d.forward)  # as `together.joined` does
    yield
    dist.destroy_process_group()


@pytest.fixture
def calls(monkeypatch) -> list[Tensor]:
    """What batch norms have got from the other processes' sums."""
    whole, made = synchronized_batch_norm.batch_norm, []
    monkeypatch.setattr(
        synchronized_batch_norm, "batch_norm", lambda *arguments: made.append(whole(*arguments)) or made[-1]
    )
    return made


class Doubled(nn.BatchNorm2d):
    """One's own layer, which does more than to normalize, before and after."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input + 1).relu()


def parametrized() -> nn.Module:
    return parametrize.register_parametrization(nn.BatchNorm2d(5), "weight", nn.Softplus())


def without_shift() -> nn.Module:
    layer = nn.BatchNorm2d(5)
    layer.register_parameter("bias", None)
    return layer


LAYERS = {
    "scaled": (lambda: ScaleBatchNorm2d(5, bn_weight=0.1), (6, 5, 4, 3)),
    "average": (lambda: nn.BatchNorm2d(5, momentum=None, eps=0.1), (1, 5, 4, 3)),
    "without scale": (lambda: nn.BatchNorm2d(5, affine=False), (6, 5, 4, 3)),
    "without shift": (without_shift, (6, 5, 4, 3)),
    "1d": (lambda: nn.BatchNorm1d(5), (6, 5)),
    "3d": (lambda: nn.BatchNorm3d(5), (2, 5, 2, 3, 2)),
    "torch's own": (lambda: nn.SyncBatchNorm(5), (6, 5, 4, 3)),
    "timm's": (lambda: BatchNormAct2d(5, act_layer=nn.SiLU, drop_layer=nn.Hardtanh), (6, 5, 4, 3)),
    "one's own": (lambda: Doubled(5), (6, 5, 4, 3)),
    "parametrized": (parametrized, (6, 5, 4, 3)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_computes_what_it_did(kind, calls):
    """Outputs, gradients and running statistics, over two batches and in evaluation."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    expected = make().double()
    layer = copy.deepcopy(expected)
    synchronize(layer)
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
    assert len(calls) == 4
    assert torch.equal(layer.load_state_dict(expected.state_dict()) and layer.eval()(images), expected.eval()(images))
    assert len(calls) == 4


def test_small_deviations_from_a_large_mean():
    """Where the difference of two sums of squares would have no digits left."""
    images, layer = 1e4 + torch.arange(8.0).view(8, 1, 1, 1), nn.BatchNorm2d(1, eps=0)
    synchronize(layer)
    deviations = torch.arange(8.0, dtype=torch.float64) - 3.5
    torch.testing.assert_close(layer(images).flatten().double(), deviations / deviations.square().mean().sqrt())


def test_outputs_have_the_type_of_inputs():
    layer = nn.BatchNorm2d(3)
    synchronize(layer)
    assert layer(torch.rand(4, 3, 2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.float32
    with pytest.raises(ValueError, match="one value for a channel"):
        layer(torch.rand(1, 3, 1, 1))
    with pytest.raises(ValueError, match="expected 4D"):
        layer(torch.rand(2, 3))


def test_arguments_are_those_of_torch_on_a_gpu():
    ours = list(inspect.signature(synchronized_batch_norm.batch_norm).parameters)
    assert ours == list(inspect.signature(sync_batch_norm.forward).parameters)[1:]


def test_network_keeps_its_layers():
    """Classes, parameters, modes, hooks and names; the input layer's β stays frozen."""
    network = construct_network("resnet18", dataset="digits", bn_weight=0.1)
    network[1].layer1.eval()
    seen = []
    network[1].bn1.register_forward_hook(lambda *_: seen.append(1))
    layers = {name: (layer, type(layer), layer.training) for name, layer in network.named_modules()}
    parameters, state = list(network.parameters()), list(network.state_dict())
    synchronize(network)
    assert {name: (layer, type(layer), layer.training) for name, layer in network.named_modules()} == layers
    assert all(one is other for one, other in zip(network.parameters(), parameters, strict=True))
    assert list(network.state_dict()) == state and not network[0].bias.requires_grad
    network(torch.rand(2, 3, 8, 8))
    assert seen == [1]


class Frozen(nn.Sequential):
    """A network that freezes its batch norms, which it knows by their type."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        for layer in self:
            layer.training = mode and type(layer) is not nn.BatchNorm2d
        return self


def test_what_a_network_freezes_stays_frozen(calls):
    network = Frozen(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    synchronize(network)
    before = copy.deepcopy(network.state_dict())
    network.train()(torch.rand(4, 3, 2, 2) + 7)
    assert not calls and str(network.state_dict()) == str(before)


def test_sync_batch_norm_within_a_replica():
    """torch refuses both on a CPU."""
    network = nn.Sequential(nn.SyncBatchNorm(3), nn.Conv2d(3, 3, 1))
    expected = copy.deepcopy(network)(images := torch.rand(4, 3, 2, 2))
    synchronize(network)
    torch.testing.assert_close(Replica(network)(images), expected)


class ByHand(nn.BatchNorm2d):
    """It normalizes without torch's function."""

    def forward(self, input: Tensor) -> Tensor:
        return (input - input.mean()) / input.std()


def test_what_cannot_be_shared():
    for layer, message in [
        (nn.BatchNorm2d(3, track_running_stats=False), "batch norm '1' has no running statistics, so that it can be"),
        (nn.InstanceNorm2d(3, track_running_stats=True), "instance norm '1' has running statistics, so that it can be"),
    ]:
        with pytest.raises(ValueError, match=f"^{message} trained in one process only"):
            synchronize(nn.Sequential(nn.Identity(), layer))
    synchronize(nn.InstanceNorm2d(3))
    network = nn.Sequential(ByHand(3))
    synchronize(network)
    network.eval()(torch.rand(4, 3, 2, 2))
    with pytest.raises(ValueError, match=r"^batch norm '0' does not call torch's F\.batch_norm, so"):
        network.train()(torch.rand(4, 3, 2, 2))


def test_other_batch_norms_are_left_alone(calls):
    """Of weights, say, as timm's standardized convolutions compute it, and in activations of a layer."""
    network = nn.Sequential(nn.BatchNorm2d(3))
    synchronize(network)
    F.batch_norm(torch.rand(4, 3, 2, 2), None, None, training=True)
    assert not calls
