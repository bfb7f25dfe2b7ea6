"""Data-free importance of the slices of one weight tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def slice_rows(weight: Tensor, dim: int) -> Tensor:
    """Returns ``(size of dim, rest)`` float32: one row per index of ``dim``."""
    return weight.detach().movedim(dim, 0).flatten(1).float() if weight.dim() > 1 else weight.detach().float()[:, None]


def l1_norm(rows: Tensor) -> Tensor:
    """Returns the mean magnitude of each row, ``(R,)``.

    Li et al., "Pruning Filters for Efficient ConvNets", 2017, https://arxiv.org/abs/1608.08710, use the sum; within one
    layer the order is the same.
    """
    return rows.abs().mean(1)


def l2_norm(rows: Tensor) -> Tensor:
    """Returns the root mean square of each row, ``(R,)``."""
    return rows.square().mean(1).sqrt()


def geometric_median_distance(rows: Tensor) -> Tensor:
    """Returns the summed Euclidean distance of each row to all rows, ``(R,)``: small = replaceable by others.

    He et al., "Filter Pruning via Geometric Median" (FPGM), 2019, https://arxiv.org/abs/1811.00250, section 3.4.
    """
    exact = rows.double()  # equal rows have distance 0, which the fast float32 path of cdist misses by 1e-3
    return torch.cdist(exact, exact).sum(1).to(rows.dtype)
