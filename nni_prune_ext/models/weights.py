"""Weights files: read without executing code, checked completely before anything is loaded, written atomically."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Mapping
from pathlib import Path

# Only the class of the error that torch.load raises; nothing is unpickled by this module.
from pickle import UnpicklingError

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nni_prune_ext.errors import OutputError, WeightsError

NESTING_KEYS = ("state_dict", "model")
DATA_PARALLEL_PREFIX = "module."
OPTIONAL_SUFFIX = "num_batches_tracked"  # a counter that old checkpoints and some converters leave out
MAX_NAMES_SHOWN = 5
# What torch.load(weights_only=True) raises on files that are cut off, of another kind, or hold code.
UNREADABLE = (
    UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a weights file into the model, in place; on any error the model is untouched.

    The file is safetensors or a ``torch.save`` of tensors: a state dict, plain or under the key ``state_dict`` or
    ``model``. A prefix ``module.`` on all names (DataParallel) is removed. Code in a pickle is refused, not executed.

    Raises:
        WeightsError: if the file is missing, unreadable or unsafe, or its names or shapes are not the model's.
    """
    path = Path(path)
    loaded = _without_prefix(_read_tensors(path))
    own = model.state_dict()
    _check_names(own, loaded, path)
    _check_shapes(own, loaded, path)
    model.load_state_dict({**own, **loaded})


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write the model's state dict as safetensors; the file appears complete or not at all.

    Tensors that share memory (tied weights) are written under each of their names.

    Raises:
        OutputError: if the file cannot be written.
    """
    path = Path(path)
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    content = safetensors.torch.save(tensors)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError as error:
        raise OutputError(
            f"Weights cannot be written to '{path}' ({error.strerror or error}). Expected a file name in an existing, "
            f"writable folder with {len(content):,} bytes free. Create the folder or choose another place."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # already moved, or its folder does not exist
            unfinished.unlink()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise WeightsError(
            f"There is no weights file at '{path}'. Expected a safetensors file or a torch.save of a state dict. "
            f"Check the path, or leave the weights out to start from random ones."
        )
    content = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise WeightsError(
            f"'{path}' holds {_describe(content)}, expected a state dict: names and tensors, plain or under the key "
            f"'state_dict' or 'model'. Save it with torch.save(model.state_dict(), path)."
        )
    return {str(name): value for name, value in content.items()}


def _is_safetensors(path: Path) -> bool:
    """Tell by the content (a header length, then JSON), or by the suffix where the content is damaged."""
    with path.open("rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or head[8:] == b"{"


def _read_safetensors(path: Path) -> object:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise WeightsError(
            f"'{path}' is no valid safetensors file ({error}). Expected a complete file as written by safetensors. "
            f"Copy or download it again."
        ) from error


def _read_torch(path: Path) -> object:
    try:
        content: object = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise WeightsError(
            f"'{path}' cannot be read as plain weights ({type(error).__name__}): it is damaged, of another format, or "
            f"a pickle with Python code, which is never executed. Expected tensors only. Save "
            f"model.state_dict() again where you trust the file, with torch.save or as safetensors."
        ) from error
    for key in NESTING_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return content[key]
    return content


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if not all(name.startswith(DATA_PARALLEL_PREFIX) for name in tensors):
        return tensors
    return {name.removeprefix(DATA_PARALLEL_PREFIX): value for name, value in tensors.items()}


def _check_names(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor], path: Path) -> None:
    missing = [name for name in own if name not in loaded and not name.endswith(OPTIONAL_SUFFIX)]
    foreign = [name for name in loaded if name not in own]
    if missing or foreign:
        raise WeightsError(
            f"'{path}' belongs to another model: {len(missing)} tensors are missing ({_shown(missing)}) and "
            f"{len(foreign)} are not of this model ({_shown(foreign)}). Expected the {len(own)} names of the model's "
            f"state dict. Choose the model that the file was saved from."
        )


def _check_shapes(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor], path: Path) -> None:
    differing = [name for name in loaded if loaded[name].shape != own[name].shape]
    if differing:
        name = differing[0]
        raise WeightsError(
            f"'{path}' has other shapes in {len(differing)} tensors: '{name}' is {tuple(loaded[name].shape)}, expected "
            f"{tuple(own[name].shape)} ({_shown(differing)}). Choose the model, number of classes and input channels "
            f"that the file was saved from; weights of a pruned model need its plan."
        )


def _shown(names: list[str]) -> str:
    if not names:
        return "none"
    more = f", and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return ", ".join(names[:MAX_NAMES_SHOWN]) + more


def _describe(content: object) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return f"a dictionary with the keys {_shown([str(key) for key in content])}"
