"""Firing statistics: which filters run never, always, or for some images only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 8
"""Pixels per layer in the picture."""
_WIDTH = 512
_NEVER, _ALWAYS = (40, 40, 48), (240, 160, 32)


@dataclass(frozen=True)
class LayerFiring:
    """How the filters of one layer fired over a set of images.

    Attributes:
        rate: share of the images for which each filter was open, ``(C,)`` float64.
        entropy: mean over the filters of the entropy of being open, in bits, 0–1.
    """

    rate: Tensor

    @property
    def never(self) -> int:
        """Counts the filters that were open for no image."""
        return int((self.rate == 0).sum())

    @property
    def always(self) -> int:
        """Counts the filters that were open for every image."""
        return int((self.rate == 1).sum())

    @property
    def varying(self) -> int:
        """Counts all others: what is really decided per image."""
        return len(self.rate) - self.never - self.always

    @property
    def entropy(self) -> float:
        """Returns the mean entropy of a filter's being open, in bits."""
        rate = self.rate.clamp(1e-12, 1 - 1e-12)
        bits = -(rate * rate.log2() + (1 - rate) * (1 - rate).log2())
        return float(torch.where((self.rate == 0) | (self.rate == 1), torch.zeros_like(bits), bits).mean())


class FiringCounter:
    """Adds up which filters are open, batch by batch."""

    def __init__(self) -> None:
        self.images = 0
        self._counts: dict[str, Tensor] = {}

    def add(self, open_channels: Mapping[str, Tensor]) -> None:
        """Counts one batch: layer → ``(N, C)`` bool."""
        for layer, own in open_channels.items():
            count = own.sum(0).cpu()
            self._counts[layer] = self._counts[layer] + count if layer in self._counts else count
        self.images += len(next(iter(open_channels.values())))

    def result(self) -> dict[str, LayerFiring]:
        """Returns layer → firing over everything that was counted."""
        return {layer: LayerFiring(count.double() / self.images) for layer, count in self._counts.items()}


def firing_picture(firing: Mapping[str, LayerFiring]) -> Tensor:
    """Returns a heat map of firing rates, ``(3, H, W)`` uint8: one band per layer, filters by falling rate.

    Dark: never; orange: always; between them blue (seldom) to white (often).
    """
    bands = [_band(own.rate) for own in firing.values()]
    gap = torch.full((3, 1, _WIDTH), 255, dtype=torch.uint8)
    return torch.cat([part for band in bands for part in (band, gap)][:-1], 1)


def firing_facts(firing: Mapping[str, LayerFiring]) -> dict[str, float]:
    """Returns how many filters fire never, always and for some images, and their mean entropy in bits."""
    layers: Sequence[LayerFiring] = list(firing.values())
    filters = sum(len(own.rate) for own in layers)
    return {
        "filters_gated": filters,
        "filters_never": sum(own.never for own in layers),
        "filters_always": sum(own.always for own in layers),
        "filters_varying": sum(own.varying for own in layers),
        "firing_rate": float(torch.cat([own.rate for own in layers]).mean()),
        "firing_entropy_bits": sum(own.entropy * len(own.rate) for own in layers) / filters,
    }


def _band(rate: Tensor) -> Tensor:
    """Returns the firing rates of one layer as a band of pixels, ``(3, rows, width)``."""
    ranked = rate.sort(descending=True).values
    place = (torch.arange(_WIDTH) * len(ranked)) // _WIDTH
    shown = ranked[place].float()
    seldom, often = torch.tensor((40.0, 80.0, 200.0)), torch.tensor((255.0, 255.0, 255.0))
    colours = seldom[:, None] + shown * (often - seldom)[:, None]
    colours[:, shown == 0] = torch.tensor(_NEVER, dtype=torch.float32)[:, None]
    colours[:, shown == 1] = torch.tensor(_ALWAYS, dtype=torch.float32)[:, None]
    return colours.round().to(torch.uint8)[:, None].expand(3, _ROWS, _WIDTH)
