"""Methods that search or train, as torch-pruning importances: their decision is what torch-pruning removes."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from nni_prune_ext import prune, trace_channel_groups, verify_groups
from nni_prune_ext.allocation import LayerLimit, Limits
from nni_prune_ext.errors import ConfigError, PluginError
from nni_prune_ext.methods import lottery_jackpots
from nni_prune_ext.methods.base import Batch
from nni_prune_ext.models.loading import build_model
from nni_prune_ext.pipeline import method_spec
from nni_prune_ext.plan import removed_channels
from nni_prune_ext.registry import plugins
from nni_prune_ext.scoring.group_reduction import group_importance
from nni_prune_ext.scoring.weight_norms import l1_norm
from nni_prune_ext.testing.method_bench import BenchNet, modes_of
from nni_prune_ext.testing.toy_blocks import conv
from nni_prune_ext.torch_pruning import (
    CertifiedPruner,
    DecisionImportance,
    LotteryJackpotsImportance,
    importance_for,
)

FRESH: dict[str, object] = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}
OPTIONS: dict[str, object] = {"search_epochs": 3, "gap": 0.001}
"""A low barrier and few epochs: channels are swapped within seconds."""
DECIDING = [
    name for name in plugins("pruners") if method_spec(name).scores is None and "plan" in method_spec(name).products
]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return BenchNet()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)) for _ in range(3)
    ]


def searched(model: nn.Module, x: Tensor, data: list[Batch], **changes: Any) -> LotteryJackpotsImportance:
    arguments: dict[str, Any] = {"pruning_ratio": 0.5, "batches": data, "options": OPTIONS}
    return LotteryJackpotsImportance(model, x, **{**arguments, **changes})


def own_result(model: nn.Module, x: Tensor, batches: list[Batch], **arguments: Any) -> dict[str, Tensor]:
    """Returns the tensors that our own pipeline leaves, right after the cut."""
    options = {**OPTIONS, "tune_epochs": 0}
    limits = Limits(max_ratio=1.0)
    given: dict[str, Any] = {"target": "ratio=0.5", "scope": "local", "options": options, "limits": limits}
    result = prune(
        copy.deepcopy(model), x, method="lottery_jackpots", train_batches=batches, **{**given, **arguments}
    ).removed_only
    return {name: parameter.detach() for name, parameter in result.named_parameters()}


def alike(expected: dict[str, Tensor], model: nn.Module) -> bool:
    found = dict(model.named_parameters())
    return expected.keys() == found.keys() and all(torch.equal(t, found[name]) for name, t in expected.items())


@pytest.mark.parametrize("certified", [True, False])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_both_pruners_remove_exactly_the_searched_channels(
    certified: bool, scope: str, model: nn.Module, x: Tensor, batches: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    expected = own_result(model, x, batches, scope=scope)
    unsearched = own_result(model, x, batches, scope=scope, options={"control": "recalibrated"})
    importance = searched(model, x, batches, scope=scope)
    arguments = {"pruning_ratio": 0.5, "global_pruning": scope == "global", "ignored_layers": [model.head]}

    if certified:
        report = CertifiedPruner(model, x, importance, **arguments).step()
        assert report.certificate is not None
        assert report.certificate.exact
    else:
        tp.pruner.BasePruner(model, (x,), importance, **{**FRESH, **arguments}).step()

    assert alike(expected, model)
    assert not alike(unsearched, model), "the search has swapped something"
    assert importance.facts["swaps_made"] > 0
    assert [] == caplog.records


def chain(first: int = 16, second: int = 32, third: int = 64) -> nn.Module:
    """Returns three layers, by default of 16, 32 and 64 channels: a share of 0.3 is 5, 10 and 20 of each, 34 of all."""
    torch.manual_seed(0)
    return nn.Sequential(conv(3, first), nn.ReLU(), conv(first, second), nn.ReLU(), conv(second, third), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(third, 4))  # fmt: skip


@pytest.mark.parametrize("certified", [True, False])
@pytest.mark.parametrize(("ratio", "counts"), [(0.3, [5, 10, 20]), (0.45, [8, 15, 29])])
def test_the_method_is_asked_for_as_many_channels_of_every_layer_as_torch_pruning_takes(
    certified: bool, ratio: float, counts: list[int], x: Tensor, batches: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    model = chain()
    names = ["0.0", "2.0", "4.0"]
    shares = {name: count / width for name, count, width in zip(names, counts, (16, 32, 64))}
    layers = {name: LayerLimit(min_ratio=share, max_ratio=share) for name, share in shares.items()}
    expected = own_result(model, x, batches, target=f"ratio={sum(counts) / 112}", limits=Limits(layers=layers))
    importance = searched(model, x, batches, pruning_ratio=ratio)
    arguments = {"pruning_ratio": ratio, "ignored_layers": [model[8]]}

    if certified:
        CertifiedPruner(model, x, importance, **arguments).step()
    else:
        tp.pruner.BasePruner(model, (x,), importance, **{**FRESH, **arguments}).step()

    assert importance.decision is not None
    assert counts == [int((importance.decision[name] < 1).sum()) for name in names]
    assert [16 - counts[0], 32 - counts[1], 64 - counts[2]] == [model[k][0].out_channels for k in (0, 2, 4)]
    assert alike(expected, model)
    assert [] == caplog.records


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.37, 0.5, 0.83, 0.9])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_no_ratio_leads_to_other_counts(
    ratio: float, scope: str, x: Tensor, batches: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    model = chain(20, 30, 50)  # of 100 channels torch-pruning takes 91 where 0.9 are asked for: it counts in floats
    importance = searched(model, x, batches, pruning_ratio=ratio, scope=scope, options={"control": "recalibrated"})

    report = CertifiedPruner(
        model, x, importance, pruning_ratio=ratio, global_pruning=scope == "global", ignored_layers=[model[8]]
    ).step()

    assert importance.decision is not None
    decided = {name: int((scores < 1).sum()) for name, scores in importance.decision.items()}
    assert {c.layer: decided[c.layer] for c in report.layers} == {c.layer: c.removed for c in report.layers}
    assert sum(decided.values()) == report.removed
    assert [] == caplog.records


@pytest.mark.parametrize("scope", ["local", "global"])
def test_where_torch_pruning_takes_other_channels_than_were_decided_a_warning_says_so_once(
    scope: str, x: Tensor, batches: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=4)
    importance = searched(model, x, batches, pruning_ratio=0.3, scope=scope, options={"search_epochs": 1})
    graph = tp.DependencyGraph().build_dependency(model, (x,), verbose=False)
    arguments = {"pruning_ratio": 0.3, "global_pruning": scope == "global", "ignored_layers": [model.linear]}

    for group in graph.get_all_groups(ignored_layers=[model.linear], root_module_types=[nn.Conv2d]):
        importance(group)
    CertifiedPruner(model, x, importance, **arguments).step()

    (record,) = caplog.records
    said = record.getMessage()
    assert "of 112 channels of conv1, layer2.0.conv2, layer3.0.conv2, but of group 'conv1'" in said
    assert "of 16 indices" in said
    if scope == "local":
        assert "removes 35 of 112" in said
        assert "will take 5 of 16 indices, which stand for 15 channels" in said
        assert 11 == model.conv1.out_channels
        assert 64 - 20 == model.layer3[0].conv1.out_channels


def test_every_removed_channel_is_below_every_kept_one_and_magnitude_orders_both_sides(
    model: nn.Module, x: Tensor, batches: list[Batch]
) -> None:
    importance = searched(model, x, batches, scope="global")
    graph = tp.DependencyGraph().build_dependency(model, (x,), verbose=False)

    importance(graph.get_pruning_group(model.stem[0], tp.prune_conv_out_channels, list(range(12))))

    decision = importance.decision
    assert decision is not None
    groups = {group.name: group for group in importance.followed.current()}
    plan = prune(
        model, x, method="lottery_jackpots", target="ratio=0.5", train_batches=batches,
        options={**OPTIONS, "tune_epochs": 0}, limits=Limits(max_ratio=1.0),
    ).plan  # fmt: skip
    gone = {name: torch.from_numpy(own) for name, own in removed_channels(plan, importance.followed.current()).items()}
    removed = torch.cat([decision[name][own] for name, own in gone.items()])
    kept = torch.cat([decision[name][~own] for name, own in gone.items()])
    assert removed.max() < 1 <= kept.min()
    for name, scores in decision.items():
        size = group_importance(groups[name], dict(model.named_parameters()), l1_norm)
        for side in (gone[name], ~gone[name]):
            assert torch.equal(size[side].argsort(), scores[side].argsort())


def test_a_host_that_removes_more_takes_the_weakest_of_what_was_kept(
    model: nn.Module, x: Tensor, batches: list[Batch]
) -> None:
    importance = searched(model, x, batches, pruning_ratio=0.25)

    CertifiedPruner(model, x, importance, pruning_ratio=0.5, ignored_layers=[model.head]).step()

    assert 8 == model.inside[0].out_channels
    assert importance.decision is not None
    assert 4 == int((importance.decision["inside.0"] < 1).sum())


def test_the_model_keeps_its_weights_modes_gradients_and_random_state(
    model: nn.Module, x: Tensor, batches: list[Batch]
) -> None:
    graph = tp.DependencyGraph().build_dependency(model, (x,), verbose=False)
    model.train()
    model.stem.eval()
    model.back.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes, random = modes_of(model), torch.get_rng_state()

    with torch.no_grad():
        searched(model, x, batches)(graph.get_pruning_group(model.stem[0], tp.prune_conv_out_channels, [0, 1]))

    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert modes == modes_of(model)
    assert torch.equal(random, torch.get_rng_state())
    assert bool((model.head.weight.grad == 1).all())
    assert not any(parameter.requires_grad for parameter in model.back.parameters())


def test_layers_that_the_pruner_ignores_stay_open_in_the_search(
    model: nn.Module, x: Tensor, batches: list[Batch]
) -> None:
    groups = verify_groups(model, x, trace_channel_groups(model, x)).protecting({"inside.0": "is ignored"})
    expected = own_result(model, x, batches, groups=groups)
    ignored = [model.head, model.inside]
    importance = searched(model, x, batches, ignored_layers=ignored)

    CertifiedPruner(model, x, importance, pruning_ratio=0.5, ignored_layers=ignored).step()

    assert 16 == model.inside[0].out_channels
    assert alike(expected, model)


@pytest.mark.parametrize("certified", [True, False])
def test_a_second_step_over_groups_that_were_cut_is_refused(
    certified: bool, model: nn.Module, x: Tensor, batches: list[Batch]
) -> None:
    arguments = {"pruning_ratio": 0.5, "iterative_steps": 2, "ignored_layers": [model.head]}
    importance = searched(model, x, batches)
    pruner = (
        CertifiedPruner(model, x, importance, **arguments)
        if certified
        else tp.pruner.BasePruner(model, (x,), importance, **{**FRESH, **arguments})
    )
    pruner.step()
    now = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    with pytest.raises(ConfigError, match=r"was cut since the method .* Set iterative_steps=1"):
        pruner.step()

    assert all(torch.equal(tensor, now[name]) for name, tensor in model.state_dict().items())


def test_the_method_runs_once(
    model: nn.Module, x: Tensor, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    importance = searched(model, x, batches)
    plain = importance.spec.build
    importance.spec = dataclasses.replace(importance.spec, build=lambda options: calls.append(1) or plain(options))

    tp.pruner.BasePruner(
        model, (x,), importance, **{**FRESH, "pruning_ratio": 0.5, "ignored_layers": [model.head]}
    ).step()

    assert [1] == calls


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pruning_ratio": 0.0}, "is 0.0, expected a number above 0 and below 1"),
        ({"pruning_ratio": 1.0}, "is 1.0, expected a number above 0 and below 1"),
        ({"pruning_ratio": "0.5"}, "is '0.5', expected a number"),
        ({"batches": None}, "was given no data, expected training batches"),
        ({"scope": "lokal"}, "The scope is 'lokal'"),
        ({"options": {"search_epochs": -1}}, "Option 'search_epochs' of method 'lottery_jackpots' is -1"),
        ({"options": {"tune_epochs": 2}}, "tune_epochs=2 was asked for, expected 0"),
    ],
)
def test_wrong_arguments_are_refused_at_once(
    changes: dict[str, Any], said: str, model: nn.Module, x: Tensor, batches: list[Batch]
) -> None:
    with pytest.raises(ConfigError, match=said):
        searched(model, x, batches, **changes)


def test_data_without_a_batch_is_refused(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(ConfigError, match="gave no batch"):
        CertifiedPruner(model, x, searched(model, x, []), pruning_ratio=0.5).step()


def test_every_method_that_removes_channels_has_a_class_and_the_named_one_is_it() -> None:
    assert "lottery_jackpots" in DECIDING
    assert LotteryJackpotsImportance is importance_for("lottery_jackpots")
    assert all(issubclass(importance_for(name), DecisionImportance) for name in DECIDING)


def test_a_method_that_removes_no_channels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    masked = dataclasses.replace(lottery_jackpots.LOTTERY_JACKPOTS, products=frozenset({"weight_masks"}))
    monkeypatch.setattr(lottery_jackpots, "MASKED", masked, raising=False)

    with pytest.raises(PluginError, match="hands over weight_masks, expected a plan"):
        importance_for("nni_prune_ext.methods.lottery_jackpots:MASKED")
