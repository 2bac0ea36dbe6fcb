from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn, optim
from torch.nn.utils import prune

import train
from batch_norm import initialize_scales
from command_line.flag_types import SettingError
from equivalence import equivalent, logits_alone
from image_sets.batches import Batches
from image_sets.loading import load_image_set
from networks import construct_network, zero_biases
from saved_runs.results import COLUMNS
from seeds import make_deterministic
from small import prepared
from trained_networks import load_network
from training import preparation
from weight_decay_and_learning_rate import adjust_weight_decay_and_learning_rate


class Residual(nn.Module):
    """A small network with all that matters: a branch, pooling, biases, and a linear layer before the last one."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.downsample = nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8))
        self.activation, self.pool = nn.LeakyReLU(), nn.MaxPool2d(2)
        self.hidden, self.last = nn.Linear(8, 12), nn.Linear(12, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        first = self.pool(self.activation(self.bn1(self.conv1(images))))
        second = self.activation(self.bn2(self.conv2(first)) + self.downsample(first))
        return self.last(self.activation(self.hidden(second.mean((2, 3)))))


def construct(name: str, bn_weight: float, input_norm: str) -> nn.Module:
    make_deterministic(1)
    network = construct_network(name, 10, "digits", bn_weight, input_norm).double()
    with torch.no_grad():  # as in the midst of a training
        for parameter_name, parameter in network.named_parameters():
            if parameter_name.endswith(("bn1.weight", "bn2.weight")):
                parameter *= 1 + 0.3 * torch.rand_like(parameter)
            elif "bias" in parameter_name and parameter.requires_grad:
                parameter += 0.2 * bn_weight * torch.randn_like(parameter)
    return network


def train_six_steps(network: nn.Module, groups: list[dict]) -> tuple[list[float], Tensor]:
    """The losses, and logits in evaluation mode."""
    make_deterministic(2)
    batches = [(images.double(), labels) for images, labels in Batches(load_image_set("digits"), "train", 16, False)]
    optimizer, losses = optim.SGD(groups, momentum=0.9), []
    for images, labels in batches[:6]:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, network.eval()(batches[6][0]).detach()


@pytest.mark.parametrize(
    ("bn_weight", "c", "name", "input_norm"),
    [(0.1, 100, "resnet", "bn"), (0.02, 7, "small", "dataset"), (3, 1, "small", "bn")],
)
def test_equivalent_trains_alike(bn_weight, c, name, input_norm, few_digits):
    name = {"resnet": "torchvision.models:resnet18", "small": "test_equivalence:Residual"}[name]
    network = construct(name, bn_weight, input_norm)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    rates = {"weight_decay": 0.01, "learning_rate": 0.05, "c": c}
    other, groups = equivalent(network, bn_weight, **rates)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    losses, logits = train_six_steps(network, adjust_weight_decay_and_learning_rate(network, **rates))
    of_other, logits_of_other = train_six_steps(other, groups)
    assert np.ptp(losses) > 0.05  # they have learned something
    np.testing.assert_allclose(of_other, losses, rtol=0, atol=1e-8)
    torch.testing.assert_close(logits_of_other, logits, rtol=0, atol=1e-8)
    theirs = dict(other.named_parameters())
    for key, parameter in network.named_parameters():
        of_images = (key, input_norm) == ("conv1.bias", "dataset")  # what no batch norm has scaled as yet
        if key.endswith(("fc.weight", "last.weight")):
            factor = 1 / bn_weight
        elif parameter.dim() == 1 and not key.endswith(("fc.bias", "last.bias")) and not of_images:
            factor = bn_weight
        else:
            factor = 1
        torch.testing.assert_close(parameter, factor * theirs[key], rtol=1e-6, atol=1e-9)


def test_what_is_between_the_method_and_small_logits(few_digits, monkeypatch):
    """With ε and β's rate both changed, the method is `logits`; with one of the two, it is neither.

    And `fast_resnet18` is ResNet-18.
    """
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "results/cifar10-explanations")
    rates, losses = {"weight_decay": 0.01, "learning_rate": 0.05}, {}
    for name in ("logits", "resnet18", "small_epsilon", "slow_shift", "both", "fast_resnet18"):
        make_deterministic(1)
        function = "resnet18" if name == "logits" else name
        network = construct_network(f"variants:{function}", 10, "digits", 1 if name == "logits" else 0.1).double()
        groups = adjust_weight_decay_and_learning_rate(network, **rates, c=100)
        if name == "logits":
            network, groups = logits_alone(network, 0.1, **rates, c=1)
        losses[name], _ = train_six_steps(network, groups)
    np.testing.assert_allclose(losses.pop("fast_resnet18"), losses["resnet18"], rtol=0, atol=1e-8)
    apart = {name: np.abs(np.subtract(losses[name], losses["logits"])).max() for name in losses if name != "logits"}
    assert apart.pop("both") < 1e-7
    assert min(apart.values()) > 1e-3


def test_groups_of_the_equivalent():
    """What has a rate of its own has a name of its own, for what shows their rates."""
    _, groups = equivalent(construct_network("resnet18", 10, "digits", 0.1, "bn"), 0.1, 1e-4, 0.05, 100)
    rates = {group["name"]: pytest.approx((group["lr"], group["weight_decay"])) for group in groups}
    expected = {"biases (0.1)": (5, 0), "biases": (0.05, 0), "batch norm scales (0.1)": (0.05, 0)}
    assert rates == expected | {"weights": (0.05, 1e-4), "weights (10)": (0.0005, 0.01)}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.BatchNorm2d(3), nn.Hardswish(), nn.Flatten(), nn.Linear(3, 2)], "differ from .* for Hardswish"),
        ([BatchNormAct2d(3), nn.Flatten(), nn.Linear(3, 2)], "differ from .* for BatchNormAct2d"),
        ([nn.BatchNorm2d(3, affine=False), nn.Flatten(), nn.Linear(3, 2)], "a batch norm lacks γ or β"),
        ([nn.BatchNorm2d(3), nn.Flatten()], "no linear layer"),
    ],
)
def test_what_has_no_equivalent(layers, message):
    with pytest.raises(ValueError, match=message):
        equivalent(nn.Sequential(*layers), 0.1)


@pytest.mark.parametrize("function", [equivalent, logits_alone])
def test_what_has_neither_equivalent(function):
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="bn_weight must be a finite number above 0"):
        function(network, -0.1)
    torch.no_grad()(prune.identity)(network[2], "weight")
    with pytest.raises(ValueError, match="computes its weights from other"):
        function(network, 0.1)


class Between(Residual):
    """A function after the batch norms, which no list of the layers shows."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(10)
        self.activation, self.function = nn.Identity(), function

    def forward(self, images: Tensor) -> Tensor:
        second = self.bn2(self.conv2(self.pool(self.bn1(self.conv1(images)))))
        return self.last(self.function(self.hidden(second.mean((2, 3)))))


FUNCTIONS = {
    "dropout": (F.dropout, True),  # which draws
    "norm": (lambda x: x / x.norm() * x.abs().max(), True),
    "tanh": (torch.tanh, False),
    "shift": (lambda x: x + 0.1, False),
    "float32": (lambda x: x @ torch.eye(x.shape[-1]), False),  # whose types fit only float32
}


@pytest.mark.parametrize("bn_weight", [0.02, 3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_images_show_what_no_layer_shows(name, bn_weight):
    make_deterministic(1)
    function, homogeneous = FUNCTIONS[name]
    network = Between(function)
    zero_biases(network)
    initialize_scales(network, bn_weight)
    before, images = {key: value.clone() for key, value in network.state_dict().items()}, torch.rand(8, 3, 8, 8)
    random_state = torch.get_rng_state()
    problem = "cannot be checked in float64" if name == "float32" else "forward is not homogeneous"
    with nullcontext() if homogeneous else pytest.raises(ValueError, match=problem):
        equivalent(network, bn_weight, images=images)
    assert torch.equal(torch.get_rng_state(), random_state) and network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_logits_alone():
    make_deterministic(1)
    network = construct_network("test_equivalence:Residual", 10, "digits", 1.0, "dataset").double()
    other, groups = logits_alone(network, 0.1, weight_decay=0.01, learning_rate=0.05)
    images, labels = torch.rand(8, 3, 8, 8).double(), torch.arange(8)
    bias, weight = network.last.bias.detach(), network.last.weight.detach()
    logits = other(images)
    torch.testing.assert_close(logits, 0.1 * (network(images) - bias) + bias)
    F.cross_entropy(logits, labels).backward()
    gradient, hidden = other.last.weight.grad.clone(), other.hidden.weight.grad.clone()
    optim.SGD(groups, momentum=0.9).step()
    torch.testing.assert_close(other.last.weight, 0.1 * weight - 0.0005 * (gradient + 1.0 * 0.1 * weight))
    torch.testing.assert_close(
        other.hidden.weight, network.hidden.weight - 0.05 * (hidden + 0.01 * network.hidden.weight)
    )
    torch.testing.assert_close(other.bn1.weight, 1 - 0.05 * other.bn1.weight.grad)


QUICK = ["--dataset", "digits", "--num_epochs", "4", "--batch_size", "16", "--device", "cpu", "--learning_rate", "0.05"]


def test_runs_of_the_equivalent(few_digits, tmp_path):
    """A run has the numbers of its equivalent but for rounding, and their weights predict alike."""
    flags = [*QUICK, "--path", str(tmp_path), "--network", "test_equivalence:Residual", "--bn_weight", "0.02"]
    results = [train.main([*flags, "--equivalent", equivalent]) for equivalent in ("no", "logits+rates")]
    for column in COLUMNS:
        np.testing.assert_allclose(results[1].columns[column], results[0].columns[column], rtol=1e-4)
    names = [result.header["name"] for result in results]
    assert names[1] == names[0].replace("-bn-", "-bn-logits+rates-")
    networks = [load_network(tmp_path / "results" / f"{name}.csv") for name in names]
    images = torch.rand(16, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(networks[1](images), networks[0](images), rtol=0, atol=1e-4)
    eps = [module.eps for module in networks[1].modules() if isinstance(module, nn.BatchNorm2d)]
    assert eps == pytest.approx([0.025] * 3)


def test_logits_start_smaller_and_nothing_else():
    own = ["--network", "test_equivalence:Residual"]
    settings = [prepared([*QUICK, *own, *more]) for more in (["--bn_weight", "1"], ["--equivalent", "logits"])]
    networks = []
    for of_run in settings:
        make_deterministic(1)
        networks.append(preparation.construct(of_run, 10, (8, 8)))
    usual, given = networks
    network, _ = preparation.rewrite(given, settings[1])
    weights = usual.state_dict()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, weights[name] * (0.1 if name.endswith("last.weight") else 1))


def test_flag_where_there_is_no_equivalent():
    flags = [*QUICK, "--network", "mobilenet_v3_small", "--image_size", "64", "--equivalent"]
    prepared([*flags, "logits"])
    with pytest.raises(SettingError, match=r"debias: does not go with --equivalent logits\+rates"):
        prepared([*QUICK, "--debias", "--equivalent", "logits+rates"])
    with pytest.raises(SettingError, match=r"equivalent: mobilenet_v3_small: cannot rewrite .* for Hard"):
        prepared([*flags, "logits+rates"])
