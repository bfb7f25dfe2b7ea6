"""How sparse the weights of a layer are, as they stand: the share of weights that are small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

Threshold = Literal["rms", "largest", "absolute", "quantile"]
"""What counts as small: a share of the layer's root mean square or of its largest weight, one value for all layers, or
a quantile of the weights of all layers."""


def weight_sparsity(
    weights: Mapping[str, Sequence[Tensor]], *, threshold: Threshold = "rms", level: float = 0.1
) -> dict[str, float]:
    """Returns group → share of its weights that are small, 0–1: the weight sparsity ratio of PSAP, re-derived.

    The root mean square and the maximum are those of the rows that are not zero, so that zeroing a channel does not
    move what counts as small; zero rows are counted, so a channel that was zeroed and does not come back makes its
    group sparser. Scaling a layer changes nothing, except with ``absolute`` and ``quantile``.

    Args:
        weights: group → one ``(num_channels, K)`` tensor per layer that writes the group. A group without any gets 0.
        level: ``rms``, ``largest``: share of it; ``absolute``: magnitude; ``quantile``: share of all weights, 0–1.
    """
    everywhere = _quantile(weights, level) if threshold == "quantile" else level
    result = {}
    for group, layers in weights.items():
        small = [_small(rows, threshold, everywhere if threshold == "quantile" else level) for rows in layers]
        total = sum(rows.numel() for rows in layers)
        result[group] = sum(small) / total if total else 0.0
    return result


def _small(rows: Tensor, threshold: Threshold, level: float) -> int:
    """Counts the small weights of a layer."""
    sizes = rows.abs()
    if threshold in ("absolute", "quantile"):
        return int((sizes < level).sum())
    alive = sizes[sizes.amax(1) > 0] if sizes.numel() else sizes
    if not alive.numel():
        return rows.numel()
    scale = alive.square().mean().sqrt() if threshold == "rms" else alive.amax()
    return int((sizes < level * scale).sum())


def _quantile(weights: Mapping[str, Sequence[Tensor]], share: float) -> float:
    sizes = [rows.abs().flatten().cpu() for layers in weights.values() for rows in layers]
    together = torch.cat(sizes) if sizes else torch.empty(0)
    if not together.numel():
        return 0.0
    return float(together.kthvalue(min(int(share * together.numel()) + 1, together.numel())).values)
