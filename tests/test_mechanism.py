import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from PIL import Image
from torch import nn

import mechanism
from image_sets.batches import Batches
from image_sets.loading import load_image_set
from mechanism import AtInitialization, FirstSteps, measure_first_steps, measure_initialization
from networks import construct_network
from seeds import make_deterministic
from training import preparation

FLAGS = ["--dataset", "digits", "--network", "test_mechanism:small_network", "--device", "cpu", "--batch_size", "64"]


def small_network(num_classes: int) -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes))


def perceptron(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Linear(8, num_classes))


def construct(bn_weight: float, eps: float = 1e-5) -> nn.Module:
    make_deterministic(1)
    network = construct_network("test_mechanism:small_network", 10, "digits", bn_weight).double()
    for module in network.modules():
        if hasattr(module, "eps"):
            module.eps = eps
    return network


def random_batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double(), torch.arange(12) % 10


# --- before the first step ------------------------------------------------------------------------------------------


def test_gradients_are_those_of_finite_differences():
    network, (images, labels) = construct(0.5), random_batch()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    measured = measure_initialization(network.eval(), images, labels)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not network.training and all(parameter.grad is None for parameter in network.parameters())

    network.train()

    @torch.no_grad()
    def loss() -> float:
        return F.cross_entropy(network(images), labels).item()

    assert measured.loss == pytest.approx(loss())
    with torch.no_grad():
        assert measured.logit_deviation == pytest.approx(np.std(network(images).numpy()))
    for name, norm in measured.gradient_norms.items():
        weights, squares = network.get_submodule(name).weight.data.view(-1), 0.0
        for index in range(len(weights)):
            weights[index] += 1e-5
            above = loss()
            weights[index] -= 2e-5
            squares += ((above - loss()) / 2e-5) ** 2
            weights[index] += 1e-5
        assert norm == pytest.approx(math.sqrt(squares), rel=1e-5)
    assert list(measured.gradient_norms) == ["1.0", "1.3"]


def test_what_a_small_scale_does():
    """Logits are in proportion to γ without eps and biases, and gradients are where softmax is nearly uniform."""
    small, smaller, one = (measured(w) for w in (1e-2, 1e-3, 1.0))
    assert small.logit_deviation / smaller.logit_deviation == pytest.approx(10, rel=1e-6)
    assert one.logit_deviation / small.logit_deviation == pytest.approx(100, rel=1e-6)
    for name, norm in small.gradient_norms.items():
        assert norm / smaller.gradient_norms[name] == pytest.approx(10, rel=0.05)
    assert smaller.loss == pytest.approx(math.log(10), abs=0.01)


def measured(bn_weight: float) -> AtInitialization:
    network = construct(bn_weight, eps=1e-30)
    nn.init.zeros_(network[1][-1].bias)
    return measure_initialization(network, *random_batch())


# --- in the first steps ---------------------------------------------------------------------------------------------


@pytest.fixture
def settings():
    return preparation.parse([*FLAGS, "--seed", "3", "--learning_rate", "0.2", "--bn_weight", "0.5"])


def test_first_steps(settings, few_digits, monkeypatch):
    """Beside a plain loop, over more than an epoch: 144 images are three batches."""
    image_set, of_statistics, estimate = load_image_set("digits"), [], mechanism.estimate_statistics

    def noted(network, batches):
        of_statistics.append(list(batches))
        return estimate(network, of_statistics[-1])

    monkeypatch.setattr(mechanism, "estimate_statistics", noted)
    found = measure_first_steps(settings, image_set, [0, 1, 5])
    assert found.steps.tolist() == [0, 1, 5]

    make_deterministic(3)
    network = construct_network("test_mechanism:small_network", 10, "digits", 0.5)
    initial = [layer.weight.detach().clone() for layer in (network[1][0], network[1][3])]
    scales = [module.weight for module in network.modules() if hasattr(module, "running_mean")]
    shifts = [parameter for name, parameter in network.named_parameters() if "bias" in name]
    weights = [network[1][place].weight for place in (0, 3, 8)]
    velocities = dict.fromkeys((*scales, *shifts, *weights), 0.0)
    test = image_set.images[image_set.splits["test"]] / 255, image_set.labels[image_set.splits["test"]]
    running, angles = [], []
    batches = [batch for _ in range(2) for batch in Batches(image_set, "train", 64, False)]
    for step in range(6):
        if step in (0, 1, 5):
            with torch.no_grad():
                running.append((network.eval()(test[0]).argmax(1) == test[1]).float().mean().item() * 100)
            for place, first in zip((0, 3), initial, strict=True):
                one, other = first.double().flatten(), network[1][place].weight.detach().double().flatten()
                cosine = (one @ other / one.norm() / other.norm()).clamp(max=1).item()
                angles.append(math.degrees(math.acos(cosine)))
        network.train().zero_grad()
        images, labels = batches[step]
        F.cross_entropy(network(images), labels).backward()
        with torch.no_grad():
            for parameter in velocities:
                if parameter.requires_grad:
                    decay = 1e-4 * parameter if parameter in set(weights) else 0
                    velocities[parameter] = 0.9 * velocities[parameter] + parameter.grad + decay
                    parameter -= (0.002 if parameter in set(scales) else 0.2) * velocities[parameter]
    np.testing.assert_allclose(found.running, running, rtol=1e-5)
    np.testing.assert_allclose(np.transpose(list(found.angles.values())).ravel(), angles, rtol=1e-3, atol=1e-4)
    assert found.angles["1.0"][0] == 0 and found.angles["1.0"][2] > 0.5

    assert len(of_statistics) == 3
    for batches in of_statistics:  # of all training images
        labels = torch.cat([labels for _, labels in batches])
        assert labels.bincount().tolist() == image_set.labels[image_set.splits["train"]].bincount().tolist()

    alone = measure_first_steps(settings, image_set, [5], num_images=20)  # what is measured changes no training
    assert [alone.angles[name][0] for name in found.angles] == [angles[-1] for angles in found.angles.values()]
    assert not np.allclose(found.estimated_anew, found.running)


def test_statistics_are_those_of_the_batches():
    network = nn.Sequential(nn.BatchNorm2d(3))
    network[0].running_mean += 5
    batches = [(torch.rand(n, 3, 2, 2), None) for n in (8, 8, 4)]
    anew = mechanism.estimate_statistics(network, batches)
    values = [images.numpy().astype(float) for images, _ in batches]
    mean = np.mean([images.mean((0, 2, 3)) for images in values], axis=0)
    variance = np.mean([images.var((0, 2, 3), ddof=1) for images in values], axis=0)
    np.testing.assert_allclose(anew[0].running_mean, mean, rtol=1e-5)
    np.testing.assert_allclose(anew[0].running_var, variance, rtol=1e-5)
    assert (network[0].running_mean == 5).all() and (network[0].running_var == 1).all()


@pytest.mark.parametrize("degrees", [0, 1e-6, 30, 90, 180])
def test_angle(degrees):
    turned = math.radians(degrees)
    one = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    other = torch.tensor([[math.cos(turned), math.sin(turned)]], dtype=torch.float64)
    assert mechanism.angle(one, other) == pytest.approx(degrees, rel=1e-6)


def test_mean_over_seeds():
    runs = [
        FirstSteps(np.array([0, 5]), np.array([10.0, a]), np.array([20.0, 2 * a]), {"x": np.array([0, a])})
        for a in (30.0, 40.0)
    ]
    mean = mechanism.mean_over_seeds(runs)
    assert mean.steps.tolist() == [0, 5] and f"{mean.steps[1]}" == "5"
    assert (mean.running.tolist(), mean.estimated_anew.tolist()) == ([10, 35], [20, 70])
    assert mean.angles["x"].tolist() == [0, 35]


# --- figures and the command ----------------------------------------------------------------------------------------


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables():
    at = AtInitialization({"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}, 0.5, 2.25)
    head, _, row = mechanism.tabulate_initialization({0.1: at}).splitlines()
    assert cells(head) == ["initial γ", "logits", "loss", "gradient, first", "gradient, middle", "gradient, last"]
    assert cells(row) == ["0.1", "0.5", "2.250", "1", "3", "4"]
    run = FirstSteps(np.array([7]), np.array([10.0]), np.array([20.0]), {"a": [1.0], "b": [2.0], "c": [9.0]})
    head, _, row = mechanism.tabulate_first_steps({"x": run}).splitlines()
    assert cells(head) == ["setting", "step", "running (%)", "estimated anew (%)", "median angle"]
    assert cells(row) == ["x", "7", "10.0", "20.0", "2.00°"]


def test_figures():
    found = {w: AtInitialization({"a": 2 * w, "b": w}, 3 * w, 2.3 + w) for w in (0.1, 1.0)}
    by_depth, by_scale = mechanism.draw_initialization(found).axes
    np.testing.assert_allclose([line.get_ydata() for line in by_depth.lines], [[0.2, 0.1], [2, 1]])
    np.testing.assert_allclose([line.get_ydata() for line in by_scale.lines], [[0.3, 3], [2.4, 3.3], [0.3, 3]])

    steps, angles = np.array([0, 1, 5]), {"a": np.array([0, 1, 2]), "b": np.array([0, 3, 4])}
    run = FirstSteps(steps, np.array([10, 11, 20]), np.array([10, 50, 60]), angles)
    runs = {"baseline": run, "proposed": run}
    for panel, name in zip(mechanism.draw_statistics(runs).axes, runs, strict=True):
        assert panel.get_title() == name
        np.testing.assert_allclose([line.get_xdata() for line in panel.lines], [steps, steps])
        np.testing.assert_allclose([line.get_ydata() for line in panel.lines], [[10, 11, 20], [10, 50, 60]])
    first = FirstSteps(*(values[:2] for values in (steps, run.running, run.estimated_anew)), {"a": angles["a"][:2]})
    assert [panel.get_title() for panel in mechanism.draw_rotation({"baseline": first}).axes] == ["after 1 step"]
    panels = mechanism.draw_rotation(runs).axes
    assert [panel.get_title() for panel in panels] == ["after 1 step", "after 5 steps"]
    for panel, expected in zip(panels, ([1, 3], [2, 4]), strict=True):
        np.testing.assert_allclose([line.get_ydata() for line in panel.lines], [expected, expected])
        assert len({line.get_marker() for line in panel.lines}) == 2  # what can be told apart in grey
    assert pyplot.get_fignums() == []


def test_command(few_digits, tmp_path, capsys):
    mechanism.main([*FLAGS, "--steps", "4", "--output", str(tmp_path), "--seeds", "1-2", "--split_seed", "seed"])
    captured = capsys.readouterr()
    begin, at_first, by_step, files = captured.out.split("\n\n")
    assert captured.err == ""
    what = "one batch before training, then 4 steps of baseline and of proposed"
    assert begin == f"test_mechanism:small_network on digits, learning rate 0.05, mean of 2 seeds: {what}"
    title = begin.removesuffix(f": {what}")
    assert (tmp_path / "mechanism.md").read_text() == f"{title}\n\n{at_first}\n\n{by_step}\n"
    assert [line.split()[1] for line in at_first.splitlines()[2:]] == ["0.01", "0.03", "0.1", "0.3", "1"]
    image_sets = {seed: load_image_set("digits", split_seed=seed) for seed in (1, 2)}
    for line in at_first.splitlines()[2:]:
        _, bn_weight, _, deviation, _, loss, *_ = line.split()
        found = []
        for seed in (1, 2):
            make_deterministic(seed)
            network = construct_network("test_mechanism:small_network", 10, "digits", float(bn_weight))
            images, labels = next(iter(Batches(image_sets[seed], "train", 64, False)))
            logits = network(images).detach()
            found.append((np.std(logits.numpy()), F.cross_entropy(logits, labels)))
        assert (deviation, loss) == (f"{np.mean(found, axis=0)[0]:.3g}", f"{np.mean(found, axis=0)[1]:.3f}")
    rows = [line.split() for line in by_step.splitlines()[2:]]
    assert [row[1] for row in rows] == ["baseline"] * 4 + ["proposed"] * 4
    assert [row[3] for row in rows] == ["0", "1", "2", "4"] * 2
    names = [f"mechanism-{name}" for name in ("initialization", "running-statistics", "rotation")]
    expected = [tmp_path / f"{name}.{kind}" for name in names for kind in ("png", "pdf")]
    assert files.split() == list(map(str, expected))
    assert sorted(tmp_path.iterdir()) == sorted([*expected, tmp_path / "mechanism.md"])
    with Image.open(expected[0]) as image:
        assert image.convert("L").getextrema() == (0, 255)


def test_network_without_convolutions(few_digits, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        mechanism.main([*FLAGS, "--network", "test_mechanism:perceptron", "--output", str(tmp_path)])
    error = "mechanism.py: error: the network has no convolution that is trained, and nothing to look at\n"
    assert (stop.value.code, capsys.readouterr().err) == (1, error)


@pytest.mark.parametrize("flags", [[], ["--output", "x", "--steps", "0"], ["--output", "x", "--dataset", "nothing"]])
def test_wrong_flags(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        mechanism.main(flags)
    assert (stop.value.code, capsys.readouterr().err.count("\n")) == (2, 1)
