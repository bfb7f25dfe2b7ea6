"""FTWT's rule as policies for static methods: a group keeps as many channels as hold the mass of what it holds.

``ftwt_ratio`` weighs channels by their weights; ``firing_signature`` by what images make of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.gates.firing_targets import mass_targets
from nni_prune_ext.gates.signature import firing_signature
from nni_prune_ext.schedules import PolicyContext, SchedulerSpec

MASS = 0.9
"""Share of the mass that is kept."""
BATCHES = 8
"""Training batches that the signature is taken from, as many as Taylor's scores are."""


def ftwt_ratio(
    weights: Mapping[str, Sequence[Tensor]], previous: Mapping[str, float], progress: float
) -> Mapping[str, float]:
    """Returns for every group the share of channels beyond those that hold 0.9 of its mass, equal ones if none is.

    FTWT ranks the heat maps of one image; a policy sees weights only, so here the mass of a channel is the sum of the
    absolute weights that write it, over all writers. How many channels images really need, from activations, says
    ``FiringSignature``.
    """
    ratios = {name: _beyond_the_mass(rows) for name, rows in weights.items()}
    return ratios if any(ratios.values()) else dict.fromkeys(weights, 1.0)


def _beyond_the_mass(rows: Sequence[Tensor]) -> float:
    """Returns the share of channels beyond those that hold the mass; 0 where nothing is written."""
    if not rows:
        return 0.0
    mass = torch.stack([own.detach().abs().sum(1).float().cpu() for own in rows]).sum(0)
    return 1 - float(mass_targets(mass[None], MASS).float().mean())


class FiringSignature:
    """Ratios in proportion to the share of a group's channels that an image does not need (``firing_signature``).

    Attributes:
        seen: group → that share, 0–1. A group without one, or whose channels no gate could close, has the ratio 0.
    """

    def __init__(self) -> None:
        self.seen: Mapping[str, float] = {}

    def look(self, context: PolicyContext) -> dict[str, float]:
        """Returns the firing signature of the context's model on the first eight training batches.

        Raises:
            ConfigError: no batch, or no place for a gate.
        """
        found = firing_signature(
            context.model,
            context.example_inputs,
            context.batches(BATCHES),
            mass=MASS,
            groups=context.groups,
            run=lambda _, batch: context.task_loss(batch),
        )
        shares = context.agreed({name: torch.tensor(share, dtype=torch.float64) for name, share in found.items()})
        return {name: float(share) for name, share in shares.items()}

    def __call__(
        self, weights: Mapping[str, Sequence[Tensor]], previous: Mapping[str, float], progress: float
    ) -> Mapping[str, float]:
        """Returns each group's share, equal ones if all are 0.

        Raises:
            ConfigError: it has not looked at data.
        """
        if weights and not self.seen:
            raise ConfigError(
                "The ratio policy 'firing_signature' was asked for the ratios of "
                f"{len(weights)} groups before it has looked at data, expected a host that lets it: make it with "
                "schedules.informed_ratio_policy, or use ftwt_ratio, which needs no data."
            )
        ratios = {name: self.seen.get(name, 0.0) for name in weights}
        return ratios if any(ratios.values()) else dict.fromkeys(weights, 1.0)


FTWT_RATIO = SchedulerSpec(
    "ratio_policy",
    "groups whose weights are held by few channels are pruned more: FTWT's mass rule, on weights",
    lambda: ftwt_ratio,
)
FIRING_SIGNATURE = SchedulerSpec(
    "ratio_policy",
    "groups of whose channels images need few are pruned more: FTWT's mass rule, on activations",
    FiringSignature,
    needs_data=True,
)
