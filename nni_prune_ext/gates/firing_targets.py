"""Which filters an image needs: the rules that make the targets of gates from a layer's own activations.

Elkerdawy et al., "Fire Together Wire Together", CVPR 2022, https://arxiv.org/abs/2110.08232, section on self-supervised
masks; details from the authors' code. A unit is a filter, or a block of filters that are switched together.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-5
"""By how much a cumulated share may exceed the mass, as in the authors' code."""


def heat(activations: Tensor) -> Tensor:
    """Returns the largest absolute value of every heat map, ``(N, C)``, of activations ``(N, C, H, W)``."""
    return activations.abs().amax((2, 3))


def unit_heat(values: Tensor, units: Tensor, num_units: int) -> Tensor:
    """Returns the sum of the heat of each unit's filters, ``(N, num_units)``.

    Args:
        values: ``(N, C)``.
        units: the unit of each filter, ``(C,)`` int64.
    """
    if num_units == values.shape[1]:
        return values
    return values.new_zeros(len(values), num_units).index_add_(1, units, values)


def mass_targets(values: Tensor, mass: float) -> Tensor:
    """Returns which units hold the mass of the heat, ``(N, U)`` bool.

    Units are ranked by their share of the heat; those whose own cumulated share is at most ``mass`` stay, so the one
    that crosses it goes and the mass kept never exceeds it. At least the hottest stays. A layer without any heat keeps
    all units. ``mass = 1`` keeps all that have any heat at all, a negative one keeps everything.

    Args:
        values: heat of every unit, ``(N, U)``, not negative.
        mass: 0–1, or negative.
    """
    if mass < 0:
        return torch.ones_like(values, dtype=torch.bool)
    total = values.sum(1, keepdim=True)
    shares = values / torch.where(total > 0, total, torch.ones_like(total))
    if mass >= 1:
        kept = shares > TOLERANCE
    else:
        ranked, order = shares.sort(dim=1, descending=True, stable=True)
        within = ranked.cumsum(1) <= mass + TOLERANCE
        within[:, 0] = True
        kept = torch.zeros_like(within).scatter_(1, order, within)
    return kept | ~((total > 0) & total.isfinite())


def uniform_targets(values: Tensor, removed: float) -> Tensor:
    """Returns all units but an equal share of the coldest and those without heat, ``(N, U)`` bool: the ablation.

    Args:
        values: heat of every unit, ``(N, U)``.
        removed: share of the units that goes, 0–1, rounded down.
    """
    count = int(removed * values.shape[1])
    order = values.argsort(dim=1, stable=True)
    kept = torch.ones_like(values, dtype=torch.bool).scatter_(1, order[:, :count], False) & (values > TOLERANCE)
    kept[torch.arange(len(values)), values.argmax(1)] = True
    return kept
