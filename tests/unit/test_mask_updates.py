"""Masks follow their scores: against sorting in plain Python, against all masks there are, ties and counts exact."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.mask_updates import (
    SWAP_SHARES,
    Credit,
    Pattern,
    Swaps,
    best,
    best_of_rows,
    limited,
    rounded_up,
    swapped,
    swapped_groups,
)

SHARES = st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.3, 0.5, 0.75, 0.9, 1.0])


@st.composite
def masks_and_scores(draw: st.DrawFn, most: int = 40) -> tuple[Tensor, Tensor]:
    """Draws a mask and scores of one size, with many ties."""
    size = draw(st.integers(1, most))
    mask = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    width = draw(st.sampled_from([0, 2, 50]))
    scores = draw(st.lists(st.integers(-width, width), min_size=size, max_size=size))
    return torch.tensor(mask), torch.tensor(scores, dtype=torch.float32)


def top(mask: Tensor, scores: Tensor) -> set[int]:
    """Returns the kept positions of the exact top-k: ties to what is kept, then to the later position."""
    ranked = sorted(range(len(mask)), key=lambda i: (float(scores[i]), bool(mask[i]), i))
    return set(ranked[len(mask) - int(mask.sum()) :])


def kept(mask: Tensor) -> set[int]:
    return set(mask.nonzero()[:, 0].tolist())


# -- masks of exact counts ---------------------------------------------------------------------------------------


@given(masks_and_scores(), st.data())
def test_the_best_are_exactly_as_many_and_none_left_out_is_better(
    drawn: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    scores = drawn[1]
    count = data.draw(st.integers(0, len(scores)))

    mask = best(scores, count)

    order = np.lexsort((np.arange(len(scores)), scores.numpy()))
    assert set(order[len(scores) - count :].tolist()) == kept(mask)


def test_the_best_of_a_tensor_of_any_shape_have_its_shape() -> None:
    assert [[[True], [False]], [[False], [True]]] == best(torch.tensor([[[3.0], [1.0]], [[2.0], [9.0]]]), 2).tolist()


@given(masks_and_scores())
def test_without_a_restriction_a_mask_becomes_the_exact_top_k(drawn: tuple[Tensor, Tensor]) -> None:
    mask, scores = drawn
    before = mask.clone()

    found, swaps = swapped(mask, scores, rounded_up(1.0))

    expected = top(mask, scores)
    assert expected == kept(found)
    assert Swaps(len(expected - kept(mask)), len(expected - kept(mask))) == swaps
    assert torch.equal(before, mask)


@given(masks_and_scores(), SHARES)
def test_a_share_swaps_that_many_of_the_requested_pairs_rounded_up_best_first(
    drawn: tuple[Tensor, Tensor], share: float
) -> None:
    mask, scores = drawn
    entering = sorted(top(mask, scores) - kept(mask), key=lambda i: (float(scores[i]), i), reverse=True)
    leaving = sorted(kept(mask) - top(mask, scores), key=lambda i: (float(scores[i]), i))
    pairs = math.ceil(share * len(entering))

    found, swaps = swapped(mask, scores, rounded_up(share))

    assert Swaps(len(entering), pairs) == swaps
    assert kept(mask) - set(leaving[:pairs]) | set(entering[:pairs]) == kept(found)
    assert int(mask.sum()) == int(found.sum())


@given(masks_and_scores(most=7), SHARES)
def test_no_other_mask_with_as_many_swaps_scores_higher(drawn: tuple[Tensor, Tensor], share: float) -> None:
    mask, scores = drawn
    found, swaps = swapped(mask, scores, rounded_up(share))

    totals = [float(scores[other].sum()) for other in _masks_at(mask, swaps.executed)]

    assert max(totals) == float(scores[found].sum())
    assert swaps.executed == int((found & ~mask).sum()) == int((mask & ~found).sum())


def _masks_at(mask: Tensor, pairs: int) -> Iterator[Tensor]:
    """Yields every mask that so many swaps away from one."""
    for enter in itertools.combinations((~mask).nonzero()[:, 0].tolist(), pairs):
        for leave in itertools.combinations(mask.nonzero()[:, 0].tolist(), pairs):
            other = mask.clone()
            other[list(enter)] = True
            other[list(leave)] = False
            yield other


def test_equal_scores_ask_for_no_swap() -> None:
    mask = torch.tensor([False, True, False, True])

    found, swaps = swapped(mask, torch.full((4,), 0.5), rounded_up(1.0))

    assert (mask.tolist(), Swaps(0, 0)) == (found.tolist(), swaps)


def test_risen_scores_that_tie_with_kept_ones_change_nothing_and_those_above_are_swapped() -> None:
    # Fifty pruned scores rise to the score of the kept ones: the authors' code then skips the layer for good.
    mask = torch.arange(100) < 50
    tied = torch.ones(100)
    above = tied.clone()
    above[[60, 70]] = 2.0

    same, none = swapped(mask, tied, rounded_up(1.0))
    assert (50, Swaps(0, 0)) == (int(same[:50].sum()), none)
    found, swaps = swapped(mask, above, rounded_up(1.0))

    assert Swaps(2, 2) == swaps
    assert {*range(2, 50), 60, 70} == kept(found)


def test_scores_count_with_their_sign() -> None:
    found, _ = swapped(torch.tensor([True, False]), torch.tensor([-5.0, 1.0]), rounded_up(1.0))

    assert [False, True] == found.tolist()


@pytest.mark.parametrize("mask", [torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)])
def test_a_mask_that_keeps_all_or_nothing_stays(mask: Tensor) -> None:
    found, swaps = swapped(mask, torch.arange(4.0), rounded_up(1.0))

    assert (mask.tolist(), Swaps(0, 0)) == (found.tolist(), swaps)


def test_an_empty_mask_stays_empty() -> None:
    found, swaps = swapped(torch.zeros(0, 3, dtype=torch.bool), torch.zeros(0, 3), rounded_up(1.0))

    assert ((0, 3), Swaps(0, 0)) == (tuple(found.shape), swaps)


def test_a_mask_of_any_shape_is_swapped_over_all_of_its_dimensions() -> None:
    mask = torch.tensor([[True, False], [True, False]])

    found, swaps = swapped(mask, torch.tensor([[1.0, 4.0], [3.0, 2.0]]), rounded_up(1.0))

    assert ([[False, True], [True, False]], Swaps(1, 1)) == (found.tolist(), swaps)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("fourth_power", [1.0, 0.75**4, 0.0625, 0.25**4, 0.0]),
        ("cosine", [1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0.0]),
        ("one", [1.0] * 5),
    ],
)
def test_shares_of_swaps_fall_as_published_formulas_say(name: str, values: list[float]) -> None:
    assert values == pytest.approx([SWAP_SHARES[name](progress) for progress in (0, 0.25, 0.5, 0.75, 1)])


# -- how many of the requested swaps are made --------------------------------------------------------------------


@given(SHARES, st.integers(0, 1000))
def test_rounding_up_makes_one_swap_at_least_unless_the_share_is_zero(share: float, requested: int) -> None:
    made = rounded_up(share)(requested)

    assert share * requested <= made < share * requested + 1
    assert (made > 0) == (share > 0 and requested > 0)


@given(SHARES, st.integers(1, 30), st.integers(0, 10**6))
def test_a_credit_makes_the_share_on_average_and_never_more_than_is_requested(
    share: float, most: int, seed: int
) -> None:
    requested = np.random.default_rng(seed).integers(0, most + 1, 400).tolist()
    credit, made, asked = Credit(), 0, 0

    for count in requested:
        now = credit.rule(share)(count)
        assert 0 <= now <= count
        assert share < 1 or now == count
        made, asked = made + now, asked + count
        # Behind by less than one swap at every moment: nothing is made in advance, nothing is lost.
        assert share * asked - 1 < made <= share * asked + 1e-6
        assert share * asked - made == pytest.approx(credit.saved, abs=1e-6)


def test_a_single_pending_swap_is_let_through_about_every_tenth_step_at_a_share_of_a_tenth() -> None:
    credit = Credit()

    made = [credit.rule(0.1)(1) for _ in range(100)]

    assert [step for step, count in enumerate(made, 1) if count] == list(range(10, 101, 10))
    assert [1] * 100 == [rounded_up(0.1)(1) for _ in range(100)]


def test_no_swap_is_made_at_a_share_of_zero_whatever_was_saved() -> None:
    credit = Credit()
    for _ in range(9):
        credit.rule(0.11)(1)
    assert 0.99 == pytest.approx(credit.saved)

    assert [0] * 50 == [credit.rule(0.0)(count) for count in range(50)]


def test_a_credit_is_never_more_than_one_swap_and_lets_no_more_through_than_are_requested() -> None:
    credit = Credit(5.0)

    assert 3 == credit.rule(1.0)(3)
    assert 1.0 == credit.saved


def test_a_credit_goes_on_where_it_was_saved() -> None:
    whole, first = Credit(), Credit()
    expected = [whole.rule(0.3)(2) for _ in range(20)]

    found = [first.rule(0.3)(2) for _ in range(7)]
    second = Credit(first.saved)
    found += [second.rule(0.3)(2) for _ in range(13)]

    assert expected == found


def test_only_as_many_pairs_are_swapped_as_the_rule_allows_best_first() -> None:
    mask = torch.tensor([True, True, False, False])

    found, swaps = swapped(mask, torch.tensor([1.0, 2.0, 3.0, 4.0]), lambda requested: requested - 1)

    assert ([False, True, False, True], Swaps(2, 1)) == (found.tolist(), swaps)


# -- N:M ---------------------------------------------------------------------------------------------------------

SHAPES = [(2, 8, 3, 3), (3, 6, 1, 2), (2, 5, 2), (4, 7), (1, 3, 2, 2)]
PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(1, 2), Pattern(3, 5)]


def groups_of(shape: tuple[int, ...], pattern: Pattern) -> list[list[tuple[int, ...]]]:
    """Returns the positions of every group, by hand: filters, then taps, then blocks of input channels."""
    found = []
    for out, *tap in itertools.product(range(shape[0]), *map(range, shape[2:])):
        for first in range(0, shape[1], pattern.of):
            block = range(first, min(first + pattern.of, shape[1]))
            found.append([(out, channel, *tap) for channel in block])
    return found


def valid(mask: Tensor, pattern: Pattern) -> bool:
    """Says whether every group keeps N, or all that it has."""
    sums = [(sum(bool(mask[place]) for place in group), len(group)) for group in groups_of(tuple(mask.shape), pattern)]
    return all(count == min(pattern.keep, size) for count, size in sums)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_hold_consecutive_input_channels_and_come_back(shape: tuple[int, ...], pattern: Pattern) -> None:
    values = torch.arange(math.prod(shape)).reshape(shape).float()

    rows = pattern.rows(values, -1.0)

    expected = [[float(values[place]) for place in group] for group in groups_of(shape, pattern)]
    assert [row + [-1.0] * (pattern.of - len(row)) for row in expected] == rows.tolist()
    assert torch.equal(values, pattern.tensor(rows, values.shape))
    assert pattern.tensor(rows, values.shape).is_contiguous()


@given(st.sampled_from(SHAPES), st.sampled_from(PATTERNS), SHARES, st.integers(0, 10**6))
def test_a_share_of_the_asking_groups_gets_its_best_those_with_the_largest_gain_first(
    shape: tuple[int, ...], pattern: Pattern, share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, 4, shape, generator=generator).float()
    scores = torch.randint(-3, 4, shape, generator=generator).float()
    mask = pattern.tensor(best_of_rows(pattern.rows(first, -torch.inf), pattern.keep), first.shape)
    changes = []
    for number, group in enumerate(groups_of(shape, pattern)):
        ranked = sorted(group, key=lambda p: (float(scores[p]), bool(mask[p]), p[1]))
        new, old = set(ranked[-pattern.keep :]), {p for p in group if mask[p]}
        gain = sum(float(scores[p]) for p in new) - sum(float(scores[p]) for p in old)
        if new != old:
            changes.append((-gain, number, old, new))
    expected = mask.clone()
    for _, _, old, new in sorted(changes, key=lambda change: change[:2])[: math.ceil(share * len(changes))]:
        for place in old:
            expected[place] = False
        for place in new:
            expected[place] = True

    found, swaps = swapped_groups(mask, scores, rounded_up(share), pattern=pattern)

    assert valid(mask, pattern)
    assert valid(found, pattern)
    assert torch.equal(expected, found)
    assert Swaps(len(changes), math.ceil(share * len(changes))) == swaps


def test_equal_scores_ask_for_no_change_of_a_group() -> None:
    mask = torch.tensor([[True, False, True, False], [False, False, True, True]])

    found, swaps = swapped_groups(mask, torch.ones(2, 4), rounded_up(1.0), pattern=Pattern(2, 4))

    assert (mask.tolist(), Swaps(0, 0)) == (found.tolist(), swaps)


@pytest.mark.parametrize(("text", "pattern"), [("2:4", (2, 4)), (" 1 : 2 ", (1, 2)), ("4:16", (4, 16))])
def test_a_pattern_is_read(text: str, pattern: tuple[int, int]) -> None:
    assert pattern == Pattern.parse(text)
    assert 1 - pattern[0] / pattern[1] == Pattern.parse(text).sparsity


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "2-4", "2:", "", "-1:4", "2:4:8", "1.5:4"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="Expected N:M with 0 < N < M"):
        Pattern.parse(text)


# -- the limit on proposals of others ----------------------------------------------------------------------------


@given(masks_and_scores(), st.data(), SHARES)
def test_a_limited_proposal_keeps_its_count_and_makes_a_share_of_its_swaps(
    drawn: tuple[Tensor, Tensor], data: st.DataObject, share: float
) -> None:
    old, scores = drawn
    proposed = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(old), max_size=len(old))))
    entering = sorted(kept(proposed) - kept(old), key=lambda i: (float(scores[i]), i), reverse=True)
    leaving = sorted(kept(old) - kept(proposed), key=lambda i: (float(scores[i]), i))
    pairs = math.ceil(share * min(len(entering), len(leaving)))
    more, fewer = max(len(entering) - len(leaving), 0), max(len(leaving) - len(entering), 0)

    found = limited(old, proposed, scores, share)

    assert int(proposed.sum()) == int(found.sum())
    assert kept(old) - set(leaving[: pairs + fewer]) | set(entering[: pairs + more]) == kept(found)
    if share == 1.0:
        assert torch.equal(proposed, found)
