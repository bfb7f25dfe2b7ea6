"""Stratified, seeded splits by index."""

from __future__ import annotations

import torch
from torch import Tensor

from nni_prune_ext.errors import DataError


def split_off(labels: Tensor, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `count` indices so that every class gives its share, to within one image.

    Systematic sampling: with the images shuffled and then sorted by class, every (N / count)-th is taken.

    Args:
        labels: (N,) int64 on the CPU.
        count: How many to draw, from 0 to N.
        seed: Same seed, same draw.

    Returns:
        The indices left and the indices drawn, both int64 and ascending.
    """
    total = len(labels)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(total, generator=generator)
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    start = int(torch.randint(max(total, 1), (1,), generator=generator))
    steps = (torch.arange(total + 1) * count + start).div(max(total, 1), rounding_mode="floor")
    drawn = steps[1:] > steps[:-1]
    return by_class[~drawn].sort().values, by_class[drawn].sort().values


def split_off_share(labels: Tensor, share: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Draw a share (0–1) of the indices as `split_off` does, at least one, and leave at least one.

    Raises:
        DataError: if there are fewer than two images.
    """
    total = len(labels)
    if total < 2:
        raise DataError(
            f"A set of {total} image(s) cannot be divided, expected at least 2: one to keep and one to split off. "
            f"Add images, or give the splits as folders."
        )
    return split_off(labels, min(max(round(share * total), 1), total - 1), seed=seed)
