"""What one step of a certified pruner did: what was asked, what was cut, what stayed and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nni_prune_ext.certificate import Certificate
from nni_prune_ext.surgery import Removal


@dataclass(frozen=True)
class LayerChange:
    """The output channels of one layer in one step.

    Attributes:
        layer: its name.
        before: how many it had.
        requested: how many torch-pruning selected.
        after: how many it has now.
    """

    layer: str
    before: int
    requested: int
    after: int

    @property
    def removed(self) -> int:
        """Counts the channels that went."""
        return self.before - self.after


@dataclass(frozen=True)
class StepReport:
    """What a step did.

    Attributes:
        step: number of the step, from 1.
        layers: every layer of which torch-pruning selected channels.
        skipped: layer → why it lost none, or fewer than selected.
        params_before: number of parameters before the step.
        params_after: and after it.
        removal: what was cut, for optimizers, averages and saving (``removal.plan``, ``removal.kept``); ``None`` where
            nothing was. ``removal.model`` is the pruner's model.
    """

    step: int
    layers: tuple[LayerChange, ...]
    skipped: Mapping[str, str]
    params_before: int
    params_after: int
    removal: Removal | None = None

    @property
    def certificate(self) -> Certificate | None:
        """Returns the proof that removing equals silencing, ``None`` where nothing was removed."""
        return None if self.removal is None else self.removal.certificate

    @property
    def requested(self) -> int:
        """Counts the output channels that torch-pruning selected, over all layers."""
        return sum(change.requested for change in self.layers)

    @property
    def removed(self) -> int:
        """Counts the output channels of these layers that went."""
        return sum(change.removed for change in self.layers)

    def __str__(self) -> str:
        """Says it in a few lines."""
        if self.certificate is None:
            head = f"step {self.step}: nothing was pruned"
        else:
            head = (
                f"step {self.step}: {self.removed} of {self.requested} selected channels removed, parameters "
                f"{self.params_before:,} -> {self.params_after:,}, certificate exact: {self.certificate.exact} "
                f"(error {self.certificate.max_relative_error:.1e})"
            )
        changed = [f"  {c.layer}: {c.before} -> {c.after}" for c in self.layers if c.removed]
        stayed = [f"  {layer}: {reason}" for layer, reason in self.skipped.items()]
        return "\n".join([head, *changed, *(["stayed:"] if stayed else []), *stayed])
