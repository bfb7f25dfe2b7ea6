"""From scores and targets to plans: costs in closed form, targets met to within one channel, limits kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nni_prune_ext.allocation import (
    Achieved,
    Allocation,
    CostModel,
    LayerLimit,
    Limits,
    Reference,
    Target,
    achieved_targets,
    allocate,
    check_feasible,
    masked_counts,
    parse_targets,
    sparsity_of,
    usual_multiple,
)
from nni_prune_ext.certificate import verify_groups
from nni_prune_ext.costs import count_costs
from nni_prune_ext.errors import ConfigError, NniPruneExtError, PluginError, TargetError
from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.models.loading import build_model
from nni_prune_ext.plan import plan_from_channels
from nni_prune_ext.surgery import cut_channels
from nni_prune_ext.testing.toy_models import ZOO

IMAGES = torch.zeros(1, 3, 32, 32)
NETWORKS = ["resnet20", "vgg16_bn", "mobilenet_v2"]
PRUNABLE = [name for name, toy in ZOO.items() if toy.prunable]


def chain() -> nn.Sequential:
    """Two groups: '0' with 8 channels, '2' with 4; hand-countable."""
    return nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2, bias=False))  # fmt: skip


def cost_model(model: nn.Module, x: ExampleInputs) -> CostModel:
    return CostModel.of(model, trace_channel_groups(model, x), count_costs(model, x))


@cache
def built(name: str) -> tuple[nn.Module, CostModel]:
    model = build_model(name).eval()
    return model, cost_model(model, IMAGES)


@pytest.fixture
def sixty_four_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of a few small layers count as wide."""
    monkeypatch.setattr("nni_prune_ext.allocation.targets.WIDE", 64)


def small() -> CostModel:
    return cost_model(chain(), torch.zeros(1, 3, 2, 2))


def ascending(costs: CostModel) -> dict[str, Tensor]:
    return {g.name: torch.arange(g.num_channels).float() for g in costs.groups}


def random_scores(costs: CostModel, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.num_channels, generator=generator) for g in costs.groups}


def kept_channels(allocation: Allocation) -> dict[str, int]:
    return dict(allocation.kept)


@pytest.mark.parametrize("name", PRUNABLE)
def test_predicted_costs_are_those_counted_on_the_cut_model(name: str) -> None:
    torch.manual_seed(0)
    model, x = ZOO[name].build().eval(), ZOO[name].example_inputs()
    groups = verify_groups(model, x, trace_channel_groups(model, x))
    costs = CostModel.of(model, groups, count_costs(model, x))
    generator = np.random.default_rng(0)
    for _ in range(3):
        gone = {
            g.name: generator.permutation(g.num_channels)[: generator.integers(g.num_channels)] for g in costs.groups
        }
        lost: dict[tuple[str, int], int] = {}
        for group in costs.groups:
            for m in group.members:
                lost[m.tensor, m.dim] = lost.get((m.tensor, m.dim), 0) + int(np.isin(m.channel, gone[group.name]).sum())

        predicted = costs.predict(lost)

        compact = cut_channels(model, plan_from_channels(costs.groups, gone), x).model
        assert predicted == pytest.approx(count_costs(compact, x).as_dict())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("target", ["macs=0.5", "params=0.4", "memory=0.6", "ratio=0.3"])
def test_the_target_is_met_and_one_channel_less_would_miss_it(name: str, target: str) -> None:
    _, costs = built(name)
    goal = Target.parse(target)

    allocation = allocate(random_scores(costs), costs, targets=[goal], limits=Limits(multiple=1))

    (reached,) = allocation.achieved
    dense = allocate(random_scores(costs), costs, targets=[])
    one_channel = max(abs(_without(costs, g.name)[goal.metric] - dense.predicted[goal.metric]) for g in costs.groups)
    assert reached.met
    assert abs(reached.achieved - reached.asked) <= one_channel + 1e-9


def _without(costs: CostModel, name: str) -> Mapping[str, float]:
    """Returns the costs without one channel of one group."""
    scores = {g.name: torch.full((g.num_channels,), math.inf) for g in costs.groups}
    scores[name][0] = 0.0
    return allocate(scores, costs, targets=[Target("ratio", 1e-9)]).predicted


@pytest.mark.parametrize("name", NETWORKS)
def test_the_counted_costs_of_the_cut_network_meet_several_targets_at_once(name: str) -> None:
    model, costs = built(name)
    targets = [Target("macs", 0.6), Target("params", 0.5), Target("ratio", 0.2)]

    allocation = allocate(random_scores(costs), costs, targets=targets)

    compact = count_costs(cut_channels(model, allocation.plan, IMAGES, groups=costs.groups).model, IMAGES)
    dense = count_costs(model, IMAGES)
    assert all(reached.met for reached in allocation.achieved)
    assert compact.macs <= 0.6 * dense.macs
    assert compact.params <= 0.5 * dense.params
    assert {"macs": compact.macs, "params": compact.params} == {k: allocation.predicted[k] for k in ("macs", "params")}


def test_channels_go_in_the_order_of_one_ranking_over_all_groups() -> None:
    costs = small()
    scores = {"0": torch.tensor([5.0, 1, 7, 7, 7, 7, 7, 7]), "2": torch.tensor([9.0, 0, 2, 9])}

    allocation = allocate(scores, costs, targets=[Target("ratio", 3 / 12)])

    assert {"0": (1,), "2": (1, 2)} == allocation.plan.removed


def test_an_absolute_target_is_an_upper_bound_in_its_own_unit() -> None:
    costs = small()  # 4 positions: 4 * 24 + 4 * 32 + 8 MACs, 24 + 32 + 8 parameters of 4 bytes
    assert (232, 64, 256) == (costs.costs.macs, costs.costs.params, costs.costs.weight_bytes)

    allocation = allocate(ascending(costs), costs, targets=[Target("params", 50), Target("memory", 201)])

    assert {"params": 64 - 7 - 9, "memory": 4 * 48} == {k: allocation.predicted[k] for k in ("params", "memory")}
    assert ["params=50", "memory=201"] == [str(a.target) for a in allocation.achieved]


def test_infinite_scores_protect_and_minus_infinity_goes_first() -> None:
    costs = small()
    scores = ascending(costs)
    scores["0"] = torch.tensor([math.inf, -math.inf, 3, 2, 1, math.inf, math.inf, math.inf])
    scores["2"] = torch.full((4,), math.inf)

    allocation = allocate(scores, costs, targets=[Target("ratio", 4 / 12)])

    assert {"0": (1, 2, 3, 4)} == allocation.plan.removed
    with pytest.raises(TargetError, match=r"ratio of at most 0\.333"):
        allocate(scores, costs, targets=[Target("ratio", 5 / 12)])


def test_ties_are_broken_the_same_way_each_time_by_group_and_channel() -> None:
    costs = small()
    scores = {"0": torch.ones(8), "2": torch.ones(4)}

    allocation = allocate(scores, costs, targets=[Target("ratio", 0.25)])

    assert {"0": (0, 1, 2)} == allocation.plan.removed


@pytest.mark.parametrize("name", NETWORKS)
def test_the_local_scope_prunes_every_group_at_one_ratio_to_within_one_channel(name: str) -> None:
    _, costs = built(name)

    allocation = allocate(random_scores(costs), costs, targets=[Target("macs", 0.5)], scope="local")

    low = min(allocation.ratios[g.name] + 1 / g.num_channels for g in costs.groups)
    high = max(allocation.ratios[g.name] for g in costs.groups)
    assert high <= low + 1e-9


def test_relative_ratios_of_a_policy_are_kept_to_within_one_channel() -> None:
    _, costs = built("resnet20")
    relative = {g.name: 1.0 + (i % 3) for i, g in enumerate(costs.groups)}

    allocation = allocate(random_scores(costs), costs, targets=[Target("macs", 0.7)], ratios=relative)

    scale = [allocation.ratios[name] / relative[name] for name in relative]
    slack = max(1 / (g.num_channels * relative[g.name]) for g in costs.groups)
    assert max(scale) - min(scale) <= slack + 1e-9


def test_a_group_with_relative_ratio_zero_goes_last() -> None:
    costs = small()

    first = allocate(ascending(costs), costs, targets=[Target("ratio", 3 / 12)], ratios={"0": 0.0, "2": 2.0})
    more = allocate(ascending(costs), costs, targets=[Target("ratio", 4 / 12)], ratios={"0": 0.0, "2": 2.0})

    assert {"2": (0, 1, 2)} == first.plan.removed
    assert {"2": (0, 1, 2), "0": (0,)} == more.plan.removed


@pytest.mark.parametrize(
    ("ratios", "message"),
    [({"0": 1.0}, "group '2' is None"), ({"0": 1.0, "2": math.nan}, "group '2' is nan"),
     ({"0": -1.0, "2": 1.0}, "group '0' is -1.0"), ({"0": 0.0, "2": 0.0}, "all groups are 0")],
)  # fmt: skip
def test_unusable_relative_ratios_are_refused(ratios: dict[str, float], message: str) -> None:
    costs = small()

    with pytest.raises(PluginError, match=message):
        allocate(ascending(costs), costs, targets=[Target("ratio", 0.2)], ratios=ratios)


@pytest.mark.parametrize("multiple", [2, 4, 8])
@pytest.mark.parametrize("name", NETWORKS)
def test_widths_stay_multiples_and_rounding_never_removes_more_than_the_limits_allow(name: str, multiple: int) -> None:
    _, costs = built(name)
    limits = Limits(multiple=multiple, max_ratio=0.7, min_channels=3)

    allocation = allocate(random_scores(costs), costs, targets=[Target("macs", 0.5)], limits=limits)

    assert allocation.achieved[0].met
    for group in costs.groups:
        kept = allocation.kept[group.name]
        assert kept == group.num_channels or kept % multiple == 0
        assert kept >= max(3, math.ceil(group.num_channels * 0.3 - 1e-9))


@pytest.mark.parametrize("target", ["macs=0.7", "macs=0.5", "params=0.3", "memory=0.6", "ratio=0.4"])
@pytest.mark.parametrize("name", ["vgg16_bn", "mobilenet_v2"])
def test_without_a_multiple_widths_are_those_that_runtimes_like_and_the_target_is_met_closely(
    name: str, target: str
) -> None:
    _, costs = built(name)

    allocation = allocate(random_scores(costs), costs, targets=[Target.parse(target)])

    (reached,) = allocation.achieved
    assert reached.met
    assert abs(reached.achieved / reached.asked - 1) <= 0.02
    cut = [group for group in costs.groups if allocation.kept[group.name] < group.num_channels]
    usual = {group.name: usual_multiple(group.num_channels, 512) for group in cut}
    finer = [name for name, multiple in usual.items() if allocation.kept[name] % multiple]
    assert len(finer) <= 3 < len(cut)  # only those that alone kept the target from being met closely


def test_a_network_of_narrow_layers_is_cut_to_the_channel() -> None:
    _, costs = built("resnet20")

    free = allocate(random_scores(costs), costs, targets=[Target("macs", 0.5)])

    assert (
        free.kept
        == allocate(random_scores(costs), costs, targets=[Target("macs", 0.5)], limits=Limits(multiple=1)).kept
    )
    assert any(kept % 2 for kept in free.kept.values())


@pytest.mark.parametrize(
    ("width", "widest", "multiple"),
    [(15, 128, 1), (16, 128, 8), (31, 128, 8), (32, 128, 16), (512, 512, 16), (64, 127, 1), (32, 64, 1)],
)
def test_the_usual_multiple_is_half_of_the_width_at_most(width: int, widest: int, multiple: int) -> None:
    assert usual_multiple(width, widest) == multiple


def test_what_is_usual_stays_that_of_the_dense_network_when_it_shrinks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 128, 1), nn.ReLU(), nn.Conv2d(128, 32, 1), nn.ReLU(), nn.Conv2d(32, 10, 1))
    x = torch.zeros(1, 3, 2, 2)
    dense, goal = cost_model(model, x), Target("macs", 0.2275)
    first = allocate(ascending(dense), dense, targets=[goal], fraction=0.92)
    assert {"0": 64, "2": 16} == kept_channels(first)
    half = cost_model(cut_channels(model, first.plan, x, groups=dense.groups).model, x)

    last = allocate(ascending(half), half, targets=[goal], reference=Reference.of(dense))

    assert {"0": 48, "2": 16} == kept_channels(last)  # to the channel, as in a network of 64 at most, it would be 49


def test_a_multiple_that_nobody_asked_for_gives_way_where_the_limits_leave_no_other_width() -> None:
    model = nn.Sequential(nn.Conv2d(3, 128, 1), nn.ReLU(), nn.Conv2d(128, 2, 1))
    costs = cost_model(model, torch.zeros(1, 3, 2, 2))
    limits = Limits(max_ratio=0.1)  # 116 channels stay

    allocation = allocate(ascending(costs), costs, targets=[Target("macs", 0.91)], limits=limits)

    assert {"0": 116} == kept_channels(allocation)
    with pytest.raises(TargetError, match="multiple=16"):
        allocate(ascending(costs), costs, targets=[Target("macs", 0.91)], limits=Limits(max_ratio=0.1, multiple=16))
    assert check_feasible(costs, [], limits)["macs"] == 116 / 128 * costs.costs.macs


@pytest.mark.usefixtures("sixty_four_is_wide")
def test_a_wide_group_that_is_rounded_gives_way_where_a_narrow_one_would_lead_far_beyond_the_target() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    costs = cost_model(model, torch.zeros(1, 3, 2, 2))
    scores = {"0": torch.arange(64.0), "2": torch.tensor([14.5, 98, 99, 99])}  # 15 of '0', one of '2', more of '0'

    allocation = allocate(scores, costs, targets=[Target("macs", 0.8)])

    assert {"0": 50, "2": 4} == kept_channels(allocation)  # a multiple of 2; one of four channels costs too much


@pytest.mark.usefixtures("sixty_four_is_wide")
@pytest.mark.parametrize(("params", "kept"), [(0.995, 46), (0.992, 32)])
def test_a_step_must_lead_near_one_of_the_targets_that_it_was_needed_for(params: float, kept: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(4, 4000))  # fmt: skip
    costs = cost_model(model, torch.zeros(1, 3, 32, 32))
    targets = [Target("macs", 0.74), Target("params", params)]

    allocation = allocate(ascending(costs), costs, targets=targets, limits=Limits(exclude=("2",)))

    assert {"0": kept, "2": 4} == kept_channels(allocation)  # 48 channels meet 0.995 of the parameters, not 0.992


@pytest.mark.parametrize(
    ("target", "kept"),
    [("macs=0.715", 180), ("macs=0.99", 252), ("ratio=0.1", 230), ("ratio=0.3", 178), ("ratio=0.01", 253)],
)
def test_the_usual_multiple_is_halved_until_the_target_is_met_closely(target: str, kept: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 256, 1, bias=False), nn.ReLU(), nn.Conv2d(256, 2, 1, bias=False))
    costs = cost_model(model, torch.zeros(1, 3, 2, 2))

    assert {"0": kept} == kept_channels(allocate(ascending(costs), costs, targets=[Target.parse(target)]))


@pytest.mark.usefixtures("sixty_four_is_wide")
def test_on_the_way_to_a_target_nothing_is_refined_that_leads_no_further_than_the_target() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 2, 1))
    costs = cost_model(model, torch.zeros(1, 3, 2, 2))

    allocation = allocate(ascending(costs), costs, targets=[Target("macs", 0.5)], fraction=0.4)

    assert {"0": 48} == kept_channels(allocation)  # 51 would do


@pytest.mark.usefixtures("sixty_four_is_wide")
@pytest.mark.parametrize(("fraction", "kept"), [(0.25, 24), (0.4, 16)])
def test_the_usual_multiple_is_that_of_the_roots_width_where_a_channel_stands_for_several(
    fraction: float, kept: int
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 1, groups=2), nn.ReLU(),
                          nn.Conv2d(64, 2, 1))  # fmt: skip
    costs = cost_model(model, torch.zeros(1, 3, 2, 2))
    limits = Limits(exclude=("2",))
    assert 32 == costs.groups["0"].num_channels

    allocation = allocate(ascending(costs), costs, targets=[Target("macs", 0.2)], limits=limits, fraction=fraction)

    assert kept == allocation.kept["0"]  # times two: multiples of 16


@pytest.mark.usefixtures("sixty_four_is_wide")
def test_limits_that_leave_less_room_than_the_usual_multiple_do_not_keep_a_group_whole() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 1), nn.ReLU(), nn.Conv2d(64, 2, 1))
    costs = cost_model(model, torch.zeros(1, 3, 2, 2))
    limits = Limits(layers={"0": LayerLimit(max_ratio=0.2)})  # 52 of 64 stay

    allocation = allocate(ascending(costs), costs, targets=[Target("ratio", 0.185)], limits=limits)

    assert {"0": 56, "2": 48} == kept_channels(allocation)


def test_an_unreachable_target_blames_only_multiples_that_somebody_asked_for() -> None:
    costs = small()
    own = Limits(layers={"0": LayerLimit(multiple=4)})

    with pytest.raises(TargetError) as nobody:
        allocate(ascending(costs), costs, targets=[Target("macs", 0.01)])
    with pytest.raises(TargetError) as somebody:
        allocate(ascending(costs), costs, targets=[Target("macs", 0.01)], limits=own)

    assert "multiple" not in str(nobody.value)
    assert "multiple=4" in str(somebody.value)
    assert "lower multiple" in str(somebody.value)


@pytest.mark.parametrize("chosen", [{"scope": "local"}, {"ratios": {"0": 1.0, "2": 1.0}}])
def test_ratios_that_somebody_chose_are_obeyed_to_the_channel(chosen: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 128, 1), nn.ReLU(), nn.Conv2d(128, 128, 1), nn.ReLU(), nn.Conv2d(128, 2, 1))
    costs = cost_model(model, torch.zeros(1, 3, 2, 2))

    allocation = allocate(ascending(costs), costs, targets=[Target("ratio", 0.2)], **chosen)

    assert {"0": 102, "2": 102} == kept_channels(allocation)
    forced = Limits(layers={"0": LayerLimit(min_ratio=0.3)})
    assert allocate(ascending(costs), costs, targets=[], limits=forced).kept["0"] == 128 - 38


def test_a_pruned_width_that_is_no_multiple_is_rounded_up_and_an_unpruned_one_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 10, 1), nn.ReLU(), nn.Conv2d(10, 7, 1), nn.ReLU(), nn.Conv2d(7, 2, 1))
    costs = cost_model(model, torch.zeros(1, 3, 2, 2))
    scores = {"0": torch.arange(10.0), "2": torch.full((7,), 100.0)}

    allocation = allocate(scores, costs, targets=[Target("ratio", 1 / 17)], limits=Limits(multiple=4))

    assert {"0": 8, "2": 7} == kept_channels(allocation)


def test_a_layer_may_have_a_multiple_of_its_own_and_the_others_keep_that_of_all() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 2, 1))
    costs = cost_model(model, torch.zeros(1, 3, 2, 2))
    limits = Limits(multiple=2, layers={"0": LayerLimit(multiple=8), "2": LayerLimit(max_ratio=0.9)})

    allocation = allocate(ascending(costs), costs, targets=[Target("ratio", 0.3)], limits=limits, scope="local")

    assert {"0": 8, "2": 10} == kept_channels(allocation)
    assert [8, 2] == [limits.multiple_of(group) for group in costs.groups]


def test_excluded_layers_stay_whole_and_a_pattern_may_name_any_writer_of_a_group() -> None:
    _, costs = built("resnet20")

    allocation = allocate(random_scores(costs), costs, targets=[Target("macs", 0.7)],
                          limits=Limits(exclude=("layer1.*.conv2", "layer2.0.conv1")))  # fmt: skip

    assert {0.0} == {allocation.ratios["conv1"], allocation.ratios["layer2.0.conv1"]}
    assert allocation.ratios["layer2.1.conv1"] > 0


def test_the_first_matching_layer_limit_counts() -> None:
    costs = small()
    limits = Limits(
        max_ratio=0.9, layers={"0": LayerLimit(min_ratio=0.5, max_ratio=0.6), "*": LayerLimit(max_ratio=0.0)}
    )

    least = allocate(ascending(costs), costs, targets=[], limits=limits)
    most = check_feasible(costs, [], limits)

    assert {"0": 4, "2": 4} == kept_channels(least)
    assert 4 / 12 == pytest.approx(most["ratio"])


def test_least_ratios_of_layers_follow_the_fraction_of_the_target() -> None:
    costs = small()
    limits = Limits(layers={"0": LayerLimit(min_ratio=0.5)})

    half = allocate(ascending(costs), costs, targets=[], limits=limits, fraction=0.5)

    assert {"0": 6, "2": 4} == kept_channels(half)


def test_least_ratios_count_what_earlier_steps_have_removed() -> None:
    model, x = chain(), torch.zeros(1, 3, 2, 2)
    costs = cost_model(model, x)
    smaller = cost_model(cut_channels(model, plan_from_channels(costs.groups, {"0": [0, 1, 2]}), x).model, x)
    limits = Limits(layers={"0": LayerLimit(min_ratio=0.5)})

    allocation = allocate(ascending(smaller), smaller, targets=[], limits=limits, reference=Reference.of(costs))

    assert {"0": 4, "2": 4} == kept_channels(allocation)
    assert {"0": 0.5, "2": 0.0} == dict(allocation.ratios)


def test_a_limit_for_a_layer_that_does_not_exist_is_refused_with_the_nearest_name() -> None:
    _, costs = built("resnet20")

    with pytest.raises(ConfigError, match=r"'layer1.0.conv3' matches no layer .*layer1.0.conv[12]"):
        allocate(random_scores(costs), costs, targets=[], limits=Limits(exclude=("layer1.0.conv3",)))


def test_a_fraction_is_a_share_of_the_way_from_dense_to_the_target() -> None:
    _, costs = built("vgg16_bn")
    target = Target("macs", 0.4)

    bounds = [
        allocate(random_scores(costs), costs, targets=[target], fraction=f).achieved[0].asked for f in (0, 0.5, 1)
    ]

    assert [costs.costs.macs * share for share in (1.0, 0.7, 0.4)] == pytest.approx(bounds)
    with pytest.raises(ConfigError, match=r"fraction of 1\.5"):
        allocate(random_scores(costs), costs, targets=[target], fraction=1.5)


@pytest.mark.parametrize("target", ["macs=0.4", "params=0.5", "ratio=0.5"])
def test_later_steps_count_targets_and_limits_from_the_dense_model(target: str) -> None:
    model, costs = built("resnet20")
    reference, goal, limits = Reference.of(costs), Target.parse(target), Limits(max_ratio=0.8)
    first = allocate(ascending(costs), costs, targets=[goal], fraction=0.6, limits=limits, scope="local")
    compact = cut_channels(model, first.plan, IMAGES, groups=costs.groups).model
    smaller = cost_model(compact, IMAGES)

    second = allocate(ascending(smaller), smaller, targets=[goal], reference=reference, limits=limits, scope="local")

    direct = allocate(ascending(costs), costs, targets=[goal], limits=limits, scope="local")
    assert second.achieved[0].met
    assert direct.kept == second.kept
    assert direct.ratios == pytest.approx(second.ratios)


def test_the_smallest_width_is_counted_from_the_dense_model_in_later_steps() -> None:
    model = chain()
    x = torch.zeros(1, 3, 2, 2)
    costs = cost_model(model, x)
    compact = cut_channels(model, plan_from_channels(costs.groups, {"0": [0, 1, 2, 3]}), x).model
    smaller = cost_model(compact, x)
    limits = Limits(max_ratio=0.5)

    with pytest.raises(TargetError, match=r"ratio of at most 0\.500"):
        allocate(
            ascending(smaller), smaller, targets=[Target("ratio", 0.6)], limits=limits, reference=Reference.of(costs)
        )


def test_a_target_out_of_reach_names_what_is_reachable_and_the_layers_that_bind() -> None:
    _, costs = built("resnet20")

    with pytest.raises(TargetError) as caught:
        allocate(
            random_scores(costs), costs, targets=[Target("macs", 0.001)], limits=Limits(exclude=("layer3.2.conv2",))
        )

    text = str(caught.value)
    assert "macs=0.001 cannot be met" in text
    assert "'layer3.0.conv2' (keeps 64 of 64)" in text or "'layer3" in text
    assert "'linear' (reaches the model's output)" in text


def test_a_multiple_that_keeps_a_group_whole_is_said_to_do_so() -> None:
    _, costs = built("resnet20")

    with pytest.raises(TargetError, match=r"'layer3.0.conv1' \(keeps 64 of 64\).*lower multiple"):
        allocate(random_scores(costs), costs, targets=[Target("macs", 0.5)], limits=Limits(multiple=64))


def test_feasibility_is_checked_without_scores() -> None:
    _, costs = built("resnet20")

    best = check_feasible(costs, [Target("macs", 0.5)], Limits(max_ratio=0.75))

    assert 0.75 == pytest.approx(best["ratio"])
    with pytest.raises(TargetError):
        check_feasible(costs, [Target("macs", 0.5)], Limits(max_ratio=0.1))


@pytest.mark.parametrize(
    ("scores", "message"),
    [({"0": torch.zeros(7), "2": torch.zeros(4)}, r"'0' have shape \(7,\), expected \(8,\)"),
     ({"0": torch.zeros(8)}, "'2' have shape none"),
     ({"0": torch.tensor([math.nan] * 2 + [1.0] * 6), "2": torch.zeros(4)}, "contain 2 NaN of 8")],
)  # fmt: skip
def test_scores_that_are_no_scores_are_refused(scores: dict[str, Tensor], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        allocate(scores, small(), targets=[Target("ratio", 0.2)])


@pytest.mark.parametrize(
    ("text", "metric", "value"),
    [("macs=0.5", "macs", 0.5), (" params = 1.2M ", "params", 1.2e6), ("memory=3k", "memory", 3e3),
     ("macs=1e9", "macs", 1e9),
     ("macs=2g", "macs", 2e9), ("ratio=0.3", "ratio", 0.3), ("sparsity=0.9", "sparsity", 0.9)],
)  # fmt: skip
def test_targets_are_read_from_text(text: str, metric: str, value: float) -> None:
    assert Target(metric, value) == Target.parse(text)


@pytest.mark.parametrize("text", ["", "macs", "macs=", "flops=0.5", "macs=-1", "macs=0", "ratio=1", "macs=1.2.3",
                                  "ratio=2k",
                                  "macs=1e999", "macs=nan"])  # fmt: skip
def test_a_target_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(TargetError):
        Target.parse(text)


@pytest.mark.parametrize(
    ("text", "value", "unit", "shown"),
    [("latency=0.7", 0.7, "", "latency=0.7"), ("latency=1", 1.0, "", "latency=1"),
     ("latency=2.0ms", 2.0, "ms", "latency=2ms"), (" latency = 350 us ", 0.35, "ms", "latency=0.35ms"),
     ("latency=350µs", 0.35, "ms", "latency=0.35ms"), ("latency=0.002s", 2.0, "ms", "latency=2ms"),
     ("latency=0.5ms", 0.5, "ms", "latency=0.5ms"), ("latency=2e-3s", 2.0, "ms", "latency=2ms")],
)  # fmt: skip
def test_a_latency_is_a_share_or_has_a_unit(text: str, value: float, unit: Literal["", "ms"], shown: str) -> None:
    found = Target.parse(text)

    assert (pytest.approx(value), unit, shown) == (found.value, found.unit, str(found))
    assert found == Target.parse(shown)
    assert found.bound(10.0) == pytest.approx(value if unit else 10 * value)


@pytest.mark.parametrize(
    ("text", "what"),
    [("latency=2", "has no unit"), ("latency=2m", "units us, ms and s"), ("latency=2min", "units us, ms and s"),
     ("latency=-1ms", "out of range"), ("latency=0", "out of range"), ("latency=1.2.3ms", "as a number"),
     ("latency=", "Cannot read"), ("latency=ms", "Cannot read"), ("latency=1e999s", "out of range")],
)  # fmt: skip
def test_a_latency_that_makes_no_sense_is_refused(text: str, what: str) -> None:
    with pytest.raises(TargetError, match=what):
        Target.parse(text)


def test_only_a_latency_has_a_unit_and_there_is_one_of_it_beside_no_sparsity() -> None:
    with pytest.raises(TargetError, match="only a latency has one"):
        parse_targets(Target("macs", 0.5, "ms"))
    with pytest.raises(TargetError, match="several latencies"):
        parse_targets(["latency=0.5", "latency=2ms"])
    with pytest.raises(TargetError, match="cannot be met together"):
        parse_targets(["latency=0.5", "sparsity=0.5"])
    assert 2 == len(parse_targets(["latency=0.5", "macs=0.5"]))


def test_a_latency_without_measured_costs_is_refused() -> None:
    costs = cost_model(chain(), IMAGES)
    scores = {group.name: torch.ones(group.num_channels) for group in costs.groups}

    with pytest.raises(TargetError, match="needs latencies that were measured"):
        allocate(scores, costs, targets=[Target("latency", 0.5)])


def test_a_latency_is_searched_for_like_other_costs() -> None:
    def milliseconds(shapes: Mapping[str, Sequence[int]]) -> float:
        return 1.0 + shapes["0.weight"][0] + shapes["2.weight"][0]

    costs = replace(cost_model(chain(), IMAGES), latency=milliseconds)
    scores = {group.name: torch.arange(1.0, group.num_channels + 1) for group in costs.groups}

    found = allocate(scores, costs, targets=[Target("latency", 9.0, "ms")])

    assert 13.0 == Reference.of(costs).costs["latency"]
    assert 9.0 == found.predicted["latency"]
    [achieved] = found.achieved
    assert (13.0, 9.0, 9.0, True) == (achieved.dense, achieved.asked, achieved.achieved, achieved.met)
    half = allocate(scores, costs, targets=[Target("latency", 9.0, "ms")], fraction=0.5)
    assert 11.0 == half.predicted["latency"]
    with pytest.raises(TargetError, match=r"at most 2 ms asked for, the limits allow no less than 3 ms"):
        allocate(scores, costs, targets=[Target("latency", 2.0, "ms")])


def test_a_measured_latency_is_met_within_its_tolerance() -> None:
    def met(achieved: float) -> bool:
        return Achieved(Target("latency", 2.0, "ms"), 4.0, 2.0, achieved).met

    assert [True, True, False] == [met(1.0), met(2.0 * 1.0299), met(2.0 * 1.0301)]


def test_limits_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match="above max_ratio"):
        LayerLimit(min_ratio=0.6, max_ratio=0.5)
    with pytest.raises(ValueError, match="max_ratio"):
        Limits(max_ratio=1.5)


def test_a_model_without_prunable_groups_allows_no_target_and_no_crash() -> None:
    costs = cost_model(nn.Sequential(nn.Conv2d(3, 4, 1)), torch.zeros(1, 3, 2, 2))

    assert {} == dict(allocate({}, costs, targets=[]).kept)
    with pytest.raises(NniPruneExtError):
        allocate({}, costs, targets=[Target("macs", 0.5)])


class WrittenByParts(nn.Module):
    """A sum whose one side is a concatenation: three layers write one group, two of them a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.whole = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(3, 8, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, 3, H, W) to (N, 2)."""
        joined = torch.cat([self.left(x), self.right(x)], 1) + self.whole(x)
        return self.head(joined.mean((2, 3)))


def test_a_layer_that_writes_a_part_of_a_group_keeps_its_best_channel() -> None:
    costs = cost_model(WrittenByParts(), torch.zeros(1, 3, 4, 4))
    (group,) = costs.groups
    scores = torch.arange(8.0)

    found = allocate({group.name: scores}, costs, targets=[Target("ratio", 0.7)], limits=Limits(max_ratio=1.0))

    left = next(m for m in group.members if m.tensor == "left.weight")
    assert (0, 1) == tuple(left.channel)
    assert {"left": (0,)}.items() <= found.plan.removed.items()
    assert 6 == found.plan.num_removed


# -- single weights ----------------------------------------------------------------------------------------------


def magnitudes(*sizes: int, seed: int = 0) -> dict[str, Tensor]:
    """Returns magnitudes of layers 'a', 'b', … of these sizes, the later the larger."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.weight": (k + 1) * torch.rand(size, generator=generator)
        for k, (name, size) in enumerate(zip("abcdef", sizes))
    }


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.floats(0.0, 1.0, exclude_max=True),
    st.sampled_from(["global", "local"]),
    st.integers(0, 1000),
)
def test_masked_weights_are_exactly_as_many_as_asked_rounded_up_and_never_a_whole_tensor(
    sizes: list[int], sparsity: float, scope: Literal["global", "local"], seed: int
) -> None:
    own = magnitudes(*sizes, seed=seed)
    wanted = math.ceil(sparsity * sum(sizes) - 1e-9)
    if wanted > sum(sizes) - len(sizes):
        with pytest.raises(TargetError, match="cannot be reached"):
            masked_counts(own, sparsity, scope=scope)
        return

    found = masked_counts(own, sparsity, scope=scope)

    assert list(own) == list(found)
    assert wanted == sum(found.values())
    assert all(0 <= found[name] < tensor.numel() for name, tensor in own.items())


def test_the_global_scope_masks_what_lies_below_one_threshold_over_all_tensors() -> None:
    own = magnitudes(50, 30, 20)

    found = masked_counts(own, 0.6)

    threshold = np.sort(np.concatenate([tensor.numpy() for tensor in own.values()]))[60]
    assert {name: int((tensor.numpy() < threshold).sum()) for name, tensor in own.items()} == found


def test_what_a_tensor_must_keep_is_taken_from_the_others() -> None:
    own = {"small.weight": torch.full((10,), 0.1), "large.weight": torch.ones(30)}

    assert {"small.weight": 9, "large.weight": 11} == masked_counts(own, 0.5)


def test_the_local_scope_masks_the_same_share_of_every_tensor_whatever_its_magnitudes() -> None:
    assert {"a.weight": 25, "b.weight": 15, "c.weight": 10} == masked_counts(magnitudes(50, 30, 20), 0.5, scope="local")
    found = masked_counts(magnitudes(7, 11, 13), 0.5, scope="local")
    assert [3.5, 5.5, 6.5] == pytest.approx(list(found.values()), abs=1)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_limits_of_single_layers_bound_their_share_and_the_total_stays(scope: Literal["global", "local"]) -> None:
    limits = Limits(layers={"a": LayerLimit(max_ratio=0.2), "c": LayerLimit(min_ratio=0.9)}, max_ratio=0.1)

    found = masked_counts(magnitudes(50, 50, 50), 0.6, scope=scope, limits=limits)

    assert found["a.weight"] == 10
    assert found["c.weight"] >= 45
    assert 90 == sum(found.values())


def test_least_shares_above_the_sparsity_are_kept() -> None:
    limits = Limits(layers={"*": LayerLimit(min_ratio=0.8)})

    assert {"a.weight": 40, "b.weight": 24} == masked_counts(magnitudes(50, 30), 0.1, limits=limits)


def test_a_sparsity_beyond_the_limits_says_how_much_may_go() -> None:
    limits = Limits(layers={"*": LayerLimit(max_ratio=0.5)})

    with pytest.raises(TargetError, match=r"0\.75 cannot be reached: the limits let 40 of 80 weights go, .* least 60"):
        masked_counts(magnitudes(50, 30), 0.75, limits=limits)


def test_equal_magnitudes_are_masked_the_same_way_each_time() -> None:
    own = {"a.weight": torch.ones(10), "b.weight": torch.ones(10)}

    assert {"a.weight": 9, "b.weight": 1} == masked_counts(own, 0.5)


def test_a_sparsity_is_a_share_and_stands_alone() -> None:
    assert 0.9 == sparsity_of(parse_targets("sparsity=0.9"))
    assert None is sparsity_of(parse_targets(["macs=0.5", "params=0.5"]))
    for text in ("sparsity=1", "sparsity=0", "sparsity=2", "sparsity=-0.5"):
        with pytest.raises(TargetError, match="above 0 and below 1"):
            parse_targets(text)
    for pair in (["sparsity=0.5", "macs=0.5"], ["ratio=0.2", "sparsity=0.5"]):
        with pytest.raises(TargetError, match="cannot be met together: a sparsity masks single weights"):
            parse_targets(pair)


def test_the_sparsity_that_was_reached_is_the_share_of_zeros_in_the_masks() -> None:
    costs, target = small(), (Target("sparsity", 0.7),)
    dense = count_costs(chain(), torch.zeros(1, 3, 2, 2))
    plan = plan_from_channels(costs.groups, {})
    masks = {"a": torch.tensor([True, False, False, False]), "b": torch.tensor([[True, False], [False, False]])}

    (found,) = achieved_targets(target, costs, plan, dense, masks)
    (without,) = achieved_targets(target, costs, plan, dense, None)

    assert (0.7, 0.75, True) == (found.asked, found.achieved, found.met)
    assert (0.0, False) == (without.achieved, without.met)


def test_a_latency_is_said_with_its_share_and_whether_it_was_met() -> None:
    target = Target.parse("latency=0.5")

    assert "asked 1 ms, achieved 1.02 ms, 0.510 of the dense 2 ms: met" in str(Achieved(target, 2.0, 1.0, 1.02))
    assert "achieved 1.04 ms, 0.520 of the dense 2 ms: MISSED" in str(Achieved(target, 2.0, 1.0, 1.04))
