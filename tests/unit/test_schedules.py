"""Schedules at the points that their papers give."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from nni_prune_ext.errors import PluginError, UnknownPluginError
from nni_prune_ext.mask_updates import everything, fourth_power, half_cosine
from nni_prune_ext.schedules import (
    SHORT_RESTRICTION,
    SHORT_RESTRICTION_COSINE,
    SchedulerSpec,
    agp,
    asfp,
    build_mask_update_rule,
    build_ratio_policy,
    build_schedule,
    cosine,
    linear,
    one_shot,
    replace_mask,
    rewinds,
    rounds_of_a_fifth,
    short_restriction,
    uniform_ratio,
)
from nni_prune_ext.testing import check_scheduler


def test_rounds_of_a_fifth_leave_four_fifths_of_what_is_left() -> None:
    gone = [(1 - 0.8**8) * rounds_of_a_fifth(k / 8) for k in range(9)]

    assert [1 - 0.8**k for k in range(9)] == pytest.approx(gone)
    assert 1.0 == rounds_of_a_fifth(1.0)
    assert rewinds("rewinding")
    assert not rewinds("agp")


def test_asfp_goes_through_its_three_points() -> None:
    assert [0.0, 0.75, 1.0] == pytest.approx([asfp(0.0), asfp(1 / 8), asfp(1.0)], abs=1e-12)


def test_asfp_is_exponential_so_what_is_left_falls_by_one_factor_per_step() -> None:
    steps = [asfp(k / 8) for k in range(9)]
    increments = [b - a for a, b in pairwise(steps)]

    assert [increments[1] / increments[0]] * 7 == pytest.approx([b / a for a, b in pairwise(increments)])


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 0.0), (0.25, 37 / 64), (0.5, 7 / 8), (1.0, 1.0)])
def test_agp_is_one_minus_the_cube_of_what_is_left(progress: float, expected: float) -> None:
    assert expected == pytest.approx(agp(progress))


def test_cosine_is_slow_at_both_ends_and_half_in_the_middle() -> None:
    assert [0.0, 0.5 - math.sqrt(0.125), 0.5, 1.0] == pytest.approx([cosine(p) for p in (0, 0.25, 0.5, 1)])


def test_one_shot_does_everything_at_once_and_linear_equal_shares() -> None:
    assert [0.0, 1.0, 1.0] == [one_shot(p) for p in (0.0, 0.01, 1.0)]
    assert [0.0, 0.3, 1.0] == [linear(p) for p in (0.0, 0.3, 1.0)]


def test_uniform_ratios_are_equal_and_the_replacing_rule_takes_what_is_proposed() -> None:
    old, proposed = torch.tensor([True, False]), torch.tensor([False, True])

    assert {"a": 1.0, "b": 1.0} == uniform_ratio({"a": [], "b": []}, {}, 0.5)
    assert [False, True] == replace_mask(old, proposed, torch.zeros(2), 0.5).tolist()


def test_schedulers_are_built_by_name_and_kind() -> None:
    assert 0.875 == build_schedule("agp")(0.5)
    assert {"a": 1.0} == build_ratio_policy("uniform_ratio")({"a": []}, {"a": 0.0}, 1.0)
    assert build_mask_update_rule("replace") is replace_mask


def test_a_scheduler_of_another_kind_is_refused_with_both_kinds() -> None:
    with pytest.raises(PluginError, match="'agp' is a schedule, expected a ratio policy"):
        build_ratio_policy("agp")
    with pytest.raises(PluginError, match="'uniform_ratio' is a ratio policy, expected a schedule"):
        build_schedule("uniform_ratio")


def test_an_unknown_scheduler_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UnknownPluginError, match="Did you mean 'cosine'"):
        build_schedule("cosin")


# -- the short restriction around any scores ---------------------------------------------------------------------

# Six channels; 4 and 5 are to come in for 0 and 1. Best pair: 5 (score 6) for 0 (score 1).
OLD = torch.tensor([True, True, True, False, False, False])
PROPOSED = torch.tensor([False, False, True, False, True, True])
SCORES = torch.tensor([1.0, 2.0, 3.5, 3.0, 5.0, 6.0])


@pytest.mark.parametrize("spec", [SHORT_RESTRICTION, SHORT_RESTRICTION_COSINE])
def test_a_short_restriction_replaces_the_mask_at_first_and_keeps_it_at_the_end(spec: SchedulerSpec) -> None:
    rule = spec.build()

    check_scheduler(spec)
    assert PROPOSED.tolist() == rule(OLD, PROPOSED, SCORES, 0.0).tolist()
    assert OLD.tolist() == rule(OLD, PROPOSED, SCORES, 1.0).tolist()


@pytest.mark.parametrize(("name", "progress", "pairs"), [
    ("short_restriction", 0.1, 2), ("short_restriction", 0.2, 1), ("short_restriction", 0.9, 1),
    ("short_restriction_cosine", 0.4, 2), ("short_restriction_cosine", 0.6, 1),
])  # fmt: skip
def test_a_short_restriction_makes_its_share_of_the_swaps_best_pairs_first(
    name: str, progress: float, pairs: int
) -> None:
    found = build_mask_update_rule(name)(OLD, PROPOSED, SCORES, progress)

    assert {2: PROPOSED.tolist(), 1: [False, True, True, False, False, True]}[pairs] == found.tolist()


@pytest.mark.parametrize("share", [fourth_power, half_cosine, everything, lambda progress: 0.0])
def test_changes_of_the_count_are_always_made_worst_and_best_first(share: Callable[[float], float]) -> None:
    rule = short_restriction(share)
    fewer, more = torch.arange(6) == 2, torch.ones(6, dtype=torch.bool)

    assert fewer.tolist() == rule(OLD, fewer, SCORES, 1.0).tolist()
    assert more.tolist() == rule(OLD, more, SCORES, 1.0).tolist()


def test_a_fall_of_the_count_takes_the_worst_and_leaves_swaps_to_the_share() -> None:
    proposed = torch.tensor([False, False, False, False, True, True])  # 0, 1 and 2 out, 4 and 5 in

    found = short_restriction(lambda progress: 0.0)(OLD, proposed, SCORES, 0.5)

    assert [False, True, True, False, False, False] == found.tolist()
