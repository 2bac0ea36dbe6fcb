import io
import math
from contextlib import nullcontext

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
from torch import nn, optim
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import parametrize, prune
from torch.optim.lr_scheduler import OneCycleLR

from batch_norm import initialize_scales, prepend_input_norm
from weight_decay_and_learning_rate import adjust_weight_decay_and_learning_rate


def names(network: nn.Module, group: dict) -> list[str]:
    """The names of a group's parameters."""
    by_parameter = {parameter: name for name, parameter in network.named_parameters()}
    return [by_parameter[parameter] for parameter in group["params"]]


def small_network() -> nn.Module:
    return prepend_input_norm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)), 0.1)


WRONG = [
    *(({"c": c}, ValueError, "c must be 0 or 1") for c in (0.5, -1, math.nan, math.inf)),
    ({"weight_decay": "0.1"}, TypeError, "'<=' not supported between instances of 'int' and "),
    ({"c": None}, TypeError, "'<=' not supported between instances of 'int' and "),
    ({"weight_decay": -0.1}, ValueError, "weight_decay must be a finite number of at least 0, not -0.1"),
    ({"learning_rate": math.nan}, ValueError, "learning_rate must be a finite number of at least 0, not nan"),
    ({"skip_list": ["fc.weigth"]}, ValueError, r"in skip_list, but not in the network: fc\.weigth"),
    ({"skip_list": "weigth"}, ValueError, "in skip_list, but not in the network: weigth"),
    ({"network": nn.Linear(2, 2).parameters()}, TypeError, r"not generator: net, not net\.parameters\(\)"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        adjust_weight_decay_and_learning_rate(**{"network": nn.Linear(2, 2)} | arguments)


@pytest.mark.filterwarnings("ignore:FSDP is switching to use:UserWarning")
@pytest.mark.parametrize("original", [False, True])
def test_flat_parameters(original):
    """Of FullyShardedDataParallel: one of weights and biases alike is refused; the original ones are sorted as ever."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
        sharded = FullyShardedDataParallel(network, use_orig_params=original, device_id=torch.device("cpu"))
        with nullcontext() if original else pytest.raises(ValueError, match="a flat parameter, of weights and biases"):
            groups = adjust_weight_decay_and_learning_rate(sharded)
            assert [len(group["params"]) for group in groups] == [3, 1, 2]
    finally:
        dist.destroy_process_group()


def test_numbers_of_numpy_and_zeros():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    groups = adjust_weight_decay_and_learning_rate(network, 0, np.float32(0.5), np.int64(2))
    torch.save(torch.optim.SGD(groups).state_dict(), saved := io.BytesIO())
    _, scales, weights = torch.load(io.BytesIO(saved.getvalue()))["param_groups"]
    assert (scales["lr"], weights["lr"], weights["weight_decay"]) == (0.25, 0.5, 0)
    assert all(group["lr"] == 0 for group in adjust_weight_decay_and_learning_rate(network, learning_rate=0))
    for c in (0, 1):  # no reduction
        groups = adjust_weight_decay_and_learning_rate(network, learning_rate=0.2, c=c)
        assert [group["lr"] for group in groups] == [0.2] * 3


def test_type_decides_not_shape():
    network = nn.ModuleDict(
        {
            "depthwise": nn.Conv2d(4, 4, 1, groups=4),
            "one_channel": nn.Conv2d(1, 1, 1, bias=False),
            "unit": nn.Linear(1, 1),
            "batch_norm_of_one": nn.BatchNorm2d(1),
            "weight_norm": nn.BatchNorm1d(7),
            "layer_norm": nn.LayerNorm((2, 3)),
            "group_norm": nn.GroupNorm(2, 4),
            "instance_norm": nn.InstanceNorm2d(4, affine=True),
            "rms_norm": nn.RMSNorm(4),
            "attention": nn.MultiheadAttention(4, 2),
            "recurrent": nn.GRU(2, 2),
        }
    )
    for name in ("token", "bias_table", "unbias", "bias1", "biases", "q_bias"):
        network.register_parameter(name, nn.Parameter(torch.zeros(4)))
    no_decay, scales, decay = adjust_weight_decay_and_learning_rate(network)
    assert names(network, scales) == ["batch_norm_of_one.weight", "weight_norm.weight"]
    assert set(names(network, decay)) == {
        *("depthwise.weight", "one_channel.weight", "unit.weight", "token", "bias_table", "unbias"),
        *("attention.in_proj_weight", "attention.out_proj.weight", "recurrent.weight_ih_l0", "recurrent.weight_hh_l0"),
    }
    assert set(names(network, no_decay)) > {
        *("layer_norm.weight", "group_norm.weight", "instance_norm.weight", "rms_norm.weight", "bias1", "biases"),
        *("attention.in_proj_bias", "recurrent.bias_hh_l0", "depthwise.bias", "q_bias"),
    }
    assert sum(len(group["params"]) for group in (no_decay, scales, decay)) == len(list(network.parameters()))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_what_parameters_are_computed_from():
    """It goes where the parameter itself would go: under whatever names, and whatever holds it."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(1))

        def forward(self, original):
            return original * self.factor

    network = nn.ModuleDict({name: nn.BatchNorm1d(3) for name in ("parametrized", "pruned", "new", "old")})
    network["linear"], network["layer_norm"] = nn.Linear(3, 3), nn.LayerNorm(3)
    network["attention"] = nn.MultiheadAttention(3, 1)
    prune.identity(network["attention"], "in_proj_bias")
    for name in ("parametrized", "linear", "layer_norm"):
        for kind in ("weight", "bias"):
            parametrize.register_parametrization(network[name], kind, Scaled())
    prune.identity(network["pruned"], "weight")
    prune.identity(network["pruned"], "bias")
    nn.utils.parametrizations.weight_norm(network["new"])
    nn.utils.weight_norm(network["old"])
    no_decay, scales, decay = adjust_weight_decay_and_learning_rate(network)
    assert set(names(network, scales)) == {
        *("parametrized.parametrizations.weight.original", "parametrized.parametrizations.weight.0.factor"),
        *("new.parametrizations.weight.original0", "new.parametrizations.weight.original1"),
        *("pruned.weight_orig", "old.weight_g", "old.weight_v"),
    }
    of_weight = ["linear.parametrizations.weight.original", "linear.parametrizations.weight.0.factor"]
    assert names(network, decay)[:2] == of_weight and "attention.in_proj_bias_orig" in names(network, no_decay)
    assert len(names(network, no_decay)) == len(list(network.parameters())) - 7 - 4
    alone = parametrize.register_parametrization(nn.BatchNorm1d(3), "weight", Scaled())
    assert [len(group["params"]) for group in adjust_weight_decay_and_learning_rate(alone)] == [1, 2]


def test_schedules_keep_the_ratio():
    """With the line of the docstring for one that sets the rates; γ learns with those that it set."""
    network = small_network()[1][1]
    groups = adjust_weight_decay_and_learning_rate(network, c=50)
    optimizer, rates = optim.SGD(groups), []
    schedule = OneCycleLR(optimizer, max_lr=[g["lr"] for g in groups], total_steps=8)
    for _ in range(8):
        network.weight.grad = network.bias.grad = torch.ones(4)
        before = network.weight.detach() - network.bias.detach() / 50
        optimizer.step()
        torch.testing.assert_close(network.weight.detach() - network.bias.detach() / 50, before)
        biases, scales = optimizer.param_groups
        assert (biases["name"], scales["name"]) == ("biases", "batch norm scales")
        assert scales["lr"] * 50 == pytest.approx(biases["lr"])
        rates.append(biases["lr"])
        schedule.step()
    assert len(set(rates)) > 3 and max(rates) <= 0.1 + 1e-12


def test_skip_list():
    """It may be readable only once; a scale in it keeps its rate."""
    network = small_network()
    skip_list = (name for name in ["1.1.weight", "1.2.weight"])
    biases, scales, weights = adjust_weight_decay_and_learning_rate(network, c=100, skip_list=skip_list)
    assert names(network, biases) == ["1.0.bias", "1.1.bias", "1.2.weight", "1.2.bias"]
    assert names(network, scales) == ["0.weight", "1.1.weight"] and names(network, weights) == ["1.0.weight"]


def test_frozen_parameters_and_empty_groups_are_left_out():
    network = small_network()
    for parameter in network[1][:2].parameters():
        parameter.requires_grad = False
    groups = adjust_weight_decay_and_learning_rate(network)
    assert [names(network, group) for group in groups] == [["1.2.bias"], ["0.weight"], ["1.2.weight"]]
    assert len(adjust_weight_decay_and_learning_rate(nn.Linear(2, 2, bias=False))) == 1
    assert adjust_weight_decay_and_learning_rate(nn.ReLU()) == []


def test_shared_parameter_appears_once():
    """It is skipped by any of its names."""
    network = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    network[1].weight = network[0].weight
    for skip_list, weight_decay in (([], 0.1), (["1.weight"], 0)):
        [group] = adjust_weight_decay_and_learning_rate(network, weight_decay=0.1, skip_list=skip_list)
        assert group["params"] == [network[0].weight] and group["weight_decay"] == weight_decay


NETWORKS = {  # torchvision's, then timm's
    **dict.fromkeys(("densenet121", "efficientnet_b0", "maxvit_t", "resnet18"), torchvision.models.get_model),
    **dict.fromkeys(("levit_128s", "mobilenetv3_small_050", "mobilevit_xxs"), timm.create_model),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_method_on_other_networks(name):
    """What is what follows from names and shapes: of the state_dict, of which types know nothing."""
    network = NETWORKS[name](name, num_classes=7)
    layers = [name.removesuffix(".running_mean") for name in network.state_dict() if name.endswith(".running_mean")]
    assert initialize_scales(network, 0.1) == layers and len(layers) >= 8
    network = prepend_input_norm(network, 0.1)
    layers = ["0", *(f"1.{layer}" for layer in layers)]
    state = network.state_dict()
    for layer in layers:
        assert torch.all(state[f"{layer}.weight"] == (0.1 if layer != "0" else torch.tensor(0.1 * 0.58)))
        assert torch.all(state[f"{layer}.bias"] == 0)

    groups = adjust_weight_decay_and_learning_rate(network, 1e-4, 0.1, 100)
    no_decay, scales, decay = (names(network, group) for group in groups)
    assert sorted(scales) == sorted(f"{layer}.weight" for layer in layers)
    scales_of_branches = [name for name in state if name.endswith(".gamma")]  # timm's name, in networks with attention
    expected_decay = {name for name, p in network.named_parameters() if p.dim() > 1 or name in scales_of_branches}
    assert set(decay) == expected_decay
    others = {name for name, _ in network.named_parameters()} - expected_decay - set(scales)
    assert set(no_decay) == others - {"0.bias"}
    assert [{key: value for key, value in group.items() if key != "params"} for group in groups] == [
        {"name": "biases", "weight_decay": 0, "lr": 0.1},
        {"name": "batch norm scales", "weight_decay": 0, "lr": 0.1 / 100},
        {"name": "weights", "weight_decay": 1e-4, "lr": 0.1},
    ]
