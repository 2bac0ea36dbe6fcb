import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import train
from folders import make_folder, smooth_image
from image_sets.batches import Batches
from image_sets.folders import find_images, read_image
from image_sets.loading import load_image_set
from image_sets.streaming import StreamedImages
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


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("workers", [0, 1, 3])
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


def test_images_are_mirrored_half_of_the_time():
    image = torch.arange(70, dtype=torch.uint8).expand(3, 70, 70)
    for flip, expected in ((True, 50), (False, 0)):
        streamed = StreamedImages(image[None], (70, 70), flip, workers=0)
        [batch] = streamed.batches([[(0, seed) for seed in range(100)]])
        mirrored = (batch[:, 0, 0, 0] > batch[:, 0, 0, -1]).sum().item()
        assert abs(mirrored - expected) <= 15 * flip


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_file_is_named(tmp_path, workers):
    folder = make_folder(tmp_path / "beetles")
    batches = Batches(load(tmp_path, workers), "train", 8, normalize=False)
    file = find_images(folder).images[batches.indices[20]]
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read as an image") as error:
        list(batches)
    assert "\n" not in str(error.value)


def test_killed_process(images):
    image_set = load(images, workers=2)
    before = set(psutil.Process().children())
    with pytest.raises(ChildProcessError, match="was killed, perhaps for lack of memory: give fewer --workers"):
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
    psutil.wait_procs(first, timeout=30)
    assert not set(psutil.Process().children()) - before


SCRIPT = """
import sys, time
from image_sets.batches import Batches
from image_sets.loading import load_image_set
image_set = load_image_set("beetles", sys.argv[1], image_size=66, workers=2, statistics=False)
batches = iter(Batches(image_set, "train", 4, normalize=False))
next(batches)
print("ready", flush=True)
if sys.argv[2] == "wait":
    time.sleep(600)
"""


@pytest.mark.parametrize("ending", ["exit", "wait"])
def test_processes_end_with_their_parent(images, ending):
    """Whether it ends by itself in the middle of an epoch, or is killed."""
    command = [sys.executable, "-c", SCRIPT, str(images), ending]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        children = []
        if ending == "wait":
            assert process.stdout.readline() == "ready\n"
            children = psutil.Process(process.pid).children()
            assert len(children) == 2
            for child in children:  # signals are left to the parent
                child.send_signal(signal.SIGTERM)
                child.send_signal(signal.SIGINT)
            time.sleep(0.5)
            assert all(child.is_running() for child in children)
            process.kill()
        assert process.wait() == (0 if ending == "exit" else -signal.SIGKILL)
        assert watchdog.is_alive()
        watchdog.cancel()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


def flags_of(path: Path, name: str, *others: str) -> list[str]:
    flags = f"--path {path} --name {name} --stem own --num_epochs 3 --batch_size 16 --device cpu"
    return [*flags.split(), "--dataset", "beetles", "--workers", "2", "--checkpoint_seconds", "0", *others]


@pytest.mark.parametrize("image_size", [32, SIZE], ids=["kept", "streamed"])
def test_killed_run_on_a_folder_goes_on_to_the_same_numbers(images, image_size):
    path, size = images.parent, ["--image_size", str(image_size)]
    undisturbed = train.main(flags_of(path, f"undisturbed{image_size}", *size))
    name = f"killed{image_size}"
    file = path / "results" / f"{name}.csv"
    with subprocess.Popen([sys.executable, "train.py", *flags_of(path, name, *size)], cwd=ROOT) as process:
        while not file.exists():
            time.sleep(0.01)
            assert process.poll() is None
        process.kill()
    assert read_results(file).num_epochs < 3
    resumed = train.main([*flags_of(path, name, *size), "--workers", "1"])
    for column, values in undisturbed.columns.items():
        assert np.array_equal(resumed.columns[column], values), column
    ours, theirs = (
        torch.load(path / "networks" / f"{of}-best.pt", weights_only=True) for of in (name, f"undisturbed{image_size}")
    )
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_all_processes_stops_a_run_in_one_line(images, number):
    """As Ctrl-C in a terminal, or a cluster that takes its machine back."""
    path, name = images.parent, f"stopped{int(number)}"
    flags = flags_of(path, name, "--image_size", str(SIZE), "--num_epochs", "300")
    command = [sys.executable, "train.py", *flags]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, **options) as process:
        threading.Timer(100, process.kill).start()
        while not (path / "results" / f"{name}.csv").exists():
            time.sleep(0.01)
            assert process.poll() is None
        children = psutil.Process(process.pid).children()
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors == ("train.py: stopped; the epochs that are done are saved: run the same command again to resume\n")
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


def test_statistics_do_not_depend_on_who_computes_them(tmp_path):
    folder = make_folder(tmp_path / "beetles", num_train=30)
    found = []
    for workers in (0, 2):
        for file in folder.glob("*.json"):
            file.unlink()
        image_set = load_image_set("beetles", tmp_path, image_size=SIZE, workers=workers)
        found.append((image_set.mean, image_set.std))
    assert found[0] == found[1]


def test_a_process_that_may_have_none_of_its_own(images, monkeypatch):
    """As one of a Dask cluster."""
    monkeypatch.setitem(torch.multiprocessing.current_process()._config, "daemon", True)
    before = set(psutil.Process().children())
    assert len(list(Batches(load(images, workers=2), "test", 2, normalize=False))) == 5
    assert set(psutil.Process().children()) == before


def test_smooth_images_of_tests_are_not_all_alike():
    generator = np.random.default_rng(0)
    assert np.asarray(smooth_image(generator, 40, 40)).std() > 20
