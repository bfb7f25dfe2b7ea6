"""Multiplications of gated networks by hand, and against networks that lack what is closed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nni_prune_ext.costs import count_costs
from nni_prune_ext.gates.expected_macs import ExpectedMacs, MacCounter, expected_macs, official_macs
from nni_prune_ext.gates.placement import chosen_places, mac_counter, new_gates
from nni_prune_ext.graph.gate_places import GateFlow
from nni_prune_ext.graph.gate_tracing import trace_gate_flow
from nni_prune_ext.testing.toy_blocks import Apply, Residual


def chain(first: int = 4, second: int = 6, third: int = 5) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, first, 3, padding=1), nn.ReLU(), nn.Conv2d(first, second, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(second, third, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(third, 10),
    )  # fmt: skip


IMAGE = torch.randn(1, 3, 8, 8)


def opened(*counts: tuple[int, int]) -> Tensor:
    """Returns one row per image, the first so many of so many open."""
    return torch.stack([torch.arange(of) < some for some, of in counts])


def macs_of(flow: GateFlow, masks: dict[str, Tensor], **others: int) -> list[float]:
    return MacCounter(flow, dense=1, **others).add(masks).tolist()


def test_a_chain_by_hand() -> None:
    flow = trace_gate_flow(chain(), IMAGE)
    masks = {
        "0": opened((4, 4), (1, 4), (3, 4)),
        "2": opened((6, 6), (2, 6), (6, 6)),
        "4": opened((5, 5), (5, 5), (1, 5)),
    }

    found = macs_of(flow, masks)

    assert [
        64 * 9 * 3 * 4 + 16 * 9 * 4 * 6 + 16 * 6 * 5 + 5 * 10,
        64 * 9 * 3 * 1 + 16 * 9 * 1 * 2 + 16 * 2 * 5 + 5 * 10,
        64 * 9 * 3 * 3 + 16 * 9 * 3 * 6 + 16 * 6 * 1 + 1 * 10,
    ] == found
    assert count_costs(chain(), IMAGE).macs == found[0]


@pytest.mark.parametrize("seed", range(4))
def test_a_chain_costs_what_a_network_without_the_closed_channels_costs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    flow = trace_gate_flow(chain(), IMAGE)
    masks = {layer: torch.rand(5, n, generator=generator) < 0.6 for layer, n in (("0", 4), ("2", 6), ("4", 5))}
    for own in masks.values():
        own[:, 0] = True

    found = macs_of(flow, masks)

    removed = [chain(*(int(masks[layer][k].sum()) for layer in ("0", "2", "4"))) for k in range(5)]
    assert [count_costs(model, IMAGE).macs for model in removed] == found


def residual() -> nn.Sequential:
    """4 channels of a stream: a stem, a branch with 6 inside, a layer that reads their sum."""
    body = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4))
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), Residual(body), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)
    )


def test_what_an_addition_leaves_is_dense_unless_stem_and_branch_are_closed() -> None:
    flow = trace_gate_flow(residual(), IMAGE)
    stem = torch.tensor([[True, True, False, False], [True, False, False, False]])
    branch = torch.tensor([[False, True, True, False], [True, False, False, False]])
    masks = {"0": stem, "2.body.0": opened((2, 6), (6, 6)), "2.body.2": branch, "3": opened((5, 5), (4, 5))}

    found = macs_of(flow, masks)

    assert [
        64 * (3 * 2 + 9 * 2 * 2 + 2 * 2 + 3 * 5 + 5 * 2),
        64 * (3 * 1 + 9 * 1 * 6 + 6 * 1 + 1 * 4 + 4 * 2),
    ] == found


def test_the_papers_count_takes_the_sum_for_as_sparse_as_the_branch() -> None:
    flow = trace_gate_flow(residual(), IMAGE)
    masks = {
        "0": opened((4, 4)), "2.body.0": opened((2, 6)), "2.body.2": opened((1, 4)), "3": opened((3, 5))
    }  # fmt: skip

    official, honest = official_macs(flow, masks), macs_of(flow, masks)

    assert [64 * (3 * 4 + 9 * 4 * 2 + 2 * 1 + 1 * 3 + 3 * 2)] == official.tolist()
    assert [64 * (3 * 4 + 9 * 4 * 2 + 2 * 1 + 4 * 3 + 3 * 2)] == honest


def depthwise() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )


def test_a_depthwise_filter_counts_where_its_input_and_its_output_are_open() -> None:
    flow = trace_gate_flow(depthwise(), IMAGE)
    inputs = torch.tensor([[True] * 8, [True] * 7 + [False], [True] * 4 + [False] * 4])
    outputs = torch.tensor([[True] * 8, [True] * 8, [False] * 3 + [True] * 5])

    found = macs_of(flow, {"0": inputs, "2": outputs})

    assert [64 * (3 * i + 9 * both + 4 * o) for i, both, o in ((8, 8, 8), (7, 7, 8), (4, 1, 5))] == found


def test_the_papers_count_of_a_depthwise_layer_is_nothing_as_soon_as_one_channel_is_off() -> None:
    flow = trace_gate_flow(depthwise(), IMAGE)
    masks = {"0": opened((8, 8), (7, 8)), "2": opened((8, 8), (8, 8))}

    found = official_macs(flow, masks).tolist()

    assert [64 * (3 * 8 + 9 * 8 + 8 * 4), 64 * (3 * 7 + 0 + 8 * 4)] == found


def test_a_grouped_convolution_counts_group_by_group() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1))
    flow = trace_gate_flow(model, IMAGE)
    inputs = torch.tensor([[True, True, True, False, True, False, False, False]])  # 3 and 1
    outputs = torch.tensor([[True, False, False, True, True, False]])  # 1 and 2

    found = macs_of(flow, {"0": inputs, "2": outputs})

    assert [64 * (3 * 4 + (3 * 1 + 1 * 2) + 3 * 2)] == found


def test_the_papers_count_leaves_heads_and_classifier_out() -> None:
    flow = trace_gate_flow(chain(), IMAGE)
    masks = {"0": opened((4, 4)), "2": opened((3, 6)), "4": opened((5, 5))}

    assert [64 * 27 * 4 + 16 * 9 * 4 * 3 + 16 * 3 * 5] == official_macs(flow, masks).tolist()


def test_an_ungated_layer_counts_in_full_for_what_it_reads() -> None:
    flow = trace_gate_flow(chain(), IMAGE)

    found = macs_of(flow, {"0": opened((1, 4))})

    assert [64 * 27 * 1 + 16 * 9 * 1 * 6 + 16 * 6 * 5 + 50] == found


def test_the_summary_holds_mean_spread_and_extremes_with_heads_and_the_rest() -> None:
    flow = trace_gate_flow(chain(), IMAGE)
    batches = [
        {"0": opened((4, 4), (1, 4)), "2": opened((6, 6), (2, 6)), "4": opened((5, 5), (5, 5))},
        {"0": opened((3, 4)), "2": opened((6, 6)), "4": opened((1, 5))},
    ]

    found = expected_macs(flow, batches, data="three images", dense=20_000, other=7, heads=100)

    each = [10898 + 107, 1728 + 288 + 160 + 50 + 107, 5184 + 2592 + 96 + 10 + 107]
    assert 6912 + 3456 + 480 + 50 == 10898
    mean = sum(each) / 3
    assert ("three images", 3, 20_000, 100) == (found.data, found.images, found.dense, found.heads)
    assert pytest.approx(mean) == found.mean
    assert pytest.approx((sum((own - mean) ** 2 for own in each) / 3) ** 0.5) == found.spread
    assert (min(each), max(each)) == (found.smallest, found.largest)
    assert pytest.approx(mean / 20_000) == found.share
    official = [6912 + 3456 + 480, 1728 + 288 + 160, 5184 + 2592 + 96]
    assert pytest.approx(sum(official) / 3) == found.official
    assert pytest.approx({"0": 1728 * 8 / 3, "2": (3456 + 288 + 2592) / 3, "4": 736 / 3, "8": 110 / 3}) == found.layers
    assert pytest.approx(mean - 107) == sum(found.layers.values())
    facts = found.facts()
    assert pytest.approx(0.005) == facts["head_macs_share"]
    assert pytest.approx(found.official_share) == facts["official_macs_share"]


def test_a_counter_for_a_network_knows_its_heads_and_what_else_multiplies() -> None:
    attention = Apply(lambda x: x + (x.flatten(2) @ x.flatten(2).transpose(1, 2) @ x.flatten(2)).view(x.shape))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), attention, nn.Conv2d(4, 2, 1))
    images = torch.randn(3, 3, 8, 8)
    flow = trace_gate_flow(model, images)
    gates = new_gates(chosen_places(flow))

    counter = mac_counter(model, images, flow, gates)

    assert 4 * 64 * 4 * 2 == counter.other
    assert 4 * 3 == counter.heads, "no virtual input as long as it stands for none"
    assert 64 * (3 * 4 + 4 * 2) + counter.other == counter.dense
    assert 99 == mac_counter(model, images, flow, gates, dense=99).dense


def test_everything_open_costs_the_dense_network_and_the_heads() -> None:
    model = residual()
    flow = trace_gate_flow(model, IMAGE)
    gates = new_gates(chosen_places(flow))
    counter = mac_counter(model, IMAGE, flow, gates)

    found = counter.add({place.layer: torch.ones(2, place.channels, dtype=torch.bool) for place in gates.places})

    dense = count_costs(model, IMAGE).macs
    assert [dense + counter.heads] * 2 == found.tolist()
    assert isinstance(counter.result("x"), ExpectedMacs)
