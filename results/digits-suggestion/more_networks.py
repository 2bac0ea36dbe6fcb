"""Small networks of other kinds than `plain_networks`, for images of 8×8 pixels, with torch's own initial weights."""

import torch
from torch import Tensor, nn


def vgg(num_classes: int) -> nn.Sequential:
    """Pairs of conv-BN-ReLU with max pooling, 32, 64 and 128 channels, and a hidden linear layer with a batch norm."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (32, 64, 128):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    hidden = [nn.Flatten(), nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU()]
    return nn.Sequential(*layers, *hidden, nn.Linear(128, num_classes))


class Dense(nn.Module):
    """A stem, then three layers whose 24 channels are each appended to all channels before, as in a DenseNet."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        self.layers = nn.ModuleList()
        for i in range(1, 4):
            convolution = nn.Conv2d(24 * i, 24, 3, padding=1, bias=False)
            self.layers.append(nn.Sequential(nn.BatchNorm2d(24 * i), nn.ReLU(), convolution))
        self.end = nn.Sequential(nn.BatchNorm2d(96), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(96, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return self.classifier(self.end(x))


def depthwise(num_classes: int) -> nn.Sequential:
    """Four depthwise separable convolutions of 64 channels with batch norms and GELU, the second with stride 2."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.GELU()]
    for stride in (1, 2, 1, 1):
        layers += [nn.Conv2d(64, 64, 3, stride, padding=1, groups=64, bias=False), nn.BatchNorm2d(64), nn.GELU()]
        layers += [nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))


class PreActivation(nn.Module):
    """Three residual blocks of BN-ReLU-conv-BN-ReLU-conv with 48 channels, and no activation after the sum."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 3, padding=1, bias=False)
        self.branches = nn.ModuleList()
        for _ in range(3):
            halves = [[nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 48, 3, padding=1, bias=False)] for _ in range(2)]
            self.branches.append(nn.Sequential(*halves[0], *halves[1]))
        self.end = nn.Sequential(nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(48, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.classifier(self.end(x))


dense, pre_activation = Dense, PreActivation
