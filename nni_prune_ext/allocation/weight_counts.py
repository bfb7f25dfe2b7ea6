"""How many single weights of each tensor are masked: one global threshold, or one share for all."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nni_prune_ext.allocation.targets import Limits, Scope
from nni_prune_ext.errors import TargetError


def masked_counts(
    magnitudes: Mapping[str, Tensor], sparsity: float, *, scope: Scope = "global", limits: Limits | None = None
) -> dict[str, int]:
    """Returns tensor name → number of weights to mask.

    Args:
        magnitudes: tensor name → magnitudes, comparable among tensors.
        sparsity: share of all these weights, 0–1; never less is masked.
        scope: ``global`` masks what lies below one threshold over all tensors, ``local`` the same share of each.
        limits: only its limits of single layers count (``layers``); at least one weight of every tensor stays.

    Raises:
        TargetError: the limits allow no such sparsity.
    """
    names = list(magnitudes)
    sizes = [magnitudes[name].numel() for name in names]
    bounds = [_bounds(name, size, limits) for name, size in zip(names, sizes)]
    wanted = math.ceil(sparsity * sum(sizes) - 1e-9)
    if sum(most for _, most in bounds) < wanted:
        raise TargetError(
            f"A sparsity of {sparsity:g} cannot be reached: the limits let {sum(most for _, most in bounds):,} of "
            f"{sum(sizes):,} weights go, expected at least {wanted:,}. Raise max_ratio of a layer, or ask for less."
        )
    owner = _order(magnitudes, sizes, scope)
    low, high = 0, len(owner)
    while low < high:
        middle = (low + high) // 2
        if sum(_clipped(owner, middle, bounds)) >= wanted:
            high = middle
        else:
            low = middle + 1
    return dict(zip(names, _clipped(owner, low, bounds)))


def _bounds(name: str, size: int, limits: Limits | None) -> tuple[int, int]:
    """Returns the smallest and the largest number of weights that may go."""
    layer = name.removesuffix(".weight")
    own = None
    if limits is not None:
        own = next((limit for pattern, limit in limits.layers.items() if fnmatch.fnmatchcase(layer, pattern)), None)
    if own is None:
        return 0, size - 1
    most = min(math.floor(size * own.max_ratio + 1e-9), size - 1)
    return min(math.floor(size * own.min_ratio + 1e-9), most), most


def _order(magnitudes: Mapping[str, Tensor], sizes: Sequence[int], scope: Scope) -> Tensor:
    """Returns which tensor loses a weight next, for all weights in turn."""
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    if scope == "global":
        keys = torch.cat([values.detach().flatten().float().cpu() for values in magnitudes.values()])
    else:
        keys = torch.cat([torch.arange(1, size + 1).double() / size for size in sizes])
    return owner[keys.argsort(stable=True)]


def _clipped(owner: Tensor, prefix: int, bounds: Sequence[tuple[int, int]]) -> list[int]:
    counts = torch.bincount(owner[:prefix], minlength=len(bounds)).tolist()
    return [min(max(count, least), most) for count, (least, most) in zip(counts, bounds)]
