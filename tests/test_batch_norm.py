import copy
import math
import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils import parametrize, prune
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

from batch_norm import ScaleBatchNorm2d, initialize_scales, prepend_input_norm
from networks import construct_network

# --- the layer ------------------------------------------------------------------------------------------------------


def test_starts_at_bn_weight_and_zero():
    layer = ScaleBatchNorm2d(64, bn_weight=0.1)
    assert torch.equal(layer.weight, torch.full((64,), 0.1))
    assert torch.equal(layer.bias, torch.zeros(64))
    assert layer.eps == 1e-5 and layer.momentum == 0.1 and layer.affine and layer.track_running_stats


def test_line_of_the_paper_readme_runs_as_printed():
    bn1 = ScaleBatchNorm2d(num_feature=64, eps=1e-5, momentum=0.1, affine=True, bn_weight=0.1)
    assert bn1.num_features == 64
    assert torch.equal(bn1.weight, torch.full((64,), 0.1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "num_features"),
        ({"num_features": 3, "num_feature": 3}, TypeError, "num_features"),
        *(
            ({name: value}, TypeError, "num_features must be an integer, the number of channels, not ")
            for name in ("num_features", "num_feature")
            for value in ([3], (3,), True, "3", 3.0, torch.tensor(3))
        ),
        ({"num_features": 0}, ValueError, "num_features must be at least 1, not 0"),
        ({"num_features": -1}, ValueError, "num_features must be at least 1, not -1"),
        ({"num_features": 3, "bn_wieght": 0.5}, TypeError, "bn_wieght"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ScaleBatchNorm2d(**arguments)


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
    for layer in (ScaleBatchNorm2d(3, bn_weight=0.2), copy.deepcopy(ScaleBatchNorm2d(3, bn_weight=0.2))):
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


def test_repr_shows_bn_weight():
    assert "bn_weight=0.25" in repr(ScaleBatchNorm2d(3, bn_weight=0.25))
    assert "3, eps=1e-05" in repr(ScaleBatchNorm2d(3))


@pytest.mark.parametrize("constructor", ["resnet18", "mobilenet_v2", "efficientnet_b0"])
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
    layer = ScaleBatchNorm2d(3, affine=False, bn_weight=0.5)
    assert layer.weight is None and layer.bias is None
    layer(torch.randn(2, 3, 2, 2))


def test_wants_four_dimensions():
    with pytest.raises(ValueError, match="4D"):
        ScaleBatchNorm2d(3)(torch.randn(2, 3))


def test_converts_to_synchronized_batch_norm():
    network = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(ScaleBatchNorm2d(3, bn_weight=0.1)))
    assert isinstance(network[0], nn.SyncBatchNorm)
    assert torch.equal(network[0].weight, torch.full((3,), 0.1))


def test_torch_fx_takes_it_whole():
    """As it does an `nn.BatchNorm2d`, in the copy of a network too."""
    network = construct_network(dataset="digits", bn_weight=0.1).eval()
    images = torch.rand(2, 3, 8, 8)
    traced = torch.fx.symbolic_trace(copy.deepcopy(network))
    assert [node.op for node in traced.graph.nodes][:2] == ["placeholder", "call_module"]
    assert torch.equal(traced(images), network(images))
    assert torch.fx.symbolic_trace(network.train()) and network[0].num_batches_tracked == 0
    extractor = create_feature_extractor(network, {"0": "normalized", "1.layer1": "features"})
    features = extractor.eval()(images)
    assert torch.equal(features["normalized"], network.eval()[0](images)) and features["features"].shape[1] == 64


# --- any network ----------------------------------------------------------------------------------------------------


def network_of_all_kinds() -> nn.Sequential:
    """Batch norms of every kind with what must stay as it is; nothing is at 0 or 1."""
    batch_norms = [nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3), nn.SyncBatchNorm(3), ScaleBatchNorm2d(3)]
    without_scale = nn.BatchNorm2d(3, affine=False)
    others = [nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3, affine=True), nn.RMSNorm(3), nn.Conv2d(3, 3, 1)]
    network = nn.Sequential(*batch_norms, nn.Sequential(BatchNormAct2d(3)), without_scale, *others)
    for name, value in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            value.fill_(7)
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
    network.eval()(torch.rand(2, 3, 4, 4))
    assert initialize_scales(network, 0.1) == ["0", "1.0"]


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize(
    "change",
    [
        partial(parametrize.register_parametrization, parametrization=nn.Softplus()),
        prune.identity,
        torch.nn.utils.parametrizations.weight_norm,
        pytest.param(
            torch.nn.utils.weight_norm,
            marks=pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
        ),
    ],
    ids=["parametrized", "pruned", "weight norm", "old weight norm"],
)
def test_scale_that_is_computed(change, kind):
    """Setting it would have no effect on the next forward pass."""
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3)))
    nn.init.constant_(network[1][0].bias, 0.5)
    if change is prune.identity:
        change(network[1][0], kind)
    else:
        change(network[1][0], **{"tensor_name" if isinstance(change, partial) else "name": kind})
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(
        ValueError, match=rf"^the {kind} of layer '1\.0' is computed from other parameters, as by a para"
    ):
        initialize_scales(network, 0.1)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_trained_network_loses_its_scales_with_a_warning():
    def seen(network: nn.Module) -> None:
        network(torch.rand(8, 3, 2, 2))

    def loaded(network: nn.Module) -> None:
        network.weight.data = torch.tensor([0.1, 0.2, 0.3])

    def converted(network: nn.Module) -> None:
        network.running_var = torch.tensor([0.1, 0.2, 0.3])

    for train in (seen, loaded, converted):
        network = nn.BatchNorm2d(3)
        train(network)
        with pytest.warns(
            UserWarning, match=r"seems to have been trained, and loses .*; to fine-tune a network, leave"
        ):
            initialize_scales(network, 0.1)
        assert network.weight.tolist() == pytest.approx([0.1] * 3)
    with warnings.catch_warnings(action="error"):
        initialize_scales(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)), 0.1)


BAD_WEIGHTS = [
    *((value, None) for value in (0, -0.1, math.nan, math.inf, 10**400, True, "0.1", None, 1e-320, 1e-60, 1e39)),
    *((value, torch.float16) for value in (1e-9, 70_000)),
    (1e39, torch.bfloat16),
]


@pytest.mark.parametrize(("bn_weight", "dtype"), BAD_WEIGHTS)
def test_scale_that_there_cannot_be(bn_weight, dtype):
    """Nothing is changed where one layer of a network cannot hold it."""
    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, dtype=dtype))
    held = re.escape(
        f"bn_weight must be a finite number above 0 that {dtype or torch.float32} can hold, not {bn_weight!r}"
    )
    with pytest.raises(ValueError, match=held):
        ScaleBatchNorm2d(3, bn_weight=bn_weight, dtype=dtype)
    with pytest.raises(ValueError, match="bn_weight must be a finite number above 0"):
        initialize_scales(network, bn_weight)
    assert torch.equal(network[0].weight, torch.ones(3))
    with pytest.raises(ValueError, match=held):
        prepend_input_norm(nn.Linear(2, 2, dtype=dtype), bn_weight)


@pytest.mark.parametrize(("bn_weight", "dtype"), [(1e-30, None), (1e-60, torch.float64), (60_000, torch.float16)])
def test_bn_weight_that_its_type_can_hold(bn_weight, dtype):
    weight = ScaleBatchNorm2d(3, bn_weight=bn_weight, dtype=dtype).weight
    assert weight.tolist() == pytest.approx([bn_weight] * 3, rel=1e-3, abs=0)


# --- in front of a network ------------------------------------------------------------------------------------------


def test_input_norm_in_front():
    network = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    whole = prepend_input_norm(network, 0.5, num_channels=4)
    images = torch.rand(8, 4, 3, 3) * 7 + 5
    normalized = (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(whole[0](images), normalized * 0.5 * 0.58, rtol=1e-3, atol=1e-4)
    assert whole[1] is network and network[1].weight.tolist() == [1, 1]
    assert [name for name, p in whole.named_parameters() if not p.requires_grad] == ["0.bias"]
    assert torch.equal(whole[0].bias, torch.zeros(4))


def test_input_norm_takes_as_many_channels_as_the_first_convolution():
    grey, lazy = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 1)), nn.Conv2d(2, 5, 1)), nn.LazyConv2d(2, 1)
    assert prepend_input_norm(grey, 0.1)(torch.rand(2, 1, 4, 4)).shape == (2, 5, 4, 4)
    smaller = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 2, 1))
    assert prepend_input_norm(smaller, 0.1, num_channels=3)(torch.rand(2, 3, 4, 4)).shape == (2, 2, 2, 2)
    for network in (nn.Sequential(lazy, nn.Conv2d(2, 2, 1)), nn.Linear(2, 2)):
        assert prepend_input_norm(network, 0.1)[0].num_features == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_input_norm_is_like_the_network(dtype):
    network = nn.Sequential(nn.Embedding(2, 2), nn.Conv2d(3, 2, 1, dtype=dtype, device="meta"))
    network[0].weight = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    [input_norm, _] = prepend_input_norm(network, 0.1)
    assert input_norm.weight.dtype == dtype and input_norm.weight.is_meta
    assert prepend_input_norm(nn.ReLU(), 0.1)[0].weight.dtype == torch.float32


@pytest.mark.parametrize("mode", [True, False])
def test_input_norm_follows_the_mode_of_the_network(mode):
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).train(mode)
    network[1].train(not mode)
    whole = prepend_input_norm(network, 0.1)
    assert [module.training for module in whole.modules()] == [mode, mode, mode, mode, not mode]
