"""How many channels each group keeps: importance scores and targets become a plan.

Channels go in one order (by score, or by rank within their group) until every target is met. The cost of each prefix of
this order follows in closed form from the shapes it would leave, so the target is met to within one channel and no model
is run. Rounding to multiples is part of the search and only ever keeps more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from nni_prune_ext.costs import Costs
from nni_prune_ext.errors import ConfigError, PluginError, TargetError
from nni_prune_ext.graph.channel_groups import ChannelGroup, ChannelGroups
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.plan import PruningPlan, plan_from_channels

Metric = Literal["macs", "params", "memory", "ratio"]
Scope = Literal["global", "local"]
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


@dataclass(frozen=True)
class Target:
    """What the user asks for.

    Attributes:
        metric: ``macs``, ``params`` or ``memory`` (bytes of the weights): an upper bound; ``ratio``: the share of prunable
            channels to remove, a lower bound.
        value: up to 1 a share of the dense model (``macs=0.5`` leaves half), above 1 an absolute number.
    """

    metric: Metric
    value: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """Reads ``metric=value`` with an optional k, M or G, for example ``macs=0.5`` or ``params=1.2M``.

        Raises:
            TargetError: it is not of that form or out of range.
        """
        match = re.fullmatch(r"\s*(macs|params|memory|ratio)\s*=\s*([0-9.]+(?:e-?[0-9]+)?)\s*([kKmMgG]?)\s*", text)
        if match is None:
            raise TargetError(
                f"Cannot read the target '{text}'. Expected METRIC=VALUE with METRIC macs, params, memory or ratio and VALUE a "
                "share (macs=0.5) or a number with k, M or G (macs=62M)."
            )
        try:
            value = float(match[2]) * _UNITS[match[3].lower()]
        except ValueError as error:
            raise TargetError(f"Cannot read '{match[2]}' in the target '{text}' as a number. Write for example macs=0.5.") from error
        target = cls({"macs": "macs", "params": "params", "memory": "memory"}.get(match[1], "ratio"), value)  # type: ignore[arg-type]
        target.check()
        return target

    def check(self) -> None:
        """Refuses values out of range.

        Raises:
            TargetError: not positive, or a ratio of 1 or more.
        """
        if not self.value > 0 or (self.metric == "ratio" and self.value >= 1) or not math.isfinite(self.value):
            span = "above 0 and below 1" if self.metric == "ratio" else "above 0: a share up to 1, or an absolute number"
            raise TargetError(f"The target {self.metric}={self.value:g} is out of range. Expected a value {span}.")

    def bound(self, dense: float) -> float:
        """Returns the bound in the metric's own unit, given the dense model's value."""
        return self.value if self.metric == "ratio" or self.value > 1 else self.value * dense

    def __str__(self) -> str:
        """Returns ``metric=value``."""
        return f"{self.metric}={self.value:g}"


class LayerLimit(BaseModel):
    """Smallest and largest pruning ratio (0–1) of the groups that a name pattern matches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_ratio: float = Field(0.0, ge=0, lt=1)
    max_ratio: float = Field(1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> LayerLimit:
        if self.min_ratio > self.max_ratio:
            raise ValueError(f"min_ratio {self.min_ratio} is above max_ratio {self.max_ratio}")
        return self


class Limits(BaseModel):
    """What no plan may exceed.

    Attributes:
        max_ratio: largest share of a group's channels that may go.
        min_channels: smallest number of channels that stay in a group.
        multiple: the root's width stays a multiple of this where the group is pruned at all; rounding keeps more channels.
        exclude: name patterns (``fnmatch``) of layers whose groups stay whole.
        layers: name pattern → limits of its own; the first match counts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_ratio: float = Field(0.9, gt=0, le=1)
    min_channels: int = Field(1, ge=1)
    multiple: int = Field(1, ge=1)
    exclude: tuple[str, ...] = ()
    layers: dict[str, LayerLimit] = {}


@dataclass(frozen=True)
class Achieved:
    """One target, asked and reached, in the metric's own unit."""

    target: Target
    dense: float
    asked: float
    achieved: float

    @property
    def met(self) -> bool:
        """Says whether the bound holds."""
        if self.target.metric == "ratio":
            return self.achieved >= self.asked - 1e-12
        return self.achieved <= self.asked + 1e-9


@dataclass(frozen=True)
class Allocation:
    """A plan and what it reaches."""

    plan: PruningPlan
    achieved: tuple[Achieved, ...]
    kept: Mapping[str, int]
    predicted: Mapping[str, float]


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


def allocate(
    scores: Mapping[str, Tensor],
    cost_model: CostModel,
    *,
    targets: Sequence[Target],
    limits: Limits | None = None,
    scope: Scope = "global",
    ratios: Mapping[str, float] | None = None,
    fraction: float = 1.0,
    reference: Reference | None = None,
) -> Allocation:
    """Chooses which channels go so that every target is met with as few removals as possible.

    Args:
        scores: group → ``(num_channels,)`` importance, higher = keep; ``inf`` protects a channel.
        targets: all must be met.
        scope: ``global`` ranks the scores of all groups together, ``local`` prunes every group at the same ratio.
        ratios: group → relative pruning ratio (a ratio policy); implies ranking within groups.
        fraction: share of the way from dense to the targets, for schedules.
        reference: the dense model, where ``cost_model`` is of a model that is already cut.

    Raises:
        PluginError: scores of a wrong shape or not a number.
        TargetError: a target is out of range or beyond the limits; the layers that bind are named.
    """
    search = _Search(scores, cost_model, limits or Limits(), scope, ratios, reference or Reference.of(cost_model))
    bounds = [(t, _scaled_bound(t, search.dense(t), fraction)) for t in targets]
    for target in targets:
        target.check()
    low, high = search.forced, len(search.order)
    if not _met(search.values(high), bounds):
        raise TargetError(search.explain(targets, bounds))
    while low < high:
        middle = (low + high) // 2
        if _met(search.values(middle), bounds):
            high = middle
        else:
            low = middle + 1
    values = search.values(low)
    achieved = tuple(Achieved(t, search.dense(t), bound, values[t.metric]) for t, bound in bounds)
    counts = search.removed_counts(low)
    removed = {name: search.ranked[name][:count] for name, count in counts.items() if count}
    kept = {g.name: g.num_channels - counts[g.name] for g in cost_model.groups}
    return Allocation(plan_from_channels(cost_model.groups, removed), achieved, kept, values)


def check_feasible(cost_model: CostModel, targets: Sequence[Target], limits: Limits | None = None) -> dict[str, float]:
    """Refuses targets that no scores can reach, before any work.

    Returns:
        the lowest reachable ``macs``, ``params``, ``memory`` and the highest ``ratio``.

    Raises:
        TargetError: see ``allocate``.
    """
    import torch  # the only function here that makes a tensor

    flat = {group.name: torch.zeros(group.num_channels) for group in cost_model.groups}
    search = _Search(flat, cost_model, limits or Limits(), "local", None, Reference.of(cost_model))
    if targets:
        allocate(flat, cost_model, targets=targets, limits=limits, scope="local")
    return search.values(len(search.order))


class _Search:
    """The order in which channels go, and the cost of every prefix of it."""

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        model: CostModel,
        limits: Limits,
        scope: Scope,
        ratios: Mapping[str, float] | None,
        reference: Reference,
    ) -> None:
        self.model, self.limits, self.reference = model, limits, reference
        self.groups = list(model.groups)
        self.ranked = {g.name: np.argsort(_checked(g, scores), kind="stable") for g in self.groups}
        self._step = {g.name: _multiple_of(g, model.groups, limits.multiple) for g in self.groups}
        self._cumulated = {g.name: [self._positions(g, m.channel, (m.tensor, m.dim)) for m in g.members] for g in self.groups}
        keys, owner, self.forced = [], [], 0
        for number, group in enumerate(self.groups):
            least, most = self._bounds(group, scores)
            ordered = _checked(group, scores)[self.ranked[group.name]][:most].astype(np.float64)
            if scope == "local" or ratios is not None:
                share = 1.0 if ratios is None else max(float(ratios.get(group.name, 0.0)), 0.0)
                ordered = (np.arange(1, most + 1) / group.num_channels) / share if share else np.empty(0)
                most = len(ordered)
            ordered[: min(least, most)] = -np.inf
            self.forced += min(least, most)
            keys.append(ordered)
            owner.append(np.full(most, number))
        flat = np.concatenate(keys) if keys else np.empty(0)
        self.order: NDArray[np.int64] = np.concatenate(owner)[np.argsort(flat, kind="stable")] if keys else np.empty(0, np.int64)

    def dense(self, target: Target) -> float:
        """Returns the dense model's value of a target's metric."""
        return 0.0 if target.metric == "ratio" else self.reference.costs[target.metric]

    def removed_counts(self, prefix: int) -> dict[str, int]:
        """Returns group → number of channels removed by the first ``prefix`` removals, rounded to multiples."""
        counts = np.bincount(self.order[:prefix], minlength=len(self.groups))
        result = {}
        for group, count in zip(self.groups, counts.tolist()):
            step = self._step[group.name]
            kept = min(-(-(group.num_channels - count) // step) * step, group.num_channels)
            result[group.name] = group.num_channels - kept
        return result

    def values(self, prefix: int) -> dict[str, float]:
        """Returns all metrics after the first ``prefix`` removals."""
        counts = self.removed_counts(prefix)
        lost: dict[tuple[str, int], int] = {}
        for group in self.groups:
            count = counts[group.name]
            if count:
                for key, cumulated in self._cumulated[group.name]:
                    lost[key] = lost.get(key, 0) + int(cumulated[count - 1])
        total = sum(self.reference.widths.values())
        left = self.model.groups.num_channels - sum(counts.values())
        return {**self.model.predict(lost), "ratio": 1 - left / total if total else 0.0}

    def explain(self, targets: Sequence[Target], bounds: Sequence[tuple[Target, float]]) -> str:
        """Says why the targets cannot be met: the nearest reachable values and the layers that cost most."""
        best = self.values(len(self.order))
        missed = [(t, b) for t, b in bounds if not _met(best, [(t, b)])]
        target, bound = missed[0]
        share = f" ({best[target.metric] / self.dense(target):.3f} of the dense model)" if self.dense(target) else ""
        held = [f"'{g.name}' (keeps {g.num_channels - self._bounds(g, None)[1]} of {g.num_channels})" for g in
                sorted(self.groups, key=lambda g: self._bounds(g, None)[1] - g.num_channels)[:3]]
        fixed = [f"'{p.root}' ({p.reason})" for p in self.model.groups.protected[:3]]
        return (
            f"The target {target} cannot be met: at most {bound:,.4g} asked for, the limits allow no less than "
            f"{best[target.metric]:,.4g}{share}."
            if target.metric != "ratio"
            else f"The target {target} cannot be met: the limits allow a ratio of at most {best['ratio']:.3f}."
        ) + (
            f" Limits that bind: max_ratio={self.limits.max_ratio:g}, min_channels={self.limits.min_channels}, "
            f"multiple={self.limits.multiple}; widest groups at their limit: {', '.join(held) or 'none'}; protected layers: "
            f"{', '.join(fixed) or 'none'}. Raise max_ratio, exclude fewer layers, or ask for less."
        )

    def _bounds(self, group: ChannelGroup, scores: Mapping[str, Tensor] | None) -> tuple[int, int]:
        """Returns the smallest and the largest number of channels that may go."""
        limit = self.limits.max_ratio
        least = 0.0
        for pattern, own in self.limits.layers.items():
            if _matches(group, pattern):
                limit, least = own.max_ratio, own.min_ratio
                break
        if any(_matches(group, pattern) for pattern in self.limits.exclude):
            return 0, 0
        width = self.reference.widths.get(group.name, group.num_channels)
        stay = max(self.limits.min_channels, math.ceil(width * (1 - limit) - 1e-9), 1)
        most = max(group.num_channels - stay, 0)
        if scores is not None:
            most = min(most, int(np.isfinite(_checked(group, scores)).sum()))
        already = width - group.num_channels
        return max(min(math.floor(width * least + 1e-9) - already, most), 0), most

    def _positions(
        self, group: ChannelGroup, channel: NDArray[np.int64], key: tuple[str, int]
    ) -> tuple[tuple[str, int], NDArray[np.int64]]:
        """Returns how many positions are lost once the first n channels in order are gone."""
        per_channel = np.bincount(channel, minlength=group.num_channels)
        return key, np.cumsum(per_channel[self.ranked[group.name]])


def _checked(group: ChannelGroup, scores: Mapping[str, Tensor]) -> NDArray[np.float64]:
    given = scores.get(group.name)
    if given is None or tuple(given.shape) != (group.num_channels,):
        shape = "none" if given is None else str(tuple(given.shape))
        raise PluginError(
            f"Scores for group '{group.name}' have shape {shape}, expected ({group.num_channels},): one score per channel. "
            "See docs/how-to/write_a_method.md."
        )
    array: NDArray[np.float64] = given.detach().double().cpu().numpy()
    if np.isnan(array).any():
        raise PluginError(
            f"Scores for group '{group.name}' contain {int(np.isnan(array).sum())} NaN of {array.size}, expected numbers "
            "(inf protects a channel). Check the criterion for empty slices or missing gradients."
        )
    return array


def _multiple_of(group: ChannelGroup, groups: ChannelGroups, multiple: int) -> int:
    """Returns the step in channels of the group that moves its root's width by a multiple."""
    root = next(m for m in group.by_role(Role.WRITER))
    per_channel = np.bincount(root.channel, minlength=group.num_channels)
    return multiple // math.gcd(multiple, max(int(per_channel.max()), 1))


def _matches(group: ChannelGroup, pattern: str) -> bool:
    return any(fnmatchcase(m.tensor.removesuffix(".weight"), pattern) for m in group.by_role(Role.WRITER, Role.DEPTHWISE))


def _met(values: Mapping[str, float], bounds: Sequence[tuple[Target, float]]) -> bool:
    return all(values[t.metric] >= b - 1e-12 if t.metric == "ratio" else values[t.metric] <= b + 1e-9 for t, b in bounds)


def _scaled_bound(target: Target, dense: float, fraction: float) -> float:
    if not 0 <= fraction <= 1:
        raise ConfigError(f"A fraction of {fraction:g} of the target is out of range. Expected 0 to 1; check the schedule.")
    full = target.bound(dense)
    return full * fraction if target.metric == "ratio" else dense + (min(full, dense) - dense) * fraction
