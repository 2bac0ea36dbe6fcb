"""ResNet-18 for digits with a last layer that starts at a tenth of its weights, and learns as all others do."""

from torch import nn

from networks import construct_network


def resnet18(num_classes: int) -> nn.Module:
    """The network of the other runs on digits, but for the factor; it draws the same random numbers."""
    network = construct_network("resnet18", num_classes, "digits", input_norm="dataset")
    network.fc.weight *= 0.1
    return network
