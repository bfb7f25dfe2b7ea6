"""Plans to torch-pruning's history and back: both sides leave the same tensors."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import Tensor, nn

from nni_prune_ext import plan_from_channels, prune, remove_channels, trace_channel_groups
from nni_prune_ext.errors import PlanError
from nni_prune_ext.graph.channel_groups import ChannelGroups
from nni_prune_ext.plan import PruningPlan
from nni_prune_ext.testing.method_bench import BenchNet
from nni_prune_ext.testing.toy_models import ZOO
from nni_prune_ext.torch_pruning import CertifiedPruner, L1Importance, plan_from_history, plan_to_history

REPLAYED = [
    "chain", "residual", "projection", "dense", "grouped", "squeeze_excite", "swiglu", "nchw_flatten",
    "layer_norm", "transposed", "prelu", "conv1d", "segmenter", "bias_without_norm",
]  # fmt: skip


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return BenchNet().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def half(groups: ChannelGroups, seed: int = 0) -> PruningPlan:
    """Takes half of the channels of every group at random."""
    draw = np.random.default_rng(seed)
    return plan_from_channels(
        groups, {g.name: draw.permutation(g.num_channels)[: g.num_channels // 2] for g in groups if g.num_channels > 1}
    )


def replayed(model: nn.Module, example: object, history: object) -> nn.Module:
    graph = tp.DependencyGraph().build_dependency(
        model, example if isinstance(example, (tuple, dict)) else (example,), verbose=False
    )
    graph.load_pruning_history(history)
    return model


def unequal(first: nn.Module, second: nn.Module) -> list[str]:
    ours, theirs = first.state_dict(), second.state_dict()
    return [key for key, value in ours.items() if not torch.equal(value, theirs[key])]


@pytest.mark.parametrize("name", REPLAYED)
def test_replay_by_torch_pruning_leaves_the_tensors_of_our_cut(name: str) -> None:
    torch.manual_seed(0)
    net, example = ZOO[name].build(), ZOO[name].example_inputs()
    groups = trace_channel_groups(net, example)
    plan = half(groups)

    ours = remove_channels(net, plan, example, groups=groups).model
    theirs = replayed(copy.deepcopy(net), example, plan_to_history(plan, groups))

    assert [] == unequal(ours, theirs)
    assert plan == plan_from_history(groups, plan_to_history(plan, groups))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "regnet_y_400mf"])
def test_plan_for_a_torchvision_model_is_replayed_by_torch_pruning(name: str) -> None:
    torch.manual_seed(0)
    net, example = torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 64, 64)
    groups = trace_channel_groups(net, example)
    plan = half(groups)

    theirs = replayed(copy.deepcopy(net), example, plan_to_history(plan, groups))

    assert [] == unequal(remove_channels(net, plan, example, groups=groups, certify=False).model, theirs)


def test_steps_of_the_certified_pruner_are_replayed_by_torch_pruning_and_read_back_as_one_plan(
    model: nn.Module, x: Tensor
) -> None:
    dense, groups = copy.deepcopy(model), trace_channel_groups(model, x)
    pruner = CertifiedPruner(
        model, x, L1Importance(model, x), ignored_layers=[model.head], pruning_ratio=0.5, iterative_steps=3
    )

    reports = [pruner.step() for _ in range(3)]
    plan = plan_from_history(groups, pruner.pruning_history())

    assert 3 * 3 == len(pruner.pruning_history())
    assert [] == unequal(model, remove_channels(dense, plan, x).model)
    assert plan.removed == reports[0].removal.plan.then(reports[1].removal.plan).then(reports[2].removal.plan).removed
    assert [] == unequal(model, replayed(dense, x, pruner.pruning_history()))


def test_history_of_a_vanilla_pruner_is_carried_out_by_the_certified_one(model: nn.Module, x: Tensor) -> None:
    fresh, theirs = copy.deepcopy(model), copy.deepcopy(model)
    vanilla = tp.pruner.BasePruner(
        theirs, (x,), tp.importance.MagnitudeImportance(), ignored_layers=[theirs.head], pruning_ratio=0.5,
        iterative_steps=2, in_channel_groups={}, out_channel_groups={}, num_heads={},
    )  # fmt: skip
    vanilla.step()
    vanilla.step()

    pruner = CertifiedPruner(fresh, x, L1Importance(fresh, x))
    pruner.load_pruning_history(vanilla.pruning_history())

    assert [] == unequal(fresh, theirs)


def test_cut_that_torch_pruning_records_twice_counts_once(model: nn.Module, x: Tensor) -> None:
    groups, theirs = trace_channel_groups(model, x), copy.deepcopy(model)
    graph = tp.DependencyGraph().build_dependency(theirs, (x,))
    for layer, gone in ((theirs.inside[0], [1, 3, 15]), (theirs.stem[0], [0])):
        graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(layer.out_channels))).prune(idxs=gone)
    history = graph.pruning_history()
    assert 4 == len(history), "the host is mended: shorten the page"
    assert list(range(16)) == history[1][2]

    plan = plan_from_history(groups, history)

    assert (1, 3, 15) == plan.removed["inside.0"]
    assert [] == unequal(remove_channels(model, plan, x).model, theirs)


def test_indices_count_in_the_model_that_the_entries_before_have_left(model: nn.Module, x: Tensor) -> None:
    groups = trace_channel_groups(model, x)

    plan = plan_from_history(groups, [["inside.0", True, [0, 1]], ["inside.0", True, [0, 13]], ["back.0", False, [0]]])

    assert {"inside.0": (0, 1, 2, 3, 15)} == plan.removed


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([["inside.0", True, [16]]], "cuts channel 16 of 'inside.0', expected 0 to 15"),
        ([["inside.0", True, [0]], ["inside.0", True, [15]]], "cuts channel 15 of 'inside.0', expected 0 to 14"),
        ([["head", True, [0]]], "cuts output channels of 'head', which is protected: .*output"),
        ([["nowhere", True, [0]]], "'nowhere', which is no layer with prunable channels"),
        ([["inside.0", True]], r"has an entry \['inside.0', True\], expected \[layer, is_out, indices\]"),
    ],
)
def test_history_that_is_not_of_this_model_is_refused(
    history: list[list[object]], message: str, model: nn.Module, x: Tensor
) -> None:
    with pytest.raises(PlanError, match=message):
        plan_from_history(trace_channel_groups(model, x), history)


def test_entry_that_tears_tied_channels_is_refused() -> None:
    net, example = ZOO["grouped"].build(), ZOO["grouped"].example_inputs()
    groups = trace_channel_groups(net, example)
    layer = next(name for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 4)

    with pytest.raises(PlanError, match=f"cuts channels of '{layer}' but keeps channel 3, which is tied"):
        plan_from_history(groups, [[layer, True, [0]]])


def test_plan_that_rewrites_a_shortcut_or_is_of_another_model_has_no_history(model: nn.Module, x: Tensor) -> None:
    net, example = ZOO["option_a"].build(), ZOO["option_a"].example_inputs()
    groups = trace_channel_groups(net, example)

    with pytest.raises(PlanError, match="rewrites the shortcut.*torch-pruning has no step for that"):
        plan_to_history(half(groups), groups)
    with pytest.raises(PlanError, match="made for another model"):
        plan_to_history(half(groups), trace_channel_groups(model, x))


def test_own_pipelines_plan_goes_to_a_history_and_back(model: nn.Module, x: Tensor) -> None:
    result = prune(model, x, target="params=0.5")

    history = plan_to_history(result.plan, result.groups)

    assert result.plan == plan_from_history(result.groups, history)
    assert [] == unequal(result.model, replayed(copy.deepcopy(model), x, history))


class LaterRoot(nn.Module):
    """The second layer writes four channels with the first one, and four more before the third one does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.first(x), self.second(x), self.third(x)
        result: Tensor = self.head(torch.relu(torch.cat([first, third], 1) + second))
        return result


def test_indices_of_a_layer_that_an_entry_before_has_cut_are_shifted(x: Tensor) -> None:
    torch.manual_seed(0)
    net = LaterRoot()
    groups = trace_channel_groups(net, x)
    plan = plan_from_channels(groups, {"first": [1, 6]})
    assert {"first": (1,), "second": (6,)} == plan.removed

    history = plan_to_history(plan, groups)

    assert [["first", True, [1]], ["second", True, [5]]] == history
    assert plan == plan_from_history(groups, history)
    assert [] == unequal(remove_channels(net, plan, x, groups=groups).model, replayed(copy.deepcopy(net), x, history))
