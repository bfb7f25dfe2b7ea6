"""From a compact model to artefacts: plan, weights, checked ONNX, accuracy and latency on the runtimes.

An artefact folder holds ``plan.json``, ``model.safetensors``, ``model.onnx`` and, where known, ``model.json``; the
compact PyTorch model is rebuilt from the original model code with ``load_pruned``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
from torch import Tensor, nn

from nni_prune_ext.costs import count_costs
from nni_prune_ext.errors import PluginError
from nni_prune_ext.evaluation import LatencyReport, accuracy_of_session, environment, file_size_bytes, measure_latency
from nni_prune_ext.export.artefact_folder import (
    ONNX,
    PLAN,
    WEIGHTS,
    ModelSpec,
    check_unused,
    check_writable,
    complete_or_absent,
    remove_artefacts,
    remove_earlier_run,
)
from nni_prune_ext.export.onnx_static import ExportResult, export_onnx
from nni_prune_ext.export.parity import FAIL
from nni_prune_ext.inputs import ExampleInputs, tensors_in
from nni_prune_ext.models.weights import load_weights, save_weights
from nni_prune_ext.pipeline import PruneResult
from nni_prune_ext.plan import PruningPlan
from nni_prune_ext.registry import load_plugin
from nni_prune_ext.report import Row
from nni_prune_ext.runtimes.base import InferenceRuntime, RunnableModel
from nni_prune_ext.surgery import cut_channels
from nni_prune_ext.training import accuracy

ImageBatches: TypeAlias = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Artefacts:
    """What was written for one network."""

    folder: Path
    onnx: Path
    export: ExportResult


def write_artefacts(
    model: nn.Module,
    folder: Path,
    example_inputs: ExampleInputs,
    *,
    plan: PruningPlan | None = None,
    properties: Mapping[str, str] | None = None,
    given_inputs: Sequence[ExampleInputs] | None = None,
    spec: ModelSpec | None = None,
    fail: float = FAIL,
) -> Artefacts:
    """Writes weights, plan and a checked ONNX file of a (compact or dense) model: all of them, or none on an error.

    Args:
        plan: the plan that led to the model; a dense model has none.
        properties: further ONNX metadata.
        given_inputs: real inputs for the parity check.
        spec: how the original model is built, so that ``export --artefact`` needs no further options.
        fail: largest relative difference between ONNX Runtime and PyTorch that is let pass.

    Raises:
        OutputError: the folder cannot be written.
        ExportError: no ONNX file can be made, or its outputs differ from PyTorch's.
    """
    facts = dict(properties or {})
    with complete_or_absent(folder) as draft:
        if plan is not None:
            plan.save(draft / PLAN)
            facts["plan"] = plan.to_json()
        if spec is not None:
            spec.save(draft)
            facts["model"] = spec.model_dump_json()
        save_weights(model, draft / WEIGHTS)
        made = export_onnx(model, example_inputs, draft / ONNX, properties=facts, given_inputs=given_inputs, fail=fail)
        remove_artefacts(folder)
    return Artefacts(folder, folder / ONNX, _at(made, folder))


def _at(made: ExportResult, folder: Path) -> ExportResult:
    data = made.data_path and folder / made.data_path.name
    return replace(made, path=folder / made.path.name, data_path=data)


def load_pruned(model: nn.Module, folder: Path, example_inputs: ExampleInputs) -> nn.Module:
    """Rebuilds the compact model of an artefact folder from the original model code.

    Args:
        model: the original model, with any weights.

    Raises:
        PlanError: the folder has no usable plan, or the plan is for another model.
        WeightsError: the weights are missing or do not fit.
    """
    plan = PruningPlan.load(folder / PLAN)
    compact = cut_channels(model, plan, example_inputs).model
    load_weights(compact, folder / WEIGHTS)
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


def onnx_accuracy(
    path: Path, batches: ImageBatches, *, on: str = "onnxruntime-cpu", threads: int | None = None
) -> float:
    """Returns top-1 accuracy (0–1) of an ONNX file on a runtime.

    Raises:
        RuntimeUnavailableError: the runtime is not usable here.
    """
    with runtime(on).session(RunnableModel(onnx_path=path), threads=threads) as session:
        return accuracy_of_session(session, ((images.numpy(), labels.numpy()) for images, labels in batches))


def compare_latency(
    paths: Mapping[str, Path],
    images: Tensor,
    *,
    on: str = "onnxruntime-cpu",
    rounds: int = 30,
    min_seconds: float = 2.0,
) -> LatencyReport:
    """Measures several ONNX files side by side, one image at a time, the first one being the reference.

    Args:
        images: ``(N, C, H, W)``; rounds rotate over them.
    """
    inputs = [[np.ascontiguousarray(image[None].numpy())] for image in images[:8]]
    chosen = runtime(on)
    entries = {name: (chosen, RunnableModel(onnx_path=path)) for name, path in paths.items()}
    return measure_latency(entries, inputs, rounds=rounds, min_seconds=min_seconds, threads=1)


@dataclass(frozen=True)
class Variant:
    """One network of a before/after comparison.

    Attributes:
        name: its row's name and its artefact folder.
        model: the network as it would ship.
        result: how it was pruned; ``None`` for a dense network.
        seconds: what it took to get there.
    """

    name: str
    model: nn.Module
    result: PruneResult | None = None
    seconds: float | None = None


def compare_variants(
    variants: Sequence[Variant],
    folder: Path,
    example_inputs: ExampleInputs,
    *,
    test_batches: ImageBatches | None = None,
    progress: Callable[[str], None] | None = None,
    spec: ModelSpec | None = None,
    overwrite: bool = True,
) -> tuple[list[Row], LatencyReport]:
    """Writes the artefacts of every variant and measures all side by side; the first one is the dense reference.

    On an error the folder is as it was before. A pruned network may differ from PyTorch by up to twice as much as the
    dense one does, if that is more than the usual 1e-4.

    Args:
        folder: gets one artefact folder per variant.
        test_batches: images and labels for accuracy in PyTorch and on ONNX Runtime; ``None`` measures no accuracy.
        progress: is told what is being done.
        spec: how the original model is built.
        overwrite: replace an earlier run in the folder; otherwise the folder must be empty.

    Returns:
        one row per variant, and the latency measurement behind it.

    Raises:
        OutputError, ExportError: see ``write_artefacts``.
    """
    (check_writable if overwrite else check_unused)(folder)
    tell = progress or (lambda _: None)
    images = None if test_batches is None else next(iter(test_batches))[0]
    given = None if images is None else [images[:16]]
    rows: list[Row] = []
    with complete_or_absent(folder) as draft:
        for variant in variants:
            tell(f"exporting and checking {variant.name}")
            fail = _parity_limit(variant, rows)
            files = write_artefacts(
                variant.model,
                draft / variant.name,
                example_inputs,
                plan=variant.result.plan if variant.result else None,
                given_inputs=given,
                properties=_origin(variant),
                spec=spec,
                fail=fail,
            )
            row = replace(_row(variant, files, example_inputs), parity_limit=fail)
            tell(f"largest relative difference to PyTorch {row.parity:.1e}, at most {fail:.1e} allowed")
            rows.append(row if test_batches is None else _with_accuracy(row, variant, files.onnx, test_batches))
        tell("measuring latency, all networks side by side")
        if images is None:
            images = next(tensors_in(example_inputs))
        latency = compare_latency({variant.name: draft / variant.name / ONNX for variant in variants}, images)
        remove_earlier_run(folder)
    measured = {row.name: row for row in latency.rows}
    return [
        replace(row, latency_ms=measured[row.name].p50_ms, latency_ratio=measured[row.name].ratio) for row in rows
    ], latency


def _parity_limit(variant: Variant, rows: Sequence[Row]) -> float:
    """Returns the largest difference to PyTorch that passes; a pruned network may have twice that of the dense one."""
    dense = rows[0].parity if rows and variant.result else None
    return FAIL if dense is None else max(FAIL, 2 * dense)


def _origin(variant: Variant) -> dict[str, str]:
    """Returns the ONNX metadata that say how a variant came to be; values beyond text are JSON."""
    result = variant.result
    if result is None:
        return {"variant": variant.name}
    return {
        "variant": variant.name,
        "method": result.method,
        "seed": str(result.seed),
        "targets": json.dumps(_targets(result)),
        "certificate": json.dumps(result.certificate.as_dict() if result.certificate else None),
    }


def _with_accuracy(row: Row, variant: Variant, onnx: Path, batches: ImageBatches) -> Row:
    return replace(
        row,
        top1_removed=accuracy(variant.result.removed_only, batches) if variant.result else None,
        top1=accuracy(variant.model, batches),
        top1_onnx=onnx_accuracy(onnx, batches),
    )


def _row(variant: Variant, artefacts: Artefacts, example_inputs: ExampleInputs) -> Row:
    result, parity = variant.result, artefacts.export.parity
    costs = result.costs if result else count_costs(variant.model, example_inputs)
    certificate = result.certificate if result else None
    return Row(
        name=variant.name,
        macs=costs.macs,
        params=costs.params,
        onnx_bytes=file_size_bytes(artefacts.onnx),
        certificate=certificate.max_relative_error if certificate else None,
        parity=parity.max_rel if parity else None,
        asked="; ".join(f"{a.target}: asked {a.asked:.6g}, achieved {a.achieved:.6g}" for a in result.achieved)
        if result
        else "",
        seconds=variant.seconds,
    )


def _targets(result: PruneResult) -> list[dict[str, object]]:
    return [
        {"target": str(a.target), "dense": a.dense, "asked": a.asked, "achieved": a.achieved, "met": a.met}
        for a in result.achieved
    ]


def measurement_facts(latency: LatencyReport) -> dict[str, object]:
    """Returns the conditions of a measurement: machine, versions, protocol, samples."""
    return {"environment": environment(), "latency": latency.to_dict()}


def latency_caption(latency: LatencyReport, without_data: bool = False) -> str:
    """Returns the line under a table that says how latency was measured."""
    how = f"latency: {latency.clock} time, {latency.threads} thread, batch {latency.batch_size}"
    missing = "; no data given: accuracy not measured" if without_data else ""
    return f"{how}, A/A error {100 * latency.error_bar:.1f} %{missing}"


def result_facts(result: PruneResult) -> dict[str, object]:
    """Returns what a report must say about one pruning result beside its row."""
    return {
        "method": result.method,
        "certificate": result.certificate.as_dict() if result.certificate else None,
        "targets": _targets(result),
        "protected": [{"root": p.root, "width": p.width, "reason": p.reason} for p in result.groups.protected],
        "rewrites": list(result.groups.rewrites),
        "unreached": list(result.groups.unreached),
        "value_dependent": list(result.groups.value_dependent),
        "facts": dict(result.outcome.facts),
        "epochs": [vars(log) for log in result.logs],
    }
