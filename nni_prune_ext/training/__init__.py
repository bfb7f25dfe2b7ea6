"""Training: plain fitting, the crank that drives any pruning method, batch-norm recalibration, accuracy."""

from __future__ import annotations

from nni_prune_ext.training.forward_only import accuracy, recalibrate_batchnorm
from nni_prune_ext.training.method_run import MethodRun, drive, fit, seeded
from nni_prune_ext.training.settings import (
    Batches,
    EpochLog,
    LossFunction,
    TrainingSettings,
    checked_settings,
    cross_entropy,
)

__all__ = [
    "Batches",
    "EpochLog",
    "LossFunction",
    "MethodRun",
    "TrainingSettings",
    "accuracy",
    "checked_settings",
    "cross_entropy",
    "drive",
    "fit",
    "recalibrate_batchnorm",
    "seeded",
]
