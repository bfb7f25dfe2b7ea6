"""What protects channels in a run of PSAP (re-derived from the abstract), that every option matters, and resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from psap_bench import Spy, driven, nothing
from torch import Tensor, nn

from nni_prune_ext.allocation import Target
from nni_prune_ext.checkpoints import Checkpoints
from nni_prune_ext.methods import psap
from nni_prune_ext.methods.base import MethodContext, Phase
from nni_prune_ext.methods.psap import PSAP
from nni_prune_ext.methods.psap_options import PsapOptions
from nni_prune_ext.scoring.gradient_statistics import gate_gradients
from nni_prune_ext.testing.method_bench import Bench, Interrupted, StoppingCheckpoints
from nni_prune_ext.training import TrainingSettings, cross_entropy, drive

NOISY = TrainingSettings(learning_rate=0.1)


class TestResume:
    def test_after_any_epoch_goes_on_to_the_same_end(self, tmp_path: Path) -> None:
        """With options that make shields, use and the pace of the schedule matter."""
        options = {"epochs": 9, "probe_deviations": 0.5, "use_deviations": 1.0, "shield_steps": 3, "step_bound": 0.05}
        whole_spy, whole = driven(options, settings=NOISY)

        for stop in range(2, 9):
            folder = tmp_path / str(stop)
            with pytest.raises(Interrupted):
                driven(options, settings=NOISY, checkpoints=StoppingCheckpoints(folder, stop_at=stop))
            spy, run = driven(options, settings=NOISY, checkpoints=Checkpoints(folder, {}))

            assert whole.applied == run.applied
            assert whole.notes == run.notes
            assert whole_spy._facts == spy._facts

    def test_state_is_restored_in_full(self) -> None:
        saved = []

        def look(spy: Spy, context: MethodContext) -> None:
            if spy.closed:
                again = Spy(spy.options, nothing, nothing)
                again.load_state_dict(*spy.state_dict())
                for part in ("closed", "shields", "use"):
                    own, other = getattr(spy, part), getattr(again, part)
                    assert own.keys() == other.keys()
                    assert all(torch.equal(own[name], other[name]) for name in own)
                for part, own in spy.ever.items():
                    assert all(torch.equal(own[name], again.ever[part][name]) for name in own)
                assert (spy._pace, spy.ratios, spy._facts) == (again._pace, again.ratios, again._facts)
                saved.append(float(torch.cat([use.flatten() for use in spy.use.values()]).sum()))

        driven({}, seen=look)

        assert saved
        assert min(saved) > 0


def test_what_was_protected_or_came_back_and_is_left_is_counted() -> None:
    seen: dict[str, dict[str, Tensor]] = {"protected": {}, "revived": {}}
    before: list[dict[str, Tensor]] = []
    closed: list[dict[str, Tensor]] = []

    def look(spy: Spy, context: MethodContext) -> None:
        closed.append({name: own.clone() for name, own in spy.closed.items()})
        for name, own in spy.closed.items():
            back = before[-1][name] & ~own if before else torch.zeros_like(own)
            guarded = spy.shields[name] == spy.options.shield_steps
            for key, now in (("revived", back), ("protected", guarded)):
                seen[key][name] = seen[key].get(name, torch.zeros_like(own)) | now
        before.append({name: own.clone() for name, own in spy.closed.items()})

    options = {"epochs": 10, "mode": "zeroise", "probe_deviations": 0.0, "schedule": "linear", "protected_share": 0.3}
    spy, _ = driven(options, settings=NOISY, removed=look, seen=lambda spy, context: spy.closed and look(spy, context))

    for key, found in seen.items():
        left = sum(int((own & ~closed[7][name]).sum()) for name, own in found.items())
        assert left == spy._facts[f"{key}_and_left"], key
        assert 0 < left <= spy._facts[key]


class TestProtection:
    @pytest.mark.parametrize("mode", ["gate", "straight_through", "zeroise"])
    def test_a_protected_channel_is_no_candidate_for_as_many_steps_as_its_shield_lasts(self, mode: str) -> None:
        protected: list[dict[str, Tensor]] = []

        def look(spy: Spy, context: MethodContext) -> None:
            if spy.closed:
                protected.append({name: shield.clone() for name, shield in spy.shields.items()})
                assert not any(bool((spy.closed[name] & (shield > 0)).any()) for name, shield in spy.shields.items())

        driven(
            {"epochs": 10, "shield_steps": 2, "probe_deviations": 0.0, "schedule": "linear", "mode": mode}, seen=look,
            targets=(Target("ratio", 0.4),),
        )  # fmt: skip

        assert {0, 1, 2} == {int(v) for own in protected for shield in own.values() for v in shield}

    def test_in_both_modes_the_probe_asks_the_network_without_its_candidates(self) -> None:
        frozen = TrainingSettings(learning_rate=1e-9, weight_decay=0.0, momentum=0.0)
        options = {"epochs": 1, "soft_share": 1.0, "probe_deviations": 0.0, "use_deviations": 99.0, "probe_batches": 3}

        plans = [driven({**options, "mode": mode}, settings=frozen)[1].applied for mode in ("gate", "zeroise")]

        assert plans[0] == plans[1]

    def test_as_many_are_protected_at_random_as_by_gradients(self) -> None:
        notes = [
            driven({"epochs": 1, "protect": protect, "probe_deviations": 0.0})[1].notes
            for protect in ("gate", "random")
        ]

        assert notes[0][0]["protected"] == notes[1][0]["protected"] > 0

    def test_where_too_much_is_protected_the_target_is_met_all_the_same(self) -> None:
        options = {"protected_share": 1.0, "probe_deviations": 0.0, "use_deviations": 0.0, "refills": 2}

        _, run = driven(options, targets=(Target("ratio", 0.55),))

        assert run.notes[-1]["share_of_channels"] >= 0.55

    def test_what_is_held_is_given_up_in_order_use_first_then_shields(self) -> None:
        given_up: list[int] = []

        class Counted(Spy):
            def _chosen(self, context, scores, ratios, fraction, held):  # type: ignore[no-untyped-def]
                everything = {name: torch.ones_like(gone) for name, gone in self.closed.items()}
                nothing_held = {name: torch.zeros_like(gone) for name, gone in self.closed.items()}
                first = dict(nothing_held)
                first["inside.0"] = first["inside.0"].clone()
                first["inside.0"][0] = True
                super()._chosen(context, scores, ratios, fraction, [first, everything])
                given_up.append(int(self.closed["inside.0"][0]))
                return super()._chosen(context, scores, ratios, fraction, held)

        run = Bench.of(PSAP, {}).run()
        drive(Counted(PsapOptions(epochs=4, criterion="random", protect="none"), nothing, nothing), run)

        assert given_up
        assert 0 == sum(given_up), "the first one is kept, the last one given up"

    @pytest.mark.parametrize(
        ("option", "low", "high"),
        [
            ("step_bound", 0.001, 1.0),
            ("sparsity_level", 0.001, 0.9),
            ("sparsity_threshold", "rms", "largest"),
            ("probe_batches", 1, 3),
            ("use_deviations", 0.0, 9.0),
        ],
    )
    def test_every_option_matters(self, option: str, low: object, high: object) -> None:
        options = {"epochs": 8, "probe_deviations": 0.2, "schedule": "linear", "step_bound": 0.05}

        found = [driven({**options, option: value}, settings=NOISY)[1].notes for value in (low, high)]

        assert found[0] != found[1]

    def test_refills_are_probed_as_often_as_asked_for(self) -> None:
        probes = []
        for refills in (0, 1, 2):
            losses: list[int] = []

            def counted(model: nn.Module, batch: tuple[Tensor, Tensor], losses: list[int] = losses) -> Tensor:
                losses.append(1)
                return cross_entropy(model, batch)

            options = {"epochs": 1, "soft_share": 1.0, "refills": refills, "probe_deviations": 0.0}
            driven({**options, "protected_share": 0.5, "probe_batches": 1}, loss=counted)
            probes.append(len(losses))

        assert probes[0] < probes[1] <= probes[2]

    def test_draws_at_random_are_others_in_every_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seeds: list[int] = []
        monkeypatch.setattr(psap, "drawn", lambda candidates, count, generator: noted(candidates, generator))

        def noted(candidates: Tensor, generator: torch.Generator) -> Tensor:
            seeds.append(generator.initial_seed())
            return torch.zeros_like(candidates)

        spy, run = driven({"epochs": 5, "protect": "random"})

        assert spy.options.steps == len(set(seeds))
        assert len(run.groups) * spy.options.steps == len(seeds)

    def test_use_is_a_running_mean(self) -> None:
        uses: list[Tensor] = []

        class Used(Spy):
            def after_backward(self, context: MethodContext) -> None:
                before = self.use["inside.0"].clone()
                super().after_backward(context)
                now = gate_gradients(context.groups["inside.0"], dict(context.model.named_parameters())).abs()
                uses.append(self.use["inside.0"] - (0.9 * before + 0.1 * now))

        drive(Used(PsapOptions(epochs=2, probe_batches=1), nothing, nothing), Bench.of(PSAP, {}).run())

        assert 0.0 == pytest.approx(float(torch.stack(uses[:3]).abs().max()), abs=1e-8)

    def test_any_criterion_may_rank_and_any_policy_divide(self) -> None:
        plans = {
            (criterion, policy): driven({"criterion": criterion, "ratio_policy": policy})[1].applied
            for criterion in ("l1", "taylor", "random")
            for policy in (None, "uniform_ratio")
        }

        assert len({str(plan) for plan in plans.values()}) == 6

    def test_after_the_removal_the_optimizer_keeps_the_moments_of_what_is_left(self) -> None:
        before: list[Tensor] = []

        class Moments(Spy):
            def after_epoch(self, context: MethodContext, phase: Phase, epoch: int) -> None:
                weight = context.model.get_submodule("inside.0").weight
                before.append(run.optimizers[0].state[weight]["momentum_buffer"].clone())
                super().after_epoch(context, phase, epoch)
                if not self.closed and len(after) == 0:
                    cut = context.model.get_submodule("inside.0").weight
                    after.append(run.optimizers[0].state[cut]["momentum_buffer"].clone())

        after: list[Tensor] = []
        run = Bench.of(PSAP, {}).run()
        drive(Moments(PsapOptions(epochs=2, soft_share=0.5, probe_batches=1), nothing, nothing), run)

        kept = run.kept["inside.0.weight"]
        expected = before[0]
        for dim, index in kept.items():
            expected = expected.index_select(dim, index)
        assert torch.equal(expected, after[0])
