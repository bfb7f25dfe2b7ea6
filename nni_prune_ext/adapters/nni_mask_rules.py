"""The masks of an NNI pruner under a mask update rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nni_prune_ext.adapters.nni_targets import Masks, Place
from nni_prune_ext.schedules import MaskUpdateRule

_DECIDED: Mapping[str, float | None] = {
    "sparse_ratio": None,
    "min_sparse_ratio": None,
    "max_sparse_ratio": None,
    "dependency_group_id": None,
    "global_group_id": None,
    "sparse_threshold": 0.5,
}
"""Settings under which NNI masks exactly what has the metric 0, and keeps what has 1."""


def ruled_masks(
    generate: Callable[[Masks], Masks],
    rule: MaskUpdateRule,
    metrics: Masks,
    targets: Sequence[Place],
    progress: float,
) -> Masks:
    """Returns the masks that a rule allows.

    The pruner makes them, from metrics that say of every channel whether it is kept: so everything that follows from a
    mask (aligned biases) follows here as well. What NNI gives one mask, a dependency group, is one to the rule.

    Args:
        generate: makes the pruner's masks.
        rule: asked once for every target or dependency group, and for every block of one.
        metrics: the pruner's; lower goes first.
        targets: what is pruned by itself, with the masks and goals of now.
        progress: 0–1.
    """
    proposed = generate({module: {t: v.clone() for t, v in own.items()} for module, own in metrics.items()})
    forced: Masks = {module: dict(own) for module, own in metrics.items()}
    places = [place for place in targets if place.target in metrics.get(place.module, {})]
    for members in _decided_together(places):
        first, own = members[0], [metrics[place.module][place.target] for place in members]
        scores = torch.stack([metric.detach().flatten().float().cpu() for metric in own]).mean(0)
        old, new = (_units(first, mask).cpu() for mask in (first.space.mask, proposed[first.module][first.target]))
        grouped = first.space.dependency_group_id is not None
        blocks = math.lcm(*(place.space.internal_metric_block or 1 for place in members)) if grouped else 1
        rows = zip(*(values.view(blocks, -1) for values in (old, new, scores)))
        allowed = torch.cat([rule(before, asked, ranked, progress) for before, asked, ranked in rows])
        for place, metric in zip(members, own):
            forced[place.module][place.target] = allowed.to(metric).reshape(metric.shape)
    with _decided(places):
        return generate(forced)


def _decided_together(places: Sequence[Place]) -> list[list[Place]]:
    """Returns the members of every dependency group, and every other place alone."""
    units: dict[object, list[Place]] = {}
    for place in places:
        group = place.space.dependency_group_id
        units.setdefault(place.tensor if group is None else (group,), []).append(place)
    return list(units.values())


@contextmanager
def _decided(places: Sequence[Place]) -> Iterator[None]:
    """Lets NNI mask in a ``with`` block what has the metric 0, whatever ratios and groups say."""
    before = [(place.space, place.space._setting) for place in places]
    for space, setting in before:
        space._setting = {**setting, **_DECIDED}
    try:
        yield
    finally:
        for space, setting in before:
            space._setting = setting


def _units(place: Place, mask: Any) -> Tensor:
    """Returns a mask as one bool per unit that NNI masks as a whole: a channel, a block, or an element."""
    scaler = place.space._scaler
    if mask is None:
        mask = torch.ones(place.space.shape)
    full = mask.expand(place.space.shape)
    reduced: Tensor = full if scaler is None else scaler.shrink(full, keepdim=True)
    return reduced.flatten() > 0
