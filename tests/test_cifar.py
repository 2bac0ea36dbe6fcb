"""CIFAR-10 and CIFAR-100 from their files: read, missing, damaged, downloaded."""

import socket
import threading

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
    ("name", "title", "folder"),
    [("cifar10", "CIFAR-10", "cifar-10-batches-py"), ("cifar100", "CIFAR-100", "cifar-100-python")],
)
def test_what_cannot_be_had(tmp_path, no_network, name, title, folder):
    message = f"{title} is not in .*no route to host.*unpack {title.lower()}-python.tar.gz .*folder {folder};"
    with pytest.raises(FileNotFoundError, match=message):
        load_image_set(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_not_to_be_downloaded(tmp_path, forbidden_network):
    folder = tmp_path / "images"
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is not in .*images, .*\(Dataset not found or corrupted\)"):
        load_image_set("cifar10", folder, download=False)
    assert not list(tmp_path.iterdir())
    folder.write_text("")  # a file in place of the folder
    for download in (False, True):
        with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is not in .*images, or"):
            load_image_set("cifar10", folder, download=download)


def test_what_another_run_is_unpacking(small_cifar10, forbidden_network, monkeypatch):
    """The folder is not whole yet: the load waits for who has the lock, and finds it whole then."""
    file = small_cifar10 / "cifar-10-batches-py" / "data_batch_3"
    content = file.read_bytes()
    file.write_bytes(content[:1000])
    locked, asked = threading.Event(), threading.Event()

    def unpack() -> None:
        with FileLock(small_cifar10 / "cifar10.lock"):
            locked.set()
            asked.wait()
            file.write_bytes(content)

    monkeypatch.setattr(cifar, "FileLock", lambda lock_file: asked.set() or FileLock(lock_file))
    thread = threading.Thread(target=unpack, daemon=True)
    thread.start()
    locked.wait()
    assert len(load_image_set("cifar10", small_cifar10).images) == 65
    thread.join()
    assert not (small_cifar10 / "cifar10.lock").exists()


@pytest.mark.parametrize(
    ("name", "damaged", "download", "reason"),
    [
        ("data_batch_3", False, False, "not found or corrupted"),
        ("test_batch", True, False, "not found or corrupted"),
        ("batches.meta", True, True, "downloaded: no route"),
    ],
)
def test_files_that_are_not_whole(small_cifar10, no_network, name, damaged, download, reason):
    file = small_cifar10 / "cifar-10-batches-py" / name
    content = bytearray(file.read_bytes())
    file.unlink()
    if damaged:
        content[100] ^= 1
        file.write_bytes(content)
    with pytest.raises(FileNotFoundError, match=rf"CIFAR-10 .* damaged \(.*{reason}.*\): unpack") as error:
        load_image_set("cifar10", small_cifar10, download=download)
    assert "\n" not in str(error.value) and "download=True" not in str(error.value)
    assert [file.name for file in small_cifar10.iterdir()] == ["cifar-10-batches-py"]


def test_files_are_mended_by_a_download(small_cifar10, monkeypatch):
    file = small_cifar10 / "cifar-10-batches-py" / "batches.meta"
    content = file.read_bytes()
    file.unlink()
    monkeypatch.setattr(cifar, "download_and_extract_archive", lambda *_, **__: file.write_bytes(content))
    assert load_image_set("cifar10", small_cifar10).classes[3] == "cat"


def test_server_that_never_answers(tmp_path, monkeypatch):
    """As a proxy, so that every address leads to it."""
    monkeypatch.setattr(cifar, "DOWNLOAD_TIMEOUT", 0.2)
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    before = socket.getdefaulttimeout()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(FileNotFoundError, match=r"could not be downloaded: .*timed out"):
            load_image_set("cifar10", tmp_path)
    assert socket.getdefaulttimeout() == before
    assert not list(tmp_path.iterdir())
