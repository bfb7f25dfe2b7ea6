"""Splits are stratified, disjoint, complete and repeatable."""

from __future__ import annotations

import pytest
import torch

from nni_prune_ext.data.splitting import split_off, split_off_share
from nni_prune_ext.errors import DataError


def test_a_split_is_disjoint_and_complete() -> None:
    labels = torch.arange(103) % 4

    rest, drawn = split_off(labels, 20, seed=1)

    assert list(range(103)) == sorted(rest.tolist() + drawn.tolist())
    assert 20 == len(drawn)


@pytest.mark.parametrize("seed", range(5))
def test_every_class_gives_its_share_to_within_one_image(seed: int) -> None:
    sizes = [50, 30, 15, 7]
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))

    _, drawn = split_off(labels, 25, seed=seed)

    for size, count in zip(sizes, labels[drawn].bincount(minlength=4).tolist(), strict=True):
        assert abs(size * 25 / sum(sizes) - count) < 1


def test_classes_of_one_image_each_are_divided_too() -> None:
    _, drawn = split_off(torch.arange(10), 4, seed=0)

    assert 4 == len(drawn)


def test_the_seed_decides_the_split() -> None:
    labels = torch.zeros(100, dtype=torch.int64)

    first, again, other = (split_off(labels, 10, seed=seed)[1] for seed in (0, 0, 1))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("share", "expected"), [(0.001, 1), (0.5, 5), (0.999, 9)])
def test_a_share_leaves_at_least_one_image_on_each_side(share: float, expected: int) -> None:
    _, drawn = split_off_share(torch.zeros(10, dtype=torch.int64), share, seed=0)

    assert expected == len(drawn)


def test_one_image_cannot_be_divided() -> None:
    with pytest.raises(DataError, match="expected at least 2"):
        split_off_share(torch.zeros(1, dtype=torch.int64), 0.5, seed=0)
