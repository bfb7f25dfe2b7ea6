"""The main job from end to end on tiny networks: what is promised about the result, and what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nni_prune_ext import method_cut
from nni_prune_ext.allocation import Limits, Target, checked_scope, parse_targets
from nni_prune_ext.certificate import certify_plan, remove_channels
from nni_prune_ext.costs import count_costs
from nni_prune_ext.errors import ConfigError, PluginError, TargetError, UnknownPluginError
from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.methods import chosen_method
from nni_prune_ext.methods.base import MethodContext, MethodSpec, NoOptions, Outcome, Phase, PruningMethod
from nni_prune_ext.methods.baselines import L1, L2
from nni_prune_ext.pipeline import PruneResult, method_options, prune
from nni_prune_ext.plan import plan_from_channels
from nni_prune_ext.surgery import Removal
from nni_prune_ext.testing.method_bench import Bench, BenchNet, modes_of, traces_on
from nni_prune_ext.testing.toy_models import ZOO
from nni_prune_ext.training import TrainingSettings

STEPS = {"steps": 3, "schedule": "agp", "epochs_per_step": 1}


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench.of(L1, {})


def pruned(bench: Bench, **changes: object) -> PruneResult:
    arguments: dict[str, object] = {"method": "l1", "target": "macs=0.6", "groups": bench.groups, **changes}
    return prune(bench.model, bench.example, **arguments)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_result_holds_a_certified_compact_model_and_costs_that_were_counted(bench: Bench) -> None:
    result = pruned(bench)

    assert result.certificate is not None
    assert result.certificate.exact
    assert count_costs(result.model, bench.example) == result.costs
    assert count_costs(bench.model, bench.example) == result.dense
    assert result.costs.macs <= 0.6 * result.dense.macs
    assert [(Target("macs", 0.6), float(result.costs.macs))] == [(a.target, a.achieved) for a in result.achieved]
    assert "l1" == result.method


def test_the_plan_carried_out_on_the_original_gives_the_compact_model(bench: Bench) -> None:
    result = pruned(bench)

    again = remove_channels(bench.model, result.plan, bench.example, groups=bench.groups)

    assert equal(weights(again.model), weights(result.removed_only))


def test_the_users_model_is_not_changed_by_steps_training_and_recovery(bench: Bench) -> None:
    before, modes = weights(bench.model), modes_of(bench.model)

    pruned(bench, options=STEPS, train_batches=bench.batches, recover_epochs=1)

    assert equal(before, weights(bench.model))
    assert modes == modes_of(bench.model)
    assert [] == traces_on(bench.model)


def test_three_cuts_with_training_between_compose_to_one_certified_plan(bench: Bench) -> None:
    result = pruned(bench, options=STEPS, train_batches=bench.batches, target=["macs=0.5", "params=0.6"])

    certificate = certify_plan(bench.model, result.plan, bench.example, groups=bench.groups)
    assert certificate.exact
    assert result.certificate is not None
    assert result.certificate.exact
    assert all(a.met for a in result.achieved)
    assert ["cut 1", "cut 2"] == [log.phase for log in result.logs]
    widths = {name: len(tensor) for name, tensor in weights(result.model).items() if name.endswith("0.weight")}
    for root, width in result.plan.widths.items():
        assert widths[f"{root}.weight"] == width - len(result.plan.removed.get(root, ()))


@pytest.mark.parametrize("name", ["option_a", "dense", "grouped", "projection"])
def test_cuts_in_steps_compose_on_other_topologies_too(name: str) -> None:
    torch.manual_seed(0)
    model, x = ZOO[name].build().eval(), ZOO[name].example_inputs()

    result = prune(model, x, method="l2", target="params=0.6", options={"steps": 3, "schedule": "linear"})

    assert result.certificate is not None
    assert result.certificate.exact
    rebuilt = remove_channels(model, result.plan, x).model
    assert torch.allclose(rebuilt(x), result.removed_only.eval()(x), atol=1e-6)


def test_protected_groups_stay_protected_in_every_step(bench: Bench) -> None:
    groups = bench.groups.protecting({"inside.0": "asked for"})

    result = pruned(bench, groups=groups, options=STEPS, train_batches=bench.batches, target="ratio=0.3")

    assert "inside.0" not in result.plan.removed
    assert "inside.0" in {p.root for p in result.groups.protected}


def test_a_target_of_the_dense_model_removes_nothing_also_in_steps(bench: Bench) -> None:
    for options in ({}, {"steps": 3, "schedule": "linear"}):
        result = pruned(bench, target="macs=1", options=options)

        assert 0 == result.plan.num_removed
        assert result.costs == result.dense


def test_recovery_trains_a_copy_and_keeps_the_model_that_was_only_cut(bench: Bench) -> None:
    result = pruned(bench, train_batches=bench.batches, recover_epochs=2, settings=TrainingSettings(learning_rate=0.1))

    only_cut = pruned(bench)
    assert equal(weights(only_cut.model), weights(result.removed_only))
    assert not equal(weights(result.removed_only), weights(result.model))
    assert ["recovery", "recovery"] == [log.phase for log in result.logs]
    assert [] == traces_on(result.model)


def test_with_data_but_without_epochs_only_statistics_are_recalibrated(bench: Bench) -> None:
    result = pruned(bench, train_batches=bench.batches)

    changed = {
        name
        for name, tensor in weights(result.model).items()
        if not torch.equal(tensor, weights(result.removed_only)[name])
    }
    assert changed
    assert all("running_" in name or "num_batches" in name for name in changed)


def test_only_the_users_loss_looks_into_a_batch(bench: Bench) -> None:
    records = [{"pixels": images, "label": labels} for images, labels in bench.batches]

    def loss(model: nn.Module, record: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(record["pixels"]), record["label"])

    result = pruned(bench, method="taylor", train_batches=records, loss=loss, recover_epochs=1)

    same = pruned(bench, method="taylor", train_batches=bench.batches, recover_epochs=1)
    assert equal(weights(same.model), weights(result.model))


def test_two_runs_with_one_seed_agree_also_with_dropout_and_another_seed_differs() -> None:
    class WithDropout(BenchNet):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(images, 0.3, self.training))

    torch.manual_seed(0)
    model, bench = WithDropout(), Bench.of(L1, {})

    def run(seed: int) -> dict[str, Tensor]:
        torch.rand(3)  # the caller's random state does not matter
        result = prune(model, bench.example, target="macs=0.6", options=STEPS, train_batches=bench.batches,
                       recover_epochs=1,
                       seed=seed)  # fmt: skip
        return weights(result.model)

    first, second, third = run(0), run(0), run(1)
    assert equal(first, second)
    assert not equal(first, third)


def test_a_method_that_is_not_registered_can_be_passed_as_it_is(bench: Bench) -> None:
    assert pruned(bench, method=L2).plan == pruned(bench, method="l2").plan


def test_weight_masks_are_cut_like_the_model(bench: Bench) -> None:
    class Masks(PruningMethod):
        def phases(self) -> list[Phase]:
            return [Phase("score")]

        def finish(self, context: MethodContext) -> Outcome:
            mask = torch.zeros(16, 12, 3, 3, dtype=torch.bool)
            mask[5:] = True
            return Outcome(
                plan_from_channels(context.groups, {"inside.0": [0, 9]}), weight_masks={"inside.0.weight": mask}
            )

    spec = MethodSpec(
        "masks", "one sentence", "none", NoOptions, lambda _: Masks(), products=frozenset({"weight_masks"})
    )

    result = pruned(bench, method=spec, target="macs=1")

    assert result.outcome.weight_masks is not None
    mask = result.outcome.weight_masks["inside.0.weight"]
    assert result.model.inside[0].weight.shape == mask.shape
    assert [False] * 4 + [True] * 10 == mask[:, 0, 0, 0].tolist()


def test_the_method_is_told_about_the_last_cut_too_and_leaves_nothing_on_the_result(bench: Bench) -> None:
    told: list[tuple[int, int]] = []

    class Told(PruningMethod):
        def phases(self) -> list[Phase]:
            return [Phase("score")]

        def finish(self, context: MethodContext) -> Outcome:
            return Outcome(plan_from_channels(context.groups, {"inside.0": [0, 9]}))

        def on_removed(self, context: MethodContext, removal: Removal) -> None:
            context.on_leave(context.model.register_forward_hook(lambda *_: None).remove)
            told.append((context.model.inside[0].out_channels, removal.plan.num_removed))

    spec = MethodSpec("told", "one sentence", "none", NoOptions, lambda _: Told())

    result = pruned(bench, method=spec, target="macs=1")

    assert [(14, 2)] == told
    assert [] == traces_on(result.model) + traces_on(result.removed_only)


def test_the_local_scope_and_limits_reach_the_allocation(bench: Bench) -> None:
    result = pruned(bench, scope="local", limits=Limits(exclude=("whole.*",), max_ratio=0.5), target="ratio=0.3")

    assert "whole.0" not in result.plan.removed
    shares = {root: len(gone) / result.plan.widths[root] for root, gone in result.plan.removed.items()}
    assert max(shares.values()) - min(shares.values()) <= 1 / 12 + 1e-9


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "l3"}, UnknownPluginError, "no pruner called 'l3'"),
        ({"method": "taylor"}, ConfigError, "method 'taylor' needs training data"),
        ({"recover_epochs": 2}, ConfigError, "Recovery over 2 epochs needs training data"),
        (
            {"options": {"steps": 2, "epochs_per_step": 1}},
            ConfigError,
            "training between its steps needs training data",
        ),
        ({"options": {"step": 2}}, ConfigError, "Option 'step' .* Known options: steps"),
        ({"options": {"steps": 0}}, ConfigError, "Option 'steps' of method 'l1' is 0"),
        ({"options": {"schedule": "uniform_ratio"}}, PluginError, "is a ratio policy, expected a schedule"),
        ({"options": {"schedule": "never"}}, UnknownPluginError, "no scheduler called 'never'"),
        ({"target": "speed=2"}, TargetError, "Cannot read the target 'speed=2'"),
        ({"target": Target("macs", -1.0)}, TargetError, "out of range"),
        ({"target": "macs=0.001"}, TargetError, "cannot be met"),
        ({"limits": Limits(exclude=("stem.7",))}, ConfigError, "matches no layer"),
        ({"train_batches": []}, ConfigError, "gave no batch"),
    ],
)
def test_mistakes_are_refused_before_anything_is_cut(
    bench: Bench, changes: dict[str, object], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts: list[int] = []
    if "train_batches" not in changes:
        monkeypatch.setattr(method_cut, "remove_channels", lambda *args, **kwargs: cuts.append(1))

    with pytest.raises(error, match=message):
        pruned(bench, **changes)

    assert [] == cuts


def test_something_else_registered_as_a_pruner_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen_method, "load_plugin", lambda kind, name: 3.14)

    with pytest.raises(PluginError, match="is a float, expected a MethodSpec"):
        pruned(bench)


def test_scopes_options_and_targets_are_checked_on_their_own() -> None:
    assert "local" == checked_scope("local")
    with pytest.raises(ConfigError, match="expected 'global'"):
        checked_scope("regional")
    assert 4 == method_options(L1, {"steps": 4}).steps
    assert (Target("macs", 0.5), Target("ratio", 0.25)) == parse_targets(["macs=0.5", Target("ratio", 0.25)])


def test_groups_from_an_earlier_call_save_the_trace_and_give_the_same(bench: Bench) -> None:
    traced = trace_channel_groups(bench.model, bench.example)

    assert traced.fingerprint == bench.groups.fingerprint
    assert prune(copy.deepcopy(bench.model), bench.example, target="macs=0.6").plan == pruned(bench).plan


def test_no_target_and_negative_recovery_are_refused(bench: Bench) -> None:
    with pytest.raises(TargetError, match="No target was given"):
        pruned(bench, target=[])
    with pytest.raises(ConfigError, match="recover_epochs is -1"):
        pruned(bench, recover_epochs=-1)


@pytest.mark.parametrize("text", ["macs=1.5", "params=2", "memory=999"])
def test_a_target_between_a_share_and_a_plausible_number_is_refused(text: str) -> None:
    with pytest.raises(TargetError, match=r"Did you mean a share like 0\.5"):
        parse_targets(text)
    assert 500 == parse_targets("macs=0.5k")[0].value


def test_a_negative_target_is_out_of_range_not_unreadable() -> None:
    with pytest.raises(TargetError, match="macs=-1 is out of range"):
        parse_targets("macs=-1")


def test_masked_weights_stay_zero_through_recovery_and_right_after_the_cut() -> None:
    class Masking(PruningMethod):
        def phases(self) -> list[Phase]:
            return [Phase("mask")]

        def finish(self, context: MethodContext) -> Outcome:
            weight = context.model.get_parameter("inside.0.weight")
            mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
            return Outcome(
                plan_from_channels(context.groups, {"stem.0": [1, 4]}), weight_masks={"inside.0.weight": mask}
            )

    spec = MethodSpec(
        "masking", "x", "none", NoOptions, lambda _: Masking(), products=frozenset({"plan", "weight_masks"})
    )
    bench = Bench.of(spec, {})

    result = prune(
        bench.model, bench.example, method=spec, target="macs=0.99", train_batches=bench.batches, recover_epochs=2
    )

    mask = result.outcome.weight_masks["inside.0.weight"]
    assert (16, 10, 3, 3) == mask.shape
    for model in (result.removed_only, result.model):
        weight = model.get_parameter("inside.0.weight")
        assert 0 == weight[~mask].abs().max() < weight[mask].abs().min()
    assert not torch.equal(result.removed_only.get_parameter("inside.0.weight"), weight)


# -- single weights ----------------------------------------------------------------------------------------------


class Smallest(PruningMethod):
    """Masks the smallest weights where these are asked for; else removes what L1 removes."""

    def phases(self) -> list[Phase]:
        return [Phase("mask")]

    def finish(self, context: MethodContext) -> Outcome:
        nothing = plan_from_channels(context.groups, {})
        weights = {name: context.model.get_parameter(name).detach().abs() for name in context.maskable}
        masks = {}
        for name, count in context.masked_counts(weights).items() if weights else ():
            masks[name] = weights[name] > weights[name].flatten().sort().values[max(count - 1, 0)]
        return Outcome(nothing, weight_masks=masks, facts={"tensors": len(masks), "unit": len(context.unit)})


SMALLEST = MethodSpec(
    "smallest", "one sentence", "none", NoOptions, lambda _: Smallest(), products=frozenset({"plan", "weight_masks"})
)


def test_a_sparsity_masks_single_weights_of_convolutions_and_removes_nothing(bench: Bench) -> None:
    before = weights(bench.model)

    result = pruned(bench, method=SMALLEST, target="sparsity=0.7")

    masks = result.outcome.weight_masks
    assert masks is not None
    names = ["stem.0.weight", "inside.0.weight", "back.0.weight", "depthwise.0.weight", "whole.0.weight"]
    assert names == list(masks)
    everything = torch.cat([before[name].abs().flatten() for name in names]).sort().values
    threshold = everything[math.ceil(0.7 * len(everything))]
    for name in names:
        assert torch.equal(before[name].abs() >= threshold, masks[name])
        assert torch.equal(before[name] * masks[name], result.model.get_parameter(name))
    assert (0, True) == (result.plan.num_removed, result.achieved[0].met)
    assert 0.7 == pytest.approx(result.achieved[0].achieved, abs=1e-3)
    assert result.costs.macs == result.dense.macs


def test_a_method_is_told_whether_channels_or_weights_are_asked_for(bench: Bench) -> None:
    limits = Limits(exclude=("stem.*", "whole.*"))

    channels = pruned(bench, method=SMALLEST, target="macs=1")
    single = pruned(bench, method=SMALLEST, target="sparsity=0.5", limits=limits)

    assert {"tensors": 0, "unit": len("channel")} == channels.outcome.facts
    assert {"tensors": 3, "unit": len("weight")} == single.outcome.facts


def test_single_weights_in_one_share_per_layer_with_the_local_scope(bench: Bench) -> None:
    result = pruned(bench, method=SMALLEST, target="sparsity=0.5", scope="local")

    for name, mask in (result.outcome.weight_masks or {}).items():
        assert int(mask.sum()) == pytest.approx(mask.numel() / 2, abs=1), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "sparsity=0.5"}, "is about single weights, but the method 'l1' removes channels only"),
        ({"target": ["sparsity=0.5", "macs=0.5"], "method": SMALLEST}, "cannot be met together"),
        ({"target": "sparsity=1.5", "method": SMALLEST}, "above 0 and below 1"),
    ],
)
def test_a_sparsity_that_cannot_be_served_is_refused(bench: Bench, changes: dict[str, object], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        pruned(bench, **changes)


def test_an_excluded_layer_that_does_not_exist_is_refused_for_single_weights_too(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="matches no layer"):
        pruned(bench, method=SMALLEST, target="sparsity=0.5", limits=Limits(exclude=("stem.7",)))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"stem.0.weight": torch.ones(12, 3, 3, 3)}, "'stem.0.weight' of torch.float32"),
        ({"stem.9.weight": torch.ones(3) > 0}, "'stem.9.weight' of torch.bool.* expected torch.bool .* None"),
    ],
)
def test_masks_that_are_no_masks_of_a_parameter_are_refused(
    bench: Bench, masks: dict[str, Tensor], message: str
) -> None:
    class Wrong(Smallest):
        def finish(self, context: MethodContext) -> Outcome:
            return Outcome(plan_from_channels(context.groups, {}), weight_masks=masks)

    with pytest.raises(PluginError, match=message):
        pruned(bench, method=replace(SMALLEST, build=lambda _: Wrong()), target="sparsity=0.5")
