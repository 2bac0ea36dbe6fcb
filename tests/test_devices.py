"""Devices, precision, compilation."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from run_settings import PRECISIONS
from small import SmallNetwork, construct_small_network
from training.devices import speed_up, use_precision

ROOT = Path(__file__).parent.parent


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
    for width in range(1, 11):
        network = SmallNetwork(nn.Linear(width, 2))
        speed_up(network, compiled=True)
        network(torch.rand(3, width))
    assert graphs() == 10


def fp32_precisions() -> list[str]:
    """What torch computes in on GPUs, for products and convolutions, and on CPUs, for the same."""
    backends = torch.backends
    of = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    return ["tf32" if backend.fp32_precision == "tf32" else "ieee" for backend in of]


def test_defaults_of_torch_are_those_of_float32():
    """In a process of its own: nobody has set anything there."""
    code = f"import torch\n{inspect.getsource(fp32_precisions)}print(*fp32_precisions())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    with use_precision("float32"):
        assert fp32_precisions() == found.stdout.split()


EXPECTED = {"float32": ["ieee", "tf32", "ieee", "ieee"], "strict": ["ieee", "ieee", "ieee", "ieee"]}
EXPECTED |= {"tf32": ["tf32", "tf32", "ieee", "ieee"], "bfloat16": EXPECTED["float32"]}


@pytest.mark.parametrize("earlier", ["ieee", "tf32"])
def test_use_precision_whatever_was_set_before(earlier):
    with torch.backends.flags(fp32_precision=earlier):
        before = fp32_precisions()
        for precision in PRECISIONS:
            with use_precision(precision):
                assert fp32_precisions() == EXPECTED[precision]
            assert fp32_precisions() == before


FREED = """
import ctypes, sys, torch
from training.devices import keep_freed_memory
if sys.argv[1] == "missing":
    ctypes.CDLL = lambda name: object()
if sys.argv[1] != "as it is":
    keep_freed_memory()
torch.manual_seed(0)
layer = torch.nn.Conv2d(3, 64, 3, padding=1)
for _ in range(2):  # an output of 32 MiB, from where on glibc gives memory back
    layer(torch.rand(128, 3, 32, 32)).relu().square().mean().backward()
print(layer.weight.grad.sum().item(), layer.weight.grad.square().sum().item())
"""


def test_numbers_are_the_same_with_freed_memory_kept():
    """Also where there is no such function."""
    kept = [
        subprocess.run([sys.executable, "-c", FREED, how], capture_output=True, text=True, check=True, cwd=ROOT).stdout
        for how in ("as it is", "kept", "missing")
    ]
    assert kept[0] == kept[1] == kept[2] != ""
