import random

import numpy as np
import pytest
import torch
import torchvision.datasets.utils
from torch import nn

import observations
import train
from batch_norm import ScaleBatchNorm2d
from data import load_image_set
from networks import construct_network
from observations import load_batch_norms, load_network, measure_normalized_values, observe_runs, save_batch_norms
from results import Results, read_results, write_results

COLUMNS = {name: np.array([1.0, 2.0]) for name in ("train_loss", "val_loss", "val_accuracy", "test_accuracy")}


def write_run(folder, weights=None, **settings):
    """The result file of a finished run in `folder`/results, and beside it its weights; returns the result file."""
    file = folder / "results" / "run.csv"
    settings = {"name": "a run", "dataset": "digits", "num_epochs": 2} | settings
    settings = {name: value for name, value in settings.items() if value is not None}
    write_results(file, Results(settings, {"epoch": np.array([1, 2]), **COLUMNS}))
    (folder / "networks").mkdir(exist_ok=True)
    if weights is not None:
        torch.save(weights, folder / "networks" / f"{settings['name']}-best.pt")
    return file


def random_states() -> list:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


# --- load_network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("input_norm", ["bn", "dataset"])
def test_predictions_give_the_test_accuracy(input_norm, small_network, tmp_path):
    flags = ["--dataset", "digits", "--batch_size", "48", "--num_epochs", "16"]
    run = train.main([*flags, "--input_norm", input_norm, "--path", str(tmp_path), "--device", "cpu"])
    assert run.best_epoch < 16  # so that the last weights are not the best
    network = load_network(tmp_path / "results" / f"{run.settings['name']}.csv")
    image_set = load_image_set("digits")
    test = image_set.splits["test"]
    with torch.no_grad():
        predicted = network(image_set.images[test] / 255).argmax(1)
    right = sum(int(a == b) for a, b in zip(predicted, image_set.labels[test], strict=True))
    assert right / len(test) * 100 == run.test_accuracy


@pytest.mark.parametrize(
    ("input_norm", "network", "stem"), [("bn", "resnet18", "own"), ("dataset", "resnet18", "auto")]
)
def test_networks_of_the_paper(input_norm, network, stem, tmp_path):
    trained = construct_network(network, 7, "digits", 0.1, input_norm, stem)
    trained(torch.rand(4, 3, 8, 8))  # running statistics of its own
    file = write_run(tmp_path, trained.state_dict(), network=network, input_norm=input_norm, stem=stem, bn_weight=0.1)
    before = random_states()
    loaded = load_network(file)
    assert random_states() == before
    assert not any(module.training for module in loaded.modules())
    images, image_set = torch.rand(5, 3, 8, 8), load_image_set("digits")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (image_set.mean, image_set.std))
    with torch.no_grad():
        expected = trained.eval()((images - mean) / std if input_norm == "dataset" else images)
        given = images.clone()
        assert torch.equal(loaded(images), expected) and expected.shape == (5, 7)
    assert torch.equal(images, given)
    write_run(tmp_path, input_norm="dataset" if input_norm == "bn" else "bn")
    with pytest.raises(
        ValueError, match=r"a run-best\.pt does not hold the weights of a resnet18 for digits with input"
    ):
        load_network(file)


def test_weights_in_another_place(small_network, tmp_path):
    weights = observations.construct_network("", 10, "digits").state_dict()
    file = write_run(tmp_path)
    torch.save(weights, tmp_path / "elsewhere.pt")
    assert torch.equal(load_network(file, tmp_path / "elsewhere.pt")[0].weight, weights["0.weight"])
    with pytest.raises(FileNotFoundError, match=r"a run-best\.pt"):
        load_network(file)
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        load_network(tmp_path / "none.csv")


def test_file_without_a_name(small_network, tmp_path):
    file = write_run(tmp_path, name="")
    torch.save(observations.construct_network("", 10, "digits").state_dict(), tmp_path / "networks" / "run-best.pt")
    assert load_network(file)


@pytest.mark.parametrize("settings", [{"num_epochs": 3}, {"num_epochs": None}])
def test_unfinished_run(settings, tmp_path):
    with pytest.raises(ValueError, match=r"run\.csv is not of a finished run"):
        load_network(write_run(tmp_path, **settings))


def test_damaged_weights(small_network, tmp_path):
    file = write_run(tmp_path, observations.construct_network("", 10, "digits").state_dict())
    weights = tmp_path / "networks" / "a run-best.pt"
    whole = weights.read_bytes()
    damaged = [b"", b"a\n", whole[:-1], whole[: len(whole) // 2], whole[:100] + b"xxxxxxxxxx" + whole[110:]]
    for content in damaged:
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=r"a run-best\.pt is damaged, or does not hold the weights of a network$"):
            load_network(file)
    for content, message in [
        ({"format": 1}, "does not hold the weights of a network$"),
        ([1], "does not hold the weights of a network$"),
        ({"x": torch.tensor(torch.nan)}, "is damaged: it holds a value that is not a finite number$"),
        ({}, "does not hold the weights of a resnet18 for digits with input_norm bn$"),
        (nn.Linear(3, 4).state_dict(), "does not hold the weights of a resnet18 for digits with input_norm bn$"),
    ]:
        torch.save(content, weights)
        with pytest.raises(ValueError, match=f"a run-best.pt {message}"):
            load_network(file)


def test_any_changed_byte_of_a_run_s_own_weights_is_noticed(small_network, tmp_path):
    train.main(
        ["--dataset", "digits", "--batch_size", "48", "--num_epochs", "1", "--path", str(tmp_path), "--name", "x"]
    )
    file, weights = tmp_path / "results" / "x.csv", tmp_path / "networks" / "x-best.pt"
    whole = weights.read_bytes()
    assert torch.load(weights, weights_only=True).keys() == load_network(file).state_dict().keys()
    for position in random.Random(0).sample(range(len(whole)), 40):
        weights.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(ValueError, match=r"x-best\.pt is damaged"):
            load_network(file)


def test_nothing_is_downloaded_for_figures(small_cifar10, tmp_path, monkeypatch):
    def download(*_, **__):
        raise AssertionError("it was to be downloaded")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", download)
    weights = observations.construct_network("resnet18", 10, "cifar10").state_dict()
    run = read_results(write_run(tmp_path, weights, dataset="cifar10"))
    networks, archive = tmp_path / "networks", tmp_path / "x.npz"
    assert observe_runs({"proposed": run}, "a run", networks, archive).normalized_values  # from the images beside it
    (small_cifar10 / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"damaged")
    [line] = observe_runs({"proposed": run}, "a run", networks, archive).missing
    assert line.startswith("no normalized values: ") and "data_batch_2 is damaged" in line


# --- γ and β --------------------------------------------------------------------------------------------------------


def test_batch_norms_by_depth():
    inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    whole = nn.Sequential(ScaleBatchNorm2d(3, bn_weight=0.5), inner)
    for network, depths in ((inner, [1, 2]), (whole, [0, 1, 2])):
        layers = [module for module in network.modules() if isinstance(module, ScaleBatchNorm2d | nn.BatchNorm2d)]
        found = list(observations.batch_norms(network.state_dict()))
        assert [depth for depth, _, _ in found] == depths
        for layer, (_, scale, shift) in zip(layers, found, strict=True):
            np.testing.assert_array_equal(scale, layer.weight.detach())
            np.testing.assert_array_equal(shift, layer.bias.detach())
    assert [observations.initial_scale(depth, 0.1) for depth in (0, 1, 2)] == pytest.approx([0.058, 0.1, 0.1])
    names = {f"{layer}.{kind}" for layer in ("0", "1.1", "1.2") for kind in ("weight", "bias", "running_mean")}
    arrays = observations.batch_norm_arrays(whole.state_dict())
    assert set(arrays) == names | {name.replace("mean", "var") for name in names if name.endswith("mean")}


def test_archive_of_batch_norms(tmp_path):
    file = tmp_path / "x.npz"
    weights = {"baseline": {"1.weight": np.array([1.0, 2.0])}, "proposed": {"0.bias": np.array([3.0], np.float32)}}
    save_batch_norms(file, "run 1, run 2", weights)
    loaded = load_batch_norms(file, "run 1, run 2")
    assert {setting: list(arrays) for setting, arrays in loaded.items()} == {
        setting: list(arrays) for setting, arrays in weights.items()
    }
    np.testing.assert_array_equal(loaded["proposed"]["0.bias"], [3.0])
    with pytest.raises(ValueError, match=r"x\.npz is of other runs: run 1, run 2"):
        load_batch_norms(file, "run 1, run 3")
    whole = file.read_bytes()
    file.write_bytes(whole[:-32])  # without its checksum, as an older one
    assert load_batch_norms(file, "run 1, run 2").keys() == weights.keys()
    changed = [whole[:n] + bytes([whole[n] ^ 1 << n % 8]) + whole[n + 1 :] for n in range(len(whole))]
    for content in (b"", b"a", whole[:-30], *changed):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.npz is damaged"):
            load_batch_norms(file, "run 1, run 2")
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        load_batch_norms(tmp_path / "none.npz", "run 1, run 2")


# --- normalized values ----------------------------------------------------------------------------------------------


def test_measure_normalized_values():
    torch.manual_seed(0)
    network = nn.Sequential(ScaleBatchNorm2d(3, bn_weight=5), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    for _ in range(5):
        network(torch.randn(16, 3, 8, 8) ** 3)
    images = 3 * torch.randn(8, 3, 8, 8) ** 3
    measured = measure_normalized_values(network, images)
    assert network.training
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


def test_measure_run_prepares_images_as_in_training(small_network, tmp_path):
    image_set = load_image_set("digits")
    network = observations.construct_network("", 10, "digits").eval()
    images = image_set.images[image_set.splits["test"][:20]] / 255
    mean, std = image_set.mean[0], image_set.std[0]
    before = random_states()
    for input_norm, prepared in (("bn", images), ("dataset", (images - mean) / std)):
        first, *_ = observations.measure_run(Results({"input_norm": input_norm}, {}), network, image_set, 20)
        assert first.maximum == pytest.approx(prepared.abs().max().item(), rel=1e-4)
    assert random_states() == before


def test_observe_runs(small_network, tmp_path):
    """What cannot be observed is said in one line, and does not keep the rest from being observed."""
    weights = observations.construct_network("", 10, "digits").state_dict()
    runs = {"proposed": read_results(write_run(tmp_path, weights))}
    networks, archive = tmp_path / "networks", tmp_path / "x.npz"
    found = observe_runs(runs, "a run", networks, archive)
    assert list(found.weights) == list(found.normalized_values) == ["proposed"] and not found.missing
    kept = archive.read_bytes()

    (networks / "a run-best.pt").write_bytes(b"damaged")
    found = observe_runs(runs, "a run", networks, archive)
    np.testing.assert_array_equal(found.weights["proposed"]["0.weight"], weights["0.weight"])
    assert not found.normalized_values and archive.read_bytes() == kept
    [line] = found.missing
    assert line.startswith("no normalized values: ") and "a run-best.pt is damaged" in line
    archive.write_bytes(b"damaged")
    found = observe_runs(runs, "a run", networks, archive)
    assert not found.weights and ["x.npz is damaged" in line for line in found.missing] == [False, True]
    (networks / "a run-best.pt").unlink()
    archive.unlink()
    found = observe_runs(runs, "a run", networks, archive)
    assert ["No such file" in line for line in found.missing] == [True, True] and not archive.exists()

    cifar10 = read_results(write_run(tmp_path, weights, dataset="cifar10"))
    found = observe_runs({"proposed": cifar10}, "a run", networks, archive)
    assert list(found.weights) == ["proposed"] and archive.exists()
    [line] = found.missing
    assert line.startswith(f"no normalized values: CIFAR-10 is not in {tmp_path / 'images'}")
