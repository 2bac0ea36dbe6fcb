import copy

import numpy as np
import pytest
import torch
from torch import nn

import observations
import trained_networks
from batch_norm import ScaleBatchNorm2d
from image_sets.loading import load_image_set
from networks import construct_network
from observations import (
    NormalizedValues,
    Observations,
    load_observations,
    measure_normalized_values,
    observe_runs,
    save_observations,
)
from saved_runs.results import Results, read_results
from test_trained_networks import random_states, write_run


def test_nothing_is_downloaded_for_figures(small_cifar10, forbidden_network, tmp_path):
    weights = trained_networks.construct_network("resnet18", 10, "cifar10").state_dict()
    run = read_results(write_run(tmp_path, weights, dataset="cifar10"))
    networks, archive = tmp_path / "networks", tmp_path / "x.npz"
    found = observe_runs({"proposed": run}, networks, archive)
    assert found.normalized_values and not found.missing  # from the images beside it
    kept = archive.read_bytes()
    (small_cifar10 / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"damaged")
    found = observe_runs({"proposed": run}, networks, archive)
    [line] = found.missing
    assert line.startswith(f"no normalized values: CIFAR-10 is not in {small_cifar10}")
    assert found.weights and not found.normalized_values and archive.read_bytes() == kept


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
    begins_with_one = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))  # none in front of it
    assert [depth for depth, *_ in observations.batch_norms(begins_with_one.state_dict())] == [1, 2]
    halves = {name: value.bfloat16() for name, value in whole.state_dict().items()}
    assert [scale.dtype for _, scale, _ in observations.batch_norms(halves)] == [np.float32] * 3
    names = {f"{layer}.{kind}" for layer in ("0", "1.1", "1.2") for kind in ("weight", "bias", "running_mean")}
    arrays = observations.batch_norm_arrays(whole.state_dict())
    assert set(arrays) == names | {name.replace("mean", "var") for name in names if name.endswith("mean")}


def test_archive(tmp_path):
    file = tmp_path / "x.npz"
    runs = {name: Results({"name": f"run {name}"}, {}) for name in ("baseline", "proposed", "init")}
    weights = {"baseline": {"1.weight": np.array([1.0, 2.0])}, "proposed": {"0.bias": np.array([3.0], np.float32)}}
    measured = {"baseline": [NormalizedValues("2", 0.1, 9.0), NormalizedValues("1.bn1", 0.02, 4.0)]}
    two = {name: runs[name] for name in weights}
    save_observations(file, two, Observations(weights, measured, []))
    whole = file.read_bytes()
    loaded = load_observations(file, runs)  # there may be others
    assert loaded.normalized_values == measured and not loaded.missing
    assert {method: list(arrays) for method, arrays in loaded.weights.items()} == {
        "baseline": ["1.weight"],
        "proposed": ["0.bias"],
    }
    np.testing.assert_array_equal(loaded.weights["proposed"]["0.bias"], [3.0])
    with pytest.raises(ValueError, match=r"x\.npz is of other runs: run baseline, run proposed"):
        load_observations(file, {"baseline": runs["baseline"]})
    for content in (b"", b"a", whole[:-30], whole[:60] + bytes([whole[60] ^ 1]) + whole[61:]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.npz is damaged"):
            load_observations(file, runs)


# --- normalized values ----------------------------------------------------------------------------------------------


def test_measure_normalized_values():
    torch.manual_seed(0)
    network = nn.Sequential(ScaleBatchNorm2d(3, bn_weight=5), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    for _ in range(5):
        network(torch.randn(16, 3, 8, 8) ** 3)
    images = 3 * torch.randn(8, 3, 8, 8) ** 3
    measured = measure_normalized_values(network, images)
    assert all(module.training for module in network.modules())
    network[2].eval()
    measure_normalized_values(network, images)
    assert not network[2].training and network.training and network[0].training  # each keeps its own mode
    in_double = measure_normalized_values(copy.deepcopy(network).double(), images.double())
    assert [of.maximum for of in in_double] == pytest.approx([of.maximum for of in measured], rel=1e-5)
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


def test_measured_network_is_left_as_it_was():
    """With one whose own `train` does more than to set its mode."""

    class Merging(nn.Linear):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), Merging(12, 2))
    measure_normalized_values(network, torch.rand(4, 3, 2, 2))
    assert network[2].training and not network[2].merged


def test_measure_run_prepares_images_as_in_training(small_network, tmp_path):
    image_set = load_image_set("digits")
    network = trained_networks.construct_network("", 10, "digits").eval()
    images = image_set.images[image_set.splits["test"][:128]] / 255
    mean, std = image_set.mean[0], image_set.std[0]
    before = random_states()
    for input_norm, prepared in (("bn", images), ("dataset", (images - mean) / std)):
        first, *_ = observations.measure_run(Results({"input_norm": input_norm}, {}), network, image_set)
        assert first.maximum == pytest.approx(prepared.abs().max().item(), rel=1e-4)
    assert random_states() == before


def test_observe_runs(small_network, tmp_path):
    """What cannot be observed is said in one line, and does not keep the rest from being observed."""
    weights = trained_networks.construct_network("", 10, "digits").state_dict()
    weights["0.running_var"].fill_(0.04)  # so that some pixels, divided by 0.2, are beyond 3
    runs = {"proposed": read_results(write_run(tmp_path, weights))}
    networks, archive = tmp_path / "networks", tmp_path / "x.npz"
    found = observe_runs(runs, networks, archive)
    assert list(found.weights) == list(found.normalized_values) == ["proposed"] and not found.missing
    kept = archive.read_bytes()

    with_splits = {f"{n}": Results({**runs["proposed"].header, "split_seed": n}, {}) for n in (3, "seed", 0)}
    for run in with_splits.values():
        run.header["seed"] = 3
    measured = observe_runs(with_splits, networks, tmp_path / "splits.npz").normalized_values
    network = trained_networks.construct_network("", 10, "digits").eval()
    network.load_state_dict(weights)
    split_3 = observations.measure_run(runs["proposed"], network, load_image_set("digits", split_seed=3))
    assert measured["3"] == measured["seed"] == split_3 != measured["0"] == found.normalized_values["proposed"]

    (networks / "a run-best.pt").unlink()
    again = observe_runs(runs, networks, archive)
    np.testing.assert_array_equal(again.weights["proposed"]["0.weight"], weights["0.weight"])
    assert again.normalized_values == found.normalized_values and not again.missing and archive.read_bytes() == kept
    archive.write_bytes(b"damaged")
    missing = f"no figures of trained networks: there is no {networks / 'a run-best.pt'}"
    assert observe_runs(runs, networks, archive) == ({}, {}, [missing])
    assert observe_runs({}, networks, archive) == ({}, {}, [])


def test_code_that_nobody_asked_for_is_not_run(small_network, tmp_path):
    """That of the module which a result file names; what was kept of its network is shown as ever."""
    weights = trained_networks.construct_network("", 10, "digits").state_dict()
    write_run(tmp_path, weights)
    run = read_results(write_run(tmp_path, weights, network="module_of_somebody:net"))
    networks, archive, runs = tmp_path / "networks", tmp_path / "x.npz", {"proposed": run}
    for given in (None, "another:net"):
        assert observe_runs(runs, networks, archive, given).missing == [
            "no figures of trained networks: module_of_somebody:net is imported only where it is given as --network"
        ]
    found = observe_runs(runs, networks, archive, "module_of_somebody:net")  # for the fixture builds it in any case
    assert found.weights and not found.missing
    assert observe_runs(runs, networks, archive).normalized_values == found.normalized_values


# --- figures --------------------------------------------------------------------------------------------------------

SETTINGS = {"baseline": (1.0, "dataset"), "proposed": (0.1, "bn"), "init": (0.1, "bn")}  # bn_weight and input_norm


def test_learned_scales_and_shifts():
    weights = {name: construct_network(bn_weight=w, input_norm=n).state_dict() for name, (w, n) in SETTINGS.items()}
    weights["proposed"]["1.bn1.weight"][:16] *= 1.2  # a quarter of the channels of the first batch norm of the network
    weights["proposed"]["1.layer4.1.bn2.bias"] += 0.05
    figure = observations.learned_scales_and_shifts(weights, {name: w for name, (w, _) in SETTINGS.items()})
    scales, shifts = figure.axes
    for panel, start in ((scales, 1), (shifts, 0)):
        medians = [line for line in panel.lines if line.get_marker() != "None"]
        assert [line.get_label() for line in medians] == list(SETTINGS)
        assert len({line.get_marker() for line in medians}) == 3  # what can be told apart in grey
        assert [np.round(line.get_xdata()).tolist() for line in medians] == [
            list(range(1, 21)),
            list(range(21)),
            list(range(21)),
        ]
        places = np.concatenate([line.get_xdata() for line in medians])
        assert len(np.unique(places.round(6))) == 62  # no two above each other
        np.testing.assert_allclose(medians[0].get_ydata(), start, rtol=1e-6)
        np.testing.assert_allclose(medians[2].get_ydata(), start, rtol=1e-6)
    whole, most = (np.array(bars.get_segments())[:, :, 1] for bars in scales.collections[2:4])
    np.testing.assert_allclose(whole[1], [1, 1.2], rtol=1e-6)
    np.testing.assert_allclose(most[1], [1, 1.2], rtol=1e-6)
    np.testing.assert_allclose(np.delete(whole, 1, axis=0), 1, rtol=1e-6)
    assert not scales.get_title(loc="left") and scales.get_ylim() == pytest.approx((0.99, 1.21))
    shift = next(line for line in shifts.lines if line.get_label() == "proposed").get_ydata()
    np.testing.assert_allclose(shift[[0, 19, 20]], [0, 0, 0.5], atol=1e-6)  # 0.05 / 0.1

    weights["init"]["0.weight"][0] *= 20  # what is in front of the network does not flatten the rest
    scales, _ = observations.learned_scales_and_shifts(weights, {name: w for name, (w, _) in SETTINGS.items()}).axes
    assert scales.get_ylim() == pytest.approx((0.99, 1.21))
    assert scales.get_title(loc="left") == "batch norm 0, off the scale: init 1.0 to 20.0"


def test_normalized_values():
    measured = {
        "baseline": [NormalizedValues("bn1", 0.02, 9.0), NormalizedValues("bn2", 0.01, 8.0)],
        "proposed": [NormalizedValues("0", 0.001, 2.0), NormalizedValues("1.bn1", 0.002, 4.0)],
    }
    share, largest = observations.normalized_values(measured).axes
    np.testing.assert_allclose(share.lines[0].get_xydata(), [[1, 2], [2, 1]])
    np.testing.assert_allclose(share.lines[1].get_xydata(), [[0, 0.1], [1, 0.2]])
    np.testing.assert_allclose(largest.lines[1].get_xydata(), [[0, 2], [1, 4]])
