"""The optimizers of a phase and their learning rates."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.methods.base import Phase
from nni_prune_ext.training.method_run import MethodRun
from nni_prune_ext.training.settings import TrainingSettings

_WARMUP_START = 0.01
"""Share of the peak learning rate with which a warm-up begins."""


def make_optimizers(run: MethodRun, phase: Phase) -> None:
    """Makes the method's optimizers, and the loop's own over all trainable parameters that none of them holds.

    A host that trains has a default optimizer of its own.
    """
    own = [] if phase.optimizers is None else list(phase.optimizers(run))
    if run.host_epoch is not None:
        run.optimizers = own
        return
    held = {id(p) for optimizer in own for group in optimizer.param_groups for p in group["params"]}
    _check_patterns(run)
    rest = {name: p for name, p in run.model.named_parameters() if p.requires_grad and id(p) not in held}
    run.default_optimizer = _optimizer(rest, run.settings) if rest else None
    run.optimizers = own if run.default_optimizer is None else [run.default_optimizer, *own]
    if not run.optimizers and phase.trainable is None:
        raise ConfigError(
            f"Phase '{phase.name}' has nothing to train: no parameter of {type(run.model).__name__} requires a "
            "gradient. Unfreeze some, or train for 0 epochs."
        )


def set_rate(run: MethodRun, phase: Phase, epochs: float) -> None:
    """Sets the learning rate of the loop's own optimizer, so many epochs into a phase."""
    if run.default_optimizer is not None:
        rate = run.settings.learning_rate * phase.learning_rate_scale * rate_factor(run.settings, epochs, phase.epochs)
        for group in run.default_optimizer.param_groups:
            group["lr"] = rate * group["scale"]


def rate_factor(settings: TrainingSettings, epochs: float, total: int) -> float:
    """Returns the learning rate as a share of its peak, ``epochs`` into a phase of ``total`` epochs."""
    warmup = min(settings.warmup_epochs, total / 2)  # a short phase rises half of the way and falls the other half
    if epochs < warmup:
        return _WARMUP_START + (1 - _WARMUP_START) * epochs / warmup
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (epochs - warmup) / max(total - warmup, 1e-9)))
    if settings.schedule == "step":
        passed = sum(epochs / total >= milestone for milestone in settings.milestones)
        return float(settings.gamma**passed)
    return 1.0


def _optimizer(parameters: dict[str, nn.Parameter], settings: TrainingSettings) -> Optimizer:
    """Makes the loop's optimizer; every group carries the factor on its learning rate as ``scale``."""
    members: list[list[nn.Parameter]] = [[] for _ in range(len(settings.parameter_groups) + 1)]
    for name, parameter in parameters.items():
        fitting = (n for n, group in enumerate(settings.parameter_groups) if fnmatchcase(name, group.pattern))
        members[next(fitting, len(settings.parameter_groups))].append(parameter)
    groups: list[dict[str, Any]] = []
    for chosen, own in zip([*settings.parameter_groups, None], members):
        if own:
            decay = settings.weight_decay if chosen is None or chosen.weight_decay is None else chosen.weight_decay
            scale = 1.0 if chosen is None else chosen.learning_rate_scale
            groups.append({"params": own, "weight_decay": decay, "scale": scale})
    if settings.optimizer == "adamw":
        return AdamW(groups, lr=settings.learning_rate)
    nesterov = settings.nesterov and settings.momentum > 0
    return SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=nesterov)


def _check_patterns(run: MethodRun) -> None:
    """Refuses a parameter group that no parameter of the model belongs to: a misspelt pattern."""
    names = [name for name, _ in run.model.named_parameters()]
    for group in run.settings.parameter_groups:
        if not any(fnmatchcase(name, group.pattern) for name in names):
            raise ConfigError(
                f"The parameter group '{group.pattern}' matches no parameter of {type(run.model).__name__}, expected a "
                f"pattern of names such as {names[0]}. Correct it."
            )
