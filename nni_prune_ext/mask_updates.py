"""How a binary mask follows its scores: exact counts, best pairs first, and a limit on the swaps of one step.

A mask is a state, not a function of the scores: what is kept stays until something pruned scores strictly higher. The
limit is the short restriction of "Lottery Jackpots Exist in Pre-trained Models" (https://arxiv.org/abs/2104.08700), as
the authors' code of 2023 has it; its published schedule is not confirmed, see :data:`SWAP_SHARES`.

Departures: the authors' code skips a layer whose scores tie at the threshold. Here counts are exact with ties: of equal
scores the kept one stays, then the later position. The N:M form is ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nni_prune_ext.errors import ConfigError

ShareOfSwaps = Callable[[float], float]
"""Progress (0–1) → the share (0–1) of the requested swaps that are executed in one step."""
Allowed = Callable[[int], int]
"""Number of requested swaps → number that are made, at most as many."""


def fourth_power(progress: float) -> float:
    """Returns (1 − progress)⁴: 1, 0.32, 0.06, 0.004, 0 at 0, 1/4, 1/2, 3/4 and 1."""
    return (1.0 - progress) ** 4


def half_cosine(progress: float) -> float:
    """Returns half a cosine wave from 1 to 0: 1, 0.85, 0.5, 0.15, 0 at 0, 1/4, 1/2, 3/4 and 1."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def everything(progress: float) -> float:
    """Returns 1: no restriction."""
    return 1.0


SWAP_SHARES: Mapping[str, ShareOfSwaps] = {
    "fourth_power": fourth_power,
    "cosine": half_cosine,
    "one": everything,
}
"""The schedules that occur in the authors' code. It rounds the fourth power up to 1 and returns 1 after computing the
cosine, so as released nothing is restricted; that the rounding belongs to the number of pairs is our reading."""


class Swaps(NamedTuple):
    """How many swaps a step asked for, and how many were made: pairs of entries, or groups of an N:M pattern."""

    requested: int
    executed: int


class Pattern(NamedTuple):
    """At most ``keep`` of every ``of`` consecutive input channels are kept."""

    keep: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Reads ``N:M``, for example ``2:4``.

        Raises:
            ConfigError: it is not of that form, or not 0 < N < M.
        """
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
        if match is None or not 0 < int(match[1]) < int(match[2]):
            raise ConfigError(
                f"Cannot read the pattern '{text}'. Expected N:M with 0 < N < M, N of M consecutive input channels "
                "being kept. Write for example 2:4."
            )
        return cls(int(match[1]), int(match[2]))

    @property
    def sparsity(self) -> float:
        """Returns the share of zeros, 0–1."""
        return 1 - self.keep / self.of

    def rows(self, values: Tensor, fill: float) -> Tensor:
        """Returns ``(groups, of)``: the input channels of every filter and tap, filled up to a multiple of ``of``.

        Args:
            values: ``(C_out, C_in, …)``.
        """
        last = values.movedim(1, -1)
        missing = -last.shape[-1] % self.of
        return torch.nn.functional.pad(last, (0, missing), value=fill).reshape(-1, self.of)

    def tensor(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Returns rows as the tensor ``(C_out, C_in, …)`` that they were made from."""
        moved = torch.Size([shape[0], *shape[2:], shape[1] + -shape[1] % self.of])
        return rows.reshape(moved)[..., : shape[1]].movedim(-1, 1).contiguous()


def best(scores: Tensor, keep: int) -> Tensor:
    """Returns the bool mask of exactly ``keep`` highest scores; of equal ones the later positions.

    Args:
        scores: of any shape.
    """
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().argsort(stable=True)[scores.numel() - keep :]] = True
    return mask.reshape(scores.shape)


def rounded_up(share: float) -> Allowed:
    """Returns the authors' rule: of ``n`` requested swaps, ``ceil(share × n)`` are made, at least one."""
    return lambda requested: _rounded_up(share, requested)


class Credit:
    """Makes a share of the requested swaps on average over steps, where rounding up would always let one through.

    Attributes:
        saved: part of a swap that is saved up.
    """

    def __init__(self, saved: float = 0.0) -> None:
        self.saved = saved

    def rule(self, share: float) -> Allowed:
        """Returns the rule of one step."""

        def allowed(requested: int) -> int:
            total = min(self.saved, 1.0) + share * requested
            made = min(math.floor(total + 1e-9), requested)
            self.saved = total - made
            return made

        return allowed


def swapped(mask: Tensor, scores: Tensor, allowed: Allowed) -> tuple[Tensor, Swaps]:
    """Returns the mask after one step of the short restriction, with exactly as many entries kept as before.

    A swap is requested for every pair of a pruned and a kept entry, best and worst first, in which the pruned one
    scores strictly higher; some of them are made, best pairs first. If all are, the mask becomes the exact top-k. Only
    entries that could take part in a swap are sorted.

    Args:
        mask: bool, ``True`` = kept; any shape.
        scores: of the same shape, higher = keep; finite.
        allowed: requested swaps → how many are made.
    """
    flat, values = mask.flatten(), scores.detach().flatten()
    lowest = torch.where(flat, values, torch.inf).amin() if len(values) else values.sum()
    highest = torch.where(flat, -torch.inf, values).amax() if len(values) else values.sum()
    if not bool(highest > lowest):
        return mask, Swaps(0, 0)
    entering, leaving = _candidates(flat, values, lowest, highest)
    pairs = min(len(entering), len(leaving))
    requested = int((values[entering[:pairs]] > values[leaving[:pairs]]).sum())
    executed = allowed(requested)
    result = flat.clone()
    result[entering[:executed]] = True
    result[leaving[:executed]] = False
    return result.reshape(mask.shape), Swaps(requested, executed)


def swapped_groups(mask: Tensor, scores: Tensor, allowed: Allowed, *, pattern: Pattern) -> tuple[Tensor, Swaps]:
    """Returns the mask after one step of the short restriction inside the groups of an N:M pattern.

    A group asks for a change if its best N are others than those kept; as many groups as allowed get theirs, those with
    the largest gain of scores first. The pattern holds before and after.

    Args:
        mask: ``(C_out, C_in, …)`` bool.
        scores: of the same shape.
        allowed: number of groups that ask → how many get theirs.
    """
    kept, values = pattern.rows(mask, False), pattern.rows(scores.detach(), -torch.inf)
    asking = torch.where(kept, -torch.inf, values).amax(1) > torch.where(kept, values, torch.inf).amin(1)
    rows = asking.nonzero()[:, 0]
    executed = allowed(len(rows))
    if not executed:
        return mask, Swaps(len(rows), 0)
    better = best_of_rows(values[rows], pattern.keep, kept[rows])
    gain = _sum(values[rows], better) - _sum(values[rows], kept[rows])
    chosen = gain.argsort(descending=True, stable=True)[:executed]
    result = kept.clone()
    result[rows[chosen]] = better[chosen]
    return pattern.tensor(result, mask.shape), Swaps(len(rows), executed)


def best_of_rows(values: Tensor, keep: int, kept: Tensor | None = None) -> Tensor:
    """Returns the bool mask of the ``keep`` highest values of every row; of equal ones those already kept, then later.

    Args:
        values: ``(rows, M)``.
    """
    incumbents = torch.zeros_like(values, dtype=torch.uint8) if kept is None else kept.to(torch.uint8)
    order = incumbents.argsort(stable=True, dim=1)
    order = order.gather(1, values.gather(1, order).argsort(stable=True, dim=1))
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, order[:, values.shape[1] - keep :], True)


def limited(old: Tensor, proposed: Tensor, scores: Tensor, share: float) -> Tensor:
    """Returns a proposed mask of which only a share of the swaps is made, best pairs first.

    What a change of the number of kept entries needs is made in any case.

    Args:
        old: ``(C,)`` bool, the mask in use.
        proposed: ``(C,)`` bool.
        scores: ``(C,)``, higher = keep.
        share: 0–1.
    """
    entering = _ordered(scores, (~old & proposed).nonzero()[:, 0]).flip(0)
    leaving = _ordered(scores, (old & ~proposed).nonzero()[:, 0])
    made = _rounded_up(share, min(len(entering), len(leaving)))
    result = old.clone()
    result[entering[: made + max(len(entering) - len(leaving), 0)]] = True
    result[leaving[: made + max(len(leaving) - len(entering), 0)]] = False
    return result


def _rounded_up(share: float, count: int) -> int:
    """Returns ``ceil(share × count)``; a product that a rounding error lifts above a whole number is that number."""
    product = share * count
    return min(math.ceil(product - 1e-12 * max(product, 1.0)) or int(product > 0), count)


def _candidates(mask: Tensor, values: Tensor, lowest: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the pruned entries above the worst kept, best first, and the kept below the best pruned, worst first."""
    entering = (~mask & (values > lowest)).nonzero()[:, 0]
    leaving = (mask & (values < highest)).nonzero()[:, 0]
    return _ordered(values, entering).flip(0), _ordered(values, leaving)


def _ordered(scores: Tensor, positions: Tensor) -> Tensor:
    return positions[scores[positions].argsort(stable=True)]


def _sum(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0).sum(1)
