"""VGG-16 and VGG-19 with batch norm for 32×32 images: 13 or 16 convolutions and one linear layer.

Simonyan, Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition, 2014,
https://arxiv.org/abs/1409.1556, configurations D and E.
Departures from the paper: batch norm after every convolution (which then needs no bias), and one linear layer
instead of three, as is usual for CIFAR.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

MAX_POOL = 0
VGG16_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
VGG19_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512, 0)


class CifarVGG(nn.Module):
    """A chain of 3×3 convolutions with batch norm and ReLU, halved five times by max pooling.

    Args:
        widths: Output channels of each convolution in order; 0 stands for a 2×2 max pooling.
    """

    def __init__(self, widths: Sequence[int], *, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for width in widths:
            if width == MAX_POOL:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W), H and W at least 32, to logits (N, num_classes)."""
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


def vgg16_bn(*, num_classes: int = 10, in_channels: int = 3) -> CifarVGG:
    """Build VGG-16 with batch norm: 14,724,042 params and 313.2 M MACs at 3×32×32 with 10 classes."""
    return CifarVGG(VGG16_WIDTHS, num_classes=num_classes, in_channels=in_channels)


def vgg19_bn(*, num_classes: int = 10, in_channels: int = 3) -> CifarVGG:
    """Build VGG-19 with batch norm: 20,035,018 params and 398.1 M MACs at 3×32×32 with 10 classes."""
    return CifarVGG(VGG19_WIDTHS, num_classes=num_classes, in_channels=in_channels)


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
