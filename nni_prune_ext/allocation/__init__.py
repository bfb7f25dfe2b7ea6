"""HOW MANY channels each group keeps: importance scores and targets become a plan."""

from __future__ import annotations

from nni_prune_ext.allocation.cost_model import CostModel, Reference
from nni_prune_ext.allocation.goals import achieved_targets, checked_scope, parse_targets, sparsity_of
from nni_prune_ext.allocation.search import Allocation, allocate, check_feasible
from nni_prune_ext.allocation.targets import Achieved, LayerLimit, Limits, Metric, Scope, Target
from nni_prune_ext.allocation.weight_counts import masked_counts

__all__ = [
    "Achieved",
    "Allocation",
    "CostModel",
    "LayerLimit",
    "Limits",
    "Metric",
    "Reference",
    "Scope",
    "Target",
    "achieved_targets",
    "allocate",
    "check_feasible",
    "checked_scope",
    "masked_counts",
    "parse_targets",
    "sparsity_of",
]
