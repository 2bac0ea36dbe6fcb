import inspect
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch._dynamo.utils import counters
from tqdm import tqdm

import train
from batch_norm import prepend_input_norm
from command_line.settings import PRECISIONS
from networks import construct_network, reinit_network, zero_biases
from small import construct_small_network
from training import preparation
from training.devices import speed_up, use_precision
from weight_decay_and_learning_rate import adjust_weight_decay_and_learning_rate


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


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_every_network_runs(name):
    with torch.device("meta"):
        network = construct_network(name, num_classes=7)
        assert network(torch.empty(2, 3, 32, 32)).shape == (2, 7)
    number_of_layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in network.modules())
    number_of_shortcuts = sum("downsample.0.weight" in n for n, _ in network.named_parameters())
    assert f"resnet{number_of_layers - number_of_shortcuts}" == name


@pytest.mark.parametrize(
    ("arguments", "small"),
    [
        ({"dataset": "digits"}, True),
        ({"dataset": "cifar10"}, True),
        ({"dataset": "imagenet"}, False),
        ({"dataset": "imagenet", "image_size": 64}, True),
        ({"dataset": "imagenet", "image_size": 65}, False),
        ({"dataset": "imagenet", "image_size": (64, 48)}, True),
        ({"dataset": "imagenet", "image_size": (48, 65)}, False),
        ({"dataset": "cifar10", "image_size": 224}, False),
        ({"dataset": "cifar10", "stem": "own"}, False),
        ({"dataset": "imagenet", "stem": "small"}, True),
    ],
)
@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "wide_resnet50_2"])
def test_stem(name, arguments, small):
    with torch.device("meta"):
        network = construct_network(name, input_norm="dataset", **arguments)
    assert network.conv1.bias is None
    if small:
        assert (network.conv1.kernel_size, network.conv1.stride, network.conv1.padding) == ((3, 3), (1, 1), (1, 1))
        assert isinstance(network.maxpool, nn.Identity)
    else:
        assert (network.conv1.kernel_size, network.conv1.stride, network.conv1.padding) == ((7, 7), (2, 2), (3, 3))
        assert isinstance(network.maxpool, nn.MaxPool2d)


def test_defaults():
    network = construct_network()
    assert network[1].fc.out_features == 10
    assert all(torch.all(m.weight == 1) for m in network[1].modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network_name": "resnet19"}, "torchvision has no classification network 'resnet19': close are resnet18, "),
        ({"network_name": "ResNet34"}, "torchvision has no classification network 'ResNet34': close are resnet34, "),
        ({"network_name": "best"}, "no classification network 'best': resnet18 is one, and MODULE:FUNCTION your own"),
        ({"network_name": "alexnet"}, "alexnet has no batch norm, which the method is about: take one that has some"),
        ({"network_name": "vgg19"}, "vgg19 has no batch norm"),
        ({"network_name": "vit_h_14"}, "vit_h_14 has no batch norm"),
        ({"network_name": "swin_v2_t"}, "swin_v2_t has no batch norm"),
        ({"network_name": "convnext_tiny"}, "convnext_tiny has no batch norm"),
        ({"network_name": "squeezenet1_1"}, "squeezenet1_1 has no batch norm"),
        ({"network_name": "mobilenet_v2", "stem": "small"}, "mobilenet_v2 is none of torchvision's ResNets, for which"),
        ({"stem": "large"}, "stem must be one of auto, small, own"),
        ({"input_norm": "layer"}, "input_norm must be one of bn, dataset"),
        ({"bn_weight": 0}, "bn_weight must be a finite number above 0"),
        ({"bn_weight": float("nan")}, "bn_weight must be a finite number above 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        construct_network(**arguments)


FAMILIES = {  # of each, the smallest network and the smallest images that it can train on
    "densenet121": 29,
    "efficientnet_b0": 1,
    "efficientnet_v2_s": 1,
    "googlenet": 15,
    "inception_v3": 75,
    "maxvit_t": 221,
    "mnasnet0_5": 1,
    "mobilenet_v2": 1,
    "mobilenet_v3_small": 1,
    "regnet_x_400mf": 1,
    "regnet_y_400mf": 1,
    "resnet18": 1,
    "resnext50_32x4d": 1,
    "shufflenet_v2_x0_5": 1,
    "vgg11_bn": 32,
    "wide_resnet50_2": 1,
}


def test_every_family_is_tested():
    """All classes of torchvision's networks but those that have no batch norm."""

    def classes(names: Iterable[str]) -> set[str]:
        builders = map(torchvision.models.get_model_builder, names)
        return {inspect.signature(builder).return_annotation.__name__ for builder in builders}

    without = {"AlexNet", "ConvNeXt", "SqueezeNet", "SwinTransformer", "VisionTransformer"}
    assert classes(FAMILIES) == classes(torchvision.models.list_models(module=torchvision.models)) - without


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_torchvision_trains(name):
    """An epoch of two steps on 64 images, or on 4 where they must be large; of 8 pixels where 1 would do."""
    torch.manual_seed(1)
    pixels = max(FAMILIES[name], 8)
    network = construct_network(name, 5, "imagenet", 0.1, image_size=pixels)
    batch_size = 32 if pixels <= 75 else 2
    settings = preparation.parse(["--batch_size", str(batch_size), "--device", "cpu"])
    groups = adjust_weight_decay_and_learning_rate(network, learning_rate=0.01, c=100)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images, labels = torch.rand(2, batch_size, 3, pixels, pixels), torch.randint(5, (2, batch_size))
    train.train_one_epoch(network, zip(images, labels, strict=True), optimizer, settings, 1, tqdm(disable=True))
    for name, value in network.state_dict().items():
        assert value.isfinite().all(), name
        learned = value.is_floating_point() and name != "0.bias"
        assert torch.equal(value, before[name]) != learned or name.endswith("num_batches_tracked"), name
    assert network.eval()(images[0]).shape == (batch_size, 5)


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


@pytest.fixture
def graphs(monkeypatch) -> Callable[[], int]:
    """A function that says how many graphs have been compiled since the test began, in place of a compiler."""
    whole = torch.compile

    def compile_quickly(function, mode, dynamic):
        return whole(function, backend="aot_eager", dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compile_quickly)
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


def test_compiled_network():
    """With the real compiler, once."""
    expected_logits, expected_gradient = pass_through(small_network())
    network = small_network()
    names = list(network.state_dict())
    speed_up(network, compiled=True)
    logits, gradient = pass_through(network)
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(gradient, expected_gradient)
    assert list(network.state_dict()) == names


@pytest.mark.parametrize("precision", PRECISIONS)
def test_speed_up_leaves_the_weights_alone(precision):
    network, expected = small_network(), small_network().state_dict()
    speed_up(network, precision)
    assert list(network.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
    in_channels_last = network[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert in_channels_last == (precision == "bfloat16")


def test_only_weights_of_convolutions_over_images_change_their_layout():
    network = nn.ModuleList([nn.Conv1d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 3), nn.LSTM(3, 4)])
    expected = {name: value.clone() for name, value in network.state_dict().items()}
    strides = {name: value.stride() for name, value in network.state_dict().items()}
    speed_up(network, "bfloat16")
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
    changed = {name for name, value in network.state_dict().items() if value.stride() != strides[name]}
    assert changed == {"1.weight"}


@pytest.mark.parametrize("compiled", [False, True])
def test_copy_of_a_network_computes_with_its_own_weights(graphs, compiled):
    network = small_network()
    speed_up(network, "bfloat16", compiled)
    pass_through(network)
    average = torch.optim.swa_utils.AveragedModel(network)
    with torch.no_grad():
        average.module[-1].weight.zero_()
        average.module[-1].bias.fill_(3)
    assert torch.equal(average(torch.rand(2, 3, 8, 8)), torch.full((2, 10), 3.0))
    assert network[-1].weight.abs().max() > 0


def test_further_networks_of_a_process_are_not_compiled_anew(graphs):
    """After eight times, torch would leave them as they are."""
    for _ in range(3):
        network = small_network()
        speed_up(network, compiled=True)
        pass_through(network)
    assert graphs() == 1


def test_many_kinds_of_networks_are_compiled(graphs):
    for width in range(1, 13):
        network = nn.Linear(width, 2)
        speed_up(network, compiled=True)
        network(torch.rand(3, width))
    assert graphs() == 12


def test_compile_without_a_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"no C\+\+ compiler here: install g\+\+"):
        speed_up(nn.Linear(2, 2), compiled=True)


def fp32_precisions() -> list[str]:
    """What torch computes in on GPUs, for products and convolutions, and on CPUs, for the same."""
    backends = torch.backends
    of = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    return ["tf32" if backend.fp32_precision == "tf32" else "ieee" for backend in of]


def test_defaults_of_torch_are_those_of_float32():
    """In a process of its own: nobody has set anything there."""
    code = "from test_networks import fp32_precisions; print(*fp32_precisions())"
    folder = Path(__file__).parent
    paths = {"PYTHONPATH": os.pathsep.join((str(folder), str(folder.parent)))}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **paths})
    with use_precision("float32"):
        assert fp32_precisions() == found.stdout.split()


@pytest.mark.parametrize("earlier", ["ieee", "tf32"])
@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("float32", ["ieee", "tf32", "ieee", "ieee"]),
        ("bfloat16", ["ieee", "tf32", "ieee", "ieee"]),
        ("strict", ["ieee", "ieee", "ieee", "ieee"]),
        ("tf32", ["tf32", "tf32", "ieee", "ieee"]),
    ],
)
def test_use_precision_whatever_was_set_before(earlier, precision, expected):
    with torch.backends.flags(fp32_precision=earlier):
        before = fp32_precisions()
        with use_precision(precision):
            assert fp32_precisions() == expected
        assert fp32_precisions() == before


@pytest.mark.parametrize("use", [use_precision("float16").__enter__, lambda: speed_up(nn.Linear(2, 2), "float16")])
def test_unknown_precision(use):
    with pytest.raises(ValueError, match="precision must be one of float32, strict, tf32, bfloat16, not 'float16'"):
        use()


# --- any network ----------------------------------------------------------------------------------------------------


def test_input_norm_in_front():
    network = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    whole = prepend_input_norm(network, 0.5, num_channels=4)
    images = torch.rand(8, 4, 3, 3) * 7 + 5
    normalized = (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(whole[0](images), normalized * 0.5 * 0.58, rtol=1e-3, atol=1e-4)
    assert whole[1] is network and network[1].weight.tolist() == [1, 1]
    assert [name for name, p in whole.named_parameters() if not p.requires_grad] == ["0.bias"]
    assert torch.equal(whole[0].bias, torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_input_norm_is_like_the_network(dtype):
    network = nn.Sequential(nn.Embedding(2, 2), nn.Conv2d(3, 2, 1, dtype=dtype, device="meta"))
    network[0].weight = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    [input_norm, _] = prepend_input_norm(network, 0.1)
    assert input_norm.weight.dtype == dtype and input_norm.weight.is_meta
    assert prepend_input_norm(nn.ReLU(), 0.1)[0].weight.dtype == torch.float32


@pytest.mark.parametrize("bn_weight", [0, -1, "0.1", None, 1e-60, math.nan])
def test_input_norm_with_a_scale_that_there_cannot_be(bn_weight):
    with pytest.raises(ValueError, match=f"bn_weight must be a finite number above 0 that .* not {bn_weight!r}"):
        prepend_input_norm(nn.ReLU(), bn_weight)
