"""Distillation: the compact network learns from the dense one, by its logits and by named feature maps.

* logits: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531
* features: Zagoruyko, Komodakis, "Paying More Attention to Attention", 2017, https://arxiv.org/abs/1612.03928: the sum
  of squares over channels, which does not depend on their number, so a pruned layer can learn from the whole one.

Departures: the feature term is the mean over the named layers of the mean squared difference of normalised maps; maps
of other sizes are not resized but refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.methods.base import Batch
from nni_prune_ext.training.forward_only import modes_kept
from nni_prune_ext.training.settings import LossFunction


class Distillation(BaseModel):
    """How much the dense network teaches.

    Attributes:
        temperature: of both softmax functions; the term is scaled by its square.
        weight: share of the logits' term; the user's loss has the rest.
        features: names of modules whose outputs are compared as attention maps.
        feature_weight: factor on the feature term.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(default=4.0, gt=0, le=100, description="softens both softmax functions")
    weight: float = Field(default=0.5, ge=0, le=1, description="share of the logits' term in the loss")
    features: tuple[str, ...] = Field(default=(), description="modules whose outputs are compared")
    feature_weight: float = Field(default=100.0, ge=0, description="factor on the feature term")

    @model_validator(mode="after")
    def _teaches(self) -> Distillation:
        if not self.weight and not (self.features and self.feature_weight):
            raise ValueError(
                "nothing is distilled; expected a weight above 0, or features with a feature_weight above 0"
            )
        return self


def distilled(loss: LossFunction, teacher: nn.Module, settings: Distillation) -> LossFunction:
    """Returns a loss that also pulls the model towards a teacher, on the very inputs that the user's loss gives it.

    Args:
        loss: the user's; it must call the model once per batch.
        teacher: the dense model; it is run in evaluation mode without gradients, and not changed.

    Raises:
        ConfigError: a named feature is not a module of the teacher.
    """
    _modules(teacher, settings.features)
    return _Distilled(loss, teacher, settings)


@dataclass(frozen=True)
class _Distilled:
    loss: LossFunction
    teacher: nn.Module
    settings: Distillation

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        with _recorded(model, self.settings.features) as student:
            task = self.loss(model, batch)
        if not student.calls:
            raise ConfigError("The loss did not call the model, expected one call per batch. Distil with another loss.")
        args, kwargs, output = student.calls[-1]
        with modes_kept(self.teacher), torch.no_grad(), _recorded(self.teacher, self.settings.features) as taught:
            self.teacher.eval()
            self.teacher(*args, **kwargs)
        for name in self.settings.features:
            for which, record in (("student", student), ("teacher", taught)):
                if name not in record.features:
                    raise ConfigError(
                        f"The distillation feature '{name}' was not computed by the {which}. Expected a module that "
                        "the model calls in training and in evaluation mode. Name another one."
                    )
        total = task
        if self.settings.weight:
            term = soft_cross_entropy(_logits(output), _logits(taught.calls[-1][2]), self.settings.temperature)
            total = (1 - self.settings.weight) * task + self.settings.weight * term
        pairs = [(student.features[name], taught.features[name], name) for name in self.settings.features]
        if pairs:
            maps = torch.stack([attention_distance(own, theirs, name) for own, theirs, name in pairs])
            total = total + self.settings.feature_weight * maps.mean()
        return total


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Returns T² · KL(teacher ‖ student) of the softened class probabilities, a scalar.

    Args:
        student: logits ``(N, classes, …)``; classes are dimension 1, as for cross-entropy.
        teacher: of the same shape.
    """
    own = functional.log_softmax(student.float() / temperature, 1)
    theirs = functional.log_softmax(teacher.float() / temperature, 1)
    divergence = (theirs.exp() * (theirs - own)).sum(1)
    return divergence.mean() * temperature**2


def attention_distance(student: Tensor, teacher: Tensor, name: str) -> Tensor:
    """Returns the mean squared difference of two normalised attention maps ``(N, C, H, W)`` of any channel numbers.

    Raises:
        ConfigError: the maps have no place (fewer than three dimensions) or different sizes.
    """
    if student.dim() < 3 or student.shape[2:] != teacher.shape[2:]:
        raise ConfigError(
            f"The distillation feature '{name}' has shapes {tuple(student.shape)} and {tuple(teacher.shape)}, expected "
            "feature maps (N, C, H, W) of one size. Name a convolutional layer."
        )
    return (_attention(student) - _attention(teacher)).pow(2).mean()


def _attention(features: Tensor) -> Tensor:
    energy = features.float().pow(2).sum(1).flatten(1)
    return functional.normalize(energy, dim=1)


class _Record:
    def __init__(self) -> None:
        self.calls: list[tuple[tuple[object, ...], dict[str, object], object]] = []
        self.features: dict[str, Tensor] = {}


@contextmanager
def _recorded(model: nn.Module, names: Sequence[str]) -> Iterator[_Record]:
    """Keeps the calls of a model and the outputs of some modules while the block runs."""
    record = _Record()

    def keep_call(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        record.calls.append((args, kwargs, output))

    def keep_feature(name: str) -> Callable[[nn.Module, object, object], None]:
        def keep(module: nn.Module, args: object, output: object) -> None:
            if isinstance(output, Tensor):
                record.features[name] = output
            else:
                raise ConfigError(
                    f"The distillation feature '{name}' gives a {type(output).__name__}, expected a tensor. Name "
                    "another module."
                )

        return keep

    modules = _modules(model, names)
    handles = [model.register_forward_hook(keep_call, with_kwargs=True)]
    handles += [module.register_forward_hook(keep_feature(name)) for name, module in modules.items()]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _modules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ConfigError(
                f"The distillation feature '{name}' is not a module of {type(model).__name__}. Expected a name of "
                "named_modules(), for example layer3."
            )
    return {name: modules[name] for name in names}


def _logits(output: object) -> Tensor:
    """Returns the logits in a model's output: the tensor itself, or what segmentation models call ``out``."""
    if isinstance(output, Tensor):
        return output
    found = output.get("out") if isinstance(output, dict) else None
    if isinstance(found, Tensor):
        return found
    raise ConfigError(
        f"The model returns a {type(output).__name__}, expected logits as a tensor (or a dict with 'out') for the "
        "distillation of logits. Set weight=0 and name features instead."
    )
