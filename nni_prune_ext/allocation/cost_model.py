"""What a plan would cost, in closed form from the shapes that it leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import nn

from nni_prune_ext.costs import Costs
from nni_prune_ext.graph.channel_groups import ChannelGroups

PredictedLatency: TypeAlias = Callable[[Mapping[str, Sequence[int]]], float]
"""Tensor name → shape, of all parameters and buffers, to the predicted time of one run in milliseconds.

It must not grow when a shape shrinks, for the search relies on it.
"""


@dataclass(frozen=True)
class CostModel:
    """Dense costs and everything needed to predict the cost of a plan: shapes, positions, element sizes.

    Attributes:
        latency: predicts the latency from shapes, where it was measured; without it no target may be about latency.
    """

    groups: ChannelGroups
    costs: Costs
    trainable: frozenset[str]
    element_size: Mapping[str, int]
    latency: PredictedLatency | None = None
    _constant_macs: int = field(init=False)

    def __post_init__(self) -> None:
        """Sums the MACs that no cut changes."""
        fixed = sum(c.macs for c in self.costs.layers if not c.weighted or c.name not in self.groups.shapes)
        object.__setattr__(self, "_constant_macs", fixed)

    @classmethod
    def of(
        cls, model: nn.Module, groups: ChannelGroups, costs: Costs, latency: PredictedLatency | None = None
    ) -> CostModel:
        """Takes parameter names and element sizes from the model."""
        sizes = {name: t.element_size() for name, t in model.named_parameters()}
        trainable = frozenset(sizes)
        sizes |= {name: t.element_size() for name, t in model.named_buffers() if t.is_floating_point()}
        return cls(groups, costs, trainable, sizes, latency)

    def predict(self, lost: Mapping[tuple[str, int], int]) -> dict[str, float]:
        """Returns ``macs``, ``params``, ``memory`` and, where it can be predicted, ``latency`` after the cut.

        Args:
            lost: ``(tensor, dim)`` → number of removed positions.
        """
        shapes = {name: list(self.groups.shapes.get(name, ())) for name in self.element_size}
        for (tensor, dim), count in lost.items():
            if tensor in shapes:
                shapes[tensor][dim] -= count
        numel = {name: math.prod(shape) for name, shape in shapes.items()}
        macs = self._constant_macs + sum(
            layer.positions * numel[layer.name] for layer in self.costs.layers if layer.weighted and layer.name in numel
        )
        latency = {} if self.latency is None else {"latency": self.latency(shapes)}
        return {
            "macs": float(macs),
            "params": float(sum(numel[name] for name in self.trainable)),
            "memory": float(sum(count * self.element_size[name] for name, count in numel.items())),
            **latency,
        }


@dataclass(frozen=True)
class Reference:
    """The dense model that shares and limits refer to, also when the current model is already cut.

    Attributes:
        costs: ``macs``, ``params``, ``memory`` and, where it can be predicted, ``latency`` of the dense model.
        widths: group → number of channels in the dense model.
    """

    costs: Mapping[str, float]
    widths: Mapping[str, int]

    @classmethod
    def of(cls, cost_model: CostModel) -> Reference:
        """Takes the model as it is as the dense one."""
        dense = {key: float(value) for key, value in cost_model.costs.as_dict().items()}
        if cost_model.latency is not None:
            dense["latency"] = cost_model.predict({})["latency"]
        return cls(dense, {group.name: group.num_channels for group in cost_model.groups})
