"""Evidence: networks measured side by side on several runtimes, and everything about it as JSON, table and page."""

from __future__ import annotations

from nni_prune_ext.evidence.fresh_process import FreshRuns, FreshTask, measure_fresh
from nni_prune_ext.evidence.measuring import Building, collect_evidence
from nni_prune_ext.evidence.networks import EvidenceNetwork, common_shape, read_networks
from nni_prune_ext.evidence.page import write_evidence_page
from nni_prune_ext.evidence.results import Conditions, Evidence, EvidenceRow, NotMeasured, OutputParity

__all__ = [
    "Building",
    "Conditions",
    "Evidence",
    "EvidenceNetwork",
    "EvidenceRow",
    "FreshRuns",
    "FreshTask",
    "NotMeasured",
    "OutputParity",
    "collect_evidence",
    "common_shape",
    "measure_fresh",
    "read_networks",
    "write_evidence_page",
]
