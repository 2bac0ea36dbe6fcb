"""CIFAR-10 and CIFAR-100 from their files: read, missing, damaged, downloaded."""

import socket
import threading
import time

import numpy as np
import pytest
import torch
from filelock import FileLock

from image_sets import cifar
from image_sets.loading import load_image_set
from test_loading import validation_split_of_the_paper


def test_cifar10(small_cifar10, forbidden_network):
    image_set = load_image_set("cifar10", small_cifar10)
    assert image_set.images.shape == (65, 3, 32, 32) and image_set.images.dtype == torch.uint8
    assert image_set.classes[3] == "cat" and image_set.flip
    assert image_set.mean == (0.4916, 0.4823, 0.4467) and image_set.std == (0.2472, 0.2437, 0.2618)
    assert not (small_cifar10 / "cifar10.lock").exists()

    folder = small_cifar10 / "cifar-10-batches-py"
    raw = [np.load(folder / name, allow_pickle=True)["data"] for name in ("data_batch_3", "test_batch")]
    assert torch.equal(image_set.images[20:30], torch.from_numpy(raw[0]).view(10, 3, 32, 32))
    assert torch.equal(image_set.images[50:], torch.from_numpy(raw[1]).view(15, 3, 32, 32))
    assert image_set.labels.tolist() == [n % 5 for n in range(10)] * 5 + [n % 5 for n in range(15)]

    other = load_image_set("cifar10", small_cifar10, split_seed=3)
    assert torch.equal(other.images, image_set.images) and (other.mean, other.std) == (image_set.mean, image_set.std)
    for seed, splits in ((0, image_set.splits), (3, other.splits)):
        train, val = validation_split_of_the_paper(image_set.labels[:50].tolist(), seed)
        assert splits["train"].tolist() == train.tolist()
        assert splits["val"].tolist() == val.tolist()
        assert splits["test"].tolist() == list(range(50, 65))


def test_cifar100(small_cifar100):
    image_set = load_image_set("cifar100", small_cifar100)
    assert image_set.images.shape == (44, 3, 32, 32) and image_set.flip
    assert image_set.classes == ["apple", "bee", "cloud", "dolphin"]
    assert image_set.labels.tolist() == [n % 4 for n in range(40)] + [n % 4 for n in range(4)]
    raw = np.load(small_cifar100 / "cifar-100-python" / "train", allow_pickle=True)["data"].reshape(40, 3, 32, 32)
    assert torch.equal(image_set.images[:40], torch.from_numpy(raw))
    assert image_set.mean == pytest.approx((raw / 255).mean(axis=(0, 2, 3)))
    assert image_set.std == pytest.approx((raw / 255).std(axis=(0, 2, 3)))
    assert (small_cifar100 / "cifar-100-python" / "statistics-32x32.json").exists()

    train, val = validation_split_of_the_paper(image_set.labels[:40].tolist())
    assert image_set.splits["train"].tolist() == train.tolist()
    assert image_set.splits["val"].tolist() == val.tolist()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "cifar10",
            "CIFAR-10 is not in .*no route to host.*unpack .*folder cifar-10-batches-py, or use --dataset digits",
        ),
        (
            "cifar100",
            "CIFAR-100 is not in .*no route to host.*unpack cifar-100-python.tar.gz .*folder cifar-100-python,",
        ),
    ],
)
def test_what_cannot_be_had(tmp_path, no_network, name, message):
    with pytest.raises(FileNotFoundError, match=message):
        load_image_set(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_not_to_be_downloaded(tmp_path, forbidden_network):
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is not in .*images: unpack"):
        load_image_set("cifar10", tmp_path / "images", download=False)
    assert not list(tmp_path.iterdir())


def test_what_another_run_is_unpacking(small_cifar10, forbidden_network):
    """The folder is not whole yet: the load waits for who has the lock, and finds it whole then."""
    file = small_cifar10 / "cifar-10-batches-py" / "data_batch_3"
    content = file.read_bytes()
    file.write_bytes(content[:1000])
    locked = threading.Event()

    def unpack() -> None:
        with FileLock(small_cifar10 / "cifar10.lock"):
            locked.set()
            time.sleep(0.5)
            file.write_bytes(content)

    thread = threading.Thread(target=unpack)
    thread.start()
    locked.wait()
    assert len(load_image_set("cifar10", small_cifar10).images) == 65
    thread.join()
    assert not (small_cifar10 / "cifar10.lock").exists()


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("names", [["data_batch_3"], ["data_batch_1", "test_batch"], ["batches.meta"]])
def test_missing_files_are_named(small_cifar10, no_network, names, download):
    for name in names:
        (small_cifar10 / "cifar-10-batches-py" / name).unlink()
    listed = ", ".join(f"{name} is missing" for name in names)
    attempt = r" and could not be downloaded \(no route to host\)" if download else ""
    message = rf"cifar-10-batches-py is not whole{attempt}: {listed}; put a good copy"
    with pytest.raises(FileNotFoundError, match=message):
        load_image_set("cifar10", small_cifar10, download=download)
    assert [file.name for file in small_cifar10.iterdir()] == ["cifar-10-batches-py"]


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_damaged_file_is_named(small_cifar10, no_network, name, download):
    file = small_cifar10 / "cifar-10-batches-py" / name
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(OSError, match=rf"not whole.*: {name} is damaged .*good copy") as error:
        load_image_set("cifar10", small_cifar10, download=download)
    assert type(error.value) is OSError
    assert [file.name for file in small_cifar10.iterdir()] == ["cifar-10-batches-py"]


@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_files_are_mended_by_a_download(small_cifar10, monkeypatch, name):
    file = small_cifar10 / "cifar-10-batches-py" / name
    content = file.read_bytes()
    file.unlink()
    monkeypatch.setattr(cifar, "download_and_extract_archive", lambda *_, **__: file.write_bytes(content))
    assert load_image_set("cifar10", small_cifar10).classes[3] == "cat"


@pytest.mark.parametrize("download", [False, True])
def test_file_in_place_of_the_folder(tmp_path, forbidden_network, download):
    (tmp_path / "images").write_text("")
    with pytest.raises(NotADirectoryError, match="images is a file, where the folder of CIFAR-10's files should be"):
        load_image_set("cifar10", tmp_path / "images", download=download)


def test_server_that_never_answers(tmp_path, monkeypatch):
    """As a proxy, so that every address leads to it."""
    monkeypatch.setattr(cifar, "DOWNLOAD_TIMEOUT", 0.2)
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    before = socket.getdefaulttimeout()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        hang_up = threading.Timer(30, listener.close)  # so that a load without a time-out fails, and does not hang
        hang_up.daemon = True
        hang_up.start()
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(FileNotFoundError, match=r"could not be downloaded \(.*timed out"):
            load_image_set("cifar10", tmp_path)
    assert socket.getdefaulttimeout() == before
    assert not list(tmp_path.iterdir())
