"""From relative ratios to ratios: one factor for all, so that their weighted mean is the share asked for."""

from __future__ import annotations

from collections.abc import Mapping

from nni_prune_ext.errors import TargetError

_ROUNDS = 200


def scaled_ratios(
    relative: Mapping[str, float],
    sizes: Mapping[str, int],
    caps: Mapping[str, float],
    share: float,
    *,
    floors: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Scales relative ratios by one factor, cut off at each one's bounds, until ``share`` of everything goes.

    Args:
        relative: name → relative ratio, at least 0, at least one above 0.
        sizes: name → how many elements (channels) the ratio is of.
        caps: name → largest ratio allowed, 0–1.
        share: 0–1, of the sum of all sizes.
        floors: name → smallest ratio, at most its cap; 0 unless given. Together they must allow ``share``.

    Returns:
        name → ratio, 0–1; their mean weighted by ``sizes`` is ``share`` to within 1e-9.

    Raises:
        TargetError: the caps allow less than ``share``.
    """
    total = sum(sizes[name] for name in relative)

    least = floors or {}

    def bounded(factor: float) -> dict[str, float]:
        return {name: min(caps[name], max(factor * value, least.get(name, 0.0))) for name, value in relative.items()}

    def reached(factor: float) -> float:
        return sum(ratio * sizes[name] for name, ratio in bounded(factor).items()) / max(total, 1)

    most = sum(caps[name] * sizes[name] for name, value in relative.items() if value > 0) / max(total, 1)
    if share > most + 1e-12:
        at_cap = ", ".join(f"'{name}' ({caps[name]:g})" for name in list(relative)[:3])
        raise TargetError(
            f"A share of {share:g} cannot be reached: the largest ratios allowed leave {most:g}; the first are "
            f"{at_cap}. Raise max_sparse_ratio, or ask for less."
        )
    low, high = 0.0, 1.0
    while reached(high) < share - 1e-15 and high < 1e18:
        high *= 2
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        if reached(middle) < share:
            low = middle
        else:
            high = middle
    return bounded(high)
