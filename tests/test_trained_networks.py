import random

import numpy as np
import pytest
import torch
from torch import nn

import train
import trained_networks
from image_sets.loading import load_image_set
from networks import construct_network
from saved_runs.results import Results, write_results
from trained_networks import load_network

COLUMNS = {name: np.array([1.0, 2.0]) for name in ("train_loss", "val_loss", "val_accuracy", "test_accuracy")}


def write_run(folder, weights=None, **settings):
    """The result file of a finished run in `folder`/results, and beside it its weights; returns the result file."""
    settings = {"name": "a run", "dataset": "digits", "num_epochs": 2} | settings
    settings = {name: value for name, value in settings.items() if value is not None}
    file = folder / "results" / f"{settings['name']}.csv"
    write_results(file, Results(settings, {"epoch": np.array([1, 2]), **COLUMNS}))
    (folder / "networks").mkdir(exist_ok=True)
    if weights is not None:
        torch.save(weights, folder / "networks" / f"{settings['name']}-best.pt")
    return file


def random_states() -> list:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


def test_weights_are_those_that_were_evaluated(small_network, tmp_path):
    """With --debias; the checkpoint has the running statistics as the training left them."""
    flags = ["--dataset", "digits", "--batch_size", "48", "--num_epochs", "1", "--scheduler", "none", "--name", "x"]
    run = train.main([*flags, "--debias", "--path", str(tmp_path), "--device", "cpu"])
    plain = train.main([*flags, "--path", str(tmp_path / "plain"), "--device", "cpu"])
    assert run.columns["train_loss"] == plain.columns["train_loss"]
    assert run.columns["val_loss"] != plain.columns["val_loss"]
    network, image_set = load_network(tmp_path / "results" / "x.csv"), load_image_set("digits")
    test = image_set.splits["test"]
    with torch.no_grad():
        right = (network(image_set.images[test] / 255).argmax(1) == image_set.labels[test]).sum().item()
    assert right / len(test) * 100 == run.test_accuracy
    best = torch.load(tmp_path / "networks" / "x-best.pt")
    raw, as_ever = (torch.load(tmp_path / folder / "networks" / "x-last.pt")["network"] for folder in (".", "plain"))
    left = 0.9 ** raw["0.num_batches_tracked"].item()  # of the start, 0 and 1
    assert left == 0.9**3 and all(torch.equal(value, as_ever[name]) for name, value in raw.items())
    torch.testing.assert_close(best["0.running_mean"], raw["0.running_mean"] / (1 - left))
    torch.testing.assert_close(best["0.running_var"], (raw["0.running_var"] - left) / (1 - left))


@pytest.mark.parametrize(("input_norm", "split_seed"), [("bn", "0"), ("dataset", "seed")])
def test_predictions_give_the_test_accuracy(input_norm, split_seed, small_network, tmp_path):
    flags = ["--dataset", "digits", "--batch_size", "48", "--num_epochs", "16", "--split_seed", split_seed]
    run = train.main([*flags, "--input_norm", input_norm, "--path", str(tmp_path), "--device", "cpu"])
    assert run.best_epoch < 16  # so that the last weights are not the best
    network = load_network(tmp_path / "results" / f"{run.header['name']}.csv")
    image_set = load_image_set("digits", split_seed=0 if split_seed == "0" else 1)
    if input_norm == "dataset":
        assert tuple(network[0].mean) == image_set.mean != load_image_set("digits").mean
    test = image_set.splits["test"]
    with torch.no_grad():
        predicted = network(image_set.images[test] / 255).argmax(1)
    right = sum(int(a == b) for a, b in zip(predicted, image_set.labels[test], strict=True))
    assert right / len(test) * 100 == run.test_accuracy


@pytest.mark.parametrize(("input_norm", "stem"), [("bn", "own"), ("dataset", "auto")])
def test_networks_of_the_paper(input_norm, stem, tmp_path):
    trained = construct_network("resnet18", 10, "digits", 0.1, input_norm, stem)
    trained(torch.rand(4, 3, 8, 8))  # running statistics of its own
    file = write_run(tmp_path, trained.state_dict(), input_norm=input_norm, stem=stem, bn_weight=0.1)
    before = random_states()
    loaded = load_network(file)
    assert random_states() == before
    assert not any(module.training for module in loaded.modules())
    images, image_set = torch.rand(5, 3, 8, 8), load_image_set("digits")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (image_set.mean, image_set.std))
    with torch.no_grad():
        expected = trained.eval()((images - mean) / std if input_norm == "dataset" else images)
        given = images.clone()
        assert torch.equal(loaded(images), expected) and expected.shape == (5, 10)
    assert torch.equal(images, given)
    write_run(tmp_path, input_norm="dataset" if input_norm == "bn" else "bn")
    with pytest.raises(
        ValueError, match=r"a run-best\.pt does not hold the weights of a resnet18 for digits with input"
    ):
        load_network(file)


class Bottleneck(nn.Sequential):
    """The number of classes stands in more than one layer, and is the first dimension of neither."""

    def __init__(self, num_classes: int) -> None:
        narrow, wide = nn.Linear(3, 2 * num_classes), nn.Linear(2 * num_classes, num_classes)
        super().__init__(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), narrow, wide)


FLOWERS = {"dataset": "flowers", "images": "9,000 training, 3,000 validation and 99 test images of 1,002 classes"}


@pytest.mark.parametrize(("settings", "num_classes"), [(FLOWERS, 1002), ({"dataset": "cifar100"}, 100)])
def test_number_of_classes_is_that_of_the_images(settings, num_classes, tmp_path):
    network = "test_trained_networks:Bottleneck"
    trained = construct_network(network, num_classes)
    loaded = load_network(write_run(tmp_path, trained.state_dict(), network=network, **settings))
    assert loaded(torch.rand(2, 3, 8, 8)).shape == (2, num_classes)


def test_built_in_images_made_large(tmp_path):
    """A ResNet has its own first layers then, whatever the size of the images was."""
    trained = construct_network("resnet18", 10, "digits", image_size=(70, 70))
    assert (
        load_network(write_run(tmp_path, trained.state_dict(), image_size=70))(torch.rand(1, 3, 70, 70)).shape[1] == 10
    )


def test_weights_in_another_place(small_network, tmp_path):
    weights = trained_networks.construct_network("", 10, "digits").state_dict()
    file = write_run(tmp_path)
    torch.save(weights, tmp_path / "elsewhere.pt")
    assert torch.equal(load_network(file, tmp_path / "elsewhere.pt")[0].weight, weights["0.weight"])
    with pytest.raises(FileNotFoundError, match=r"a run-best\.pt"):
        load_network(file)
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        load_network(tmp_path / "none.csv")


def test_renamed_files(small_network, tmp_path, monkeypatch):
    """It is the name of the file that counts, as of a copy that is kept while the run is made anew."""
    network = trained_networks.construct_network("", 10, "digits")
    earlier, later = ({name: value + n for name, value in network.state_dict().items()} for n in (0, 1))
    write_run(tmp_path, earlier).rename(tmp_path / "results" / "kept.csv")
    (tmp_path / "networks" / "a run-best.pt").rename(tmp_path / "networks" / "kept-best.pt")
    assert torch.equal(load_network(write_run(tmp_path, later)).state_dict()["0.weight"], later["0.weight"])
    monkeypatch.chdir(tmp_path / "results")
    assert torch.equal(load_network("kept.csv").state_dict()["0.weight"], earlier["0.weight"])


@pytest.mark.parametrize("settings", [{"num_epochs": 3}, {"num_epochs": None}])
def test_unfinished_run(settings, tmp_path):
    with pytest.raises(ValueError, match=r"a run\.csv is not of a finished run"):
        load_network(write_run(tmp_path, **settings))


def test_damaged_weights(small_network, tmp_path):
    run = ["--dataset", "digits", "--batch_size", "48", "--num_epochs", "1", "--device", "cpu"]
    train.main([*run, "--path", str(tmp_path), "--name", "x"])
    file, weights = tmp_path / "results" / "x.csv", tmp_path / "networks" / "x-best.pt"
    whole = weights.read_bytes()
    assert torch.load(weights, weights_only=True).keys() == load_network(file).state_dict().keys()
    middle = len(whole) // 2  # within a weight, where torch itself notices nothing
    damaged = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (b"", b"a\n", whole[:-1], whole[:middle], damaged):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=r"x-best\.pt is damaged, or does not hold the weights of a network$"):
            load_network(file)
    for content, message in [
        ({"format": 1}, "is damaged, or does not hold the weights of a network$"),
        ([1], "is damaged, or does not hold the weights of a network$"),
        (nn.Linear(3, 4).state_dict(), "does not hold the weights of a resnet18 for digits with input_norm bn$"),
    ]:
        torch.save(content, weights)
        with pytest.raises(ValueError, match=f"x-best.pt {message}"):
            load_network(file)
