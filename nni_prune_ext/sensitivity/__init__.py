"""How accuracy and latency answer when one channel group alone is pruned: measured, drawn, and made into limits."""

from __future__ import annotations

from nni_prune_ext.sensitivity.measuring import RATIOS, Latency, Sensitivity, SensitivityPoint, measure_sensitivity
from nni_prune_ext.sensitivity.page import write_sensitivity
from nni_prune_ext.sensitivity.runtime_latency import latency_on

__all__ = [
    "RATIOS",
    "Latency",
    "Sensitivity",
    "SensitivityPoint",
    "latency_on",
    "measure_sensitivity",
    "write_sensitivity",
]
