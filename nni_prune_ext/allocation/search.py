"""The search: scores and targets become a plan.

Channels go in one order (by score, or by rank within their group) until every target is met. The cost of each prefix of
this order follows in closed form from the shapes it would leave, so the target is met to within one channel and no
model is run. Rounding to multiples is part of the search and only ever keeps more. Multiples that nobody asked for give
way where they keep a target from being met closely: that of the group cut last first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nni_prune_ext.allocation.cost_model import CostModel, Reference
from nni_prune_ext.allocation.targets import Achieved, Limits, Scope, Target, usual_multiple
from nni_prune_ext.errors import ConfigError, PluginError, TargetError
from nni_prune_ext.graph.channel_groups import ChannelGroup
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.plan import PruningPlan, plan_from_channels

CLOSE = 0.02
"""How far a plan may go beyond a target for the sake of multiples that nobody asked for, as a share of it."""


@dataclass(frozen=True)
class Allocation:
    """A plan and what it reaches.

    Attributes:
        plan: channels to remove from the current model.
        achieved: every target, asked (at this fraction of the way) and predicted.
        kept: group → number of channels that stay.
        ratios: group → share of the dense model's channels that is gone after the plan.
        predicted: ``macs``, ``params``, ``memory``, ``ratio`` and, where it was measured, ``latency`` after the plan.
        largest: group → the largest such share that the limits and infinite scores allow.
    """

    plan: PruningPlan
    achieved: tuple[Achieved, ...]
    kept: Mapping[str, int]
    ratios: Mapping[str, float]
    predicted: Mapping[str, float]
    largest: Mapping[str, float] = field(default_factory=dict)


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
        ratios: group → relative pruning ratio (a ratio policy); implies ranking within groups; a group with 0 goes
            last.
        fraction: share of the way from dense to the targets (and to least ratios of layers), for schedules.
        reference: the dense model, where ``cost_model`` is of a model that is already cut.

    Raises:
        PluginError: scores or ratios of wrong shape, missing or not a number.
        ConfigError: a limit for a layer that does not exist, or a fraction outside 0–1.
        TargetError: a target is out of range or beyond the limits; the layers that bind are named. A latency without
            a cost model that predicts it.
    """
    for target in targets:
        target.check()
        if target.metric == "latency" and cost_model.latency is None:
            raise TargetError(
                f"The target {target} needs latencies that were measured on the runtime, and there are none here. "
                "Expected a CostModel with a latency; prune() and `nni-prune-ext prune` make it. Use these, or ask "
                "for macs, params, memory or ratio."
            )
    if not 0 <= fraction <= 1:
        raise ConfigError(
            f"A fraction of {fraction:g} of the target is out of range. Expected 0 to 1; check the schedule."
        )
    search = _Search(
        scores, cost_model, limits or Limits(), scope, ratios, reference or Reference.of(cost_model), fraction
    )
    bounds = [(t, _scaled_bound(t, search.dense(t), fraction)) for t in targets]
    while not _met(search.values(len(search.order)), bounds):
        if not search.refine(search.groups):
            raise TargetError(search.explain(targets, bounds))
    low = search.shortest(bounds)
    while low and search.far_beyond(low, bounds) and search.refine_at(low):
        low = search.shortest(bounds)
    values = search.values(low)
    achieved = tuple(Achieved(t, search.dense(t), bound, values[t.metric]) for t, bound in bounds)
    counts = search.removed_counts(low)
    removed = {name: search.ranked[name][:count] for name, count in counts.items() if count}
    kept = {g.name: g.num_channels - counts[g.name] for g in cost_model.groups}
    gone = {name: 1 - count / search.width(name) for name, count in kept.items()}
    plan = plan_from_channels(cost_model.groups, removed)
    return Allocation(plan, achieved, kept, gone, values, search.largest_shares())


def check_feasible(cost_model: CostModel, targets: Sequence[Target], limits: Limits | None = None) -> dict[str, float]:
    """Refuses targets that no scores can reach, before any work.

    Returns:
        the lowest reachable ``macs``, ``params``, ``memory``, ``latency`` (if predicted) and the highest ``ratio``.

    Raises:
        TargetError: see ``allocate``.
    """
    flat = {group.name: torch.zeros(group.num_channels) for group in cost_model.groups}
    search = _Search(flat, cost_model, limits or Limits(), "local", None, Reference.of(cost_model), 1.0)
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
        fraction: float,
    ) -> None:
        limits.check(model.groups)
        self.model, self.limits, self.reference, self.fraction = model, limits, reference, fraction
        self.groups = list(model.groups)
        self._scores = {g.name: _with_survivors(g, _checked_scores(g, scores)) for g in self.groups}
        self._shares = _checked_ratios(self.groups, ratios) if ratios is not None or scope == "local" else None
        self.ranked = {name: np.argsort(values, kind="stable") for name, values in self._scores.items()}
        self._step = self._first_steps()
        self._cumulated = {
            g.name: [self._positions(g, m.channel, (m.tensor, m.dim)) for m in g.members] for g in self.groups
        }
        bounds = [self._bounds(group) for group in self.groups]
        self._most = {group.name: most for group, (_, most) in zip(self.groups, bounds)}
        self.forced = sum(least for least, _ in bounds)
        keys = np.concatenate([np.empty(0), *(self._keys(group) for group in self.groups)])
        free = np.concatenate([np.empty(0, np.bool_), *(np.arange(most) >= least for least, most in bounds)])
        owner = np.repeat(np.arange(len(bounds)), [most for _, most in bounds])
        self.order: NDArray[np.int64] = owner[
            np.lexsort((keys, free))
        ]  # forced channels first, then by key; ties by group

    def width(self, name: str) -> int:
        """Returns the dense model's number of channels of a group."""
        return self.reference.widths.get(name, self.model.groups[name].num_channels)

    def largest_shares(self) -> dict[str, float]:
        """Returns group → the largest share of the dense model's channels that may be gone."""
        return {g.name: 1 - (g.num_channels - self._most[g.name]) / self.width(g.name) for g in self.groups}

    def dense(self, target: Target) -> float:
        """Returns the dense model's value of a target's metric."""
        return 0.0 if target.metric == "ratio" else self.reference.costs[target.metric]

    def shortest(self, bounds: Sequence[tuple[Target, float]]) -> int:
        """Returns the smallest number of removals that meets all bounds, which all removals together meet."""
        low, high = self.forced, len(self.order)
        while low < high:
            middle = (low + high) // 2
            if _met(self.values(middle), bounds):
                high = middle
            else:
                low = middle + 1
        return low

    def refine(self, groups: Sequence[ChannelGroup]) -> bool:
        """Halves the steps of groups whose multiple nobody asked for; says whether there was one to halve."""
        free = [g.name for g in groups if self.limits.multiple_of(g) is None and self._step[g.name] > 1]
        self._step |= {name: self._step[name] // 2 for name in free}
        return bool(free)

    def refine_at(self, prefix: int) -> bool:
        """Halves the step of the group that was cut last, or else, as rounding held others back, of all."""
        return self.refine([self.groups[self.order[prefix - 1]]]) or self.refine(self.groups)

    def far_beyond(self, prefix: int, bounds: Sequence[tuple[Target, float]]) -> bool:
        """Says whether the last removal led beyond the full targets, by more than the tolerance.

        Only targets that it was needed for count.
        """
        before, after = self.values(prefix - 1), self.values(prefix)
        goals = [(t, _scaled_bound(t, self.dense(t), 1.0)) for t, bound in bounds if not _met(before, [(t, bound)])]
        return bool(goals) and all(
            after[t.metric] > goal * (1 + CLOSE) if t.metric == "ratio" else after[t.metric] < goal * (1 - CLOSE)
            for t, goal in goals
        )

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
        unit = " ms" if target.metric == "latency" else ""
        gone = self.removed_counts(len(self.order))
        widest = sorted(self.groups, key=lambda g: gone[g.name] - g.num_channels)[:3]
        held = [f"'{g.name}' (keeps {g.num_channels - gone[g.name]} of {g.num_channels})" for g in widest]
        fixed = [f"'{p.root}' ({p.reason})" for p in self.model.groups.protected[:3]]
        asked = sorted({multiple for g in self.groups if (multiple := self.limits.multiple_of(g) or 1) > 1})
        return (
            f"The target {target} cannot be met: at most {bound:,.4g}{unit} asked for, the limits allow no less than "
            f"{best[target.metric]:,.4g}{unit}{share}."
            if target.metric != "ratio"
            else f"The target {target} cannot be met: the limits allow a ratio of at most {best['ratio']:.3f}."
        ) + (
            f" Limits that bind: max_ratio={self.limits.max_ratio:g}, min_channels={self.limits.min_channels}"
            f"{''.join(f', multiple={multiple}' for multiple in asked)}; widest groups at their limit: "
            f"{', '.join(held) or 'none'}; protected layers: {', '.join(fixed) or 'none'}. "
            f"Raise max_ratio, {'lower multiple, ' if asked else ''}exclude fewer layers, or ask for less."
        )

    def _first_steps(self) -> dict[str, int]:
        """Returns group → the step in channels that moves its root's width by a multiple."""
        each = {g.name: _channels_of_root(g) for g in self.groups}
        widest = max((self.width(name) * channels for name, channels in each.items()), default=0)
        return {g.name: self._first_step(g, each[g.name], widest) for g in self.groups}

    def _first_step(self, group: ChannelGroup, channels: int, widest: int) -> int:
        multiple, width = self.limits.multiple_of(group), self.width(group.name)
        if multiple is not None:
            return multiple // math.gcd(multiple, channels)
        if self._shares is not None or self.limits.of_group(group).min_ratio > 0:  # ratios are obeyed
            return 1
        multiple, stay = usual_multiple(width * channels, widest), self._smallest(group)
        step = multiple // math.gcd(multiple, channels)
        while step > 1 and -(-stay // step) * step >= width:  # the limits would keep it whole
            step //= 2
        return step

    def _smallest(self, group: ChannelGroup) -> int:
        """Returns how many channels stay at least, as the limits say."""
        share = 1 - self.limits.of_group(group).max_ratio
        return max(self.limits.min_channels, math.ceil(self.width(group.name) * share - 1e-9), 1)

    def _bounds(self, group: ChannelGroup) -> tuple[int, int]:
        """Returns the smallest and the largest number of channels that may go."""
        limit = self.limits.of_group(group)
        width = self.width(group.name)
        already = width - group.num_channels
        most = group.num_channels - self._smallest(group)
        most = max(min(most, int((self._scores[group.name] < math.inf).sum())), 0)
        least = math.floor(width * limit.min_ratio * self.fraction + 1e-9) - already
        return max(min(least, most), 0), most

    def _keys(self, group: ChannelGroup) -> NDArray[np.float64]:
        """Returns one sorting key per removable channel of a group, ascending."""
        most = self._most[group.name]
        if self._shares is None:
            return self._scores[group.name][self.ranked[group.name]][:most]
        width, share = self.width(group.name), self._shares[group.name]
        gone = np.arange(1, most + 1) + width - group.num_channels
        return gone / (width * share) if share else np.full(most, math.inf)

    def _positions(
        self, group: ChannelGroup, channel: NDArray[np.int64], key: tuple[str, int]
    ) -> tuple[tuple[str, int], NDArray[np.int64]]:
        """Returns how many positions are lost once the first n channels in order are gone."""
        per_channel = np.bincount(channel, minlength=group.num_channels)
        return key, np.cumsum(per_channel[self.ranked[group.name]])


def _channels_of_root(group: ChannelGroup) -> int:
    """Returns how many channels of the root one channel of the group stands for."""
    root = next(m for m in group.by_role(Role.WRITER))
    return max(int(np.bincount(root.channel, minlength=group.num_channels).max()), 1)


def _checked_scores(group: ChannelGroup, scores: Mapping[str, Tensor]) -> NDArray[np.float64]:
    given = scores.get(group.name)
    if given is None or tuple(given.shape) != (group.num_channels,):
        shape = "none" if given is None else str(tuple(given.shape))
        raise PluginError(
            f"Scores for group '{group.name}' have shape {shape}, expected ({group.num_channels},): "
            "one score per channel. "
            "See docs/how-to/write_a_method.md."
        )
    array: NDArray[np.float64] = given.detach().double().cpu().numpy()
    if np.isnan(array).any():
        raise PluginError(
            f"Scores for group '{group.name}' contain {int(np.isnan(array).sum())} NaN of "
            f"{array.size}, expected numbers "
            "(inf protects a channel). Check the criterion for empty slices or missing gradients."
        )
    return array


def _with_survivors(group: ChannelGroup, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Protects the best channel of every layer that writes only a part of the group, so that none is left empty."""
    result: NDArray[np.float64] = scores.copy()
    for member in group.by_role(Role.WRITER, Role.DEPTHWISE):
        own = np.unique(member.channel)
        if len(own) < group.num_channels:
            result[own[np.argmax(scores[own])]] = math.inf
    return result


def _checked_ratios(groups: Sequence[ChannelGroup], ratios: Mapping[str, float] | None) -> dict[str, float]:
    """Returns one relative ratio per group; equal ones where no policy is in charge."""
    if ratios is None:
        return {group.name: 1.0 for group in groups}
    result = {group.name: float(ratios.get(group.name, math.nan)) for group in groups}
    for name, ratio in result.items():
        if not 0 <= ratio < math.inf:
            raise PluginError(
                f"The relative ratio of group '{name}' is {ratios.get(name)}, expected one finite "
                "number of at least 0 per "
                "group. Check the ratio policy."
            )
    if groups and not any(result.values()):
        raise PluginError("The relative ratios of all groups are 0, expected one above 0. Check the ratio policy.")
    return result


def _met(values: Mapping[str, float], bounds: Sequence[tuple[Target, float]]) -> bool:
    return all(
        values[t.metric] >= b - 1e-12 if t.metric == "ratio" else values[t.metric] <= b + 1e-9 for t, b in bounds
    )


def _scaled_bound(target: Target, dense: float, fraction: float) -> float:
    full = target.bound(dense)
    return full * fraction if target.metric == "ratio" else dense + (min(full, dense) - dense) * fraction
