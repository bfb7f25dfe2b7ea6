"""NNI pruners of this package keep NNI's class contract, and masks of coupled layers agree."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nni
import nni.compression.pruning as nni_pruning
import pytest
import torch
import torchvision
from nni.compression import TorchEvaluator
from nni.compression.distillation import DynamicLayerwiseDistiller
from nni_bench import IMAGE, LAYERS, batches, channels, config, evaluator, network, shares, step, training
from torch import Tensor, nn

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.methods.base import MethodContext, MethodSpec, NoOptions, Outcome, Phase, PruningMethod
from nni_prune_ext.models.loading import build_model
from nni_prune_ext.pipeline import method_spec
from nni_prune_ext.plan import plan_from_channels
from nni_prune_ext.pruning import (
    AGPPruner,
    L1NormPruner,
    LevelPruner,
    MethodPruner,
    RandomPruner,
    TaylorPruner,
    pruner_for,
)
from nni_prune_ext.registry import plugins
from nni_prune_ext.scoring.group_reduction import group_importance
from nni_prune_ext.scoring.weight_norms import l1_norm
from nni_prune_ext.speedup import ModelSpeedup

CRITERIA = [
    name for name in plugins("pruners") if isinstance(s := method_spec(name), MethodSpec) and s.scores is not None
]


def made(name: str, model: nn.Module, config_list: list[dict[str, Any]]) -> Any:
    """Returns a pruner of a method, with an evaluator where it needs data."""
    if name == "taylor":
        return TaylorPruner(model, config_list, evaluator(model), training_steps=4)
    given = evaluator(model) if method_spec(name).needs_data else None
    return pruner_for(name)(model, config_list, given)


@pytest.mark.parametrize("name", CRITERIA)
class TestEveryCriterion:
    def test_masks_the_share_that_is_asked_for_with_coupled_layers_alike(self, name: str) -> None:
        pruner = made(name, network(), config(0.75))

        _, masks = pruner.compress()

        assert dict.fromkeys(LAYERS, 0.75) == shares(masks)
        assert channels(masks["conv2"]["weight"]) == channels(masks["conv3"]["weight"])
        for layer in LAYERS:
            assert torch.equal((masks[layer]["weight"].flatten(1) != 0).any(1).float(), masks[layer]["bias"])

    def test_returns_the_same_model_wrapped_and_copies_of_its_masks(self, name: str) -> None:
        model = network()
        pruner = made(name, model, config())

        returned, masks = pruner.compress()
        masks["conv1"]["weight"].fill_(1)

        assert returned is model
        assert hasattr(model.conv1, "_nni_wrapper")
        assert 0.75 == shares(pruner.get_masks())["conv1"]

    def test_simulates_the_masks_in_the_forward_pass(self, name: str) -> None:
        model = network()
        _, masks = made(name, model, config()).compress()

        model(IMAGE)

        assert torch.equal(model.conv1.weight == 0, masks["conv1"]["weight"] == 0)

    def test_restores_masks_in_a_second_process(self, name: str) -> None:
        _, masks = made(name, network(), config()).compress()
        saved = {module: dict(own) for module, own in masks.items()}
        again = made(name, network(), config())

        again.update_masks(saved)

        assert shares(masks) == shares(again.get_masks())

    def test_gives_the_plan_of_its_masks(self, name: str) -> None:
        pruner = made(name, network(), config())
        _, masks = pruner.compress()

        plan = pruner.plan()

        gone = sorted(set(range(16)) - set(channels(masks["conv2"]["weight"])))
        assert gone == list(plan.removed["conv2"])
        assert {"conv1", "conv2", "fc1"} == set(plan.removed)

    def test_two_runs_give_the_same_masks(self, name: str) -> None:
        first, second = (made(name, network(), config()).compress()[1] for _ in range(2))

        assert all(torch.equal(first[layer]["weight"], second[layer]["weight"]) for layer in LAYERS)

    def test_takes_over_from_another_compressor_and_keeps_its_masks(self, name: str) -> None:
        model = network()
        level = LevelPruner(model, [{"op_names": ["fc2"], "sparse_ratio": 0.5}], evaluator(model))
        level.compress()
        extra = {"training_steps": 2} if name == "taylor" else {}

        pruner = pruner_for(name).from_compressor(level, config(), **extra)
        pruner.compress(8, None)

        found = shares(pruner.get_masks())
        assert 0.5 == found["fc2"]
        assert 0.75 == found["conv1"]


def test_masks_are_those_of_the_lowest_scores_of_the_group() -> None:
    model = network()
    pruner = L1NormPruner(model, config(0.5), dummy_input=IMAGE)
    group = next(g for g in pruner.channels.groups if g.name == "conv2")
    plain = {name: tensor.clone() for name, tensor in network().named_parameters()}
    expected = group_importance(group, plain, l1_norm).argsort()[8:].sort().values.tolist()

    _, masks = pruner.compress()

    assert expected == channels(masks["conv2"]["weight"])


def test_the_classes_have_the_arguments_of_nni() -> None:
    for ours, theirs in ((L1NormPruner, nni_pruning.L1NormPruner), (TaylorPruner, nni_pruning.TaylorPruner)):
        expected = list(inspect.signature(theirs.__init__).parameters)[1:]

        assert expected == list(inspect.signature(ours).parameters)[: len(expected)], ours


def test_options_of_the_scores_are_arguments_by_position_and_by_name() -> None:
    spec = replace(method_spec("taylor"), name="toy")
    made = type("ToyPruner", (MethodPruner,), {"method": spec})
    model = network()

    assert 2 == made(model, config(), evaluator(model), 2).options.batches
    for arguments, options, said in (
        ((2,), {"batches": 2}, "'batches' twice"),
        ((2, 3), {}, "at most 1: batches"),
        ((), {"sparsity": 0.5}, "Known options"),
        ((), {"batches": 0}, "greater than or equal to 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            made(network(), config(), None, *arguments, **options)


@pytest.mark.parametrize("option", [{"steps": 3}, {"schedule": "agp"}, {"ratio_policy": "uniform_ratio"}])
def test_options_of_cuts_that_nni_schedules_make_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"schedules do that.*AGPPruner\(L1NormPruner"):
        L1NormPruner(network(), config(), **option)


def test_an_example_input_in_the_place_of_the_evaluator_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"is a Tensor, expected an evaluator.*dummy_input="):
        L1NormPruner(network(), config(), IMAGE)  # type: ignore[arg-type]


def test_unwrapped_parameters_are_the_objects_that_they_were() -> None:
    model = network()
    before = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = L1NormPruner(model, config())
    pruner.compress()

    pruner.unwrap_model()

    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    old = model.conv1.weight.detach().clone()
    model(torch.randn(4, 1, 12, 12)).sum().backward()
    optimizer.step()
    assert not torch.equal(old, model.conv1.weight)


def test_without_an_example_input_common_shapes_are_tried() -> None:
    pruner = L1NormPruner(network(), config())

    assert pruner.channels.traced
    assert ["conv1", "conv2", "fc1"] == sorted(group.name for group in pruner.channels.groups)


class Odd(nn.Module):
    """Runs on one shape only, which nobody would guess."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4 * 5 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def test_a_model_of_unknown_shape_is_pruned_layer_by_layer_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    pruner = L1NormPruner(Odd(), [{"op_names": ["conv"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()

    assert 0.5 == shares(masks)["conv"]
    assert "Pass dummy_input=" in caplog.text
    with_input = L1NormPruner(
        Odd(), [{"op_names": ["conv"], "sparse_ratio": 0.5}], dummy_input=torch.zeros(1, 1, 7, 11)
    )
    assert with_input.channels.traced


class TestConfigList:
    def test_in_channel_masks_columns(self) -> None:
        _, masks = L1NormPruner(
            network(), [{"op_names": ["conv2"], "sparse_ratio": 0.5, "granularity": "in_channel"}]
        ).compress()

        kept = (masks["conv2"]["weight"] != 0).any(dim=(0, 2, 3))
        assert 4 == int(kept.sum())
        assert torch.equal(masks["conv2"]["weight"], kept.float()[None, :, None, None].expand(16, 8, 3, 3))

    def test_a_threshold_is_compared_with_the_scores(self) -> None:
        pruner = L1NormPruner(network(), [{"op_names": ["conv1"], "sparse_threshold": 1.0}])
        group = next(g for g in pruner.channels.groups if g.name == "conv1")
        scores = group_importance(group, dict(network().named_parameters()), l1_norm)

        _, masks = pruner.compress()

        assert (scores >= 1.0).nonzero().flatten().tolist() == channels(masks["conv1"]["weight"])

    def test_a_global_group_respects_the_limits_of_its_layers(self) -> None:
        model = network()
        model.conv1.weight.data.mul_(1e-3)
        model.conv2.weight.data[:, :] *= torch.linspace(0.1, 1, 16)[:, None, None, None]
        entry = {"global_group_id": "g", "sparse_ratio": 0.6, "max_sparse_ratio": 0.7, "min_sparse_ratio": 0.25}

        _, masks = L1NormPruner(model, [{"op_names": list(LAYERS), **entry}]).compress()

        found = shares(masks)
        assert all(0.25 <= share <= 0.7 for share in found.values()), found
        total = sum(masks[layer]["weight"].numel() for layer in LAYERS)
        masked = sum(int((masks[layer]["weight"] == 0).sum()) for layer in LAYERS)
        assert masked / total == pytest.approx(0.6, abs=0.09)  # a channel of conv2 and conv3 is 4.3 % of all weights

    def test_limits_hold_in_one_layer(self) -> None:
        _, masks = L1NormPruner(network(), config(0.75, max_sparse_ratio=0.5)).compress()

        assert dict.fromkeys(LAYERS, 0.5) == shares(masks)

    def test_regular_expressions_and_exclusions_select(self) -> None:
        entry = {"op_names_re": ["conv[0-9]"], "exclude_op_names": ["conv1"], "sparse_ratio": 0.5}

        _, masks = L1NormPruner(network(), [entry]).compress()

        assert {"conv2", "conv3"} == set(masks)

    def test_target_names_leave_the_bias_alone(self) -> None:
        _, masks = L1NormPruner(network(), config(0.5, target_names=["weight"])).compress()

        assert {"weight"} == set(masks["conv1"])

    def test_norms_can_be_aligned_with_their_layer(self) -> None:
        align = {"module_name": "conv1", "target_name": "weight", "dims": [0]}
        settings = {
            "weight": {"align": align, "granularity": "out_channel"},
            "bias": {"align": align, "granularity": "out_channel"},
        }
        entry = {"op_names": ["bn1"], "target_names": ["weight", "bias"], "target_settings": settings}

        _, masks = L1NormPruner(network(), [*config(0.5), entry]).compress()

        kept = (masks["conv1"]["weight"].flatten(1) != 0).any(1).float()
        assert torch.equal(kept, masks["bn1"]["weight"])
        assert torch.equal(kept, masks["bn1"]["bias"])

    def test_norms_are_scored_with_the_channels_that_they_scale(self) -> None:
        entries = [*config(0.5), {"op_names": ["bn1"], "sparse_ratio": 0.5, "target_names": ["weight"]}]

        _, masks = L1NormPruner(network(), entries).compress()

        assert torch.equal((masks["conv1"]["weight"].flatten(1) != 0).any(1).float(), masks["bn1"]["weight"])

    def test_blocks_finer_than_channels_are_measured_by_norm_and_refused_elsewhere(self) -> None:
        entry = {"op_names": ["fc1"], "sparse_ratio": 0.5, "granularity": [4, 4]}

        _, masks = L1NormPruner(network(), [entry]).compress()

        blocks = masks["fc1"]["weight"].reshape(8, 4, 4, 4).transpose(1, 2).flatten(2)
        assert {0.0, 16.0} == set(blocks.sum(2).flatten().tolist())
        with pytest.raises(ConfigError, match=r"\[4, 4\].*'random' scores channels"):
            RandomPruner(network(), [entry])

    def test_a_group_that_the_user_names_shares_a_mask(self) -> None:
        entries = [
            {"op_names": ["conv1"], "sparse_ratio": 0.5},
            {"op_names": ["conv2", "conv3"], "sparse_ratio": 0.5, "dependency_group_id": 1},
        ]

        _, masks = L1NormPruner(network(), entries).compress()

        assert channels(masks["conv2"]["weight"]) == channels(masks["conv3"]["weight"])

    def test_partners_of_a_grouped_convolution_go_together(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 12, 3),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 8, 3, groups=2),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1),
        )
        pruner = L1NormPruner(model, [{"op_types": ["Conv2d"], "exclude_op_names": ["5"], "sparse_ratio": 0.45}])

        _, masks = pruner.compress()

        first = channels(masks["0"]["weight"])
        assert [c + 6 for c in first if c < 6] == [c for c in first if c >= 6]
        assert 8 == len(first), "of five that are asked for, two pairs go"


class TestWarnings:
    def test_a_ratio_too_small_for_one_channel(self, caplog: pytest.LogCaptureFixture) -> None:
        L1NormPruner(network(), config(0.05)).compress()

        assert "'conv1' 0.000 of 0.050 (0 of 8)" in caplog.text

    def test_layers_that_are_coupled_but_not_pruned(self, caplog: pytest.LogCaptureFixture) -> None:
        L1NormPruner(network(), [{"op_names": ["conv2"], "sparse_ratio": 0.5}]).compress()

        assert "'conv2': 8 channels masked, but 'conv3' not pruned" in caplog.text

    def test_unequal_ratios_in_a_coupled_group(self, caplog: pytest.LogCaptureFixture) -> None:
        entries = [{"op_names": ["conv2"], "sparse_ratio": 0.5}, {"op_names": ["conv3"], "sparse_ratio": 0.25}]

        L1NormPruner(network(), entries).compress()

        assert "'conv2': its 2 layers disagree on 4 channels" in caplog.text

    def test_nothing_where_all_is_well(self, caplog: pytest.LogCaptureFixture) -> None:
        L1NormPruner(network(), config(0.5)).compress()

        assert [] == [record for record in caplog.records if record.levelno >= logging.WARNING]

    def test_a_training_that_gives_fewer_batches_than_are_scored_with(self, caplog: pytest.LogCaptureFixture) -> None:
        model = network()

        _, masks = TaylorPruner(model, config(), evaluator(model, most=2), training_steps=4).compress()

        assert "4 batches, but the training_func stopped after 2 steps" in caplog.text
        assert 0.75 == shares(masks)["conv1"]


class TestTraining:
    def test_scores_do_not_move_the_weights(self) -> None:
        model = network()
        pruner = TaylorPruner(model, config(), evaluator(model), training_steps=4)
        pruner.compress()
        pruner.unwrap_model()

        assert all(torch.equal(a, b) for a, b in zip(network().state_dict().values(), model.state_dict().values()))

    def test_a_training_step_on_outputs_gives_the_scores_of_one_on_batches(self) -> None:
        def train(
            model: Any, optimizer: Any, training_step: Any, schedule: Any, max_steps: int, max_epochs: Any
        ) -> None:
            for images, labels in batches()[:max_steps]:
                optimizer.zero_grad()
                training_step(model(images), labels).backward()
                optimizer.step()

        masks = []
        for build in (
            lambda model, optimizer: TorchEvaluator(train, optimizer, nn.functional.cross_entropy),
            lambda model, optimizer: evaluator(model),
        ):
            model = network()
            optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.05)
            masks.append(TaylorPruner(model, config(), build(model, optimizer), training_steps=4).compress()[1])

        assert all(torch.equal(masks[0][layer]["weight"], masks[1][layer]["weight"]) for layer in LAYERS)

    def test_a_training_step_without_the_model_is_refused(self) -> None:
        model = network()
        optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.05)
        hidden = TorchEvaluator(
            lambda model, optimizer, training_step, *rest: training_step(batches()[0]).backward(),
            optimizer,
            lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        )

        with pytest.raises(
            ConfigError, match=r"expected training_step\(batch, model\)|Expected training_step\(batch, model\)"
        ):
            TaylorPruner(model, config(), hidden, training_steps=2).compress()

    @pytest.mark.parametrize("steps", [0, -1, "a", None])
    def test_no_training_step_is_refused(self, steps: Any) -> None:
        model = network()

        with pytest.raises(ConfigError, match=f"training_steps={steps!r}.*at least 1 step"):
            TaylorPruner(model, config(), evaluator(model), steps)

    def test_data_without_an_evaluator_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="no evaluator, expected an evaluator"):
            TaylorPruner(network(), config(), None, training_steps=2)  # type: ignore[arg-type]
        spec = replace(method_spec("taylor"), name="toy")
        made = type("ToyPruner", (MethodPruner,), {"method": spec})
        with pytest.raises(ConfigError, match="no evaluator; expected an nni.compression.TorchEvaluator"):
            made(network(), config()).compress()

    def test_more_batches_than_an_interval_has_are_told(self, caplog: pytest.LogCaptureFixture) -> None:
        model = network()

        AGPPruner(TaylorPruner(model, config(), evaluator(model), 5), 3, 2).compress(6, None)

        assert "scores with 5 batches, but only 3 steps were made so far" in caplog.text

    def test_an_evaluator_is_let_go_when_training_raises(self) -> None:
        model = network()

        def broken(*arguments: Any) -> None:
            raise RuntimeError("the user's error")

        optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.05)
        given = TorchEvaluator(broken, optimizer, lambda batch, model: None)

        with pytest.raises(RuntimeError, match="the user's error"):
            TaylorPruner(model, config(), given, training_steps=2).compress()

        assert given.model is None

    def test_a_length_is_refused_where_the_pruner_does_not_train(self) -> None:
        with pytest.raises(ConfigError, match="max_steps=10.*AGPPruner"):
            L1NormPruner(network(), config()).compress(10, None)


class TestFusion:
    @pytest.mark.parametrize("name", CRITERIA)
    def test_a_pruner_fused_with_a_distiller_prunes_once_and_the_training_goes_on(self, name: str) -> None:
        model, teacher = network(), network()
        given = evaluator(model)
        distiller = DynamicLayerwiseDistiller(
            model,
            [{"op_names": ["conv3"], "lambda": 0.1, "apply_method": "mse"}],
            given,
            teacher,
            lambda batch, teacher: teacher(batch[0]),
        )
        extra = {"training_steps": 2} if name == "taylor" else {}
        pruner = pruner_for(name).from_compressor(distiller, config(), **extra)
        before = model.conv1._nni_wrapper.weight.detach().clone()

        _, masks = pruner.compress(8, None)

        assert dict.fromkeys(LAYERS, 0.75) == {layer: shares(masks)[layer] for layer in LAYERS}
        assert not torch.equal(before, model.conv1._nni_wrapper.weight)
        assert given.model is None

    def test_a_fused_pruner_that_saw_too_few_batches_prunes_at_the_end_and_says_so(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = network()
        level = LevelPruner(model, [{"op_names": ["fc2"], "sparse_ratio": 0.5}], evaluator(model))
        pruner = TaylorPruner.from_compressor(level, config(), 50)

        _, masks = pruner.compress(8, None)

        assert "after 50 training steps, but training stopped after 8" in caplog.text
        assert 0.75 == shares(masks)["conv1"]

    def test_a_fusion_without_a_length_is_refused(self) -> None:
        model = network()
        level = LevelPruner(model, [{"op_names": ["fc2"], "sparse_ratio": 0.5}], evaluator(model))

        with pytest.raises(ConfigError, match="max_steps=None"):
            L1NormPruner.from_compressor(level, config()).compress()


@pytest.mark.parametrize("outer", [nni_pruning.LinearPruner, nni_pruning.AGPPruner])
@pytest.mark.parametrize(
    ("name", "level"),
    [(name, level) for name in CRITERIA for level in ("inner", "outer") if (name, level) != ("taylor", "outer")],
)
def test_the_schedules_of_nni_drive_our_pruners_and_train_the_wrapped_layers(outer: Any, name: str, level: str) -> None:
    model = network()
    given = evaluator(model)
    if name == "taylor":
        inner = TaylorPruner(model, config(), given, 2)
    else:
        inner = pruner_for(name)(model, config(), given if level == "inner" else None)
    pruner = outer(inner, 2, 4, given if level == "outer" else None)
    before = model.conv1._nni_wrapper.weight.detach().clone()

    _, masks = pruner.compress(10, None)

    assert dict.fromkeys(LAYERS, 0.75) == shares(masks)
    assert float((model.conv1._nni_wrapper.weight - before).detach().abs().max()) > 1e-5


def test_torchvision_networks_get_masks_that_can_be_removed_in_full() -> None:
    for name in ("resnet18", "mobilenet_v2", "densenet121"):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None)
        pruner = L1NormPruner(
            model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], dummy_input=torch.zeros(1, 3, 64, 64)
        )
        pruner.compress()

        plan = pruner.plan()

        prunable = pruner.channels.groups.num_channels
        assert plan.num_removed >= 0.45 * prunable, name


def test_the_training_function_of_the_bench_stops_where_it_is_told() -> None:
    seen = []

    class Counting:
        def zero_grad(self) -> None: ...
        def step(self) -> None:
            seen.append(1)

    model = network()
    training(batches())(model, Counting(), lambda batch, model: model(batch[0]).sum(), None, 3)  # type: ignore[arg-type]

    assert 3 == len(seen)


class Tied(nn.Module):
    """The output layer uses the weights of the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))


def tied_evaluator(model: nn.Module, result: Any = lambda loss: loss, **arguments: Any) -> TorchEvaluator:
    """Returns an evaluator on made features; ``result`` is the form in which the training step hands over its loss."""
    torch.manual_seed(3)
    data = [(torch.randn(16, 8), torch.randint(0, 8, (16,))) for _ in range(4)]

    def train(
        model: Any,
        optimizer: Any,
        training_step: Any,
        schedule: Any = None,
        max_steps: Any = None,
        max_epochs: Any = None,
    ) -> None:
        for number in range(max_steps or len(data) * max_epochs):
            optimizer.zero_grad()
            handed = training_step(data[number % len(data)], model)
            loss = handed["loss"] if isinstance(handed, dict) else handed[0] if isinstance(handed, tuple) else handed
            loss.backward()
            optimizer.step()

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)
    return TorchEvaluator(
        train,
        optimizer,
        lambda batch, model: result(nn.functional.cross_entropy(model(batch[0]), batch[1])),
        **arguments,
    )


FEATURES = torch.zeros(2, 8)


class TestTiedWeights:
    @pytest.mark.parametrize("pruned", [["middle", "last"], ["middle", "first"], ["middle"]])
    def test_stay_tied_and_keep_what_they_have_learnt(self, pruned: list[str]) -> None:
        torch.manual_seed(0)
        model = Tied()
        before = model.first.weight.detach().clone()
        given = tied_evaluator(model, dummy_input=FEATURES)
        config_list = [{"op_names": pruned, "sparse_ratio": 0.5}]

        pruner = SteppedPruner(model, config_list, given, steps=2, epochs_per_step=1)
        pruner.compress()
        pruner.unwrap_model()

        assert model.first.weight is model.last.weight
        assert not torch.equal(before, model.first.weight)

    def test_stay_tied_under_a_schedule(self) -> None:
        torch.manual_seed(0)
        model = Tied()
        before = model.first.weight.detach().clone()
        given = tied_evaluator(model, dummy_input=FEATURES)
        pruner = AGPPruner(L1NormPruner(model, [{"op_names": ["middle", "last"], "sparse_ratio": 0.5}], given), 2, 2)

        pruner.compress(4, None)
        trained = model.last._nni_wrapper.weight.detach().clone()
        pruner.unwrap_model()

        assert model.first.weight is model.last.weight
        assert torch.equal(trained, model.first.weight)
        assert not torch.equal(before, trained)


class SteppedPruner(MethodPruner):
    """L1 in several cuts with training between, as a method that decides by itself and gives no scores."""

    method = replace(method_spec("l1"), scores=None)


class TestMethodsInSteps:
    """Methods with phases of their own, trained by the user's function."""

    @pytest.mark.parametrize("form", ["tensor", "dict", "tuple"])
    def test_take_the_loss_in_every_form_that_nni_allows(self, form: str) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        forms: dict[str, Any] = {
            "tensor": lambda loss: loss,
            "dict": lambda loss: {"loss": loss, "more": 1},
            "tuple": lambda loss: (loss, 1),
        }
        given = tied_evaluator(model, forms[form], dummy_input=FEATURES)

        pruner = SteppedPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], given, steps=2, epochs_per_step=1)
        _, masks = pruner.compress()

        assert 0.5 == shares(masks)["0"]

    def test_leave_modes_to_the_user(self) -> None:
        model = network()
        model.train()
        model.bn1.eval()
        frozen = model.bn1.running_mean.clone()
        moving = model.bn2.running_mean.clone()
        given = evaluator(model, dummy_input=IMAGE)

        pruner = SteppedPruner(model, config(0.5), given, steps=2, epochs_per_step=1)
        pruner.compress()
        pruner.unwrap_model()

        assert torch.equal(frozen, model.bn1.running_mean)
        assert not torch.equal(moving, model.bn2.running_mean)
        assert (False, True) == (model.bn1.training, model.bn2.training)

    def test_prune_a_network_whose_shortcuts_have_no_weights(self) -> None:
        torch.manual_seed(0)
        model = build_model("resnet20", in_channels=1)
        data = [(torch.randn(4, 1, 16, 16), torch.tensor([1, 2, 3, 4]))]
        optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01)
        given = TorchEvaluator(training(data), optimizer, step, dummy_input=torch.zeros(2, 1, 16, 16))

        pruner = SteppedPruner(
            model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], given, steps=2, epochs_per_step=1
        )
        _, masks = pruner.compress()

        assert {0.5} == set(shares(masks).values())

    def test_run_the_hooks_around_all_optimizers_of_the_user(self) -> None:
        model = network()
        told: list[str] = []

        class Watching(PruningMethod):
            def phases(self) -> list[Phase]:
                return [Phase("only", 1)]

            def after_backward(self, context: MethodContext) -> None:
                told.append("backward")

            def after_step(self, context: MethodContext) -> None:
                with torch.no_grad():
                    context.model.fc1.weight[:4] = 0
                told.append("step")

            def after_epoch(self, context: MethodContext, phase: Phase, epoch: int) -> None:
                told.append(f"zero: {bool((context.model.fc1.weight[:4] == 0).all())}")

            def finish(self, context: MethodContext) -> Outcome:
                return Outcome(plan_from_channels(context.groups, {}))

        optimizers = [
            nni.trace(torch.optim.SGD)(model.conv1.parameters(), lr=0.1),
            nni.trace(torch.optim.SGD)(model.fc1.parameters(), lr=0.1, momentum=0.9),
        ]

        def train(
            model: Any, optimizers: Any, training_step: Any, schedule: Any, max_steps: Any, max_epochs: Any
        ) -> None:
            for batch in batches(3):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                training_step(batch, model).backward()
                for optimizer in optimizers:
                    optimizer.step()

        spec = MethodSpec("watching", "watches", "none", NoOptions, lambda _: Watching(), needs_data=True)
        made = type("WatchingPruner", (MethodPruner,), {"method": spec})

        made(model, config(0.5), TorchEvaluator(train, optimizers, step, dummy_input=IMAGE)).compress()

        assert [*["backward", "step"] * 3, "zero: True"] == told

    def test_say_that_the_training_function_made_no_step(self) -> None:
        model = network()
        optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)
        given = TorchEvaluator(lambda *arguments: None, optimizer, step, dummy_input=IMAGE)

        with pytest.raises(ConfigError, match="made no step when asked for max_epochs=1"):
            SteppedPruner(model, config(0.5), given, steps=2, epochs_per_step=1).compress()

        assert given.model is None

    @pytest.mark.parametrize("setting", [{"sparse_threshold": 1.0}, {"sparse_ratio": 0.5, "granularity": "in_channel"}])
    def test_refuse_targets_that_they_cannot_follow(self, setting: dict[str, Any]) -> None:
        with pytest.raises(
            ConfigError, match=rf"'conv2' has the {'granularity' if len(setting) > 1 else 'sparse_threshold'}"
        ):
            SteppedPruner(network(), [{"op_names": ["conv2"], **setting}], dummy_input=IMAGE, steps=2).compress()


class Named(nn.Module):
    """A network that answers with a dict or a tuple."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.net, self.form = network(), form

    def forward(self, x: Tensor) -> Any:
        out = self.net(x)
        return {"out": out} if self.form == "dict" else (out, x)


@pytest.mark.parametrize("form", ["dict", "tuple"])
def test_a_training_step_on_structured_outputs_is_repeated(form: str) -> None:
    model = Named(form)

    def train(model: Any, optimizer: Any, training_step: Any, schedule: Any, max_steps: int, max_epochs: Any) -> None:
        for images, labels in batches()[:max_steps]:
            optimizer.zero_grad()
            training_step(model(images), labels).backward()
            optimizer.step()

    def on_output(output: Any, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output["out"] if form == "dict" else output[0], labels)

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.05)
    config_list = [{"op_names": [f"net.{layer}" for layer in LAYERS], "sparse_ratio": 0.75}]

    _, found = TaylorPruner(
        model, config_list, TorchEvaluator(train, optimizer, on_output), training_steps=4
    ).compress()

    plain = network()
    _, expected = TaylorPruner(plain, config(), evaluator(plain), training_steps=4).compress()
    assert all(torch.equal(expected[layer]["weight"], found[f"net.{layer}"]["weight"]) for layer in LAYERS)


class TestNothingIsLeftBehind:
    @pytest.mark.parametrize("outer", [AGPPruner, nni_pruning.AGPPruner, None])
    def test_when_training_raises_after_some_steps(self, outer: Any) -> None:
        model = network()
        data = batches(3)
        left = 2

        def breaking(batch: Any, model: nn.Module) -> Tensor:
            nonlocal left
            left -= 1
            if left < 0:
                raise RuntimeError("the user's error")
            return nn.functional.cross_entropy(model(batch[0]), batch[1])

        optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.05)
        given = TorchEvaluator(training(data), optimizer, breaking)
        inner = TaylorPruner(model, config(), given, 3)
        pruner = inner if outer is None else outer(inner, 3, 2)

        with pytest.raises(RuntimeError, match="the user's error"):
            pruner.compress(*(() if outer is None else (6, None)))
        if given.model is not None:  # NNI's own schedules leave it bound
            given.unbind_model()
        pruner.unwrap_model()

        assert not model._forward_hooks
        copy.deepcopy(model)

    def test_when_a_constructor_refuses(self) -> None:
        model = network()

        with pytest.raises(ConfigError, match=r"\[4, 4\]"):
            RandomPruner(model, [{"op_names": ["fc1"], "sparse_ratio": 0.5, "granularity": [4, 4]}])

        assert not any(hasattr(module, "_nni_wrapper") for module in model.modules())

    def test_when_a_compressor_is_not_taken_over(self) -> None:
        model = network()
        level = LevelPruner(model, [{"op_names": ["fc2"], "sparse_ratio": 0.5}])

        with pytest.raises(ConfigError, match="conv9"):
            L1NormPruner.from_compressor(level, [{"op_names": ["conv9"], "sparse_ratio": 0.5}])

        assert level._is_wrapped
        level.compress()
        model(IMAGE)
        assert 0.5 == float((model.fc2.weight == 0).double().mean())

    def test_of_the_batches_that_were_scored_with(self) -> None:
        model = network()
        pruner = TaylorPruner(model, config(), evaluator(model), 3)

        pruner.compress()

        assert not pruner._calls


class TestPlan:
    @pytest.mark.parametrize("entry", [{"granularity": "in_channel"}, {"target_names": ["weight"]}])
    def test_is_what_the_speedup_removes(self, entry: dict[str, Any]) -> None:
        model = network()
        layer = "fc2" if "granularity" in entry else "bn1"
        pruner = L1NormPruner(model, [{"op_names": [layer], "sparse_ratio": 0.5, **entry}], dummy_input=IMAGE)
        _, masks = pruner.compress()

        plan = pruner.plan()

        pruner.unwrap_model()
        speedup = ModelSpeedup(model, IMAGE, masks)
        speedup.speedup_model()
        assert plan.num_removed > 0
        assert plan == speedup.removal.plan

    def test_of_padded_shortcuts_too(self) -> None:
        torch.manual_seed(0)
        model, image = build_model("resnet20"), torch.zeros(2, 3, 32, 32)
        pruner = L1NormPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], dummy_input=image)
        _, masks = pruner.compress()

        plan = pruner.plan()

        pruner.unwrap_model()
        speedup = ModelSpeedup(model, image, masks)
        speedup.speedup_model()
        assert plan == speedup.removal.plan


class TestGlobalGroups:
    def test_mask_the_share_of_all_weights_that_is_asked_for(self) -> None:
        for ratio in (0.1, 0.3, 0.5, 0.8):
            _, masks = L1NormPruner(network(), config(ratio, global_group_id=0)).compress()

            sizes = {layer: masks[layer]["weight"].numel() for layer in LAYERS}
            masked = sum(share * sizes[layer] for layer, share in shares(masks).items()) / sum(sizes.values())
            # the coarsest step is a channel of conv2 and conv3 together
            assert ratio - (72 + 144) / sum(sizes.values()) < masked <= ratio + 1e-9

    def test_take_the_lowest_scores_of_all_layers_first(self) -> None:
        model = network()
        pruner = L1NormPruner(model, config(0.5, global_group_id=0), dummy_input=IMAGE)
        tensors = dict(network().named_parameters())
        scores = {g.name: group_importance(g, tensors, l1_norm) for g in pruner.channels.groups}

        _, masks = pruner.compress()

        kept = {name: channels(masks[name]["weight"]) for name in scores}
        lowest_kept = min(float(scores[name][kept[name]].min()) for name in scores)
        gone = [float(s) for name in scores for c, s in enumerate(scores[name]) if c not in kept[name]]
        assert max(gone) <= lowest_kept

    def test_do_not_depend_on_the_order_of_sets(self, tmp_path: Path) -> None:
        program = tmp_path / "program.py"
        program.write_text(
            "from nni_bench import config, network\n"
            "from nni_prune_ext.pruning import L1NormPruner\n"
            "_, masks = L1NormPruner(network(), config(0.5, global_group_id=0)).compress()\n"
            "print(sorted((n, int((own['weight'] == 0).sum())) for n, own in masks.items()))\n"
        )
        found = set()
        for seed in ("0", "1", "3"):
            environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)}
            environment["OMP_NUM_THREADS"] = "1"
            command = [sys.executable, "-W", "ignore", str(program)]
            found.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

        assert 1 == len(found), found

    def test_under_a_schedule_too(self) -> None:
        model = network()

        _, masks = AGPPruner(L1NormPruner(model, config(0.5, global_group_id=0), evaluator(model)), 2, 2).compress(
            4, None
        )

        sizes = {layer: masks[layer]["weight"].numel() for layer in LAYERS}
        masked = sum(share * sizes[layer] for layer, share in shares(masks).items()) / sum(sizes.values())
        assert 0.45 < masked <= 0.5 + 1e-9


def test_depthwise_transposed_convolutions_lose_the_channels_of_their_group() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, groups=8), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    image = torch.zeros(1, 3, 9, 9)
    pruner = L1NormPruner(model, [{"op_names": ["0", "2"], "sparse_ratio": 0.5}], dummy_input=image)

    _, masks = pruner.compress()

    assert channels(masks["0"]["weight"]) == channels(masks["2"]["weight"])
    pruner.unwrap_model()
    ModelSpeedup(model, image, masks).speedup_model()
    assert (4, 4) == (model[0].out_channels, model[2].out_channels)


class Upwards(nn.Module):
    """A small decoder: 8 channels in, 16 out of the transposed convolution."""

    def __init__(self, out: int = 16, groups: int = 1) -> None:
        super().__init__()
        self.down, self.up, self.head = (
            nn.Conv2d(3, 8, 3),
            nn.ConvTranspose2d(8, out, 2, groups=groups),
            nn.Conv2d(out, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.up(torch.relu(self.down(x)))))


class TestTransposedConvolutions:
    @pytest.mark.parametrize("out", [8, 16])
    def test_lose_output_channels(self, out: int) -> None:
        torch.manual_seed(0)
        model = Upwards(out)
        with torch.no_grad():
            model.up.weight[:, : out // 2] *= 1e-3
        image = torch.zeros(1, 3, 9, 9)
        pruner = L1NormPruner(model, [{"op_names": ["up"], "sparse_ratio": 0.5}], dummy_input=image)

        _, masks = pruner.compress()

        kept = (masks["up"]["weight"] != 0).any(dim=(0, 2, 3)).nonzero().flatten().tolist()
        assert list(range(out // 2, out)) == kept
        assert list(range(out // 2, out)) == masks["up"]["bias"].nonzero().flatten().tolist()
        pruner.unwrap_model()
        ModelSpeedup(model, image, masks).speedup_model()
        assert (out // 2, 8) == (model.up.out_channels, model.down.out_channels)

    def test_lose_input_channels_by_in_channel(self) -> None:
        model = Upwards()
        entry = {"op_names": ["up"], "sparse_ratio": 0.5, "granularity": "in_channel", "target_names": ["weight"]}

        _, masks = L1NormPruner(model, [entry], dummy_input=torch.zeros(1, 3, 9, 9)).compress()

        assert 4 == int((masks["up"]["weight"] != 0).any(dim=(1, 2, 3)).sum())
