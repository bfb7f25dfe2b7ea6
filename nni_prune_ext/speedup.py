"""The face for hosts: NNI's ModelSpeedup, under the name that NNI gives it."""

from __future__ import annotations

from nni_prune_ext.adapters.nni_dependency import auto_set_dependency_group_ids_of_graph
from nni_prune_ext.adapters.nni_speedup import ModelSpeedup
from nni_prune_ext.adapters.nni_speedup_errors import (
    ConstantError,
    EmptyLayerError,
    FineGrainedMaskError,
    MaskFileError,
    ShapeMisMatchError,
    SpeedupError,
    WrappedModelError,
)
from nni_prune_ext.adapters.nni_speedup_report import KeptMask, SpeedupReport

auto_set_denpendency_group_ids = auto_set_dependency_group_ids_of_graph
"""The function that NNI has here, spelt as NNI spells it."""

__all__ = [
    "ConstantError",
    "EmptyLayerError",
    "FineGrainedMaskError",
    "KeptMask",
    "MaskFileError",
    "ModelSpeedup",
    "ShapeMisMatchError",
    "SpeedupError",
    "SpeedupReport",
    "WrappedModelError",
    "auto_set_denpendency_group_ids",
]
