"""What a plan would cost, in closed form from the shapes that it leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from nni_prune_ext.costs import Costs
from nni_prune_ext.graph.channel_groups import ChannelGroups


@dataclass(frozen=True)
class CostModel:
    """Dense costs and everything needed to predict the cost of a plan: shapes, positions, element sizes."""

    groups: ChannelGroups
    costs: Costs
    trainable: frozenset[str]
    element_size: Mapping[str, int]
    _constant_macs: int = field(init=False)

    def __post_init__(self) -> None:
        """Sums the MACs that no cut changes."""
        fixed = sum(c.macs for c in self.costs.layers if not c.weighted or c.name not in self.groups.shapes)
        object.__setattr__(self, "_constant_macs", fixed)

    @classmethod
    def of(cls, model: nn.Module, groups: ChannelGroups, costs: Costs) -> CostModel:
        """Takes parameter names and element sizes from the model."""
        sizes = {name: t.element_size() for name, t in model.named_parameters()}
        trainable = frozenset(sizes)
        sizes |= {name: t.element_size() for name, t in model.named_buffers() if t.is_floating_point()}
        return cls(groups, costs, trainable, sizes)

    def predict(self, lost: Mapping[tuple[str, int], int]) -> dict[str, float]:
        """Returns ``macs``, ``params`` and ``memory`` after the cut.

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
        return {
            "macs": float(macs),
            "params": float(sum(numel[name] for name in self.trainable)),
            "memory": float(sum(count * self.element_size[name] for name, count in numel.items())),
        }


@dataclass(frozen=True)
class Reference:
    """The dense model that shares and limits refer to, also when the current model is already cut.

    Attributes:
        costs: ``macs``, ``params`` and ``memory`` of the dense model.
        widths: group → number of channels in the dense model.
    """

    costs: Mapping[str, float]
    widths: Mapping[str, int]

    @classmethod
    def of(cls, cost_model: CostModel) -> Reference:
        """Takes the model as it is as the dense one."""
        dense = {key: float(value) for key, value in cost_model.costs.as_dict().items()}
        return cls(dense, {group.name: group.num_channels for group in cost_model.groups})
