import importlib
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import reproduce
import train
from image_sets.loading import load_image_set
from networks import construct_network, find_seed_problem
from observations import batch_norms, measure_normalized_values, measure_run
from saved_runs.results import Results
from seeds import make_deterministic
from small import prepared
from trained_networks import load_network

ROOT = Path(__file__).parent.parent
QUICK = ["--dataset", "digits", "--num_epochs", "3", "--batch_size", "48", "--learning_rate", "0.02", "--device", "cpu"]
NUMBERS = count()

DROPOUT = """
import random
from collections import OrderedDict

import torch
from torch import nn
from torchvision.ops import StochasticDepth


class Jitter(nn.Module):
    def forward(self, x):
        return x + random.random() * torch.rand(1) if self.training else x


def small(num_classes):
    head = nn.Linear(72, num_classes)
    unused = nn.BatchNorm1d(4, affine=False)
    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(8, 8, 3, 2, 1), Jitter()]
    body += [nn.BatchNorm2d(8), StochasticDepth(0.1, "row"), nn.Flatten()]
    layers = {"head": head, "body": nn.Sequential(*body), "statistics": unused}
    return Network(layers)


class Network(nn.ModuleDict):
    def forward(self, images):
        features = self["body"](images)
        self["statistics"](features[:, :4])
        return self["head"](features)
"""


@pytest.fixture
def write_module(tmp_path, monkeypatch) -> Callable[[str], str]:
    """A function that writes a module into the current folder and returns its name, a new one at each call."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])

    def write(code: str) -> str:
        name = f"my_networks_{next(NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(code)
        return name

    return write


GREY = """
from torch import nn
from torchvision.transforms import Grayscale


def small(num_classes):
    return nn.Sequential(Grayscale(), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, num_classes))
"""


def test_input_norm_takes_the_images_whatever_the_network_makes_of_them(write_module, tmp_path):
    """And the current folder stays, whatever the module and the function do."""
    leave = "\n    import os; os.chdir('/')"
    name = write_module("if True:" + leave + GREY.replace("(num_classes):", "(num_classes):" + leave))
    network = construct_network(f"{name}:small", num_classes=10, dataset="digits")
    assert network(torch.rand(2, 3, 8, 8)).shape == (2, 10) and Path.cwd() == tmp_path


def test_weights_are_those_of_the_function(write_module):
    name = write_module(DROPOUT)
    torch.manual_seed(3)
    network = construct_network(f"{name}:small", 6, "digits", 0.1)
    torch.manual_seed(3)
    expected = importlib.import_module(name).small(num_classes=6).state_dict()
    state = network[1].state_dict()
    assert list(state) == list(expected)
    for key, value in expected.items():
        if key in ("body.1.weight", "body.6.weight"):
            value = torch.full_like(value, 0.1)
        assert torch.equal(state[key], value), key
    assert state["body.0.bias"].abs().min() > 0  # only those of batch norms start at 0
    assert torch.equal(network[0].weight, torch.full((3,), 1).mul(0.1 * 0.58))
    plain = construct_network(f"{name}:small", 6, "digits", 0.1, input_norm="dataset")
    assert list(plain.state_dict()) == list(expected)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_network_that_computes_its_weights(write_module, few_digits, tmp_path):
    name = write_module(DROPOUT.replace("Linear(72, num_classes)", "utils.weight_norm(nn.Linear(72, num_classes))"))
    run, weights = run_and_weights([*QUICK, "--network", f"{name}:small"], tmp_path)
    assert {"1.head.weight_g", "1.head.weight_v"} <= weights.keys() and run.num_epochs == 3


def test_current_folder_takes_the_place_of_nothing(write_module, tmp_path):
    (tmp_path / "networks.py").write_text("def small(num_classes): pass")
    (tmp_path / "torch.py").write_text("")
    before = list(sys.path)
    name = write_module(DROPOUT)
    for _ in range(2):
        construct_network(f"{name}:small")
    assert sys.path == [*before, str(tmp_path)]
    with pytest.raises(ValueError, match=rf"^networks \({re.escape(str(ROOT))}/networks\.py\) has no function small$"):
        construct_network("networks:small")


def test_module_in_a_package(write_module, tmp_path):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "inner.py").write_text(DROPOUT)
    assert construct_network("my_package.inner:small", 4)(torch.rand(2, 3, 8, 8)).shape == (2, 4)


@pytest.mark.parametrize("stem", ["auto", "own", "small"])
def test_stem_of_a_resnet(stem):
    network = construct_network("torchvision.models:resnet18", 10, "cifar10", input_norm="dataset", stem=stem)
    assert network.conv1.kernel_size == ((3, 3) if stem == "small" else (7, 7))
    assert isinstance(network.maxpool, nn.Identity) == (stem == "small")


WRONG = {
    "import torch\nimport no_such_module": "^{0} cannot be imported: ModuleNotFoundError: No module named 'no_such",
    "def small(: pass": "^{0} cannot be imported: SyntaxError: ",
    "import sys; sys.exit(3)": "^{0} cannot be imported: SystemExit: 3$",
    "small = 3": r"^{0} \(.*/{0}\.py\) has no function small$",
    "from types import SimpleNamespace\nmodels = SimpleNamespace(small=len)": (  # as timm has, and torchvision
        r"^{0} \(.*/{0}\.py\) has no function small: give {0}\.models:small$"
    ),
    "def small(): pass": r"^{0}:small cannot be called with num_classes=10: TypeError: small\(\) got an unexpected",
    "def small(num_classes): raise SystemExit(0)": "^{0}:small cannot be called with num_classes=10: SystemExit: 0$",
    "def small(num_classes): pass": r"^{0}:small returns NoneType, which is not a torch\.nn\.Module$",
    "from torch import nn\ndef small(num_classes): return nn.Linear(2, 2)": "^{0}:small: there is no batch norm with ",
    "from torch import nn\ndef small(num_classes): return nn.LazyBatchNorm2d()": "^{0}:small returns lazy layers",
    "from torch import nn\ndef small(num_classes): return nn.BatchNorm2d(3).requires_grad_(False)": (
        "^{0}:small returns a network in which nothing requires gradients: there is nothing to train$"
    ),
}


@pytest.mark.parametrize("code", WRONG)
def test_what_is_no_network(write_module, code):
    name = write_module(code)
    with pytest.raises(ValueError, match=WRONG[code].format(name)):
        construct_network(f"{name}:small")


SEEDED = """
import random
import numpy as np
import torch
from torch import nn

GENERATOR = np.random.default_rng(0)

def build(start=0.0):
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    nn.init.constant_(network[1].bias, start)
    return network

MADE = build()

def small(num_classes):
    """
SEEDS = {
    "return build(random.random() + np.random.rand())": None,
    "return nn.Sequential(build(), MADE)": "returns the same weights at every call",
    "return build(GENERATOR.random())": "draws otherwise at every call",
    "torch.seed(); return build()": "draws otherwise at every call",
    "torch.manual_seed(42); return build()": "gives the same weights with every seed",
    "network = build(); torch.manual_seed(42); return network": "seeds torch's generator",
}


@pytest.mark.parametrize("body", SEEDS)
def test_weights_follow_from_the_seed(write_module, body):
    name = f"{write_module(SEEDED + body)}:small"
    make_deterministic(2)
    expected = random.random(), np.random.rand(), torch.rand(1)
    make_deterministic(2)
    problem = find_seed_problem(name, 4)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert problem is None if SEEDS[body] is None else problem.startswith(f"{name} {SEEDS[body]}")
    assert find_seed_problem("resnet18", 4) is None


CONVOLUTION = """
from torch import nn
def small(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, WIDTH), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, OUTPUTS))
"""


@pytest.mark.parametrize(
    ("code", "flags", "message"),
    [
        ("", [], "argument --network: {0} (/"),
        (DROPOUT, ["--stem", "small"], "argument --network: {0}:small is none of torchvision's ResNets"),
        (
            CONVOLUTION.replace("WIDTH", "11").replace("OUTPUTS", "10"),
            [],
            "argument --network: {0}:small cannot train on two images of 8×8 pixels: RuntimeE",
        ),
        (DROPOUT, ["--batch_size", "34"], "argument --batch_size: 34 leaves a last batch of one of the 1293"),
    ],
)
@pytest.mark.parametrize("command", [train, reproduce])
def test_bad_network_ends_a_command_in_one_line(
    runs_here, write_module, tmp_path, capsys, code, flags, message, command
):
    name = write_module(code)
    with pytest.raises(SystemExit) as stop:
        command.main(["--dataset", "digits", "--network", f"{name}:small", "--device", "cpu", *flags])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and message.format(name) in err
    assert out == ""
    assert not (tmp_path / "results").exists() and not list(tmp_path.glob("networks/*.pt"))


def stop_after_an_epoch(line: str) -> None:
    """A `report` that ends a run."""
    if line.startswith("epoch 1/"):
        raise KeyboardInterrupt


def run_and_weights(flags: list[str], path: Path, stop: bool = False) -> tuple[Results, dict[str, torch.Tensor]]:
    """What comes of a run; with `stop`, of one that is stopped after its first epoch and resumed."""
    settings = prepared([*flags, "--path", str(path), "--scheduler", "none"])  # which keeps its last weights
    if stop:
        with pytest.raises(KeyboardInterrupt):
            train.train(settings, stop_after_an_epoch)
        torch.rand(7), np.random.rand(7)
    results = train.train(settings)
    return results, torch.load(path / "networks" / f"{settings.run_name}-last.pt", weights_only=True)["network"]


def test_run_that_draws_numbers_is_resumed_to_the_last_bit(write_module, few_digits, tmp_path):
    name = write_module(DROPOUT)
    flags = [*QUICK, "--network", f"{name}:small"]
    run, weights = run_and_weights(flags, tmp_path / "once")
    resumed, resumed_weights = run_and_weights(flags, tmp_path / "again", stop=True)
    for column, values in run.columns.items():
        assert values.tolist() == resumed.columns[column].tolist()
    assert weights.keys() == resumed_weights.keys()
    assert all(torch.equal(value, resumed_weights[key]) for key, value in weights.items())
    assert run.header["network"] == f"{name}:small"
    assert run.header["name"].startswith(f"digits-{name}.small-batch_size=48-")
    other, _ = run_and_weights([*flags, "--seed", "2"], tmp_path)
    assert run.columns["train_loss"].tolist() != other.columns["train_loss"].tolist()
    network = load_network(tmp_path / "once" / "results" / f"{run.header['name']}.csv")
    digits = load_image_set("digits")
    test = digits.splits["test"]
    with torch.no_grad():
        right = (network(digits.images[test] / 255).argmax(1) == digits.labels[test]).double().mean().item()
    assert right * 100 == pytest.approx(run.test_accuracy)
    assert [layer.name for layer in measure_run(run, network, digits)] == ["0", "1.body.1", "1.body.6", "1.statistics"]


def test_batch_norms_without_scales_or_statistics():
    without = [{"affine": False}, {"track_running_stats": False}, {}, {}]
    network = nn.Sequential(*(nn.BatchNorm2d(3, **options) for options in without))
    network[2].register_parameter("bias", None)
    nn.init.constant_(network[-1].weight, 0.25)
    [(_, scales, shifts)] = batch_norms(network.state_dict())
    assert scales.tolist() == [0.25] * 3 and shifts.tolist() == [0] * 3
    images = torch.rand(4, 3, 5, 5)
    network[3].eval()
    second = measure_normalized_values(network, images)[1]
    assert [module.training for module in network.modules()] == [True, True, True, True, False]
    centred = images - images.mean((0, 2, 3), keepdim=True)
    expected = centred / centred.square().mean((0, 2, 3), keepdim=True).add(1e-5).sqrt()
    assert second.name == "1" and second.maximum == pytest.approx(expected.abs().max().item(), rel=1e-3)


@pytest.mark.parametrize("name", ["googlenet", "maxvit_t"])
def test_trained_networks_of_torchvision(tmp_path, name):
    """A last layer with a bias and without, of 7 classes; the other weights are not those of a new network."""
    from test_trained_networks import write_run

    trained = construct_network(name, 7, "flowers", 0.1)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)
    settings = {"dataset": "flowers", "images": "9 of 7 classes", "network": name, "bn_weight": 0.1}
    file = write_run(tmp_path, trained.state_dict(), **settings)
    loaded = load_network(file).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in trained.state_dict().items())


TRAINED = """
import torch
from torch import nn

def small(num_classes):
    with torch.random.fork_rng():
        network = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, num_classes))
    network(torch.rand(8, 3, 8, 8))
    return network
"""


def test_trained_weights_are_said_to_be_lost(write_module, few_digits, tmp_path):
    """In the first line of a run."""
    name = write_module(TRAINED)
    lines: list[str] = []
    flags = [*QUICK, "--network", f"{name}:small", "--path", str(tmp_path)]
    train.train(prepared(flags), lines.append)
    assert lines[0].startswith(f"{name}:small: the network seems to have been trained, and loses with its γ and β what")
    with pytest.warns(UserWarning, match="seems to have been trained"):
        construct_network(f"{name}:small", dataset="digits")


FROZEN = """
from torch import nn

class Frozen(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        self[4].eval()
        return self

def layers(num_classes):
    convolutions = [nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]
    return [*convolutions, nn.Flatten(), nn.Linear(36, num_classes)]

def by_itself(num_classes):
    return Frozen(*layers(num_classes))

def by_mode(num_classes):
    network = nn.Sequential(*layers(num_classes))
    network[4].eval()
    return network
"""


@pytest.mark.parametrize(("function", "frozen"), [("by_itself", True), ("by_mode", False)])
def test_layer_stays_frozen_where_the_network_sees_to_it(write_module, few_digits, tmp_path, function, frozen):
    _, weights = run_and_weights([*QUICK, "--network", f"{write_module(FROZEN)}:{function}"], tmp_path)
    assert weights["1.1.num_batches_tracked"] > 0
    assert (weights["1.4.num_batches_tracked"] == 0) == frozen == (weights["1.4.running_mean"] == 0).all()


def test_function_in_the_script_that_trains_it(write_module):
    script = GREY + "if __name__ == '__main__':\n    from train import train\n    from run_settings import Settings\n"
    script += "    for seed in (1, 2):\n"
    script += "        train(Settings(dataset='digits', num_epochs=1, network='__main__:small', seed=seed))\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, f"{write_module(script)}.py"], env=environment, check=True, timeout=300)


def test_function_that_has_changed(write_module, few_digits, tmp_path, capsys):
    """Not yet imported anew, as in a notebook, it is not what the file says. Then, a run of before is not resumed."""
    name = write_module(DROPOUT)
    flags = [*QUICK, "--network", f"{name}:small", "--path", str(tmp_path)]
    train.main([*flags, "--name", "finished"])
    with pytest.raises(KeyboardInterrupt):
        train.train(prepared(flags), stop_after_an_epoch)
    (tmp_path / f"{name}.py").write_text(DROPOUT.replace("8", "12").replace("72", "108") + "\n# of another size")
    with pytest.raises(ValueError, match=f"the code of {name}:small has changed since it was imported"):
        train.train(prepared([*flags, "--restart"]))
    importlib.reload(sys.modules[name])
    with pytest.raises(SystemExit, match="1"):
        train.main(flags)
    assert f"the code of {name}:small changed since digits-{name}" in capsys.readouterr().err
    train.main([*flags, "--name", "finished"])
    assert f"is finished already; the code of {name}:small changed since" in capsys.readouterr().out
