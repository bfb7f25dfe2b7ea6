"""NNI pruners of this package keep NNI's class contract, and masks of coupled layers agree."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import nni
import nni.compression.pruning as nni_pruning
import pytest
import torch
import torchvision
from nni.compression import TorchEvaluator
from nni.compression.distillation import DynamicLayerwiseDistiller
from nni_bench import IMAGE, LAYERS, batches, channels, config, evaluator, network, shares, training
from torch import Tensor, nn

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.methods.base import MethodSpec
from nni_prune_ext.pipeline import method_spec
from nni_prune_ext.pruning import L1NormPruner, LevelPruner, RandomPruner, TaylorPruner, pruner_for
from nni_prune_ext.registry import plugins
from nni_prune_ext.scoring.group_reduction import group_importance
from nni_prune_ext.scoring.weight_norms import l1_norm

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
    nni_names = list(inspect.signature(nni_pruning.L1NormPruner.__init__).parameters)[1:]
    own = list(inspect.signature(L1NormPruner).parameters)

    assert nni_names == [name for name in own if name in nni_names]
    assert own.index("existed_wrappers") > own.index("steps") > own.index("evaluator")
    expected = list(inspect.signature(nni_pruning.TaylorPruner.__init__).parameters)[1:]
    assert expected == list(inspect.signature(TaylorPruner).parameters)[: len(expected)]


def test_options_are_taken_by_position_and_by_name_and_checked() -> None:
    assert 2 == L1NormPruner(network(), config(), None, 2).options.steps
    with pytest.raises(ConfigError, match="'steps' twice"):
        L1NormPruner(network(), config(), None, 2, steps=2)
    with pytest.raises(ConfigError, match="at most 4"):
        L1NormPruner(network(), config(), None, 1, "linear", 0, None, 5)
    with pytest.raises(ConfigError, match="Known options"):
        L1NormPruner(network(), config(), sparsity=0.5)


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
        pruner = L1NormPruner(model, [{"op_types": ["Conv2d"], "exclude_op_names": ["5"], "sparse_ratio": 0.5}])

        _, masks = pruner.compress()

        first = channels(masks["0"]["weight"])
        assert [c + 6 for c in first if c < 6] == [c for c in first if c >= 6]
        assert 6 == len(first)


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

    def test_data_without_an_evaluator_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="no evaluator; expected an nni.compression.TorchEvaluator"):
            TaylorPruner(network(), config(), None, training_steps=2).compress()  # type: ignore[arg-type]

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
@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("level", ["inner", "outer"])
def test_the_schedules_of_nni_drive_our_pruners_and_train_the_wrapped_layers(outer: Any, name: str, level: str) -> None:
    model = network()
    given = evaluator(model)
    if name == "taylor":
        inner = TaylorPruner(model, config(), given if level == "inner" else None, 2)  # type: ignore[arg-type]
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
