"""Schedules at the points that their papers give."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from nni_prune_ext.errors import PluginError, UnknownPluginError
from nni_prune_ext.schedules import (
    agp,
    asfp,
    build_mask_update_rule,
    build_ratio_policy,
    build_schedule,
    cosine,
    linear,
    one_shot,
    replace_mask,
    uniform_ratio,
)


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
