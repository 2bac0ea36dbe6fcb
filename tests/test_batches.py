"""The batches of an epoch beside those of a plain loop."""

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import transforms

from image_sets.batches import Batches, draw_order
from image_sets.loading import load_image_set


def test_unknown_split():
    with pytest.raises(ValueError, match="one of train, val, test, not 'validation'"):
        Batches(load_image_set("digits"), "validation", 8, normalize=False)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("number", [1, 31, 50_000])
def test_order_is_that_of_a_data_loader(number, shuffle):
    """Of this version of torch: three epochs, and what the global generator gives afterwards."""
    torch.manual_seed(number)
    loader = DataLoader(range(number), batch_size=16, shuffle=shuffle)
    expected, expected_state = [torch.cat(list(loader)) for _ in range(3)], torch.get_rng_state()
    torch.manual_seed(number)
    ours, our_state = [draw_order(number, shuffle) for _ in range(3)], torch.get_rng_state()
    for order, expected_order in zip(ours, expected, strict=True):
        assert torch.equal(order, expected_order)
    assert torch.equal(our_state, expected_state)


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


def test_batches_do_not_change_the_images():
    """Which live once, for all splits."""
    image_set = load_image_set("digits")
    before = image_set.images.clone()
    for name in image_set.splits:
        batches = Batches(image_set, name, 100, normalize=True)
        assert batches.image_set.images is image_set.images
        for images, _ in batches:
            images.zero_()
    assert torch.equal(image_set.images, before)
