"""The loss and the metric of a recipe, and a trial of both on one batch before any work."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import SupportsFloat, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from nni_prune_ext.deployment import Metric
from nni_prune_ext.errors import DataError, NniPruneExtError, RecipeError
from nni_prune_ext.methods.base import Batch
from nni_prune_ext.recipes import Origins, Recipe
from nni_prune_ext.specs import import_factory
from nni_prune_ext.training import Batches, LossFunction, accuracy, cross_entropy, distilled, seeded
from nni_prune_ext.training.forward_only import modes_kept
from nni_prune_ext.training.processes import apart
from nni_prune_ext.training.run_state import loader_generators


def opened_loss(recipe: Recipe, origins: Origins) -> LossFunction:
    """Returns the loss that the recipe names, cross-entropy if it names none.

    Raises:
        RecipeError: it cannot be imported, or not called.
    """
    if recipe.loss is None:
        return cross_entropy
    with origins.named("loss"):
        return cast("Callable[..., Tensor]", import_factory(recipe.loss, error=RecipeError))


def opened_metric(recipe: Recipe, origins: Origins) -> Metric:
    """Returns the metric that the recipe names, called in evaluation mode without gradients; top-1 accuracy if none.

    Raises:
        RecipeError: it cannot be imported, or not called.
    """
    if recipe.metric is None:
        return accuracy
    with origins.named("metric"):
        found = import_factory(recipe.metric, error=RecipeError)
    return _Measured(recipe.metric, cast("Callable[..., SupportsFloat]", found))


@dataclass(frozen=True)
class _Measured:
    """The user's metric: batches come on the model's device, and modes are put back."""

    name: str
    metric: Callable[..., SupportsFloat]

    def __call__(self, model: nn.Module, batches: Batches) -> float:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with modes_kept(model), torch.no_grad():
            model.eval()
            found = self.metric(model, _OnDevice(batches, device))
        try:
            return float(found)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RecipeError(
                f"The metric '{self.name}' returned a {type(found).__name__}, expected one number, higher is better. "
                "Return a float."
            ) from error


@dataclass(frozen=True)
class _OnDevice:
    batches: Batches
    device: torch.device

    def __iter__(self) -> Iterator[Batch]:
        return (send_to_device(batch, self.device) for batch in self.batches)


def try_loss(model: nn.Module, batches: Batches, loss: LossFunction, recipe: Recipe, origins: Origins) -> None:
    """Computes loss and gradients of one training batch on a copy of the model, as the training will.

    Raises:
        RecipeError: the loss raises, or is no scalar with a gradient.
        ConfigError: a feature of the distillation is not one.
    """
    trial, batch = copy.deepcopy(model).train(), _first(batches, "train")
    batch = send_to_device(batch, next(trial.parameters()).device)
    with seeded(trial, recipe.seed), origins.named("loss"), _told("loss", recipe.loss or "cross-entropy", batch):
        value = loss(trial, batch)
        _check_scalar(value, recipe)
        torch.autograd.backward(value)
    if recipe.distillation is not None:
        teacher = copy.deepcopy(model)
        key = "features" if recipe.distillation.features else "weight"
        with origins.named("distillation", key), seeded(trial, recipe.seed):
            distilled(loss, teacher, recipe.distillation)(trial, batch)


def try_metric(model: nn.Module, batches: Batches, metric: Metric, recipe: Recipe, origins: Origins) -> None:
    """Measures one validation batch, as every epoch will.

    Raises:
        RecipeError: the metric raises, or gives no number.
    """
    batch = _first(batches, "val")
    with seeded(model, recipe.seed), origins.named("metric"), _told("metric", recipe.metric or "top-1 accuracy", batch):
        if recipe.metric is None:
            _check_classifies(model, batch)
        metric(model, [batch])


def _check_scalar(value: object, recipe: Recipe) -> None:
    usable = isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad
    if not usable:
        seen = f"a {type(value).__name__}"
        if isinstance(value, Tensor):
            seen = f"shape {tuple(value.shape)}, {'with' if value.requires_grad else 'without'} a gradient"
        raise RecipeError(
            f"The loss '{recipe.loss or 'cross-entropy'}' returned {seen}, expected a scalar tensor with a gradient. "
            "Return the mean over the batch, without .item() or .detach()."
        )


def _check_classifies(model: nn.Module, batch: Batch) -> None:
    """Refuses what top-1 accuracy is not defined for."""
    seen = None
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        seen = f"a batch is a {type(batch).__name__}"
    elif batch[1].dim() != 1:
        seen = f"the labels have shape {tuple(batch[1].shape)}"
    else:
        with modes_kept(model), torch.no_grad():
            output = model.eval()(batch[0])
        if not isinstance(output, Tensor) or output.dim() != 2:
            shape = f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""
            seen = f"the model returns a {type(output).__name__}{shape}"
    if seen:
        raise RecipeError(
            f"Top-1 accuracy is the metric where none is named, but {seen}, expected batches (images, labels) with one "
            "class per image, and logits (N, classes). Name a metric: metric: module.path:function (CLI: --metric)."
        )


@contextmanager
def _told(what: str, name: str, batch: Batch) -> Iterator[None]:
    """Says which part of the recipe failed on which kind of batch."""
    try:
        yield
    except NniPruneExtError:
        raise
    except Exception as error:  # the user's own code may raise anything
        form = f"of {len(batch)} parts" if isinstance(batch, (tuple, list)) else "of one part"
        first = (str(error).splitlines() or [""])[0]
        raise RecipeError(
            f"The {what} '{name}' failed on one batch, a {type(batch).__name__} {form}: {type(error).__name__}: "
            f"{first}. Expected a {what} that fits what the model returns and what a batch holds. Mend it, or name "
            f"another one: {what}: module.path:function (CLI: --{what})."
        ) from error


def _first(batches: Batches, split: str) -> Batch:
    """Returns one batch; the order that training will see does not move."""
    before = [(own, own.get_state()) for own in loader_generators(batches)]
    found = list(islice(apart(batches), 1))
    for own, state in before:
        own.set_state(state)
    if not found:
        raise DataError(f"The {split} loader gave no batch, expected at least one. Check the data.")
    return found[0]
