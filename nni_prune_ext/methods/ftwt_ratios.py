"""FTWT's rule as a policy for static methods: a group keeps as many channels as hold the mass of what it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nni_prune_ext.gates.firing_targets import mass_targets
from nni_prune_ext.schedules import SchedulerSpec

MASS = 0.9
"""Share of the mass that is kept."""


def ftwt_ratio(
    weights: Mapping[str, Sequence[Tensor]], previous: Mapping[str, float], progress: float
) -> Mapping[str, float]:
    """Returns for every group the share of channels beyond those that hold 0.9 of its mass, equal ones if none is.

    FTWT ranks the heat maps of one image; a policy sees weights only, so here the mass of a channel is the sum of the
    absolute weights that write it, over all writers. How many channels images really need per layer, from activations,
    says ``gates.firing_signature``.
    """
    ratios = {name: _beyond_the_mass(rows) for name, rows in weights.items()}
    return ratios if any(ratios.values()) else dict.fromkeys(weights, 1.0)


def _beyond_the_mass(rows: Sequence[Tensor]) -> float:
    """Returns the share of channels beyond those that hold the mass; 0 where nothing is written."""
    if not rows:
        return 0.0
    mass = torch.stack([own.detach().abs().sum(1).float().cpu() for own in rows]).sum(0)
    return 1 - float(mass_targets(mass[None], MASS).float().mean())


FTWT_RATIO = SchedulerSpec(
    "ratio_policy",
    "groups whose weights are held by few channels are pruned more: FTWT's mass rule, on weights",
    lambda: ftwt_ratio,
)
