"""Writes an artefact folder: plan, weights, checked ONNX file, masks, gated network, manifest; all of it or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.export.artefact_folder import GATED, MASKS, ONNX, PLAN, WEIGHTS, ModelSpec, complete_or_absent
from nni_prune_ext.export.artefact_loading import check_rebuilds
from nni_prune_ext.export.earlier_run import check_replaceable, remove_artefacts
from nni_prune_ext.export.example_structure import ExampleStructure
from nni_prune_ext.export.manifest import MethodUse, write_manifest
from nni_prune_ext.export.onnx_gated import Flavour, GatedExport, export_gated
from nni_prune_ext.export.onnx_static import ExportResult, export_onnx
from nni_prune_ext.export.parity import FAIL
from nni_prune_ext.export.weight_masks import check_finite, check_masks, mask_facts, write_tensors
from nni_prune_ext.gates import GatedNetwork
from nni_prune_ext.inputs import ExampleInputs, tensors_in
from nni_prune_ext.models.weights import save_weights
from nni_prune_ext.plan import PruningPlan


@dataclass(frozen=True)
class Artefacts:
    """What was written for one network."""

    folder: Path
    onnx: Path
    export: ExportResult | GatedExport


def write_artefacts(
    model: nn.Module,
    folder: Path,
    example_inputs: ExampleInputs,
    *,
    plan: PruningPlan | None = None,
    properties: Mapping[str, str] | None = None,
    given_inputs: Sequence[ExampleInputs] | None = None,
    spec: ModelSpec | None = None,
    weight_masks: Mapping[str, Tensor] | None = None,
    gated_model: nn.Module | None = None,
    method: MethodUse | None = None,
    flavour: Flavour | None = None,
    fail: float = FAIL,
) -> Artefacts:
    """Writes weights, plan and a checked ONNX file of a (compact or dense) model: all of them, or none on an error.

    Args:
        plan: the plan that led to the model; a dense model has none.
        properties: further ONNX metadata.
        given_inputs: real inputs for the parity check.
        spec: how the original model is built, so that ``export --artefact`` needs no further options.
        weight_masks: name of a parameter of the model → bool mask; the weights are zero wherever it is ``False``.
        gated_model: the network whose channels are switched per input; its weights are written.
        method: how the model was pruned, so that ``load_gated`` knows who rebuilds the gated network.
        flavour: the ONNX file is that of the gated network, in this flavour; without one, that of the model.
        fail: largest relative difference between ONNX Runtime and PyTorch that is let pass.

    Raises:
        OutputError: the folder cannot be written, or a file of somebody else would be replaced.
        WeightsError: some weights are NaN or infinite.
        ArtefactError: the masks are not those of the weights, or the method would rebuild another gated network.
        ExportError: no ONNX file can be made, or its outputs differ from PyTorch's.
    """
    check_replaceable(folder)
    facts = dict(properties or {})
    if weight_masks:
        check_masks(weight_masks, model.state_dict(), source="What was given to write_artefacts")
    check_finite(model, source="The network to write")
    if gated_model is not None:
        check_finite(gated_model, source="The gated network to write")
        check_rebuilds(method, model, gated_model, example_inputs)
    with complete_or_absent(folder) as draft:
        if plan is not None:
            plan.save(draft / PLAN)
            facts["plan"] = plan.to_json()
        if spec is not None:
            facts["model"] = spec.model_dump_json(exclude={"example"})
        _save_spec(spec, example_inputs, draft)
        save_weights(model, draft / WEIGHTS)
        if weight_masks:
            write_tensors(weight_masks, draft / MASKS)
        if gated_model is not None:
            write_tensors(gated_model.state_dict(), draft / GATED)
        made: ExportResult | GatedExport
        if flavour is None:
            made = export_onnx(
                model, example_inputs, draft / ONNX, properties=facts, given_inputs=given_inputs, fail=fail
            )
        else:
            network, images = _gated(gated_model), _images(given_inputs)
            made = export_gated(
                network, example_inputs, draft / ONNX, flavour=flavour, images=images, properties=facts, fail=fail
            )
        write_manifest(draft, method=method, masks=mask_facts(weight_masks or {}))
        remove_artefacts(folder)
    return Artefacts(folder, folder / ONNX, _at(made, folder))


def _save_spec(spec: ModelSpec | None, example_inputs: ExampleInputs, folder: Path) -> None:
    """Writes how the model is built and called, as far as that is known."""
    example = ExampleStructure.of(example_inputs)
    if spec is None and example is not None and len(example.tensors[0].shape) > 1:
        spec = ModelSpec(input_shape=example.tensors[0].shape)
    if spec is not None:
        spec.model_copy(update={"example": example}).save(folder)


def _gated(network: nn.Module | None) -> GatedNetwork:
    if not isinstance(network, GatedNetwork):
        raise ConfigError(
            f"A flavour was asked for, but the gated network is {type(network).__name__}, expected a GatedNetwork. "
            "Pass gated_model=, or leave flavour out."
        )
    return network


def _images(given_inputs: Sequence[ExampleInputs] | None) -> Tensor | None:
    given = list(tensors_in(given_inputs or ()))
    return torch.cat(given) if given else None


def _at(made: ExportResult | GatedExport, folder: Path) -> ExportResult | GatedExport:
    path = folder / made.path.name
    if isinstance(made, GatedExport):
        return replace(made, path=path)
    return replace(made, path=path, data_path=made.data_path and folder / made.data_path.name)
