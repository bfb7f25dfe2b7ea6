"""MobileNetV1 and MobileNetV2 for 32×32 images.

Howard et al.: MobileNets, 2017, https://arxiv.org/abs/1704.04861.
Sandler et al.: MobileNetV2: Inverted Residuals and Linear Bottlenecks, 2018, https://arxiv.org/abs/1801.04381.
Departures from the papers: the strides of https://github.com/kuangliu/pytorch-cifar, which most CIFAR results use
(stem stride 1; V2's second stage stride 1). In V2 that code also gives stride-1 blocks that change their width a
1×1 projection shortcut, and ReLU instead of ReLU6; both are followed, so that costs agree with published ones.
"""

from __future__ import annotations

from torch import Tensor, nn

# (output channels, stride) of each depthwise-separable block
V1_BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)
# (expansion, output channels, number of blocks, stride of the first block) of each stage
V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_WIDTH = 32
V2_HEAD_WIDTH = 1280


class SeparableBlock(nn.Module):
    """A 3×3 depthwise convolution and a 1×1 convolution, each with batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        depthwise = self.relu1(self.bn1(self.conv1(x)))
        result: Tensor = self.relu2(self.bn2(self.conv2(depthwise)))
        return result


class InvertedResidual(nn.Module):
    """Expand by 1×1, filter depthwise by 3×3, project by 1×1; stride-1 blocks add a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _v2_shortcut(in_channels, out_channels) if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        filtered = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        result: Tensor = self.bn3(self.conv3(filtered))
        return result if self.shortcut is None else result + self.shortcut(x)


class CifarMobileNetV1(nn.Module):
    """A stem and 13 depthwise-separable blocks."""

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, STEM_WIDTH, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        self.relu1 = nn.ReLU()
        blocks: list[nn.Module] = []
        channels = STEM_WIDTH
        for width, stride in V1_BLOCKS:
            blocks.append(SeparableBlock(channels, width, stride=stride))
            channels = width
        self.layers = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        features = self.layers(self.relu1(self.bn1(self.conv1(x))))
        logits: Tensor = self.linear(self.pool(features).flatten(1))
        return logits


class CifarMobileNetV2(nn.Module):
    """A stem, 17 inverted residuals in seven stages, and a 1×1 convolution to 1280 channels."""

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, STEM_WIDTH, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        self.relu1 = nn.ReLU()
        blocks: list[nn.Module] = []
        channels = STEM_WIDTH
        for expansion, width, num_blocks, first_stride in V2_STAGES:
            for stride in (first_stride, *(1,) * (num_blocks - 1)):
                blocks.append(InvertedResidual(channels, width, expansion=expansion, stride=stride))
                channels = width
        self.layers = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(channels, V2_HEAD_WIDTH, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(V2_HEAD_WIDTH)
        self.relu2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(V2_HEAD_WIDTH, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        features = self.layers(self.relu1(self.bn1(self.conv1(x))))
        features = self.relu2(self.bn2(self.conv2(features)))
        logits: Tensor = self.linear(self.pool(features).flatten(1))
        return logits


def mobilenet_v1(*, num_classes: int = 10, in_channels: int = 3) -> CifarMobileNetV1:
    """Build MobileNetV1: 3,217,226 params and 46.4 M MACs at 3×32×32 with 10 classes."""
    return CifarMobileNetV1(num_classes=num_classes, in_channels=in_channels)


def mobilenet_v2(*, num_classes: int = 10, in_channels: int = 3) -> CifarMobileNetV2:
    """Build MobileNetV2: 2,296,922 params and 91.2 M MACs at 3×32×32 with 10 classes.

    The often quoted 94.6 M also counts two operations per element for the batch norms.
    """
    return CifarMobileNetV2(num_classes=num_classes, in_channels=in_channels)


def _v2_shortcut(in_channels: int, out_channels: int) -> nn.Module:
    if in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
