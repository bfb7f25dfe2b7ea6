"""Blocks of filters that are switched together: which filters share one."""

from __future__ import annotations

import torch
from torch import Tensor

_FEWEST = 4
"""Blocks that a layer has at least."""


def block_size(channels: int, largest: int) -> int:
    """Returns the size of the blocks of a layer: ``largest``, or half of it again and again, down to 4.

    It leaves at least 4 blocks and divides the number of channels; 1 where none does.
    """
    size = largest
    while size >= 4:
        if channels % size == 0 and channels // size >= _FEWEST:
            return size
        size //= 2
    return 1


def firing_together(firing: Tensor, size: int) -> Tensor:
    """Returns the block of every filter, ``(C,)`` int64, so that filters that fire for the same images share one.

    Block after block: the filter that fires most often among those left, and the others whose firing agrees with it for
    most images (matching coefficient); ties go to the first.

    Args:
        firing: which filters are wanted, ``(N, C)`` bool.
        size: filters per block; divides C.
    """
    images, channels = firing.shape
    values = firing.double()
    both = values.T @ values
    counts = both.diagonal()
    agreement = (both + (images - counts[:, None] - counts[None] + both)) / images
    left = torch.ones(channels, dtype=torch.bool)
    blocks = torch.zeros(channels, dtype=torch.int64)
    for block in range(channels // size):
        first = int(torch.where(left, counts, -1.0).argmax())
        closeness = torch.where(left, agreement[first], -1.0)
        closeness[first] = 2.0
        members = closeness.argsort(descending=True, stable=True)[:size]
        blocks[members], left[members] = block, False
    return blocks
