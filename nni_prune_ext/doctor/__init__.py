"""The doctor: "I pruned it and it is not faster", answered from profiles of ONNX Runtime, layer by layer."""

from nni_prune_ext.doctor.advice import Advice
from nni_prune_ext.doctor.diagnosis import Diagnosis, diagnose, diagnose_recorded
from nni_prune_ext.doctor.findings import Finding
from nni_prune_ext.doctor.layer_times import KindRow, LayerRow, Side, Time
from nni_prune_ext.doctor.network import Layer

__all__ = [
    "Advice",
    "Diagnosis",
    "Finding",
    "KindRow",
    "Layer",
    "LayerRow",
    "Side",
    "Time",
    "diagnose",
    "diagnose_recorded",
]
