"""The bench on which methods are checked: a tiny network with data, and a method that is watched or reborn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from nni_prune_ext.allocation import Limits, Target
from nni_prune_ext.certificate import verify_groups
from nni_prune_ext.graph.channel_groups import ChannelGroups, trace_channel_groups
from nni_prune_ext.methods.base import (
    Batch,
    JsonState,
    MethodContext,
    MethodSpec,
    Outcome,
    Phase,
    PruningMethod,
)
from nni_prune_ext.pipeline import PruneResult, method_options, prune
from nni_prune_ext.plan import PruningPlan
from nni_prune_ext.surgery import Removal
from nni_prune_ext.training import LossFunction, MethodRun, TrainingSettings, cross_entropy

TARGETS = (Target("macs", 0.6), Target("params", 0.7))
LIMITS = Limits(max_ratio=0.75, min_channels=2, exclude=("whole.*",))


class BenchNet(nn.Module):
    """Convolutions with batch norm: a residual stream, a depthwise one, and a layer that must stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inside, self.back = _block(3, 12), _block(12, 16), _block(16, 12)
        self.depthwise, self.whole = _block(12, 12, groups=12), _block(12, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``(N, 3, 8, 8)`` to ``(N, 4)``."""
        x = self.stem(images)
        x = self.whole(self.depthwise(x + self.back(self.inside(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Bench:
    """One method with its options, and everything that it is run on."""

    spec: MethodSpec
    options: Mapping[str, object]
    model: nn.Module
    example: Tensor
    batches: Sequence[Batch]
    groups: ChannelGroups

    @classmethod
    def of(cls, spec: MethodSpec, options: Mapping[str, object]) -> Bench:
        """Makes the network and its data from fixed seeds; the model is in training mode, as users forget it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = BenchNet()
        generator = torch.Generator().manual_seed(1)
        batches = [
            (torch.randn(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator))
            for _ in range(3)
        ]
        example = batches[0][0][:2]
        groups = verify_groups(model, example, trace_channel_groups(model, example))
        return cls(spec, options, model, example, batches, groups)

    def configured(self) -> BaseModel:
        """Returns the checked options."""
        return method_options(self.spec, self.options)

    def prune(self, *, seed: int = 0, with_data: bool = True) -> PruneResult:
        """Runs the whole pipeline."""
        return prune(
            self.model, self.example, method=self.spec, target=TARGETS, options=self.options, limits=LIMITS,
            train_batches=self.batches if with_data else None, groups=self.groups, seed=seed,
        )  # fmt: skip

    def run(self, loss: LossFunction = cross_entropy) -> CountedRun:
        """Returns a run over a copy of the model, ready for ``drive``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            copy = BenchNet()
        return CountedRun(
            model=copy, batches_=self.batches, loss=loss, settings=TrainingSettings(), example_inputs=self.example,
            groups=self.groups, targets=TARGETS, limits=LIMITS,
        )  # fmt: skip


@dataclass
class CountedRun(MethodRun):
    """A run that counts the cuts made on the way."""

    cuts: int = 0

    def apply(self, plan: PruningPlan) -> Removal:
        """Cuts and counts."""
        self.cuts += 1
        return super().apply(plan)


class Watched(PruningMethod):
    """Hands every call on to a method; where ``reborn``, a fresh one takes over from its saved state at every phase."""

    def __init__(self, bench: Bench, *, reborn: bool = False) -> None:
        self.bench = bench
        self.reborn = reborn
        self.inner = bench.spec.build(bench.configured())
        self.removals = 0
        self._position = -1

    def phases(self) -> Sequence[Phase]:
        """Returns phases that ask the current method for its own."""
        return [self._phase(position, phase) for position, phase in enumerate(self.inner.phases())]

    def start(self, context: MethodContext, phase: Phase) -> None:
        """Starts the next phase, with a fresh method if that is wanted."""
        self._position += 1
        if self._position:
            self._reincarnate()
        self.inner.start(context, self._current())

    def compute_loss(self, context: MethodContext, batch: Batch) -> Tensor:
        """Hands on."""
        return self.inner.compute_loss(context, batch)

    def after_backward(self, context: MethodContext) -> None:
        """Hands on."""
        self.inner.after_backward(context)

    def after_step(self, context: MethodContext) -> None:
        """Hands on."""
        self.inner.after_step(context)

    def after_epoch(self, context: MethodContext, phase: Phase, epoch: int) -> None:
        """Hands on."""
        self.inner.after_epoch(context, self._current(), epoch)

    def on_removed(self, context: MethodContext, removal: Removal) -> None:
        """Counts and hands on."""
        self.removals += 1
        self.inner.on_removed(context, removal)

    def finish(self, context: MethodContext) -> Outcome:
        """Finishes, with a fresh method if that is wanted."""
        self._reincarnate()
        return self.inner.finish(context)

    def _current(self) -> Phase:
        return self.inner.phases()[self._position]

    def _reincarnate(self) -> None:
        if self.reborn:
            tensors, values = self.inner.state_dict()
            self.inner = self.bench.spec.build(self.bench.configured())
            saved = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            self.inner.load_state_dict(saved, cast("JsonState", json.loads(json.dumps(values))))

    def _phase(self, position: int, phase: Phase) -> Phase:
        def optimizers(context: MethodContext) -> Sequence[torch.optim.Optimizer]:
            make = self.inner.phases()[position].optimizers
            assert make is not None
            return make(context)

        def trainable(name: str) -> bool:
            choose = self.inner.phases()[position].trainable
            assert choose is not None
            return choose(name)

        return replace(
            phase,
            optimizers=None if phase.optimizers is None else optimizers,
            trainable=None if phase.trainable is None else trainable,
        )


def traces_on(model: nn.Module) -> list[str]:
    """Says what is left behind on a model: hooks, gradients, replaced forward functions."""
    found = []
    for name, module in model.named_modules():
        place = f"'{name}'" if name else "the model"
        for table in _HOOK_TABLES:
            found += [f"a hook ({table}) on {place}"] * len(getattr(module, table, ()))
        if "forward" in vars(module):
            found.append(f"a replaced forward of {place}")
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found.append(f"a gradient on '{name}'")
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            found.append(f"a hook on '{name}'")
    return found


def global_hooks() -> int:
    """Counts the hooks that watch every module of the process."""
    tables = vars(torch.nn.modules.module)
    return sum(len(tables[name]) for name in tables if name.startswith("_global_") and name.endswith("_hooks"))


def modes_of(model: nn.Module) -> dict[str, bool]:
    """Returns training modes and ``requires_grad`` by name."""
    modes = {f"mode of '{name}'": module.training for name, module in model.named_modules()}
    return modes | {f"requires_grad of '{name}'": p.requires_grad for name, p in model.named_parameters()}


def _block(inputs: int, outputs: int, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


_HOOK_TABLES = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
