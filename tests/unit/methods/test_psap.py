"""PSAP (re-derived from the abstract) on the bench: one training that prunes softly, removes, and goes on."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace

import pytest
import torch
from psap_bench import Spy, driven
from torch import Tensor, nn

from nni_prune_ext.allocation import Limits, Target
from nni_prune_ext.errors import ConfigError, NniPruneExtError, PluginError, UnknownPluginError
from nni_prune_ext.methods.psap import PSAP, Psap
from nni_prune_ext.methods.psap_options import PsapOptions
from nni_prune_ext.methods.psap_protection import trial
from nni_prune_ext.pipeline import method_spec, prune
from nni_prune_ext.registry import load_plugin
from nni_prune_ext.schedules import SchedulerSpec
from nni_prune_ext.testing.method_bench import Bench, BenchNet
from nni_prune_ext.training import TrainingSettings, cross_entropy, drive


def closed_share(spy: Spy) -> float:
    gone = torch.cat(list(spy.closed.values()))
    return float(gone.float().mean())


class TestSteps:
    @pytest.mark.parametrize("mode", ["gate", "straight_through", "zeroise"])
    @pytest.mark.parametrize("target", ["ratio=0.4", "macs=0.6", "params=0.7"])
    def test_the_target_is_met_in_channels_macs_or_parameters(self, target: str, mode: str) -> None:
        bench = Bench.of(PSAP, {"epochs": 4, "mode": mode, "probe_batches": 1})

        result = prune(
            bench.model, bench.example, method=PSAP, target=target, options=bench.options, train_batches=bench.batches
        )

        assert result.achieved[0].met
        assert result.certificate is not None
        assert result.certificate.exact
        assert ["prune and train"] * 4 == [log.phase for log in result.logs]

    def test_more_is_closed_step_by_step_and_the_last_step_is_the_removal(self) -> None:
        shares: list[float] = []
        targets = (Target("ratio", 0.5),)

        _, run = driven(
            {"epochs": 10, "schedule": "linear", "protect": "none"}, targets=targets,
            seen=lambda spy, _: shares.append(closed_share(spy) if spy.closed else -1.0),
            removed=lambda spy, _: shares.append(closed_share(spy)),
        )  # fmt: skip

        # eight steps of a sixteenth each; the eighth is followed by the removal, nothing is closed any more
        assert [k / 16 for k in range(1, 8)] == pytest.approx(shares[:7], abs=0.03)
        assert 0.5 == pytest.approx(shares[7], abs=0.03)
        assert [-1.0] * 3 == shares[8:]
        assert 1 == run.cuts

    def test_an_interval_of_several_epochs_makes_fewer_steps_with_one_at_the_end(self) -> None:
        spy, run = driven({"epochs": 5, "soft_share": 1.0, "interval": 2})

        assert 3 == spy.options.steps == len(run.notes)
        assert [0.4, 0.8, 1.0] == pytest.approx([note["progress"] for note in run.notes])
        assert 1.0 == run.notes[-1]["share_of_target"]

    def test_soft_pruning_brings_channels_back(self) -> None:
        spy, run = driven({"epochs": 10, "mode": "zeroise", "protect": "none", "schedule": "one_shot"})

        assert sum(note["revived"] for note in run.notes) == spy._facts["revived"] > 0

    def test_everything_is_noted_per_group(self) -> None:
        _, run = driven({})

        names = {group.name for group in Bench.of(PSAP, {}).groups}
        assert {"progress", "share_of_target", "share_of_channels", "protected", "revived"} | {
            f"{family}/{name}" for family in ("ratio", "weight_sparsity") for name in names
        } == set(run.notes[0])

    def test_sparser_groups_are_pruned_more_and_equal_ones_alike(self) -> None:
        def sparse(model: nn.Module) -> nn.Module:
            with torch.no_grad():
                weight = model.get_submodule("inside.0").weight
                weight *= (torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.7).float()
            return model

        targets = (Target("ratio", 0.3),)
        run = Bench.of(PSAP, {}).run()
        options = {"epochs": 1, "soft_share": 1.0, "protect": "none", "schedule": "one_shot"}
        frozen = TrainingSettings(learning_rate=1e-9, weight_decay=0.0, momentum=0.0)

        _, own = driven(options, targets=targets, model=sparse(run.model), settings=frozen)
        uniform = {**options, "ratio_policy": "uniform_ratio"}
        _, even = driven(uniform, targets=targets, model=sparse(Bench.of(PSAP, {}).run().model), settings=frozen)

        assert own.notes[0]["ratio/inside.0"] > 2 * own.notes[0]["ratio/stem.0"]
        assert even.notes[0]["ratio/inside.0"] == pytest.approx(even.notes[0]["ratio/stem.0"], abs=0.1)

    def test_no_group_loses_more_than_the_largest_ratio_where_the_target_allows_that(self) -> None:
        def sparse(model: nn.Module) -> nn.Module:
            with torch.no_grad():
                weight = model.get_submodule("inside.0").weight
                weight *= (torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.9).float()
            return model

        frozen = TrainingSettings(learning_rate=1e-9, weight_decay=0.0, momentum=0.0)
        options = {"epochs": 1, "soft_share": 1.0, "protect": "none", "schedule": "one_shot", "step_bound": 1.0}
        ratios = {}
        for largest in (0.5, 1.0):
            run = Bench.of(PSAP, {}).run()
            _, run = driven(
                {**options, "largest_ratio": largest}, targets=(Target("macs", 0.5),), model=sparse(run.model),
                settings=frozen, limits=Limits(max_ratio=0.9),
            )  # fmt: skip
            ratios[largest] = run.notes[0]["ratio/inside.0"]

        assert ratios[1.0] > 0.7
        assert 0.4 < ratios[0.5] <= 0.5 + 1 / 16, "to whole channels"

    def test_a_scaled_layer_in_front_of_a_norm_changes_nothing(self) -> None:
        settings = TrainingSettings(learning_rate=0.0 + 1e-12, weight_decay=0.0, momentum=0.0)
        plain, scaled = Bench.of(PSAP, {}).run().model, Bench.of(PSAP, {}).run().model
        with torch.no_grad():
            scaled.get_submodule("inside.0").weight *= 1024

        plans = [
            driven({"epochs": 1, "soft_share": 1.0, "protect": "none"}, model=model, settings=settings)[1].applied
            for model in (plain, scaled)
        ]

        assert plans[0] == plans[1]


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"criterion": "lottery_jackpots"}, ConfigError, "'lottery_jackpots' gives no scores"),
            ({"criterion": "l3"}, UnknownPluginError, "no pruner called 'l3'"),
            ({"schedule": "uniform_ratio"}, PluginError, "is a ratio policy, expected a schedule"),
            ({"ratio_policy": "agp"}, PluginError, "is a schedule, expected a ratio policy"),
            ({"ratio_policy": "nope"}, UnknownPluginError, "no scheduler called 'nope'"),
            ({"epochs": 0}, ConfigError, "'epochs' of method 'psap' is 0"),
            ({"mode": "hard"}, ConfigError, "'mode' of method 'psap'"),
        ],
    )
    def test_is_refused_before_anything_is_trained(
        self, options: dict[str, object], error: type[NniPruneExtError], message: str
    ) -> None:
        bench, steps = Bench.of(PSAP, {}), []

        def counted(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            steps.append(1)
            return cross_entropy(model, batch)

        with pytest.raises(error, match=message):
            prune(bench.model, bench.example, method=PSAP, target="macs=0.6", options=options,
                  train_batches=bench.batches, loss=counted)  # fmt: skip
        assert [] == steps

    def test_a_loss_that_depends_on_no_reader_of_a_group_is_named_before_training(self) -> None:
        def of_a_part(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return model.get_submodule("inside")(model.get_submodule("stem")(batch[0])).square().mean()

        run = Bench.of(PSAP, {}).run(of_a_part)
        weights = copy.deepcopy(run.model.state_dict())

        with pytest.raises(ConfigError, match="does not depend on what reads the channels of 'inside.0'"):
            drive(Psap(PsapOptions(epochs=2)), run)
        assert all(torch.equal(weights[name], now) for name, now in run.model.state_dict().items())

    def test_a_model_without_a_prunable_group_is_refused(self) -> None:
        run = Bench.of(PSAP, {}).run()
        run = replace(run, groups=replace(run.groups, groups=()))

        with pytest.raises(ConfigError, match="no channel of BenchNet that may be removed"):
            drive(Psap(PsapOptions(epochs=2)), run)


def test_what_is_read_of_a_method_says_that_it_is_re_derived() -> None:
    scheduler = load_plugin("schedulers", "psap_ratio")

    assert isinstance(scheduler, SchedulerSpec)
    for text in (PSAP.summary, scheduler.summary):
        assert "PSAP (re-derived from the abstract)" in text
    assert (sys.modules[Psap.__module__].__doc__ or "").startswith("PSAP (re-derived from the abstract)")
    assert PSAP is method_spec("psap")


def test_a_trial_takes_gradients_off_also_when_it_raises() -> None:
    model = BenchNet()

    def fails() -> None:
        with trial(model):
            model(torch.randn(2, 3, 8, 8)).sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert all(parameter.grad is None for parameter in model.parameters())
