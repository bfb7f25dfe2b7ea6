"""The crank that drives any pruning method through its phases; plain fitting is a method that does nothing else."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn
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
from nni_prune_ext.training.settings import Batches, EpochLog, LossFunction, TrainingSettings, cross_entropy

_PHASE_SEEDS = 1_000_003
"""Distance between the seeds of a run's phases."""
_NO_BATCH = "The training data gave no batch, expected at least one. Lower the batch size or check the data."


def fit(
    model: nn.Module,
    batches: Batches,
    *,
    epochs: int,
    settings: TrainingSettings | None = None,
    loss: LossFunction = cross_entropy,
    on_epoch: Callable[[EpochLog], None] | None = None,
    name: str = "fit",
) -> list[EpochLog]:
    """Trains all parameters of a model that require gradients, in place.

    Args:
        batches: iterated once per epoch.
        on_epoch: is told about every finished epoch.
        name: of the phase, in the logs.

    Returns:
        one log per epoch.

    Raises:
        ConfigError: there is no batch or nothing to train, or the loss is no longer a number.
    """
    run = MethodRun(
        model=model, batches_=batches, loss=loss, settings=settings or TrainingSettings(), on_epoch=on_epoch
    )
    return run.train(PruningMethod(), Phase(name, epochs), start=0, total=max(epochs, 1))


def drive(method: PruningMethod, run: MethodRun, *, first_phase: int = 0) -> Outcome:
    """Runs all phases of a method and returns what it hands over; ``run.applied`` holds what was cut on the way.

    Every phase draws its random numbers from the run's seed and its own position, so a run that is resumed at a phase
    continues as if it had never stopped.

    Args:
        first_phase: position of the phase to begin with; earlier ones count as done, and run and method hold what
            they left.
    """
    phases = list(method.phases())
    total = max(sum(phase.epochs for phase in phases), 1)
    done = sum(phase.epochs for phase in phases[:first_phase])
    if len(run.groups):
        run.cost_model()  # before any hook of the method can see this forward pass
    for position, phase in enumerate(phases[first_phase:], first_phase):
        with seeded(run.model, run.seed + _PHASE_SEEDS * position):
            run.logs.extend(run.train(method, phase, start=done, total=total))
        done += phase.epochs
    run.progress = 1.0
    with seeded(run.model, run.seed + _PHASE_SEEDS * len(phases)):
        return method.finish(run)


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Makes torch draw from ``seed`` on the CPU and the model's devices; afterwards random states are as before."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


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
    _default_optimizer: Optimizer | None = None
    _optimizers: list[Optimizer] = field(default_factory=list)
    _leaving: ExitStack = field(default_factory=ExitStack)
    _costs: CostModel | None = None
    _reference: Reference | None = None
    _kept: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def batches(self, count: int) -> list[Batch]:
        """Returns the first ``count`` training batches of the current order; the loop's own order does not move.

        Raises:
            ConfigError: there is none.
        """
        generator = (
            getattr(self.batches_, "generator", None) or torch.Generator()
        )  # a DataLoader's own, where it has one
        state = generator.get_state()
        with torch.random.fork_rng(devices=[]):
            found = list(islice(self.batches_, count))
        generator.set_state(state)
        if count and not found:
            raise ConfigError(_NO_BATCH)
        return found

    def task_loss(self, batch: Batch) -> Tensor:
        """Returns the user's loss of the current model."""
        return self.loss(self.model, batch)

    def allocate(
        self, scores: Mapping[str, Tensor], *, fraction: float = 1.0, ratios: Mapping[str, float] | None = None
    ) -> Allocation:
        """Plans on the current model towards the targets of the dense one."""
        return allocate(
            scores,
            self.cost_model(),
            targets=self.targets,
            limits=self.limits,
            scope=self.scope,
            ratios=ratios,
            fraction=fraction,
            reference=self._reference,
        )

    def apply(self, plan: PruningPlan) -> Removal:
        """Cuts now, certified: what the method put on the model is taken off, optimizers follow, the method is told."""
        self.cost_model()
        self.leave()
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
        self._costs = None
        self.cost_model()
        if self._method is not None:
            self._method.on_removed(self, removal)
        return removal

    def rewind(self, state: Mapping[str, Tensor]) -> None:
        """Loads a state dict of the dense model into the current one, cut like it."""
        self.model.load_state_dict(slice_state(state, self._kept))

    def log(self, values: Mapping[str, float]) -> None:
        """Keeps numbers, with the progress at which they arose."""
        self.notes.append({"progress": self.progress, **values})

    def on_leave(self, undo: Callable[[], object]) -> None:
        """Calls ``undo`` at the end of the phase, however it ends, or before a cut."""
        self._leaving.callback(undo)

    def leave(self) -> None:
        """Takes off what the method put on the model."""
        self._leaving.close()

    def cost_model(self) -> CostModel:
        """Returns the costs of the current model; those of the first one are the reference of targets and limits."""
        if self._costs is None:
            self._costs = CostModel.of(self.model, self.groups, count_costs(self.model, self.example_inputs))
        if self._reference is None:
            self._reference = Reference.of(self._costs)
        return self._costs

    def train(self, method: PruningMethod, phase: Phase, *, start: int, total: int) -> list[EpochLog]:
        """Runs one phase of a method: epochs ``start …`` of ``total``."""
        self._method = method
        self.progress = start / total
        with _prepared(self, phase):
            method.start(self, phase)
            if not phase.epochs:
                return []
            self._make_optimizers(phase)
            return [self._epoch(method, phase, epoch, start, total) for epoch in range(phase.epochs)]

    def _epoch(self, method: PruningMethod, phase: Phase, epoch: int, start: int, total: int) -> EpochLog:
        began, losses = time.perf_counter(), []
        set_epoch = getattr(self.batches_, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(start + epoch)
        steps = _length(self.batches_)
        for step, batch in enumerate(self.batches_):
            share = min(step / steps, 1.0) if steps else 0.0
            self.progress = (start + epoch + share) / total
            self._set_rate(phase, (epoch + share) / phase.epochs)
            losses.append(self._step(method, batch))
        if not losses:
            raise ConfigError(_NO_BATCH)
        rates = [group["lr"] for optimizer in self._optimizers for group in optimizer.param_groups]
        mean, rate = float(torch.stack(losses).mean()), float(rates[0]) if rates else 0.0
        if not math.isfinite(mean):
            raise ConfigError(
                f"The mean loss of epoch {epoch + 1} of phase '{phase.name}' is {mean}, expected a "
                "finite number. Lower the "
                f"learning rate ({self.settings.learning_rate:g}), or check loss and data."
            )
        self.progress = (start + epoch + 1) / total
        method.after_epoch(self, phase, epoch)
        log = EpochLog(phase.name, epoch, mean, rate, time.perf_counter() - began)
        if self.on_epoch is not None:
            self.on_epoch(log)
        return log

    def _step(self, method: PruningMethod, batch: Batch) -> Tensor:
        device = next(self.model.parameters()).device
        bf16 = self.settings.precision == "bf16"
        if self.settings.channels_last:
            batch = _channels_last(batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16), torch.set_grad_enabled(bool(self._optimizers)):
            loss = method.compute_loss(self, batch)
        if self._optimizers:
            for optimizer in self._optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            method.after_backward(self)
            for optimizer in self._optimizers:
                optimizer.step()
        method.after_step(self)
        return loss.detach()

    def _make_optimizers(self, phase: Phase) -> None:
        """Makes the method's optimizers, and the loop's own over all trainable parameters that none of them holds."""
        own = [] if phase.optimizers is None else list(phase.optimizers(self))
        held = {id(p) for optimizer in own for group in optimizer.param_groups for p in group["params"]}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in held]
        s = self.settings
        rate = s.learning_rate * phase.learning_rate_scale
        self._default_optimizer = SGD(rest, lr=rate, momentum=s.momentum, weight_decay=s.weight_decay) if rest else None
        self._optimizers = own if self._default_optimizer is None else [self._default_optimizer, *own]
        if not self._optimizers and phase.trainable is None:
            raise ConfigError(
                f"Phase '{phase.name}' has nothing to train: no parameter of "
                f"{type(self.model).__name__} requires a gradient. "
                "Unfreeze some, or train for 0 epochs."
            )

    def _set_rate(self, phase: Phase, done: float) -> None:
        if self._default_optimizer is not None:
            rate = self.settings.learning_rate * phase.learning_rate_scale * 0.5 * (1 + math.cos(math.pi * done))
            for group in self._default_optimizer.param_groups:
                group["lr"] = rate


@contextmanager
def _prepared(run: MethodRun, phase: Phase) -> Iterator[None]:
    """Sets modes, trainable parameters and memory format; restores them on the model that is current at the end."""
    modes = {name: module.training for name, module in run.model.named_modules()}
    required = {name: parameter.requires_grad for name, parameter in run.model.named_parameters()}
    for name, parameter in run.model.named_parameters():
        parameter.requires_grad_(phase.trainable(name) if phase.trainable is not None else required[name])
    if phase.epochs:
        run.model.train()
    formatted = run.settings.channels_last and bool(phase.epochs)
    formatted = formatted and all(p.is_contiguous() for p in run.model.parameters())
    if formatted:
        run.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        yield
    finally:
        run._default_optimizer, run._optimizers = None, []
        for name, module in run.model.named_modules():
            module.training = modes.get(name, module.training)
        for name, parameter in run.model.named_parameters():
            parameter.requires_grad_(required.get(name, parameter.requires_grad))
            parameter.grad = None
        if formatted:
            run.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        run.leave()


def _channels_last(batch: Batch) -> Batch:
    if isinstance(batch, Tensor):
        return batch.contiguous(memory_format=torch.channels_last) if batch.dim() == 4 else batch
    if isinstance(batch, (tuple, list)):
        return type(batch)(_channels_last(item) for item in batch)
    return batch


def _length(batches: Batches) -> int | None:
    size = getattr(batches, "__len__", None)
    return None if size is None else int(size())
