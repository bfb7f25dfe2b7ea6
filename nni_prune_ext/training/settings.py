"""How weights are trained: settings, losses, and the log of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.methods.base import Batch

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


def checked_settings(
    *,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    precision: str = "fp32",
    channels_last: bool = False,
) -> TrainingSettings:
    """Returns training settings.

    Raises:
        ConfigError: a value is out of range.
    """
    if not learning_rate > 0 or not 0 <= momentum < 1 or not weight_decay >= 0:
        raise ConfigError(
            f"learning_rate={learning_rate:g}, momentum={momentum:g}, weight_decay={weight_decay:g} "
            "are not usable. Expected a "
            "positive rate, a momentum in [0, 1) and a weight decay of at least 0."
        )
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"The precision is '{precision}', expected 'fp32' or 'bf16'. Choose one.")
    return TrainingSettings(
        learning_rate, momentum, weight_decay, cast("Literal['fp32', 'bf16']", precision), channels_last
    )


@dataclass(frozen=True)
class EpochLog:
    """One epoch: its phase, mean loss, learning rate of the last step, seconds."""

    phase: str
    epoch: int
    loss: float
    learning_rate: float
    seconds: float


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the classification loss of ``(images, labels)``, a scalar."""
    images, labels = batch
    return functional.cross_entropy(model(images), labels)
