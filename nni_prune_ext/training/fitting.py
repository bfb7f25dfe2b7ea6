"""Plain training: all parameters, the user's loss, the best epoch by a validation metric, weight masks kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from nni_prune_ext.checkpoints import Checkpoints
from nni_prune_ext.methods.base import JsonState, MethodContext, Phase, PruningMethod
from nni_prune_ext.training.loop import run_phases
from nni_prune_ext.training.method_run import MethodRun
from nni_prune_ext.training.processes import own_device
from nni_prune_ext.training.run_state import load_model_tensors, model_tensors
from nni_prune_ext.training.settings import (
    Batches,
    EpochLog,
    Evaluate,
    LossFunction,
    TrainingSettings,
    Watcher,
    cross_entropy,
)


def fit(
    model: nn.Module,
    batches: Batches,
    *,
    epochs: int,
    settings: TrainingSettings | None = None,
    loss: LossFunction = cross_entropy,
    evaluate: Evaluate | None = None,
    weight_masks: Mapping[str, Tensor] | None = None,
    watcher: Watcher | None = None,
    checkpoints: Checkpoints | None = None,
    name: str = "fit",
    seed: int = 0,
) -> list[EpochLog]:
    """Trains all parameters of a model that require gradients, in place.

    In several processes all of them call this alike; the model moves to the process's own device, and everyone starts
    from the main process's weights.

    Args:
        batches: iterated once per epoch.
        evaluate: a validation metric, higher is better, measured after every epoch; with ``settings.select_best`` the
            weights of its best epoch are kept, and ``settings.patience`` stops early. Never the test set.
        weight_masks: parameter name → bool mask of its shape; where it is ``False``, weights are and stay zero.
        checkpoints: where every epoch is saved, and from where an interrupted run of the same job goes on.
        name: of the phase, in the logs.
        seed: of everything random in the training; the global generators are left as they are.

    Returns:
        one log per epoch, with those before an interruption.

    Raises:
        ConfigError: there is no batch or nothing to train.
        TrainingError: the loss is no number, memory ran out, or the data raised; the model is as before the epoch.
    """
    if not epochs:
        return []
    settings = settings or TrainingSettings()
    model.to(own_device(next(model.parameters()).device))
    run = MethodRun(
        model=model, batches_=batches, loss=loss, settings=settings, evaluate=evaluate, watcher=watcher or Watcher(),
        checkpoints=checkpoints, seed=seed,
    )  # fmt: skip
    method = _Fitting(settings, selects=evaluate is not None, masks=weight_masks or {})
    run_phases(method, run, [Phase(name, epochs)])
    method.load_best(model)
    return run.logs


class _Fitting(PruningMethod):
    """Trains, remembers the best weights, keeps masked weights at zero."""

    def __init__(self, settings: TrainingSettings, *, selects: bool, masks: Mapping[str, Tensor]) -> None:
        self.settings = settings
        self.selects = selects
        self.masks = masks
        self.best: dict[str, Tensor] = {}
        self.best_metric = -float("inf")
        self.best_epoch = -1

    def start(self, context: MethodContext, phase: Phase) -> None:
        """Masks the weights."""
        self.after_step(context)

    def after_backward(self, context: MethodContext) -> None:
        """Masks the gradients, so that momentum does not fill up behind the mask."""
        for name, parameter in context.model.named_parameters():
            if name in self.masks and parameter.grad is not None:
                parameter.grad.mul_(self.masks[name].to(parameter.device))

    def after_step(self, context: MethodContext) -> None:
        """Masks the weights."""
        with torch.no_grad():
            for name, parameter in context.model.named_parameters():
                if name in self.masks:
                    parameter.mul_(self.masks[name].to(parameter.device))

    def after_epoch(self, context: MethodContext, phase: Phase, epoch: int) -> None:
        """Keeps the weights if they are the best so far; stops if they have not been for too long."""
        run = cast("MethodRun", context)
        if not self.selects or run.metric is None:
            return
        if math.isnan(run.metric):
            run.watcher.note(f"the validation metric of epoch {epoch + 1} is no number: this epoch is not selected")
            return
        if run.metric > self.best_metric:
            self.best_metric, self.best_epoch = run.metric, epoch
            if self.settings.select_best:
                self.best = {name: tensor.clone() for name, tensor in model_tensors(run.model).items()}
        patience = self.settings.patience
        run.stop = patience is not None and epoch - self.best_epoch >= patience

    def state_dict(self) -> tuple[dict[str, Tensor], JsonState]:
        """Returns the best weights and when they were."""
        return dict(self.best), {"best_metric": self.best_metric, "best_epoch": self.best_epoch}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: JsonState) -> None:
        """Restores the best weights."""
        self.best = dict(tensors)
        self.best_metric = float(cast("float", values["best_metric"]))
        self.best_epoch = int(cast("int", values["best_epoch"]))

    def load_best(self, model: nn.Module) -> None:
        """Loads the best weights into the model, if there are any."""
        if self.best:
            load_model_tensors(model, self.best)
