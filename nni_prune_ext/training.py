"""Training loops: plain fitting, the crank that drives any pruning method, and batch-norm recalibration."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Optimizer

from nni_prune_ext.allocation import Allocation, CostModel, Limits, Reference, Scope, Target, allocate
from nni_prune_ext.certificate import remove_channels
from nni_prune_ext.costs import count_costs
from nni_prune_ext.errors import ConfigError
from nni_prune_ext.graph.channel_groups import ChannelGroups, trace_channel_groups
from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.methods.base import Batch, Outcome, Phase, PruningMethod
from nni_prune_ext.plan import PruningPlan
from nni_prune_ext.surgery import Removal, remap_optimizer, slice_state

Batches: TypeAlias = Iterable[Batch]
"""Anything that can be iterated once per epoch; ``set_epoch(n)`` is called first where it exists."""
LossFunction: TypeAlias = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class TrainingSettings:
    """How weights are trained: SGD with momentum, a cosine from ``learning_rate`` to 0 over each phase.

    Attributes:
        precision: ``bf16`` runs forward and loss under autocast; parameters stay in their own dtype.
        channels_last: trains in channels-last memory format and puts the model back afterwards.
    """

    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False


@dataclass(frozen=True)
class EpochLog:
    """One epoch: its phase, mean loss, learning rate at the end, seconds."""

    phase: str
    epoch: int
    loss: float
    learning_rate: float
    seconds: float


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the classification loss of ``(images, labels)``, a scalar."""
    images, labels = batch
    return functional.cross_entropy(model(images), labels)


def fit(
    model: nn.Module,
    batches: Batches,
    *,
    epochs: int,
    settings: TrainingSettings | None = None,
    loss: LossFunction = cross_entropy,
    on_epoch: Callable[[EpochLog], None] | None = None,
) -> list[EpochLog]:
    """Trains all parameters of a model that require gradients, in place.

    Args:
        batches: iterated once per epoch.
        on_epoch: is told about every finished epoch.

    Returns:
        one log per epoch.
    """
    run = MethodRun(model=model, batches_=batches, loss=loss, settings=settings or TrainingSettings(), on_epoch=on_epoch)
    return run.train(PruningMethod(), Phase("fit", epochs), start=0, total=max(epochs, 1))


def recalibrate_batchnorm(model: nn.Module, batches: Batches, *, count: int = 100) -> None:
    """Re-estimates running statistics of all batch norms as the plain average over ``count`` batches, in place.

    Channels were removed, so means and variances behind them have moved; this repairs them without training.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        with torch.no_grad():
            for batch in islice(batches, count):
                model(_inputs_of(batch))
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        for module, mode in training:
            module.training = mode


def accuracy(model: nn.Module, batches: Batches) -> float:
    """Returns top-1 accuracy (0–1) over ``(images, labels)`` batches in evaluation mode."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    right = total = 0
    try:
        with torch.no_grad():
            for images, labels in batches:
                right += int((model(images).argmax(1) == labels).sum())
                total += len(labels)
    finally:
        for module, mode in training:
            module.training = mode
    return right / total if total else math.nan


def checked_settings(
    *, learning_rate: float = 0.01, momentum: float = 0.9, weight_decay: float = 5e-4, precision: str = "fp32",
    channels_last: bool = False,
) -> TrainingSettings:
    """Returns training settings.

    Raises:
        ConfigError: a value is out of range.
    """
    if not learning_rate > 0 or not 0 <= momentum < 1 or not weight_decay >= 0:
        raise ConfigError(
            f"learning_rate={learning_rate:g}, momentum={momentum:g}, weight_decay={weight_decay:g} are not usable. Expected a "
            "positive rate, a momentum in [0, 1) and a weight decay of at least 0."
        )
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"The precision is '{precision}', expected 'fp32' or 'bf16'. Choose one.")
    return TrainingSettings(learning_rate, momentum, weight_decay, cast("Literal['fp32', 'bf16']", precision), channels_last)


def drive(method: PruningMethod, run: MethodRun) -> Outcome:
    """Runs all phases of a method and returns what it hands over; ``run.applied`` holds what was cut on the way."""
    phases = list(method.phases())
    total = max(sum(phase.epochs for phase in phases), 1)
    done = 0
    for phase in phases:
        run.logs.extend(run.train(method, phase, start=done, total=total))
        done += phase.epochs
    run.progress = 1.0
    return method.finish(run)


@dataclass
class MethodRun:
    """The :class:`~nni_prune_ext.methods.base.MethodContext` of our own loop."""

    model: nn.Module
    batches_: Batches = ()
    loss: LossFunction = cross_entropy
    settings: TrainingSettings = field(default_factory=TrainingSettings)
    example_inputs: ExampleInputs = ()
    groups: ChannelGroups = field(default_factory=lambda: ChannelGroups((), (), {}))
    targets: Sequence[Target] = ()
    limits: Limits = field(default_factory=Limits)
    scope: Scope = "global"
    seed: int = 0
    on_epoch: Callable[[EpochLog], None] | None = None
    progress: float = 0.0
    applied: PruningPlan | None = None
    logs: list[EpochLog] = field(default_factory=list)
    notes: list[dict[str, float]] = field(default_factory=list)
    _method: PruningMethod | None = None
    _optimizers: list[Optimizer] = field(default_factory=list)
    _reference: Reference | None = None
    _kept: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def batches(self, count: int) -> list[Batch]:
        """Returns the first ``count`` training batches of the current order."""
        return list(islice(self.batches_, count))

    def task_loss(self, batch: Batch) -> Tensor:
        """Returns the user's loss of the current model."""
        return self.loss(self.model, batch)

    def allocate(
        self, scores: Mapping[str, Tensor], *, fraction: float = 1.0, ratios: Mapping[str, float] | None = None
    ) -> Allocation:
        """Plans on the current model towards the targets of the dense one."""
        cost_model = self._cost_model()
        return allocate(
            scores, cost_model, targets=self.targets, limits=self.limits, scope=self.scope, ratios=ratios,
            fraction=fraction, reference=self._reference,
        )

    def apply(self, plan: PruningPlan) -> Removal:
        """Cuts now, certified; optimizers of the running phase follow and the method is told."""
        self._cost_model()
        removal = remove_channels(self.model, plan, self.example_inputs, groups=self.groups, seed=self.seed)
        for optimizer in self._optimizers:
            remap_optimizer(optimizer, self.model, removal)
        self.applied = plan if self.applied is None else self.applied.then(plan)
        for tensor, dims in removal.kept.items():
            own = self._kept.setdefault(tensor, {})
            for dim, index in dims.items():
                own[dim] = own[dim][index] if dim in own else index
        protected = {p.root: p.reason for p in self.groups.protected}
        self.model = removal.model
        traced = trace_channel_groups(self.model, self.example_inputs)
        self.groups = traced.protecting({g.name: protected[g.name] for g in traced if g.name in protected})
        if self._method is not None:
            self._method.on_removed(removal)
        return removal

    def rewind(self, state: Mapping[str, Tensor]) -> None:
        """Loads a state dict of the dense model into the current one, cut like it."""
        own = self.model.state_dict()
        self.model.load_state_dict({key: value for key, value in slice_state(state, self._kept).items() if key in own})

    def log(self, values: Mapping[str, float]) -> None:
        """Keeps numbers, with the progress at which they arose."""
        self.notes.append({"progress": self.progress, **values})

    def train(self, method: PruningMethod, phase: Phase, *, start: int, total: int) -> list[EpochLog]:
        """Runs one phase of a method: epochs ``start …`` of ``total``."""
        self._method = method
        self.progress = start / total
        method.start(self, phase)
        if not phase.epochs:
            return []
        with _prepared(self, phase):
            self._optimizers = self._make_optimizers(phase)
            self.model.train()
            logs = [self._epoch(method, phase, epoch, start, total) for epoch in range(phase.epochs)]
            self._optimizers = []
        return logs

    def _epoch(self, method: PruningMethod, phase: Phase, epoch: int, start: int, total: int) -> EpochLog:
        began, losses = time.perf_counter(), []
        set_epoch = getattr(self.batches_, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(start + epoch)
        steps = _length(self.batches_)
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self._optimizers]
        for step, batch in enumerate(self.batches_):
            done = (epoch + step / steps) / phase.epochs
            self.progress = (start + epoch + step / steps) / total
            self._set_rates(phase, done)
            losses.append(self._step(method, batch))
        self.progress = (start + epoch + 1) / total
        method.after_epoch(self, phase, epoch)
        if not losses:
            raise ConfigError("The training data gave no batch, expected at least one. Lower the batch size or check the data.")
        rate = rates[0][0] if rates and rates[0] else 0.0
        log = EpochLog(phase.name, epoch, float(torch.stack(losses).mean()), rate, time.perf_counter() - began)
        if self.on_epoch is not None:
            self.on_epoch(log)
        return log

    def _step(self, method: PruningMethod, batch: Batch) -> Tensor:
        device = next(self.model.parameters()).device
        bf16 = self.settings.precision == "bf16"
        if self.settings.channels_last:
            batch = _channels_last(batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = method.compute_loss(self, batch)
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        method.after_backward(self)
        for optimizer in self._optimizers:
            optimizer.step()
        method.after_step(self)
        return loss.detach()

    def _make_optimizers(self, phase: Phase) -> list[Optimizer]:
        if phase.optimizers is not None:
            return list(phase.optimizers(self))
        s = self.settings
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        rate = s.learning_rate * phase.learning_rate_scale
        return [SGD(parameters, lr=rate, momentum=s.momentum, weight_decay=s.weight_decay)]

    def _set_rates(self, phase: Phase, done: float) -> None:
        if phase.optimizers is None:
            rate = self.settings.learning_rate * phase.learning_rate_scale * 0.5 * (1 + math.cos(math.pi * done))
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate

    def _cost_model(self) -> CostModel:
        model = CostModel.of(self.model, self.groups, count_costs(self.model, self.example_inputs))
        if self._reference is None:
            self._reference = Reference.of(model)
        return model


@contextmanager
def _prepared(run: MethodRun, phase: Phase) -> Iterator[None]:
    """Sets mode, trainable parameters and memory format; restores them on the model that is current at the end."""
    training = run.model.training
    required = {name: parameter.requires_grad for name, parameter in run.model.named_parameters()}
    for name, parameter in run.model.named_parameters():
        parameter.requires_grad_(phase.trainable(name) if phase.trainable is not None else required[name])
    if run.settings.channels_last:
        run.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        yield
    finally:
        run.model.train(training)
        for name, parameter in run.model.named_parameters():
            parameter.requires_grad_(required[name])
        if run.settings.channels_last:
            run.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _channels_last(batch: Batch) -> Batch:
    if isinstance(batch, Tensor):
        return batch.contiguous(memory_format=torch.channels_last) if batch.dim() == 4 else batch
    if isinstance(batch, (tuple, list)):
        return type(batch)(_channels_last(item) for item in batch)
    return batch


def _inputs_of(batch: Batch) -> Tensor:
    return cast("Tensor", batch[0] if isinstance(batch, (tuple, list)) else batch)


def _length(batches: Batches) -> int:
    size = getattr(batches, "__len__", None)
    return max(int(size()), 1) if size is not None else 1
