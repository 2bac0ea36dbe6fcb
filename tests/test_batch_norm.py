import copy
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from batch_norm import ScaleBatchNorm2d


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
