import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mechanism
from image_sets.batches import Batches
from image_sets.loading import load_image_set
from mechanism import AtInitialization, FirstSteps, measure_first_steps, measure_initialization
from networks import construct_network
from seeds import make_deterministic
from small import prepared
from weight_decay_and_learning_rate import adjust_weight_decay_and_learning_rate

FLAGS = ["--dataset", "digits", "--network", "test_mechanism:small_network", "--device", "cpu", "--batch_size", "64"]


def small_network(num_classes: int) -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes))


def perceptron(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Linear(8, num_classes))


# --- before the first step ------------------------------------------------------------------------------------------


def test_gradients_are_those_of_finite_differences():
    make_deterministic(1)
    network = construct_network("test_mechanism:small_network", 10, "digits", 0.5).double()
    images, labels = torch.rand(12, 3, 8, 8).double(), torch.arange(12) % 10
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


# --- in the first steps ---------------------------------------------------------------------------------------------


def test_first_steps(few_digits):
    """Beside a plain loop, over more than an epoch: 144 images are three batches."""
    settings = prepared([*FLAGS, "--seed", "3", "--learning_rate", "0.2", "--bn_weight", "0.5"])
    image_set = load_image_set("digits")
    found = measure_first_steps(settings, image_set, [0, 1, 5])
    assert found.steps.tolist() == [0, 1, 5]

    make_deterministic(3)
    network = construct_network("test_mechanism:small_network", 10, "digits", 0.5)
    groups = adjust_weight_decay_and_learning_rate(network, 1e-4, 0.2, 100)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    first = network[1][3].weight.detach().clone().double().flatten()
    indices = image_set.splits["test"]
    running, angles = [], []
    batches = [batch for _ in range(2) for batch in Batches(image_set, "train", 64, False)]
    for step in range(6):
        if step in (0, 1, 5):
            with torch.no_grad():
                correct = network.eval()(image_set.images[indices] / 255).argmax(1) == image_set.labels[indices]
            running.append(correct.float().mean().item() * 100)
            now = network[1][3].weight.detach().double().flatten()
            angles.append(math.degrees(math.acos((first @ now / first.norm() / now.norm()).clamp(max=1).item())))
        network.train().zero_grad()
        images, labels = batches[step]
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    np.testing.assert_allclose(found.running, running, rtol=1e-5)
    np.testing.assert_allclose(found.angles["1.3"], angles, rtol=1e-3, atol=1e-4)
    assert found.angles["1.0"][0] == 0 and found.angles["1.0"][2] > 0.5
    assert not np.allclose(found.estimated_anew, found.running)
    alone = measure_first_steps(settings, image_set, [5], num_images=20)  # what is measured changes no training
    assert [alone.angles[name][0] for name in found.angles] == [angles[-1] for angles in found.angles.values()]


def test_mean_over_seeds():
    steps = np.array([0, 5])
    one, other = (FirstSteps(steps, np.array([a, 9.0]), np.zeros(2), {"x": np.array([0, a])}) for a in (3.0, 4.0))
    mean = mechanism.mean_over_seeds([one, other])
    assert f"{mean.steps[1]}" == "5" and mean.running.tolist() == [3.5, 9] and mean.angles["x"].tolist() == [0, 3.5]


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
    assert by_depth.get_yscale() == by_scale.get_yscale() == by_scale.get_xscale() == "log"
    labels = by_depth.get_ylabel(), by_scale.get_ylabel(), by_scale.get_xlabel()
    assert all(label.endswith(", log scale") for label in labels)

    steps, angles = np.array([0, 1, 5]), {"a": np.array([0, 1, 2]), "b": np.array([0, 3, 4])}
    run = FirstSteps(steps, np.array([10, 11, 20]), np.array([10, 50, 60]), angles)
    [panel] = mechanism.draw_statistics({"baseline": run}).axes
    assert panel.get_title() == "baseline"
    np.testing.assert_allclose([line.get_xdata() for line in panel.lines], [steps, steps])
    np.testing.assert_allclose([line.get_ydata() for line in panel.lines], [[10, 11, 20], [10, 50, 60]])
    panels = mechanism.draw_rotation({"baseline": run, "proposed": run}).axes
    assert [panel.get_title() for panel in panels] == ["after 1 step", "after 5 steps"]
    for panel, expected in zip(panels, ([1, 3], [2, 4]), strict=True):
        np.testing.assert_allclose([line.get_ydata() for line in panel.lines], [expected, expected])


def test_command(few_digits, tmp_path, capsys):
    mechanism.main([*FLAGS, "--steps", "2", "--output", str(tmp_path), "--seeds", "1-2", "--split_seed", "seed"])
    begin, at_first, by_step, files = capsys.readouterr().out.split("\n\n")
    title, _, what = begin.rpartition(": ")
    assert title == "test_mechanism:small_network on digits, learning rate 0.05, mean of 2 seeds"
    assert what == "one batch before training, then 2 steps of baseline and of proposed"
    assert (tmp_path / "mechanism.md").read_text() == f"{title}\n\n{at_first}\n\n{by_step}\n"
    assert [cells(line)[0] for line in at_first.splitlines()[2:]] == ["0.01", "0.03", "0.1", "0.3", "1"]
    rows = [cells(line)[:2] for line in by_step.splitlines()[2:]]
    assert rows == [[name, step] for name in ("baseline", "proposed") for step in ("0", "1", "2")]
    names = [f"mechanism-{name}" for name in ("initialization", "running-statistics", "rotation")]
    expected = [tmp_path / f"{name}.{kind}" for name in names for kind in ("png", "pdf")]
    assert files.split() == list(map(str, expected))
    assert sorted(tmp_path.iterdir()) == sorted([*expected, tmp_path / "mechanism.md"])


def test_folder_unless_one_is_given(few_digits, tmp_path, monkeypatch, capsys):
    """It is named as the files of such runs are."""
    monkeypatch.setattr(mechanism, "save", lambda figure, stem: [stem])
    mechanism.main([*FLAGS, "--steps", "1", "--path", str(tmp_path)])
    folder = tmp_path / "results" / "mechanism-digits-test_mechanism.small_network-batch_size=64-learning_rate=0.05"
    assert (folder / "mechanism.md").exists() and str(folder / "mechanism-rotation") in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bn_weight", "equivalent", "seed"])
def test_settings_in_which_its_trainings_differ(name, few_digits, capsys):
    with pytest.raises(SystemExit):
        mechanism.main([*FLAGS, f"--{name}", {"bn_weight": "0.3", "equivalent": "logits", "seed": "2"}[name]])
    assert f"argument --{name}: it is set here: leave it out" in capsys.readouterr().err


def test_network_without_convolutions(few_digits, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        mechanism.main([*FLAGS, "--network", "test_mechanism:perceptron", "--output", str(tmp_path)])
    error = "mechanism.py: error: the network has no convolution that is trained, and nothing to look at\n"
    assert (stop.value.code, capsys.readouterr().err) == (1, error)
