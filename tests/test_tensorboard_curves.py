import shutil
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer

import train
from saved_runs import checkpoint
from saved_runs.results import COLUMNS, read_results
from small import stop_in_epoch
from training import run as saved_run

NAME = "run"
FLAGS = ["--dataset", "digits", "--batch_size", "16", "--learning_rate", "0.05", "--device", "cpu", "--name", NAME]


@pytest.fixture
def make_run(small_network, tmp_path, monkeypatch):
    """Make a run of five epochs, or what is left of it, up to an epoch in which it is stopped.

    Files of one second are read in the order of a number in their names, as text: 10 before 9. As in a process of a
    run's own, it begins at 0.
    """
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))

    def make(*flags: str, tensorboard: bool = True, stop: int | None = None) -> None:
        with monkeypatch.context() as patch, suppress(SystemExit) if stop else nullcontext():
            if stop:
                stop_in_epoch(stop, patch)
            train.main([*FLAGS, "--num_epochs", "5", "--path", str(tmp_path), *["--tensorboard"] * tensorboard, *flags])

    return make


def shown(tmp_path: Path) -> EventAccumulator:
    """What TensorBoard reads of the run, all points of all curves."""
    return EventAccumulator(
        str(tmp_path / "tensorboard" / NAME), size_guidance={"scalars": 0, "histograms": 0}
    ).Reload()


def check_curves(tmp_path: Path) -> None:
    """Each column as a curve with one point for each epoch."""
    curves, columns = shown(tmp_path), read_results(tmp_path / "results" / f"{NAME}.csv").columns
    for name in COLUMNS[1:]:
        points = curves.Scalars(name)
        assert [point.step for point in points] == columns["epoch"].tolist()
        np.testing.assert_allclose([point.value for point in points], columns[name], rtol=1e-6)


def test_a_run_is_shown(make_run, tmp_path):
    make_run("--scheduler", "none", tensorboard=False)
    file = tmp_path / "results" / f"{NAME}.csv"
    without = read_results(file).columns
    make_run("--scheduler", "none", "--restart")  # which keeps its last weights
    for name, values in read_results(file).columns.items():
        np.testing.assert_array_equal(values, without[name])
    check_curves(tmp_path)
    curves = shown(tmp_path)
    weights = torch.load(tmp_path / "networks" / f"{NAME}-last.pt")["network"]
    for letter, kind in {"γ": "weight", "β": "bias"}.items():
        for layer, name in {"0": "input", "2": "2"}.items():  # the batch norms of the small network
            points = curves.Histograms(f"{letter}/{name}")
            assert [point.step for point in points] == [1, 2, 3, 4, 5]
            values, found = weights[f"{layer}.{kind}"].double(), points[-1].histogram_value
            assert (found.num, found.min, found.max) == (len(values), values.min(), values.max())
            assert found.sum == pytest.approx(values.sum().item())
    content = curves.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    shown_settings = HParamsPluginData.FromString(content).session_start_info.hparams
    numbers = {"bn_weight": 0.1, "c": 100, "learning_rate": 0.05, "batch_size": 16, "num_epochs": 5, "seed": 1}
    assert {name: shown_settings[name].number_value for name in numbers} == numbers
    assert (shown_settings["dataset"].string_value, shown_settings["scheduler"].string_value) == ("digits", "none")


def test_a_run_that_goes_on(make_run, tmp_path):
    """Once from its last epoch, once, as after a kill, from a checkpoint that is older than the curves."""
    make_run(stop=2)
    files = tmp_path / "networks"
    shutil.copytree(files, tmp_path / "after one epoch")
    make_run(stop=4)
    assert [point.step for point in shown(tmp_path).Scalars("train_loss")] == [1, 2, 3]
    shutil.rmtree(files)
    shutil.move(tmp_path / "after one epoch", files)
    make_run()
    check_curves(tmp_path)
    assert [point.step for point in shown(tmp_path).Histograms("γ/2")] == [1, 2, 3, 4, 5]
    make_run()  # there is nothing left to do
    check_curves(tmp_path)


def test_flag_given_later(make_run, tmp_path):
    make_run(tensorboard=False, stop=4)
    make_run()
    check_curves(tmp_path)
    assert [point.step for point in shown(tmp_path).Histograms("γ/2")] == [4, 5]


def test_restart_begins_new_curves(make_run, tmp_path):
    make_run()
    make_run("--restart", "--bn_weight", "0.2", "--scheduler", "none")
    check_curves(tmp_path)
    assert len(list((tmp_path / "tensorboard" / NAME).iterdir())) == 1  # nothing of the run before
    make_run("--num_epochs", "7", "--bn_weight", "0.2", "--scheduler", "none")  # a constant rate: it goes on
    check_curves(tmp_path)


def test_what_is_saved_is_shown(make_run, tmp_path, monkeypatch):
    original, saved = checkpoint.write_results, []

    def write_results(file, results):
        assert [point.step for point in shown(tmp_path).Scalars("test_accuracy")] == results.columns["epoch"].tolist()
        saved.append(results)
        original(file, results)

    for module in (checkpoint, saved_run):
        monkeypatch.setattr(module, "write_results", write_results)
    make_run()
    assert len(saved) == 5


def test_without_tensorboard(make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.preparation.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        make_run()
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    assert "pip install tensorboard" in captured.err
    make_run(tensorboard=False)
    assert not (tmp_path / "tensorboard").exists()
