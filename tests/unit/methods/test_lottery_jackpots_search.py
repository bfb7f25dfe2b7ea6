"""The search phase of the mask search, recomputed: what seeds draw, what decay does, what norms measure."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from jackpot_bench import CHANNELS, LIVELY, WEIGHTS, Spy, counts, equal, nothing, searched, statistics
from torch import Tensor, nn

from nni_prune_ext.allocation import Target
from nni_prune_ext.certificate import verify_groups
from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.methods.base import Batch, MethodContext
from nni_prune_ext.methods.lottery_jackpots import LOTTERY_JACKPOTS
from nni_prune_ext.methods.lottery_jackpots_options import JackpotOptions
from nni_prune_ext.testing.method_bench import Bench
from nni_prune_ext.testing.toy_blocks import conv, network
from nni_prune_ext.training import MethodRun, drive

UNITS = pytest.mark.parametrize("targets", [CHANNELS, WEIGHTS], ids=["channels", "weights"])


# -- seeds -------------------------------------------------------------------------------------------------------


class Drawn(Spy):
    """Keeps which channels every step explores, and with which gates."""

    def __init__(self, **options: object) -> None:
        super().__init__(JackpotOptions(**{**LIVELY, **options}), nothing)
        self.draws: list[Tensor] = []

    def compute_loss(self, context: MethodContext, batch: Batch) -> Tensor:
        if self._exploration._explored is not None:
            which, gates = self._exploration._explored
            self.draws.append(torch.stack([which.float(), gates]))
        return super().compute_loss(context, batch)


def begun(targets: tuple[Target, ...], seed: int, **options: object) -> Drawn:
    """Returns the search after a run with this seed; three steps are an epoch."""
    run = replace(Bench.of(LOTTERY_JACKPOTS, {}), targets=targets).run()
    run.seed, spy = seed, Drawn(**options)
    drive(spy, run)
    return spy


def test_no_epoch_of_a_seed_explores_what_an_epoch_of_another_seed_does() -> None:
    draws = {seed: begun(CHANNELS, seed).draws for seed in range(3)}

    assert [9, 9, 9] == [len(own) for own in draws.values()]
    first = {(seed, epoch): own[3 * epoch] for seed, own in draws.items() for epoch in range(3)}
    assert [] == [(a, b) for a, b in itertools.combinations(first, 2) if torch.equal(first[a][1], first[b][1])]


def test_the_same_seed_explores_the_same_in_every_epoch_again() -> None:
    torch.manual_seed(5)
    before = begun(CHANNELS, 4).draws
    torch.manual_seed(6)
    after = begun(CHANNELS, 4).draws

    assert 9 == len(before)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@UNITS
def test_two_seeds_begin_at_two_random_masks_of_the_same_counts_and_one_seed_at_the_same(
    targets: tuple[Target, ...],
) -> None:
    first, again, other = (
        begun(targets, seed, search_epochs=1, initialisation="random")._first_masks for seed in (1, 1, 2)
    )

    assert equal(first, again)
    assert not equal(first, other)
    assert counts(first) == counts(other)


@UNITS
def test_all_seeds_begin_at_the_same_magnitudes(targets: tuple[Target, ...]) -> None:
    first, other = (begun(targets, seed, search_epochs=1)._first_masks for seed in (1, 2))

    assert equal(first, other)


# -- decay of scores ---------------------------------------------------------------------------------------------


@UNITS
def test_scores_decay_as_much_as_is_asked_for(targets: tuple[Target, ...]) -> None:
    found: dict[float, dict[str, Tensor]] = {}
    first: dict[str, Tensor] = {}

    for decay in (0.0, 0.25):

        def seen(spy: Spy, context: MethodContext, phase: str, decay: float = decay) -> None:
            if decay not in found:
                found[decay] = {name: score.detach().clone() for name, score in spy.scores.items()}
                first.update({name: torch.where(mask, 1.0, 0.999) for name, mask in spy._first_masks.items()})

        searched(targets, {**LIVELY, "search_epochs": 1, "learning_rate": 0.4, "score_decay": decay}, seen)

    for name, score in first.items():
        torch.testing.assert_close(0.4 * 0.25 * score, found[0.0][name] - found[0.25][name], rtol=0, atol=1e-4)


# -- statistics --------------------------------------------------------------------------------------------------

READERS = {"0.0": "1.0.weight", "1.0": "2.0.weight", "2.0": "4.weight"}
"""Group of channels → the weight that reads them, in a chain of three convolutions and a linear layer."""


def chain() -> nn.Module:
    torch.manual_seed(0)
    return network(conv(8, 8))


def masked(name: str, mask: Tensor, model: nn.Module) -> None:
    """Writes zeros where a mask of a weight, or of the channels that a weight reads, is closed."""
    weight = model.get_parameter(READERS.get(name, name))
    with torch.no_grad():
        weight.mul_(mask if name not in READERS else mask.reshape(1, -1, *[1] * (weight.dim() - 2)))


def replayed(batches: list[Batch], masks: list[dict[str, Tensor]], norms_of: Callable[[], nn.Module]) -> nn.Module:
    """Returns the dense network with the statistics that it has after a forward pass under each mask in turn."""
    model, dense = norms_of().train(), norms_of().state_dict()
    for (images, _), own in zip(itertools.cycle(batches), masks):
        model.load_state_dict({name: tensor for name, tensor in dense.items() if "running" not in name}, strict=False)
        for name, mask in own.items():
            masked(name, mask, model)
        with torch.no_grad():
            model(images)
    return model


@UNITS
def test_at_the_end_of_the_search_statistics_are_those_of_the_masked_network(targets: tuple[Target, ...]) -> None:
    model, batches, masks = chain(), list(Bench.of(LOTTERY_JACKPOTS, {}).batches), list[dict[str, Tensor]]()
    found: dict[str, Tensor] = {}

    def seen(spy: Spy, context: MethodContext, phase: str) -> None:
        if phase == "search":
            masks.append(copy.deepcopy(spy.before))
            found.update(statistics(context.model))

    example = batches[0][0][:2]
    groups = verify_groups(model, example, trace_channel_groups(model, example))
    run = MethodRun(model=model, batches_=batches, groups=groups, example_inputs=example, targets=targets)
    drive(Spy(JackpotOptions(**LIVELY, exploration=0.0, freeze_epochs=1), seen), run)

    assert 9 == len(masks)
    assert not equal(masks[0], masks[-1])
    expected = statistics(replayed(batches, masks, chain))
    for name, tensor in expected.items():
        torch.testing.assert_close(tensor, found[name], rtol=1e-4, atol=1e-6)
    dense = statistics(replayed(batches, [{}] * 9, chain))
    behind = [name for name in expected if not name.startswith("0.")]
    assert 4 == len(behind)
    assert all(float((dense[name] - found[name]).abs().max()) > 1e-3 for name in behind)
    assert not equal(found, statistics(run.model)), "the freeze phase measures anew"
