"""Importance scores against numbers worked out by hand, by brute force, or by autograd at a real gate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.graph.channel_groups import ChannelGroup, trace_channel_groups
from nni_prune_ext.scoring.gradient_statistics import gate_gradients
from nni_prune_ext.scoring.group_reduction import group_importance, writer_rows
from nni_prune_ext.scoring.weight_norms import geometric_median_distance, l1_norm, l2_norm, slice_rows
from nni_prune_ext.testing.method_bench import BenchNet
from nni_prune_ext.testing.toy_models import ZOO


def group_of(model: nn.Module, x: Tensor, name: str) -> tuple[ChannelGroup, dict[str, Tensor]]:
    return trace_channel_groups(model, x)[name], dict(model.named_parameters())


def test_rows_run_along_the_dimension_that_holds_the_channels() -> None:
    weight = torch.arange(24.0).reshape(2, 3, 2, 2)

    assert (2, 12) == tuple(slice_rows(weight, 0).shape)
    assert [4.0, 5, 6, 7, 16, 17, 18, 19] == slice_rows(weight, 1)[1].tolist()
    assert [[1.0], [2.0]] == slice_rows(torch.tensor([1.0, 2.0]), 0).tolist()


def test_norms_are_means_so_that_layers_of_other_sizes_compare() -> None:
    rows = torch.tensor([[3.0, -4.0], [0.0, 1.0]])

    assert [3.5, 0.5] == l1_norm(rows).tolist()
    assert [12.5**0.5, 0.5**0.5] == pytest.approx(l2_norm(rows).tolist())


def test_group_importance_averages_normalised_values_of_writer_and_consumer() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False), nn.Flatten(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -3.0]).reshape(2, 1, 1, 1))  # |w| = 1, 3 → divided by mean 2: 0.5, 1.5
        model[1].weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 1.0]]).reshape(2, 2, 1, 1))  # columns 1.5, 0.5 → 1.5, 0.5
    group, tensors = group_of(model, torch.zeros(1, 1, 1, 1), "0")

    importance = group_importance(group, tensors, l1_norm)

    assert [1.0, 1.0] == pytest.approx(importance.tolist())  # (0.5 + 1.5) / 2 and (1.5 + 0.5) / 2


def test_pixels_behind_a_flatten_are_averaged_per_channel() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[2].weight.copy_(torch.tensor([[1.0, 3.0, 5.0, 7.0]]))  # channel 0: mean 2, channel 1: mean 6, over mean 4
    group, tensors = group_of(model, torch.zeros(1, 1, 1, 2), "0")

    importance = group_importance(group, tensors, l1_norm)

    assert [(1 + 0.5) / 2, (1 + 1.5) / 2] == pytest.approx(importance.tolist())


def test_scaling_a_whole_layer_does_not_change_the_importance() -> None:
    torch.manual_seed(0)
    model = BenchNet()
    group, tensors = group_of(model, torch.zeros(2, 3, 8, 8), "stem.0")
    before = group_importance(group, tensors, l2_norm)

    with torch.no_grad():
        model.back[0].weight.mul_(100)

    assert before.tolist() == pytest.approx(group_importance(group, tensors, l2_norm).tolist(), rel=1e-5)


def test_a_layer_of_zeros_gives_numbers_and_not_nan() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 2, 1))
    nn.init.zeros_(model[0].weight)
    group, tensors = group_of(model, torch.zeros(1, 1, 1, 1), "0")

    assert torch.isfinite(group_importance(group, tensors, l1_norm)).all()


@pytest.mark.parametrize("criterion", [l1_norm, l2_norm, geometric_median_distance])
def test_renumbering_channels_renumbers_the_scores(criterion: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    rows, order = torch.randn(9, 20), torch.randperm(9)

    assert criterion(rows)[order].tolist() == pytest.approx(criterion(rows[order]).tolist(), rel=1e-5)


def test_fpgm_is_the_sum_of_distances_to_all_filters() -> None:
    torch.manual_seed(0)
    rows = torch.randn(40, 30) * 0.01 + 1

    slow = [sum(float((a - b).double().square().sum().sqrt()) for b in rows) for a in rows]

    assert slow == pytest.approx(geometric_median_distance(rows).tolist(), rel=1e-5)


def test_fpgm_ranks_a_filter_between_the_others_lowest_and_equal_filters_at_distance_zero() -> None:
    assert 1 == int(geometric_median_distance(torch.tensor([[0.0], [1.0], [2.0]])).argmin())
    assert 0.0 == float(geometric_median_distance(torch.full((64, 64), 0.3)).max())


@pytest.mark.parametrize("name", ["stem.0", "inside.0", "whole.0"])
def test_the_gate_gradient_is_the_derivative_at_a_gate_in_front_of_the_consumers(name: str) -> None:
    torch.manual_seed(0)
    model = (
        BenchNet().double().eval()
    )  # behind batch norm; "stem.0" has two writers, a depthwise layer and two consumers
    x, labels = torch.randn(4, 3, 8, 8).double(), torch.tensor([0, 1, 2, 3])
    group, tensors = group_of(model, x, name)
    functional.cross_entropy(model(x), labels).backward()

    fast = gate_gradients(group, tensors)

    step = 1e-6
    for channel in range(group.num_channels):
        up, down = (loss_with_gate(model, group, channel, 1 + sign * step, x, labels) for sign in (1, -1))
        assert (up - down) / (2 * step) == pytest.approx(float(fast[channel]), rel=1e-4, abs=1e-7)


def loss_with_gate(
    model: nn.Module, group: ChannelGroup, channel: int, gate: float, x: Tensor, labels: Tensor
) -> float:
    """Multiplies one channel at the input of every consumer by a gate."""
    consumers = [m for m in group.members if m.role.value == "consumer"]
    tensors = dict(model.named_parameters())
    saved = {m.tensor: tensors[m.tensor].detach().clone() for m in consumers}
    with torch.no_grad():
        for m in consumers:
            tensors[m.tensor].index_copy_(
                m.dim, index := torch.from_numpy(m.index[m.channel == channel]),
                tensors[m.tensor].index_select(m.dim, index) * gate,
            )  # fmt: skip
        loss = float(functional.cross_entropy(model(x), labels))
        for tensor, value in saved.items():
            tensors[tensor].copy_(value)
    return loss


def test_the_gate_gradient_agrees_with_autograd_at_a_gate_behind_the_activation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten()).train()
    x = torch.randn(2, 3, 6, 6)
    group, tensors = group_of(model, x, "0")
    gate = torch.ones(5, requires_grad=True)
    handle = model[2].register_forward_hook(lambda module, args, output: output * gate[:, None, None])
    model(x).square().mean().backward()
    handle.remove()

    assert gate.grad is not None
    assert gate.grad.tolist() == pytest.approx(gate_gradients(group, tensors).tolist(), rel=1e-4, abs=1e-6)


def test_without_any_gradient_the_gate_gradient_is_zero() -> None:
    group, tensors = group_of(BenchNet(), torch.zeros(2, 3, 8, 8), "inside.0")

    assert [0.0] * 16 == gate_gradients(group, tensors).tolist()


def test_writer_rows_hold_one_row_per_channel_for_every_layer_that_writes_all_of_them() -> None:
    model = BenchNet()
    group, tensors = group_of(model, torch.zeros(2, 3, 8, 8), "stem.0")

    rows = writer_rows(group, tensors)

    assert [(12, 27), (12, 144)] == [tuple(layer.shape) for layer in rows]
    assert torch.equal(model.stem[0].weight.detach().flatten(1), rows[0])


@pytest.mark.parametrize("name", [name for name, toy in ZOO.items() if toy.prunable])
def test_every_topology_gets_finite_scores_of_the_right_length(name: str) -> None:
    torch.manual_seed(0)
    model = ZOO[name].build()
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    for group in trace_channel_groups(model, ZOO[name].example_inputs()):
        for criterion in (l1_norm, l2_norm, geometric_median_distance):
            scores = group_importance(group, tensors, criterion)
            assert (group.num_channels,) == tuple(scores.shape)
            assert torch.isfinite(scores).all()
        assert all((group.num_channels,) == rows.shape[:1] for rows in writer_rows(group, tensors))
