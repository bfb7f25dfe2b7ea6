"""The bench on which methods are checked: a tiny network with data, and a method that is watched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from nni_prune_ext.allocation import Limits, Target
from nni_prune_ext.certificate import verify_groups
from nni_prune_ext.checkpoints import Checkpoints, Json
from nni_prune_ext.graph.channel_groups import ChannelGroups, trace_channel_groups
from nni_prune_ext.methods.base import (
    Batch,
    MethodContext,
    MethodSpec,
    Outcome,
    Phase,
    Product,
    PruningMethod,
)
from nni_prune_ext.pipeline import PruneResult, method_options, prune
from nni_prune_ext.plan import PruningPlan
from nni_prune_ext.surgery import Removal
from nni_prune_ext.training import LossFunction, MethodRun, TrainingSettings, cross_entropy

TARGETS: tuple[Target, ...] = (Target("macs", 0.6), Target("params", 0.7))
SPARSITY: tuple[Target, ...] = (Target("sparsity", 0.6),)
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
    """One method with its options, and everything that it is run on; ``targets`` say what is asked of it."""

    spec: MethodSpec
    options: Mapping[str, object]
    model: nn.Module
    example: Tensor
    batches: Sequence[Batch]
    groups: ChannelGroups
    targets: tuple[Target, ...] = TARGETS

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

    def built(self) -> PruningMethod:
        """Returns a fresh method."""
        return self.spec.build(self.configured())

    def prune(self, *, seed: int = 0, with_data: bool = True) -> PruneResult:
        """Runs the whole pipeline."""
        return prune(
            self.model, self.example, method=self.spec, target=self.targets, options=self.options, limits=LIMITS,
            train_batches=self.batches if with_data else None, groups=self.groups, seed=seed,
        )  # fmt: skip

    def run(self, loss: LossFunction = cross_entropy, checkpoints: Checkpoints | None = None) -> CountedRun:
        """Returns a run over a copy of the model, ready for ``drive``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            copy = BenchNet()
        return CountedRun(
            model=copy, batches_=self.batches, loss=loss, settings=TrainingSettings(), example_inputs=self.example,
            groups=self.groups, targets=self.targets, limits=LIMITS, checkpoints=checkpoints,
        )  # fmt: skip


def targets_for(products: frozenset[Product]) -> Sequence[tuple[Target, ...]]:
    """Returns what a method with these products can be asked for: channels, single weights, or each in turn."""
    if "weight_masks" not in products:
        return [TARGETS]
    return [TARGETS, SPARSITY] if "plan" in products else [SPARSITY]


@dataclass
class CountedRun(MethodRun):
    """A run that counts the cuts made on the way."""

    cuts: int = 0

    def apply(self, plan: PruningPlan) -> Removal:
        """Cuts and counts."""
        self.cuts += 1
        return super().apply(plan)


class Watched(PruningMethod):
    """Hands every call on to a method and counts the cuts that it is told about."""

    def __init__(self, inner: PruningMethod) -> None:
        self.inner = inner
        self.removals = 0

    def phases(self) -> Sequence[Phase]:
        """Hands on."""
        return self.inner.phases()

    def start(self, context: MethodContext, phase: Phase) -> None:
        """Hands on."""
        self.inner.start(context, phase)

    def attach(self, context: MethodContext, phase: Phase) -> None:
        """Hands on."""
        self.inner.attach(context, phase)

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
        self.inner.after_epoch(context, phase, epoch)

    def on_removed(self, context: MethodContext, removal: Removal) -> None:
        """Counts and hands on."""
        self.removals += 1
        self.inner.on_removed(context, removal)

    def finish(self, context: MethodContext) -> Outcome:
        """Hands on."""
        return self.inner.finish(context)


class Interrupted(BaseException):
    """What a run that is stopped at a checkpoint raises; a ``BaseException``, as a signal is."""


class StoppingCheckpoints(Checkpoints):
    """Checkpoints that stop the run after the one with a given number."""

    def __init__(self, folder: Path, *, stop_at: int) -> None:
        super().__init__(folder, {})
        self.stop_at = stop_at
        self.saves = 0

    def save(self, values: Mapping[str, Json], tensors: Mapping[str, Tensor]) -> None:
        """Saves, and stops."""
        super().save(values, tensors)
        self.saves += 1
        if self.saves == self.stop_at:
            raise Interrupted


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
