"""Networks changed where the method may owe its gain to something else; most are ResNet-18 with its own first layers.

Their weights are drawn as `--network resnet18 --stem own` draws them, but for the last layer of `torch_last_layer` and
`shufflenet_torch_last_layer`.
"""

import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from networks import reinit_network, zero_biases

SMALL_EPSILON = 1e-7  # what torch's 1e-5 amounts to where γ is 0.1 and the variances a hundredth


def resnet18(num_classes: int) -> torchvision.models.ResNet:
    """The network as it is."""
    network = torchvision.models.resnet18(num_classes=num_classes)
    reinit_network(network)
    zero_biases(network)
    return network


class ToOnePixel(nn.Conv2d):
    """A 3×3 convolution (padding 1, no bias) that leaves out the taps outside the image where the output is one pixel.

    They see padding alone. On a CPU with AVX2, torch takes half of a training step for their gradients, which are 0.
    """

    def forward(self, images: Tensor) -> Tensor:
        """As `nn.Conv2d`, but for rounding."""
        height, width = images.shape[2:]
        if max(height, width) > min(self.stride):
            return super().forward(images)
        inside = self.weight[:, :, 1 : 1 + height, 1 : 1 + width]
        return F.linear(images.flatten(1), inside.flatten(1))[..., None, None]


def fast_resnet18(num_classes: int) -> nn.Module:
    """The network as it is, but for rounding; faster on a CPU with AVX2 where its last feature maps are 1×1."""
    network = resnet18(num_classes)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            layer.__class__ = ToOnePixel
    return network


def small_epsilon(num_classes: int) -> nn.Module:
    """ε of every batch norm is a hundredth; the input layer, which comes later, keeps its own."""
    network = resnet18(num_classes)
    for layer in batch_norms(network):
        layer.eps = SMALL_EPSILON
    return network


def slow_shift(num_classes: int) -> nn.Module:
    """β learns at a hundredth of the rate."""
    network = resnet18(num_classes)
    for layer in batch_norms(network):
        layer.bias.register_hook(a_hundredth)
    return network


def both(num_classes: int) -> nn.Module:
    """With γ = 0.1 and c = 100, this trains as `--equivalent logits` does, but for rounding."""
    network = slow_shift(num_classes)
    for layer in batch_norms(network):
        layer.eps = SMALL_EPSILON
    return network


def torch_last_layer(num_classes: int) -> nn.Module:
    """The weights of the last layer are as large as torch draws them: those of the paper's code divided by √6."""
    network = resnet18(num_classes)
    network.fc.weight.data /= 6**0.5
    return network


def shufflenet_torch_last_layer(num_classes: int) -> torchvision.models.ShuffleNetV2:
    """`shufflenet_v2_x0_5` whose last layer starts as in `torch_last_layer`."""
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=num_classes)
    reinit_network(network)
    zero_biases(network)
    network.fc.weight.data /= 6**0.5
    return network


def batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    """Its batch norms."""
    return [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]


def a_hundredth(gradient: Tensor) -> Tensor:
    """As SGD moves a parameter by its rate times its gradient, a rate of a hundredth."""
    return gradient / 100
