import inspect
import math
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrize

from networks import construct_network, reinit_network, zero_biases
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
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["0.bias"] * (input_norm == "bn")


@pytest.mark.parametrize(
    ("arguments", "small"),
    [
        ({"dataset": "digits"}, True),
        ({"dataset": "imagenet"}, False),
        ({"dataset": "imagenet", "image_size": (64, 48)}, True),
        ({"dataset": "imagenet", "image_size": (48, 65)}, False),
        ({"dataset": "cifar10", "image_size": 224}, False),
        ({"dataset": "cifar10", "stem": "own"}, False),
        ({"network_name": "wide_resnet50_2", "dataset": "imagenet", "stem": "small"}, True),
    ],
)
def test_stem(arguments, small):
    with torch.device("meta"):
        network = construct_network(input_norm="dataset", **arguments)
    first = network.conv1
    sizes = ((3, 3), (1, 1), (1, 1)) if small else ((7, 7), (2, 2), (3, 3))
    assert (first.kernel_size, first.stride, first.padding) == sizes and first.bias is None
    assert isinstance(network.maxpool, nn.Identity if small else nn.MaxPool2d)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network_name": "ResNet34"}, "torchvision has no classification network 'ResNet34': close are resnet34, "),
        ({"network_name": "best"}, "no classification network 'best': resnet18 is one, and MODULE:FUNCTION your own"),
        ({"network_name": "alexnet"}, "alexnet has no batch norm, which the method is about: take one that has some"),
        ({"network_name": "mobilenet_v2", "stem": "small"}, "mobilenet_v2 is none of torchvision's ResNets, for which"),
        ({"stem": "large"}, "stem must be one of auto, small, own"),
        ({"input_norm": "layer"}, "input_norm must be one of bn, dataset"),
        ({"bn_weight": 0}, "bn_weight must be a finite number above 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        construct_network(**arguments)


FAMILIES = dict.fromkeys(  # of each, the smallest network and the smallest images that it can train on
    ("efficientnet_b0", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18"), 1
) | {"densenet121": 29, "googlenet": 15, "inception_v3": 75, "shufflenet_v2_x0_5": 1}


def test_every_family_is_tested():
    """All classes of torchvision's networks but those that have no batch norm, or that take seconds for a step."""

    def classes(names: Iterable[str]) -> set[str]:
        builders = map(torchvision.models.get_model_builder, names)
        return {inspect.signature(builder).return_annotation.__name__ for builder in builders}

    without = {"AlexNet", "ConvNeXt", "SqueezeNet", "SwinTransformer", "VisionTransformer", "MaxVit", "VGG"}
    assert classes(FAMILIES) == classes(torchvision.models.list_models(module=torchvision.models)) - without


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_torchvision_trains(name):
    """A step on 8 images; of 8 pixels where 1 would do."""
    torch.manual_seed(1)
    pixels = max(FAMILIES[name], 8)
    network = construct_network(name, 5, "imagenet", 0.1, image_size=pixels)
    optimizer = torch.optim.SGD(adjust_weight_decay_and_learning_rate(network, learning_rate=0.01, c=100))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    images = torch.rand(8, 3, pixels, pixels)
    F.cross_entropy(network(images), torch.randint(5, (8,))).backward()
    optimizer.step()
    for key, value in network.state_dict().items():
        assert value.isfinite().all(), key
        learned = value.is_floating_point() and key != "0.bias"
        assert torch.equal(value, before[key]) != learned or key.endswith("num_batches_tracked"), key
    assert network.eval()(images).shape == (8, 5)


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
    for wrong in ({"fan": "both"}, {"activation_function": nn.GELU}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            reinit_network(network, **wrong)


def test_zero_biases():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 2))
    for parameter in network.parameters():
        nn.init.ones_(parameter)
    zero_biases(network)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, torch.full_like(parameter, 0 if name.endswith("bias") else 1))


def test_weights_that_are_computed_are_not_drawn():
    """It would have no effect on the next forward pass."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 2))
    parametrize.register_parametrization(network[1], "weight", nn.Softplus())
    with pytest.raises(ValueError, match="the weight of layer '1' is computed from other parameters"):
        reinit_network(network)
    zero_biases(network)
    parametrize.register_parametrization(network[1], "bias", nn.Softplus())
    with pytest.raises(ValueError, match="the bias of layer '1' is computed from other parameters"):
        zero_biases(network)
