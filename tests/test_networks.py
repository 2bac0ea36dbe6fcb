import math
import shutil

import pytest
import torch
import torchvision
from torch import nn
from torch._dynamo.utils import counters

from batch_norm import ScaleBatchNorm2d
from networks import NETWORKS, construct_network, reinit_network, speed_up, zero_biases
from small import construct_small_network


@pytest.mark.parametrize("input_norm", ["bn", "dataset"])
def test_initial_weights_are_those_of_the_paper(input_norm):
    torch.manual_seed(3)
    network = construct_network("resnet18", 10, "cifar10", 0.1, input_norm)

    torch.manual_seed(3)
    expected = torchvision.models.resnet18(num_classes=10)
    expected.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    with torch.no_grad():
        for module in expected.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
                module.weight.normal_(0, math.sqrt(2 / fan_in))
            elif isinstance(module, nn.Linear):
                bound = math.sqrt(6 / module.in_features)
                module.weight.uniform_(-bound, bound)
                module.bias.zero_()
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(0.1)
    if input_norm == "bn":
        expected = nn.Sequential(nn.BatchNorm2d(3), expected)
        with torch.no_grad():
            expected[0].weight.fill_(0.1 * 0.58)

    state = network.state_dict()
    assert list(state) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        assert torch.equal(state[name], value), name
    if input_norm == "bn":
        assert {name[:2] for name in state} == {"0.", "1."}
        assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["0.bias"]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_runs(name):
    with torch.device("meta"):
        network = construct_network(name, num_classes=7)
        assert network(torch.empty(2, 3, 32, 32)).shape == (2, 7)
    number_of_layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in network.modules())
    number_of_shortcuts = sum("downsample.0.weight" in n for n, _ in network.named_parameters())
    assert f"resnet{number_of_layers - number_of_shortcuts}" == name


def test_stem_for_small_and_large_images():
    small, large = (construct_network(dataset=name, input_norm="dataset") for name in ("digits", "imagenet"))
    assert small.conv1.kernel_size == (3, 3) and small.conv1.stride == (1, 1) and small.conv1.bias is None
    assert isinstance(small.maxpool, nn.Identity)
    assert large.conv1.kernel_size == (7, 7) and large.conv1.stride == (2, 2)
    assert isinstance(large.maxpool, nn.MaxPool2d)


def test_defaults():
    network = construct_network()
    assert network[1].fc.out_features == 10
    assert all(torch.all(m.weight == 1) for m in network[1].modules() if isinstance(m, ScaleBatchNorm2d))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network_name": "resnet19"}, "network_name must be one of resnet18, resnet34"),
        ({"input_norm": "layer"}, "input_norm must be one of bn, dataset"),
        ({"bn_weight": 0}, "bn_weight must be a finite number above 0"),
        ({"bn_weight": float("nan")}, "bn_weight must be a finite number above 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        construct_network(**arguments)


@pytest.mark.parametrize(
    ("fan", "activation_function", "gain"),
    [("in", nn.ReLU, math.sqrt(2)), ("out", nn.ReLU, math.sqrt(2)), ("in", nn.LeakyReLU, math.sqrt(2 / 1.0001))],
)
def test_reinit_network(fan, activation_function, gain):
    network = nn.Sequential(nn.Conv2d(16, 64, 3), nn.BatchNorm2d(64), nn.Linear(400, 300))
    kept = {name: p.clone() for name, p in network.named_parameters() if name not in ("0.weight", "2.weight")}
    torch.manual_seed(5)
    reinit_network(network, fan, activation_function)

    torch.manual_seed(5)
    channels = 16 if fan == "in" else 64
    conv = torch.empty(64, 16, 3, 3).normal_(0, gain / math.sqrt(channels * 9))
    features = 400 if fan == "in" else 300
    bound = math.sqrt((6 if activation_function is nn.ReLU else 1) / features)
    linear = torch.empty(300, 400).uniform_(-bound, bound)
    torch.testing.assert_close(network[0].weight.data, conv)
    torch.testing.assert_close(network[2].weight.data, linear)
    for name, value in kept.items():
        assert torch.equal(network.get_parameter(name), value)


@pytest.mark.parametrize("arguments", [{"fan": "both"}, {"activation_function": nn.GELU}])
def test_reinit_network_with_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        reinit_network(nn.Linear(2, 2), **arguments)


def test_zero_biases():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 2))
    for parameter in network.parameters():
        nn.init.ones_(parameter)
    zero_biases(network)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, torch.full_like(parameter, 0 if name.endswith("bias") else 1))


def pass_through(network: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of some images, and the gradient of the first convolution."""
    images = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    logits = network(images)
    logits.float().logsumexp(1).sum().backward()
    return logits, network.get_parameter("1.weight").grad


def small_network() -> nn.Module:
    """The same one at every call."""
    torch.manual_seed(1)
    return construct_small_network("", 10, "digits", 0.1, "bn")


@pytest.mark.parametrize(
    ("precision", "compiled", "tolerance"),
    [("float32", False, 0), ("bfloat16", False, 0.02), ("float32", True, 1e-5)],
)
def test_speed_up(precision, compiled, tolerance):
    """bfloat16 loses one part in 256 at every step, and more where batch norm subtracts what is nearly equal."""
    expected_logits, expected_gradient = pass_through(small_network())
    network = small_network()
    names = list(network.state_dict())
    speed_up(network, torch.device("cpu"), precision, compiled)
    logits, gradient = pass_through(network)
    assert logits.dtype == getattr(torch, precision)
    assert (logits - expected_logits).abs().max() <= tolerance * expected_logits.abs().max()
    assert (gradient - expected_gradient).norm() <= 5 * tolerance * expected_gradient.norm()  # through twice the steps
    if not compiled:  # which may round otherwise or not
        assert torch.equal(gradient, expected_gradient) == (precision == "float32")
    assert list(network.state_dict()) == names
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in network.parameters())
    assert all(b.dtype in (torch.float32, torch.int64) for b in network.buffers())
    in_channels_last = network[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert in_channels_last == (precision == "bfloat16")


def test_only_whole_batches_are_compiled():
    """Compiling takes long: it is done once for training and once for evaluation, not for short last batches."""
    torch._dynamo.reset()
    counters.clear()
    plain, fast = small_network(), small_network()
    speed_up(fast, torch.device("cpu"), compiled=True)
    for training, size in [(True, 16), (True, 16), (True, 3), (False, 12), (False, 4), (True, 16), (False, 12)]:
        images = torch.rand(size, 3, 8, 8)
        with torch.inference_mode(not training):
            torch.testing.assert_close(fast.train(training)(images), plain.train(training)(images))
    assert counters["stats"]["unique_graphs"] == 2
    assert fast.state_dict()["2.num_batches_tracked"] == 4


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_further_networks_of_a_process_are_not_compiled_anew(precision):
    """After eight times, torch would leave them as they are."""
    torch._dynamo.reset()
    counters.clear()
    for _ in range(3):
        network = small_network()
        speed_up(network, torch.device("cpu"), precision, compiled=True)
        assert pass_through(network)[0].dtype == getattr(torch, precision)
    assert counters["stats"]["unique_graphs"] == 1


def test_many_kinds_of_networks_are_compiled(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, dynamic: whole(f, backend="eager", dynamic=dynamic))
    for width in range(1, 13):
        network = nn.Linear(width, 2)
        speed_up(network, torch.device("cpu"), compiled=True)
        network(torch.rand(3, width))
    assert counters["stats"]["unique_graphs"] == 12


def test_compile_without_a_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"no C\+\+ compiler here: install g\+\+"):
        speed_up(nn.Linear(2, 2), torch.device("cpu"), compiled=True)


def test_speed_up_with_an_unknown_precision():
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, not 'float16'"):
        speed_up(nn.Linear(2, 2), torch.device("cpu"), "float16")
