"""The mask search as an NNI pruner: the granularity of the config_list decides over channels or single weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import nni
import pytest
import torch
from nni.compression import TorchEvaluator
from nni_bench import IMAGE, LAYERS, batches, channels, config, evaluator, network, shares, step, training
from torch import Tensor, nn

from nni_prune_ext import export_onnx
from nni_prune_ext.adapters import nni_pruners
from nni_prune_ext.certificate import certify_plan
from nni_prune_ext.errors import ConfigError, ConfigListError
from nni_prune_ext.methods.lottery_jackpots import LotteryJackpots
from nni_prune_ext.models.loading import build_model
from nni_prune_ext.pipeline import method_spec
from nni_prune_ext.pruning import AGPPruner, LotteryJackpotsPruner, RandomPruner, pruner_for
from nni_prune_ext.speedup import FineGrainedMaskError, ModelSpeedup

SEARCH: dict[str, Any] = {"search_epochs": 2, "freeze_epochs": 1, "tune_epochs": 0, "gap": 0.001}
"""Search-only; a low barrier lets entries be swapped within a dozen steps."""
CONVOLUTIONS = ("conv1", "conv2", "conv3")


def singles(ratio: float = 0.75, **settings: Any) -> list[dict[str, Any]]:
    """Returns a config_list that names single weights of all layers of the bench."""
    return [
        {"op_names": list(CONVOLUTIONS), "sparse_ratio": ratio, "granularity": [1, 1, 1, 1], **settings},
        {"op_names": ["fc1"], "sparse_ratio": ratio, "granularity": [1, 1], **settings},
    ]


def compressed(config_list: list[dict[str, Any]], **options: Any) -> tuple[Any, nn.Module, Any]:
    """Returns pruner, unwrapped model and masks of a run on the bench."""
    model = network()
    pruner = LotteryJackpotsPruner(model, config_list, evaluator(model), **{**SEARCH, **options})
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return pruner, model, masks


def masked(masks: Any) -> dict[str, int]:
    return {layer: int((own["weight"] == 0).sum()) for layer, own in masks.items()}


def sizes() -> dict[str, int]:
    return {layer: network().get_submodule(layer).weight.numel() for layer in LAYERS}


class TestChannels:
    def test_are_searched_removed_and_run_as_onnx(self, tmp_path: Path) -> None:
        pruner, model, masks = compressed(config(0.5), tune_epochs=1)
        plan = pruner.plan()
        assert "channel" == pruner.unit
        assert dict.fromkeys(LAYERS, 0.5) == shares(masks)
        assert channels(masks["conv2"]["weight"]) == channels(masks["conv3"]["weight"])
        assert certify_plan(network(), plan, IMAGE, groups=pruner.channels.groups).exact
        before = sum(parameter.numel() for parameter in model.parameters())

        ModelSpeedup(model, IMAGE, masks).speedup_model()

        assert (4, 8, 16) == (model.conv1.out_channels, model.conv2.out_channels, model.fc1.out_features)
        assert sum(parameter.numel() for parameter in model.parameters()) < 0.5 * before
        exported = export_onnx(model, IMAGE, tmp_path / "smaller.onnx", given_inputs=[batches()[0][0]])
        assert exported.parity is not None
        assert exported.parity.max_rel < 1e-4

    def test_the_search_finds_others_than_the_largest(self) -> None:
        found, largest = (compressed(config(0.5), **own)[2] for own in ({}, {"control": "recalibrated"}))

        assert any(channels(found[layer]["weight"]) != channels(largest[layer]["weight"]) for layer in LAYERS)

    def test_searching_only_leaves_every_weight_and_brings_the_statistics_of_norms(self) -> None:
        pruner, model, masks = compressed(config(0.5))
        kept, before = channels(masks["conv2"]["weight"]), dict(network().named_parameters())

        assert pruner.outcome.facts["swaps_made"] > 0
        assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
        small = ModelSpeedup(model, IMAGE, masks).speedup_model()
        assert 8 == len(kept) == small.bn2.num_features
        measured = {name: small.get_submodule(name).running_mean.clone() for name in ("bn1", "bn2", "bn3")}
        for name, mean in seen_by_norms(small).items():
            assert torch.allclose(mean, measured[name], atol=1e-5), name

    def test_tuned_weights_come_back_and_the_users_optimizer_leaves_them_to_the_method(self) -> None:
        pruner, model, masks = tuned_beside_a_wild_optimizer(config(0.5))

        kept = channels(masks["conv2"]["weight"])
        before = network().conv2.weight[kept]
        moved = (model.conv2.weight[kept] - before).abs().max()
        assert 0 < moved < 0.1
        assert pruner.outcome.plan.num_removed == 0, "cut before the tuning"

    @pytest.mark.parametrize("tune_epochs", [0, 1])
    def test_shortcuts_without_weights_lose_what_the_method_took_from_them(
        self, tune_epochs: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runs: list[Any] = []
        plain = nni_pruners.run_method
        monkeypatch.setattr(nni_pruners, "run_method", lambda *given: runs.append(given[1]) or plain(*given))
        pruner, model, image = padded(tune_epochs)
        _, masks = pruner.compress()
        plan = pruner.plan()
        pruner.unwrap_model()

        speedup = ModelSpeedup(model, image, masks)
        speedup.speedup_model()

        assert () == speedup.report.kept
        assert plan == speedup.removal.plan == runs[0].applied
        assert torch.allclose(runs[0].model.eval()(image), model.eval()(image), atol=1e-6)

    def test_masks_of_shortcuts_are_restored_in_a_second_process(self) -> None:
        pruner, _, _ = padded(0)
        _, masks = pruner.compress()
        saved = {module: dict(own) for module, own in masks.items()}
        again, _, _ = padded(0)

        again.update_masks(saved)

        assert {"_output_0"} == set(again.get_masks()["layer2.0.shortcut"])
        assert pruner.plan() == again.plan()

    def test_options_by_position_and_from_another_compressor(self) -> None:
        model = network()
        first = RandomPruner(model, [{"op_names": ["fc1"], "sparse_ratio": 0.5}], evaluator(model))
        first.compress()

        pruner = LotteryJackpotsPruner.from_compressor(first, [{"op_names": ["conv1"], "sparse_ratio": 0.5}], 1, 1, 0)

        assert (1, 1, 0) == (pruner.options.search_epochs, pruner.options.freeze_epochs, pruner.options.tune_epochs)

    def test_an_outer_schedule_is_refused(self) -> None:
        model = network()
        outer = AGPPruner(LotteryJackpotsPruner(model, config(), evaluator(model)), 2, 2)

        with pytest.raises(ConfigError, match="'lottery_jackpots' decides in phases of its own"):
            outer.compress(4, None)

    def test_a_pattern_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="2:4 is about single weights, but channels were asked for"):
            compressed(config(0.5), pattern="2:4")


class TestSingleWeights:
    @pytest.mark.parametrize("ratio", [0.5, 0.77, 0.9])
    def test_exactly_the_ratio_of_each_tensor_is_masked_rounded_up(self, ratio: float) -> None:
        pruner, _, masks = compressed(singles(ratio))

        assert "weight" == pruner.unit
        assert {layer: math.ceil(ratio * size) for layer, size in sizes().items()} == masked(masks)
        assert all(bool((own["bias"] == 1).all()) for own in masks.values()), "biases stay, as in the search"

    def test_the_masks_are_those_of_the_method(self) -> None:
        pruner, _, masks = compressed(singles())

        found = {name: mask.float() for name, mask in pruner.outcome.weight_masks.items()}
        assert {f"{layer}.weight" for layer in LAYERS} == found.keys()
        assert all(torch.equal(found[f"{layer}.weight"], masks[layer]["weight"]) for layer in LAYERS)

    def test_the_search_moves_away_from_the_smallest_weights(self) -> None:
        pruner, _, masks = compressed(singles())

        weight = network().conv3.weight.detach().abs()
        smallest = weight <= weight.flatten().sort().values[masked(masks)["conv3"] - 1]
        assert pruner.outcome.facts["swaps_made"] > 0
        assert 0 < int((smallest & (masks["conv3"]["weight"] == 1)).sum())

    def test_a_global_group_has_one_threshold_and_the_ratio_of_all_its_weights(self) -> None:
        found = masked(compressed(singles(0.7, global_group_id="all"), control="recalibrated")[2])

        expected = network_threshold(0.7)
        assert expected == found
        assert math.ceil(0.7 * sum(sizes().values())) == sum(found.values())
        assert len({round(found[layer] / size, 2) for layer, size in sizes().items()}) > 1

    def test_the_search_keeps_the_counts_of_the_threshold(self) -> None:
        assert network_threshold(0.7) == masked(compressed(singles(0.7, global_group_id="all"))[2])

    def test_limits_of_single_layers_hold_in_a_group_and_alone(self) -> None:
        limits = {"min_sparse_ratio": 0.5, "max_sparse_ratio": 0.72}

        together = masked(compressed(singles(0.7, global_group_id=1, **limits), control="recalibrated")[2])
        alone = masked(compressed(singles(0.9, **limits), control="recalibrated")[2])

        assert math.ceil(0.7 * sum(sizes().values())) == sum(together.values())
        assert all(0.5 * size - 1 < together[layer] <= 0.72 * size for layer, size in sizes().items())
        assert {layer: math.floor(0.72 * size) for layer, size in sizes().items()} == alone

    def test_a_ratio_of_one_leaves_one_weight_of_each_tensor(self) -> None:
        assert {layer: size - 1 for layer, size in sizes().items()} == masked(compressed(singles(1.0))[2])

    def test_no_example_input_is_needed_and_nothing_is_said_about_it(self, caplog: pytest.LogCaptureFixture) -> None:
        torch.manual_seed(0)
        model = OddShape()
        data = [(torch.randn(4, 1, 7, 11), torch.tensor([0, 1, 2, 0]))]
        optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)
        given = TorchEvaluator(training(data), optimizer, step)
        entry = {"op_names": ["conv"], "sparse_ratio": 0.5, "granularity": [1, 1, 1, 1]}

        _, masks = LotteryJackpotsPruner(model, [entry], given, **SEARCH).compress()

        assert {"conv": 18} == masked(masks)
        assert "dummy_input" not in caplog.text

    def test_searching_only_leaves_every_weight_and_brings_the_statistics_of_norms(self) -> None:
        _, model, masks = compressed(singles())

        assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in network().named_parameters())
        simulated = network()
        with torch.no_grad():
            for layer, own in masks.items():
                simulated.get_submodule(layer).weight.mul_(own["weight"])
        for name, mean in seen_by_norms(simulated).items():
            assert torch.allclose(mean, model.get_submodule(name).running_mean, atol=1e-5), name

    def test_tuned_weights_come_back_and_the_users_optimizer_leaves_them_to_the_method(self) -> None:
        _, model, masks = tuned_beside_a_wild_optimizer(singles(0.5))

        mask, before = masks["conv3"]["weight"] == 1, network().conv3.weight
        moved = (model.conv3.weight - before).abs()
        assert 0 < moved[mask].max() < 0.1
        assert torch.equal(before[~mask], model.conv3.weight[~mask]), "what is masked has no gradient"

    def test_a_model_left_in_evaluation_mode_is_measured_alike(self) -> None:
        found = []
        for training_mode in (True, False):
            model = network().train(training_mode)
            optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.05)
            given = TorchEvaluator(with_modes(training(batches())), optimizer, step)
            pruner = LotteryJackpotsPruner(model, singles(), given, **SEARCH)
            pruner.compress()
            pruner.unwrap_model()
            found.append({name: buffer.clone() for name, buffer in model.named_buffers()})
            assert training_mode is model.training

        assert all(torch.equal(buffer, found[1][name]) for name, buffer in found[0].items())

    def test_a_pattern_holds_in_every_group_of_four_input_channels(self) -> None:
        _, _, masks = compressed(singles(0.5)[:1], pattern="2:4")

        for layer in ("conv2", "conv3"):
            groups = masks[layer]["weight"].movedim(1, -1).reshape(-1, 4)
            assert {2.0} == set(groups.sum(1).tolist())
        assert 0 == masked(masks)["conv1"], "it has one input channel"

    def test_a_pattern_of_another_share_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="masks 50.0% of the weights, but 75.0% were asked for"):
            compressed(singles(0.75), pattern="2:4")

    def test_the_same_pruner_masks_as_much_the_second_time(self) -> None:
        model = network()
        pruner = LotteryJackpotsPruner(model, singles(), evaluator(model), **SEARCH)
        pruner.compress()
        with torch.no_grad():
            model.conv3._nni_wrapper.weight.normal_(generator=torch.Generator().manual_seed(5))

        _, masks = pruner.compress()

        assert {layer: math.ceil(0.75 * size) for layer, size in sizes().items()} == masked(masks)

    def test_a_weight_that_two_layers_share_is_masked_in_both(self) -> None:
        torch.manual_seed(0)
        model = Tied()
        data = [(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))]
        given = TorchEvaluator(training(data), nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1), step)
        entry = {"op_names": ["first", "second"], "sparse_ratio": 0.5, "granularity": [1, 1]}

        _, masks = LotteryJackpotsPruner(model, [entry], given, **SEARCH).compress()

        assert {"first": 32, "second": 32} == masked(masks)
        assert torch.equal(masks["first"]["weight"], masks["second"]["weight"])

    def test_a_speedup_and_a_plan_are_refused_with_the_layers(self) -> None:
        pruner, model, masks = compressed(singles())

        with pytest.raises(FineGrainedMaskError, match=r"conv1\.weight.*single weights.*out_channel"):
            ModelSpeedup(model, IMAGE, masks)
        model = network()
        pruner = LotteryJackpotsPruner(model, singles(), evaluator(model), **SEARCH)
        pruner.compress()
        with pytest.raises(FineGrainedMaskError, match="single weights"):
            pruner.plan()


REFUSED: list[tuple[list[dict[str, Any]], str]] = [
    (
        [*singles()[:1], {"op_names": ["fc1"], "sparse_ratio": 0.5}],
        "'fc1'.* channels and 'weight' of 'conv",
    ),
    (
        [{"op_names": ["fc1"], "sparse_ratio": 0.5, "granularity": [4, 4]}],
        r"\[4, 4\] of 'weight' of 'fc1' \(entry 0\) is a block .*every dimension: \[1, 1\]",
    ),
    (
        [{"op_names": ["conv2"], "sparse_ratio": 0.5, "granularity": [-1, 1, 1, 1]}],
        r"\[-1, 1, 1, 1\] of 'weight' of 'conv2' \(entry 0\) is a block",
    ),
    ([{"op_names": ["fc1"], "sparse_threshold": 0.5, "granularity": [1, 1]}], "has the sparse_threshold 0.5"),
    (singles(0.5, dependency_group_id=3)[1:], "has the dependency_group_id 3"),
]


@pytest.mark.parametrize(("config_list", "said"), REFUSED)
def test_what_cannot_be_masked_exactly_is_refused_before_anything_is_wrapped(
    config_list: list[dict[str, Any]], said: str
) -> None:
    model = network()

    with pytest.raises(ConfigListError, match=said):
        LotteryJackpotsPruner(model, config_list, evaluator(model))

    assert not hasattr(model.fc1, "_nni_wrapper")


def test_a_method_without_weight_masks_is_refused_for_single_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from nni_prune_ext.methods import lottery_jackpots

    spec = dataclasses.replace(method_spec("lottery_jackpots"), name="whole", products=frozenset({"plan"}))
    monkeypatch.setattr(lottery_jackpots, "WHOLE", spec, raising=False)
    model = network()

    with pytest.raises(ConfigError, match=r"\[1, 1, 1, 1\].*'whole' decides over channels"):
        pruner_for("nni_prune_ext.methods.lottery_jackpots:WHOLE")(model, singles(), evaluator(model))


def test_a_threshold_over_channels_is_refused() -> None:
    with pytest.raises(ConfigError, match="sparse_threshold 0.5, but LotteryJackpotsPruner decides"):
        compressed([{"op_names": ["conv1"], "sparse_threshold": 0.5}])


def test_a_config_list_without_a_whole_group_is_refused() -> None:
    with pytest.raises(ConfigListError, match=r"none of the 3 channel groups .*'conv2': 'conv3' is not in"):
        compressed([{"op_names": ["conv2"], "sparse_ratio": 0.5}])


def test_a_network_without_a_channel_that_may_go_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 10))
    given = evaluator(model, dummy_input=IMAGE)
    pruner = LotteryJackpotsPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], given, **SEARCH)

    with pytest.raises(ConfigError, match="no channel of Sequential that may be removed"):
        pruner.compress()


def test_the_class_runs_the_registered_method() -> None:
    assert LotteryJackpotsPruner is pruner_for("lottery_jackpots")
    assert LotteryJackpots is LotteryJackpotsPruner.method.build


def test_an_evaluator_is_needed() -> None:
    with pytest.raises(ConfigError, match="needs training batches, but has no evaluator"):
        LotteryJackpotsPruner(network(), singles()).compress()


class OddShape(nn.Module):
    """Runs on one shape only, which nobody would guess."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4 * 5 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(torch.relu(self.conv(x)).flatten(1))
        return result


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.relu(self.second(torch.relu(self.first(x)))))
        return result


def padded(tune_epochs: int) -> tuple[Any, nn.Module, Tensor]:
    """Returns a pruner of a network whose shortcuts subsample and pad, the network, and an image."""
    torch.manual_seed(0)
    model, image = build_model("resnet20", in_channels=1), torch.randn(2, 1, 8, 8)
    data = [(torch.randn(8, 1, 8, 8), torch.arange(8))] * 2
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01)
    given = TorchEvaluator(with_modes(training(data)), optimizer, step, dummy_input=image)
    options = {**SEARCH, "search_epochs": 1, "tune_epochs": tune_epochs}
    return LotteryJackpotsPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], given, **options), model, image


def tuned_beside_a_wild_optimizer(config_list: list[dict[str, Any]]) -> tuple[Any, nn.Module, Any]:
    """Tunes for two epochs at a small rate, while the user's own optimizer would throw weights about."""
    model = network()
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=100.0)
    given = TorchEvaluator(training(batches()), optimizer, step)
    options = {**SEARCH, "tune_epochs": 2, "tune_learning_rate": 0.001}
    pruner = LotteryJackpotsPruner(model, config_list, given, **options)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return pruner, model, masks


def with_modes(train: Any) -> Any:
    """Returns a training function that sets modes itself, as users' functions do."""

    def wrapped(model: nn.Module, *arguments: Any, **options: Any) -> None:
        model.train()
        train(model, *arguments, **options)
        model.eval()

    return wrapped


def seen_by_norms(model: nn.Module) -> dict[str, Tensor]:
    """Returns norm → the mean over batches of the mean of what reaches it, in training mode."""
    sums: dict[str, list[Tensor]] = {}
    model = model.train()
    for name in ("bn1", "bn2", "bn3"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: sums.setdefault(name, []).append(args[0].mean((0, 2, 3)))
        )
    with torch.no_grad():
        for images, _ in batches():
            model(images)
    return {name: torch.stack(own).mean(0) for name, own in sums.items()}


def network_threshold(share: float) -> dict[str, int]:
    """Returns layer → number of its weights among the smallest of all."""
    weights = {layer: network().get_submodule(layer).weight.detach().abs().flatten() for layer in LAYERS}
    every = torch.cat(list(weights.values())).sort().values
    limit = every[math.ceil(share * len(every)) - 1]
    return {layer: int((weight <= limit).sum()) for layer, weight in weights.items()}
