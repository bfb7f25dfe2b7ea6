"""Blocks of filters that are switched together: which filters share one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nni_prune_ext.errors import ConfigError

BLOCKS = (1, 4, 8, 16)
"""Filters that may be switched together, at most; the choices of FTWT's option ``block``."""
_FEWEST = 4
"""Blocks that a layer has at least."""


def check_block(block: int) -> None:
    """Refuses sizes of blocks that are no choice.

    Raises:
        ConfigError: it is not 1, 4, 8 or 16.
    """
    if block not in BLOCKS:
        raise ConfigError(
            f"The block is {block}, expected one of {', '.join(str(size) for size in BLOCKS)}: filters that are "
            "switched together, at most. 1 is single filters."
        )


def block_units(heats: Mapping[str, Tensor], wanted: Callable[[Tensor], Tensor], block: int) -> dict[str, Tensor]:
    """Returns layer → the unit of every filter, ``(C,)`` int64: blocks of filters that fire for the same images.

    Args:
        heats: layer → heat of every filter for every image, ``(N, C)``.
        wanted: heats → which filters are needed, ``(N, C)`` bool.
        block: filters per block, at most.
    """
    units = {}
    for layer, own in heats.items():
        size = block_size(own.shape[1], block)
        units[layer] = firing_together(wanted(own), size) if size > 1 else torch.arange(own.shape[1])
    return units


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
