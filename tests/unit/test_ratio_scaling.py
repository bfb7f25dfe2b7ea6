"""Relative ratios are scaled by one factor to the share asked for, with caps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nni_prune_ext.allocation.ratio_scaling import scaled_ratios
from nni_prune_ext.errors import TargetError


def test_ratios_keep_their_proportions_and_their_weighted_mean_is_the_share() -> None:
    found = scaled_ratios({"a": 2.0, "b": 1.0}, {"a": 10, "b": 30}, {"a": 1.0, "b": 1.0}, 0.25)

    # 10 · 2f + 30 · f = 10, so f = 0.2
    assert {"a": pytest.approx(0.4), "b": pytest.approx(0.2)} == found


def test_what_a_cap_withholds_the_others_give() -> None:
    found = scaled_ratios({"a": 2.0, "b": 1.0}, {"a": 10, "b": 30}, {"a": 0.1, "b": 1.0}, 0.25)

    assert {"a": pytest.approx(0.1), "b": pytest.approx(0.3)} == found


def test_a_share_beyond_the_caps_is_refused_with_the_most_that_they_allow() -> None:
    with pytest.raises(TargetError, match=r"0.5 cannot be reached.*leave 0.2"):
        scaled_ratios({"a": 1.0, "b": 1.0}, {"a": 10, "b": 10}, {"a": 0.2, "b": 0.2}, 0.5)


def test_what_has_no_share_of_its_own_stays() -> None:
    assert 0.0 == scaled_ratios({"a": 0.0, "b": 1.0}, {"a": 10, "b": 10}, {"a": 1.0, "b": 1.0}, 0.5)["a"]


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 512), st.floats(0.01, 1.0)), min_size=1, max_size=8),
    st.floats(0.0, 1.0),
)
def test_any_reachable_share_is_met(groups: list[tuple[float, int, float]], part: float) -> None:
    relative = {str(k): value for k, (value, _, _) in enumerate(groups)}
    sizes = {str(k): size for k, (_, size, _) in enumerate(groups)}
    caps = {str(k): cap for k, (_, _, cap) in enumerate(groups)}
    total = sum(sizes.values())
    share = part * sum(caps[k] * sizes[k] for k in caps) / total

    found = scaled_ratios(relative, sizes, caps, share)

    assert sum(found[k] * sizes[k] for k in found) / total == pytest.approx(share, abs=1e-9)
    assert all(0 <= found[k] <= caps[k] for k in found)


def test_what_has_no_share_of_its_own_goes_where_all_others_are_at_their_caps() -> None:
    found = scaled_ratios({"a": 0.0, "b": 1.0}, {"a": 10, "b": 10}, {"a": 0.7, "b": 0.6}, 0.5)

    assert {"a": pytest.approx(0.4), "b": 0.6} == found


def test_floors_count() -> None:
    found = scaled_ratios({"a": 0.0, "b": 1.0}, {"a": 10, "b": 10}, {"a": 0.9, "b": 0.4}, 0.6, floors={"a": 0.8})

    assert {"a": 0.8, "b": pytest.approx(0.4)} == found


def test_the_scale_of_relative_ratios_plays_no_part() -> None:
    assert 0.5 == pytest.approx(scaled_ratios({"a": 1e-30}, {"a": 10}, {"a": 1.0}, 0.5)["a"], abs=1e-9)
