"""The rules for targets, against the published example and a slow loop over one image after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nni_prune_ext.gates.firing_targets import heat, mass_targets, uniform_targets, unit_heat

POSTER = (5.5, 7.9, 0.3, 8.6, 2.2, 3.1, 0.9)


def by_hand(values: list[float], mass: float) -> list[bool]:
    """The rule for one image as the notes have it, filter by filter, with sums in double precision."""
    if mass < 0 or sum(values) == 0:
        return [True] * len(values)
    shares = [value / sum(values) for value in values]
    if mass == 1:
        return [share > 1e-5 for share in shares]
    kept, total = [False] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda k: (-shares[k], k))):
        total += shares[place]
        kept[place] = rank == 0 or total <= mass + 1e-5
    return kept


def uniform_by_hand(values: list[float], removed: float) -> list[bool]:
    coldest = sorted(range(len(values)), key=lambda k: (values[k], k))[: int(removed * len(values))]
    kept = [k not in coldest and value > 1e-5 for k, value in enumerate(values)]
    kept[max(range(len(values)), key=lambda k: (values[k], -k))] = True
    return kept


EIGHTHS = st.integers(0, 64).map(lambda count: count / 8)
"""Exact in float32, so that ties and sums are the same however they are computed."""
LAYERS = st.integers(1, 12).flatmap(
    lambda units: st.lists(st.lists(EIGHTHS, min_size=units, max_size=units), min_size=1, max_size=4)
)


def near_a_boundary(values: list[float], mass: float) -> bool:
    """Says whether rounding could decide."""
    total, sums = 0.0, []
    for value in sorted(values, reverse=True):
        total += value
        sums.append(total / max(sum(values), 1e-30))
    return any(abs(own - mass - 1e-5) < 4e-6 for own in sums)


# -- heat --------------------------------------------------------------------------------------------------------------


def test_heat_is_the_largest_absolute_value_of_a_map() -> None:
    maps = torch.tensor([[[[1.0, -5.0], [2.0, 3.0]], [[0.0, 0.5], [0.0, 0.0]]]])

    assert [[5.0, 0.5]] == heat(maps).tolist()


def test_the_heat_of_a_block_is_the_sum_of_its_filters() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 0.0, 0.0, 3.0]])

    assert [[9.0, 6.0], [4.0, 0.0]] == unit_heat(values, torch.tensor([0, 1, 1, 0]), 2).tolist()
    assert [[0.0, 15.0], [0.0, 4.0]] == unit_heat(values, torch.tensor([1, 1, 1, 1]), 2).tolist()


def test_the_heat_of_single_filters_is_their_own() -> None:
    values = torch.rand(3, 5)

    assert torch.equal(values, unit_heat(values, torch.arange(5), 5))


# -- mass --------------------------------------------------------------------------------------------------------------


def test_the_example_of_the_poster_keeps_four_filters() -> None:
    kept = mass_targets(torch.tensor([POSTER]), 0.95)

    assert [[True, True, False, True, False, True, False]] == kept.tolist()


def test_the_filter_that_crosses_the_mass_goes() -> None:
    values = torch.tensor([[5.0, 3.0, 2.0]])

    assert [[True, False, False]] == mass_targets(values, 0.79).tolist()
    assert [[True, True, False]] == mass_targets(values, 0.8).tolist(), "exactly the mass stays"
    assert [[True, True, False]] == mass_targets(values, 0.99).tolist()
    assert [[True, True, False]] == mass_targets(values, 0.99995).tolist()
    assert [[True, True, True]] == mass_targets(values, 0.999995).tolist(), "within the tolerance of the code"


def test_a_mass_of_one_drops_what_activates_no_pixel() -> None:
    values = torch.tensor([[5.0, 0.0, 3.0, 1e-5], [0.0, 1.0, 0.0, 0.0]])

    assert [[True, False, True, False], [False, True, False, False]] == mass_targets(values, 1.0).tolist()


def test_a_negative_mass_keeps_everything() -> None:
    assert mass_targets(torch.tensor([[5.0, 0.0, 3.0]]), -1.0).all()


@pytest.mark.parametrize("mass", [0.0, 0.5, 1.0])
def test_a_layer_without_heat_keeps_everything_and_only_that_image_does(mass: float) -> None:
    kept = mass_targets(torch.tensor([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]]), mass)

    assert [[True, True, True], [True, False, False]] == kept.tolist()


@pytest.mark.parametrize("mass", [0.0, 0.3, 0.89])
def test_a_filter_that_holds_more_than_the_mass_is_kept_alone(mass: float) -> None:
    assert [[False, True, False]] == mass_targets(torch.tensor([[0.5, 9.0, 0.5]]), mass).tolist()


def test_equal_filters_stay_in_order() -> None:
    values = torch.full((1, 40), 0.5)

    assert [True] * 20 + [False] * 20 == mass_targets(values, 0.5)[0].tolist()


def test_tiny_and_huge_heats_follow_the_same_rule() -> None:
    values = torch.tensor([POSTER])

    expected = mass_targets(values, 0.9)
    assert torch.equal(expected, mass_targets(values * 1e-20, 0.9))
    assert torch.equal(expected, mass_targets(values * 1e20, 0.9))


@given(LAYERS, st.sampled_from([-1.0, 0.0, 0.2, 0.5, 0.77, 0.9, 0.95, 1.0]))
def test_mass_targets_are_those_of_a_slow_loop(layer: list[list[float]], mass: float) -> None:
    kept = mass_targets(torch.tensor(layer), mass).tolist()

    for values, found in zip(layer, kept):
        if not near_a_boundary(values, mass):
            assert by_hand(values, mass) == found


@given(LAYERS, st.floats(0, 0.999))
def test_the_mass_kept_is_never_more_than_asked_for_unless_one_filter_alone_is(
    layer: list[list[float]], mass: float
) -> None:
    kept = mass_targets(torch.tensor(layer), mass).tolist()

    for values, found in zip(layer, kept):
        chosen = [value for value, own in zip(values, found) if own]
        assert len(chosen) >= 1
        if sum(values):
            assert len(chosen) == 1 or sum(chosen) <= (mass + 2e-5) * sum(values)
            assert min(chosen) >= max([v for v, own in zip(values, found) if not own], default=0.0), "the hottest"


@given(LAYERS, st.floats(0, 1))
def test_an_image_is_judged_by_itself(layer: list[list[float]], mass: float) -> None:
    together = mass_targets(torch.tensor(layer), mass)

    alone = torch.cat([mass_targets(torch.tensor([values]), mass) for values in layer])
    assert torch.equal(alone, together)


@given(LAYERS, st.floats(0, 1), st.floats(0, 1))
def test_more_mass_keeps_all_that_less_mass_keeps(layer: list[list[float]], one: float, other: float) -> None:
    values = torch.tensor(layer)

    few, many = (mass_targets(values, mass) for mass in sorted((one, other)))

    tiny = values <= 2e-5 * values.sum(1, keepdim=True)  # a mass of 1 drops those, a mass below may keep them
    assert bool((~few | many | tiny).all())


# -- uniform -----------------------------------------------------------------------------------------------------------


def test_uniform_targets_drop_an_equal_share_of_the_coldest() -> None:
    values = torch.tensor([POSTER, POSTER[::-1]])

    kept = uniform_targets(values, 0.5)

    assert [[True, True, False, True, False, True, False], [False, True, False, True, False, True, True]] == (
        kept.tolist()
    )
    assert [7, 7] == uniform_targets(values, 0.14).sum(1).tolist(), "rounded down"
    assert [6, 6] == uniform_targets(values, 0.15).sum(1).tolist()


def test_uniform_targets_drop_what_is_cold_as_well_and_keep_at_least_one() -> None:
    values = torch.tensor([[5.0, 0.0, 1e-6, 3.0], [0.0, 0.0, 0.0, 0.0]])

    assert [[True, False, False, True], [True, False, False, False]] == uniform_targets(values, 0.25).tolist()
    assert [1, 1] == uniform_targets(values, 0.999).sum(1).tolist()


@given(LAYERS, st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 0.99]))
def test_uniform_targets_are_those_of_a_slow_loop(layer: list[list[float]], removed: float) -> None:
    kept = uniform_targets(torch.tensor(layer), removed).tolist()

    assert [uniform_by_hand(values, removed) for values in layer] == kept


@pytest.mark.parametrize("rule", [lambda v: mass_targets(v, 0.9), lambda v: uniform_targets(v, 0.3)])
def test_targets_are_bool_shaped_like_the_heat_and_leave_it_alone(rule: object) -> None:
    values = torch.rand(4, 6)
    before = values.clone()

    kept = rule(values)  # type: ignore[operator]

    assert isinstance(kept, Tensor)
    assert kept.dtype is torch.bool
    assert values.shape == kept.shape
    assert torch.equal(before, values)
