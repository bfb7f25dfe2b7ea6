"""A latency that is asked for is met by widths: on a stopwatch whose times are a known function of widths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nni_prune_ext.allocation import Limits
from nni_prune_ext.checkpoints import Checkpoints
from nni_prune_ext.errors import ConfigError, RuntimeUnavailableError, TargetError, UnknownPluginError
from nni_prune_ext.latency import LatencyConditions, latency_refusal, start
from nni_prune_ext.latency.aiming import GOOD, MOST_TRIES, Try, best_try, next_correction
from nni_prune_ext.latency.predictor import LatencyPredictor
from nni_prune_ext.models.loading import build_model
from nni_prune_ext.pipeline import PruneResult, method_spec, prune
from nni_prune_ext.registry import plugins

PREDICTOR = LatencyPredictor(tables=(), curve=((0.0, 1.0),), dense_ms=1.0)


@pytest.fixture
def pruned(network: nn.Module, images: Tensor, groups, fake):
    def run(target: object = "latency=0.5", **changes: object) -> PruneResult:
        return prune(network, images, target=target, groups=groups, **changes)

    return run


def share(result: PruneResult, network: nn.Module, fake) -> float:
    """The compact network's time as a share of the dense one's, by the function itself."""
    return fake.made[-1].whole(result.model) / fake.made[-1].whole(network)


@pytest.mark.parametrize("asked", [0.9, 0.7, 0.5, 0.3])
@pytest.mark.parametrize("method", ["l1", "random", "fpgm"])
def test_a_share_is_met_within_three_per_cent(asked: float, method: str, pruned, network, fake) -> None:
    result = pruned(f"latency={asked}", method=method)

    assert share(result, network, fake) == pytest.approx(asked, rel=0.03)
    assert [True] == [achieved.met for achieved in result.achieved]


def test_milliseconds_are_met_within_three_per_cent(pruned, network, fake) -> None:
    result = pruned("latency=800us")

    assert fake.made[-1].whole(result.model) == pytest.approx(0.8, rel=0.03)
    [achieved] = result.achieved
    assert (0.8, pytest.approx(fake.made[-1].whole(network))) == (achieved.asked, achieved.dense)
    assert achieved.achieved == pytest.approx(fake.made[-1].whole(result.model))


def test_all_joint_targets_are_met_and_the_remark_says_which_one_binds(pruned, network, fake) -> None:
    result = pruned(["latency=0.8", "macs=0.3"])

    assert [True, True] == [achieved.met for achieved in result.achieved]
    assert share(result, network, fake) < 0.7
    assert "the other targets ask for more" in result.latency.remark


def test_a_latency_binds_where_the_other_target_asks_for_less(pruned, network, fake) -> None:
    result = pruned(["latency=0.5", "params=0.95"])

    assert share(result, network, fake) == pytest.approx(0.5, rel=0.03)
    assert "" == result.latency.remark


def test_widths_keep_to_the_multiple_of_the_probe(pruned, network, monkeypatch, fake) -> None:
    monkeypatch.setattr(fake, "liked", 16)
    result = pruned("latency=0.4")

    assert {0} == {module.out_channels % 16 for module in result.model.modules() if isinstance(module, nn.Conv2d)}
    assert 16 == result.latency.multiple
    assert any("multiples of 16, as the probe" in sentence for sentence in result.latency.sentences())


def test_a_multiple_of_the_user_wins(pruned, monkeypatch, fake) -> None:
    monkeypatch.setattr(fake, "liked", 16)
    result = pruned("latency=0.4", limits=Limits(multiple=2))

    widths = {module.out_channels % 16 for module in result.model.modules() if isinstance(module, nn.Conv2d)}
    assert widths != {0}
    assert not any("probe" in sentence for sentence in result.latency.sentences())
    assert 2 == result.latency.multiple


def test_what_cannot_be_reached_is_refused_with_the_nearest_latency(pruned, network, fake) -> None:
    with pytest.raises(TargetError, match=r"cannot be met.*limits allow no less than") as raised:
        pruned("latency=0.05", limits=Limits(max_ratio=0.5))

    lowest = prune_to_the_limits(network, fake)
    assert f"cut to the limits: {lowest:.4g} of {fake.made[-1].whole(network):.4g} ms" in str(raised.value)


def prune_to_the_limits(network: nn.Module, fake) -> float:
    smallest = type(network)()
    smallest.first, smallest.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 48, 3, padding=1)
    smallest.third, smallest.fourth = nn.Conv2d(48, 48, 3, padding=1), nn.Conv2d(48, 64, 3, stride=2, padding=1)
    smallest.last = nn.Linear(64, 10)
    return fake.made[-1].whole(smallest)


def test_the_last_measurement_is_a_fresh_one_and_a_miss_is_reported(pruned, monkeypatch, fake) -> None:
    monkeypatch.setattr(fake, "shipped", 1.1)
    options = {"steps": 2, "epochs_per_step": 1}
    result = pruned("latency=0.5", options=options, train_batches=batches())

    [achieved] = result.achieved
    assert not achieved.met
    assert achieved.achieved == pytest.approx(1.1 * achieved.asked, rel=0.03)
    assert "above what was asked for: the method trains" in result.latency.remark


def test_a_method_without_training_is_corrected_by_the_last_measurement_too(pruned, monkeypatch, fake) -> None:
    monkeypatch.setattr(fake, "shipped", 1.1)
    result = pruned("latency=0.5")

    [achieved] = result.achieved
    assert achieved.met
    assert achieved.achieved == pytest.approx(achieved.asked, rel=0.03)
    assert ["compact", "compact"] == fake.made[-1].timed[-2:]


def test_after_a_recovery_the_network_is_measured_afresh(pruned, fake) -> None:
    result = pruned("latency=0.5", recover_epochs=1, train_batches=batches())

    assert ["compact", "compact"] == fake.made[-1].timed[-2:]
    assert result.achieved[0].met


def test_a_method_of_its_own_taste_is_measured_and_run_again(pruned, fake) -> None:
    pruned("latency=0.5", method="random")

    assert "random" in fake.made[-1].timed


def test_the_ranking_by_magnitude_is_not_measured_twice(pruned, fake) -> None:
    pruned("latency=0.5", method="l1")

    assert "l1" not in fake.made[-1].timed


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4)) for _ in range(2)]


@pytest.mark.parametrize("method", plugins("pruners"))
def test_every_method_takes_a_latency_or_refuses_it(method: str, pruned, network, fake) -> None:
    spec = method_spec(method)
    arguments = {"method": method, "options": spec.demo_options, "train_batches": batches()}
    if latency_refusal(spec) is not None:
        with pytest.raises(TargetError, match=f"'{method}' hands over a network whose channels are switched per image"):
            pruned("latency=0.6", **arguments)
        return

    result = pruned("latency=0.6", **arguments)

    assert share(result, network, fake) == pytest.approx(0.6, rel=0.06)
    assert result.latency.achieved_ms == pytest.approx(fake.made[-1].whole(result.model))
    assert "compact" == fake.made[-1].timed[-1]


def test_a_method_that_trains_is_aimed_before_it_runs_and_is_run_once(pruned, network, fake) -> None:
    options = {"steps": 2, "epochs_per_step": 1}

    result = pruned("latency=0.6", method="random", options=options, train_batches=batches())

    assert "random" not in fake.made[-1].timed
    assert 1 == len(result.logs)
    assert share(result, network, fake) == pytest.approx(0.6, rel=0.06)


def test_several_steps_without_training_go_to_the_same_latency(pruned, network, fake) -> None:
    result = pruned("latency=0.6", method="l1", options={"steps": 3})

    assert share(result, network, fake) == pytest.approx(0.6, rel=0.03)


def test_a_padded_shortcut_that_is_rewritten_is_no_obstacle(fake) -> None:
    model, x = build_model("resnet20").eval(), torch.ones(1, 3, 32, 32)

    result = prune(model, x, target="latency=0.5", method="l1", options={"steps": 2})

    assert share(result, model, fake) == pytest.approx(0.5, rel=0.03)


def test_gates_have_no_one_latency(pruned) -> None:
    with pytest.raises(TargetError, match="'ftwt' hands over a network whose channels are switched per image"):
        pruned("latency=0.5", method="ftwt", train_batches=batches())


def widths(network: nn.Module) -> list[int]:
    return [module.out_channels for module in network.modules() if isinstance(module, nn.Conv2d)]


def test_where_no_correction_converges_the_best_network_is_taken(pruned, monkeypatch, fake) -> None:
    said, cut = [0.55, 0.47, 0.56, 0.57, 0.58], []

    class Restless(fake):
        def networks(self, networks, *, as_shipped=False):
            times = super().networks(networks, as_shipped=as_shipped)
            if as_shipped:
                return replace(times, shares={"compact": 0.5})
            if set(networks) != {"cut by weight magnitude"}:
                return times
            cut.append(widths(networks["cut by weight magnitude"]))
            return replace(times, shares={"cut by weight magnitude": said[len(cut) - 1]})

    monkeypatch.setattr(start, "Stopwatch", Restless)
    result = pruned("latency=0.5")

    assert MOST_TRIES == len(cut) == len({tuple(one) for one in cut})
    assert cut[1] == widths(result.model), "the only one that met the target"


def test_conditions_without_a_latency_are_refused(pruned) -> None:
    with pytest.raises(ConfigError, match="no target is about latency"):
        pruned("macs=0.5", latency=LatencyConditions())


def test_an_unknown_or_unusable_runtime_is_refused(network, images, groups) -> None:
    with pytest.raises(UnknownPluginError, match="nonsense"):
        prune(network, images, target="latency=0.5", groups=groups, latency=LatencyConditions(runtime="nonsense"))
    conditions = LatencyConditions(runtime="onnxruntime-tensorrt")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeUnavailableError, match="onnxruntime-tensorrt"):
            prune(network, images, target="latency=0.5", groups=groups, latency=conditions)


def test_a_continued_run_makes_the_same_plan_without_measuring_anew(pruned, tmp_path: Path, monkeypatch, fake) -> None:
    first = pruned("latency=0.5", method="random", checkpoints=Checkpoints(tmp_path / "saved", {}))
    monkeypatch.setattr(fake, "liked", 32)  # the machine has changed its mind
    second = pruned("latency=0.5", method="random", checkpoints=Checkpoints(tmp_path / "saved", {}))

    assert first.plan == second.plan
    assert ["compact"] == fake.made[-1].timed
    assert first.latency.networks == second.latency.networks
    assert first.latency.probe
    assert (first.latency.multiple, first.latency.probe) == (second.latency.multiple, second.latency.probe)


def tried(measured: float, *, uncorrected: float = 0.5, name: str = "a") -> Try:
    return Try({name: 1}, PREDICTOR, uncorrected, measured)


def test_a_correction_makes_the_prediction_what_was_measured() -> None:
    assert next_correction([tried(0.6)], 0.5) == pytest.approx(1.2)
    assert next_correction([tried(0.4)], 0.5) == pytest.approx(0.8)


def test_no_correction_where_it_is_near_enough_or_was_tried_often_enough() -> None:
    assert next_correction([tried(0.5 * (1 + 0.9 * GOOD))], 0.5) is None
    assert next_correction([tried(0.6)] * MOST_TRIES, 0.5) is None


def test_the_best_try_is_the_nearest_that_meets_the_target() -> None:
    slow, near, fast = tried(0.52), tried(0.49), tried(0.40)

    assert near is best_try([slow, fast, near], 0.5)
    assert slow is best_try([slow, tried(0.6)], 0.3)
