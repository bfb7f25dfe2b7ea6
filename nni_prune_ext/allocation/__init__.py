"""HOW MANY channels each group keeps: importance scores and targets become a plan."""

from __future__ import annotations

from nni_prune_ext.allocation.cost_model import CostModel, Reference
from nni_prune_ext.allocation.search import Allocation, allocate, check_feasible
from nni_prune_ext.allocation.targets import Achieved, LayerLimit, Limits, Metric, Scope, Target

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
    "allocate",
    "check_feasible",
]
