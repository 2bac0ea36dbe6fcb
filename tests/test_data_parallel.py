"""Several processes against one: what they compute together is what one computes, to rounding, and how they end."""

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import processes
from folders import make_folder
from processes import DRIVER, TORCHRUN, started

ROOT = Path(__file__).parent.parent

NETWORKS = """
import timm
import torch
import torch.nn.functional as F
from torch import nn

def plain(num_classes, dropout=0):
    layers = [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.BatchNorm1d(32, momentum=None), nn.Dropout(dropout), nn.Linear(32, num_classes))

def forgetful(num_classes):
    return plain(num_classes, 0.5)

class Functional(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Flatten(), nn.Linear(200, num_classes))
        self.batch_norm = nn.BatchNorm2d(3)
        self.register_buffer("mean", torch.zeros(200))
        self.register_buffer("var", torch.ones(200))

    def forward(self, images):
        hidden = self.layers[:2](self.batch_norm(images))
        return self.layers[2](F.batch_norm(hidden, self.mean, self.var, training=self.training))

def functional(num_classes):
    return Functional(num_classes)

def with_activations(num_classes):
    return timm.create_model("mobilenetv3_small_050", num_classes=num_classes, drop_rate=0)

class Own(nn.SyncBatchNorm):
    def forward(self, images):
        return super().forward(images.abs()).relu()

def own(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), Own(8), nn.Flatten(), nn.Linear(200, num_classes))

def without_statistics(num_classes):
    return nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), plain(num_classes))
"""
# 144 digits in batches of 50, the last one 44; 54 images of a folder in batches of 8, the last one 6, 6 for validation
# and 9 for the test, whose last batch is of one image
DIGITS = ["--dataset", "digits", "--batch_size", "50", "--learning_rate", "0.02", "--device", "cpu"]
FOLDER = [*DIGITS, "--batch_size", "8", "--workers", "0", "--network", "shared_out_networks:plain", "--num_epochs", "2"]
JOBS = {
    "digits": {"flags": [*DIGITS, "--num_epochs", "4"], "small": True},
    "double": {"flags": [*DIGITS, "--num_epochs", "4"], "small": True, "double": True},
    "kept": {"flags": [*FOLDER, "--dataset", "small", "--input_norm", "dataset"]},
    "streamed": {"flags": [*FOLDER, "--dataset", "large", "--image_size", "72"]},
    "dropout": {"flags": [*FOLDER, "--dataset", "small", "--network", "shared_out_networks:forgetful", "--no_flip"]},
}
ENDING = {  # what ends a run of several processes
    "diverged": {"flags": [*DIGITS, "--learning_rate", "1e30", "--num_epochs", "2"], "small": True},
    "small last batch": {"flags": [*DIGITS, "--batch_size", "143"], "small": True},
    "other settings": {"flags": DIGITS, "1": ["--momentum", "0.5"], "small": True},
    "other flags": {"flags": DIGITS, "1": ["--momenta", "0.5"], "small": True},
    "other images": {"flags": [*FOLDER, "--dataset", "small"], "1": ["--path", "elsewhere"]},
    "compiled": {"flags": [*DIGITS, "--compile"], "small": True},
    "no statistics": {"flags": [*FOLDER, "--dataset", "small", "--network", "shared_out_networks:without_statistics"]},
}
OTHER_LAYERS = {  # batch norms with activations, `nn.SyncBatchNorm`, which torch refuses on a CPU, and a function
    name: {"flags": [*FOLDER, "--dataset", "small", "--network", f"shared_out_networks:{name}"], "double": True}
    for name in ("with_activations", "own", "functional")
}
CONTINUED = {"flags": [*DIGITS, "--scheduler", "none", "--tensorboard", "--name", "continued"], "small": True}
NUMBER = 3  # processes: shares of a batch differ by one image
Seen = dict[int, dict[str, list[dict[str, Any]]]]  # by number of processes and job, what each process saw


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the runs are made."""
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def seen(folder) -> Seen:
    """What 3 processes saw, then this process, which also went on with one of their runs."""
    (folder / "shared_out_networks.py").write_text(NETWORKS)
    make_folder(folder / "images" / "small", size=(12, 12))
    make_folder(folder / "elsewhere" / "images" / "small", num_train=63, size=(12, 12))
    make_folder(folder / "images" / "large", size=(70, 80))

    def jobs(number: int, epochs: int, ending: Mapping[str, Any]) -> dict[str, Any]:
        named = {
            name: {**job, "flags": [*job["flags"], "--name", f"{name.replace(' ', '-')}-{number}"]}
            for name, job in {**JOBS, **OTHER_LAYERS, **ending}.items()
        }
        return {**named, "continued": {**CONTINUED, "flags": [*CONTINUED["flags"], "--num_epochs", str(epochs)]}}

    (folder / "jobs.json").write_text(json.dumps(jobs(NUMBER, 1, ENDING)))
    with started([*TORCHRUN, f"--nproc_per_node={NUMBER}", DRIVER, str(folder)], folder / "output") as process:
        assert process.wait() == 0, (folder / "output").read_text()
    of_each = [torch.load(folder / f"{rank}.pt") for rank in range(NUMBER)]
    undisturbed = {**CONTINUED, "flags": [*CONTINUED["flags"], "--num_epochs", "2", "--name", "other"]}
    with chdir(folder):
        alone = jobs(1, 2, {}) | {"undisturbed": undisturbed}
        of_one = {name: [processes.record(job)] for name, job in alone.items()}
    return {NUMBER: {name: [of[name] for of in of_each] for name in of_each[0]}, 1: of_one}


@pytest.mark.parametrize("job", ["digits", "kept", "streamed"])
def test_same_images_in_the_same_order(seen, job):
    """With the same flips and crops; in training as in evaluation."""
    [alone], together = seen[1][job], seen[NUMBER][job]
    remaining = [iter(of["images"]) for of in together]
    for batch in alone["images"]:
        sizes = [len(batch) * (rank + 1) // NUMBER - len(batch) * rank // NUMBER for rank in range(NUMBER)]
        shares = [next(images) for images, size in zip(remaining, sizes, strict=True) if size]
        assert max(sizes) - min(sizes) <= 1 and [len(share) for share in shares] == [size for size in sizes if size]
        assert torch.equal(torch.cat(shares), batch)
    assert all(next(images, None) is None for images in remaining)
    assert len({len(batch) for batch in alone["images"]}) > 1


def test_every_image_once_an_epoch_with_dropout(seen):
    """The processes draw other numbers for their dropout, and the same order in the next epoch all the same."""
    of_epochs = []
    for of in ([seen[1]["dropout"][0]], seen[NUMBER]["dropout"]):
        images = [torch.cat(process["images"]) for process in of]
        assert sum(map(len, images)) == 2 * (54 + 6 + 9)
        of_epochs.append(sorted(image.numpy().tobytes() for share in images for image in share))
    assert of_epochs[0] == of_epochs[1]


ROUNDING = {"digits": 1e-5, "double": 1e-11, "kept": 1e-5, "streamed": 1e-5} | dict.fromkeys(OTHER_LAYERS, 1e-9)


@pytest.mark.parametrize(("job", "rounding"), ROUNDING.items())
def test_same_losses_and_accuracies(seen, job, rounding):
    """Those of every step and every epoch: so the gradients are those of the whole batch, unequal shares included."""
    [alone] = seen[1][job]
    for process in seen[NUMBER][job]:
        assert process["losses"] == pytest.approx(alone["losses"], rel=rounding)
        for name, column in alone["columns"].items():
            assert process["columns"][name] == pytest.approx(column, rel=rounding), name
    assert len(set(alone["columns"]["val_loss"])) > 1


@pytest.mark.parametrize("job", ["digits", "kept"])
def test_parameter_groups_and_scales(seen, job):
    [alone] = seen[1][job]
    assert all(scale == pytest.approx([0.1] * len(scale)) for scale in alone["scales"].values())
    for process in seen[NUMBER][job]:
        assert process["groups"] == alone["groups"] and process["scales"] == alone["scales"]


def test_run_goes_on_with_another_number_of_processes(seen, folder):
    """One epoch with three processes, and one with one; TensorBoard shows each once."""
    [undisturbed] = seen[1]["undisturbed"]
    for number, epochs in ((NUMBER, 1), (1, 2)):
        for process in seen[number]["continued"]:
            for name, column in undisturbed["columns"].items():
                assert process["columns"][name] == pytest.approx(column[:epochs], rel=1e-4), name
            assert len(process["losses"]) == 2 * 3  # of one epoch, each looked at twice
    curve = EventAccumulator(str(folder / "tensorboard" / "continued")).Reload().Scalars("test_accuracy")
    [alone] = seen[1]["continued"]
    assert [(point.step, round(point.value, 3)) for point in curve] == [
        (epoch, round(accuracy, 3)) for epoch, accuracy in enumerate(alone["columns"]["test_accuracy"], start=1)
    ]


@pytest.mark.parametrize(
    ("job", "code", "line"),
    [
        ("diverged", 4, r"the loss of step \d is (nan|inf): the training has diverged; .*"),
        ("small last batch", 2, "argument --batch_size: 143 leaves 1 images in a batch, fewer than 3 processes"),
        (
            "other settings",
            1,
            "the processes differ in momentum: start them all with the same command, .*",
        ),
        ("other flags", 2, r"unrecognized arguments: --momenta 0.5: did you mean --momentum\?"),
        ("other images", 1, "the processes differ in images, image_hash: start them all with the same .*"),
        ("compiled", 2, "argument --compile: it is for one process, without torchrun"),
        ("no statistics", 2, "argument --network: batch norm '1.0' has no running statistics, so that it can be .*"),
    ],
)
def test_ends_all_processes_with_one_line(seen, job, code, line):
    first, *others = seen[NUMBER][job]
    assert re.fullmatch(f"train.py: error: {line}\n", first["error"])
    assert all(of["error"] == "" for of in others)
    assert all(of["code"] == code for of in (first, *others))


@contextmanager
def run_to_stop(folder: Path) -> Iterator[tuple[subprocess.Popen, list[int]]]:
    """The example of USAGE.md with the small network, once the first epoch is saved: torchrun and its two processes."""
    [example] = re.findall(r"^```\n(torchrun .*)\n```$", (ROOT / "USAGE.md").read_text(), re.MULTILINE)
    words = shlex.split(example)
    script = words.index("train.py")
    assert words[0] == "torchrun" and words[1:script] == ["--nproc_per_node=2"]
    flags = [*words[script + 1 :], "--device", "cpu", "--name", "x", "--path", str(folder)]
    with started([*TORCHRUN, *words[1:script], DRIVER, str(folder), *flags], folder / "output") as process:
        wait_for(folder, "epoch 1/5", process)
        yield process, [int((folder / f"process-{rank}").read_text()) for rank in range(2)]


def wait_for(folder: Path, text: str, process: subprocess.Popen) -> None:
    """Until the output has this text."""
    while text not in (folder / "output").read_text():
        assert process.poll() is None, (folder / "output").read_text()
        time.sleep(0.02)


def own_lines(folder: Path) -> list[str]:
    """What the processes have printed on standard error, without torchrun's own lines."""
    return re.findall(r"^train\.py: .*", (folder / "output").read_text(), re.MULTILINE)


def test_process_that_is_killed_ends_the_run(tmp_path):
    """Here the second of two; the first one says how to go on."""
    with run_to_stop(tmp_path) as (process, [_, second]):
        os.kill(second, signal.SIGKILL)
        assert process.wait() == 1
    [line] = own_lines(tmp_path)
    assert "has died or does not answer: run the same command again" in line
    assert (tmp_path / "code-0").read_text() == "1"
    assert list(tmp_path.glob("networks/x-last.pt"))


def test_signal_to_all_processes_saves_the_run(tmp_path):
    """As a scheduler sends it: to torchrun too. Then one process goes on with the run."""
    with run_to_stop(tmp_path) as (process, of_processes):
        for pid in (*of_processes, process.pid):
            os.kill(pid, signal.SIGTERM)
        process.wait()
    assert own_lines(tmp_path) == [
        "train.py: stopped: run the same command again, without --restart, to go on after the last finished epoch"
    ]
    assert [(tmp_path / f"code-{rank}").read_text() for rank in range(2)] == ["143", "143"]
    done = [line for line in (tmp_path / "results" / "x.csv").read_text().splitlines() if line[0].isdigit()]
    assert len(done) == 1
