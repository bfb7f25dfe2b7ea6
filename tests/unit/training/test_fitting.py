"""Plain training against a bare PyTorch loop: optimizers, accumulation, clipping, selection, patience, masks, seeds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from small_task import LOADERS, another_process, everything, metrics, same, small_batches, small_net
from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.methods.base import Batch
from nni_prune_ext.testing.method_bench import modes_of, traces_on
from nni_prune_ext.training import (
    MethodRun,
    TrainingSettings,
    checked_settings,
    cross_entropy,
    fit,
    recalibrate_batchnorm,
    seeded,
)

CONSTANT = {"learning_rate": 0.05, "schedule": "constant"}


def bare_loop(
    model: nn.Module, batches: Iterable[Batch], optimizer: torch.optim.Optimizer, epochs: int, bf16: bool = False
) -> list[float]:
    """Trains as everybody writes it; returns the mean loss of every epoch."""
    model.train()
    means = []
    for _ in range(epochs):
        losses = []
        for images, labels in batches:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        means.append(sum(losses) / len(losses))
    return means


OPTIMIZERS: dict[str, tuple[dict[str, object], Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "sgd": ({"momentum": 0.0, "weight_decay": 0.0}, lambda model: torch.optim.SGD(model.parameters(), lr=0.05)),
    "momentum": (
        {"momentum": 0.9, "weight_decay": 1e-2},
        lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2),
    ),
    "nesterov": (
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.0},
        lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.8, nesterov=True),
    ),
    "adamw": (
        {"optimizer": "adamw", "weight_decay": 0.1},
        lambda model: torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fitting_is_bit_equal_to_a_bare_loop(name: str, precision: str) -> None:
    ours, theirs, batches = small_net(), small_net(), small_batches()
    values, optimizer = OPTIMIZERS[name]

    logs = fit(ours, batches, epochs=3, settings=checked_settings(**CONSTANT, **values, precision=precision))
    means = bare_loop(theirs, batches, optimizer(theirs), 3, bf16=precision == "bf16")

    assert same(everything(theirs), everything(ours))
    assert means == pytest.approx([log.loss for log in logs], rel=1e-6)


def test_the_default_settings_are_sgd_with_momentum_along_torchs_own_cosine() -> None:
    ours, theirs, batches = small_net(), small_net(), small_batches()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3 * len(batches))
    optimizer.register_step_post_hook(lambda *_: cosine.step())

    fit(ours, batches, epochs=3)
    bare_loop(theirs, batches, optimizer, 3)

    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(theirs.parameters(), ours.parameters()))


@pytest.mark.parametrize("count", [4, 5])
def test_two_accumulated_batches_step_along_the_mean_of_their_gradients(count: int) -> None:
    ours, theirs, batches = small_net().double(), small_net().double(), small_batches(count)
    batches = [(images.double(), labels) for images, labels in batches]

    settings = checked_settings(**CONSTANT, momentum=0.0, weight_decay=0.0, accumulation_steps=2)
    (log,) = fit(ours, batches, epochs=1, settings=settings)
    losses: list[float] = []
    theirs.train()
    for window in (batches[:2], batches[2:4], batches[4:]):
        each = []
        for batch in window:
            loss = cross_entropy(theirs, batch)
            each.append(torch.autograd.grad(loss, list(theirs.parameters())))
            losses.append(float(loss.detach()))
        with torch.no_grad():
            for parameter, gradients in zip(theirs.parameters(), zip(*each)):
                parameter -= 0.05 * sum(gradients) / len(window)

    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(theirs.parameters(), ours.parameters()))
    assert sum(losses) / count == pytest.approx(log.loss)


@pytest.mark.parametrize("most", [1e-2, 1e3])
def test_gradients_are_clipped_to_a_euclidean_norm_over_all_parameters(most: float) -> None:
    ours, theirs, (batch, *_) = small_net(), small_net(), small_batches()

    settings = checked_settings(**CONSTANT, momentum=0.0, weight_decay=0.0, max_gradient_norm=most)
    fit(ours, [batch], epochs=1, settings=settings)
    gradients = torch.autograd.grad(cross_entropy(theirs, batch), list(theirs.parameters()))
    norm = float(torch.cat([g.flatten() for g in gradients]).norm())
    with torch.no_grad():
        for parameter, gradient in zip(theirs.parameters(), gradients):
            parameter -= 0.05 * gradient * min(most / norm, 1.0)

    assert (norm > most) == (most < 1)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(theirs.parameters(), ours.parameters()))


def test_clipping_comes_after_all_batches_of_a_step() -> None:
    ours, theirs, batches = small_net(), small_net(), small_batches(2)

    settings = checked_settings(
        **CONSTANT, momentum=0.0, weight_decay=0.0, max_gradient_norm=1e-2, accumulation_steps=2
    )
    fit(ours, batches, epochs=1, settings=settings)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.05)
    sum(cross_entropy(theirs, batch) / 2 for batch in batches).backward()
    nn.utils.clip_grad_norm_(theirs.parameters(), 1e-2)
    optimizer.step()

    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(theirs.parameters(), ours.parameters()))


# -- selection -------------------------------------------------------------------------------------------------


def scripted(values: list[float]) -> tuple[Callable[[nn.Module], float], list[dict[str, Tensor]]]:
    """Returns an ``evaluate`` that says these numbers, and the weights that it saw."""
    seen: list[dict[str, Tensor]] = []
    say = metrics(values)

    def evaluate(model: nn.Module) -> float:
        seen.append(everything(model))
        return say(model)

    return evaluate, seen


@pytest.mark.parametrize(
    ("values", "best"),
    [([0.1, 0.9, 0.3], 1), ([0.5, 0.5, 0.5], 0), ([0.1, 0.2, 0.3], 2), ([-3.0, -5.0, -4.0], 0),
     ([float("nan"), 0.1, float("nan")], 1), ([float("nan")] * 3, 2)],
)  # fmt: skip
def test_the_best_epochs_weights_and_buffers_are_kept(values: list[float], best: int) -> None:
    model, (evaluate, seen) = small_net(), scripted(values)

    logs = fit(model, small_batches(), epochs=3, evaluate=evaluate)

    assert not same(seen[0], seen[1])
    assert same(seen[best], everything(model))
    assert 5 * (best + 1) == int(model[1].num_batches_tracked)
    assert str(values) == str([log.metric for log in logs])


def test_without_selection_the_last_weights_stay() -> None:
    model, (evaluate, seen) = small_net(), scripted([0.9, 0.1])

    fit(model, small_batches(), epochs=2, evaluate=evaluate, settings=TrainingSettings(select_best=False))

    assert same(seen[-1], everything(model))


@pytest.mark.parametrize("select", [True, False])
@pytest.mark.parametrize(
    ("values", "patience", "epochs"),
    [([1, 2, 1, 1, 5, 6], 2, 4), ([1, 1, 2, 2, 2, 9], 2, 5), ([3, 2, 9, 9, 9, 9], 1, 2), ([1, 2, 3, 4, 5, 6], 1, 6)],
)
def test_training_stops_after_so_many_epochs_without_a_better_metric(
    values: list[float], patience: int, epochs: int, select: bool
) -> None:
    evaluate, seen = scripted(values)
    settings = TrainingSettings(patience=patience, select_best=select)

    logs = fit(small_net(), small_batches(1), epochs=6, evaluate=evaluate, settings=settings)

    assert epochs == len(logs) == len(seen)


def test_patience_without_a_metric_never_stops() -> None:
    assert 3 == len(fit(small_net(), small_batches(1), epochs=3, settings=TrainingSettings(patience=1)))


def test_an_evaluation_that_changes_modes_changes_nothing_of_the_training() -> None:
    plain, watched, batches = small_net(dropout=0.5), small_net(dropout=0.5), small_batches()
    watched[1].eval()
    plain[1].eval()
    modes, seen = modes_of(watched), []

    def evaluate(model: nn.Module) -> float:
        seen.append((torch.is_grad_enabled(), model[3].training))
        model.eval()
        model(batches[0][0])
        return 0.0

    fit(plain, batches, epochs=2)
    fit(watched, batches, epochs=2, evaluate=evaluate, settings=TrainingSettings(select_best=False))

    assert [(False, True)] * 2 == seen
    assert same(everything(plain), everything(watched))
    assert modes == modes_of(watched)
    assert [] == traces_on(watched)


def test_an_evaluation_that_raises_leaves_modes_and_gradients_as_they_were() -> None:
    model = small_net().eval()
    modes = modes_of(model)

    def evaluate(model: nn.Module) -> float:
        model.eval()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(model, small_batches(), epochs=1, evaluate=evaluate)

    assert modes == modes_of(model)
    assert [] == traces_on(model)
    assert torch.is_grad_enabled()


# -- masks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [{"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"optimizer": "adamw", "weight_decay": 0.1}],
)
def test_masked_weights_are_zero_in_every_forward_pass_and_at_the_end(values: dict[str, object]) -> None:
    model, generator = small_net(), torch.Generator().manual_seed(0)
    masks = {
        name: torch.rand(p.shape, generator=generator) < 0.5 for name, p in model.named_parameters() if p.dim() > 1
    }
    most: list[float] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        own = dict(model.named_parameters())
        most.append(max(float(own[name].detach()[~mask].abs().max()) for name, mask in masks.items()))
        return cross_entropy(model, batch)

    evaluate = metrics([0.1, 0.9, 0.2])
    before = everything(model)
    fit(model, small_batches(), epochs=3, loss=loss, weight_masks=masks, evaluate=evaluate,
        settings=checked_settings(**CONSTANT, **values))  # fmt: skip

    after = everything(model)
    assert [0.0] * 15 == most
    for name, mask in masks.items():
        assert int((~mask).sum()) == int((after[name] == 0).sum())
        assert not torch.equal(before[name][mask], after[name][mask])


def test_training_under_a_mask_is_training_of_the_weights_that_are_left() -> None:
    masked, theirs, batches = small_net(), small_net(), small_batches()
    mask = torch.ones_like(theirs[0].weight, dtype=torch.bool)
    mask[:, 1] = False  # the second input channel plays no part …
    with torch.no_grad():
        theirs[0].weight[:, 1] = 0
    without = [(images * torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1, 1), labels) for images, labels in batches]

    fit(masked, batches, epochs=2, weight_masks={"0.weight": mask}, settings=TrainingSettings(weight_decay=0.0))
    fit(theirs, without, epochs=2, settings=TrainingSettings(weight_decay=0.0))

    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(theirs.parameters(), masked.parameters()))  # … as here


# -- seeds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", LOADERS)
def test_two_fits_with_one_seed_agree_wherever_the_global_generators_stand(loader: str) -> None:
    def trained(seed: int, elsewhere: int) -> dict[str, Tensor]:
        model = small_net(dropout=0.3)
        another_process(elsewhere)
        fit(model, LOADERS[loader](), epochs=2, seed=seed)
        return everything(model)

    first = trained(0, elsewhere=1)

    assert same(first, trained(0, elsewhere=2))
    assert not same(first, trained(1, elsewhere=1))


@pytest.mark.parametrize("loader", LOADERS)
def test_the_global_generators_are_left_as_they_were(loader: str) -> None:
    another_process(7)
    expected = torch.rand(1).item(), np.random.rand(), random.random()

    another_process(7)
    fit(small_net(dropout=0.3), LOADERS[loader](), epochs=1)

    assert expected == (torch.rand(1).item(), np.random.rand(), random.random())


@pytest.mark.parametrize("loader", LOADERS)
def test_recalibration_neither_depends_on_the_global_generators_nor_moves_them(loader: str) -> None:
    first, second = small_net(), small_net()
    another_process(1)
    recalibrate_batchnorm(first, LOADERS[loader](), count=2)
    another_process(2)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    another_process(2)

    recalibrate_batchnorm(second, LOADERS[loader](), count=2)

    assert expected == (torch.rand(1).item(), np.random.rand(), random.random())
    assert same(everything(first), everything(second))


@pytest.mark.parametrize("loader", LOADERS)
def test_looking_at_batches_does_not_move_the_order_of_any_data(loader: str) -> None:
    def seen(*, looks: bool) -> list[float]:
        run, found = MethodRun(model=small_net(), batches_=LOADERS[loader]()), list[float]()
        with seeded(run.model, 0):
            for _ in range(2):
                if looks:
                    run.batches(3)
                found += [float(images.sum()) for images, _ in run.batches_]
        return found

    assert seen(looks=False) == seen(looks=True)


def test_no_epoch_is_no_training() -> None:
    model = small_net()
    before = everything(model)

    assert [] == fit(model, [], epochs=0)
    assert same(before, everything(model))
