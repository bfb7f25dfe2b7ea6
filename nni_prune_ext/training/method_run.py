"""What our own loop offers to a pruning method: the :class:`~nni_prune_ext.methods.base.MethodContext` of a run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim import Optimizer

from nni_prune_ext.allocation import (
    Allocation,
    CostModel,
    Limits,
    PredictedLatency,
    Reference,
    Scope,
    Target,
    allocate,
    masked_counts,
    sparsity_of,
)
from nni_prune_ext.certificate import remove_channels
from nni_prune_ext.checkpoints import Checkpoints
from nni_prune_ext.costs import count_costs
from nni_prune_ext.errors import ConfigError
from nni_prune_ext.graph.channel_groups import ChannelGroups, trace_channel_groups
from nni_prune_ext.graph.model_copy import named_tensors
from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.methods.base import Batch, Phase, PruningMethod, Unit
from nni_prune_ext.plan import PruningPlan
from nni_prune_ext.surgery import Kept, Removal, cut_channels, remap_optimizer, slice_state
from nni_prune_ext.training.processes import apart, averaged, from_main
from nni_prune_ext.training.run_state import cuda_devices, loader_generators, random_kept
from nni_prune_ext.training.settings import (
    Batches,
    EpochLog,
    Evaluate,
    LossFunction,
    TrainingSettings,
    Watcher,
    cross_entropy,
)

NO_BATCH = "The training data gave no batch, expected at least one. Lower the batch size or check the data."


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Makes torch (on the CPU and the model's devices), numpy and Python draw from ``seed``.

    Afterwards the global generators are as before.
    """
    devices = cuda_devices(model)
    with random_kept(devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield


@dataclass
class MethodRun:
    """One run of a method over a model and data; ``apply`` replaces ``model`` and ``groups``.

    Attributes:
        evaluate: measures a validation metric after every epoch.
        checkpoints: where the run is saved after every epoch and every cut, and continued from.
        applied: all cuts so far, in the coordinates of the first model.
        metric: the last validation metric.
        latency: predicts the latency from shapes, where a target is about it.
        stop: set by the method of plain training to end its phase early.
        attached: the phase whose hooks are on the model.
        host_epoch: trains one epoch in the place of the loop's own steps and returns the losses: for hosts that keep
            data and default optimizer to themselves. It calls the method's hooks around every step.
    """

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
    watcher: Watcher = field(default_factory=Watcher)
    evaluate: Evaluate | None = None
    checkpoints: Checkpoints | None = None
    latency: PredictedLatency | None = None
    progress: float = 0.0
    applied: PruningPlan | None = None
    logs: list[EpochLog] = field(default_factory=list)
    notes: list[dict[str, float]] = field(default_factory=list)
    metric: float | None = None
    stop: bool = False
    method: PruningMethod | None = None
    attached: Phase | None = None
    default_optimizer: Optimizer | None = None
    optimizers: list[Optimizer] = field(default_factory=list)
    host_epoch: Callable[[PruningMethod], list[Tensor]] | None = None
    _leaving: ExitStack = field(default_factory=ExitStack)
    _costs: CostModel | None = None
    _reference: Reference | None = None
    _kept: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    @property
    def unit(self) -> Unit:
        """Says whether channels or single weights were asked for."""
        return "channel" if sparsity_of(self.targets) is None else "weight"

    @property
    def maskable(self) -> tuple[str, ...]:
        """Returns the weights of all convolutions that the limits do not exclude, if single weights were asked for."""
        if self.unit == "channel":
            return ()
        layers = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.modules.conv._ConvNd)}
        return tuple(
            name
            for name, parameter in self.model.named_parameters()
            if id(parameter) in layers and not self.limits.excludes(name.removesuffix(".weight"))
        )

    def batches(self, count: int) -> list[Batch]:
        """Returns the first ``count`` training batches of the current order; the loop's own order does not move.

        They are on the model's device. Several processes get the same ones.

        Raises:
            ConfigError: there is none.
        """
        before = [(own, own.get_state()) for own in loader_generators(self.batches_)]
        with random_kept():
            found = list(islice(apart(self.batches_), count))
        for own, state in before:
            own.set_state(state)
        if count and not found:
            raise ConfigError(NO_BATCH)
        device = next(self.model.parameters()).device
        return [send_to_device(batch, device) for batch in found]

    def task_loss(self, batch: Batch) -> Tensor:
        """Returns the user's loss of the current model, in the precision of the training."""
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            return self.loss(self.model, batch)

    def allocate(
        self, scores: Mapping[str, Tensor], *, fraction: float = 1.0, ratios: Mapping[str, float] | None = None
    ) -> Allocation:
        """Plans on the current model towards the targets of the dense one, on the processes' mean scores."""
        return allocate(
            averaged(scores),
            self.cost_model(),
            targets=self.targets,
            limits=self.limits,
            scope=self.scope,
            ratios=ratios,
            fraction=fraction,
            reference=self._reference,
        )

    def masked_counts(self, magnitudes: Mapping[str, Tensor], *, fraction: float = 1.0) -> dict[str, int]:
        """Plans the sparsity that was asked for: one threshold over all tensors, or one share of each (``scope``)."""
        sparsity = fraction * (sparsity_of(self.targets) or 0.0)
        return masked_counts(averaged(magnitudes), sparsity, scope=self.scope, limits=self.limits)

    def agreed(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns the means over all processes."""
        return averaged(tensors)

    def apply(self, plan: PruningPlan) -> Removal:
        """Cuts now, certified: what the method put on the model is taken off, optimizers follow, the method is told."""
        self.cost_model()
        self.leave()
        plan = from_main(plan)
        removal = remove_channels(self.model, plan, self.example_inputs, groups=self.groups, seed=self.seed)
        for optimizer in self.optimizers:
            remap_optimizer(optimizer, self.model, removal)
        self._follow(removal.model, plan, removal.kept)
        if self.method is not None:
            self.method.on_removed(self, removal)
            if self.attached is not None:
                self.method.attach(self, self.attached)
        return removal

    def cut_again(self, plan: PruningPlan) -> None:
        """Cuts the dense model along all that a saved run had cut; nobody is told, for they are restored as well."""
        removal = cut_channels(self.model, plan, self.example_inputs, groups=self.groups)
        self._follow(removal.model, plan, removal.kept)

    def rewind(self, state: Mapping[str, Tensor]) -> None:
        """Loads a state dict of the dense model into the current one, cut like it."""
        names = {id(tensor): name for name, tensor in named_tensors(self.model)}
        kept = {
            name: self._kept.get(names[id(tensor)], {})  # tied tensors are cut under the first of their names
            for name, tensor in self.model.state_dict(keep_vars=True).items()
            if id(tensor) in names
        }
        self.model.load_state_dict(slice_state(state, kept))

    @property
    def kept(self) -> Kept:
        """Returns tensor name → dimension → indices, in the first model, that the current one still has."""
        return self._kept

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
            costs = count_costs(self.model, self.example_inputs)
            self._costs = CostModel.of(self.model, self.groups, costs, self.latency)
        if self._reference is None:
            self._reference = Reference.of(self._costs)
        return self._costs

    def _follow(self, model: nn.Module, plan: PruningPlan, kept: Kept) -> None:
        self.applied = plan if self.applied is None else self.applied.then(plan)
        for tensor, dims in kept.items():
            own = self._kept.setdefault(tensor, {})
            for dim, index in dims.items():
                own[dim] = own[dim][index] if dim in own else index
        protected = {p.root: p.reason for p in self.groups.protected}
        after_cut = getattr(self.loss, "after_cut", None)  # a loss that reads feature maps, for example
        self.loss = self.loss if after_cut is None else after_cut(kept)
        self.model = model
        traced = trace_channel_groups(model, self.example_inputs)
        self.groups = traced.protecting({g.name: protected[g.name] for g in traced if g.name in protected})
        self._costs = None
        self.cost_model()
