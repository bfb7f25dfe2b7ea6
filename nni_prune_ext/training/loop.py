"""The crank that drives any pruning method through its phases, and can be stopped and continued at any epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from nni_prune_ext.checkpoints import Json, Saved
from nni_prune_ext.errors import CheckpointError, ConfigError, NniPruneExtError, TrainingError
from nni_prune_ext.methods.base import Batch, JsonState, Outcome, Phase, PruningMethod
from nni_prune_ext.plan import PruningPlan
from nni_prune_ext.training.forward_only import modes_kept
from nni_prune_ext.training.method_run import NO_BATCH, MethodRun, seeded
from nni_prune_ext.training.optimizers import make_optimizers, set_rate
from nni_prune_ext.training.phase_setup import channels_last, memory_explained, prepared
from nni_prune_ext.training.processes import (
    average_statistics,
    averaged,
    dealt,
    from_main,
    is_main,
    share_random_states,
    share_weights,
    sum_gradients,
    world_size,
)
from nni_prune_ext.training.run_state import (
    load_loader_states,
    load_model_tensors,
    load_optimizer_states,
    load_random_states,
    model_tensors,
    optimizer_states,
    random_states,
    under_prefix,
    with_prefix,
)
from nni_prune_ext.training.settings import Batches, EpochLog, StepLog

_PHASE_SEEDS = 1_000_003
"""Distance between the seeds of a run's phases."""
_TELL_SECONDS = 0.2
"""A watcher hears of steps no more often than this: reading a loss waits for the device."""
_CUDA_CHECK_STEPS = 20
"""On a GPU the loss is looked at every so many steps, for the same reason."""


def drive(method: PruningMethod, run: MethodRun) -> Outcome:
    """Runs all phases of a method and returns what it hands over; ``run.applied`` holds what was cut on the way.

    Every phase draws its random numbers from the run's seed and its own position. Where the run has checkpoints, it is
    saved after every epoch and every cut at the beginning of a phase, and goes on from the newest one: with the same
    plan, and on one CPU process with the same weights bit for bit, as if it had never stopped.

    Raises:
        ConfigError: there is no batch or nothing to train.
        TrainingError: the loss is no number, memory ran out, or the data raised; the model is as it was before the
            epoch.
        CheckpointError: the checkpoints are not of this run.
    """
    if len(run.groups):
        run.cost_model()  # before any hook of the method can see this forward pass
    phases = list(method.phases())
    run_phases(method, run, phases)
    run.progress = 1.0
    with seeded(run.model, run.seed + _PHASE_SEEDS * len(phases)):
        outcome = method.finish(run)
    plan, masks = from_main((outcome.plan, outcome.weight_masks))
    return replace(outcome, plan=plan, weight_masks=masks)


def run_phases(method: PruningMethod, run: MethodRun, phases: list[Phase]) -> None:
    """Runs the phases of a method, beginning where the run's checkpoints say."""
    share_weights(run.model)
    run.method, total = method, max(sum(phase.epochs for phase in phases), 1)
    saved = from_main(run.checkpoints.latest() if run.checkpoints and is_main() else None)
    at = _Place(0, 0, False) if saved is None else _restored(method, run, phases, saved)
    if at.finished:
        at, saved = _Place(at.phase + 1, 0, False), None
    for number in range(at.phase, len(phases)):
        before = sum(phase.epochs for phase in phases[:number])
        with seeded(run.model, run.seed + _PHASE_SEEDS * number):
            _run_phase(_Stretch(method, run, phases[number], number, before, total), at.epochs, saved)
        at, saved = _Place(number + 1, 0, False), None


@dataclass(frozen=True)
class _Place:
    """Where a run stands: so many epochs of this phase are done."""

    phase: int
    epochs: int
    finished: bool


@dataclass(frozen=True)
class _Stretch:
    """One phase of one run: the epochs ``before …`` of ``total``."""

    method: PruningMethod
    run: MethodRun
    phase: Phase
    number: int
    before: int
    total: int


def _run_phase(stretch: _Stretch, done: int, saved: Saved | None) -> None:
    """Runs the epochs of a phase from ``done``; with a saved state the phase is entered without its start."""
    method, run, phase = stretch.method, stretch.run, stretch.phase
    run.stop = False
    run.progress = (stretch.before + done) / stretch.total
    run.watcher.phase(phase.name, phase.epochs, done=stretch.before + done, total=stretch.total)
    with prepared(run, phase):
        if saved is None:
            method.start(run, phase)
        method.attach(run, phase)
        run.attached = phase
        if phase.epochs:
            make_optimizers(run, phase)
        if saved is None:
            _save(stretch, 0, finished=not phase.epochs)
        else:
            _restore_machinery(run, saved)
        for epoch in range(done, phase.epochs):
            log = _guarded_epoch(stretch, epoch)
            run.logs.append(log)
            _save(stretch, epoch + 1, finished=run.stop or epoch + 1 == phase.epochs)
            run.watcher.epoch(log)
            if run.stop:
                break


def _guarded_epoch(stretch: _Stretch, epoch: int) -> EpochLog:
    """Runs one epoch; if it fails, the model is left as it was before it."""
    run = stretch.run
    before = {name: tensor.clone() for name, tensor in model_tensors(run.model).items()}
    try:
        return _epoch(stretch, epoch)
    except TrainingError as error:
        now = model_tensors(run.model)
        if {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in now.items()}:  # not cut since
            load_model_tensors(run.model, before)
        if run.checkpoints is None:
            raise
        raise TrainingError(f"{error} The state before this epoch is saved in '{run.checkpoints.folder}'.") from error


def _epoch(stretch: _Stretch, epoch: int) -> EpochLog:
    run, phase = stretch.run, stretch.phase
    began = time.perf_counter()
    losses = _steps(stretch, epoch) if run.host_epoch is None else run.host_epoch(stretch.method)
    mean = _mean_loss(losses, run.model)
    if not math.isfinite(mean):
        raise _no_number(stretch, epoch, None, mean)
    average_statistics(run.model)
    share_random_states()
    _check_weights(stretch, epoch)
    run.progress = (stretch.before + epoch + 1) / stretch.total
    run.metric = _metric(run)
    stretch.method.after_epoch(run, phase, epoch)
    rate = float(run.optimizers[0].param_groups[-1]["lr"]) if run.optimizers else 0.0  # the common group is the last
    return EpochLog(phase.name, epoch, mean, rate, time.perf_counter() - began, run.metric)


def _steps(stretch: _Stretch, epoch: int) -> list[Tensor]:
    """Runs the steps of one epoch; returns this process's losses.

    Raises:
        ConfigError: there was no batch.
    """
    run, phase = stretch.run, stretch.phase
    told, losses, seen = time.perf_counter(), list[Tensor](), 0
    _announce_epoch(run.batches_, stretch.before + epoch)
    steps = _length(run.batches_)
    for number, (own, count) in enumerate(_dealt(stretch, epoch)):
        share = min(seen / steps, 1.0) if steps else 0.0
        run.progress = (stretch.before + epoch + share) / stretch.total
        set_rate(run, phase, epoch + share)
        losses += _step(stretch, own, count, epoch, number)
        seen += count
        now = time.perf_counter()
        if now - told > _TELL_SECONDS and losses:
            told = now
            run.watcher.step(
                StepLog(
                    phase.name,
                    epoch,
                    phase.epochs,
                    seen,
                    steps,
                    float(losses[-1]),
                    stretch.before + epoch,
                    stretch.total,
                )
            )
    if not seen:
        raise ConfigError(NO_BATCH)
    return losses


def _dealt(stretch: _Stretch, epoch: int) -> Iterator[tuple[list[Batch], int]]:
    """Yields this process's batches of every optimizer step, and how many all processes have in it.

    Batch ``k`` of a step goes to process ``k mod world size``, so that N processes see what one process with N times
    the accumulation sees. The last step of an epoch may be smaller, and empty for some processes.
    """
    batches, number = dealt(stretch.run.batches_), 0
    size = stretch.run.settings.accumulation_steps * world_size()
    window: list[Batch] = []
    while True:
        try:
            batch, own = next(batches)
        except StopIteration:
            break
        except NniPruneExtError:
            raise
        except Exception as error:
            raise TrainingError(
                f"The training data raised {type(error).__name__} after {number} batches of epoch {epoch + 1} of phase "
                f"'{stretch.phase.name}': {error}. Expected batches. Mend the data."
            ) from error
        number += 1
        window += [batch] if own else []
        if number % size == 0:
            yield window, size
            window = []
    if number % size:
        yield window, number % size


def _step(stretch: _Stretch, own: list[Batch], count: int, epoch: int, number: int) -> list[Tensor]:
    """Runs this process's batches of one optimizer step, of ``count`` batches in all processes together."""
    method, run = stretch.method, stretch.run
    device = next(run.model.parameters()).device
    bf16, trains, losses = run.settings.precision == "bf16", bool(run.optimizers), []
    with memory_explained(own):
        for optimizer in run.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for given in own:
            batch = send_to_device(given, device)
            if run.settings.channels_last:
                batch = channels_last(batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16), torch.set_grad_enabled(trains):
                loss = _checked_loss(method.compute_loss(run, batch), trains)
            if (device.type == "cpu" or number % _CUDA_CHECK_STEPS == 0) and not math.isfinite(float(loss.detach())):
                raise _no_number(stretch, epoch, number, float(loss.detach()))
            if trains:
                (loss if count == 1 else loss / count).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        if trains:
            _move_weights(method, run)
        method.after_step(run)
    return losses


def _checked_loss(loss: object, trains: bool) -> Tensor:
    """Returns what a loss function gave, if it can be minimised."""
    if isinstance(loss, Tensor) and loss.numel() == 1 and (loss.requires_grad or not trains):
        return loss.reshape(())
    found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
    if isinstance(loss, Tensor) and loss.numel() == 1:
        found += " without a gradient"
    raise ConfigError(
        f"The loss function returned {found}, expected a scalar tensor with a gradient. Return for example "
        "functional.cross_entropy(model(images), labels), without .item() or .detach()."
    )


def _move_weights(method: PruningMethod, run: MethodRun) -> None:
    parameters = [p for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]]
    sum_gradients(parameters)
    method.after_backward(run)
    if run.settings.max_gradient_norm is not None:
        for optimizer in run.optimizers:  # each by itself: what a method trains must not shrink the network's steps
            own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(own, run.settings.max_gradient_norm)
    for optimizer in run.optimizers:
        optimizer.step()


def _mean_loss(losses: list[Tensor], model: nn.Module) -> float:
    device = next(model.parameters()).device
    total = torch.stack(losses).double().sum() if losses else torch.zeros((), dtype=torch.float64, device=device)
    sums = averaged({"total": total, "count": torch.tensor(float(len(losses)), dtype=torch.float64, device=device)})
    return float(sums["total"] / sums["count"])


def _metric(run: MethodRun) -> float | None:
    if run.evaluate is None:
        return None
    with modes_kept(run.model), torch.no_grad():
        return from_main(float(run.evaluate(run.model)))


def _save(stretch: _Stretch, epochs: int, *, finished: bool) -> None:
    run = stretch.run
    if run.checkpoints is None or not is_main():
        return
    method_tensors, method_values = stretch.method.state_dict()
    optimizer_values, optimizer_tensors = optimizer_states(run.optimizers)
    random_values, random_tensors = random_states(run.model, run.batches_)
    values: dict[str, Json] = {
        "phase": stretch.number,
        "name": stretch.phase.name,
        "epochs": epochs,
        "finished": finished,
        "applied": None if run.applied is None else run.applied.to_json(),
        "method": cast("Json", method_values),
        "method_on_device": [name for name, tensor in method_tensors.items() if tensor.device.type != "cpu"],
        "logs": [asdict(log) for log in run.logs],
        "notes": [dict(note) for note in run.notes],
        **optimizer_values,
        **random_values,
    }
    tensors = {
        **with_prefix("model", model_tensors(run.model)),
        **with_prefix("method", method_tensors),
        **with_prefix("optimizer", optimizer_tensors),
        **with_prefix("random", random_tensors),
    }
    run.checkpoints.save(values, tensors)


def _restored(method: PruningMethod, run: MethodRun, phases: list[Phase], saved: Saved) -> _Place:
    """Puts model, method, records and the data's order back; optimizers and random states follow within the phase."""
    values = cast("dict[str, Any]", saved.values)
    place = _Place(values["phase"], values["epochs"], values["finished"])
    before = sum(phase.epochs for phase in phases[: place.phase]) + place.epochs
    if place.phase >= len(phases) or phases[place.phase].name != values["name"]:
        raise CheckpointError(
            f"The checkpoint stands in phase {place.phase + 1}, '{values['name']}', but the method has the phases "
            f"{', '.join(repr(phase.name) for phase in phases)}. Expected the same method and options. Start anew."
        )
    if values["applied"] is not None:
        run.cut_again(PruningPlan.from_json(values["applied"]))
    load_model_tensors(run.model, under_prefix("model", saved.tensors))
    state, device = under_prefix("method", saved.tensors), next(run.model.parameters()).device
    state |= {name: state[name].to(device) for name in values["method_on_device"]}
    method.load_state_dict(state, cast("JsonState", values["method"]))
    if before:
        _announce_epoch(run.batches_, before - 1)
    load_loader_states(run.batches_, under_prefix("random", saved.tensors))
    run.logs[:] = [EpochLog(**log) for log in values["logs"]]
    run.notes[:] = values["notes"]
    epochs = phases[place.phase].epochs
    where = f"after epoch {place.epochs} of {epochs} of " if epochs else "after "
    run.watcher.note(f"continued from checkpoint {saved.number}, {where}phase '{values['name']}'")
    return place


def _restore_machinery(run: MethodRun, saved: Saved) -> None:
    values = cast("dict[str, Any]", saved.values)
    load_optimizer_states(run.optimizers, values["optimizers"], under_prefix("optimizer", saved.tensors))
    load_random_states(run.model, run.batches_, values["random"], under_prefix("random", saved.tensors))


def _check_weights(stretch: _Stretch, epoch: int) -> None:
    """Refuses weights that the last step of an epoch has destroyed: they must not be saved as good."""
    parameters = dict(stretch.run.model.named_parameters())
    finite = torch.stack([parameter.isfinite().all() for parameter in parameters.values()])
    if not bool(finite.all()):
        name = next(name for name, fine in zip(parameters, finite.tolist()) if not fine)
        raise TrainingError(
            f"'{name}' is not finite after epoch {epoch + 1} of phase '{stretch.phase.name}', expected finite weights. "
            f"Lower the learning rate ({stretch.run.settings.learning_rate:g}), or clip gradients (max_gradient_norm)."
        )


def _no_number(stretch: _Stretch, epoch: int, step: int | None, loss: float) -> TrainingError:
    where = f"epoch {epoch + 1} of phase '{stretch.phase.name}'"
    return TrainingError(
        f"The loss is {loss} in {where if step is None else f'step {step + 1} of {where}'}, expected a finite number. "
        f"Lower the learning rate ({stretch.run.settings.learning_rate:g}), or check loss and data."
    )


def _announce_epoch(batches: Batches, epoch: int) -> None:
    for holder in (batches, getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)):
        set_epoch = getattr(holder, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


def _length(batches: Batches) -> int | None:
    size = getattr(batches, "__len__", None)
    try:
        return None if size is None else int(size())
    except TypeError:  # what a DataLoader over an iterable data set raises
        return None
