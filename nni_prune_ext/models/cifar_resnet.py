"""ResNet-20/32/44/56/110 for 32×32 images.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, 2015, section 4.2,
https://arxiv.org/abs/1512.03385. Shortcuts are option A: they have no parameters.
Departures from the paper: none.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

STAGE_WIDTHS = (16, 32, 64)


class PadShortcut(nn.Module):
    """The option-A shortcut: subsample rows and columns, then add zero channels in front and behind.

    Args:
        stride: Every how many rows and columns one is kept.
        pad: Zero channels added on EACH side; the output has C + 2 * pad channels.
    """

    def __init__(self, stride: int, pad: int) -> None:
        super().__init__()
        self.stride = stride
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C + 2 * pad, ceil(H / stride), ceil(W / stride))."""
        subsampled = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(subsampled, (0, 0, 0, 0, self.pad, self.pad))

    def extra_repr(self) -> str:
        """Return the options for the printed model."""
        return f"stride={self.stride}, pad={self.pad}"


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm, added to the shortcut before the last ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        changes_shape = stride != 1 or in_channels != out_channels
        self.shortcut = PadShortcut(stride, (out_channels - in_channels) // 2) if changes_shape else nn.Identity()
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, out_channels, H / stride, W / stride)."""
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        result: Tensor = self.relu2(residual + self.shortcut(x))
        return result


class CifarResNet(nn.Module):
    """A stem, three stages of 16, 32 and 64 channels, global average pooling and one linear layer."""

    def __init__(self, blocks_per_stage: int, *, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        stem, middle, last = STAGE_WIDTHS
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.layer1 = _stage(stem, stem, blocks_per_stage, stride=1)
        self.layer2 = _stage(stem, middle, blocks_per_stage, stride=2)
        self.layer3 = _stage(middle, last, blocks_per_stage, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(last, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        features = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))
        logits: Tensor = self.linear(self.pool(features).flatten(1))
        return logits


def resnet20(*, num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """Build ResNet-20: 269,722 params and 40.6 M MACs at 3×32×32 with 10 classes."""
    return CifarResNet(3, num_classes=num_classes, in_channels=in_channels)


def resnet32(*, num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """Build ResNet-32: 464,154 params and 68.9 M MACs at 3×32×32 with 10 classes."""
    return CifarResNet(5, num_classes=num_classes, in_channels=in_channels)


def resnet44(*, num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """Build ResNet-44: 658,586 params and 97.2 M MACs at 3×32×32 with 10 classes."""
    return CifarResNet(7, num_classes=num_classes, in_channels=in_channels)


def resnet56(*, num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """Build ResNet-56: 853,018 params and 125.5 M MACs at 3×32×32 with 10 classes."""
    return CifarResNet(9, num_classes=num_classes, in_channels=in_channels)


def resnet110(*, num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """Build ResNet-110: 1,727,962 params and 252.9 M MACs at 3×32×32 with 10 classes."""
    return CifarResNet(18, num_classes=num_classes, in_channels=in_channels)


def _stage(in_channels: int, out_channels: int, num_blocks: int, *, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride=stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels) for _ in range(num_blocks - 1)))


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
