"""How sparse weights are, and the ratios that follow: golden numbers computed by hand or by the slow way."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nni_prune_ext.allocation.ratio_scaling import scaled_ratios
from nni_prune_ext.methods.psap_ratios import adaptive_ratios, psap_ratio, relative_ratios
from nni_prune_ext.scoring.weight_sparsity import weight_sparsity

SIZES = {"a": 16, "b": 32, "c": 64}
OPEN = dict.fromkeys(SIZES, 1.0)


def gaussian(rows: int = 64, columns: int = 5000) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def sparsity(rows: Tensor, **how: object) -> float:
    return weight_sparsity({"layer": [rows]}, **how)["layer"]  # type: ignore[arg-type]


def test_of_gaussian_weights_as_many_are_small_as_the_error_function_says() -> None:
    assert math.erf(0.1 / math.sqrt(2)) == pytest.approx(sparsity(gaussian()), abs=1e-3)
    assert 1 - math.exp(-0.1 * math.sqrt(2)) == pytest.approx(sparsity(laplace()), abs=2e-3)


def laplace() -> Tensor:
    uniform = torch.rand(64, 5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs())


def test_the_scale_of_a_layer_is_no_sparsity() -> None:
    assert sparsity(gaussian()) == sparsity(1024 * gaussian())
    assert sparsity(gaussian(), threshold="largest") == sparsity(1024 * gaussian(), threshold="largest")
    assert 0.0 == sparsity(1024 * gaussian(), threshold="absolute", level=1e-6)


def test_zeroed_channels_count_as_sparse_until_they_come_back_and_move_no_threshold() -> None:
    zeroed, rebuilt = gaussian(), gaussian()
    zeroed[:20] = 0

    assert 20 / 64 + 44 / 64 * sparsity(gaussian()[20:]) == pytest.approx(sparsity(zeroed), abs=1e-9)
    assert 0.080 == pytest.approx(sparsity(rebuilt), abs=1e-3)


def test_layers_of_a_group_are_weighted_by_their_size_and_empty_groups_are_not_sparse() -> None:
    small, large = torch.tensor([[0.0, 1.0]]), torch.ones(2, 3)

    found = weight_sparsity({"two": [small, large], "none": [], "dead": [torch.zeros(2, 2)]})

    assert {"two": 1 / 8, "none": 0.0, "dead": 1.0} == found


def test_a_quantile_is_taken_over_all_layers() -> None:
    found = weight_sparsity({"a": [torch.tensor([[1.0, 2.0]])], "b": [torch.tensor([[3.0, 4.0]])]},
                            threshold="quantile", level=0.5)  # fmt: skip

    assert {"a": 1.0, "b": 0.0} == found


@pytest.mark.parametrize(
    ("sparse", "share", "previous", "bound", "largest", "expected"),
    [
        ((0.1, 0.2, 0.3), 0.4, 0.0, 1.0, 0.8, (0.1647, 0.3294, 0.4941)),
        ((0.1, 0.1, 0.1), 0.4, 0.0, 1.0, 0.8, (0.4, 0.4, 0.4)),
        ((0.02, 0.2, 0.9), 0.5, 0.0, 1.0, 0.8, (0.0174, 0.1741, 0.7836)),
        ((0.1, 0.2, 0.3), 0.4, 0.3, 0.05, 0.8, (0.35, 0.35, 0.35)),  # the bound allows no more
        ((0.0, 0.0, 0.0), 0.4, 0.0, 1.0, 0.8, (0.4, 0.4, 0.4)),
        ((0.5, 0.5, 0.5), 0.9, 0.0, 1.0, 0.8, (0.8, 0.8, 0.8)),
        ((0.1, 0.2, 0.3), 0.1, 0.3, 0.05, 0.8, (0.25, 0.25, 0.25)),  # nor less
    ],
)
def test_ratios_follow_sparsity_within_bounds(
    sparse: tuple[float, ...], share: float, previous: float, bound: float, largest: float, expected: tuple[float, ...]
) -> None:
    relative = relative_ratios(dict(zip(SIZES, sparse)))

    before, caps = dict.fromkeys(SIZES, previous), dict.fromkeys(SIZES, largest)
    found = adaptive_ratios(relative, before, SIZES, share, step_bound=bound, largest=caps)

    assert list(expected) == pytest.approx(list(found.values()), abs=1e-4)


def test_a_group_may_move_as_far_from_the_pace_of_the_schedule_as_the_bound_says() -> None:
    before = {"a": 0.2, "b": 0.2, "c": 0.2}

    found = adaptive_ratios({"a": 0.0, "b": 1.0, "c": 1.0}, before, SIZES, 0.4, step_bound=0.1, largest=OPEN, pace=0.2)

    assert 0.1 == pytest.approx(found["a"])
    assert 0.45 == pytest.approx(found["b"]) == found["c"]  # (0.4 · 112 − 0.1 · 16) / 96, below 0.2 + 0.2 + 0.1


@given(
    st.lists(
        st.tuples(st.floats(0.001, 1), st.integers(1, 256), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6
    ),
    st.floats(0, 1),
)
def test_floors_and_caps_hold_and_the_share_is_met(groups: list[tuple[float, int, float, float]], part: float) -> None:
    relative = {str(k): value for k, (value, *_) in enumerate(groups)}
    sizes = {str(k): size for k, (_, size, *_) in enumerate(groups)}
    floors = {str(k): min(one, other) for k, (*_, one, other) in enumerate(groups)}
    caps = {str(k): max(one, other) for k, (*_, one, other) in enumerate(groups)}
    least, most = (sum(sizes[n] * bound[n] for n in sizes) / sum(sizes.values()) for bound in (floors, caps))
    share = least + part * (most - least)

    found = scaled_ratios(relative, sizes, caps, share, floors=floors)

    assert all(floors[name] - 1e-12 <= ratio <= caps[name] + 1e-12 for name, ratio in found.items())
    assert share == pytest.approx(sum(found[n] * sizes[n] for n in sizes) / sum(sizes.values()), abs=1e-9)


def test_the_registered_policy_prunes_sparser_groups_more_and_dead_weights_alike() -> None:
    half = torch.tensor([[0.0, 1.0, 0.0, 1.0]])

    assert {"half": 0.5, "full": 0.0} == psap_ratio({"half": [half], "full": [torch.ones(1, 4)]}, {}, 0.5)
    assert {"a": 1.0, "b": 1.0} == psap_ratio({"a": [torch.ones(1, 4)], "b": [torch.ones(1, 4)]}, {}, 0.5)


def test_groups_that_must_stay_do_not_hold_up_the_others() -> None:
    caps, sizes = {"big": 0.0, "a": 1.0, "b": 1.0}, {"big": 100, "a": 50, "b": 50}
    previous = {"big": 0.0, "a": 0.6, "b": 0.4}

    found = adaptive_ratios(
        {"big": 0.9, "a": 0.1, "b": 0.2}, previous, sizes, 0.25, step_bound=0.1, largest=caps, pace=0.0
    )

    assert {"big": 0.0, "a": pytest.approx(0.5), "b": pytest.approx(0.5)} == found, "b moves up as far as it may"
