"""The method contract carries five species of methods, none of which the loop knows."""

from __future__ import annotations

import pytest
import torch
from species import SPECIES
from species.gated import GATED
from species.mask_search import MASK_SEARCH, MaskSearch
from species.mask_search import Options as SearchOptions
from species.reconstruction import Options as ReconstructionOptions
from species.reconstruction import Reconstruction

from nni_prune_ext.methods.base import MethodContext, MethodSpec, Phase
from nni_prune_ext.testing import check_method
from nni_prune_ext.testing.method_bench import Bench, CountedRun
from nni_prune_ext.testing.toy_controller import Controller, ControllerOptions
from nni_prune_ext.training import drive

DATA_DRIVEN = [name for name, spec in SPECIES.items() if spec.needs_data]


def run_of(spec: MethodSpec) -> CountedRun:
    return Bench.of(spec, {}).run()


@pytest.mark.parametrize("spec", SPECIES.values(), ids=SPECIES)
def test_every_species_keeps_the_promises_of_a_method(spec: MethodSpec) -> None:
    check_method(spec)


def test_a_decoder_learns_on_frozen_features_before_everything_learns_jointly() -> None:
    run = run_of(SPECIES["toy_reconstruction"])
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    seen: dict[str, bool] = {}

    class Spy(Reconstruction):
        def after_epoch(self, context: MethodContext, phase: Phase, epoch: int) -> None:
            state = context.model.state_dict()
            seen[phase.name] = all(torch.equal(before[name], state[name]) for name in before)

    drive(Spy(ReconstructionOptions(decoder_epochs=3)), run)

    assert {"decoder": True, "joint": False} == seen
    losses = [log.loss for log in run.logs if log.phase == "decoder"]
    assert losses[-1] < losses[0]


def test_a_controller_cuts_on_the_way_and_its_optimizer_goes_on_with_sliced_momentum() -> None:
    run = run_of(SPECIES["toy_controller"])
    seen: list[tuple[torch.Size, torch.Size]] = []

    class Spy(Controller):
        def after_epoch(self, context: MethodContext, phase: Phase, epoch: int) -> None:
            super().after_epoch(context, phase, epoch)
            (optimizer,) = run.optimizers
            seen.extend((p.shape, optimizer.state[p]["momentum_buffer"].shape) for p in context.model.parameters())

    outcome = drive(Spy(ControllerOptions(epochs=4, cut_after=2)), run)

    assert 1 == run.cuts
    assert all(shape == momentum for shape, momentum in seen)
    assert outcome.plan.num_removed > 0
    assert ["soft", "soft", "hard", "hard"] == [log.phase for log in run.logs]


def test_a_controller_can_revive_channels_that_it_zeroed() -> None:
    run = run_of(SPECIES["toy_controller"])
    run.settings = type(run.settings)(learning_rate=0.5)

    outcome = drive(Controller(ControllerOptions(epochs=6, cut_after=6, schedule="linear")), run)

    assert outcome.facts["revived"] > 0


def test_a_mask_search_moves_scores_and_no_weight_and_statistics_follow_the_mask() -> None:
    run = run_of(MASK_SEARCH)
    weights = {name: tensor.detach().clone() for name, tensor in run.model.named_parameters()}
    statistics = {name: tensor.clone() for name, tensor in run.model.named_buffers()}
    moved: dict[str, bool] = {}

    class Spy(MaskSearch):
        def start(self, context: MethodContext, phase: Phase) -> None:
            super().start(context, phase)
            if phase.name == "search":
                self.first = {name: score.detach().clone() for name, score in self.scores.items()}

        def after_epoch(self, context: MethodContext, phase: Phase, epoch: int) -> None:
            buffers = dict(context.model.named_buffers())
            moved[phase.name] = any(not torch.equal(statistics[name], buffers[name]) for name in statistics)

    method = Spy(SearchOptions())
    drive(method, run)

    assert all(torch.equal(weights[name], tensor) for name, tensor in run.model.named_parameters())
    assert any(not torch.equal(method.first[name], score) for name, score in method.scores.items())
    assert {"search": False, "freeze": True} == moved


def test_a_gated_network_is_handed_over_beside_the_plan_and_opens_per_input() -> None:
    bench = Bench.of(GATED, {})

    result = bench.prune()

    gated = result.outcome.gated_model
    assert gated is not None
    images = bench.batches[0][0]
    plain, switched = result.outcome.gated_model.model.eval()(images), gated.eval()(images)
    assert not torch.allclose(plain, switched)
    assert result.plan.num_removed > 0


@pytest.mark.parametrize("name", DATA_DRIVEN)
def test_a_species_runs_on_a_model_whose_groups_are_partly_protected(name: str) -> None:
    bench = Bench.of(SPECIES[name], {})
    run = bench.run()
    run.groups = run.groups.protecting({"stem.0": "asked for"})
    run.targets = (run.targets[0].__class__("ratio", 0.3),)

    outcome = drive(bench.spec.build(bench.configured()), run)

    plan = outcome.plan if run.applied is None else run.applied.then(outcome.plan)
    assert "stem.0" not in plan.removed
    assert plan.num_removed > 0
