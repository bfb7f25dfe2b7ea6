"""What stops training: a loss that is no number, memory, the data, the user; and what is left afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_task import dataset, everything, same, small_batches, small_net
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nni_prune_ext.checkpoints import Checkpoints
from nni_prune_ext.errors import ConfigError, DataError, TrainingError
from nni_prune_ext.methods.base import Batch, MethodContext, Outcome, Phase, PruningMethod
from nni_prune_ext.methods.baselines import L1
from nni_prune_ext.plan import plan_from_channels
from nni_prune_ext.testing.method_bench import Bench, modes_of, traces_on
from nni_prune_ext.training import TrainingSettings, cross_entropy, drive, fit


def failing(call: int, what: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Batch], Tensor]:
    """Returns cross-entropy that does something else at one call, counted from 1."""
    calls = 0

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        healthy = cross_entropy(model, batch)
        return what(healthy) if calls == call else healthy

    return loss


def raises(error: BaseException) -> Callable[[Tensor], Tensor]:
    def what(loss: Tensor) -> Tensor:
        raise error

    return what


def after_epochs(count: int) -> dict[str, Tensor]:
    """Returns the weights after so many of three epochs."""
    model, found = small_net(), [everything(small_net())]

    def evaluate(model: nn.Module) -> float:
        found.append(everything(model))
        return 0.0

    fit(model, small_batches(), epochs=3, evaluate=evaluate)
    return found[count]


# -- no number -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("call", "epoch", "step"), [(1, 1, 1), (4, 1, 4), (8, 2, 3), (15, 3, 5)])
def test_a_loss_that_is_no_number_says_where_and_leaves_the_model_before_the_epoch(
    call: int, epoch: int, step: int, bad: float
) -> None:
    model = small_net()
    modes = modes_of(model)

    with pytest.raises(TrainingError) as caught:
        fit(model, small_batches(), epochs=3, loss=failing(call, lambda loss: loss * 0 + bad), name="recovery")

    assert f"The loss is {bad} in step {step} of epoch {epoch} of phase 'recovery'" in str(caught.value)
    assert "Lower the learning rate (0.01)" in str(caught.value)
    assert same(after_epochs(epoch - 1), everything(model))
    assert modes == modes_of(model)
    assert [] == traces_on(model)


def test_training_goes_on_from_the_last_checkpoint_once_the_loss_is_mended(tmp_path: Path) -> None:
    whole, model, fresh = small_net(), small_net(), small_net()
    fit(whole, small_batches(), epochs=3)
    with pytest.raises(TrainingError) as caught:
        fit(model, small_batches(), epochs=3, loss=failing(8, lambda loss: loss * math.nan),
            checkpoints=Checkpoints(tmp_path, {}))  # fmt: skip

    logs = fit(fresh, small_batches(), epochs=3, checkpoints=Checkpoints(tmp_path, {}))

    assert str(tmp_path) in str(caught.value)
    assert [0, 1, 2] == [log.epoch for log in logs]
    assert same(everything(whole), everything(fresh))


def test_weights_that_burst_are_noticed_in_the_next_step() -> None:
    model = small_net()
    before = everything(model)

    with pytest.raises(TrainingError, match=r"step [2-9] of epoch 1"):
        fit(model, small_batches(9), epochs=1, settings=TrainingSettings(learning_rate=1e30))

    assert same(before, everything(model))


def test_a_loss_that_fails_after_a_cut_within_the_epoch_is_still_told_as_what_it_is() -> None:
    class Cuts(PruningMethod):
        def phases(self) -> list[Phase]:
            return [Phase("train", 1)]

        def after_step(self, context: MethodContext) -> None:
            if len(context.groups) and "inside.0" not in (context.applied.removed if context.applied else {}):
                context.apply(plan_from_channels(context.groups, {"inside.0": [0]}))

        def finish(self, context: MethodContext) -> Outcome:
            raise AssertionError

    run = Bench.of(L1, {}).run(failing(3, lambda loss: loss * math.nan))

    with pytest.raises(TrainingError, match="The loss is nan in step 3"):
        drive(Cuts(), run)

    assert [] == traces_on(run.model)


# -- memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_no_memory_left_says_which_batch_was_tried_and_what_to_do(error: BaseException) -> None:
    model = small_net()

    with pytest.raises(TrainingError) as caught:
        fit(model, small_batches(), epochs=3, loss=failing(7, raises(error)))

    for text in ("size 4", "(4, 3, 8, 8), (4,)", "Halve the batch size and double accumulation_steps"):
        assert text in str(caught.value)
    assert error is caught.value.__cause__
    assert same(after_epochs(1), everything(model))


def test_memory_that_runs_out_in_the_backward_pass_is_explained_too() -> None:
    class Heavy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(TrainingError, match="Memory ran out on a batch of size 4"):
        fit(small_net(), small_batches(), epochs=1, loss=lambda model, batch: Heavy.apply(cross_entropy(model, batch)))


def test_batches_of_any_kind_can_be_described() -> None:
    batches = [{"pixels": torch.zeros(7, 3, 8, 8), "more": [torch.zeros(2)]}]

    with pytest.raises(TrainingError, match=r"size 7, shapes \(7, 3, 8, 8\)"):
        fit(small_net(), batches, epochs=1, loss=lambda model, batch: raises(MemoryError())(batch))


def test_another_error_of_the_loss_passes_through_as_it_is() -> None:
    model = small_net()
    modes = modes_of(model)

    with pytest.raises(RuntimeError, match="^my own$"):
        fit(model, small_batches(), epochs=1, loss=failing(2, raises(RuntimeError("my own"))))

    assert modes == modes_of(model)
    assert [] == traces_on(model)


# -- data ------------------------------------------------------------------------------------------------------


class Breaks:
    """Batches that raise in one pass, after some were given."""

    def __init__(self, error: BaseException, *, given: int, epoch: int) -> None:
        self.error, self.given, self.epoch = error, given, epoch
        self.passes = 0

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        yield from small_batches()[: self.given if self.passes == self.epoch else 5]
        if self.passes == self.epoch:
            raise self.error


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize(("given", "epoch"), [(0, 1), (3, 1), (4, 2)])
def test_data_that_raises_says_after_how_many_batches_and_why(given: int, epoch: int, accumulation: int) -> None:
    model, error = small_net(), OSError("the disk is gone")
    settings = TrainingSettings(accumulation_steps=accumulation)
    expected: list[dict[str, Tensor]] = [everything(model)]
    fit(small_net(), small_batches(), epochs=3, settings=settings,
        evaluate=lambda model: expected.append(everything(model)) or 0.0)  # fmt: skip

    with pytest.raises(TrainingError) as caught:
        fit(model, Breaks(error, given=given, epoch=epoch), epochs=3, settings=settings)

    message = f"raised OSError after {given} batches of epoch {epoch} of phase 'fit': the disk is gone"
    assert message in str(caught.value)
    assert error is caught.value.__cause__
    assert same(expected[epoch - 1], everything(model))


class Damaged(Dataset):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 13:
            raise ValueError("image 13 is damaged")
        return dataset()[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_torch_loader_that_raises_also_in_its_workers_is_explained(workers: int) -> None:
    with pytest.raises(TrainingError, match=r"(?s)raised ValueError after 3 batches of epoch 1.*image 13 is damaged"):
        fit(small_net(), DataLoader(Damaged(), batch_size=4, num_workers=workers), epochs=1)


def test_an_error_of_our_own_from_the_data_keeps_its_kind() -> None:
    with pytest.raises(DataError, match="^no such file$"):
        fit(small_net(), Breaks(DataError("no such file"), given=1, epoch=1), epochs=1)


def test_data_that_can_be_iterated_only_once_is_a_mistake_in_the_second_epoch() -> None:
    with pytest.raises(ConfigError, match="gave no batch"):
        fit(small_net(), iter(small_batches()), epochs=2)


# -- the user --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["loss", "data", "evaluate"])
def test_an_interruption_by_the_user_passes_through_and_the_run_can_be_continued(place: str, tmp_path: Path) -> None:
    whole, model, fresh = small_net(), small_net(), small_net()
    fit(whole, small_batches(), epochs=3, settings=TrainingSettings(select_best=False))
    stop, passes = KeyboardInterrupt(), 0

    def evaluate(model: nn.Module) -> float:
        nonlocal passes
        passes += 1
        if place == "evaluate" and passes == 2:
            raise stop
        return 0.0

    modes = modes_of(model)
    with pytest.raises(KeyboardInterrupt):
        fit(
            model, Breaks(stop, given=2, epoch=2) if place == "data" else small_batches(), epochs=3,
            loss=failing(8, raises(stop)) if place == "loss" else cross_entropy, evaluate=evaluate,
            checkpoints=Checkpoints(tmp_path, {}), settings=TrainingSettings(select_best=False),
        )  # fmt: skip
    fit(fresh, small_batches(), epochs=3, checkpoints=Checkpoints(tmp_path, {}), evaluate=lambda model: 0.0,
        settings=TrainingSettings(select_best=False))  # fmt: skip

    assert modes == modes_of(model)
    assert [] == traces_on(model)
    assert same(everything(whole), everything(fresh))


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (lambda loss: loss.item(), "a float"),
        (lambda loss: loss.detach(), r"a tensor of shape \(\) without a gradient"),
        (lambda loss: torch.stack([loss, loss]), r"a tensor of shape \(2,\)"),
        (lambda loss: {"loss": loss}, "a dict"),
    ],
)
def test_a_loss_that_cannot_be_minimised_is_refused_with_what_it_was(returned, found: str) -> None:
    with pytest.raises(ConfigError, match=f"returned {found}, expected a scalar tensor"):
        fit(small_net(), small_batches(), epochs=1, loss=lambda model, batch: returned(cross_entropy(model, batch)))


def test_weights_that_the_last_step_destroyed_are_not_saved_as_good(tmp_path: Path) -> None:
    model, batches = small_net(), small_batches()[:1]
    settings = TrainingSettings(learning_rate=1e38, schedule="constant")

    with pytest.raises(TrainingError, match="not finite after epoch 1 of phase 'fit'"):
        fit(model, batches, epochs=2, settings=settings, checkpoints=Checkpoints(tmp_path, {}),
            loss=lambda model, batch: 1e10 * cross_entropy(model, batch))  # fmt: skip

    saved = Checkpoints(tmp_path, {}).latest()
    assert saved is not None
    assert 0 == saved.values["epochs"]
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_a_parameter_group_that_matches_nothing_is_refused() -> None:
    settings = TrainingSettings(parameter_groups=({"pattern": "zzz*"},))

    with pytest.raises(ConfigError, match=r"'zzz\*' matches no parameter"):
        fit(small_net(), small_batches(), epochs=1, settings=settings)
