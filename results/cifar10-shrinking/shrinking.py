"""Networks of `plain_networks` whose last feature maps have another size; all weights start as there."""

from plain_networks import narrow_residual, plain8
from torch import nn


def plain8_to_1(num_classes: int) -> nn.Sequential:
    """`plain8` with stride 2 in the convolutions 4, 6 and 8 as well: 32×32 pixels become 1×1 instead of 8×8."""
    network = plain8(num_classes)
    for number in (4, 6, 8):
        network[3 * (number - 1)].stride = 2, 2
    return network


def with_poolings(sizes: tuple[int, int], num_classes: int) -> nn.Sequential:
    """`narrow_residual` whose two max poolings have these sizes."""
    network = narrow_residual(num_classes)
    network[4], network[6] = map(nn.MaxPool2d, sizes)
    return network


def narrow_residual_to_1(num_classes: int) -> nn.Sequential:
    """`narrow_residual` with max pooling of 4×4 pixels: 32×32 pixels become 1×1 instead of 4×4."""
    return with_poolings((4, 4), num_classes)


def narrow_residual_to_8(num_classes: int) -> nn.Sequential:
    """`narrow_residual` without its second max pooling: 32×32 pixels become 8×8 instead of 4×4."""
    return with_poolings((2, 1), num_classes)
