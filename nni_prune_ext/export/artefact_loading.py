"""From an artefact folder back to PyTorch: the compact model, its weight masks, the gated network around it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from pydantic import ValidationError
from torch import Tensor, nn

from nni_prune_ext.errors import ArtefactError, ModelError, UnknownPluginError
from nni_prune_ext.export.artefact_folder import GATED, MASKS, PLAN, WEIGHTS, ModelSpec
from nni_prune_ext.export.manifest import MethodUse, checked_manifest
from nni_prune_ext.export.weight_masks import check_finite, check_masks, read_tensors
from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.methods.base import MethodSpec
from nni_prune_ext.models.weights import load_weights
from nni_prune_ext.plan import PruningPlan
from nni_prune_ext.registry import load_plugin
from nni_prune_ext.surgery import cut_channels

ModelOrBuilder: TypeAlias = nn.Module | Callable[[], nn.Module]
"""The original model with any weights, or a function that builds it."""


def load_pruned(model: ModelOrBuilder, folder: Path, example_inputs: ExampleInputs | None = None) -> nn.Module:
    """Rebuilds the compact model of an artefact folder from the original model code.

    Every part of the folder is compared with its hash first. Nothing is unpickled.

    Args:
        model: the original model with any weights, which is not changed, or a function that builds it.
        example_inputs: inputs as the plan was made with; made from ``model.json`` by default, which describes a tensor
            or a flat tuple or list of tensors.

    Raises:
        ArtefactError: a part is missing, damaged, or not of this network; the folder holds a dense network.
        PlanError: the plan is unusable or for another model.
        WeightsError: the weights do not fit, or some are NaN or infinite.
        ModelError: the function builds no model, or the folder does not describe the example inputs.
    """
    checked_manifest(folder, needed=(PLAN, WEIGHTS))
    example = _example_of(folder) if example_inputs is None else example_inputs
    compact = cut_channels(_built(model), PruningPlan.load(folder / PLAN), example).model
    load_weights(compact, folder / WEIGHTS)
    check_finite(compact, source=f"'{folder / WEIGHTS}'")
    if (folder / MASKS).exists():
        check_masks(read_tensors(folder / MASKS), compact.state_dict(), source=f"'{folder / MASKS}'")
    return compact


def load_masks(folder: Path) -> dict[str, Tensor]:
    """Reads the weight masks of an artefact folder: weight name → bool mask, ``True`` = kept, on the CPU.

    Raises:
        ArtefactError: there are none, a part is damaged, or the masks are not those of the weights beside them.
    """
    checked_manifest(folder, needed=(MASKS, WEIGHTS))
    masks = read_tensors(folder / MASKS)
    check_masks(masks, read_tensors(folder / WEIGHTS), source=f"'{folder / MASKS}'")
    return masks


def load_gated(
    model: ModelOrBuilder,
    folder: Path,
    example_inputs: ExampleInputs | None = None,
    *,
    spec: MethodSpec | None = None,
) -> nn.Module:
    """Rebuilds the gated network of an artefact folder: the method builds it around the compact model.

    Args:
        model: the original model with any weights, or a function that builds it.
        example_inputs: as for ``load_pruned``.
        spec: the method, where it is not registered under its name. One that was used as ``module:SPEC`` must be
            passed: a folder never decides what code is imported.

    Raises:
        ArtefactError: as for ``load_pruned``; or the folder holds no gated network, or its method is unknown here, does
            not take the options that it was run with, or does not say how to rebuild.
        PlanError, WeightsError, ModelError: as for ``load_pruned``.
    """
    manifest = checked_manifest(folder, needed=(GATED,))
    builder = _gated_builder(manifest.method, spec)
    if builder is None:
        raise _not_rebuilt(folder, manifest.method.name if manifest.method else "unknown", spec)
    example = _example_of(folder) if example_inputs is None else example_inputs
    gated = builder(load_pruned(model, folder, example), example, read_tensors(folder / GATED))
    load_weights(gated, folder / GATED)
    check_finite(gated, source=f"'{folder / GATED}'")
    return gated


def _not_rebuilt(folder: Path, name: str, spec: MethodSpec | None) -> ArtefactError:
    module, _, attribute = name.partition(":")
    if spec is not None:
        reason = f"the method '{spec.name}' that was passed has no build_gated, expected one that says how"
        way_on = f"Pass the spec of '{name}'."
    elif attribute:
        reason = (
            f"its method '{name}' is not registered, and no folder decides what code is imported, expected the method "
            "from you"
        )
        way_on = f"If you trust that code: from {module} import {attribute}, and pass spec={attribute}."
    else:
        reason = f"its method '{name}' is not registered here or has no build_gated, expected a method that says how"
        way_on = "Install the package that it came from, or pass spec=."
    return ArtefactError(f"The gated network in '{folder}' cannot be rebuilt: {reason}. {way_on}")


def check_rebuilds(
    method: MethodUse | None, model: nn.Module, gated_model: nn.Module, example_inputs: ExampleInputs
) -> None:
    """Refuses a gated network that its method, if it says how, would rebuild with other weights.

    Args:
        model: the compact model.

    Raises:
        ArtefactError: it would.
    """
    builder = _gated_builder(method)
    if builder is None:
        return
    own = gated_model.state_dict()
    rebuilt = builder(copy.deepcopy(model), example_inputs, own).state_dict()
    differing = sorted(
        name for name in own.keys() | rebuilt.keys() if _shape(own.get(name)) != _shape(rebuilt.get(name))
    )
    if differing:
        name = differing[0]
        raise ArtefactError(
            f"The gated network has '{name}' of shape {_shape(own.get(name))}, but build_gated of method "
            f"'{method.name if method else ''}' makes {_shape(rebuilt.get(name))} of the compact model: it could not "
            "be read back. Expected the same network. Report this to the author of the method."
        )


def _gated_builder(
    method: MethodUse | None, spec: MethodSpec | None = None
) -> Callable[[nn.Module, ExampleInputs, Mapping[str, Tensor]], nn.Module] | None:
    """Returns what makes a method's gated network around a compact model; ``None`` where nobody says how."""
    spec = spec or (_registered(method.name) if method else None)
    if method is None or spec is None or spec.build_gated is None:
        return None
    build = spec.build_gated
    try:
        options = spec.options.model_validate(method.options)
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtefactError(
            f"The method '{method.name}' does not take the options that the network was pruned with "
            f"({'.'.join(str(part) for part in first['loc'])}: {first['msg']}), expected those of its own version. "
            "Install the version that the manifest was written with."
        ) from error
    return lambda compact, example, tensors: build(compact, options, example, tensors)


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _registered(name: str) -> MethodSpec | None:
    try:
        spec = load_plugin("pruners", name)
    except UnknownPluginError:
        return None
    return spec if isinstance(spec, MethodSpec) else None


def _built(model: ModelOrBuilder) -> nn.Module:
    made = model if isinstance(model, nn.Module) else model()
    if not isinstance(made, nn.Module):
        raise ModelError(
            f"The function given builds a {type(made).__name__}, expected the original nn.Module. Return the model."
        )
    return made


def _example_of(folder: Path) -> ExampleInputs:
    spec = ModelSpec.load(folder)
    if spec is None or spec.example is None:
        raise ModelError(
            f"'{folder}' does not describe example inputs: they were more than a tensor or a flat tuple or list of "
            "tensors. Expected them from you. Pass example_inputs as they were when the model was pruned."
        )
    return spec.example.inputs()
