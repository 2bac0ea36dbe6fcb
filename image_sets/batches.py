"""The batches of an image set: each is one gather, one flip and one conversion of its images."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from image_sets.loading import ImageSet

Batch = tuple[Tensor, Tensor]  # images and labels
Share = Callable[[Tensor], Tensor]  # of what there is for each image of a batch


class Batches:
    """The batches of one split, anew at every iteration; the last one may be short.

    A batch is (images, labels), on the device of the set: float32 (n, 3, H, W), the pixels divided by 255 and, if
    `normalize`, normalized with the statistics of the set; int64 (n,).

    Those of 'train' are shuffled and, where the set allows it, mirrored. The numbers drawn from torch's global
    generator are those that the paper's code draws through torch's DataLoader, so order and flips are the same.

    Args:
        image_set: the images.
        split: 'train', 'val' or 'test'.
        batch_size: number of images in a batch.
        normalize: whether to normalize with the statistics of the set (`input_norm` is 'dataset').
        share: cuts this process's part out of a tensor with one entry per image of a batch; by default, all of it.

    Raises:
        ValueError: `split` is none of these, or the set has no statistics to normalize with.
    """

    def __init__(
        self, image_set: ImageSet, split: str, batch_size: int, normalize: bool, share: Share | None = None
    ) -> None:
        if split not in image_set.splits:
            raise ValueError(f"the split must be one of {', '.join(image_set.splits)}, not {split!r}")
        self.image_set = image_set
        self.indices = image_set.splits[split]
        self.num_images = len(self.indices)
        self.training = split == "train"
        self.batch_size = batch_size
        self.normalize, self.share = normalize, share or (lambda of_batch: of_batch)
        if normalize:
            if image_set.mean is None:
                raise ValueError("there are no statistics to normalize with: load the images with statistics=True")
            statistics = torch.tensor([image_set.mean, image_set.std], dtype=torch.float32, device=self.indices.device)
            self.mean, self.std = statistics.view(2, 3, 1, 1)

    def __len__(self) -> int:
        return math.ceil(self.num_images / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = draw_order(self.num_images, self.training)
        parts = self.shares(self.indices[order.to(self.indices.device)])
        taken = self.augmented(parts) if self.training else self.image_set.take(parts)
        for part, images in zip(parts, taken, strict=True):
            images = images.float().div_(255)
            if self.normalize:
                images = images.sub_(self.mean).div_(self.std)
            yield images, self.image_set.labels[part]

    def shares(self, of_images: Tensor) -> list[Tensor]:
        """What this process has of each batch, of a tensor with an entry for each image of the split."""
        return [self.share(of_batch) for of_batch in of_images.split(self.batch_size)]

    def augmented(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images of each part, those that are kept mirrored at random, those that are streamed cropped as well."""
        images = self.image_set.images
        if not isinstance(images, Tensor):
            seeds = self.shares(torch.randint(2**63 - 1, (self.num_images,)))
            keys = ([*zip(part.tolist(), its.tolist(), strict=True)] for part, its in zip(parts, seeds, strict=True))
            for batch in images.batches(keys):
                yield batch.to(self.indices.device, non_blocking=True)
            return
        if not self.image_set.flip:
            yield from self.image_set.take(parts)
            return
        # the paper's code draws once an image; torch.rand(n) draws the same numbers as n times torch.rand(1)
        flipped = self.shares((torch.rand(self.num_images) < 0.5).to(self.indices.device).view(-1, 1, 1, 1))
        for batch, flips in zip(self.image_set.take(parts), flipped, strict=True):
            yield torch.where(flips, batch.flip(-1), batch)


def draw_order(number: int, shuffle: bool) -> Tensor:
    """The order, int64 (number,), in which a DataLoader of torch's goes through so many items, with its draws."""
    torch.empty((), dtype=torch.int64).random_()  # for processes of its own, whether it has any or not
    if not shuffle:
        return torch.arange(number)
    seed = torch.empty((), dtype=torch.int64).random_().item()
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed))
