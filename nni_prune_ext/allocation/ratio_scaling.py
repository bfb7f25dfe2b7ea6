"""From relative ratios to ratios: one factor for all, so that their weighted mean is the share asked for."""

from __future__ import annotations

from collections.abc import Mapping

from nni_prune_ext.errors import TargetError

_ROUNDS = 400


def scaled_ratios(
    relative: Mapping[str, float],
    sizes: Mapping[str, int],
    caps: Mapping[str, float],
    share: float,
    *,
    floors: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Scales relative ratios by one factor, cut off at each one's bounds, until ``share`` of everything goes.

    What has the relative ratio 0 goes beyond its floor only where all others are at their caps; then alike.

    Args:
        relative: name → relative ratio, at least 0.
        sizes: name → how many elements (channels) the ratio is of.
        caps: name → largest ratio allowed, 0–1.
        share: 0–1, of the sum of all sizes.
        floors: name → smallest ratio, at most its cap; 0 unless given. Together they must allow ``share``.

    Returns:
        name → ratio, 0–1; their mean weighted by ``sizes`` is ``share`` to within 1e-9.

    Raises:
        TargetError: the caps allow less than ``share``.
    """
    total = max(sum(sizes[name] for name in relative), 1)
    least = {name: min((floors or {}).get(name, 0.0), caps[name]) for name in relative}
    if share > sum(caps[name] * sizes[name] for name in relative) / total + 1e-12:
        most = sum(caps[name] * sizes[name] for name in relative) / total
        at_cap = ", ".join(f"'{name}' ({caps[name]:g})" for name in list(relative)[:3])
        raise TargetError(
            f"A share of {share:g} cannot be reached: the largest ratios allowed leave {most:g}; the first are "
            f"{at_cap}. Allow larger ones (NNI: max_sparse_ratio, torch-pruning: max_pruning_ratio), or ask for less."
        )
    idle = {name: 1.0 for name, value in relative.items() if value <= 0}
    without = sum((least if name in idle else caps)[name] * sizes[name] for name in relative) / total
    first = {**{name: value for name, value in relative.items() if name not in idle}, **dict.fromkeys(idle, 0.0)}
    if idle and share > without:
        full = {name: caps[name] for name in first if name not in idle}
        return {**full, **_scaled(idle, sizes, caps, least, share * total - sum(full[n] * sizes[n] for n in full))}
    return _scaled(first, sizes, caps, least, share * total)


def _scaled(
    relative: Mapping[str, float],
    sizes: Mapping[str, int],
    caps: Mapping[str, float],
    least: Mapping[str, float],
    wanted: float,
) -> dict[str, float]:
    """Returns name → ratio within its bounds, so that ``wanted`` elements go in all."""
    largest = max(relative.values(), default=0.0) or 1.0

    def bounded(factor: float) -> dict[str, float]:
        return {name: min(caps[name], max(factor * (value / largest), least[name])) for name, value in relative.items()}

    def reached(factor: float) -> float:
        return sum(ratio * sizes[name] for name, ratio in bounded(factor).items())

    low, high = 0.0, 1.0
    while reached(high) < wanted - 1e-12 and high < 1e60:
        high *= 2
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        if reached(middle) < wanted:
            low = middle
        else:
            high = middle
    return bounded(high)
