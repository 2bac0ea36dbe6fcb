"""Small networks for CIFAR-10, with and without skip connections; weights are drawn as those of torchvision's."""

from torch import Tensor, nn

from networks import reinit_network, zero_biases


class ResidualBlock(nn.Module):
    """ReLU of the input plus conv-BN-ReLU-conv-BN of it: (N, width, H, W) to the same shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(*conv_bn(width, width), nn.ReLU(), *conv_bn(width, width))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.branch(x))


def conv_bn(in_channels: int, out_channels: int, stride: int = 1) -> list[nn.Module]:
    """A 3×3 convolution without bias, and a batch norm."""
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels)]


def classifier(features: list[nn.Module], width: int, num_classes: int) -> nn.Sequential:
    """The features, global average pooling and a linear layer, with weights drawn as in the paper's code."""
    network = nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
    reinit_network(network)
    zero_biases(network)
    return network


def plain(widths: list[int], num_classes: int) -> nn.Sequential:
    """Conv-BN-ReLU for each of `widths`, its number of channels; the first two convolutions have stride 2."""
    features, channels = [], 3
    for i, width in enumerate(widths):
        features += [*conv_bn(channels, width, stride=2 if i < 2 else 1), nn.ReLU()]
        channels = width
    return classifier(features, channels, num_classes)


def plain2(num_classes: int) -> nn.Sequential:
    """Two convolutions of 64 channels."""
    return plain([64] * 2, num_classes)


def plain4(num_classes: int) -> nn.Sequential:
    """Four convolutions of 64 channels."""
    return plain([64] * 4, num_classes)


def plain8(num_classes: int) -> nn.Sequential:
    """Eight convolutions of 64 channels."""
    return plain([64] * 8, num_classes)


def wide2(num_classes: int) -> nn.Sequential:
    """`plain2` with 1,024 channels in its last convolution."""
    return plain([64, 1024], num_classes)


def narrow_residual(num_classes: int) -> nn.Sequential:
    """Conv-BN-ReLU with stride 2 and three residual blocks of 32 channels, with max pooling between the blocks."""
    features = [*conv_bn(3, 32, stride=2), nn.ReLU(), ResidualBlock(32)]
    features += [nn.MaxPool2d(2), ResidualBlock(32), nn.MaxPool2d(2), ResidualBlock(32)]
    return classifier(features, 32, num_classes)
