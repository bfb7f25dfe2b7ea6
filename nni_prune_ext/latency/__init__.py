"""Latency as a target: layers and networks are timed on the runtime, and widths are found that take the time asked for.

``aiming`` is the way from a target to widths, ``predictor`` what it goes by, ``stopwatch`` what measures.
"""

from __future__ import annotations

from nni_prune_ext.latency.aiming import LatencyAim as LatencyAim
from nni_prune_ext.latency.conditions import LatencyConditions as LatencyConditions
from nni_prune_ext.latency.evidence import LatencyEvidence as LatencyEvidence
from nni_prune_ext.latency.evidence import MeasuredNetwork as MeasuredNetwork
from nni_prune_ext.latency.start import aim_at as aim_at
from nni_prune_ext.latency.start import latency_refusal as latency_refusal
from nni_prune_ext.latency.stopwatch import Stopwatch as Stopwatch
