import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import train
from command_line.endings import HOW_TO_RESUME
from folders import make_folder
from image_sets.batches import Batches
from image_sets.folders import find_images, read_image
from image_sets.loading import load_image_set
from saved_runs.results import read_results

ROOT = Path(__file__).parent.parent
SIZE = 66  # just large enough to be streamed


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder `images` with 60 JPEGs of odd sizes and modes, and 9 for the test."""
    folder = tmp_path_factory.mktemp("streamed") / "images"
    make_folder(folder / "beetles")
    return folder


def load(images: Path, workers: int, **options):
    return load_image_set("beetles", images, image_size=SIZE, workers=workers, statistics=False, **options)


def test_large_images_are_streamed_at_224(images):
    image_set = load_image_set("beetles", images, workers=0, statistics=False)
    [taken] = image_set.take([torch.tensor([0, 3])])
    assert image_set.size == (224, 224) and taken.shape == (2, 3, 224, 224) and taken.dtype == torch.uint8


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_a_plain_loop_of_torchvision(images, workers):
    image_set = load(images, workers)
    files, labels = (getattr(find_images(images / "beetles"), name) for name in ("images", "labels"))
    transform = v2.Compose([v2.Resize(round(SIZE * 256 / 224)), v2.CenterCrop(SIZE)])
    for split in ("val", "test"):
        indices = image_set.splits[split].tolist()
        batches = list(Batches(image_set, split, 4, normalize=False))
        assert [len(images) for images, _ in batches] == [4] * (len(indices) // 4) + [len(indices) % 4]
        expected = torch.stack([transform(read_image(files[index])) for index in indices]) / 255
        assert torch.equal(torch.cat([images for images, _ in batches]), expected)
        assert torch.cat([of for _, of in batches]).tolist() == [labels[index] for index in indices]


@pytest.mark.parametrize(("workers", "flip"), [(0, True), (0, False), (3, True)])
def test_training_is_a_plain_loop_with_a_seed_for_each_image(images, workers, flip):
    """Two epochs: the order is that of a DataLoader, the augmentation torchvision's."""
    image_set = load(images, workers, flip=flip)
    files = find_images(images / "beetles").images
    transform = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(0.5 if flip else 0.0)])
    train_indices = image_set.splits["train"]

    torch.manual_seed(3)
    batches = Batches(image_set, "train", 16, normalize=False)
    ours = [torch.cat([images for images, _ in batches]) for _ in range(2)]
    state = torch.get_rng_state()

    torch.manual_seed(3)
    for epoch in range(2):
        [order] = DataLoader(train_indices, len(train_indices), shuffle=True)
        seeds = torch.randint(2**63 - 1, (len(order),)).tolist()
        after = torch.get_rng_state()
        for image, index, seed in zip(ours[epoch], order.tolist(), seeds, strict=True):
            torch.manual_seed(seed)
            assert torch.equal(image, transform(read_image(files[index])) / 255)
        torch.set_rng_state(after)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(ours[0].sort(0).values, ours[1].sort(0).values)  # other crops of the same images


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_file_is_named(tmp_path, workers):
    folder = make_folder(tmp_path / "beetles")
    batches = Batches(load(tmp_path, workers), "train", 8, normalize=False)
    file = find_images(folder).images[batches.indices[20]]
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read as an image") as error:
        list(batches)
    assert "\n" not in str(error.value)


def test_a_pass_within_another_is_refused(images):
    """The processes would give the images of one to the labels of the other."""
    image_set = load(images, workers=2)
    train_batches, test_batches = (Batches(image_set, split, 4, normalize=False) for split in ("train", "test"))
    for other in (lambda: next(iter(test_batches)), lambda: list(test_batches)):
        with pytest.raises(ValueError, match="two loops share one pool of workers: finish"):
            for _ in train_batches:
                other()
    assert len(list(train_batches)) == len(train_batches)


def test_killed_process(images):
    image_set = load(images, workers=2)
    before = set(psutil.Process().children())
    with pytest.raises(ChildProcessError, match=r"was lost \(.*\); fewer workers take less memory"):
        for _ in Batches(image_set, "train", 1, normalize=False):
            for process in set(psutil.Process().children()) - before:
                process.kill()
    del image_set


def test_processes_live_from_epoch_to_epoch_and_no_longer_than_the_images(images):
    before = set(psutil.Process().children())
    image_set = load(images, workers=2)
    batches = Batches(image_set, "train", 16, normalize=False)
    list(batches)
    first = set(psutil.Process().children()) - before
    next(iter(batches))  # given up in the middle
    list(Batches(image_set, "test", 2, normalize=False))
    assert set(psutil.Process().children()) - before == first and len(first) == 2
    del batches, image_set
    psutil.wait_procs(first)
    assert not set(psutil.Process().children()) - before


SCRIPT = """
import os, signal, sys
from image_sets.batches import Batches
from image_sets.loading import load_image_set
other = os.fork()
image_set = load_image_set("beetles", sys.argv[1], image_size=66, workers=2, statistics=False)
next(iter(Batches(image_set, "train", 4, normalize=False)))
if not other:
    os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(other, 0)
"""


def test_program_that_ends_in_the_middle_of_an_epoch(images):
    """Its processes do not keep it from ending, and end with it: one that is killed, and one that is not."""
    script = subprocess.Popen([sys.executable, "-c", SCRIPT, images], cwd=ROOT, stdout=subprocess.PIPE)
    script.communicate()  # until all of its processes have ended, for each of them holds the pipe
    assert script.returncode == 0


NETWORK = """
from torch import nn


def small(num_classes):
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, num_classes))
"""


def flags_of(path: Path, name: str, num_epochs: int) -> list[str]:
    flags = f"--path {path} --name {name} --dataset beetles --network network_for_streamed:small --image_size {SIZE}"
    flags += f" --num_epochs {num_epochs} --scheduler none --batch_size 16 --workers 2 --checkpoint_seconds 0"
    return [*flags.split(), "--device", "cpu"]


def test_stopped_run_goes_on_to_the_same_numbers(images, monkeypatch):
    """Its processes leave signals to it. One to all, as from a cluster that takes its machine back, stops it."""
    path = images.parent
    (path / "network_for_streamed.py").write_text(NETWORK)
    command = [sys.executable, ROOT / "train.py", *flags_of(path, "stopped", 3000)]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    file = path / "results" / "stopped.csv"
    with subprocess.Popen(command, cwd=path, **options) as process, ExitStack() as at_end:
        at_end.callback(process.kill)

        def wait_for(num_epochs: int) -> None:
            while not file.exists() or read_results(file).num_epochs < num_epochs:
                assert process.poll() is None
                time.sleep(0.01)

        wait_for(1)
        children = psutil.Process(process.pid).children()
        for child in children:
            child.send_signal(signal.SIGTERM)
            child.send_signal(signal.SIGINT)
        wait_for(read_results(file).num_epochs + 2)  # it goes on
        assert len(children) == 2 and all(child.is_running() for child in children)
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate()
    assert (process.returncode, errors) == (128 + signal.SIGTERM, f"train.py: {HOW_TO_RESUME}\n")
    psutil.wait_procs(children)

    num_epochs = read_results(file).num_epochs + 1
    monkeypatch.chdir(path)
    undisturbed = train.main(flags_of(path, "undisturbed", num_epochs))
    resumed = train.main([*flags_of(path, "stopped", num_epochs), "--workers", "1"])
    for column, values in undisturbed.columns.items():
        assert np.array_equal(resumed.columns[column], values), column
    ours, theirs = (
        torch.load(path / "networks" / f"{name}-best.pt", weights_only=True) for name in ("stopped", "undisturbed")
    )
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
