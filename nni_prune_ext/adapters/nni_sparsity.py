"""From metrics to masks by NNI's rules, except for its ranking over several layers, which is not exact.

NNI finds the threshold of a global group with a heap over layers in the order of a set: with metrics whose size does
not follow the size of the filters, more is masked than asked, by an amount that changes from process to process. Here
the ranking is exact to one channel, in a fixed order, and the limits of every layer hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from nni.compression.pruning.tools import generate_sparsity
from numpy.typing import NDArray
from torch import Tensor

from nni_prune_ext.adapters.nni_targets import ChannelTargets, Masks, Place, Spaces
from nni_prune_ext.allocation import LayerLimit, Limits, masked_counts

_SHARED = ("global_group_id", "min_sparse_ratio", "max_sparse_ratio")


def make_masks(channels: ChannelTargets, places: Sequence[Place], metrics: Masks, spaces: Spaces) -> Masks:
    """Returns NNI's masks for all targets; channels that stand for several positions go as one.

    Args:
        metrics: module → target → one number per channel, block or element; lower goes first.
        spaces: the targets that take part.
    """
    ranked = [p for p in places if p.space.global_group_id is not None and p.goal is not None]
    with _ranked_by_hand(ranked, _shares(channels, ranked, metrics)):
        masks = cast("Masks", generate_sparsity(metrics, spaces))
    for module, own in channels.closed(places, masks).items():
        masks[module].update(own)
    return masks


def counts_of_weights(
    places: Mapping[str, Place], magnitudes: Mapping[str, Tensor], fraction: float = 1.0
) -> dict[str, int]:
    """Returns tensor name → how many of its single weights are masked: the ratio rounded up, within its limits.

    The tensors of a global group are masked below one threshold, at the group's ratio of all their weights together. Of
    every tensor at least one weight stays.

    Args:
        places: tensor name → its target, with a ratio.
        magnitudes: tensor name → magnitudes of its weights, of any shape.
        fraction: of the ratios, 0–1.
    """
    together: dict[tuple[str, ...], list[str]] = {}
    for name in magnitudes:
        group = places[name].space.global_group_id
        together.setdefault(("tensor", name) if group is None else ("group", str(group)), []).append(name)
    counts: dict[str, int] = {}
    for (kind, _), names in together.items():
        own = {name: magnitudes[name] for name in names}
        first = places[names[0]]
        asked = float(first.space.sparse_ratio) if kind == "group" else first.goal or 0.0
        most = sum(_most(places[name], values.numel()) for name, values in own.items())
        reachable = most / sum(values.numel() for values in own.values())
        limits = {name.removesuffix(".weight"): _limit(places[name]) for name in names}
        counts |= masked_counts(own, min(fraction * asked, reachable), limits=Limits(layers=limits))
    return {name: counts[name] for name in magnitudes}


def _limit(place: Place) -> LayerLimit:
    space = place.space
    return LayerLimit(min_ratio=space.min_sparse_ratio or 0.0, max_ratio=space.max_sparse_ratio or 1.0)


def _most(place: Place, size: int) -> int:
    return min(math.floor(size * _limit(place).max_ratio + 1e-9), size - 1)


@dataclass(frozen=True)
class _Unit:
    """What is ranked as one: targets that hold the same channels.

    Attributes:
        order: positions, lowest metric first.
        grain: elements that one position stands for, over all targets.
    """

    places: tuple[Place, ...]
    metric: NDArray[np.float64]
    order: NDArray[np.int64]
    grain: int
    least: int
    most: int


def _shares(channels: ChannelTargets, places: Sequence[Place], metrics: Masks) -> dict[str, float]:
    """Returns tensor name → ratio, so that NNI masks exactly what the ranking of its global group masks."""
    shares: dict[str, float] = {}
    for group in dict.fromkeys(str(place.space.global_group_id) for place in places):
        members = [place for place in places if str(place.space.global_group_id) == group]
        units = list(_units(channels, members, metrics))
        total = sum(len(unit.order) * unit.grain for unit in units)
        asked = total * float(members[0].space.sparse_ratio)
        for unit, count in zip(units, _ranked(units, asked)):
            for place in unit.places:  # the half keeps NNI's rounding down from losing one
                shares[place.tensor] = min((count + 0.5) / len(unit.order), 1.0) if count < len(unit.order) else 1.0
    return shares


def _units(channels: ChannelTargets, places: Sequence[Place], metrics: Masks) -> Iterator[_Unit]:
    rooms: dict[tuple[str, int], list[Place]] = {}
    for place in places:
        size = metrics[place.module][place.target].numel()
        rooms.setdefault((channels.unit_of(place), size), []).append(place)
    for (_, size), own in rooms.items():
        first = own[0]
        metric = metrics[first.module][first.target].detach().double().cpu().numpy().reshape(-1)
        least = max(int(size * (place.space.min_sparse_ratio or 0.0)) for place in own)
        most = min(int(size * (place.space.max_sparse_ratio or 1.0)) for place in own)
        grain = sum(place.space.target.numel() // size for place in own)
        yield _Unit(tuple(own), metric, np.argsort(metric, kind="stable"), grain, min(least, most), most)


def _ranked(units: Sequence[_Unit], asked: float) -> list[int]:
    """Returns how many positions of each unit go: every unit's least, then the lowest of all while they fit."""
    counts = [unit.least for unit in units]
    left = asked - sum(count * unit.grain for count, unit in zip(counts, units))
    free = sorted(
        (float(unit.metric[unit.order[k]]), number, k)
        for number, unit in enumerate(units)
        for k in range(unit.least, unit.most)
    )
    for _, number, _ in free:
        if units[number].grain > left + 1e-9:
            break
        left -= units[number].grain
        counts[number] += 1
    return counts


@contextmanager
def _ranked_by_hand(places: Sequence[Place], shares: Mapping[str, float]) -> Iterator[None]:
    """Lets NNI see a ratio of its own for every target of a global group."""
    before: list[tuple[Place, dict[str, Any]]] = []
    for place in places:
        setting = place.space._setting
        before.append((place, {key: setting.get(key) for key in ("sparse_ratio", *_SHARED)}))
        setting.update({"sparse_ratio": shares[place.tensor], **dict.fromkeys(_SHARED)})
    try:
        yield
    finally:
        for place, setting in before:
            place.space._setting.update(setting)
