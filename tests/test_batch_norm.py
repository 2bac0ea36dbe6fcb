import copy
import io
import math
import re
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

from batch_norm import (
    ScaleBatchNorm2d,
    debias_running_statistics,
    initialize_scales,
    prepend_input_norm,
    steps_until_start_is_gone,
)
from networks import construct_network

# --- the layer ------------------------------------------------------------------------------------------------------


def test_starts_at_bn_weight_and_zero():
    """Also in the line of the paper's README; and a number of features of NumPy is one of Python then."""
    as_printed = ScaleBatchNorm2d(num_feature=64, eps=1e-5, momentum=0.1, affine=True, bn_weight=0.1)
    for layer in (ScaleBatchNorm2d(np.int64(64), bn_weight=0.1), as_printed):
        assert torch.equal(layer.weight, torch.full((64,), 0.1)) and torch.equal(layer.bias, torch.zeros(64))
        assert layer.eps == 1e-5 and layer.momentum == 0.1 and layer.affine and layer.track_running_stats
        assert type(layer.num_features) is int and layer.num_features == 64
        assert "64, eps=1e-05" in repr(layer) and "bn_weight=0.1" in repr(layer)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "num_features"),
        ({"num_features": 3, "num_feature": 3}, TypeError, "num_features"),
        ({"num_features": [3]}, TypeError, "an integer"),
        ({"num_feature": 3.0}, TypeError, "an integer"),
        ({"num_features": 3, "bn_wieght": 0.5}, TypeError, "bn_wieght"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ScaleBatchNorm2d(**arguments)


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


def test_reset_parameters_starts_over():
    """In a copy, too, and after construction without values."""
    for layer in (ScaleBatchNorm2d(3, bn_weight=0.2), copy.deepcopy(ScaleBatchNorm2d(3, bn_weight=0.2))):
        layer(torch.randn(4, 3, 2, 2))
        nn.init.constant_(layer.weight, 7)
        nn.init.constant_(layer.bias, 7)
        layer.reset_parameters()
        assert torch.equal(layer.weight, torch.full((3,), 0.2)) and torch.equal(layer.bias, torch.zeros(3))
        assert torch.equal(layer.running_mean, torch.zeros(3)) and layer.num_batches_tracked == 0
    on_meta = ScaleBatchNorm2d(3, bn_weight=0.2, device="meta")
    assert on_meta.weight.is_meta
    for layer in (on_meta.to_empty(device="cpu"), nn.utils.skip_init(ScaleBatchNorm2d, 3, bn_weight=0.2)):
        layer.reset_parameters()
        assert torch.equal(layer.weight, torch.full((3,), 0.2)) and not layer.weight.is_meta


def scales_of(network: nn.Module) -> list[float]:
    """All γ of its batch norms."""
    layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d | ScaleBatchNorm2d)]
    return torch.cat([layer.weight.detach() for layer in layers]).tolist()


def test_constructors_that_set_scales():
    """Those of torchvision pass this layer over. One of timm does not, nor does a flag of torchvision: two ways out."""
    norm_layer = partial(ScaleBatchNorm2d, eps=1e-5, momentum=0.1, affine=True, bn_weight=0.1)
    network = torchvision.models.resnet18(norm_layer=norm_layer)
    told = timm.create_model("resnet18", norm_layer=norm_layer, zero_init_last=False)
    assert scales_of(network) == scales_of(told) and set(scales_of(network)) == {torch.tensor(0.1).item()}
    for zeroed in (
        timm.create_model("resnet18", norm_layer=norm_layer),
        torchvision.models.resnet18(zero_init_residual=True),
    ):
        assert 0 in scales_of(zeroed)
        assert len(initialize_scales(zeroed, 0.1)) == 20
        assert scales_of(zeroed) == scales_of(network)


def test_further_arguments_of_torch():
    layer = ScaleBatchNorm2d(3, bn_weight=0.5, track_running_stats=False, dtype=torch.float64)
    assert layer.running_mean is None and layer.weight.dtype == torch.float64
    layer = ScaleBatchNorm2d(3, momentum=None, affine=False, bn_weight=0.5)
    assert layer.momentum is None and layer.weight is None and layer.bias is None
    layer(torch.randn(2, 3, 2, 2))
    with pytest.raises(ValueError, match="4D"):
        layer(torch.randn(2, 3))
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(ScaleBatchNorm2d(3, bn_weight=0.1))
    assert isinstance(synchronized, nn.SyncBatchNorm) and torch.equal(synchronized.weight, torch.full((3,), 0.1))


def test_torch_fx_takes_it_whole():
    """As it does an `nn.BatchNorm2d`, in the copy of a network too."""
    network = construct_network(dataset="digits", bn_weight=0.1).eval()
    images = torch.rand(2, 3, 8, 8)
    traced = torch.fx.symbolic_trace(copy.deepcopy(network))
    assert [node.op for node in traced.graph.nodes][:2] == ["placeholder", "call_module"]
    assert torch.equal(traced(images), network(images))
    features = create_feature_extractor(network, {"0": "normalized"}).eval()(images)
    assert torch.equal(features["normalized"], network[0](images))


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


def test_frozen_scales_in_other_types_and_places():
    kinds = ({"dtype": torch.float64}, {"dtype": torch.float16}, {"device": "meta"})
    network = nn.Sequential(*(nn.BatchNorm2d(2, **kind) for kind in kinds))
    network.append(network[0])  # a layer that is used twice
    network[0].weight.requires_grad = network[1].bias.requires_grad = False
    parameters = list(network.parameters())
    assert initialize_scales(network, 0.25) == ["0", "1", "2"]
    assert all(ours is before for ours, before in zip(network.parameters(), parameters, strict=True))
    assert [p.requires_grad for p in parameters] == [False, True, True, False, True, True]
    assert [layer.weight.dtype for layer in network[:2]] == [torch.float64, torch.float16]
    assert scales_of(network[:2]) == [0.25] * 4 and network[2].weight.is_meta
    assert initialize_scales(network[0], 0.5) == [""] and scales_of(network[0]) == [0.5, 0.5]


def test_network_without_scales():
    for network in (nn.Sequential(), nn.BatchNorm2d(3, affine=False), nn.LayerNorm(3), FrozenBatchNorm2d(3)):
        with pytest.raises(ValueError, match="there is no batch norm with a scale γ in the network"):
            initialize_scales(network, 0.1)
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.LazyBatchNorm2d()))
    with pytest.raises(ValueError, match=r"the batch norm '1\.0' is lazy and has no γ yet: let the network compute a"):
        initialize_scales(network, 0.1)
    assert scales_of(network[0]) == [1, 1, 1]
    network.eval()(torch.rand(2, 3, 4, 4))
    assert initialize_scales(network, 0.1) == ["0", "1.0"]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda layer, kind: parametrize.register_parametrization(layer, kind, nn.Softplus()), "weight"),
        (prune.identity, "bias"),
        (torch.nn.utils.weight_norm, "weight"),
    ],
    ids=["parametrized", "pruned", "old weight norm"],
)
def test_scale_that_is_computed(change, kind):
    """Setting it would have no effect on the next forward pass."""
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3)))
    nn.init.constant_(network[1][0].bias, 0.5)
    change(network[1][0], kind)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=rf"^the {kind} of layer '1\.0' is computed from other parameters, as by a"):
        initialize_scales(network, 0.1)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_trained_network_loses_its_scales_with_a_warning():
    """One that has seen batches, or whose variances differ, or γ where there are none."""
    seen, varied, without = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)
    seen(torch.rand(8, 3, 2, 2))
    varied.running_var = without.weight.data = torch.tensor([0.1, 0.2, 0.3])
    for network in (seen, varied, without):
        with pytest.warns(UserWarning, match=r"seems to have been trained, and loses .*; to fine-tune a network"):
            initialize_scales(network, 0.1)
        assert scales_of(network) == pytest.approx([0.1] * 3)
    for new in (nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False), timm.create_model("repvgg_a0")):
        initialize_scales(new, 0.1)  # that of timm draws some of its γ; warnings are errors here


BAD_WEIGHTS = [(0, None), (math.nan, None), (10**400, None), (1e-60, None), (70_000, torch.float16)]


@pytest.mark.parametrize(("bn_weight", "dtype"), BAD_WEIGHTS)
def test_scale_that_there_cannot_be(bn_weight, dtype):
    """Nothing is changed where one layer of a network cannot hold it."""
    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, dtype=dtype))
    held = f"bn_weight must be a finite number above 0 that {dtype or torch.float32} can hold, not {bn_weight!r}"
    with pytest.raises(ValueError, match=re.escape(held)):
        ScaleBatchNorm2d(3, bn_weight=bn_weight, dtype=dtype)
    with pytest.raises(ValueError, match="bn_weight must be a finite number above 0"):
        initialize_scales(network, bn_weight)
    assert scales_of(network[0]) == [1, 1, 1]
    with pytest.raises(ValueError, match=re.escape(held)):
        prepend_input_norm(nn.Linear(2, 2, dtype=dtype), bn_weight)


@pytest.mark.parametrize(("bn_weight", "dtype"), [(1e-60, torch.float64), (60_000, torch.float16)])
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
    assert torch.equal(whole[0].bias, torch.zeros(4)) and isinstance(whole, nn.Sequential)


def test_input_norm_takes_as_many_channels_as_the_first_convolution():
    grey = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 1)), nn.Conv2d(2, 5, 1))
    unknown = nn.Sequential(nn.LazyConv2d(2, 1), nn.Conv2d(2, 2, 1))
    found = [prepend_input_norm(network, 0.1)[0].num_features for network in (grey, unknown, nn.Linear(2, 2))]
    assert found == [1, 3, 3] and prepend_input_norm(grey, 0.1, num_channels=4)[0].num_features == 4


@pytest.mark.parametrize("mode", [True, False])
def test_input_norm_is_like_the_network(mode):
    """Of its type, on its device, in its mode."""
    network = nn.Sequential(nn.Embedding(2, 2), nn.Conv2d(3, 2, 1, dtype=torch.float64, device="meta")).train(mode)
    network[0].weight = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    network[1].train(not mode)
    whole = prepend_input_norm(network, 0.1)
    assert whole[0].weight.dtype == torch.float64 and whole[0].weight.is_meta
    assert [module.training for module in whole.modules()] == [mode, mode, mode, mode, not mode]
    assert prepend_input_norm(nn.ReLU(), 0.1)[0].weight.dtype == torch.float32


class Described(nn.Sequential):
    """A network with what scripts such as timm's ask for."""

    num_classes, _version_of_mine = 7, 3

    def set_factor(self, factor: float) -> None:
        self.factor = factor

    def forward_features(self, images: Tensor) -> Tensor:
        return self[0](images)


def described() -> Described:
    torch.manual_seed(0)
    return Described(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_attributes_of_a_network_behind_the_input_norm():
    """But not those that would compute without the layer, or that are about a module itself. In copies, too."""
    whole = prepend_input_norm(described(), 0.1)
    torch.save(whole, file := io.BytesIO())
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    for network in (whole, copy.deepcopy(whole), saved):
        assert network.num_classes == 7
        network.set_factor(2.5)
        assert network.factor == network[1].factor == 2.5 and "factor" not in vars(network)
        for name in ("forward_features", "_version_of_mine", "no_such_name", "__deepcopy__"):
            assert not hasattr(network, name)
    saved.head = saved.num_classes = None  # the first is a new one of the whole
    assert "head" in vars(saved) and saved[1].num_classes is None and "num_classes" not in vars(saved)
    with pytest.raises(AttributeError, match="'Described' object has no attribute 'no_such_name'"):
        _ = whole.no_such_name
    assert not hasattr(whole[:1], "num_classes") and len(whole[:1]) == 1
    traced = prepend_input_norm(torch.fx.symbolic_trace(described()), 0.1)  # which has a __deepcopy__ of its own
    assert len(copy.deepcopy(traced)) == 2


def test_new_head_takes_the_place_of_the_old_one():
    network = prepend_input_norm(torchvision.models.resnet18(num_classes=10), 0.1)
    network.fc = nn.Identity()
    assert len(network) == 2 and network(torch.rand(2, 3, 32, 32)).shape == (2, 512)


@pytest.mark.parametrize(
    "change",
    [
        partial(torch.compile, backend="aot_eager", fullgraph=True),
        lambda network: torch.export.export(network, (torch.rand(4, 3, 8, 8),)).module(),
    ],
    ids=["compiled", "exported"],
)
def test_whole_computes_in_turn(change):
    whole = prepend_input_norm(described(), 0.1)
    plain, images = copy.deepcopy(nn.Sequential(*whole)), torch.rand(4, 3, 8, 8)
    assert list(whole.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(change(whole)(images), plain(images))
    torch.testing.assert_close(whole.state_dict()["0.running_mean"], plain.state_dict()["0.running_mean"])


def test_layer_in_front_is_warned_of():
    """A second one, and a γ that starts too high in it."""
    whole = prepend_input_norm(described(), 0.1)
    with pytest.warns(UserWarning, match="the network has an input layer already, and gets a second one"):
        prepend_input_norm(whole, 0.1)
    with pytest.warns(UserWarning, match=r"the γ of the input layer starts at 0\.1 now, and not at 0\.1 · 0\.58: call"):
        initialize_scales(whole, 0.1)


# --- running statistics without their start -------------------------------------------------------------------------


@pytest.mark.parametrize(("num_batches", "momentum"), [(1, 0.1), (168, 0.01)])
def test_debiased_statistics(num_batches, momentum):
    """Weighted averages of the batches' means and variances, in closed form; and all as before thereafter."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.BatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3, momentum=0.0)
    )
    network.extend([nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3).eval(), nn.InstanceNorm2d(3)])
    batches = [torch.randn(5, 3, 2, 2) * 0.3 + k % 3 for k in range(num_batches)]
    for images in batches:
        network(images)
    before = copy.deepcopy(network.state_dict())
    weights = np.array([momentum * (1 - momentum) ** k for k in reversed(range(num_batches))])
    weights /= weights.sum()
    values = np.stack([images.double().transpose(0, 1).flatten(1).numpy() for images in batches])
    with debias_running_statistics(network):
        within = copy.deepcopy(network.state_dict())
    np.testing.assert_allclose(within["0.running_mean"], weights @ values.mean(2), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(within["0.running_var"], weights @ values.var(2, ddof=1), rtol=1e-4, atol=1e-6)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(value, within[name]) == (name not in ("0.running_mean", "0.running_var"))


def test_statistics_that_started_elsewhere():
    """Nothing is changed then; and an error within restores them."""
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3)))
    nn.init.constant_(network[1][0].running_var, 0.01)
    network(torch.rand(4, 3, 2, 2))
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=r"layer '1\.0' did not start at 1"), debias_running_statistics(network):
        pass
    with pytest.raises(KeyError), debias_running_statistics(network[0]):
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    constant = nn.BatchNorm2d(3, momentum=0.003)
    constant(torch.full((4, 3, 2, 2), 0.5))
    with debias_running_statistics(constant):  # where rounding would leave less than no variance
        assert constant.running_var.min() >= 0


@pytest.mark.parametrize(("momenta", "steps"), [([0.1], 88), ([0.1, None, 0.01], 917), ([1.0], 1), ([None, 0.0], 0)])
def test_steps_until_the_start_is_gone(momenta, steps):
    network = nn.Sequential(nn.BatchNorm2d(3, momentum=0.001, track_running_stats=False), nn.ReLU())
    network.extend([nn.BatchNorm2d(3, momentum=momentum) for momentum in momenta])
    assert steps_until_start_is_gone(network) == steps
    if steps > 1:
        smallest = min(filter(None, momenta))
        assert (1 - smallest) ** steps < 1e-4 <= (1 - smallest) ** (steps - 1)
