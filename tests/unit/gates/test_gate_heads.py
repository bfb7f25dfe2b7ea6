"""Heads by hand, and that a cut head says what the uncut one says about zeros."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nni_prune_ext.gates.heads import GateHead, open_units


def head(inputs: int, units: int | list[int], *, scale: float = 1.0, **options: object) -> GateHead:
    """Returns a head with random weights and biases."""
    made = GateHead(inputs, torch.arange(units) if isinstance(units, int) else units, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(inputs)
    with torch.no_grad():
        made.weight[:, :-1].normal_(0, scale, generator=generator)
        made.bias.normal_(0, scale, generator=generator)
    return made


def images(count: int, channels: int, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, 5, 5, generator=torch.Generator().manual_seed(seed)).relu()


def logits_by_hand(own: GateHead, x: Tensor) -> Tensor:
    """The published head: pooling, softmax over channels, a 1×1 convolution; in double precision, by loops."""
    rows = []
    for image in x.double():
        pooled = [float(channel.max() if own.pool == "max" else channel.mean()) for channel in image]
        powers = [math.exp(value) for value in pooled]
        shares = [power / sum(powers) for power in powers]
        rows.append(
            [
                float(own.bias.detach()[unit])
                + sum(float(w) * share for w, share in zip(own.weight[unit].detach(), shares))
                for unit in range(own.num_units)
            ]
        )
    return torch.tensor(rows, dtype=torch.float64)


# -- logits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_logits_are_those_of_the_published_head(pool: str) -> None:
    own, x = head(6, 4, scale=3.0, pool=pool), images(5, 6)

    assert torch.allclose(logits_by_hand(own, x), own(x).double(), atol=1e-6)


def test_the_two_poolings_differ() -> None:
    one, other, x = head(6, 4, pool="max"), head(6, 4, pool="avg"), images(5, 6)

    assert torch.equal(one.weight, other.weight)
    assert not torch.allclose(one(x), other(x), atol=1e-3)


def test_softmax_sees_closed_channels() -> None:
    own = GateHead(3, [0])
    with torch.no_grad():
        own.weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
        own.bias.zero_()
    x = torch.zeros(1, 3, 2, 2)
    x[0, 0] = math.log(2)

    assert pytest.approx(2 / 4) == float(own(x).detach()), "2 / (2 + 1 + 1)"


def test_logits_are_float32_under_autocast_and_for_other_precisions() -> None:
    own, x = head(6, 4), images(3, 6)
    expected = own(x)

    with torch.autocast("cpu", torch.bfloat16):
        under = own(x)
        low = own(x.bfloat16())
    double = own(x.double())

    assert torch.float32 is under.dtype is low.dtype is double.dtype
    assert torch.equal(expected, under)
    assert torch.equal(own(x.bfloat16().float()), low)
    assert torch.allclose(expected, double)


def test_a_head_learns_from_its_own_loss_and_only_a_joint_one_reaches_its_input() -> None:
    for detached in (True, False):
        own, x = head(6, 4, detached=detached), images(3, 6).requires_grad_()

        own(x).square().sum().backward()

        assert own.weight.grad is not None
        assert float(own.weight.grad.abs().sum()) > 0
        assert own.bias.grad is not None
        assert detached is (x.grad is None)
        assert 0.0 == float(own.weight.grad[:, -1].abs().max()), "the virtual input plays no part yet"
        assert bool(own.weight.grad.isfinite().all())


# -- open units --------------------------------------------------------------------------------------------------------


def test_a_logit_of_exactly_zero_is_closed() -> None:
    logits = torch.tensor([[0.0, 1e-30, -1e-30, 2.0], [-0.0, 0.0, 0.0, 5.0]])

    assert [[False, True, False, True], [False, False, False, True]] == open_units(logits).tolist()


def test_the_largest_logit_is_open_even_if_it_is_negative() -> None:
    logits = torch.tensor([[-3.0, -1.0, -2.0], [-5.0, -5.0, -5.0], [0.0, 0.0, -1.0]])

    assert [[False, True, False], [True, False, False], [True, False, False]] == open_units(logits).tolist()


@given(st.lists(st.lists(st.floats(-10, 10, width=32), min_size=5, max_size=5), min_size=1, max_size=6))
def test_at_least_one_unit_is_always_open(rows: list[list[float]]) -> None:
    opened = open_units(torch.tensor(rows))

    for row, own in zip(rows, opened.tolist()):
        assert any(own)
        assert own[row.index(max(row))], "the largest"
        assert [logit > 0 or k == row.index(max(row)) for k, logit in enumerate(row)] == own


# -- start -------------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 10), st.sampled_from(["max", "avg"]), st.floats(0.01, 200))
def test_a_safe_start_opens_everything_for_any_input(channels: int, units: int, pool: str, scale: float) -> None:
    own = GateHead(channels, torch.arange(units), pool=pool)  # type: ignore[arg-type]

    one_hot = torch.eye(channels).view(channels, channels, 1, 1) * scale
    x = torch.cat([one_hot, -one_hot, torch.randn(8, channels, 1, 1) * scale, torch.zeros(1, channels, 1, 1)])

    assert bool(open_units(own(x)).all())
    assert bool((own(x) > 0).all()), "not by the guard"


def test_a_start_without_safety_is_that_of_a_convolution_and_closes_about_half() -> None:
    torch.manual_seed(0)
    own = GateHead(64, torch.arange(256))

    own.reset(safe_start=False)

    assert float(own.weight.abs().max()) <= 1 / 8
    assert float(own.bias.abs().max()) <= 1 / 8
    assert 0.35 < float(open_units(own(images(4, 64))).float().mean()) < 0.65
    assert not own.weight[:, -1].any()


# -- cuts --------------------------------------------------------------------------------------------------------------


def silenced(x: Tensor, kept: Tensor) -> Tensor:
    """Returns an input in which all other channels are closed."""
    result = torch.zeros_like(x)
    result[:, kept] = x[:, kept]
    return result


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_a_cut_head_agrees_with_the_uncut_one_on_zeros(pool: str, scale: float) -> None:
    own, x = head(12, 6, scale=3.0, pool=pool), images(8, 12) * scale
    kept, filters = torch.tensor([1, 2, 5, 11]), torch.tensor([0, 3, 4])

    cut = own.cut(kept, filters)

    assert 8.0 == float(cut.removed)
    assert pool == cut.pool
    assert (3, 5) == tuple(cut.weight.shape)
    expected = own(silenced(x, kept))[:, filters]
    assert float((expected - cut(x[:, kept])).abs().max()) < 1e-6 * 3
    naive = (x[:, kept].amax((2, 3)) if pool == "max" else x[:, kept].mean((2, 3))).softmax(1)
    without = naive @ own.weight[filters][:, kept].T + own.bias[filters]
    if scale <= 1:
        assert float((expected - without).abs().max()) > 1e-2, "the substitute is needed"


def test_two_cuts_in_a_row_are_one_cut() -> None:
    own, x = head(12, 6, scale=3.0), images(8, 12)
    first, second = torch.tensor([0, 1, 2, 5, 7, 9, 11]), torch.tensor([1, 2, 4, 6])
    filters, later = torch.tensor([0, 2, 3, 5]), torch.tensor([1, 3])

    twice = own.cut(first, filters).cut(second, later)
    once = own.cut(first[second], filters[later])

    kept = first[second]
    assert 8.0 == float(twice.removed) == float(once.removed)
    assert torch.allclose(once.weight, twice.weight, atol=1e-6)
    assert torch.allclose(once.bias, twice.bias)
    expected = own(silenced(x, kept))[:, filters[later]]
    assert float((expected - twice(x[:, kept])).abs().max()) < 3e-6


def test_a_cut_of_nothing_changes_nothing() -> None:
    own, x = head(5, 4), images(3, 5)

    cut = own.cut(torch.arange(5), torch.arange(4))

    assert 0.0 == float(cut.removed)
    assert torch.equal(own(x), cut(x))
    assert torch.equal(own.units, cut.units)


def test_blocks_that_lose_all_filters_go_and_the_others_keep_their_row() -> None:
    own, x = head(5, [0, 2, 0, 1, 3, 1, 2, 3], scale=2.0), images(3, 5)

    cut = own.cut(torch.arange(5), torch.tensor([1, 4, 6, 7]))  # units 2, 3, 2, 3

    assert [0, 1, 0, 1] == cut.units.tolist()
    assert 2 == cut.num_units
    assert torch.allclose(own(x)[:, [2, 3]], cut(x), atol=1e-6)


def test_a_block_that_loses_some_filters_keeps_its_row() -> None:
    own, x = head(5, [0, 0, 1, 1], scale=2.0), images(3, 5)

    cut = own.cut(torch.tensor([0, 3]), torch.tensor([1, 2, 3]))

    assert [0, 1, 1] == cut.units.tolist()
    assert torch.allclose(own(silenced(x, torch.tensor([0, 3]))), cut(x[:, [0, 3]]), atol=3e-6)


@settings(max_examples=40)
@given(st.data(), st.integers(2, 30), st.integers(1, 12))
def test_any_cut_agrees_on_zeros(data: st.DataObject, channels: int, filters: int) -> None:
    own, x = head(channels, filters, scale=2.0), images(4, channels, seed=channels)
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, channels - 1), min_size=1))))
    left = torch.tensor(sorted(data.draw(st.sets(st.integers(0, filters - 1), min_size=1))))

    cut = own.cut(kept, left)

    assert float((own(silenced(x, kept))[:, left] - cut(x[:, kept])).detach().abs().max()) < 5e-6


def test_a_cut_head_stays_frozen_detached_and_where_it_was() -> None:
    own = head(5, 4, pool="avg", detached=False).requires_grad_(False)

    cut = own.cut(torch.arange(3), torch.arange(2))

    assert not any(parameter.requires_grad for parameter in cut.parameters())
    assert not cut.detached
    assert "avg" == cut.pool
    assert all(parameter.requires_grad for parameter in head(5, 4).cut(torch.arange(3), torch.arange(2)).parameters())
    assert 5 == own.weight.shape[1] - 1, "the head that was cut is as it was"


def test_a_cut_head_can_learn_on() -> None:
    cut = head(6, 4).cut(torch.tensor([0, 2]), torch.arange(4))

    cut(images(3, 2)).square().sum().backward()

    assert cut.weight.grad is not None
    assert bool(cut.weight.grad.isfinite().all())
    assert float(cut.weight.grad[:, -1].abs().min()) > 0, "the virtual input learns, too"


def test_without_softmax_a_head_reads_scaled_values_and_a_cut_needs_no_substitute() -> None:
    own, x = head(12, 6, softmax=False), images(4, 12)
    own.scale.fill_(0.5)
    kept = torch.tensor([1, 2, 8])

    cut = own.cut(kept, torch.tensor([0, 5]))

    expected = 0.5 * x.amax((2, 3)) @ own.weight[:, :-1].T + own.bias
    assert torch.allclose(expected, own(x), atol=1e-6)
    assert torch.allclose(own(silenced(x, kept))[:, [0, 5]], cut(x[:, kept]), atol=1e-6)
    fresh = GateHead(12, torch.arange(6), softmax=False)
    assert bool((fresh(torch.randn(8, 12, 3, 3) * 100) > 0).all()), "a safe start"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_head_in_another_precision_runs(dtype: torch.dtype) -> None:
    own = head(6, 4).to(dtype)

    logits = own(images(3, 6).to(dtype))

    assert bool(logits.isfinite().all())
