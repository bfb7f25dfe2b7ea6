"""The main job: a model and example inputs go in, a certified compact model comes out.

groups → method → plan → certified removal → recovery. Deployment (ONNX, parity, measurement) follows in ``deployment``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate.utils import send_to_device
from pydantic import BaseModel
from torch import Tensor, nn

from nni_prune_ext.allocation import (
    Achieved,
    CostModel,
    Limits,
    Scope,
    Target,
    achieved_targets,
    check_feasible,
    counted_only,
    parse_targets,
    sparsity_of,
)
from nni_prune_ext.certificate import Certificate, verify_groups
from nni_prune_ext.checkpoints import Checkpoints, Json, fingerprint
from nni_prune_ext.costs import Costs, count_costs
from nni_prune_ext.errors import ConfigError, TargetError
from nni_prune_ext.graph.channel_groups import ChannelGroups, trace_channel_groups
from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.latency import LatencyConditions, LatencyEvidence, aim_at
from nni_prune_ext.method_cut import MethodCut, cut_by_method, cut_to_latency
from nni_prune_ext.methods.base import MethodSpec, Outcome, PruningMethod
from nni_prune_ext.methods.chosen_method import method_options as method_options
from nni_prune_ext.methods.chosen_method import method_spec as method_spec
from nni_prune_ext.methods.options import policy_with_data
from nni_prune_ext.plan import PruningPlan
from nni_prune_ext.training import (
    Batches,
    Distillation,
    EpochLog,
    Evaluate,
    LossFunction,
    MethodRun,
    TrainingSettings,
    Watcher,
    cross_entropy,
    distilled,
    fit,
    loss_identity,
    recalibrate_batchnorm,
)
from nni_prune_ext.training.processes import own_device, share_weights, world_size


@dataclass(frozen=True)
class PruneResult:
    """A compact model and everything that is known about how it came to be.

    Attributes:
        model: the compact model, recovered if recovery was asked for.
        plan: all removed channels in the coordinates of the original model.
        certificate: proof for the whole plan on the original architecture.
        groups: the channel groups that were open to pruning, and the protected layers with reasons.
        dense: costs of the original model.
        costs: costs of the compact model, counted (not predicted).
        achieved: every target, asked and reached.
        removed_only: the compact model as it was right after the cut, weight masks applied, before any recovery.
        outcome: what the method handed over (weight masks, cut to fit ``removed_only``; a gated model; facts).
        logs: one entry per training epoch of method and recovery.
        method: name of the method.
        seed: of everything random.
        notes: numbers that the method logged, each with the ``progress`` (0–1) at which they arose.
        latency: how a latency target was aimed at and measured; ``None`` without one.
    """

    model: nn.Module
    plan: PruningPlan
    certificate: Certificate | None
    groups: ChannelGroups
    dense: Costs
    costs: Costs
    achieved: tuple[Achieved, ...]
    removed_only: nn.Module
    outcome: Outcome
    logs: tuple[EpochLog, ...]
    method: str
    seed: int = 0
    notes: tuple[dict[str, float], ...] = ()
    latency: LatencyEvidence | None = None


def prune(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    method: str | MethodSpec = "l1",
    target: str | Target | Sequence[str | Target] = "macs=0.5",
    options: Mapping[str, object] | None = None,
    limits: Limits | None = None,
    scope: Scope = "global",
    train_batches: Batches | None = None,
    loss: LossFunction = cross_entropy,
    recover_epochs: int = 0,
    settings: TrainingSettings | None = None,
    evaluate: Evaluate | None = None,
    distillation: Distillation | None = None,
    groups: ChannelGroups | None = None,
    watcher: Watcher | None = None,
    checkpoints: Checkpoints | None = None,
    latency: LatencyConditions | None = None,
    seed: int = 0,
) -> PruneResult:
    """Prunes a copy of a model to one or several targets and certifies the removal.

    In several processes (``torchrun``, ``accelerate launch``) all of them call this alike and get the same result.

    Args:
        method: name of a registered pruner, or a specification that is not registered.
        target: for example ``"macs=0.5"``, or several that must all be met.
        options: configuration of the method.
        scope: ``global`` ranks all groups together, ``local`` prunes all at one ratio.
        train_batches: needed by data-driven methods, for BN recalibration and for recovery.
        loss: the user's loss of a model on a batch.
        recover_epochs: epochs of training after the cut.
        evaluate: a validation metric (higher is better), measured after every epoch of method and recovery; the
            recovery selects its weights by it. Never the test set.
        distillation: lets the dense model teach the compact one during recovery.
        groups: verified groups from an earlier call, to save the trace and the trial.
        watcher: is told how the training goes.
        checkpoints: where method and recovery are saved after every epoch and cut; an interrupted call with the same
            arguments continues there.
        latency: where and how a latency target is measured; ONNX Runtime on the CPU, one image, unless given.
        seed: of everything random.

    Returns:
        the compact model with plan, certificate, costs and logs; the given model is not changed.

    Raises:
        UnknownPluginError: no such method.
        ConfigError: options out of range, or data missing that the method or the recovery needs.
        TargetError: the target is out of range or cannot be reached.
        RuntimeUnavailableError: the runtime of a latency target cannot be used here.
        CertificateError: the final plan is not exact.
        TrainingError: the loss is no number, memory ran out, or the data raised.
        CheckpointError: the checkpoints belong to other arguments, or are all damaged.
    """
    spec = method_spec(method) if isinstance(method, str) else method
    targets = parse_targets(target)
    if world_size() > 1:
        device = own_device(next(model.parameters()).device)
        model, example_inputs = copy.deepcopy(model).to(device), send_to_device(example_inputs, device)
        share_weights(model)
    if recover_epochs < 0:
        raise ConfigError(f"recover_epochs is {recover_epochs}, expected 0 or more. Leave it out for no recovery.")
    settings = settings or TrainingSettings()
    chosen = method_options(spec, options)
    built = spec.build(chosen)
    watcher = watcher or Watcher()
    if train_batches is None:
        _refuse_without_data(spec, chosen, built, recover_epochs)
    groups = groups or verify_groups(model, example_inputs, trace_channel_groups(model, example_inputs), seed=seed)
    dense = count_costs(model, example_inputs)
    cost_model = CostModel.of(model, groups, dense)
    limits = limits or Limits()
    _check_unit(spec, targets, groups, limits)
    check_feasible(cost_model, counted_only(targets), limits)
    aim = aim_at(
        spec, model, example_inputs, cost_model, targets, limits=limits, scope=scope, conditions=latency,
        tell=watcher.note,
    )  # fmt: skip
    job = _Job(
        spec, chosen, targets, limits, scope, seed, settings, recover_epochs, distillation, loss,
        aim.stopwatch.conditions if aim else None,
    )  # fmt: skip
    saved = None if checkpoints is None else checkpoints.stage("prune", job.identity(model))
    trains = any(phase.epochs for phase in built.phases())
    measured_before = saved and saved.stage("latency")
    if aim is not None:
        aim.prepare(measured_before)
        limits = aim.limits
        if trains:
            aim.save(measured_before)

    def cut() -> MethodCut:
        run = MethodRun(
            model=copy.deepcopy(model),
            batches_=train_batches or (),
            loss=loss,
            settings=settings,
            groups=groups,
            example_inputs=example_inputs,
            targets=targets,
            limits=limits,
            scope=scope,
            watcher=watcher,
            evaluate=evaluate,
            checkpoints=saved.stage("method") if saved and (aim is None or trains) else None,
            latency=None if aim is None else aim.predictor,
            seed=seed,
        )
        return cut_by_method(spec, spec.build(chosen), run)

    if aim is None or trains:
        made, evidence = cut(), None
    else:
        made, evidence = cut_to_latency(spec.name, cut, aim)
        aim.save(measured_before)
    run, outcome, plan, certificate = made.run, made.outcome, made.plan, made.certificate(model, groups)
    recovery = replace(
        run,
        loss=run.loss if distillation is None else distilled(run.loss, model, distillation),
        checkpoints=saved and saved.stage("recovery"),
    )
    masks = outcome.weight_masks or {}
    removed_only = _masked(made.network, masks)
    compact, logs = _recovered(removed_only, recovery, train_batches, recover_epochs, masks, recalibrate=run.loss)
    costs = count_costs(compact, example_inputs)
    if aim is not None and (trains or recover_epochs):
        evidence = aim.final(compact, trained=trains)
    measured = None if evidence is None else (evidence.dense_ms, evidence.achieved_ms)
    return PruneResult(
        model=compact,
        plan=plan,
        certificate=certificate,
        groups=groups,
        dense=dense,
        costs=costs,
        achieved=achieved_targets(targets, cost_model, plan, costs, outcome.weight_masks, measured),
        removed_only=removed_only,
        outcome=outcome,
        logs=(*run.logs, *logs),
        method=spec.name,
        seed=seed,
        notes=tuple(run.notes),
        latency=evidence,
    )


@dataclass(frozen=True)
class _Job:
    """Everything that decides what comes out of a call; checkpoints of another job are refused."""

    spec: MethodSpec
    options: BaseModel
    targets: tuple[Target, ...]
    limits: Limits
    scope: Scope
    seed: int
    settings: TrainingSettings
    recover_epochs: int
    distillation: Distillation | None
    loss: LossFunction
    latency: LatencyConditions | None

    def identity(self, model: nn.Module) -> dict[str, Json]:
        """Returns it as JSON."""
        return {
            "method": self.spec.name,
            "options": self.options.model_dump(mode="json"),
            "targets": [str(target) for target in self.targets],
            "limits": self.limits.model_dump(mode="json"),
            "scope": self.scope,
            "seed": self.seed,
            "training": self.settings.model_dump(mode="json"),
            "recovery_epochs": self.recover_epochs,
            "distillation": None if self.distillation is None else self.distillation.model_dump(mode="json"),
            "loss": loss_identity(self.loss),
            "latency": None if self.latency is None else self.latency.model_dump(mode="json"),
            "processes": world_size(),
            "model": fingerprint(model),
        }


def _recovered(
    model: nn.Module,
    run: MethodRun,
    batches: Batches | None,
    epochs: int,
    masks: Mapping[str, Tensor],
    *,
    recalibrate: LossFunction,
) -> tuple[nn.Module, list[EpochLog]]:
    """Returns a copy with BN statistics measured anew and trained, as far as there is data."""
    compact = copy.deepcopy(model)
    if batches is None:
        return compact, []
    recalibrate_batchnorm(compact, batches, forward=recalibrate, seed=run.seed)
    if not epochs:
        return compact, []
    logs = fit(
        compact,
        batches,
        epochs=epochs,
        settings=run.settings,
        loss=run.loss,
        evaluate=run.evaluate,
        weight_masks=masks,
        watcher=run.watcher,
        checkpoints=run.checkpoints,
        name="recovery",
        seed=run.seed,
    )
    return compact, logs


def _masked(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Returns the model, or a copy in which masked weights are zero."""
    if not masks:
        return model
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in masked.named_parameters():
            if name in masks:
                parameter.mul_(masks[name].to(parameter.device))
    return masked


def _check_unit(spec: MethodSpec, targets: Sequence[Target], groups: ChannelGroups, limits: Limits) -> None:
    """Refuses to mask single weights with a method that removes channels only."""
    if sparsity_of(targets) is None:
        return
    limits.check(groups)
    if "weight_masks" not in spec.products:
        raise TargetError(
            f"The target {targets[0]} is about single weights, but the method '{spec.name}' removes channels only. "
            "Expected macs, params, memory or ratio. Ask for one of these, or use a method that makes weight masks "
            "(`nni-prune-ext list` shows what each hands over)."
        )


def _refuse_without_data(spec: MethodSpec, options: BaseModel, method: PruningMethod, recover_epochs: int) -> None:
    policy = policy_with_data(options)
    if spec.needs_data:
        what = f"The method '{spec.name}'"
    elif policy is not None:
        what = f"The ratio policy '{getattr(options, policy)}' of method '{spec.name}'"
    elif any(phase.epochs for phase in method.phases()):
        what = f"The method '{spec.name}' with training between its steps"
    elif recover_epochs:
        what = f"Recovery over {recover_epochs} epochs"
    else:
        return
    raise ConfigError(f"{what} needs training data, none was given. Pass train_batches (CLI: --data).")
