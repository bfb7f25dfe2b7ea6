"""How many swaps the short restriction makes: a rational share of those requested, rounded up exactly."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nni_prune_ext.mask_updates import SWAP_SHARES, Swaps, limited, rounded_up, swapped


@pytest.mark.parametrize("epochs", [5, 10, 20, 30])
def test_rounding_up_is_that_of_the_fraction_and_not_of_its_nearest_float(epochs: int) -> None:
    found, expected = [], []
    for epoch in range(epochs):
        exact = Fraction(epochs - epoch, epochs) ** 4
        for share in (SWAP_SHARES["fourth_power"](epoch / epochs), ((epochs - epoch) / epochs) ** 4):
            found += [rounded_up(share)(requested) for requested in range(3001)]
        expected += [math.ceil(exact * requested) for requested in range(3001)] * 2

    assert expected == found


@pytest.mark.parametrize("epochs", [5, 10, 20, 30])
def test_a_limited_proposal_makes_as_many_swaps_as_the_fraction_says(epochs: int) -> None:
    wrong = []
    for epoch, requested in itertools.product(range(epochs), (1, 2, 16, 81, 125, 500, 625, 1250, 2000, 3000)):
        old = torch.arange(2 * requested) < requested
        share = SWAP_SHARES["fourth_power"](epoch / epochs)
        expected = math.ceil(Fraction(epochs - epoch, epochs) ** 4 * requested)

        made = int((limited(old, ~old, torch.zeros(2 * requested), share) & ~old).sum())
        wrong += [(epoch, requested, expected, made)] if made != expected else []

    assert [] == wrong


def test_four_fifths_to_the_fourth_of_625_swaps_are_256() -> None:
    mask = torch.arange(1250) < 625

    found, swaps = swapped(mask, torch.arange(1250.0), rounded_up(0.8**4))

    assert 625 * 0.8**4 > 256, "the nearest float is above the fraction"
    assert Swaps(625, 256) == swaps
    assert 256 == int((found & ~mask).sum())


@given(st.floats(0, 1), st.integers(0, 5000))
def test_one_swap_at_least_is_made_at_any_share_and_never_more_than_are_requested(share: float, requested: int) -> None:
    some = share > 0 and requested > 0
    old = torch.arange(2 * requested) < requested

    made = rounded_up(share)(requested)

    assert int(some) <= made <= requested
    assert some or made == 0
    assert made == int((limited(old, ~old, torch.zeros(2 * requested), share) & ~old).sum())
