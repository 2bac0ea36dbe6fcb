"""Data sets as they are loaded: what comes with scikit-learn, and how every set is split."""

import hashlib
import random

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from image_sets.loading import ImageSet, load_image_set
from run_settings import DATASETS

SEEDS = {seed: int(hashlib.md5(str(seed).encode()).hexdigest()[-8:], 16) for seed in range(10)}


def validation_split_of_the_paper(labels, seed: int = 0) -> list[np.ndarray]:
    """With the global generator seeded, as the paper's code draws it."""
    before = np.random.get_state()
    np.random.seed(SEEDS[seed])
    indices = train_test_split(np.arange(len(labels)), test_size=0.1, stratify=labels)
    np.random.set_state(before)
    return indices


@pytest.mark.parametrize("seed", [0, 7])
def test_digits(seed):
    digits = load_digits()
    image_set = load_image_set("digits", **{"split_seed": seed} if seed else {})
    assert image_set.images.shape == (1797, 3, 8, 8) and not image_set.flip
    sizes = {name: len(indices) for name, indices in image_set.splits.items()}
    assert sizes == {"train": 1293, "val": 144, "test": 360}
    assert sorted(torch.cat(list(image_set.splits.values())).tolist()) == list(range(1797))

    stratified = {"stratify": digits.target, "random_state": SEEDS[seed]}
    complete_train, test = train_test_split(np.arange(1797), test_size=0.2, **stratified)
    train, val = validation_split_of_the_paper(digits.target[complete_train], seed)
    originals = {"train": complete_train[train], "val": complete_train[val], "test": test}
    for name, original in originals.items():
        indices = image_set.splits[name]
        assert image_set.labels[indices].tolist() == digits.target[original].tolist()
        expected = torch.tensor(np.rint(digits.images[original] * 255 / 16), dtype=torch.uint8)
        for channel in range(3):
            assert torch.equal(image_set.images[indices, channel], expected)
    assert image_set.images.max() == 255

    seen = np.rint(digits.images[complete_train] * 255 / 16) / 255
    assert image_set.mean == pytest.approx((seen.mean(),) * 3)
    assert image_set.std == pytest.approx((seen.std(),) * 3)


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


def test_sample_of_a_split():
    """Where classes come in turn, all of them are in it."""
    labels = torch.tensor([0, 1, 0, *[0] * 7, *[1] * 5, *[2] * 8])
    splits = {"mixed": torch.arange(10), "in turn": torch.arange(3, 23)}
    image_set = ImageSet(torch.zeros(23, 3, 8, 8), labels, splits, ["a", "b", "c"], flip=False)
    assert image_set.sample("mixed", 4).tolist() == [0, 1, 2, 3]
    assert image_set.sample("in turn", 9).tolist() == [3, 5, 7, 10, 12, 14, 17, 19, 22]
    assert image_set.sample("in turn", 4).tolist() == [3, 9, 15, 22]
    assert image_set.sample("in turn", 30).tolist() == list(range(3, 23))
