"""HOW MANY channels each group keeps: importance scores and targets become a plan."""

from __future__ import annotations

from nni_prune_ext.allocation.cost_model import CostModel, PredictedLatency, Reference
from nni_prune_ext.allocation.goals import (
    achieved_targets,
    checked_scope,
    counted_only,
    latency_of,
    parse_targets,
    sparsity_of,
)
from nni_prune_ext.allocation.search import Allocation, allocate, check_feasible
from nni_prune_ext.allocation.targets import (
    LATENCY_TOLERANCE,
    Achieved,
    LayerLimit,
    Limits,
    Metric,
    Scope,
    Target,
    usual_multiple,
)
from nni_prune_ext.allocation.weight_counts import masked_counts

__all__ = [
    "LATENCY_TOLERANCE",
    "Achieved",
    "Allocation",
    "CostModel",
    "LayerLimit",
    "Limits",
    "Metric",
    "PredictedLatency",
    "Reference",
    "Scope",
    "Target",
    "achieved_targets",
    "allocate",
    "check_feasible",
    "checked_scope",
    "counted_only",
    "latency_of",
    "masked_counts",
    "parse_targets",
    "sparsity_of",
    "usual_multiple",
]
