"""Exact, certified channel pruning for PyTorch vision networks, from a trained model to a checked ONNX file.

Public names are resolved on first use, so that importing the package loads neither torch nor nni.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

try:
    __version__ = version("nni_prune_ext")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_PUBLIC = {
    "BatchLoader": "data.batches",
    "split_batches": "data.batches",
    "DataSource": "data.image_arrays",
    "Loaders": "data.loaders",
    "TrainingSettings": "training",
    "accuracy": "training",
    "PruneResult": "pipeline",
    "LatencyConditions": "latency.conditions",
    "LatencyEvidence": "latency.evidence",
    "LayerLimit": "allocation",
    "write_artefacts": "deployment",
    "load_pruned": "deployment",
    "MethodSpec": "methods.base",
    "Phase": "methods.base",
    "Outcome": "methods.base",
    "ChannelGroup": "graph.channel_groups",
    "ChannelGroups": "graph.channel_groups",
    "trace_channel_groups": "graph.channel_groups",
    "PruningPlan": "plan",
    "plan_from_channels": "plan",
    "plan_from_masks": "plan",
    "plan_to_masks": "plan",
    "Removal": "surgery",
    "remap_optimizer": "surgery",
    "silence_channels": "surgery",
    "Certificate": "certificate",
    "remove_channels": "certificate",
    "verify_groups": "certificate",
    "Costs": "costs",
    "count_costs": "costs",
    "Limits": "allocation",
    "Target": "allocation",
    "allocate": "allocation",
    "PruningMethod": "methods.base",
    "build_model": "models.loading",
    "load_weights": "models.loading",
    "save_weights": "models.loading",
    "open_data": "data.sources",
    "fit": "training",
    "recalibrate_batchnorm": "training",
    "prune": "pipeline",
    "feature_backbone": "transfer",
    "FeatureBackbone": "transfer",
    "TransferReport": "transfer",
    "TransferRow": "transfer",
    "transfer_networks": "transfer",
    "detector": "transfer",
    "classifier": "transfer",
    "DetectionSource": "data.detection",
    "open_detection": "data.detection",
    "JointLoss": "methods.trained_decoder",
    "joint_loss": "methods.trained_decoder",
    "ExpectedMacs": "gates",
    "GatedNetwork": "gates",
    "GatingEstimate": "gates",
    "estimate_gating": "gates",
    "firing_signature": "gates",
    "measure_gating": "gates",
    "solve_mass": "gates",
    "GatedExport": "export.onnx_gated",
    "export_gated": "export.onnx_gated",
    "RoutedExport": "export.onnx_routes",
    "RoutesIndex": "export.routes_folder",
    "export_routes": "export.onnx_routes",
    "FastestFlavour": "gated_deployment",
    "export_fastest": "gated_deployment",
    "Specialised": "ort_specialisation",
    "open_specialised": "ort_specialisation",
    "specialise_ort_cpu": "ort_specialisation",
    "export_onnx": "export.onnx_static",
    "check_parity": "export.parity",
    "PrecisionParity": "export.precision_check",
    "ReducedExport": "export.reduced_export",
    "convert_to_fp16": "export.fp16",
    "quantize_onnx": "export.int8",
    "Diagnosis": "doctor",
    "diagnose": "doctor",
    "diagnose_recorded": "doctor",
    "Checkpoints": "checkpoints",
    "Distillation": "training",
    "EpochLog": "training",
    "ParameterGroup": "training",
    "StepLog": "training",
    "Watcher": "training",
    "distilled": "training",
    "search_space": "methods.options",
    "Recipe": "recipes",
    "load_recipe": "recipes",
    "RunResult": "workbench",
    "execute": "workbench",
    "RunReport": "report",
    "write_html": "report",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from nni_prune_ext.allocation import LayerLimit, Limits, Target, allocate
    from nni_prune_ext.certificate import Certificate, remove_channels, verify_groups
    from nni_prune_ext.checkpoints import Checkpoints
    from nni_prune_ext.costs import Costs, count_costs
    from nni_prune_ext.data.batches import BatchLoader, split_batches
    from nni_prune_ext.data.detection import DetectionSource, open_detection
    from nni_prune_ext.data.image_arrays import DataSource
    from nni_prune_ext.data.loaders import Loaders
    from nni_prune_ext.data.sources import open_data
    from nni_prune_ext.deployment import load_pruned, write_artefacts
    from nni_prune_ext.doctor import Diagnosis, diagnose, diagnose_recorded
    from nni_prune_ext.export.fp16 import convert_to_fp16
    from nni_prune_ext.export.int8 import quantize_onnx
    from nni_prune_ext.export.onnx_gated import GatedExport, export_gated
    from nni_prune_ext.export.onnx_routes import RoutedExport, export_routes
    from nni_prune_ext.export.onnx_static import export_onnx
    from nni_prune_ext.export.parity import check_parity
    from nni_prune_ext.export.precision_check import PrecisionParity
    from nni_prune_ext.export.reduced_export import ReducedExport
    from nni_prune_ext.export.routes_folder import RoutesIndex
    from nni_prune_ext.gated_deployment import FastestFlavour, export_fastest
    from nni_prune_ext.gates import (
        ExpectedMacs,
        GatedNetwork,
        GatingEstimate,
        estimate_gating,
        firing_signature,
        measure_gating,
        solve_mass,
    )
    from nni_prune_ext.graph.channel_groups import ChannelGroup, ChannelGroups, trace_channel_groups
    from nni_prune_ext.latency.conditions import LatencyConditions
    from nni_prune_ext.latency.evidence import LatencyEvidence
    from nni_prune_ext.methods.base import MethodSpec, Outcome, Phase, PruningMethod
    from nni_prune_ext.methods.options import search_space
    from nni_prune_ext.methods.trained_decoder import JointLoss, joint_loss
    from nni_prune_ext.models.loading import build_model, load_weights, save_weights
    from nni_prune_ext.ort_specialisation import Specialised, open_specialised, specialise_ort_cpu
    from nni_prune_ext.pipeline import PruneResult, prune
    from nni_prune_ext.plan import PruningPlan, plan_from_channels, plan_from_masks, plan_to_masks
    from nni_prune_ext.recipes import Recipe, load_recipe
    from nni_prune_ext.report import RunReport, write_html
    from nni_prune_ext.surgery import Removal, remap_optimizer, silence_channels
    from nni_prune_ext.training import (
        Distillation,
        EpochLog,
        ParameterGroup,
        StepLog,
        TrainingSettings,
        Watcher,
        accuracy,
        distilled,
        fit,
        recalibrate_batchnorm,
    )
    from nni_prune_ext.transfer import (
        FeatureBackbone,
        TransferReport,
        TransferRow,
        classifier,
        detector,
        feature_backbone,
        transfer_networks,
    )
    from nni_prune_ext.workbench import RunResult, execute


def __getattr__(name: str) -> object:
    """Imports a public name on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'nni_prune_ext' has no attribute '{name}'")
    return getattr(import_module(f"nni_prune_ext.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    """Lists the public names."""
    return sorted(__all__)
