"""The decoder of the reconstruction method: an encoder turned round, that keeps its width while the encoder shrinks.

Li et al., "Reconstruction Task Finds Universal Winning Tickets", 2022, https://arxiv.org/abs/2202.11484, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.graph.feature_maps import FeatureMap

_NARROWEST = 16
"""Channels of the last stages, where the encoder has no feature map to take the width from."""


class Decoder(nn.Module):
    """Rebuilds the image from the last feature map of an encoder, resolution by resolution.

    Every stage doubles the resolution (nearest) and has the width of the encoder's feature map there, so that hints
    need no projection: ``g' = (1 − t) · g + t · f`` goes into the next stage (eq. 10), for up to ``hints`` feature maps
    in front of the last one, of a stride of ``hint_stride`` or more: a decoder that hears a map near the image's
    resolution rebuilds the image from that alone. There is no activation at the end: the image is normalised.

    Departures: the layers of the authors' decoder are not published. Ours has one convolution and ``blocks`` residual
    blocks per stage, and group norms, which know neither modes nor statistics of batches: the frozen decoder is the
    same function in training and evaluation, whatever the batch or the number of processes.

    Attributes:
        settings: what it was built with, beside the feature maps.
    """

    def __init__(
        self,
        maps: Sequence[FeatureMap],
        *,
        hints: int = 2,
        hint_share: float = 0.1,
        hint_stride: int = 8,
        blocks: int = 1,
    ) -> None:
        """Builds the stages.

        Args:
            maps: the image and the encoder's feature maps, from the first to the last one.
            hints: how many feature maps in front of the last one are mixed in, fewer if there are fewer.
            hint_share: t, 0–1.
            hint_stride: smallest stride of a feature map that is mixed in, in pixels of the image.
            blocks: residual blocks per stage.
        """
        super().__init__()
        self.settings: dict[str, float] = {
            "hints": hints, "hint_share": hint_share, "hint_stride": hint_stride, "blocks": blocks
        }  # fmt: skip
        image, *inner, code = maps
        self.hint_share, self.code = hint_share, code.module
        coarse = [own.module for own in reversed(inner) if image.height / own.height > hint_stride - 0.5]
        self.hinted = tuple(coarse[:hints])
        widths = {own.size: own for own in inner}
        self.first = _Stage(code.channels, code.channels, code.size, blocks)
        self.stages = nn.ModuleList()
        self._hint_of: list[str | None] = []
        width, size = code.channels, code.size
        while size != image.size:
            size = _next_size(size, image.size, list(widths))
            known = widths.get(size)
            wide = known.channels if known is not None else max(min(width, _NARROWEST), width // 2)
            self.stages.append(_Stage(width, wide, size, blocks))
            self._hint_of.append(known.module if known is not None and known.module in self.hinted else None)
            width = wide
        self.last = nn.Conv2d(width, image.channels, 3, padding=1)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Maps feature maps by module, ``(N, C, h, w)`` each, to images ``(N, 3, H, W)``."""
        x: Tensor = self.first(features[self.code])
        for stage, name in zip(self.stages, self._hint_of):
            x = stage(x)
            if name is not None:
                x = (1 - self.hint_share) * x + self.hint_share * features[name]
        result: Tensor = self.last(x)
        return result


class _Stage(nn.Module):
    """A change of resolution and width, then residual blocks."""

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int], blocks: int) -> None:
        super().__init__()
        self.size = size
        self.change = nn.Sequential(*_layer(inputs, outputs), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(*_layer(outputs, outputs), nn.ReLU(), *_layer(outputs, outputs)) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.change(functional.interpolate(x, self.size) if x.shape[2:] != self.size else x)
        for block in self.blocks:
            x = functional.relu(x + block(x))
        return x


def _layer(inputs: int, outputs: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.GroupNorm(math.gcd(outputs, 8), outputs),
    ]


def _next_size(size: tuple[int, int], end: tuple[int, int], known: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Returns twice the resolution, or that of a feature map within a pixel of it."""
    twice = (min(2 * size[0], end[0]), min(2 * size[1], end[1]))
    for own in known:
        if own != size and abs(own[0] - 2 * size[0]) <= 1 and abs(own[1] - 2 * size[1]) <= 1:
            return own
    return twice
