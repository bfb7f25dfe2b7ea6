"""From a compact model to artefacts: plan, weights, checked ONNX, accuracy and latency on the runtimes.

An artefact folder holds ``plan.json``, ``model.safetensors``, ``model.onnx``, ``model.json``, weight masks and a gated
network where there are any, and ``manifest.json`` with the hash of each. ``load_pruned``, ``load_masks`` and
``load_gated`` read it back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from pydantic import JsonValue
from torch import Tensor, nn

from nni_prune_ext.costs import count_costs
from nni_prune_ext.errors import ExportError, ParityError
from nni_prune_ext.evaluation import LatencyReport, accuracy_of_session, file_size_bytes, measure_latency
from nni_prune_ext.export.artefact_folder import (
    ONNX,
    REDUCED_ONNX,
    ModelSpec,
    check_unused,
    check_writable,
    complete_or_absent,
)
from nni_prune_ext.export.artefact_loading import load_gated as load_gated
from nni_prune_ext.export.artefact_loading import load_masks as load_masks
from nni_prune_ext.export.artefact_loading import load_pruned as load_pruned
from nni_prune_ext.export.artefact_writing import Artefacts as Artefacts
from nni_prune_ext.export.artefact_writing import write_artefacts as write_artefacts
from nni_prune_ext.export.earlier_run import check_replaceable, remove_artefacts, remove_earlier_run
from nni_prune_ext.export.manifest import MethodUse
from nni_prune_ext.export.manifest import add_parts as add_parts
from nni_prune_ext.export.onnx_gated import Flavour, GatedExport
from nni_prune_ext.export.parity import FAIL
from nni_prune_ext.gates import GatedNetwork, MeasuredGating
from nni_prune_ext.gating_facts import GatingRecord
from nni_prune_ext.inputs import ExampleInputs, tensors_in
from nni_prune_ext.lower_precision import LowerPrecision, lower_rows
from nni_prune_ext.pipeline import PruneResult
from nni_prune_ext.report import Row
from nni_prune_ext.report.gate_facts import GatingFacts
from nni_prune_ext.report.pictures import png_text
from nni_prune_ext.runtimes.base import Array, RunnableModel
from nni_prune_ext.runtimes.registered import runtime as runtime
from nni_prune_ext.training import Batches, accuracy
from nni_prune_ext.training.processes import apart

ImageBatches: TypeAlias = Iterable[tuple[Tensor, Tensor]]
Metric: TypeAlias = Callable[[nn.Module, Batches], float]
"""A model and batches → how good the model is on them; higher is better."""


def onnx_accuracy(
    path: Path,
    batches: ImageBatches,
    *,
    on: str = "onnxruntime-cpu",
    threads: int | None = None,
    single: bool = False,
) -> float:
    """Returns top-1 accuracy (0–1) of an ONNX file on a runtime.

    Args:
        single: run the images one by one, for files that take no more.

    Raises:
        RuntimeUnavailableError: the runtime is not usable here.
    """
    arrays = ((images.numpy(), labels.numpy()) for images, labels in batches)
    if single:
        arrays = ((image[None], labels[k : k + 1]) for images, labels in arrays for k, image in enumerate(images))
    with runtime(on).session(RunnableModel(onnx_path=path), threads=threads) as session:
        return accuracy_of_session(session, arrays)


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
    return _latency(paths, _single_images(images), Measurement(rounds, min_seconds), on=on)


@dataclass(frozen=True)
class Variant:
    """One network of a before/after comparison.

    Attributes:
        name: its row's name and its artefact folder.
        model: the network as it would ship.
        result: how it was pruned; ``None`` for a dense network.
        seconds: what it took to get there.
        options: the full configuration of the method, as JSON values.
        flavour: how the gates of a gated network are exported; ``None`` for all other networks.
    """

    name: str
    model: nn.Module
    result: PruneResult | None = None
    seconds: float | None = None
    options: Mapping[str, JsonValue] = field(default_factory=dict)
    flavour: Flavour | None = None


def gated_variants(result: PruneResult, seconds: float | None, options: Mapping[str, JsonValue]) -> list[Variant]:
    """Returns the gated network of a result in every flavour; nothing where there is none that can be exported."""
    gated = result.outcome.gated_model
    if not isinstance(gated, GatedNetwork):
        return []
    flavours: tuple[Flavour, ...] = ("mask", "compact")
    return [Variant(f"{result.method}-{own}", gated, result, seconds, options, own) for own in flavours]


@dataclass(frozen=True)
class Measurement:
    """How long latency is measured: at least so many rounds, and at least so many seconds for all rounds together."""

    rounds: int = 30
    min_seconds: float = 2.0


class Comparison(NamedTuple):
    """Networks side by side.

    Attributes:
        rows: one per variant and file of lower precision; none for a gated network that has no file in its flavour.
        latency: the measurement behind the rows, if there is one.
        gating: one entry per gated network, also about rows that are missing.
    """

    rows: list[Row]
    latency: LatencyReport | None
    gating: tuple[GatingFacts, ...]


def compare_variants(
    variants: Sequence[Variant],
    folder: Path,
    example_inputs: ExampleInputs,
    *,
    test_batches: Batches | None = None,
    metric: Metric | None = None,
    given_inputs: ExampleInputs | None = None,
    progress: Callable[[str], None] | None = None,
    spec: ModelSpec | None = None,
    overwrite: bool = True,
    measurement: Measurement | None = Measurement(),
    lower: LowerPrecision | None = None,
) -> Comparison:
    """Writes the artefacts of every variant and measures all side by side; the first one is the dense reference.

    On an error the folder is as it was before. A pruned network may differ from PyTorch by up to twice as much as the
    dense one does, if that is more than the usual 1e-4.

    Args:
        folder: gets one artefact folder per variant.
        test_batches: images and labels for accuracy in PyTorch and on ONNX Runtime; ``None`` measures no accuracy.
        metric: of a model on the batches, in the place of top-1 accuracy; it is not measured on ONNX Runtime.
        given_inputs: what parity and latency are measured on, instead of the first test images.
        progress: is told what is being done.
        spec: how the original model is built.
        overwrite: replace an earlier run in the folder; otherwise the folder must be empty.
        measurement: how long latency is measured; ``None`` measures none.
        lower: files of lower precision to make of every network without gates, each with a row of its own. Accuracy
            that is lost is shown and not judged; a file that cannot be made has no row, and ``progress`` is told why.

    Raises:
        OutputError, ExportError: see ``write_artefacts``.
    """
    (check_writable if overwrite else check_unused)(folder)
    for variant in variants:
        check_replaceable(folder / variant.name)
    tell = progress or (lambda _: None)
    images = None if test_batches is None or given_inputs is not None else next(iter(test_batches))[0]
    given = [given_inputs] if given_inputs is not None else None if images is None else [images[:16]]
    rows: list[Row] = []
    gates = GatingRecord(variants[0].model, _image_batches(test_batches))
    with complete_or_absent(folder) as draft:
        for variant in variants:
            tell(f"exporting and checking {variant.name}")
            fail = _parity_limit(variant, rows)
            gated = _measured(gates, variant)
            more = given if variant.flavour is None or images is None else [images[:64]]
            try:
                files = _write_variant(variant, draft, example_inputs, given_inputs=more, spec=spec, fail=fail)
            except (ExportError, ParityError) as error:
                if variant.flavour is None:
                    raise
                tell(f"no row {variant.name}: {error}")  # the static network is worth having all the same
                gates.failed(_network(variant), variant.name, str(error))
                continue
            if isinstance(files.export, GatedExport):
                gates.written(_network(variant), variant.name, files.export)
            row = replace(_row(variant, files, example_inputs, control=bool(rows)), parity_limit=fail)
            if row.parity is not None:
                tell(f"largest relative difference to PyTorch {row.parity:.1e}, at most {fail:.1e} allowed")
            if test_batches is not None:
                row = _with_accuracy(row, variant, files.onnx, test_batches, metric)
            if gated is not None and gates.batches is not None:
                row = _with_expected_macs(row, gated, example_inputs)
            rows.append(row)
            if lower is not None and variant.flavour is None:
                labelled = test_batches if metric is None and _are_images(test_batches or ()) else None
                rows += lower_rows(row, files.onnx, lower, labelled, tell)
        latency = None
        if measurement is not None:
            tell("measuring latency, all networks side by side")
            files_by_name = {row.name: draft / (row.of or row.name) / _onnx_name(row) for row in rows}
            if given_inputs is not None:
                inputs = [[np.ascontiguousarray(tensor.cpu().numpy()) for tensor in tensors_in(given_inputs)]]
            else:
                inputs = _single_images(next(tensors_in(example_inputs)) if images is None else images)
            latency = _latency(files_by_name, inputs, measurement, on="onnxruntime-cpu")
        remove_earlier_run(folder)
        for variant in variants:  # those that no report names
            remove_artefacts(folder / variant.name)
    return Comparison(rows if latency is None else _with_latency(rows, latency), latency, gates.facts())


def _onnx_name(row: Row) -> str:
    return ONNX if row.precision == "fp32" else REDUCED_ONNX[row.precision]


def _single_images(images: Tensor) -> list[list[Array]]:
    return [[np.ascontiguousarray(image[None].numpy())] for image in images[:8]]


def _latency(
    paths: Mapping[str, Path], inputs: Sequence[Sequence[Array]], measurement: Measurement, *, on: str
) -> LatencyReport:
    chosen = runtime(on)
    entries = {name: (chosen, RunnableModel(onnx_path=path)) for name, path in paths.items()}
    rounds, min_seconds = measurement.rounds, measurement.min_seconds
    return measure_latency(entries, inputs, rounds=rounds, min_seconds=min_seconds, threads=1)


def _with_latency(rows: Sequence[Row], latency: LatencyReport) -> list[Row]:
    measured = {row.name: row for row in latency.rows}
    return [replace(row, latency_ms=measured[row.name].p50_ms, latency_ratio=measured[row.name].ratio) for row in rows]


def _write_variant(
    variant: Variant,
    folder: Path,
    example_inputs: ExampleInputs,
    *,
    given_inputs: Sequence[ExampleInputs] | None,
    spec: ModelSpec | None,
    fail: float,
) -> Artefacts:
    result, gated = variant.result, variant.model
    return write_artefacts(
        gated.model if isinstance(gated, GatedNetwork) else variant.model,
        folder / variant.name,
        example_inputs,
        plan=result.plan if result else None,
        given_inputs=given_inputs,
        properties=_origin(variant),
        spec=spec,
        weight_masks=result.outcome.weight_masks if result else None,
        gated_model=result.outcome.gated_model if result else None,
        method=MethodUse(name=result.method, options=dict(variant.options)) if result else None,
        flavour=variant.flavour,
        fail=fail,
    )


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


def _with_accuracy(row: Row, variant: Variant, onnx: Path, batches: Batches, metric: Metric | None) -> Row:
    measure = metric or accuracy
    plain, single = variant.result is not None and variant.flavour is None, variant.flavour == "compact"
    return replace(
        row,
        top1_removed=measure(variant.result.removed_only, batches) if plain and variant.result else None,
        top1=measure(variant.model, batches),
        top1_onnx=onnx_accuracy(onnx, batches, single=single) if metric is None and _are_images(batches) else None,
    )


def _network(variant: Variant) -> str:
    """Returns which network this is, whatever its flavour: the row without gates is called like the method."""
    return variant.result.method if variant.result else variant.name


def _measured(gates: GatingRecord, variant: Variant) -> MeasuredGating | None:
    """Measures the gates of a gated network, once for all of its flavours."""
    if variant.flavour is None or not isinstance(variant.model, GatedNetwork):
        return None
    return gates.measured(_network(variant), variant.model, variant.result.outcome.gating if variant.result else None)


def _with_expected_macs(row: Row, measured: MeasuredGating, example_inputs: ExampleInputs) -> Row:
    """Puts in the mean over the test images in the place of the MACs of the static network, for as many as all rows."""
    expected, _ = measured
    note = f"expected MACs: mean over {expected.images} test images, standard deviation {expected.spread:.4g}"
    return replace(row, macs=round(expected.mean * len(next(tensors_in(example_inputs)))), asked=note)


def _are_images(batches: Batches) -> bool:
    """Says whether batches are pairs of tensors, which a runtime can be given."""
    first = next(iter(apart(batches)), None)
    return isinstance(first, (tuple, list)) and len(first) == 2 and all(isinstance(part, Tensor) for part in first)


def _image_batches(batches: Batches | None) -> Batches | None:
    return batches if batches is not None and _are_images(batches) else None


def _row(variant: Variant, artefacts: Artefacts, example_inputs: ExampleInputs, *, control: bool) -> Row:
    result, parity, gated = variant.result, artefacts.export.parity, variant.flavour is not None
    costs = result.costs if result and not gated else count_costs(variant.model, example_inputs)
    certificate = result.certificate if result else None
    return Row(
        name=variant.name,
        macs=costs.macs,
        params=costs.params,
        onnx_bytes=file_size_bytes(artefacts.onnx),
        certificate=certificate.max_relative_error if certificate else None,
        parity=parity.max_rel if parity else None,
        asked="; ".join(map(str, result.achieved)) if result else "",
        seconds=variant.seconds,
        weight_sparsity=_masked_share(result, costs.params) if result else None,
        kind="gated" if gated else "pruned" if result else "control" if control else "dense",
    )


def _masked_share(result: PruneResult, params: int) -> float | None:
    """Returns the share (0–1) of the weights left that a weight mask holds at zero; ``None`` without masks."""
    masks = result.outcome.weight_masks
    return sum(int((~mask).sum()) for mask in masks.values()) / params if masks else None


def _targets(result: PruneResult) -> list[dict[str, object]]:
    return [
        {"target": str(a.target), "dense": a.dense, "asked": a.asked, "achieved": a.achieved, "met": a.met}
        for a in result.achieved
    ]


def result_facts(result: PruneResult) -> dict[str, object]:
    """Returns what a report must say about one pruning result beside its row."""
    return {
        "method": result.method,
        "certificate": result.certificate.as_dict() if result.certificate else None,
        "targets": _targets(result),
        "latency_target": result.latency.to_dict() if result.latency else None,
        "protected": [{"root": p.root, "width": p.width, "reason": p.reason} for p in result.groups.protected],
        "rewrites": list(result.groups.rewrites),
        "unreached": list(result.groups.unreached),
        "value_dependent": list(result.groups.value_dependent),
        "facts": dict(result.outcome.facts),
        "pictures": {caption: png_text(picture) for caption, picture in result.outcome.pictures.items()},
        "epochs": [vars(log) for log in result.logs],
    }
