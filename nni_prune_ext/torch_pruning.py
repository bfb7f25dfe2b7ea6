"""The face for torch-pruning: criteria, schedules, ratio policies for its pruners, and one whose steps are certified.

Example:
    >>> import torch, torch_pruning, torchvision
    >>> from nni_prune_ext.torch_pruning import L1Importance, agp
    >>> model, x = torchvision.models.resnet18(), torch.randn(1, 3, 64, 64)
    >>> pruner = torch_pruning.pruner.BasePruner(
    ...     model, (x,), importance=L1Importance(model, x), iterative_steps=3,
    ...     iterative_pruning_ratio_scheduler=agp, ignored_layers=[model.fc],
    ... )
    >>> pruner.step()
"""

from nni_prune_ext.adapters.torch_pruning_decisions import DecisionImportance
from nni_prune_ext.adapters.torch_pruning_history import plan_from_history, plan_to_history
from nni_prune_ext.adapters.torch_pruning_importance import (
    FPGMImportance,
    L1Importance,
    L2Importance,
    MethodImportance,
    RandomImportance,
    TaylorImportance,
)
from nni_prune_ext.adapters.torch_pruning_named_importances import (
    FTWTImportance,
    LotteryJackpotsImportance,
    PSAPImportance,
    ReconstructionImportance,
    importance_for,
)
from nni_prune_ext.adapters.torch_pruning_pruner import CertifiedPruner
from nni_prune_ext.adapters.torch_pruning_ratios import adapt_ratios
from nni_prune_ext.adapters.torch_pruning_report import LayerChange, StepReport
from nni_prune_ext.adapters.torch_pruning_schedules import agp, asfp, cosine, linear, one_shot, schedule_for

__all__ = [
    "CertifiedPruner",
    "DecisionImportance",
    "FPGMImportance",
    "FTWTImportance",
    "L1Importance",
    "L2Importance",
    "LayerChange",
    "LotteryJackpotsImportance",
    "MethodImportance",
    "PSAPImportance",
    "RandomImportance",
    "ReconstructionImportance",
    "StepReport",
    "TaylorImportance",
    "adapt_ratios",
    "agp",
    "asfp",
    "cosine",
    "importance_for",
    "linear",
    "one_shot",
    "plan_from_history",
    "plan_to_history",
    "schedule_for",
]
