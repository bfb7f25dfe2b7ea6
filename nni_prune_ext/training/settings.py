"""How weights are trained: settings, losses, the logs of epochs and steps, and who is told about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.methods.base import Batch

Batches: TypeAlias = Iterable[Batch]
"""Anything that can be iterated once per epoch; ``set_epoch(n)`` is called first where it exists."""
LossFunction: TypeAlias = Callable[[nn.Module, Batch], Tensor]
"""A model and one batch → the scalar to minimise. Classification, segmentation, detection: whatever the batch holds."""
Evaluate: TypeAlias = Callable[[nn.Module], float]
"""A model → its validation metric; higher is better."""
Share: TypeAlias = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""A part of a whole, 0–1."""


class ParameterGroup(BaseModel):
    """Parameters that are trained differently from the rest.

    Attributes:
        pattern: shell pattern of parameter names; the first group that matches a name wins.
        learning_rate_scale: factor on the learning rate; 0 keeps these parameters as they are.
        weight_decay: instead of the common one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str = Field(min_length=1, description="shell pattern of parameter names, for example *.bias")
    learning_rate_scale: float = Field(
        default=1.0, ge=0, description="factor on the learning rate", allow_inf_nan=False
    )
    weight_decay: float | None = Field(
        default=None, ge=0, description="instead of the common weight decay", allow_inf_nan=False
    )


class TrainingSettings(BaseModel):
    """How weights are trained: SGD with momentum and a cosine to 0 over each phase, unless told otherwise.

    Attributes:
        learning_rate: the peak.
        schedule: ``cosine`` falls to 0 over each phase; ``step`` is multiplied by ``gamma`` at every milestone;
            ``constant`` stays.
        warmup_epochs: linear rise to the peak at the beginning of each phase; at most half of the phase.
        milestones: shares (0–1) of a phase at which a step schedule falls.
        precision: ``bf16`` runs forward and loss under autocast; parameters stay in their own dtype.
        channels_last: trains in channels-last memory format and puts the model back afterwards.
        accumulation_steps: batches per optimizer step; the gradient is their mean.
        max_gradient_norm: gradients are scaled down to this Euclidean norm.
        select_best: plain training with a validation metric ends with the weights of its best epoch.
        patience: plain training stops after so many epochs without a better validation metric.
        parameter_groups: parameters with a learning rate or weight decay of their own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    optimizer: Literal["sgd", "adamw"] = Field(default="sgd", description="the loop's own optimizer")
    learning_rate: float = Field(default=0.01, gt=0, description="peak learning rate", allow_inf_nan=False)
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of SGD")
    nesterov: bool = Field(default=False, description="Nesterov momentum for SGD")
    weight_decay: float = Field(default=5e-4, ge=0, description="L2 for SGD, decoupled for AdamW", allow_inf_nan=False)
    schedule: Literal["cosine", "step", "constant"] = Field(default="cosine", description="shape of each phase's rate")
    warmup_epochs: float = Field(default=0.0, ge=0, description="epochs of linear rise", allow_inf_nan=False)
    milestones: tuple[Share, ...] = Field(default=(0.5, 0.75), description="shares of a phase, for step")
    gamma: float = Field(default=0.1, gt=0, le=1, description="factor at each milestone")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16 runs under autocast")
    channels_last: bool = Field(default=False, description="channels-last memory format while training")
    accumulation_steps: int = Field(default=1, ge=1, description="batches per optimizer step")
    max_gradient_norm: float | None = Field(default=None, gt=0, description="gradient clipping", allow_inf_nan=False)
    select_best: bool = Field(default=True, description="end with the weights of the best validation epoch")
    patience: int | None = Field(default=None, ge=1, description="epochs without improvement before an early stop")
    parameter_groups: tuple[ParameterGroup, ...] = Field(default=(), description="parameters trained differently")


def checked_settings(**values: object) -> TrainingSettings:
    """Returns training settings.

    Raises:
        ConfigError: a value is unknown or out of range.
    """
    try:
        return TrainingSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"The training setting '{name}' is {first['input']!r}: {first['msg']}. Known settings: "
            f"{', '.join(TrainingSettings.model_fields)}."
        ) from error


@dataclass(frozen=True)
class EpochLog:
    """One epoch: its phase, mean loss, learning rate of the last step, seconds, validation metric where measured."""

    phase: str
    epoch: int
    loss: float
    learning_rate: float
    seconds: float
    metric: float | None = None


@dataclass(frozen=True)
class StepLog:
    """Where training stands; sent a few times per second at most.

    Attributes:
        epoch: of the phase, 0-based.
        steps: batches of an epoch, ``None`` where the data does not say.
        loss: of the last batch.
        done: finished epochs of the whole stage.
        total: epochs of the whole stage.
    """

    phase: str
    epoch: int
    epochs: int
    step: int
    steps: int | None
    loss: float
    done: int
    total: int


class Watcher:
    """Is told what training does; every method does nothing unless overridden."""

    def phase(self, name: str, epochs: int, *, done: int, total: int) -> None:
        """A phase begins or is continued; ``done`` of the ``total`` epochs of its stage lie behind."""

    def step(self, log: StepLog) -> None:
        """Some batches were trained on."""

    def epoch(self, log: EpochLog) -> None:
        """An epoch is done."""

    def note(self, text: str) -> None:
        """Something happened that a person should know."""


def loss_identity(loss: LossFunction) -> str:
    """Returns what a loss is known by in a checkpoint: what it says itself (``identity``), or its name."""
    own = getattr(loss, "identity", None)
    return own if isinstance(own, str) else str(getattr(loss, "__qualname__", type(loss).__qualname__))


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the classification loss of ``(images, labels)``, a scalar."""
    images, labels = batch
    return functional.cross_entropy(model(images), labels)
