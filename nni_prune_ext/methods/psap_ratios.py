"""Ratios of groups that follow from the sparsity of their own weights; see ``psap``. Also a ratio policy of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from nni_prune_ext.allocation.ratio_scaling import scaled_ratios
from nni_prune_ext.schedules import SchedulerSpec
from nni_prune_ext.scoring.weight_sparsity import weight_sparsity


def relative_ratios(sparsity: Mapping[str, float]) -> dict[str, float]:
    """Returns relative ratios in proportion to sparsity, 0–1; equal ones where nothing is sparse."""
    return dict(sparsity) if any(sparsity.values()) else dict.fromkeys(sparsity, 1.0)


def adaptive_ratios(
    relative: Mapping[str, float],
    previous: Mapping[str, float],
    sizes: Mapping[str, int],
    share: float,
    *,
    step_bound: float,
    largest: Mapping[str, float],
    pace: float = 0.0,
) -> dict[str, float]:
    """Returns group → ratio: ``min(max(k · relative, previous − bound), previous + pace + bound, largest)``.

    ``k`` is the number for which ``share`` of everything goes. Where the bounds do not allow it, the nearest they do.

    Args:
        relative: group → relative ratio, at least 0, one at least above 0.
        previous: group → ratio (0–1) after the last step.
        sizes: group → what its ratio is of, for example channels.
        share: 0–1, of the sum of all sizes.
        step_bound: how far a group's ratio may leave the pace in one step.
        largest: group → largest ratio, 0–1.
        pace: how much of everything goes in this step.
    """
    floors = {name: min(max(previous[name] - step_bound, 0.0), largest[name]) for name in relative}
    caps = {name: min(previous[name] + pace + step_bound, largest[name]) for name in relative}
    total = max(sum(sizes[name] for name in relative), 1)
    least, most = (sum(sizes[name] * bound[name] for name in relative) / total for bound in (floors, caps))
    if share >= most:
        return caps
    if share <= least:
        return floors
    return scaled_ratios(relative, sizes, caps, share, floors=floors)


def psap_ratio(
    weights: Mapping[str, Sequence[Tensor]], previous: Mapping[str, float], progress: float
) -> Mapping[str, float]:
    """Returns each group's weight sparsity ratio (PSAP, re-derived from the abstract), equal ones if all are 0."""
    return relative_ratios(weight_sparsity(weights))


PSAP_RATIO = SchedulerSpec(
    "ratio_policy",
    "groups whose weights are sparser are pruned more: PSAP (re-derived from the abstract)",
    lambda: psap_ratio,
)
