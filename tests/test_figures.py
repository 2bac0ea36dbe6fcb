import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image
from torch import nn

import figures
import train
from batch_norm import ScaleBatchNorm2d
from networks import construct_network
from results import Results, write_results

CURVES = {  # test accuracies of three epochs, by setting and seed
    "baseline": {1: [50, 80, 90], 2: [55, 85, 92], 3: [60, 75, 91]},
    "proposed": {1: [40, 85, 93], 2: [45, 90, 91], 3: [50, 80, 94]},
    "bn_weight 0.5": {1: [50, 85, 95], 2: [50, 85, 97], 3: [50, 85, 96.5]},
}
VALUES = {"baseline": (1.0, 1.0, "dataset"), "proposed": (0.1, 100.0, "bn"), "bn_weight 0.5": (0.5, 100.0, "bn")}


def make_run(setting: str, seed: int) -> Results:
    """A run whose last epoch is the best one."""
    test = np.array(CURVES[setting][seed], dtype=float)
    columns = {"epoch": np.array([1, 2, 3]), "train_loss": 3 - test / 40, "val_loss": 3 - test / 50}
    columns |= {"val_accuracy": np.array([1.0, 2, 3]), "test_accuracy": test}
    settings = dict(zip(("bn_weight", "c", "input_norm"), VALUES[setting], strict=True))
    return Results({"name": f"{setting} {seed}", "seed": seed, "num_epochs": 3, **settings}, columns)


RUNS = {setting: {seed: make_run(setting, seed) for seed in seeds} for setting, seeds in CURVES.items()}


@pytest.fixture(autouse=True)
def no_window():
    yield
    assert pyplot.get_fignums() == []


def test_learning_curves():
    accuracy, loss = figures.learning_curves(RUNS).axes
    for setting, line, band in zip(CURVES, accuracy.lines, accuracy.collections, strict=True):
        values = np.array(list(CURVES[setting].values()))
        np.testing.assert_allclose(line.get_xdata(), [1, 2, 3])
        np.testing.assert_allclose(line.get_ydata(), values.mean(axis=0))
        assert line.get_label() == f"{setting} (3 seeds)"
        low, high = values.mean(axis=0) - values.std(axis=0, ddof=1), values.mean(axis=0) + values.std(axis=0, ddof=1)
        heights = band.get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == pytest.approx((low.min(), high.max()))
    np.testing.assert_allclose(
        loss.lines[0].get_ydata(), 3 - np.array([[50, 80, 90], [55, 85, 92], [60, 75, 91]]).mean(0) / 40
    )
    assert (accuracy.get_xlabel(), accuracy.get_ylabel()) == ("epoch", "test accuracy (%)")
    styles = {(str(line.get_linestyle()), line.get_marker()) for line in accuracy.lines}
    assert len(styles) == 3  # what can be told apart in grey


def test_paired_differences():
    proposed, half = figures.paired_differences(RUNS).axes
    assert [bar.get_height() for bar in proposed.patches[:3]] == [3, -1, 3]
    assert [label.get_text() for label in proposed.get_xticklabels()] == ["1", "2", "3"]
    assert [bar.get_height() for bar in half.patches[:3]] == [5, 5, 5.5]
    assert proposed.lines[1].get_ydata()[0] == pytest.approx(5 / 3)
    assert proposed.get_title().startswith("proposed: +1.67\n")
    with pytest.raises(ValueError, match="no seed with a run of baseline and of another setting"):
        figures.paired_differences({"baseline": RUNS["baseline"], "proposed": {}})


def test_accuracy_by_bn_weight():
    panel = figures.accuracy_by_bn_weight(RUNS).axes[0]
    line = panel.lines[0]
    points = np.asarray(line.get_xydata(), dtype=float)
    np.testing.assert_allclose(points, [[0.1, np.mean([93, 91, 94])], [0.5, np.mean([95, 97, 96.5])]])
    assert panel.get_xscale() == "log"
    [star] = [text for text in panel.texts if text.get_text() == "*"]
    assert star.xy[0] == 0.5  # for 0.1, p is 0.18
    with pytest.raises(ValueError, match="fewer than two bn_weights"):
        figures.accuracy_by_bn_weight({"baseline": RUNS["baseline"], "proposed": RUNS["proposed"]})


def test_learned_scales_and_shifts():
    weights = {name: construct_network(bn_weight=w, input_norm=n).state_dict() for name, (w, _, n) in VALUES.items()}
    weights["proposed"]["1.bn1.weight"][:16] *= 1.2
    weights["proposed"]["1.layer4.1.bn2.bias"] += 0.5
    figure = figures.learned_scales_and_shifts(weights, {name: values[0] for name, values in VALUES.items()})
    panels = [panel for panel in figure.axes if panel.get_label() != "<colorbar>"]
    meshes = [np.asarray(panel.collections[0].get_array()) for panel in panels]
    assert [mesh.shape for mesh in meshes] == [
        (121, 20),
        (121, 21),
        (121, 21),
    ] * 2  # 20 batch norms, and the input layer
    for mesh in meshes:
        np.testing.assert_allclose(mesh.sum(axis=0), 1)
        assert np.count_nonzero(mesh[60]) == mesh.shape[1] - (mesh is meshes[4])  # where they started
    np.testing.assert_allclose(meshes[1][60, :3], [1, 0.75, 1])
    assert meshes[1][120, 1] == 0.25 and meshes[4][120, 20] == 1
    assert panels[1].get_xlim()[0] == -0.5 and panels[0].get_xlim()[0] == 0.5


def test_measure_normalized_values():
    torch.manual_seed(0)
    network = nn.Sequential(ScaleBatchNorm2d(3, bn_weight=5), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    for _ in range(5):
        network(torch.randn(16, 3, 8, 8) ** 3)
    images = 3 * torch.randn(8, 3, 8, 8) ** 3
    measured = figures.measure_normalized_values(network, images)
    network.eval()
    with torch.no_grad():
        inputs = {"0": images, "2": network[1](network[0](images))}
    assert [layer.name for layer in measured] == ["0", "2"]
    for layer in measured:
        norm = network[int(layer.name)]
        large, largest, count = 0, 0.0, 0
        for channel in range(norm.num_features):
            for value in inputs[layer.name][:, channel].flatten().tolist():
                normalized = (value - norm.running_mean[channel].item()) / (
                    norm.running_var[channel].item() + 1e-5
                ) ** 0.5
                large, count = large + (abs(normalized) > 3), count + 1
                largest = max(largest, abs(normalized))
        assert layer.share_beyond_3 == pytest.approx(large / count) and large
        assert layer.maximum == pytest.approx(largest, rel=1e-5)
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_normalized_values():
    measured = {
        "baseline": [figures.NormalizedValues("bn1", 0.02, 9.0), figures.NormalizedValues("bn2", 0.01, 8.0)],
        "proposed": [figures.NormalizedValues("0", 0.001, 2.0), figures.NormalizedValues("1.bn1", 0.002, 4.0)],
    }
    share, largest = figures.normalized_values(measured).axes
    np.testing.assert_allclose(share.lines[0].get_xydata(), [[1, 2], [2, 1]])
    np.testing.assert_allclose(share.lines[1].get_xydata(), [[0, 0.1], [1, 0.2]])
    np.testing.assert_allclose(largest.lines[1].get_xydata(), [[0, 2], [1, 4]])


def test_files(small_network, tmp_path):
    flags = [
        "--dataset",
        "digits",
        "--batch_size",
        "48",
        "--num_epochs",
        "2",
        "--path",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    for seed in ("1", "2"):
        train.main([*flags, "--seed", seed])
        train.main([*flags, "--seed", seed, "--bn_weight", "1", "--c", "1", "--input_norm", "dataset"])
    files = list(map(str, (tmp_path / "results").glob("*.csv")))
    figures.main([*files, "--output", str(tmp_path / "figures")])
    made = {file.stem for file in (tmp_path / "figures").glob("*.png")}
    names = {"learning-curves", "paired-differences", "scales-and-shifts", "normalized-values"}
    assert made == {f"figure-{name}" for name in names}
    for name in made:
        assert (tmp_path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        with Image.open(tmp_path / "figures" / f"{name}.png") as image:
            assert image.convert("L").getextrema() == (0, 255)

    # without the weights, from the small file that was made of them
    before = (tmp_path / "figures" / "figure-scales-and-shifts.png").read_bytes()
    for file in (tmp_path / "figures").glob("*.p*"):
        file.unlink()
    figures.main([*files, "--output", str(tmp_path / "figures"), "--networks", str(tmp_path / "none")])
    made = {file.stem for file in (tmp_path / "figures").glob("*.png")}
    assert made == {f"figure-{name}" for name in names - {"normalized-values"}}
    assert (tmp_path / "figures" / "figure-scales-and-shifts.png").read_bytes() == before


def test_files_that_are_not_results(tmp_path, capsys):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit) as stop:
        figures.main([str(tmp_path / "x.csv"), "--output", str(tmp_path)])
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith(f"figures.py: error: {tmp_path / 'x.csv'} is not a result file")


def test_needs_no_display(tmp_path):
    for run in RUNS["baseline"].values():
        write_results(tmp_path / f"{run.settings['seed']}.csv", run)
    command = [sys.executable, Path(figures.__file__), *tmp_path.glob("*.csv"), "--output", tmp_path / "out"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={"MPLBACKEND": "TkAgg"})
    assert done.stdout.splitlines() == [
        str(tmp_path / "out" / f"figure-learning-curves.{kind}") for kind in ("png", "pdf")
    ]
