"""NNI's masks as facts about tensors: read from memory or a file, checked against the model, never changed.

NNI names masks by module and target, ``{"conv1": {"weight": tensor, "bias": None, "_output_0": tensor}}``; everything
behind this file asks which positions of which tensor are masked.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nni_prune_ext.adapters.nni_speedup_errors import (
    FineGrainedMaskError,
    MaskFileError,
    ShapeMisMatchError,
    SpeedupError,
    WrappedModelError,
)
from nni_prune_ext.graph.model_copy import named_tensors

_logger = logging.getLogger(__name__)

INPUT, OUTPUT = "_input_", "_output_"
_PREFIX = "module."
_HOW = "Pass what pruner.compress() or pruner.get_masks() returned, or a file that torch.save wrote of it."


@dataclass(frozen=True)
class LayerMasks:
    """The masks of one model.

    Attributes:
        given: ``(module, "weight")`` → name of its parameter and the mask asked for there: bool, shape of the
            parameter, on CPU, ``False`` where it is masked.
        tensors: name of a parameter → what is masked in every module that uses it, in the same form.
        disputed: name of a parameter → the modules that use it, where these mask it differently.
        activations: ``(module, "_input_0")`` → mask that multiplies this input or output of the module.
        fine_grained: names of parameters whose masks silence more than whole rows and columns.
    """

    given: Mapping[tuple[str, str], tuple[str, Tensor]]
    tensors: Mapping[str, Tensor]
    disputed: Mapping[str, tuple[str, ...]]
    activations: Mapping[tuple[str, str], Tensor]
    fine_grained: tuple[str, ...]

    def silent(self, tensor: str, dim: int) -> NDArray[np.bool_] | None:
        """Returns the positions along ``dim`` that are masked whole, ``None`` where the tensor has no mask."""
        mask = self.tensors.get(tensor)
        return None if mask is None else silent_positions(mask, dim)


def read_masks(masks_or_file: object, map_location: Any = None) -> Mapping[str, Mapping[str, object]]:
    """Returns the masks given, or those in a file; only tensors and plain containers are ever unpickled.

    Raises:
        MaskFileError: nothing given, no such file, or a file that does not hold masks.
    """
    if isinstance(masks_or_file, (str, Path)):
        masks_or_file = _load(Path(masks_or_file), map_location)
    if not isinstance(masks_or_file, Mapping) or not all(isinstance(v, Mapping) for v in masks_or_file.values()):
        raise MaskFileError(
            f"masks_or_file is {_kind(masks_or_file)}, expected masks by module and target, "
            f"{{'conv1': {{'weight': tensor}}}}, or the path of a file with them. {_HOW}"
        )
    return cast("Mapping[str, Mapping[str, object]]", masks_or_file)


def layer_masks(given: Mapping[str, Mapping[str, object]], model: nn.Module) -> LayerMasks:
    """Translates NNI's masks for a model and checks them against it.

    Raises:
        WrappedModelError: the model still carries NNI's wrappers.
        MaskFileError: there is no mask among them.
        ShapeMisMatchError: a module, target or shape is not one of this model.
        SpeedupError: a masked weight is computed from other parameters.
        FineGrainedMaskError: every layer is masked, but none in whole channels.
    """
    _refuse_other_models(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    first_names = {id(module): name for name, module in model.named_modules()}
    known = {id(tensor): name for name, tensor in named_tensors(model)}
    asked: dict[tuple[str, str], tuple[str, Tensor]] = {}
    activations: dict[tuple[str, str], Tensor] = {}
    for name, targets in _fitting_names(given, modules).items():
        for target, mask in targets.items():
            if mask is None:
                continue
            keep = _as_bool(mask, name, target)
            if target.startswith((INPUT, OUTPUT)):
                activations[name, target] = keep
                continue
            tensor = getattr(modules[name], target, None)
            if not isinstance(tensor, Tensor) or id(tensor) not in known:
                raise _no_parameter(modules[name], name, target)
            keep = _fitted(keep, tensor, f"{name}.{target}")
            place = first_names[id(modules[name])], target
            asked[place] = known[id(tensor)], asked[place][1] & keep if place in asked else keep
    if not asked and not activations:
        raise MaskFileError(f"The masks hold no mask at all ({len(given)} modules), expected at least one. {_HOW}")
    tensors, disputed = _agreed(asked, model)
    fine = tuple(dict.fromkeys(own for own, mask in asked.values() if not _in_channels(mask)))
    result = LayerMasks(asked, tensors, disputed, activations, fine)
    _refuse_fine_grained(result)
    return result


def _agreed(
    asked: Mapping[tuple[str, str], tuple[str, Tensor]], model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """Returns what all users of a tensor mask, and the users where they differ; one without a mask masks nothing."""
    known = {id(tensor): name for name, tensor in named_tensors(model)}
    users: dict[str, list[tuple[str, str]]] = {}
    for module_name, module in model.named_modules():
        for target, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                users.setdefault(known[id(tensor)], []).append((module_name, target))
    tensors: dict[str, Tensor] = {}
    disputed: dict[str, tuple[str, ...]] = {}
    for own, mask in asked.values():
        masks = [asked[place][1] if place in asked else torch.ones_like(mask) for place in users[own]]
        tensors[own] = reduce(torch.logical_or, masks)
        if any(not torch.equal(tensors[own], other) for other in masks):
            disputed[own] = tuple(dict.fromkeys(module_name for module_name, _ in users[own]))
    return tensors, disputed


def _no_parameter(module: nn.Module, name: str, target: str) -> SpeedupError:
    """Returns the error for a mask of something that is no parameter, with the remedy if it is computed from some."""
    kind = type(module).__name__
    if target in getattr(module, "parametrizations", {}):
        parts = ", ".join(type(part).__name__.lstrip("_") for part in cast("Any", module.parametrizations)[target])
        remedy = f"torch.nn.utils.parametrize.remove_parametrizations(model.get_submodule('{name}'), '{target}')"
    elif f"{target}_g" in module._parameters:
        parts, remedy = "weight_norm", f"torch.nn.utils.remove_weight_norm(model.get_submodule('{name}'), '{target}')"
    elif f"{target}_orig" in module._parameters:
        parts = "a hook, as by spectral_norm or torch.nn.utils.prune"
        remedy = "remove_spectral_norm or prune.remove, of torch.nn.utils"
    else:
        return ShapeMisMatchError(
            f"There is a mask for '{target}' of '{name}', expected the name of a parameter of this {kind}. Use the "
            "masks of this model."
        )
    return SpeedupError(
        f"'{target}' of '{name}' is computed from other parameters (by {parts}), expected a plain parameter, which can "
        f"be cut. Make it one first: {remedy}; the masks stay valid."
    )


def _load(path: Path, map_location: Any) -> object:
    if not path.exists():
        raise MaskFileError(f"There is no file '{path}', expected masks that torch.save wrote. {_HOW}")
    try:
        with torch.serialization.safe_globals([(_plain_dict, "collections.defaultdict"), dict]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise MaskFileError(
            f"'{path}' holds something else than tensors in dicts, or is no file of torch.save. Expected masks and "
            f"nothing else: what could run code is not loaded. {_HOW}"
        ) from error
    except Exception as error:  # what torch raises on bytes that are no pickle has no common class
        raise MaskFileError(
            f"'{path}' cannot be read as masks: {type(error).__name__}: {error}. Expected a file of torch.save. {_HOW}"
        ) from error


def _plain_dict(*_: object) -> dict[str, object]:
    """Stands for ``defaultdict`` in files: the safe loader of PyTorch fills plain dicts only."""
    return {}


def _kind(value: object) -> str:
    return "a mapping with something else than targets in it" if isinstance(value, Mapping) else type(value).__name__


def _refuse_other_models(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise SpeedupError(f"The model is a {type(model).__name__}, expected an nn.Module. Pass the model to speed up.")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise SpeedupError(
            "The model is a DistributedDataParallel, whose processes cannot be copied; expected the plain model. Pass "
            "model.module, and wrap the smaller model anew."
        )
    for name, module in model.named_modules():
        if "_nni_wrapper" in module._modules:
            raise WrappedModelError(
                f"'{name}' is still wrapped by a compressor, expected the plain model. Call pruner.unwrap_model() "
                "first; the masks stay valid."
            )


def _fitting_names(
    given: Mapping[str, Mapping[str, object]], modules: Mapping[str, nn.Module]
) -> dict[str, Mapping[str, object]]:
    """Returns the masks under the names of this model's modules: a parallel wrapper's prefix is taken off or put on."""
    for off, on in (("", ""), (_PREFIX, ""), ("", _PREFIX)):
        named = {on + name.removeprefix(off): targets for name, targets in given.items()}
        if named.keys() <= modules.keys():
            return named
    strange = sorted(name for name in given if name not in modules and name.removeprefix(_PREFIX) not in modules)
    raise ShapeMisMatchError(
        f"There are masks for {strange[:3]} ({len(strange)} of {len(given)} modules), which this model does not have. "
        "Expected the names of model.named_modules(): use the masks of this model."
    )


def _as_bool(mask: object, name: str, target: str) -> Tensor:
    if not isinstance(mask, Tensor):
        raise ShapeMisMatchError(
            f"The mask for '{target}' of '{name}' is {type(mask).__name__}, expected a tensor of zeros and ones, or "
            f"None. {_HOW}"
        )
    return mask.detach().cpu() != 0


def _fitted(keep: Tensor, tensor: Tensor, name: str) -> Tensor:
    """Returns the mask in the shape of its tensor; NNI broadcasts masks, so do we."""
    try:
        return keep.expand(tensor.shape)
    except RuntimeError:
        raise ShapeMisMatchError(
            f"The mask for '{name}' has shape {tuple(keep.shape)}, expected {tuple(tensor.shape)}, that of the tensor. "
            "Use the masks of this model, before any speedup."
        ) from None


def silent_positions(mask: Tensor, dim: int) -> NDArray[np.bool_]:
    """Returns the positions along ``dim`` at which a mask keeps nothing."""
    others = [d for d in range(mask.dim()) if d != dim]
    alive = mask.any(dim=others) if others else mask
    return cast("NDArray[np.bool_]", (~alive).numpy())


def _in_channels(mask: Tensor) -> bool:
    """Says whether all that is masked is whole rows (dimension 0) and whole columns (dimension 1)."""
    if mask.dim() < 2:
        return True
    covered = torch.zeros_like(mask)
    for dim in (0, 1):
        silent = torch.from_numpy(silent_positions(mask, dim))
        covered |= silent.view([-1 if d == dim else 1 for d in range(mask.dim())])
    return bool((mask | covered).all())


def _refuse_fine_grained(masks: LayerMasks) -> None:
    if not masks.fine_grained:
        return
    names = ", ".join(f"'{name}'" for name in masks.fine_grained[:5])
    weights = {name for name, mask in masks.given.values() if mask.dim() > 1 and not bool(mask.all())}
    if weights <= set(masks.fine_grained) and all(bool(mask.all()) for mask in masks.activations.values()):
        raise FineGrainedMaskError(
            f"The masks are fine-grained: those of {names} ({len(masks.fine_grained)} layers) silence single weights, "
            "expected whole channels, as only these make a model smaller. Prune with granularity 'out_channel' "
            "(NNI's LevelPruner does not, by default), or keep the model as it is with its weights at zero."
        )
    _logger.warning(
        "The masks of %s (%d layers) are fine-grained: what they silence beyond whole channels is not removed.",
        names,
        len(masks.fine_grained),
    )
