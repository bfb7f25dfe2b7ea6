"""From a compact model to artefacts: plan, weights, checked ONNX, accuracy and latency on the runtimes.

An artefact folder holds ``plan.json``, ``model.safetensors``, ``model.onnx`` and ``report.json``; the compact PyTorch model is
rebuilt from the original model code with ``load_pruned``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
from torch import Tensor, nn

from nni_prune_ext.errors import OutputError, PluginError
from nni_prune_ext.evaluation import LatencyReport, accuracy_of_session, environment, file_size_bytes, measure_latency
from nni_prune_ext.export.onnx_static import ExportResult, export_onnx
from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.models.weights import load_weights, save_weights
from nni_prune_ext.pipeline import PruneResult
from nni_prune_ext.plan import PruningPlan
from nni_prune_ext.registry import load_plugin
from nni_prune_ext.report import Row
from nni_prune_ext.runtimes.base import InferenceRuntime, RunnableModel
from nni_prune_ext.surgery import cut_channels

ImageBatches: TypeAlias = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Artefacts:
    """What was written for one network."""

    folder: Path
    onnx: Path
    export: ExportResult


def check_writable(folder: Path) -> None:
    """Makes sure that a folder can be created and written to, before any work; leaves nothing behind.

    Raises:
        OutputError: it cannot.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise OutputError(
            f"Cannot write to '{folder}': {error.strerror or error}. Choose another folder with --out."
        ) from error


def write_artefacts(
    model: nn.Module,
    folder: Path,
    example_inputs: ExampleInputs,
    *,
    plan: PruningPlan | None = None,
    properties: Mapping[str, str] | None = None,
    given_inputs: Sequence[ExampleInputs] | None = None,
) -> Artefacts:
    """Writes weights, plan and a checked ONNX file of a (compact or dense) model.

    Args:
        plan: the plan that led to the model; a dense model has none.
        properties: further ONNX metadata.
        given_inputs: real inputs for the parity check.

    Raises:
        OutputError: the folder cannot be written.
        ExportError: no ONNX file can be made, or its outputs differ from PyTorch's.
    """
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = dict(properties or {})
    if plan is not None:
        plan.save(folder / "plan.json")
        facts["plan"] = plan.to_json()
    save_weights(model, folder / "model.safetensors")
    path = folder / "model.onnx"
    result = export_onnx(model, example_inputs, path, properties=facts, given_inputs=given_inputs)
    return Artefacts(folder, path, result)


def load_pruned(model: nn.Module, folder: Path, example_inputs: ExampleInputs) -> nn.Module:
    """Rebuilds the compact model of an artefact folder from the original model code.

    Args:
        model: the original model, with any weights.

    Raises:
        PlanError: the folder has no usable plan, or the plan is for another model.
        WeightsError: the weights are missing or do not fit.
    """
    plan = PruningPlan.load(folder / "plan.json")
    compact = cut_channels(model, plan, example_inputs).model
    load_weights(compact, folder / "model.safetensors")
    return compact


def runtime(name: str) -> InferenceRuntime:
    """Returns a registered runtime.

    Raises:
        UnknownPluginError: no such name.
    """
    made = load_plugin("runtimes", name)
    if not callable(made):
        raise PluginError(f"The runtime '{name}' is a {type(made).__name__}, expected a class without arguments.")
    return cast("InferenceRuntime", made())


def onnx_accuracy(path: Path, batches: ImageBatches, *, on: str = "onnxruntime-cpu", threads: int | None = None) -> float:
    """Returns top-1 accuracy (0–1) of an ONNX file on a runtime.

    Raises:
        RuntimeUnavailableError: the runtime is not usable here.
    """
    with runtime(on).session(RunnableModel(onnx_path=path), threads=threads) as session:
        return accuracy_of_session(session, ((images.numpy(), labels.numpy()) for images, labels in batches))


def compare_latency(
    paths: Mapping[str, Path], images: Tensor, *, on: str = "onnxruntime-cpu", rounds: int = 30, min_seconds: float = 2.0
) -> LatencyReport:
    """Measures several ONNX files side by side, one image at a time, the first one being the reference.

    Args:
        images: ``(N, C, H, W)``; rounds rotate over them.
    """
    inputs = [[np.ascontiguousarray(image[None].numpy())] for image in images[:8]]
    chosen = runtime(on)
    entries = {name: (chosen, RunnableModel(onnx_path=path)) for name, path in paths.items()}
    return measure_latency(entries, inputs, rounds=rounds, min_seconds=min_seconds, threads=1)


def with_latency(rows: Sequence[Row], latency: LatencyReport) -> list[Row]:
    """Returns the rows with median latency and ratio to the dense network filled in."""
    measured = {row.name: row for row in latency.rows}
    return [
        replace(row, latency_ms=measured[row.name].p50_ms, latency_ratio=measured[row.name].ratio)
        if row.name in measured
        else row
        for row in rows
    ]


def result_row(result: PruneResult, artefacts: Artefacts, *, name: str | None = None) -> Row:
    """Returns the facts of a pruning result; accuracies and latency are the caller's to fill in."""
    parity = artefacts.export.parity
    return Row(
        name=name or result.method,
        macs=result.costs.macs,
        params=result.costs.params,
        onnx_bytes=file_size_bytes(artefacts.onnx),
        certificate=result.certificate.max_relative_error if result.certificate else None,
        parity=parity.max_rel if parity else None,
        asked="; ".join(f"{a.target}: asked {a.asked:.6g}, achieved {a.achieved:.6g}" for a in result.achieved),
    )


def report_facts(result: PruneResult | None = None, latency: LatencyReport | None = None) -> dict[str, object]:
    """Returns what every report must say beside its rows: environment, certificate, protected layers, conditions."""
    facts: dict[str, object] = {"environment": environment()}
    if latency is not None:
        facts["latency"] = latency.to_dict()
    if result is not None:
        facts |= {
            "method": result.method,
            "certificate": result.certificate.as_dict() if result.certificate else None,
            "targets": [{"target": str(a.target), "dense": a.dense, "asked": a.asked, "achieved": a.achieved, "met": a.met}
                        for a in result.achieved],
            "protected": [{"root": p.root, "width": p.width, "reason": p.reason} for p in result.groups.protected],
            "unreached": list(result.groups.unreached),
            "epochs": [vars(log) for log in result.logs],
        }
    return facts


