import hashlib
import random
import socket
import threading
import time

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import transforms

from command_line.settings import DATASETS
from image_sets import cifar
from image_sets.batches import Batches
from image_sets.cifar import CIFAR10_STATISTICS
from image_sets.loading import load_image_set

SEED_0 = int(hashlib.md5(b"0").hexdigest()[-8:], 16)


def validation_split_of_the_paper(labels) -> list[np.ndarray]:
    """With the global generator seeded, as the paper's code draws it."""
    before = np.random.get_state()
    np.random.seed(SEED_0)
    indices = train_test_split(np.arange(len(labels)), test_size=0.1, stratify=labels)
    np.random.set_state(before)
    return indices


@pytest.fixture
def no_network(monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(cifar, "download_and_extract_archive", fail)


@pytest.fixture
def forbidden_network(monkeypatch):
    def fail(*_, **__):
        pytest.fail("there was an attempt to use the network")

    monkeypatch.setattr(cifar, "download_and_extract_archive", fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)


def test_cifar10(small_cifar10):
    image_set = load_image_set("cifar10", small_cifar10)
    assert image_set.images.shape == (65, 3, 32, 32) and image_set.images.dtype == torch.uint8
    assert image_set.classes[3] == "cat" and image_set.flip
    assert image_set.mean == (0.4916, 0.4823, 0.4467) and image_set.std == (0.2472, 0.2437, 0.2618)
    assert (image_set.mean, image_set.std) == CIFAR10_STATISTICS
    assert not (small_cifar10 / "cifar10.lock").exists()

    raw = [
        np.load(small_cifar10 / "cifar-10-batches-py" / name, allow_pickle=True)
        for name in ("data_batch_3", "test_batch")
    ]
    assert torch.equal(image_set.images[20:30], torch.from_numpy(raw[0]["data"]).view(10, 3, 32, 32))
    assert torch.equal(image_set.images[50:], torch.from_numpy(raw[1]["data"]).view(15, 3, 32, 32))
    assert image_set.labels.tolist() == [n % 5 for n in range(10)] * 5 + [n % 5 for n in range(15)]

    train, val = validation_split_of_the_paper(image_set.labels[:50].tolist())
    assert image_set.splits["train"].tolist() == train.tolist()
    assert image_set.splits["val"].tolist() == val.tolist()
    assert image_set.splits["test"].tolist() == list(range(50, 65))


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


def test_cifar100_that_cannot_be_had(tmp_path, no_network):
    message = r"CIFAR-100 is not in .*no route to host.*unpack cifar-100-python.tar.gz .*folder cifar-100-python,"
    with pytest.raises(FileNotFoundError, match=message):
        load_image_set("cifar100", tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_file_of_cifar100_is_named(small_cifar100, no_network):
    (small_cifar100 / "cifar-100-python" / "test").write_bytes(b"")
    with pytest.raises(OSError, match=r"CIFAR-100 in .*cifar-100-python is not whole.*: test is damaged"):
        load_image_set("cifar100", small_cifar100)


def test_cifar10_that_cannot_be_had(tmp_path, no_network):
    with pytest.raises(FileNotFoundError, match=r"no route to host.*cifar-10-batches-py.*digits"):
        load_image_set("cifar10", tmp_path)
    assert not list(tmp_path.iterdir())


def test_cifar10_that_is_not_to_be_downloaded(tmp_path, forbidden_network):
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is not in .*images: unpack"):
        load_image_set("cifar10", tmp_path / "images", download=False)
    assert not list(tmp_path.iterdir())


def test_cifar10_that_is_there_needs_no_download(small_cifar10, forbidden_network):
    for download in (False, True):
        assert len(load_image_set("cifar10", small_cifar10, download=download).images) == 65


def test_cifar10_that_another_run_is_unpacking(small_cifar10, forbidden_network):
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
def test_cifar10_with_a_missing_file(small_cifar10, no_network, names, download):
    for name in names:
        (small_cifar10 / "cifar-10-batches-py" / name).unlink()
    listed = ", ".join(f"{name} is missing" for name in names)
    attempt = r" and could not be downloaded \(no route to host\)" if download else ""
    with pytest.raises(
        FileNotFoundError, match=rf"cifar-10-batches-py is not whole{attempt}: {listed}; put a good copy"
    ):
        load_image_set("cifar10", small_cifar10, download=download)
    assert [file.name for file in small_cifar10.iterdir()] == ["cifar-10-batches-py"]


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_cifar10_with_a_damaged_file(small_cifar10, no_network, name, download):
    file = small_cifar10 / "cifar-10-batches-py" / name
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(OSError, match=rf"not whole.*: {name} is damaged .*good copy") as error:
        load_image_set("cifar10", small_cifar10, download=download)
    assert type(error.value) is OSError
    assert [file.name for file in small_cifar10.iterdir()] == ["cifar-10-batches-py"]


@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_cifar10_is_mended_by_a_download(small_cifar10, monkeypatch, name):
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


def test_digits():
    digits = load_digits()
    image_set = load_image_set("digits")
    assert image_set.images.shape == (1797, 3, 8, 8) and not image_set.flip
    sizes = {name: len(indices) for name, indices in image_set.splits.items()}
    assert sizes == {"train": 1293, "val": 144, "test": 360}
    assert sorted(torch.cat(list(image_set.splits.values())).tolist()) == list(range(1797))

    complete_train, test = train_test_split(np.arange(1797), test_size=0.2, stratify=digits.target, random_state=SEED_0)
    train, _ = validation_split_of_the_paper(digits.target[complete_train])
    originals = {"train": complete_train[train], "test": test}
    for name, original in originals.items():
        indices = image_set.splits[name]
        assert image_set.labels[indices].tolist() == digits.target[original].tolist()
        expected = torch.tensor(np.rint(digits.images[original] * 255 / 16), dtype=torch.uint8)
        for channel in range(3):
            assert torch.equal(image_set.images[indices, channel], expected)
    assert image_set.images.max() == 255

    seen = np.rint(digits.images[complete_train] * 255 / 16) / 255
    assert image_set.mean == pytest.approx((seen.mean(),) * 3)
    assert image_set.std == pytest.approx((np.sqrt(((seen - seen.mean()) ** 2).mean()),) * 3)


def test_sizes_known_before_loading():
    image_set = load_image_set("digits")
    assert DATASETS["digits"] == (len(image_set.splits["train"]), image_set.images.shape[-1], len(image_set.classes))
    train, _ = train_test_split(np.arange(50_000), test_size=0.1)
    assert (DATASETS["cifar10"], DATASETS["cifar100"]) == ((len(train), 32, 10), (len(train), 32, 100))


def test_split_leaves_the_generators_alone(small_cifar10):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    load_image_set("cifar10", small_cifar10)
    load_image_set("digits")
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_unknown_data_set():
    with pytest.raises(
        FileNotFoundError, match=r"no folder images.mnist, and mnist is none of cifar10, cifar100, digits"
    ):
        load_image_set("mnist")


def test_unknown_split():
    with pytest.raises(ValueError, match="one of train, val, test, not 'validation'"):
        Batches(load_image_set("digits"), "validation", 8, normalize=False)


@pytest.mark.parametrize("normalize", [False, True])
def test_batches_are_those_of_a_plain_loop(small_cifar10, normalize):
    """Two epochs beside torchvision's transforms on PIL images, one draw an image, through plain DataLoaders."""
    image_set = load_image_set("cifar10", small_cifar10)
    plain = [transforms.ToTensor()]
    if normalize:
        plain.append(transforms.Normalize((0.4916, 0.4823, 0.4467), (0.2472, 0.2437, 0.2618)))
    flip = transforms.RandomHorizontalFlip(0.5)

    class Images(torch.utils.data.Dataset):
        def __init__(self, transform):
            self.transform = transforms.Compose(transform)

        def __getitem__(self, index):
            image = Image.fromarray(image_set.images[index].permute(1, 2, 0).numpy())
            return self.transform(image), int(image_set.labels[index])

    loaders = {
        "train": DataLoader(Subset(Images([flip, *plain]), image_set.splits["train"].tolist()), 16, shuffle=True),
        "val": DataLoader(Subset(Images(plain), image_set.splits["val"].tolist()), 16),
        "test": DataLoader(Subset(Images(plain), image_set.splits["test"].tolist()), 16),
    }

    def two_epochs(loaders) -> tuple[list, torch.Tensor]:
        torch.manual_seed(11)
        batches = [batch for _ in range(2) for loader in loaders.values() for batch in loader]
        return batches, torch.get_rng_state()

    expected, expected_state = two_epochs(loaders)
    ours, our_state = two_epochs({name: Batches(image_set, name, 16, normalize) for name in loaders})
    assert [len(labels) for _, labels in ours] == [16, 16, 13, 5, 15] * 2
    for (images, labels), (expected_images, expected_labels) in zip(ours, expected, strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)
        assert images.dtype == torch.float32 and images.is_contiguous()
    assert torch.equal(our_state, expected_state)


def test_digits_are_not_flipped_but_shuffled():
    image_set = load_image_set("digits")
    train = image_set.splits["train"]
    plain = DataLoader(TensorDataset(image_set.images[train] / 255, image_set.labels[train]), 128, shuffle=True)
    torch.manual_seed(4)
    expected = list(plain)
    torch.manual_seed(4)
    ours = list(Batches(image_set, "train", 128, normalize=False))
    for (images, labels), (expected_images, expected_labels) in zip(ours, expected, strict=True):
        assert torch.equal(images, expected_images) and torch.equal(labels, expected_labels)


def test_images_live_once():
    image_set = load_image_set("digits")
    for name in image_set.splits:
        assert Batches(image_set, name, 10, normalize=True).image_set.images is image_set.images


def test_batches_do_not_change_the_images():
    image_set = load_image_set("digits")
    before = image_set.images.clone()
    for images, _ in Batches(image_set, "val", 100, normalize=True):
        images.zero_()
    assert torch.equal(image_set.images, before)


def test_normalized_digits_have_mean_0_and_spread_1(monkeypatch):
    batches = [Batches(load_image_set("digits"), name, 10_000, normalize=True) for name in ("train", "val")]
    images = torch.cat([images for loader in batches for images, _ in loader])
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std().item() == pytest.approx(1, abs=1e-4)
    assert DATASETS["digits"].pixels == images.shape[-1]
