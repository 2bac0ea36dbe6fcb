import copy
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from batch_norm import ScaleBatchNorm2d, initialize_scales


def test_starts_at_bn_weight_and_zero():
    layer = ScaleBatchNorm2d(64, bn_weight=0.1)
    assert torch.equal(layer.weight, torch.full((64,), 0.1))
    assert torch.equal(layer.bias, torch.zeros(64))
    assert layer.eps == 1e-5 and layer.momentum == 0.1 and layer.affine and layer.track_running_stats


def test_line_of_the_paper_readme_runs_as_printed():
    bn1 = ScaleBatchNorm2d(num_feature=64, eps=1e-5, momentum=0.1, affine=True, bn_weight=0.1)
    assert bn1.num_features == 64
    assert torch.equal(bn1.weight, torch.full((64,), 0.1))


@pytest.mark.parametrize("arguments", [{}, {"num_features": 3, "num_feature": 3}])
def test_number_of_features_exactly_once(arguments):
    with pytest.raises(TypeError, match="num_features"):
        ScaleBatchNorm2d(**arguments)


@pytest.mark.parametrize("num_features", [[3], (3,), True, "3", 3.0, torch.tensor(3)])
@pytest.mark.parametrize("name", ["num_features", "num_feature"])
def test_number_of_features_that_is_no_integer(name, num_features):
    with pytest.raises(TypeError, match="num_features must be an integer, the number of channels, not "):
        ScaleBatchNorm2d(**{name: num_features})


@pytest.mark.parametrize("num_features", [0, -1])
def test_number_of_features_below_1(num_features):
    with pytest.raises(ValueError, match=f"num_features must be at least 1, not {num_features}"):
        ScaleBatchNorm2d(num_features)


def test_number_of_features_of_numpy():
    layer = ScaleBatchNorm2d(np.int64(3))
    assert type(layer.num_features) is int and layer.weight.shape == (3,)


def test_computes_what_torch_computes():
    ours, torchs = ScaleBatchNorm2d(5, bn_weight=0.3), nn.BatchNorm2d(5)
    nn.init.constant_(torchs.weight, 0.3)
    for _ in range(3):
        images = torch.randn(4, 5, 6, 7) * 3 + 1
        assert torch.equal(ours(images), torchs(images))
    assert torch.equal(ours.eval()(images), torchs.eval()(images))
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    for name, value in torchs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


def test_closed_form():
    images = torch.randn(8, 2, 3, 3, dtype=torch.float64)
    layer = ScaleBatchNorm2d(2, bn_weight=0.1, dtype=torch.float64)
    mean = images.mean((0, 2, 3), keepdim=True)
    variance = ((images - mean) ** 2).mean((0, 2, 3), keepdim=True)
    torch.testing.assert_close(layer(images), 0.1 * (images - mean) / (variance + 1e-5).sqrt())


def test_reset_parameters_starts_over():
    layer = ScaleBatchNorm2d(3, bn_weight=0.2)
    layer(torch.randn(4, 3, 2, 2))
    nn.init.constant_(layer.weight, 7)
    nn.init.constant_(layer.bias, 7)
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.full((3,), 0.2))
    assert torch.equal(layer.bias, torch.zeros(3))
    assert torch.equal(layer.running_mean, torch.zeros(3)) and layer.num_batches_tracked == 0


def test_on_the_meta_device():
    layer = ScaleBatchNorm2d(3, bn_weight=0.2, device="meta")
    assert layer.weight.is_meta
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.equal(layer.weight, torch.full((3,), 0.2))


def test_deepcopy_keeps_bn_weight():
    layer = copy.deepcopy(ScaleBatchNorm2d(3, bn_weight=0.2))
    assert torch.equal(layer.weight, torch.full((3,), 0.2))
    nn.init.ones_(layer.weight)
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.full((3,), 0.2))


def test_repr_shows_bn_weight():
    assert "bn_weight=0.25" in repr(ScaleBatchNorm2d(3, bn_weight=0.25))
    assert "3, eps=1e-05" in repr(ScaleBatchNorm2d(3))


@pytest.mark.parametrize("constructor", ["resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0"])
def test_survives_the_constructors_of_torchvision(constructor):
    norm_layer = partial(ScaleBatchNorm2d, eps=1e-5, momentum=0.1, affine=True, bn_weight=0.1)
    network = torchvision.models.get_model(constructor, norm_layer=norm_layer)
    layers = [module for module in network.modules() if isinstance(module, ScaleBatchNorm2d)]
    assert len(layers) >= 20
    for layer in layers:
        assert torch.equal(layer.weight, torch.full_like(layer.weight, 0.1))


def test_further_arguments_of_torch():
    layer = ScaleBatchNorm2d(3, bn_weight=0.5, track_running_stats=False, dtype=torch.float64)
    assert layer.running_mean is None and layer.weight.dtype == torch.float64
    assert ScaleBatchNorm2d(3, momentum=None).momentum is None
    with pytest.raises(TypeError):
        ScaleBatchNorm2d(3, bn_wieght=0.5)


def test_without_affine_there_is_no_scale():
    layer = ScaleBatchNorm2d(3, affine=False, bn_weight=0.5)
    assert layer.weight is None and layer.bias is None
    layer(torch.randn(2, 3, 2, 2))


@pytest.mark.parametrize("bn_weight", [0, -0.1, float("nan"), float("inf"), 10**400, True, "0.1", None])
def test_bad_bn_weight(bn_weight):
    with pytest.raises(ValueError, match="bn_weight must be a finite number above 0"):
        ScaleBatchNorm2d(3, bn_weight=bn_weight)


@pytest.mark.parametrize(
    ("bn_weight", "dtype"),
    [
        (1e-320, None),
        (1e-60, None),
        (1e39, None),
        (1e-9, torch.float16),
        (70_000, torch.float16),
        (1e39, torch.bfloat16),
    ],
)
def test_bn_weight_that_its_type_cannot_hold(bn_weight, dtype):
    with pytest.raises(ValueError, match=f"bn_weight must be .* above 0 that {dtype or torch.float32} can hold"):
        ScaleBatchNorm2d(3, bn_weight=bn_weight, dtype=dtype)


@pytest.mark.parametrize(("bn_weight", "dtype"), [(1e-30, None), (1e-60, torch.float64), (60_000, torch.float16)])
def test_bn_weight_that_its_type_can_hold(bn_weight, dtype):
    weight = ScaleBatchNorm2d(3, bn_weight=bn_weight, dtype=dtype).weight
    assert weight.tolist() == pytest.approx([bn_weight] * 3, rel=1e-3, abs=0)


def test_wants_four_dimensions():
    with pytest.raises(ValueError, match="4D"):
        ScaleBatchNorm2d(3)(torch.randn(2, 3))


def test_converts_to_synchronized_batch_norm():
    network = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(ScaleBatchNorm2d(3, bn_weight=0.1)))
    assert isinstance(network[0], nn.SyncBatchNorm)
    assert torch.equal(network[0].weight, torch.full((3,), 0.1))


def network_of_all_kinds() -> nn.Sequential:
    """Batch norms of every kind with what must stay as it is; nothing is at 0 or 1."""
    batch_norms = [nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3), nn.SyncBatchNorm(3), ScaleBatchNorm2d(3)]
    without_scale = nn.BatchNorm2d(3, affine=False)
    others = [nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3, affine=True), nn.RMSNorm(3), nn.Conv2d(3, 3, 1)]
    network = nn.Sequential(*batch_norms, nn.Sequential(nn.BatchNorm2d(3, bias=False)), without_scale, *others)
    for value in network.state_dict().values():
        value.copy_(torch.arange(7, 7 + value.numel()).view(value.shape))
    return network


def test_scales_of_every_kind_of_batch_norm_and_nothing_else():
    network, before = network_of_all_kinds(), network_of_all_kinds().state_dict()
    random_state = torch.get_rng_state()
    assert initialize_scales(network, 0.1) == ["0", "1", "2", "3", "4", "5.0"]
    assert torch.equal(torch.get_rng_state(), random_state)
    after = network.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        layer, _, kind = name.rpartition(".")
        if layer in ("0", "1", "2", "3", "4", "5.0") and kind in ("weight", "bias"):
            value = torch.full((3,), 0.1 if kind == "weight" else 0.0)
        assert torch.equal(after[name], value), name
    network[4].reset_parameters()
    assert torch.equal(network[4].weight, torch.full((3,), 0.1)) and "bn_weight=0.1" in repr(network[4])


def test_scales_that_a_network_starts_at_0():
    network = torchvision.models.resnet18(zero_init_residual=True)
    assert torch.count_nonzero(network.layer1[0].bn2.weight) == 0
    names = initialize_scales(network, 0.2)
    layers = [name.removesuffix(".running_mean") for name in network.state_dict() if name.endswith(".running_mean")]
    assert names == layers and len(names) == 20
    for name in names:
        assert torch.all(network.get_parameter(f"{name}.weight") == 0.2)


def test_frozen_scales_in_other_types_and_places():
    network = nn.Sequential(
        nn.BatchNorm2d(2, dtype=torch.float64), nn.BatchNorm1d(2, dtype=torch.float16), nn.BatchNorm2d(2, device="meta")
    )
    network[0].weight.requires_grad = network[1].bias.requires_grad = False
    parameters = list(network.parameters())
    initialize_scales(network, 0.25)
    assert all(ours is before for ours, before in zip(network.parameters(), parameters, strict=True))
    assert [p.requires_grad for p in parameters] == [False, True, True, False, True, True]
    assert network[0].weight.dtype == torch.float64 and network[0].weight.tolist() == [0.25, 0.25]
    assert network[1].weight.dtype == torch.float16 and network[1].weight.tolist() == [0.25, 0.25]
    assert network[2].weight.is_meta


def test_layer_that_is_used_twice():
    layer = nn.BatchNorm2d(2)
    assert initialize_scales(nn.Sequential(layer, nn.ReLU(), layer), 0.1) == ["0"]
    assert initialize_scales(layer, 0.3) == [""]
    assert layer.weight.tolist() == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize(
    "network",
    [nn.Linear(2, 2), nn.Sequential(), nn.BatchNorm2d(3, affine=False), nn.LayerNorm(3), FrozenBatchNorm2d(3)],
    ids=repr,
)
def test_network_without_scales(network):
    with pytest.raises(ValueError, match="there is no batch norm with a scale γ in the network"):
        initialize_scales(network, 0.1)


def test_lazy_batch_norm():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.LazyBatchNorm2d()))
    with pytest.raises(ValueError, match=r"the batch norm '1\.0' is lazy and has no γ yet: let the network compute a"):
        initialize_scales(network, 0.1)
    assert torch.equal(network[0].weight, torch.ones(3))
    network(torch.rand(2, 3, 4, 4))
    assert initialize_scales(network, 0.1) == ["0", "1.0"]


@pytest.mark.parametrize("bn_weight", [0, -0.1, float("nan"), float("inf"), 1e-60, True, "0.1", None])
def test_scales_that_there_cannot_be(bn_weight):
    network = nn.BatchNorm2d(3)
    with pytest.raises(
        ValueError, match=r"bn_weight must be a finite number above 0 that torch\.float32 can hold, not"
    ):
        initialize_scales(network, bn_weight)
    assert torch.equal(network.weight, torch.ones(3))


def test_scale_that_one_of_the_layers_cannot_hold():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"bn_weight must be .* above 0 that torch.float16 can hold, not 1e-09"):
        initialize_scales(network, 1e-9)
    assert torch.equal(network[0].weight, torch.ones(3))
