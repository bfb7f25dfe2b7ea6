"""The mask search, in single weights and in channels alike: what stays, what moves, and what every phase does."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from jackpot_bench import CHANNELS, LIVELY, WEIGHTS, Spy, counts, equal, nothing, parameters, searched, statistics
from torch import Tensor, nn

from nni_prune_ext.allocation import Target
from nni_prune_ext.mask_updates import Swaps
from nni_prune_ext.methods.base import Batch, MethodContext, PruningMethod
from nni_prune_ext.methods.lottery_jackpots import LOTTERY_JACKPOTS, LotteryJackpots
from nni_prune_ext.methods.lottery_jackpots_options import JackpotOptions
from nni_prune_ext.testing.method_bench import Bench, traces_on
from nni_prune_ext.training import MethodRun, drive, recalibrate_batchnorm

UNITS = pytest.mark.parametrize("targets", [CHANNELS, WEIGHTS], ids=["channels", "weights"])


# -- the search --------------------------------------------------------------------------------------------------


@UNITS
def test_weights_and_affine_parameters_stay_bit_for_bit_and_statistics_follow_the_mask(
    targets: tuple[Target, ...],
) -> None:
    model = Bench.of(LOTTERY_JACKPOTS, {}).model
    before, buffers, steps = parameters(model), statistics(model), []

    def seen(spy: Spy, context: MethodContext, phase: str) -> None:
        steps.append(phase)
        assert equal(before, parameters(context.model))
        assert not any(parameter.requires_grad for parameter in context.model.parameters())
        assert all(module.training for module in context.model.modules())

    _, run, _ = searched(targets, {**LIVELY, "freeze_epochs": 1}, seen)

    assert ["search"] * 9 + ["freeze"] * 3 == steps
    assert equal(before, parameters(run.model))
    assert not any(torch.equal(buffers[name], tensor) for name, tensor in statistics(run.model).items())
    assert [] == traces_on(run.model)


@UNITS
@pytest.mark.parametrize("restriction", ["fourth_power", "cosine", "one"])
def test_every_mask_keeps_its_count_at_every_step_and_the_masks_move(
    targets: tuple[Target, ...], restriction: str
) -> None:
    found: list[dict[str, int]] = []

    spy, _, outcome = searched(
        targets, {**LIVELY, "restriction": restriction}, lambda spy, *_: found.append(counts(spy.masks))
    )

    assert [found[0]] * 12 == found
    assert counts(spy._first_masks) == found[0]
    assert outcome.facts["swaps_made"] > 3
    assert outcome.facts["share_of_first_mask_kept"] < 1


@UNITS
@pytest.mark.parametrize("gate", ["consumers", "norms"])
def test_pruned_entries_get_gradients_and_channels_none_with_gates_behind_norms(
    targets: tuple[Target, ...], gate: str
) -> None:
    shares: list[float] = []

    def seen(spy: Spy, context: MethodContext, phase: str) -> None:
        for name, gradient in spy.gradients.items() if phase == "search" else ():
            pruned = ~spy.before[name]
            if bool(pruned.any()):
                shares.append(float((gradient[pruned] != 0).float().mean()))

    searched(targets, {**LIVELY, "restriction": "one", "gate": gate, "exploration": 0.0}, seen)

    assert len(shares) >= 9
    if targets == WEIGHTS:
        assert min(shares) > 0.7
    else:
        assert {1.0 if gate == "consumers" else 0.0} == set(shares)


@UNITS
def test_scores_begin_at_the_magnitude_partition_and_take_one_plain_step(targets: tuple[Target, ...]) -> None:
    scores: list[dict[str, Tensor]] = []

    def seen(spy: Spy, context: MethodContext, phase: str) -> None:
        if phase == "search" and not scores:
            first = {name: torch.where(mask, 1.0, 0.99) for name, mask in spy._first_masks.items()}
            decayed = {name: spy.gradients[name] + 5e-4 * first[name] for name in first}
            scores.append({name: first[name] - rate * decayed[name] for name in first})
            scores.append({name: score.detach().clone() for name, score in spy.scores.items()})

    rate = 0.001 if targets == CHANNELS else 0.1
    searched(targets, {"search_epochs": 1, "tune_epochs": 0}, seen)

    for name, expected in scores[0].items():
        torch.testing.assert_close(expected, scores[1][name], rtol=0, atol=1e-7)


@UNITS
def test_rates_fall_by_a_cosine_per_epoch_and_are_those_of_the_paper(targets: tuple[Target, ...]) -> None:
    found: dict[str, list[float]] = {"search": [], "tune": []}

    def seen(spy: Spy, context: MethodContext, phase: str) -> None:
        if phase in found:
            assert isinstance(context, MethodRun)
            (optimizer,) = context.optimizers
            (group,) = optimizer.param_groups
            assert (0.9, 5e-4 if phase == "search" else 0) == (group["momentum"], group["weight_decay"])
            found[phase].append(group["lr"])

    searched(targets, {"search_epochs": 4, "tune_epochs": 2}, seen)

    peak = 0.001 if targets == CHANNELS else 0.1
    half_waves = [0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4) for _ in range(3)]
    assert [peak * factor for factor in half_waves] == pytest.approx(found["search"])
    assert [0.01] * 3 + [0.005] * 3 == pytest.approx(found["tune"])


@UNITS
def test_swaps_are_logged_per_epoch_and_restricted_more_and_more(targets: tuple[Target, ...]) -> None:
    found = {}
    for restriction in ("fourth_power", "one"):
        _, run, outcome = searched(targets, {**LIVELY, "search_epochs": 4, "restriction": restriction})
        found[restriction] = [note for note in run.notes if "swap_share" in note]
        for key in ("swaps_requested", "swaps_made"):
            assert outcome.facts[key] == sum(note[key] for note in found[restriction])

    assert [1, 0.75**4, 0.0625, 0.25**4] == pytest.approx([note["swap_share"] for note in found["fourth_power"]])
    late = found["fourth_power"][2:]
    assert sum(note["swaps_made"] for note in late) < 0.2 * sum(note["swaps_requested"] for note in late)
    assert all(note["swaps_made"] == note["swaps_requested"] for note in found["one"])


def test_channels_are_swapped_as_often_as_the_share_says_on_average_and_weights_rounded_up() -> None:
    options = {**LIVELY, "search_epochs": 8, "gap": 0.0001}
    steps: list[tuple[float, int, int]] = []

    class Watched(Spy):
        def _update(self, name: str, share: float) -> Swaps:
            swaps = super()._update(name, share)
            steps.append((share, *swaps))
            return swaps

    for targets in (CHANNELS, WEIGHTS):
        steps.clear()
        spy = Watched(JackpotOptions(**options), nothing)
        drive(spy, replace(Bench.of(LOTTERY_JACKPOTS, {}), targets=targets).run())
        made, asked = sum(own for *_, own in steps), sum(own for _, own, _ in steps)
        exact = sum(share * requested for share, requested, _ in steps)
        if targets == CHANNELS:
            assert 0 <= exact - made <= len(spy._credits)
            assert any(requested > own == 0 < share for share, requested, own in steps), "one swap is not rounded up"
        else:
            assert all(own == math.ceil(share * requested) for share, requested, own in steps)
        assert 3 < made < 0.8 * asked


# -- channels explored -------------------------------------------------------------------------------------------


def test_some_gates_are_drawn_in_every_step_and_only_these_channels_learn() -> None:
    gates: list[Tensor] = []
    learnt: list[Tensor] = []

    class Watched(Spy):
        def compute_loss(self, context: MethodContext, batch: Batch) -> Tensor:
            if self.phase == "search":
                gates.append(torch.stack([self._gates().detach()[:-1], torch.cat(list(self.masks.values())).float()]))
            return super().compute_loss(context, batch)

        def after_backward(self, context: MethodContext) -> None:
            super().after_backward(context)
            learnt.append(torch.cat(list(self.gradients.values())))

    run = replace(Bench.of(LOTTERY_JACKPOTS, {}), targets=CHANNELS).run()
    drive(Watched(JackpotOptions(**{**LIVELY, "search_epochs": 10}, exploration=0.3), nothing), run)

    assert 30 == len(gates)
    for (used, mask), gradient in zip(gates, learnt):
        drawn = used != mask
        assert bool(((used > 0) & (used < 1))[drawn].all())
        assert torch.equal(drawn, gradient != 0)
    drawn = torch.stack([used[0] != used[1] for used in gates]).float()
    assert 0.3 == pytest.approx(float(drawn.mean()), abs=0.06)
    assert bool((drawn.sum(0) > 0).all())
    values = torch.cat([used[used != mask] for used, mask in gates])
    assert [0.5, 12**-0.5] == pytest.approx([float(values.mean()), float(values.std())], abs=0.05)


@UNITS
def test_what_is_measured_during_the_search_is_the_masked_network_without_exploration(
    targets: tuple[Target, ...],
) -> None:
    x = Bench.of(LOTTERY_JACKPOTS, {}).example
    twice: list[Tensor] = []

    def evaluate(model: nn.Module) -> float:
        model.eval()
        for explored in (True, False):
            own = spy._exploration
            before, own._explored = own._explored, own._explored if explored else None
            twice.append(model(x))
            own._explored = before
        return 0.0

    run = replace(Bench.of(LOTTERY_JACKPOTS, {}), targets=targets).run()
    run.evaluate = evaluate
    spy = Spy(JackpotOptions(**LIVELY, exploration=0.5), nothing)
    drive(spy, run)

    assert 8 == len(twice)
    assert all(torch.equal(a, b) for a, b in zip(twice[::2], twice[1::2]))


# -- freezing and tuning -----------------------------------------------------------------------------------------


@UNITS
@pytest.mark.parametrize("epochs", [1, 2])
def test_the_freeze_phase_measures_what_a_recalibration_over_the_same_batches_measures(
    targets: tuple[Target, ...], epochs: int
) -> None:
    bench = Bench.of(LOTTERY_JACKPOTS, {})

    _, run, outcome = searched(targets, {**LIVELY, "freeze_epochs": epochs})

    assert {0.1} == {module.momentum for module in run.model.modules() if isinstance(module, nn.BatchNorm2d)}
    if targets == CHANNELS:
        run.apply(outcome.plan)
    expected = copy.deepcopy(run.model)
    for name, mask in (outcome.weight_masks or {}).items():
        expected.get_parameter(name).data.mul_(mask)
    recalibrate_batchnorm(expected, bench.batches)
    for name, tensor in statistics(expected).items():
        torch.testing.assert_close(tensor, statistics(run.model)[name], rtol=1e-5, atol=1e-6)


def alone(losses: list[Tensor], batches: Sequence[Batch], *, mode: bool) -> Callable[[MethodRun], object]:
    """Returns what makes a run's epochs those of a host that sets modes once, and keeps graphs wherever there are."""

    def install(run: MethodRun) -> None:
        def epoch(method: PruningMethod) -> list[Tensor]:
            for batch in batches:
                loss = method.compute_loss(run, batch)
                if run.optimizers:
                    loss.backward()
                    method.after_backward(run)
                    for optimizer in run.optimizers:
                        optimizer.step()
                        optimizer.zero_grad()
                else:
                    losses.append(loss)
                method.after_step(run)
            return [loss.detach()]

        run.model.train(mode)
        run.host_epoch = epoch

    return install


@UNITS
@pytest.mark.parametrize("epochs", [1, 2])
def test_statistics_stay_in_a_host_that_never_calls_train_and_are_measured_in_one_that_does(
    targets: tuple[Target, ...], epochs: int
) -> None:
    bench = replace(Bench.of(LOTTERY_JACKPOTS, {}), targets=targets)
    moved = {}
    for mode in (False, True):
        run = bench.run()
        generator = torch.Generator().manual_seed(3)
        for name, buffer in run.model.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5, generator=generator)
        before = statistics(run.model)
        alone([], bench.batches, mode=mode)(run)
        drive(LotteryJackpots(JackpotOptions(**LIVELY, freeze_epochs=epochs)), run)
        moved[mode] = [not torch.equal(before[name], tensor) for name, tensor in statistics(run.model).items()]

    assert not any(moved[False])
    assert all(moved[True])


@UNITS
def test_scores_get_a_gradient_in_the_search_only(targets: tuple[Target, ...]) -> None:
    bench, losses = replace(Bench.of(LOTTERY_JACKPOTS, {}), targets=targets), list[Tensor]()
    found: dict[str, list[bool]] = {"search": [], "freeze": [], "tune": []}

    class Watched(Spy):
        def compute_loss(self, context: MethodContext, batch: Batch) -> Tensor:
            for score in self.scores.values():
                score.grad = None
            loss = super().compute_loss(context, batch)
            if loss.requires_grad:
                loss.backward(retain_graph=True)
            found[self.phase].append(any(score.grad is not None for score in self.scores.values()))
            return loss

    run = bench.run()
    alone(losses, bench.batches, mode=True)(run)
    drive(Watched(JackpotOptions(**{**LIVELY, "tune_epochs": 1}), nothing), run)

    assert {"search": [True] * 9, "freeze": [False] * 3, "tune": [False] * 3} == found
    assert [False] * 3 == [loss.requires_grad for loss in losses]


def test_a_norm_that_the_user_keeps_in_evaluation_stays_while_the_others_are_measured_anew() -> None:
    bench = replace(Bench.of(LOTTERY_JACKPOTS, {}), targets=WEIGHTS)
    run = bench.run()
    kept = run.model.inside[1].eval().requires_grad_(False)
    nn.init.uniform_(kept.running_mean)
    before = statistics(kept)

    outcome = drive(LotteryJackpots(JackpotOptions(**LIVELY)), run)

    expected = copy.deepcopy(run.model)
    for name, mask in (outcome.weight_masks or {}).items():
        expected.get_parameter(name).data.mul_(mask)
    expected.train()
    for name, module in expected.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(name != "inside.1")
            if name != "inside.1":
                module.reset_running_stats()
                module.momentum = None
    with torch.no_grad():
        for images, _ in bench.batches:
            expected(images)
    assert equal(before, statistics(kept))
    assert equal(statistics(expected), statistics(run.model))


@UNITS
def test_without_a_freeze_phase_statistics_are_those_of_the_search(targets: tuple[Target, ...]) -> None:
    after_search: list[dict[str, Tensor]] = []

    _, run, _ = searched(
        targets, {**LIVELY, "freeze_epochs": 0}, lambda spy, context, _: after_search.append(statistics(context.model))
    )

    assert equal(after_search[-1], statistics(run.model))


def test_norms_that_the_user_froze_keep_their_statistics() -> None:
    run = replace(Bench.of(LOTTERY_JACKPOTS, {}), targets=WEIGHTS).run()
    frozen = run.model.stem[1].eval().requires_grad_(False)
    before = statistics(frozen)

    drive(LotteryJackpots(JackpotOptions(**LIVELY)), run)

    assert equal(before, statistics(frozen))


def test_tuning_trains_what_is_kept_and_leaves_masked_weights_at_no_effect() -> None:
    masks: list[dict[str, Tensor]] = []
    model = Bench.of(LOTTERY_JACKPOTS, {}).model
    before = parameters(model)

    def seen(spy: Spy, context: MethodContext, phase: str) -> None:
        masks.append({name: mask.clone() for name, mask in spy.masks.items()})

    _, run, outcome = searched(WEIGHTS, {**LIVELY, "freeze_epochs": 0, "tune_epochs": 2}, seen)

    assert outcome.weight_masks is not None
    assert all(equal(masks[8], mask) for mask in masks[9:])
    for name, now in parameters(run.model).items():
        mask = outcome.weight_masks.get(name, torch.ones_like(now, dtype=torch.bool))
        assert torch.equal(before[name][~mask], now[~mask])
        assert float((before[name][mask] != now[mask]).float().mean()) > 0.5, name


def test_channels_are_cut_before_tuning_and_all_that_is_left_is_trained() -> None:
    widths = []

    def seen(spy: Spy, context: MethodContext, phase: str) -> None:
        widths.append(context.model.inside[0].out_channels)

    _, run, outcome = searched(CHANNELS, {**LIVELY, "tune_epochs": 2}, seen)

    assert [16] * 12 == widths[:12]
    assert [widths[12]] * 6 == widths[12:]
    assert widths[12] < 16
    assert (1, 0) == (run.cuts, outcome.plan.num_removed)
    assert run.applied is not None
    dense = Bench.of(LOTTERY_JACKPOTS, {}).model
    cut = run.kept["inside.0.weight"]
    expected = dense.inside[0].weight.detach()[cut[0]][:, cut[1]]
    assert expected.shape == run.model.inside[0].weight.shape
    assert float((expected != run.model.inside[0].weight).float().mean()) > 0.9
