"""Runs and experiments on folders of images that are not as they should be, or change."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import figures
import reproduce
import train
from command_line.flag_types import SettingError
from command_line.signals import catch_signals
from folders import make_folder
from image_sets import folders
from image_sets.loading import ImageSet, load_image_set
from run_settings import Settings
from trained_networks import load_network
from training.preparation import prepare

NETWORK = """
from torch import nn


def small(num_classes):
    assert num_classes == 3  # those of the images, whatever the call
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, num_classes))


def large(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 24), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, num_classes))
"""


@pytest.fixture
def beetles(tmp_path, monkeypatch) -> Path:
    """60 training images of 16×16 pixels, of which 6 are for validation, and 9 test images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network_for_images.py").write_text(NETWORK)
    return make_folder(tmp_path / "images" / "beetles", size=(16, 16))


def flags(*others: str) -> list[str]:
    usual = "--dataset beetles --network network_for_images:small --batch_size 16 --device cpu"
    return [*usual.split(), *others]


def moved_images(folder: Path) -> None:
    for source, target, name in (("Käfer", "甲虫", "0.png"), ("甲虫", "Käfer", "1.png")):
        (folder / "train" / source / name).rename(folder / "train" / target / name)


def test_run_is_not_resumed_with_other_images(beetles, capsys):
    """Be they more, or as many."""
    few = flags("--name", "x", "--scheduler", "none", "--num_epochs")
    numbers = "54 training, 6 validation and 9 test images of 3 classes"
    results = train.main([*few, "1"])
    assert (results.header["images"], results.steps_per_epoch) == (numbers, 4)
    before = Path("results/x.csv").read_bytes()
    moved_images(beetles)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        train.main([*few, "2"])
    changed = "train.py: error: the images of beetles changed since x was begun: "
    assert capsys.readouterr().err.startswith(f"{changed}image_hash was {results.header['image_hash']}, now ")
    more = beetles / "train" / "Käfer" / "more.png"
    more.write_bytes((beetles / "train" / "Käfer" / "1.png").read_bytes())
    with pytest.raises(SystemExit, match="1"):
        train.main([*few, "2"])
    assert capsys.readouterr().err == (
        f"{changed}images was {numbers}, now 54 training, 7 validation and 9 test images of 3 classes:"
        " give --restart to start over, or another --name\n"
    )
    assert Path("results/x.csv").read_bytes() == before
    train.main([*few, "1"])  # a finished run needs none
    assert "7 validation" in train.main([*few, "1", "--restart"]).header["images"]
    assert train.main([*few, "2"]).num_epochs == 2


def test_statistics_of_the_images_are_those_of_the_run(beetles, capsys):
    """The trained network needs no images, and a run is not resumed with others, be they as many."""
    few = flags("--name", "x", "--input_norm", "dataset", "--scheduler", "none", "--num_epochs")
    run = train.main([*few, "1"])
    image_set = load_image_set("beetles", "images")
    images = image_set.images[:5] / 255
    mean, std = (torch.tensor(of).view(3, 1, 1) for of in (image_set.mean, image_set.std))
    beetles.rename("elsewhere")
    network = load_network("results/x.csv")
    with torch.no_grad():
        assert torch.equal(network(images), network[1]((images - mean) / std))
    Path("elsewhere").rename(beetles)
    Image.new("RGB", (16, 16), "red").save(beetles / "train" / "Käfer" / "0.png")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        train.main([*few, "2"])
    changed = "train.py: error: the images of beetles changed since x was begun: mean was "
    assert capsys.readouterr().err.startswith(changed + run.header["mean"] + ", now 0.")


def test_experiment_is_of_one_set_of_images(runs_here, beetles, capsys, monkeypatch):
    """Where they have changed, no run is added, and no table shown as if it were of these."""
    monkeypatch.setattr(figures, "save_figures", lambda *_: ([], []))  # which takes seconds
    experiment = flags("--num_epochs", "1", "--seeds")
    (beetles / "train" / "Käfer" / "notes.txt").touch()
    reproduce.main([*experiment, "1"])
    out = capsys.readouterr().out
    assert "not all runs have the same images" not in out and out.count("; left out are '1 .txt'\n") == 1
    (beetles / "test" / "Käfer" / "0.png").unlink()
    before, now = (f"54 training, 6 validation and {number} test images of 3 classes" for number in (9, 8))
    for seeds in ("1", "1-2"):
        with pytest.raises(SystemExit, match="1"):
            reproduce.main([*experiment, seeds])
        out, err = capsys.readouterr()
        assert f"was begun: images was {before}, now {now}: give --restart" in err and "± " not in out
    assert not list(Path("results").glob("*-seed2.csv"))
    reproduce.main([*experiment, "1", "--report"])  # what there is can be seen as before
    assert "± " in capsys.readouterr().out


def rename_test(folder: Path) -> None:
    (folder / "test").rename(folder / "exam")


def damage_image(folder: Path) -> None:
    (folder / "test" / "Käfer" / "0.png").write_bytes(b"damaged")


@pytest.mark.parametrize(
    ("change", "others", "code", "message"),
    [
        (rename_test, [], 1, "has no folder test (or val)"),
        (damage_image, [], 1, "0.png cannot be read as an image"),
        (None, ["--batch_size", "55"], 2, "argument --batch_size: beetles has 54 training images, fewer than"),
        (
            None,
            ["--network", "network_for_images:large"],
            2,
            "network_for_images:large cannot train on two images of 16×16 pixels",
        ),
    ],
)
def test_what_is_wrong_for_all_runs_is_said_once(runs_here, beetles, capsys, change, others, code, message):
    if change:
        change(beetles)
    with pytest.raises(SystemExit, match=str(code)):
        reproduce.main(flags("--num_epochs", "1", "--seeds", "1-3", *others))
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("reproduce.py: error: ") and message in err
    assert out == "" and not Path("networks").exists()


@pytest.mark.parametrize("given", ["beetles", "./beetles/", "../my data/beetles", "{here}/beetles"])
def test_folder_elsewhere_is_taken_once_it_is_linked(beetles, tmp_path, monkeypatch, given):
    """By the command that the refusal ends with."""
    here = tmp_path / "my data"
    here.mkdir()
    beetles.rename(here / "beetles")
    monkeypatch.chdir(here)
    given, path = given.format(here=here), tmp_path / "my runs"
    with pytest.raises(SettingError, match=r"dataset: .*/beetles is not in .*/my runs/images: give beetles ") as error:
        prepare(Settings(dataset=given, path=path))
    subprocess.run(["bash", "-ec", str(error.value).partition(" after ")[2]], check=True)
    assert prepare(Settings(dataset="beetles/", path=path)).dataset == "beetles"
    assert (path / "images" / "beetles").samefile(here / "beetles")
    with pytest.raises(SettingError, match=r"^dataset: give its name alone: beetles$"):
        Settings(dataset=f"{here}/beetles/", path=path)


@pytest.mark.parametrize("image_size", [8, 66], ids=["kept", "streamed"])
def test_signal_while_images_are_decoded(beetles, monkeypatch, image_size):
    read, decoded, taken = [], [], []
    image_folders_read = folders.read_image

    def take(images: Generator[str], *_: Any, **__: Any) -> Iterator[str]:
        """In place of the progress bar: the images that are kept, as the main thread takes them from other threads."""
        decoded.append(images)
        for image in images:
            taken.append(image)
            yield image

    def read_in_step(file: Path) -> Tensor:
        """A thread reads no more than a few images ahead of the main thread, until that closes the generator."""
        read.append(file)
        if len(read) == 3:
            signal.raise_signal(signal.SIGTERM)
        while image_size == 8 and len(read) > len(taken) + 5 and not (decoded and decoded[0].gi_frame is None):
            time.sleep(0.01)
        return image_folders_read(file)

    monkeypatch.setattr(folders, "read_image", read_in_step)
    monkeypatch.setattr(folders, "tqdm", take)
    make_folder(beetles, num_train=300, size=(16, 16))
    with pytest.raises(KeyboardInterrupt) as stop, catch_signals(raising=False):
        load_image_set("beetles", "images", image_size=image_size, workers=0)
    assert stop.value.args == (15,) and len(read) <= 200
    assert not list(beetles.glob("*.json*"))


def exchanged_classes(folder: Path) -> None:
    for part in ("train", "test"):
        (folder / part / "Käfer").rename(folder / part / "other")
        (folder / part / "甲虫").rename(folder / part / "Käfer")
        (folder / part / "other").rename(folder / part / "甲虫")


def other_test_images(folder: Path) -> None:
    for file in (folder / "test").rglob("*.png"):
        Image.new("RGB", (16, 16), "blue").save(file)


CHANGES = [exchanged_classes, moved_images, other_test_images]


@pytest.mark.parametrize("image_size", [16, 66], ids=["kept", "streamed"])
def test_hash_of_images(beetles, image_size):
    """The same for a copy elsewhere with other times; another one after each change."""

    def image_hash() -> str:
        return load_image_set("beetles", beetles.parent, image_size=image_size, workers=0, statistics=False).image_hash

    hashes = {image_hash()}
    shutil.copytree(beetles, copy := beetles.parent.parent / "elsewhere" / "beetles", copy_function=shutil.copy)
    for file in copy.rglob("*.png"):
        os.utime(file, (1e9, 1e9))
    assert image_hash() in hashes
    for change in CHANGES:
        shutil.rmtree(beetles)
        shutil.copytree(copy, beetles)
        assert image_hash() in hashes
        change(beetles)
        hashes.add(image_hash())
    assert len(hashes) == 1 + len(CHANGES)


def test_run_of_before_is_resumed(beetles, monkeypatch):
    """Whose files have no hash of the images."""
    few = flags("--name", "x", "--scheduler", "none", "--num_epochs")
    with monkeypatch.context() as patch:
        patch.setattr(ImageSet, "notes", property(lambda image_set: {"images": image_set.numbers}))
        assert "image_hash" not in train.main([*few, "1"]).header
    run = train.main([*few, "2"])
    assert run.num_epochs == 2 and run.header["image_hash"]
