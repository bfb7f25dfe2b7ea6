"""Training: plain fitting, the crank that drives any method, distillation, batch-norm recalibration, accuracy."""

from __future__ import annotations

from nni_prune_ext.training.distillation import Distillation, distilled
from nni_prune_ext.training.fitting import fit
from nni_prune_ext.training.forward_only import accuracy, recalibrate_batchnorm
from nni_prune_ext.training.loop import drive
from nni_prune_ext.training.method_run import MethodRun, seeded
from nni_prune_ext.training.settings import (
    Batches,
    EpochLog,
    Evaluate,
    LossFunction,
    ParameterGroup,
    StepLog,
    TrainingSettings,
    Watcher,
    checked_settings,
    cross_entropy,
    loss_identity,
)

__all__ = [
    "Batches",
    "Distillation",
    "EpochLog",
    "Evaluate",
    "LossFunction",
    "MethodRun",
    "ParameterGroup",
    "StepLog",
    "TrainingSettings",
    "Watcher",
    "accuracy",
    "checked_settings",
    "cross_entropy",
    "distilled",
    "drive",
    "fit",
    "loss_identity",
    "recalibrate_batchnorm",
    "seeded",
]
