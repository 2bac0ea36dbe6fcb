"""Few images and a small network, for tests of what does not depend on their size, in this process and in others."""

from typing import Any

from sklearn.datasets import load_digits
from sklearn.utils import Bunch
from torch import nn

import data
import train
from batch_norm import ScaleBatchNorm2d


def load_few_digits() -> Bunch:
    """200 of the digits: 144 to train on, 16 for validation, 40 for the test. A ResNet-18 takes a second an epoch."""
    digits = load_digits()
    digits.images, digits.target = digits.images[:200], digits.target[:200]
    return digits


def construct_small_network(
    network_name: str, num_classes: int, dataset: str, bn_weight: float = 1.0, *_: Any, **__: Any
) -> nn.Module:
    """One layer of each kind that matters, for digits, in place of `networks.construct_network`."""
    layers = [nn.Conv2d(3, 8, 3), ScaleBatchNorm2d(8, bn_weight=bn_weight), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(ScaleBatchNorm2d(3, bn_weight=bn_weight), *layers, nn.Linear(8 * 6 * 6, num_classes))


def train_small() -> None:
    """Let every further run of this process take a few digits and the small network."""
    data.load_digits = load_few_digits
    train.construct_network = construct_small_network
