"""Reconstruction on the bench: what is trained when, what is pruned, and what is rewound."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import nni_prune_ext as npe
from nni_prune_ext.allocation import Limits, Target
from nni_prune_ext.errors import ConfigError
from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.methods.base import MethodContext, Phase
from nni_prune_ext.methods.reconstruction import RECONSTRUCTION, Reconstruction, root_mean_square
from nni_prune_ext.methods.reconstruction_options import ReconstructionOptions
from nni_prune_ext.surgery import silence_channels
from nni_prune_ext.testing.method_bench import Bench, BenchNet, CountedRun
from nni_prune_ext.training import MethodRun, TrainingSettings, drive

SHORT: dict[str, object] = {"decoder_epochs": 1, "rounds": 2, "round_epochs": 1, "score_batches": 2}
WEIGHTS = (Target("sparsity", 0.6),)


class Spy(Reconstruction):
    """The method, watched at every step and at every pruning."""

    def __init__(self, options: ReconstructionOptions) -> None:
        super().__init__(options)
        self.stepped: Callable[[MethodContext], object] = lambda context: None
        self.began: Callable[[MethodContext, Phase], object] = lambda context, phase: None
        self.ended: Callable[[MethodContext, Phase], object] = lambda context, phase: None
        self.before_pruning: list[dict[str, Tensor]] = []

    def attach(self, context: MethodContext, phase: Phase) -> None:
        super().attach(context, phase)
        self.began(context, phase)

    def after_step(self, context: MethodContext) -> None:
        super().after_step(context)
        self.stepped(context)

    def after_epoch(self, context: MethodContext, phase: Phase, epoch: int) -> None:
        super().after_epoch(context, phase, epoch)
        self.ended(context, phase)

    def _prune(self, context: MethodContext, rounds: int) -> None:
        self.before_pruning.append(state_of(context.model))
        super()._prune(context, rounds)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def spied(**options: object) -> Spy:
    return Spy(ReconstructionOptions.model_validate({**SHORT, **options}))


def bench_run(**changes: object) -> CountedRun:
    return replace(Bench.of(RECONSTRUCTION, {}).run(), limits=Limits(), **changes)


class TestDecoderPhase:
    def test_trains_the_decoder_and_leaves_the_network_as_it_is_statistics_included(self) -> None:
        method, seen = spied(decoder_epochs=2), []

        def ended(context: MethodContext, phase: Phase) -> None:
            if phase.name == "decoder":
                assert method.decoder is not None
                seen.append((state_of(context.model), state_of(method.decoder)))

        run = bench_run()
        before = state_of(run.model)
        method.ended = ended
        drive(method, run)

        assert same(before, seen[0][0])
        assert same(before, seen[1][0])
        assert not same(seen[0][1], seen[1][1])

    def test_the_decoders_rate_falls_to_a_tenth_after_a_fifth_and_after_three_fifths(self) -> None:
        method, rates = spied(decoder_epochs=10, decoder_learning_rate=1e-3), []

        def ended(context: MethodContext, phase: Phase) -> None:
            if phase.name == "decoder" and method._optimizer is not None:
                rates.append(method._optimizer.param_groups[0]["lr"])

        method.ended = ended
        drive(method, bench_run())

        assert [1e-3] + [1e-4] * 4 + [1e-5] * 5 == pytest.approx(rates)

    def test_without_a_weight_there_is_no_decoder(self) -> None:
        method = spied(reconstruction_weight=0.0)

        outcome = drive(method, bench_run())

        assert method.decoder is None
        assert {} == outcome.facts
        assert [0, 1, 1] == [phase.epochs for phase in method.phases()]


class TestJointLoss:
    def test_is_the_task_loss_and_the_weighted_error_and_so_are_its_gradients(self) -> None:
        method = spied(reconstruction_weight=3.0)
        run = bench_run()
        run.model.double()
        batches = [(x.double(), y) for x, y in run.batches_]
        run.batches_, run.example_inputs = batches, batches[0][0][:1]
        found: list[list[tuple[Tensor, list[Tensor | None]]]] = []

        def began(context: MethodContext, phase: Phase) -> None:
            if phase.name == "round 1":

                def error() -> Tensor:
                    context.task_loss(batches[0])
                    return method._error()

                losses = (
                    lambda: method.compute_loss(context, batches[0]),
                    lambda: context.task_loss(batches[0]),
                    error,
                )
                found.append([with_gradients(context.model, loss()) for loss in losses])

        method.began = began
        drive(method, run)

        (joint, of_joint), (task, of_task), (error, of_error) = found[0]
        assert float(joint) == pytest.approx(float(task) + 3 * float(error), rel=1e-12)
        for whole, one, other in zip(of_joint, of_task, of_error):
            parts = [part for part in (one, None if other is None else 3 * other) if part is not None]
            assert torch.allclose(whole, sum(parts), rtol=1e-10, atol=1e-12)  # type: ignore[arg-type]

    def test_has_an_effect_on_the_network_through_the_feature_maps_alone(self) -> None:
        method, sizes = spied(), []

        def ended(context: MethodContext, phase: Phase) -> None:
            if phase.name == "round 1":
                context.model.zero_grad()
                context.task_loss(context.batches(1)[0])
                method._error().backward()  # type: ignore[no-untyped-call]
                grads = {name: p.grad for name, p in context.model.named_parameters()}
                sizes.append({name: 0.0 if g is None else float(g.abs().sum()) for name, g in grads.items()})
                context.model.zero_grad(set_to_none=True)

        method.ended = ended
        drive(method, bench_run())

        assert sizes[0]["whole.0.weight"] > 0
        assert sizes[0]["stem.0.weight"] > 0
        assert 0.0 == sizes[0]["head.weight"], "the classifier plays no part in the image"

    def test_the_decoder_stands_still_in_the_rounds(self) -> None:
        method, seen = spied(rounds=3), []

        def ended(context: MethodContext, phase: Phase) -> None:
            assert method.decoder is not None
            seen.append(state_of(method.decoder))

        method.ended = ended
        drive(method, bench_run())

        assert 4 == len(seen)
        assert all(same(seen[0], later) for later in seen[1:])


def with_gradients(model: nn.Module, loss: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    parameters = list(model.parameters())
    return loss.detach(), list(torch.autograd.grad(loss, parameters, allow_unused=True))


class TestSingleWeights:
    def test_go_round_by_round_in_the_published_shares(self) -> None:
        method, shares = spied(rounds=8), []
        run = bench_run(targets=(Target("sparsity", 1 - 0.8**8),))

        def began(context: MethodContext, phase: Phase) -> None:
            if phase.name.startswith("round"):
                shares.append(sum(int((~mask).sum()) for mask in method.masks.values()))

        method.began = began
        outcome = drive(method, run)

        assert outcome.weight_masks is not None
        total = sum(mask.numel() for mask in outcome.weight_masks.values())
        shares.append(sum(int((~mask).sum()) for mask in outcome.weight_masks.values()))
        expected = [(1 - 0.8**k) * total for k in range(9)]
        assert all(due - 1e-6 <= gone < due + 1 for gone, due in zip(shares, expected))

    def test_are_those_of_all_convolutions_but_the_first(self) -> None:
        whole = drive(spied(), bench_run(targets=WEIGHTS)).weight_masks
        with_stem = drive(spied(keep_stem=False), bench_run(targets=WEIGHTS)).weight_masks

        names = {f"{layer}.0.weight" for layer in ("inside", "back", "depthwise", "whole")}
        assert whole is not None
        assert with_stem is not None
        assert names == set(whole)
        assert names | {"stem.0.weight"} == set(with_stem)

    def test_masks_follow_the_trained_weights_and_all_others_are_rewound(self) -> None:
        method, seen = spied(rounds=3), []

        def began(context: MethodContext, phase: Phase) -> None:
            if phase.name in ("round 2", "round 3"):
                seen.append((state_of(context.model), dict(method.masks)))

        run = bench_run(targets=WEIGHTS, settings=TrainingSettings(learning_rate=0.3))
        first = state_of(run.model)
        method.began = began
        outcome = drive(method, run)

        assert outcome.weight_masks is not None
        seen.append((state_of(run.model), dict(outcome.weight_masks)))
        for (state, masks), trained in zip(seen, method.before_pruning):
            for name, tensor in state.items():
                expected = first[name] * masks[name] if name in masks else first[name]
                assert torch.equal(expected, tensor), name
            kept = torch.cat([trained[name][mask].abs() for name, mask in masks.items()])
            gone = torch.cat([trained[name][~mask].abs() for name, mask in masks.items()])
            assert float(kept.min()) >= float(gone.max()), "ranked together, by the trained weights"
        by_first = torch.cat([first[name].abs().flatten() for name in seen[0][1]])
        by_trained = torch.cat([method.before_pruning[0][name].abs().flatten() for name in seen[0][1]])
        assert not torch.equal(by_first.argsort(), by_trained.argsort()), "training has moved the ranking"

    def test_what_is_gone_stays_gone_and_zero(self) -> None:
        method, masks, worst = spied(rounds=3, round_epochs=4), [], [0.0]

        def stepped(context: MethodContext) -> None:
            for name, parameter in context.model.named_parameters():
                if name in method.masks:
                    worst.append(float(parameter.detach()[~method.masks[name]].abs().sum()))

        def ended(context: MethodContext, phase: Phase) -> None:
            masks.append({name: mask.clone() for name, mask in method.masks.items()})

        method.stepped, method.ended = stepped, ended
        outcome = drive(method, bench_run(targets=WEIGHTS, settings=TrainingSettings(learning_rate=0.1)))

        assert outcome.weight_masks is not None
        assert len(worst) > 50
        assert 0.0 == max(worst), "in spite of momentum and weight decay"
        rounds = [own for own in masks if own] + [dict(outcome.weight_masks)]
        for before, after in pairwise(rounds):
            assert not any(bool((after[name] & ~before[name]).any()) for name in before)

    def test_without_rewinding_training_goes_on(self) -> None:
        method = spied(rewind=False)
        run = bench_run(targets=WEIGHTS)
        drive(method, run)

        left = state_of(run.model)
        trained = method.before_pruning[-1]
        assert torch.equal(trained["head.weight"], left["head.weight"])
        assert torch.equal(trained["stem.1.running_mean"], left["stem.1.running_mean"])


class TestChannels:
    @pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
    def test_are_removed_in_rounds_and_the_rest_is_rewound(self, criterion: str) -> None:
        method, states = spied(rounds=3, criterion=criterion), []

        def began(context: MethodContext, phase: Phase) -> None:
            if phase.name.startswith("round"):
                states.append((state_of(context.model), copy.deepcopy(run.kept)))

        run = bench_run(targets=(Target("params", 0.4),))
        first = state_of(run.model)
        method.began = began
        outcome = drive(method, run)

        states.append((state_of(run.model), run.kept))
        sizes = [sum(t.numel() for t in state.values()) for state, _ in states]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == 4
        assert 0 == outcome.plan.num_removed, "the last cut is made"
        assert outcome.weight_masks is None
        for state, kept in states:
            for name, tensor in state.items():
                expected = first[name]
                for dim, index in kept.get(name, {}).items():
                    expected = expected.index_select(dim, index)
                assert torch.equal(expected, tensor), name

    def test_each_round_goes_a_fifth_of_the_rest_where_the_target_is_that_of_the_rounds(self) -> None:
        own = ReconstructionOptions(rounds=8)

        assert [(1 - 0.8**k) / (1 - 0.8**8) for k in range(9)] == pytest.approx([own.share_gone(k) for k in range(9)])
        assert 1.0 == own.share_gone(8)

    def test_the_decoder_reads_the_compact_network_as_it_read_the_silenced_one(self) -> None:
        seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        torch.manual_seed(0)
        model = npe.build_model("resnet20", num_classes=4, in_channels=3)
        images = torch.randn(4, 3, 16, 16)

        class Compared(Spy):
            def _prune(self, context: MethodContext, rounds: int) -> None:
                self.first = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
                run._kept = {}
                super()._prune(context, rounds)

            def on_removed(self, context: MethodContext, removal: object) -> None:
                super().on_removed(context, removal)  # type: ignore[arg-type]
                assert self.reading is not None
                compact = features(self, context.model, images)
                silent = silence_channels(before[-1], run.applied, images[:1], groups=groups)  # type: ignore[arg-type]
                seen.append((compact, features(self, silent, images)))

        method = Compared(ReconstructionOptions.model_validate({**SHORT, "rounds": 1}))
        groups = trace_channel_groups(model, images[:1])
        before: list[nn.Module] = []
        run = MethodRun(
            model=model.double(), batches_=[(images.double(), torch.tensor([0, 1, 2, 3]))], seed=0,
            example_inputs=images[:1].double(), groups=groups, targets=(Target("macs", 0.5),),
        )  # fmt: skip
        images = images.double()
        method.ended = lambda context, phase: before.append(copy.deepcopy(context.model))
        drive(method, run)

        compact, silent = seen[0]
        assert {"layer1", "layer2", "layer3", "image"} == set(compact)
        for name, tensor in compact.items():
            assert float((tensor - silent[name]).abs().max() / silent[name].abs().max()) < 1e-12, name
        assert bool((compact["layer3"].abs().amax((0, 2, 3)) == 0).any()), "some channels are gone"


def features(method: Reconstruction, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Returns what the decoder reads of a network, silenced channels at zero, and the image that it rebuilds."""
    assert method.reading is not None
    assert method.decoder is not None
    training = model.training
    taking_off = method.reading.attach(model)
    with torch.no_grad():
        model.eval()(images)
        _, found = method.reading.take()
        for own in method.reading.maps[1:]:
            alive = torch.zeros(own.channels)
            alive[method.reading.left(own)] = 1
            found[own.module] = found[own.module] * alive[:, None, None]
        found["image"] = method.decoder(found)
    for take_off in taking_off:
        take_off()
    model.train(training)
    return found


def test_a_channel_is_worth_the_root_mean_square_of_all_weights_that_hold_it() -> None:
    torch.manual_seed(0)
    model = BenchNet()
    groups = trace_channel_groups(model, torch.randn(1, 3, 8, 8))
    inside = next(group for group in groups if group.name == "inside.0")

    found = root_mean_square(inside, dict(model.named_parameters()))

    writer, reader = model.inside[0].weight.detach(), model.back[0].weight.detach()
    together = torch.cat([writer.flatten(1), reader.transpose(0, 1).flatten(1)], 1)
    assert torch.allclose(together.square().mean(1).sqrt(), found)


def test_nothing_to_prune_is_refused() -> None:
    closed = replace(bench_run().groups, groups=())

    with pytest.raises(ConfigError, match="no channel of BenchNet that may be removed"):
        drive(spied(), bench_run(groups=closed))
    with pytest.raises(ConfigError, match="no weight to mask in BenchNet"):
        drive(spied(), replace(bench_run(targets=WEIGHTS), limits=Limits(exclude=("*",))))
