"""What only a GPU can show, skipped where there is none; at the end, what can be shown of it without one."""

import json
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch._dynamo.utils import counters

import processes
import train
from image_sets import loading
from image_sets.batches import Batch, Batches
from image_sets.loading import load_image_set
from saved_runs.checkpoint import load_checkpoint
from saved_runs.results import Results
from seeds import random_states, set_random_states
from small import prepared
from training import preparation
from training.devices import speed_up, use_precision
from weight_decay_and_learning_rate import adjust_weight_decay_and_learning_rate


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that CUDA reaches")
    return torch.device("cuda")


def run(folder: Path, device: torch.device, *flags: str, stop_after: str | None = None) -> Results:
    """Train on a few digits; a signal comes with the line that starts with `stop_after`."""
    small = ["--dataset", "digits", "--batch_size", "48", "--num_epochs", "3", "--name", "x"]
    settings = prepared([*small, "--path", str(folder), "--device", device.type, *flags])

    def report(line: str) -> None:
        if stop_after and line.startswith(stop_after):
            signal.raise_signal(signal.SIGTERM)

    return train.train(settings, report)


def numbers(results: Results) -> dict[str, list]:
    return {name: column.tolist() for name, column in results.columns.items()}


def test_same_numbers_twice(gpu, few_digits, tmp_path):
    """With a ResNet-18: its convolutions have algorithms that are not deterministic, too."""
    first, second = (run(tmp_path / name, gpu, "--num_epochs", "2") for name in ("first", "second"))
    assert numbers(first) == numbers(second)


@pytest.mark.parametrize("flags", [[], ["--precision", "bfloat16"]], ids=["float32", "bfloat16"])
def test_stopped_and_resumed_run_is_as_if_undisturbed(gpu, few_digits, tmp_path, flags):
    flags = [*flags, "--scheduler", "none"]  # which keeps the last checkpoint
    expected = run(tmp_path / "undisturbed", gpu, *flags)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", gpu, *flags, stop_after="epoch 1/3")
    resumed = run(tmp_path / "stopped", gpu, *flags)
    assert numbers(resumed) == numbers(expected)

    one, other = (load_checkpoint(tmp_path / name / "networks" / "x-last.pt") for name in ("undisturbed", "stopped"))
    assert all(group["fused"] == (gpu.type == "cuda") for group in other["optimizer"]["param_groups"])
    for name, value in one["network"].items():
        assert torch.equal(other["network"][name], value), name
    for index, momentum in one["optimizer"]["state"].items():
        assert torch.equal(other["optimizer"]["state"][index]["momentum_buffer"], momentum["momentum_buffer"]), index


def test_compiled_run(gpu, small_network, tmp_path):
    """144 images to train on, 16 for validation, 40 for the test: with and without a short last batch."""
    torch._dynamo.reset()
    counters.clear()
    flags = ["--batch_size", "10", "--precision", "strict", "--learning_rate", "0.01"]
    plain, compiled = (numbers(run(tmp_path / mode, gpu, *flags, *mode.split())) for mode in ("", "--compile"))
    assert counters["stats"]["unique_graphs"] == 2  # one for training and one for evaluation
    for name in ("train_loss", "val_loss"):
        assert compiled[name] == pytest.approx(plain[name], rel=1e-3)
    for name, num_images in {"val_accuracy": 16, "test_accuracy": 40}.items():
        assert compiled[name] == pytest.approx(plain[name], abs=1.01 * 100 / num_images)  # but for one image


@pytest.mark.parametrize(
    ("precision", "exact"), [("strict", {"product", "convolution"}), ("float32", {"product"}), ("tf32", set())]
)
def test_precision_of_what_is_computed(gpu, precision, exact):
    """Beside float64 on the CPU: the 10 bits of tf32 leave a relative error of 3e-4, the 23 of float32 of 3e-7."""
    if gpu.type == "cuda" and torch.cuda.get_device_capability(gpu) < (8, 0):
        pytest.skip("a GPU that is older than tf32")
    shapes = {"product": [(512, 512), (512, 512)], "convolution": [(16, 64, 16, 16), (64, 64, 3, 3)]}
    draw = torch.Generator().manual_seed(1)
    for name, compute in {"product": F.linear, "convolution": F.conv2d}.items():
        images, weights = (torch.randn(shape, generator=draw) for shape in shapes[name])
        with use_precision(precision):
            computed = compute(images.to(gpu), weights.to(gpu)).cpu()
        expected = compute(images.double(), weights.double())
        error = ((computed - expected).norm() / expected.norm()).item()
        low, high = (0, 1e-5) if name in exact else (1e-4, 1e-3)
        assert low < error < high, name


def test_random_states_of_a_gpu(gpu):
    torch.rand(3, device=gpu)  # from here on, its generator is in use
    states = random_states()
    expected, later = torch.rand(5, device=gpu), torch.rand(5, device=gpu)
    assert not torch.equal(later, expected)
    torch.manual_seed(4)
    set_random_states(states)
    assert torch.equal(torch.rand(5, device=gpu), expected)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_batches_are_those_of_a_cpu(gpu, small_cifar10, split, normalize):
    """But for the last bit of a pixel: a GPU multiplies by 1/255."""
    epochs = []
    for device in ("cpu", gpu):
        torch.manual_seed(11)
        epochs.append(list(Batches(load_image_set("cifar10", small_cifar10, device), split, 16, normalize)))
    for (images, labels), (expected_images, expected_labels) in zip(epochs[1], epochs[0], strict=True):
        assert images.device.type == labels.device.type == gpu.type
        torch.testing.assert_close(images.cpu(), expected_images, rtol=1e-6, atol=1e-6)
        assert torch.equal(labels.cpu(), expected_labels)


@pytest.fixture
def without_waiting(gpu) -> Iterator[Callable[[Iterable[Batch]], Iterator[Batch]]]:
    """Batches, of which all but the first are used while it is an error to wait for the GPU."""

    def watch(batches: Iterable[Batch]) -> Iterator[Batch]:
        batches = iter(batches)
        yield next(batches)
        torch.cuda.set_sync_debug_mode("error")
        yield from batches
        torch.cuda.set_sync_debug_mode("default")

    yield watch
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("normalize", [False, True])
def test_nothing_waits_for_the_gpu_within_an_epoch(gpu, without_waiting, small_network, small_cifar10, normalize):
    settings = prepared(["--dataset", "digits", "--batch_size", "10", "--device", gpu.type])
    for image_set in (load_image_set("digits", device=gpu), load_image_set("cifar10", small_cifar10, gpu)):
        for split in image_set.splits:
            for _ in without_waiting(Batches(image_set, split, 2, normalize)):
                pass

    network = preparation.construct_network("", 10, "digits").to(gpu)
    digits = {split: Batches(load_image_set("digits", device=gpu), split, 10, normalize) for split in ("train", "test")}
    optimizer = optim.SGD(adjust_weight_decay_and_learning_rate(network), momentum=0.9, fused=gpu.type == "cuda")
    for _ in range(2):
        train.train_one_epoch(network, without_waiting(digits["train"]), optimizer, settings)
        train.measure(network, without_waiting(digits["test"]), settings)


@pytest.mark.parametrize("number", [1, 2])
def test_processes_compute_what_one_does(gpu, tmp_path, monkeypatch, number):
    """One process of torchrun with NCCL; two on one GPU with Gloo."""
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "digits", "--batch_size", "50", "--num_epochs", "3", "--learning_rate", "0.02"]
    job = {"flags": [*flags, "--precision", "strict", "--device", gpu.type], "small": True}
    alone = processes.record({**job, "flags": [*job["flags"], "--name", "alone"]})
    Path("jobs.json").write_text(json.dumps({"together": job}))
    command = [*processes.TORCHRUN, f"--nproc_per_node={number}", processes.DRIVER, str(tmp_path)]
    with processes.started(command, Path("output")) as process:
        assert process.wait() == 0, Path("output").read_text()
    for rank in range(number):
        together = torch.load(f"{rank}.pt")["together"]
        assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        for name, column in alone["columns"].items():
            assert together["columns"][name] == pytest.approx(column, rel=1e-4), name


# --- without a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "fused"), [("cuda", True), ("cpu", False)])
def test_optimizer_is_fused_on_a_gpu(small_network, tmp_path, monkeypatch, device, fused):
    """The run gets as far as its optimizer, with everything on the CPU."""
    settings = prepared(["--dataset", "digits", "--path", str(tmp_path), "--device", "cpu"])
    monkeypatch.setattr(train, "prepare", lambda settings: replace(preparation.prepare(settings), device=device))
    monkeypatch.setattr(preparation, "load_image_set", lambda name, *_, **__: loading.load_image_set(name))
    monkeypatch.setattr(nn.Module, "to", lambda self, *_: self)
    monkeypatch.setattr(optim, "SGD", Mock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):
        train.train(settings)
    assert optim.SGD.call_args.kwargs["fused"] is fused


@pytest.mark.parametrize(("on_gpu", "mode"), [(True, "reduce-overhead"), (False, "default")])
def test_cuda_graphs_on_a_gpu(monkeypatch, on_gpu, mode):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    network = nn.Linear(2, 2)
    network.parameters = lambda: iter([SimpleNamespace(is_cuda=on_gpu)])
    network.compile = Mock()
    speed_up(network, compiled=True)
    network.compile.assert_called_once_with(mode=mode, dynamic=False)
