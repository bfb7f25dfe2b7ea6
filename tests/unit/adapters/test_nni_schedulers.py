"""Registered schedulers as NNI pruners: around every pruner, exact at the end, and NNI's traps mended or named."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import nni
import nni.compression.pruning as nni_pruning
import pytest
import torch
from nni.compression import TorchEvaluator
from nni.compression.distillation import DynamicLayerwiseDistiller
from nni_bench import IMAGE, LAYERS, batches, channels, config, evaluator, network, shares, step, training
from torch import Tensor, nn

from nni_prune_ext.adapters import nni_schedulers
from nni_prune_ext.errors import ConfigError, ModelError, PluginError, TargetError
from nni_prune_ext.gates import firing_signature
from nni_prune_ext.methods.ftwt_ratios import FiringSignature
from nni_prune_ext.pruning import (
    AGPPruner,
    FiringSignaturePruner,
    L1NormPruner,
    LevelPruner,
    LinearPruner,
    MovementPruner,
    ReplacePruner,
    SlimPruner,
    TaylorPruner,
    UniformRatioPruner,
    pruner_for,
    scheduled_pruner_for,
)
from nni_prune_ext.registry import load_plugin, plugins
from nni_prune_ext.schedules import SchedulerSpec, build_schedule

SCHEDULERS = list(plugins("schedulers"))
SCHEDULES = [name for name in SCHEDULERS if load_plugin("schedulers", name).kind == "schedule"]  # type: ignore[attr-defined]
Inner = Callable[[nn.Module, TorchEvaluator], Any]
OURS: dict[str, Inner] = {
    "l1": lambda model, given: pruner_for("l1")(model, config(), given),
    "random": lambda model, given: pruner_for("random")(model, config(), given),
    "taylor": lambda model, given: TaylorPruner(model, config(), given, 2),
    "level": lambda model, given: LevelPruner(model, config(), given),
    "slim": lambda model, given: SlimPruner(model, config(), given, 2),
    "movement": lambda model, given: MovementPruner(model, config(), given, 2, 12),
}
NNIS: dict[str, Inner] = {
    "nni level": lambda model, given: nni_pruning.LevelPruner(model, config(), given),
    "nni l1": lambda model, given: nni_pruning.L1NormPruner(model, config(), given),
    "nni l2": lambda model, given: nni_pruning.L2NormPruner(model, config(), given),
    "nni fpgm": lambda model, given: nni_pruning.FPGMPruner(model, config(), given),
    "nni taylor": lambda model, given: nni_pruning.TaylorPruner(model, config(), given, 2),
    "nni slim": lambda model, given: nni_pruning.SlimPruner(model, config(), given, 2),
    "nni movement": lambda model, given: nni_pruning.MovementPruner(model, config(), given, 2, 12),
    "nni linear": lambda model, given: nni_pruning.LinearPruner(nni_pruning.L1NormPruner(model, config(), given), 3, 2),
    "nni agp": lambda model, given: nni_pruning.AGPPruner(nni_pruning.L2NormPruner(model, config(), given), 3, 2),
}


DIVIDING = ("psap_ratio", "ftwt_ratio", "firing_signature")
"""These divide the total among the layers, to whole channels."""
SINGLE_WEIGHTS = ("level", "movement", "nni level", "nni movement")
PAIRS = [
    (name, inner)
    for name in SCHEDULERS
    for inner in (*OURS, *NNIS)
    if not (name == "firing_signature" and inner in SINGLE_WEIGHTS)  # that is refused
]


@pytest.mark.parametrize(("name", "inner"), PAIRS)
def test_every_scheduler_around_every_pruner_trains_and_ends_at_the_goal(name: str, inner: str) -> None:
    model = network()
    given = evaluator(model, dummy_input=IMAGE)
    pruner = scheduled_pruner_for(name)((OURS | NNIS)[inner](model, given), 2, 4)
    before = model.conv1._nni_wrapper.weight.detach().clone()

    returned, masks = pruner.compress(14, None)

    assert returned is model
    if name in DIVIDING:
        assert 0.75 == pytest.approx(total_share(masks, singly="level" in inner), abs=0.06)
    else:
        assert all(share == pytest.approx(0.75, abs=0.02) for share in shares(masks).values())
    assert set(LAYERS) == set(masks)
    assert float((model.conv1._nni_wrapper.weight - before).detach().abs().max()) > 1e-5
    assert given.model is None


def total_share(masks: Any, *, singly: bool) -> float:
    """Returns the masked share of all channels, or of all weights; layers that are coupled count once."""
    own = {layer: masks[layer]["weight"] for layer in ("conv1", "conv2", "fc1", *(("conv3",) if singly else ()))}
    sizes = {layer: mask.numel() if singly else mask.shape[0] for layer, mask in own.items()}
    return sum(sizes[layer] * share for layer, share in shares(masks).items() if layer in sizes) / sum(sizes.values())


@pytest.mark.parametrize("inner", ["l1", "nni l1"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_evaluator_may_be_given_to_the_schedule_only(name: str, inner: str) -> None:
    model = network()
    given = evaluator(model)
    source = pruner_for("l1") if inner == "l1" else nni_pruning.L1NormPruner
    pruner = scheduled_pruner_for(name)(source(model, config()), 2, 4, given)
    before = {layer: getattr(model, layer)._nni_wrapper.weight.detach().clone() for layer in LAYERS}

    pruner.compress(10, None)

    for layer in LAYERS:
        assert not torch.equal(before[layer], getattr(model, layer)._nni_wrapper.weight), layer


def test_the_evaluator_on_the_schedule_trains_exactly_as_on_the_inner_pruner() -> None:
    weights = []
    for level in ("inner", "outer"):
        model = network()
        given = evaluator(model)
        inner = nni_pruning.L1NormPruner(model, config(), given if level == "inner" else None)
        pruner = AGPPruner(inner, 2, 4, given if level == "outer" else None)
        pruner.compress(10, None)
        pruner.unwrap_model()
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_update_sets_the_goal_that_the_schedule_says(name: str) -> None:
    model = network()
    pruner = scheduled_pruner_for(name)(L1NormPruner(model, config(0.75)), 2, 4, evaluator(model))
    goals: list[float] = []
    made = pruner.update_sparse_goals

    def spied(times: int) -> None:
        made(times)
        goals.append(pruner._target_spaces["conv1"]["weight"].sparse_ratio)

    pruner.update_sparse_goals = spied  # type: ignore[method-assign]
    pruner.compress(8, None)

    assert [pytest.approx(0.75 * build_schedule(name)(k / 4)) for k in range(1, 5)] == goals


def test_masks_grow_from_update_to_update() -> None:
    model = network()
    seen: list[float] = []
    data = batches()

    def watched(
        model: nn.Module, optimizer: Any, training_step: Any, schedule: Any, max_steps: int, max_epochs: Any
    ) -> None:
        for k in range(max_steps):
            optimizer.zero_grad()
            training_step(data[k % len(data)], model).backward()
            optimizer.step()
            seen.append(float((model.fc1._nni_wrapper.weight_mask == 0).double().mean()))

    given = TorchEvaluator(watched, nni.trace(torch.optim.SGD)(model.parameters(), lr=0.05), step)
    LinearPruner(L1NormPruner(model, config(1.0)), 2, 4, given).compress(9, None)

    assert [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1] == seen


class TestTraps:
    def test_an_inner_pruner_that_collects_for_less_than_an_interval_is_not_one_update_behind(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = network()
        given = evaluator(model)

        _, masks = AGPPruner(nni_pruning.TaylorPruner(model, config(), given, 1), 3, 3).compress(9, None)

        assert dict.fromkeys(LAYERS, 0.75) == shares(masks)
        assert "collects for 1 training_steps of the 3 between two updates of AGPPruner" in caplog.text

    def test_an_inner_pruner_that_collects_for_more_than_an_interval_is_refused(self) -> None:
        model = network()

        with pytest.raises(ConfigError, match="collects for 5 training_steps, but AGPPruner updates every 3"):
            AGPPruner(nni_pruning.TaylorPruner(model, config(), evaluator(model), 5), 3, 3)

    def test_training_that_is_too_short_is_refused_or_told(self, caplog: pytest.LogCaptureFixture) -> None:
        model = network()
        pruner = AGPPruner(L1NormPruner(model, config()), 5, 4, evaluator(model, most=11))

        with pytest.raises(ConfigError, match="max_steps must be at least 20; it is 19"):
            pruner.compress(19, None)
        _, masks = pruner.compress(20, None)

        assert "AGPPruner made 2 of 4 updates" in caplog.text
        assert "3 targets are masked less than asked" in caplog.text
        assert shares(masks)["fc1"] == pytest.approx(0.75 * (1 - 0.5**3), abs=1 / 32)

    def test_optimizers_that_hold_a_part_of_the_network_are_told(self, caplog: pytest.LogCaptureFixture) -> None:
        model = network()
        optimizer = nni.trace(torch.optim.SGD)(model.fc2.parameters(), lr=0.05)
        given = TorchEvaluator(training(batches()), optimizer, step)

        AGPPruner(L1NormPruner(model, config()), 2, 2, given)

        assert "hold 14 parameters less than Residual trains, among them 'conv1.weight'" in caplog.text

    def test_an_evaluator_that_nni_has_spoiled_is_told(self, caplog: pytest.LogCaptureFixture) -> None:
        model = network()
        spoiled = nni_pruning.AGPPruner(nni_pruning.L1NormPruner(model, config()), 2, 2, evaluator(model))

        LinearPruner(spoiled, 2, 2)

        assert "parameters less than Residual trains, among them 'conv1.weight'" in caplog.text

    def test_an_optimizer_of_another_model_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"holds a parameter of shape \(3, 7\)"):
            AGPPruner(L1NormPruner(network(), config()), 2, 2, evaluator(nn.Linear(7, 3)))

    def test_a_schedule_inside_is_replaced_and_told(self, caplog: pytest.LogCaptureFixture) -> None:
        model = network()
        inner = nni_pruning.AGPPruner(nni_pruning.L1NormPruner(model, config(), evaluator(model)), 3, 2)

        pruner = LinearPruner(inner, 2, 4)

        assert type(pruner.bound_pruner) is nni_pruning.L1NormPruner
        assert (
            "LinearPruner replaces the schedule of the AGPPruner inside it (2 updates, one every 3 steps)"
            in caplog.text
        )

    def test_updates_after_the_cool_down_of_movement_are_refused(self) -> None:
        model = network()
        inner = nni_pruning.MovementPruner(model, config(), evaluator(model), 2, 9)

        with pytest.raises(ConfigError, match="last update at step 10 .*cooldown_begin_step 9"):
            AGPPruner(inner, 2, 4)

    def test_movement_follows_the_schedule_within_its_warm_up_and_cool_down(self) -> None:
        model, goals = network(), []
        inner = nni_pruning.MovementPruner(model, config(), evaluator(model), 2, 12)
        pruner = LinearPruner(inner, 2, 4)
        made = pruner.update_sparse_goals

        def spied(times: int) -> None:
            made(times)
            goals.append((inner._current_step, pruner._target_spaces["fc1"]["weight"].sparse_ratio))

        pruner.update_sparse_goals = spied  # type: ignore[method-assign]
        pruner.compress(14, None)

        assert [(4, 0.1875), (6, 0.375), (8, 0.5625), (10, 0.75)] == goals

    def test_no_evaluator_at_all_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="neither it nor its L1NormPruner has an evaluator"):
            AGPPruner(L1NormPruner(network(), config()), 2, 2)

    @pytest.mark.parametrize("arguments", [(0, 2), (2, 0), (2, 1.5)])
    def test_counts_below_one_are_refused(self, arguments: tuple[Any, Any]) -> None:
        with pytest.raises(ConfigError, match="expected a whole number of at least 1"):
            AGPPruner(L1NormPruner(network(), config()), *arguments)

    def test_what_is_no_pruner_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="was given a Residual, expected a pruner"):
            AGPPruner(network(), 2, 2)  # type: ignore[arg-type]

    def test_an_evaluator_is_let_go_when_training_raises(self) -> None:
        model = network()

        def broken(*arguments: Any) -> None:
            raise RuntimeError("the user's error")

        given = TorchEvaluator(broken, nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1), step)

        with pytest.raises(RuntimeError, match="the user's error"):
            AGPPruner(L1NormPruner(model, config()), 2, 2, given).compress(4, None)

        assert given.model is None

    def test_epochs_are_taken_as_length(self) -> None:
        model = network()

        _, masks = AGPPruner(L1NormPruner(model, config()), 2, 3, evaluator(model)).compress(None, 2)

        assert dict.fromkeys(LAYERS, 0.75) == shares(masks)

    def test_it_cannot_be_made_from_a_compressor(self) -> None:
        with pytest.raises(NotImplementedError, match="made around a pruner"):
            AGPPruner.from_compressor(L1NormPruner(network(), config()), config())


def test_a_schedule_around_a_fusion_with_a_distiller_reaches_the_goal() -> None:
    model, teacher = network(), network()
    distiller = DynamicLayerwiseDistiller(
        model,
        [{"op_names": ["conv3"], "lambda": 0.1, "apply_method": "mse"}],
        evaluator(model),
        teacher,
        lambda batch, teacher: teacher(batch[0]),
    )
    pruner = AGPPruner(L1NormPruner.from_compressor(distiller, config()), 2, 4)

    _, masks = pruner.compress(10, None)

    assert dict.fromkeys(LAYERS, 0.75) == {layer: shares(masks)[layer] for layer in LAYERS}
    assert distiller in pruner.fused_compressors


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, SchedulerSpec], None]:
    """Registers schedulers of another package for one test."""
    known: dict[str, object] = {}
    real = nni_schedulers.load_plugin
    monkeypatch.setattr(nni_schedulers, "load_plugin", lambda kind, name: known.get(name) or real(kind, name))
    monkeypatch.setattr(nni_schedulers, "_CLASSES", {})
    return known.__setitem__


def twice_in_the_first_layer(
    weights: Mapping[str, Sequence[Tensor]], previous: Mapping[str, float], progress: float
) -> Mapping[str, float]:
    SEEN.append(
        (
            sorted(weights),
            {name: [tuple(w.shape) for w in rows] for name, rows in weights.items()},
            dict(previous),
            progress,
        )
    )
    return {name: 2.0 if "conv1" in name else 1.0 for name in weights}


SEEN: list[Any] = []


@pytest.mark.parametrize("inner", ["l1", "nni l1", "nni slim"])
def test_a_ratio_policy_divides_the_total_among_the_groups(
    inner: str, registered: Callable[[str, SchedulerSpec], None]
) -> None:
    registered("twice", SchedulerSpec("ratio_policy", "twice", lambda: twice_in_the_first_layer))
    SEEN.clear()
    model = network()
    entries: dict[str, Inner] = {
        "l1": lambda m, e: L1NormPruner(m, config(0.25), e),
        "nni l1": lambda m, e: nni_pruning.L1NormPruner(m, config(0.25), e),
        "nni slim": lambda m, e: nni_pruning.SlimPruner(m, config(0.25), e, 2),
    }
    pruner = scheduled_pruner_for("twice")(entries[inner](model, evaluator(model, dummy_input=IMAGE)), 2, 2)

    _, masks = pruner.compress(5, None)

    # 8 + 16 + 32 channels, a quarter of them is 14 = 8·2r + 48·r, so r = 0.21875: 3 of 8, 3 of 16, 7 of 32
    assert {"conv1": 3 / 8, "conv2": 3 / 16, "conv3": 3 / 16, "fc1": 7 / 32} == shares(masks)
    assert "TwicePruner" == type(pruner).__name__
    names, shapes, previous, progress = SEEN[1]
    assert ["conv1", "conv2", "fc1"] == names
    assert [(16, 72), (16, 144)] == shapes["conv2"]
    assert 1.0 == progress
    assert {"conv1": 1 / 8, "conv2": 1 / 16, "fc1": 3 / 32} == previous


@pytest.mark.parametrize("inner", ["l1", "nni l1"])
def test_a_policy_that_looks_at_data_sees_the_whole_model_once_and_divides_the_total(
    inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, float]] = []
    look = FiringSignature.look

    def noted(self: FiringSignature, context: Any) -> dict[str, float]:
        seen.append(look(self, context))
        return seen[-1]

    monkeypatch.setattr(FiringSignature, "look", noted)
    model = network()
    given = evaluator(model, dummy_input=IMAGE)
    source = L1NormPruner if inner == "l1" else nni_pruning.L1NormPruner
    expected = firing_signature(network(), IMAGE, batches(1))
    pruner = FiringSignaturePruner(source(model, config(0.1), given), 2, 2)

    _, masks = pruner.compress(5, None)

    assert 1 == len(seen), "two updates, one look"
    assert expected.keys() == seen[0].keys()
    assert expected["conv1"] == pytest.approx(seen[0]["conv1"], abs=0.15), "the copy has trained on the way"
    assert seen[0]["conv1"] > seen[0]["fc1"] == 0, "no gate sits behind a linear layer"
    share = shares(masks)
    assert share["conv2"] == share["conv3"]
    assert 0 == share["fc1"]
    # 0.1 of 8 + 16 + 32 channels are 5.6, all of which the two groups with a signature give
    factor = 5.6 / (8 * seen[0]["conv1"] + 16 * seen[0]["conv2"])
    assert factor * seen[0]["conv1"] == pytest.approx(share["conv1"], abs=1 / 8)
    assert factor * seen[0]["conv2"] == pytest.approx(share["conv2"], abs=1 / 16)
    assert given.model is None


def test_a_dependency_group_has_the_signature_of_its_channels() -> None:
    found = []
    for settings in ({}, {"dependency_group_id": "sum"}):
        entries = [
            {"op_names": ["conv1"], "sparse_ratio": 0.5},
            {"op_names": ["conv2", "conv3"], "sparse_ratio": 0.5, **settings},
        ]
        model = network()
        pruner = FiringSignaturePruner(L1NormPruner(model, entries, evaluator(model, dummy_input=IMAGE)), 2, 1)
        found.append(shares(pruner.compress(2, None)[1]))

    assert found[0] == found[1]
    assert 0 < found[0]["conv2"] < 1


def test_a_ratio_policy_that_cannot_reach_the_total_is_told(registered: Callable[[str, SchedulerSpec], None]) -> None:
    registered(
        "one", SchedulerSpec("ratio_policy", "one", lambda: lambda weights, *_: {n: float("fc1" in n) for n in weights})
    )
    model = network()
    pruner = scheduled_pruner_for("one")(L1NormPruner(model, config(0.99), evaluator(model)), 2, 1)

    with pytest.raises(TargetError, match="cannot be reached"):
        pruner.compress(2, None)


REFUSED: dict[str, tuple[list[dict[str, Any]], Callable[[Any, Any], Any], str]] = {
    "a threshold under a ratio policy": (
        [{"op_names": ["conv1"], "sparse_threshold": 1.0}],
        lambda inner, given: UniformRatioPruner(inner, 2, 2, given),
        "'conv1' has a sparse_threshold",
    ),
    "a global group under a ratio policy": (
        config(global_group_id=1),
        lambda inner, given: UniformRatioPruner(inner, 2, 2, given),
        "'conv1' has a global_group_id",
    ),
    "single weights under a policy that looks at channels": (
        [{"op_names": ["conv1"], "sparse_ratio": 0.5, "granularity": [1, 1, 3, 3]}],
        lambda inner, given: FiringSignaturePruner(inner, 2, 2, given),
        "single weights of 'conv1' are to be masked",
    ),
    "no evaluator": (config(), lambda inner, given: AGPPruner(inner, 2, 2), "neither it nor its L1NormPruner has"),
    "an evaluator of another model": (
        config(),
        lambda inner, given: AGPPruner(inner, 2, 2, evaluator(nn.Linear(7, 3))),
        r"holds a parameter of shape \(3, 7\)",
    ),
    "an example that does not fit": (
        config(),
        lambda inner, given: UniformRatioPruner(
            inner, 2, 2, evaluator(inner.bound_model, dummy_input=torch.zeros(2, 5, 12, 12))
        ),
        "does not run",
    ),
}


@pytest.mark.parametrize(
    ("case", "inner"),
    [*((case, nni_pruning.L1NormPruner) for case in REFUSED), *((case, L1NormPruner) for case in list(REFUSED)[:-1])],
)
def test_what_is_refused_leaves_the_inner_pruner_as_it_was(case: str, inner: Any) -> None:
    entries, made, told = REFUSED[case]
    model = network()
    before = dict(model.named_parameters())
    pruner = inner(model, entries)

    with pytest.raises((ConfigError, ModelError), match=told):
        made(pruner, evaluator(network()))

    assert pruner._is_wrapped
    assert hasattr(model.conv1, "_nni_wrapper")
    pruner.unwrap_model()
    assert not any(hasattr(module, "_nni_wrapper") for module in model.modules())
    if inner is L1NormPruner:
        assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_a_schedule_that_is_not_replaced_after_all_stays_as_it_was() -> None:
    model = network()
    entries = [{"op_names": ["conv1"], "sparse_threshold": 1.0}]
    theirs = nni_pruning.AGPPruner(nni_pruning.L1NormPruner(model, entries), 2, 2, evaluator(model))

    with pytest.raises(ConfigError, match="'conv1' has a sparse_threshold"):
        UniformRatioPruner(theirs, 2, 2)

    assert theirs._is_wrapped
    theirs.compress(4, None)


class TestTrainingThatRaises:
    """Leaves nothing of the schedule in the inner pruner."""

    @pytest.mark.parametrize("outer", [LinearPruner, ReplacePruner, UniformRatioPruner])
    @pytest.mark.parametrize("inner", ["l1", "nni l1", "nni slim", "nni movement"])
    def test_puts_the_inner_pruner_back(self, inner: str, outer: Any) -> None:
        model = network()
        pruner = outer((OURS | NNIS)[inner](model, faltering(model)), 2, 4)
        inside = pruner.bound_pruner
        clock = inside.interval_steps, inside.total_times

        with pytest.raises(RuntimeError, match="the user's error"):
            pruner.compress(14, None)

        assert not {"_generate_sparsity", "update_sparse_goals"} & set(vars(inside))
        assert clock == (inside.interval_steps, inside.total_times)
        assert all(space["weight"].sparse_ratio == 0.75 for space in inside._target_spaces.values())

    @pytest.mark.parametrize("inner", ["l1", "nni l1"])
    def test_lets_the_next_schedule_reach_the_goal(self, inner: str) -> None:
        model = network()
        given = faltering(model)
        pruner = LinearPruner((OURS | NNIS)[inner](model, given), 2, 4)
        with pytest.raises(RuntimeError, match="the user's error"):
            pruner.compress(8, None)

        _, masks = AGPPruner(pruner, 2, 4).compress(8, None)

        assert dict.fromkeys(LAYERS, 0.75) == shares(masks)

    def test_lets_a_rule_be_asked_once_per_update_the_next_time(
        self, registered: Callable[[str, SchedulerSpec], None]
    ) -> None:
        registered("hold", SchedulerSpec("mask_update_rule", "hold", lambda: one_swap_only))
        model = network()
        pruner = scheduled_pruner_for("hold")(L1NormPruner(model, config(), faltering(model)), 2, 4)
        with pytest.raises(RuntimeError, match="the user's error"):
            pruner.compress(8, None)
        RULED.clear()

        pruner.compress(8, None)

        assert [0.25, 0.5, 0.75, 1.0] == sorted({progress for *_, progress in RULED})
        assert 4 * len(LAYERS) == len(RULED)

    def test_lets_a_schedule_of_nni_that_raised_be_replaced(self) -> None:
        model = network()
        theirs = nni_pruning.AGPPruner(nni_pruning.L1NormPruner(model, config(), faltering(model)), 2, 4)
        with pytest.raises(RuntimeError, match="the user's error"):
            theirs.compress(8, None)
        theirs.evaluator.unbind_model()

        _, masks = LinearPruner(theirs, 2, 4).compress(8, None)

        assert dict.fromkeys(LAYERS, 0.75) == shares(masks)


def faltering(model: nn.Module) -> TorchEvaluator:
    """Returns an evaluator whose training raises once, after three steps."""
    calls: list[int] = []

    def train(model: nn.Module, optimizer: Any, training_step: Any, schedule: Any, max_steps: int, epochs: Any) -> None:
        for k, batch in enumerate((batches() * 9)[:max_steps]):
            optimizer.zero_grad()
            training_step(batch, model).backward()
            optimizer.step()
            if k == 2 and not calls:
                calls.append(k)
                raise RuntimeError("the user's error")

    return TorchEvaluator(train, nni.trace(torch.optim.SGD)(model.parameters(), lr=0.05), step, dummy_input=IMAGE)


def one_swap_only(old: Tensor, proposed: Tensor, scores: Tensor, progress: float) -> Tensor:
    """Keeps the old mask; of its kept channels the lowest go until as many are kept as proposed."""
    RULED.append((int(old.sum()), int(proposed.sum()), progress))
    mask = old.clone()
    order = scores.masked_fill(~old, torch.inf).argsort()
    mask[order[: int(old.sum()) - int(proposed.sum())]] = False
    return mask


RULED: list[Any] = []


@pytest.mark.parametrize("inner", ["l1", "nni l1", "nni level", "nni slim", "nni movement"])
def test_a_mask_update_rule_decides_which_masks_may_change(
    inner: str, registered: Callable[[str, SchedulerSpec], None]
) -> None:
    registered("hold", SchedulerSpec("mask_update_rule", "hold", lambda: one_swap_only))
    RULED.clear()
    model = network()
    pruner = scheduled_pruner_for("hold")((OURS | NNIS)[inner](model, evaluator(model, dummy_input=IMAGE)), 2, 4)
    history: list[Tensor] = []
    update = pruner.bound_pruner.update_masks

    def spied(masks: Any) -> None:
        update(masks)
        history.append(pruner.get_masks()["conv2"]["weight"].clone())

    pruner.bound_pruner.update_masks = spied

    _, masks = pruner.compress(14, None)

    assert all(bool((later <= earlier).all()) for earlier, later in pairwise(history)), "what is gone stays gone"
    assert shares(masks)["conv2"] == pytest.approx(0.75, abs=0.02)
    assert RULED
    if inner == "l1":
        assert channels(masks["conv2"]["weight"]) == channels(masks["conv3"]["weight"])
        assert torch.equal((masks["conv2"]["weight"].flatten(1) != 0).any(1).float(), masks["conv2"]["bias"])


SHARED: dict[str, dict[str, Any]] = {
    "a dependency group": {"op_names": ["conv2", "conv3"], "dependency_group_id": 1},
    "blocks of a dependency group": {
        "op_names": ["conv2", "conv3"],
        "dependency_group_id": 1,
        "internal_metric_block": 4,
    },
    "a global group": {"op_names": ["conv2", "conv3", "fc1"], "global_group_id": 1},
    "layers": {"op_names": ["conv2", "conv3", "fc1"], "internal_metric_block": 5},  # heeded in a dependency group only
    "blocks of weights": {"op_names": ["fc1"], "granularity": [4, 4]},
}


@pytest.mark.parametrize("inner", [L1NormPruner, nni_pruning.L1NormPruner])
@pytest.mark.parametrize("shared", SHARED)
def test_the_masks_are_what_the_rule_allowed(
    shared: str, inner: Any, registered: Callable[[str, SchedulerSpec], None]
) -> None:
    allowed: list[Tensor] = []

    def noted(old: Tensor, proposed: Tensor, scores: Tensor, progress: float) -> Tensor:
        assert bool(torch.isfinite(scores).all())
        allowed.append(one_swap_only(old, proposed, scores, progress))
        return allowed[-1]

    registered("hold", SchedulerSpec("mask_update_rule", "hold", lambda: noted))
    model = network()
    given = evaluator(model, dummy_input=IMAGE)
    pruner = scheduled_pruner_for("hold")(inner(model, [{"sparse_ratio": 0.5, **SHARED[shared]}], given), 1, 4)
    history: list[Mapping[str, Tensor]] = []
    update, layers = pruner.bound_pruner.update_masks, SHARED[shared]["op_names"]

    def spied(masks: Any) -> None:
        update(masks)
        now = pruner.get_masks()
        history.append({layer: kept_units(pruner, layer, now[layer]["weight"]) for layer in sorted(layers)})
        if "dependency" in shared:
            asked = torch.cat(allowed)
            assert 16 == len(asked)
            assert all(torch.equal(asked, own) for own in history[-1].values())
            assert 1 == len({int(block.sum()) for block in allowed})
        else:
            assert all(torch.equal(asked, own) for asked, own in zip(allowed, history[-1].values(), strict=True))
        allowed.clear()

    pruner.bound_pruner.update_masks = spied

    pruner.compress(5, None)

    assert 4 == len(history)
    assert all(bool((later[layer] <= earlier[layer]).all()) for earlier, later in pairwise(history) for layer in layers)


def kept_units(pruner: Any, layer: str, mask: Tensor) -> Tensor:
    scaler = pruner._target_spaces[layer]["weight"]._scaler
    return scaler.shrink(mask, keepdim=True).flatten() > 0  # type: ignore[no-any-return]


def test_the_rule_that_restricts_nothing_gives_the_masks_of_the_schedule() -> None:
    masks = []
    for outer in (LinearPruner, ReplacePruner):
        model = network()
        masks.append(outer(L1NormPruner(model, config(), evaluator(model)), 2, 4).compress(10, None)[1])

    assert all(torch.equal(masks[0][layer]["weight"], masks[1][layer]["weight"]) for layer in LAYERS)


def test_a_rule_on_top_of_another_schedule() -> None:
    model = network()
    pruner = ReplacePruner(L1NormPruner(model, config(), evaluator(model)), 2, 4, schedule="agp")
    goals = []
    made = pruner.update_sparse_goals

    def spied(times: int) -> None:
        made(times)
        goals.append(pruner._target_spaces["fc1"]["weight"].sparse_ratio)

    pruner.update_sparse_goals = spied  # type: ignore[method-assign]
    pruner.compress(8, None)

    assert [pytest.approx(0.75 * (1 - (1 - k / 4) ** 3)) for k in range(1, 5)] == goals


@pytest.mark.parametrize("inner", ["l1", "nni l1"])
def test_unwrapped_parameters_are_those_of_the_users_optimizer(inner: str) -> None:
    model = network()
    before, given = dict(model.named_parameters()), evaluator(model)
    pruner = AGPPruner((OURS | NNIS)[inner](model, None), 2, 2, given)  # type: ignore[arg-type]
    pruner.compress(4, None)

    pruner.unwrap_model()

    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_what_is_registered_as_something_else_is_refused(registered: Callable[[str, Any], None]) -> None:
    registered("wrong", object())

    with pytest.raises(PluginError, match="expected a SchedulerSpec"):
        scheduled_pruner_for("wrong")


def test_nothing_is_told_where_all_is_well(caplog: pytest.LogCaptureFixture) -> None:
    model = network()

    AGPPruner(L1NormPruner(model, config(0.5)), 2, 4, evaluator(model)).compress(10, None)

    assert [] == [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_level_prunes_single_weights_under_a_schedule() -> None:
    model = network()

    _, masks = AGPPruner(LevelPruner(model, config(0.5)), 2, 4, evaluator(model)).compress(10, None)

    assert all(share == pytest.approx(0.5, abs=0.01) for share in shares(masks).values())
