"""How masks reach the forward passes of a search: once per forward, in any order of calls, and never in silence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from jackpot_bench import CHANNELS, LIVELY, WEIGHTS, Spy, nothing
from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.allocation import Limits, Target
from nni_prune_ext.errors import ConfigError, TrainingError
from nni_prune_ext.methods.base import Batch, MethodContext
from nni_prune_ext.methods.lottery_jackpots import LOTTERY_JACKPOTS
from nni_prune_ext.methods.lottery_jackpots_options import JackpotOptions
from nni_prune_ext.pipeline import PruneResult, prune
from nni_prune_ext.testing.method_bench import Bench, CountedRun, traces_on
from nni_prune_ext.testing.toy_blocks import conv
from nni_prune_ext.training import LossFunction, TrainingSettings, cross_entropy, drive

UNITS = pytest.mark.parametrize("targets", [CHANNELS, WEIGHTS], ids=["channels", "weights"])


def images() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)) for _ in range(3)
    ]


def searched(model: nn.Module, target: str, loss: LossFunction = cross_entropy, **options: object) -> PruneResult:
    data = images()
    return prune(
        model, data[0][0][:2], method="lottery_jackpots", target=target, options={**LIVELY, **options},
        train_batches=data, loss=loss,
    )  # fmt: skip


# -- one row of gates per forward --------------------------------------------------------------------------------


class Counted(Spy):
    """Counts how often the row of gates is made, and keeps what a step learnt."""

    def __init__(self, options: JackpotOptions) -> None:
        super().__init__(options, nothing)
        self.rows: list[Tensor] = []
        self.learnt: list[Tensor] = []
        plain = self._exploration.row

        def row(masks: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> Tensor:
            self.rows.append(plain(masks, scores))
            return self.rows[-1]

        self._exploration.row = row  # type: ignore[method-assign]

    def after_backward(self, context: MethodContext) -> None:
        super().after_backward(context)
        if self.phase == "search":
            self.learnt.append(torch.cat([gradient.flatten() for gradient in self.gradients.values()]))


def counted(
    loss: LossFunction, steps: int = 1, evaluate: bool = False, **options: object
) -> tuple[Counted, CountedRun]:
    """Searches channels on the bench for two epochs, without a freeze phase."""
    bench = replace(Bench.of(LOTTERY_JACKPOTS, {}), targets=CHANNELS)
    run = bench.run(loss)
    run.settings = TrainingSettings(accumulation_steps=steps)
    if evaluate:
        run.evaluate = lambda model: float(model.eval()(bench.example).mean())
    spy = Counted(JackpotOptions(**{**LIVELY, "search_epochs": 2, "freeze_epochs": 0, **options}))
    drive(spy, run)
    return spy, run


def in_parts(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the same loss without calling the model itself."""
    x = model.stem(batch[0])
    x = model.whole(model.depthwise(x + model.back(model.inside(x))))
    return functional.cross_entropy(model.head(x.mean((2, 3))), batch[1])


def test_gates_are_made_once_per_forward_however_many_layers_read_them() -> None:
    spy, _ = counted(cross_entropy)

    assert 6 == len(spy.rows)
    assert all(row.requires_grad for row in spy.rows)
    assert len(spy.rows[0]) == sum(mask.numel() for mask in spy.masks.values()) + 1


def test_a_loss_that_calls_the_parts_of_a_model_learns_the_same() -> None:
    whole, first = counted(cross_entropy)
    parts, second = counted(in_parts)

    assert 6 == len(parts.learnt) == len(parts.rows)
    assert all(torch.equal(a, b) for a, b in zip(whole.learnt, parts.learnt))
    assert all(torch.equal(a, b) for a, b in zip(whole.scores.values(), parts.scores.values()))
    assert [log.loss for log in first.logs] == [log.loss for log in second.logs]


@pytest.mark.parametrize("loss", [cross_entropy, in_parts])
def test_several_batches_per_step_share_gates_and_their_gradients_are_averaged(loss: LossFunction) -> None:
    spy, _ = counted(loss, steps=2, normalise_gradients=False)

    assert (6, 4) == (len(spy.rows), len(spy.learnt))
    assert torch.equal(spy.rows[0], spy.rows[1])
    assert not torch.equal(spy.rows[1], spy.rows[2])
    data, by_hand = Bench.of(LOTTERY_JACKPOTS, {}).batches, list[Tensor]()
    for batch in data[:2]:
        one = replace(Bench.of(LOTTERY_JACKPOTS, {}), targets=CHANNELS, batches=[batch])
        own = Counted(JackpotOptions(**LIVELY, normalise_gradients=False, freeze_epochs=0))
        drive(own, one.run())
        by_hand.append(own.learnt[0])
    torch.testing.assert_close(torch.stack(by_hand).mean(0), spy.learnt[0])


def test_two_forwards_before_one_backward_both_reach_the_scores() -> None:
    def twice(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model, batch) + cross_entropy(model, batch)

    def twice_in_parts(model: nn.Module, batch: Batch) -> Tensor:
        return in_parts(model, batch) + in_parts(model, batch)

    once, _ = counted(cross_entropy, normalise_gradients=False, learning_rate=1e-9)
    for loss, rows in ((twice, 12), (twice_in_parts, 6)):
        spy, _ = counted(loss, normalise_gradients=False, learning_rate=1e-9)
        assert rows == len(spy.rows)
        torch.testing.assert_close([2 * own for own in once.learnt], spy.learnt)


@pytest.mark.parametrize("loss", [cross_entropy, in_parts])
def test_an_evaluation_in_between_sees_plain_gates_and_changes_nothing(loss: LossFunction) -> None:
    def watching(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            seen.append(model(batch[0]))
            seen.append(in_parts(model, batch))
        value = loss(model, batch)
        with torch.no_grad():
            loss(model, batch)
        return value

    seen: list[Tensor] = []
    # Every forward in training mode moves statistics, which a loss in training mode does not read.
    plain, _ = counted(loss)
    watched, _ = counted(watching, evaluate=True)

    assert all(torch.equal(a, b) for a, b in zip(plain.learnt, watched.learnt))
    assert 12 == len(seen)
    for row in watched.rows:
        values = set(row.detach().unique().tolist())
        assert row.requires_grad or values <= {0.0, 1.0}
    assert any(not row.requires_grad for row in watched.rows)


# -- what no mask reaches ----------------------------------------------------------------------------------------


class UsesWeightElsewhere(nn.Module):
    """Reads the weight of a convolution without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = conv(3, 8), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.conv2d(self.stem(x), self.inner.weight, self.inner.bias)
        return self.head(functional.relu(y).mean((2, 3)))


@pytest.mark.parametrize("control", ["none", "recalibrated", "tuned"])
@pytest.mark.parametrize("target", ["macs=0.5", "sparsity=0.5"])
def test_a_weight_that_another_module_uses_is_refused_by_name_after_one_epoch(target: str, control: str) -> None:
    model, steps = UsesWeightElsewhere(), []

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        steps.append(1)
        return cross_entropy(net, batch)

    with pytest.raises(ConfigError, match=r"'inner.weight' was never read through its mask \(1 such parameters\)"):
        searched(model, target, loss, control=control)
    assert 3 == len(steps)
    assert [] == traces_on(model)


class LayerDrop(nn.Module):
    """Skips a branch in all but every third training step."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.head, self.calls = conv(3, 8), conv(8, 8), nn.Linear(8, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.stem(x))
        self.calls += self.training
        if not self.training or self.calls % 3 == 0:
            y = y + self.branch(y)
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("target", ["macs=0.7", "sparsity=0.5"])
def test_a_layer_that_some_steps_skip_is_searched_all_the_same(target: str) -> None:
    torch.manual_seed(0)
    result = searched(LayerDrop(), target, restriction="one", search_epochs=6)

    assert result.outcome.facts["swaps_made"] > 0


def without_a_number(model: nn.Module, batch: Batch) -> Tensor:
    """Returns a finite loss whose gradient is none: that of a root at 0."""
    return cross_entropy(model, batch) + (0 * model(batch[0])).square().sum().sqrt()


@UNITS
def test_scores_that_are_no_numbers_stop_the_run(targets: tuple[Target, ...]) -> None:
    run = replace(Bench.of(LOTTERY_JACKPOTS, {}), targets=targets).run(without_a_number)

    with pytest.raises(TrainingError, match=r"The scores of '.*' are not finite.*Lower learning_rate \(0.3\)"):
        drive(Spy(JackpotOptions(**LIVELY), nothing), run)
    assert 0 == len(run.logs)


def test_a_layer_that_is_excluded_may_be_used_by_another_module() -> None:
    data = images()

    result = prune(
        UsesWeightElsewhere(), data[0][0][:2], method="lottery_jackpots", target="sparsity=0.5", options=LIVELY,
        train_batches=data, limits=Limits(exclude=("inner",)),
    )  # fmt: skip

    assert {"stem.0.weight"} == set(result.outcome.weight_masks or {})
