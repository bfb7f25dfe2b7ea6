"""Where an ONNX file comes from: properties in the file itself, under the prefix ``nni_prune_ext.``."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata

import torch
from torch import Tensor, nn

from nni_prune_ext.errors import ConfigError

PREFIX = "nni_prune_ext."


def provenance(
    model: nn.Module, inputs: Mapping[str, Tensor], *, opset: int, exporter: str, extra: Mapping[str, str]
) -> dict[str, str]:
    """Describes an export as flat strings with prefixed keys.

    Args:
        model: The model whose weights are hashed.
        inputs: Example inputs by name; their shapes are recorded.
        opset: ONNX operator set of the file.
        exporter: ``"dynamo"`` or ``"torchscript"``.
        extra: Further properties of the caller (``plan``, ``method``, …), without the prefix.

    Raises:
        ConfigError: If a property of the caller has a name that is written here, or SOURCE_DATE_EPOCH is no time.
    """
    own = {
        "version": package_version(),
        "torch": torch.__version__,
        "opset": str(opset),
        "exporter": exporter,
        "input_shapes": json.dumps({name: list(tensor.shape) for name, tensor in inputs.items()}),
        "created": _created().isoformat(timespec="seconds"),
        "state_dict_sha256": state_dict_sha256(model),
    }
    taken = sorted(own.keys() & extra.keys())
    if taken:
        raise ConfigError(
            f"The properties {', '.join(taken)} are written by the export itself, but were passed by the caller. "
            f"Expected names other than {', '.join(sorted(own))}. Rename them."
        )
    return {PREFIX + key: value for key, value in {**own, **extra}.items()}


def state_dict_sha256(model: nn.Module) -> str:
    """Hashes names, types, shapes and bytes of the state dict, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):  # what a module's get_extra_state() adds
            digest.update(f"{name} {value!r}\n".encode())
            continue
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _created() -> datetime:
    """Returns now, or the time that ``SOURCE_DATE_EPOCH`` fixes (https://reproducible-builds.org)."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH")
    if not fixed:
        return datetime.now(timezone.utc)
    try:
        return datetime.fromtimestamp(int(fixed), timezone.utc)
    except (ValueError, OverflowError, OSError) as error:
        raise ConfigError(
            f"SOURCE_DATE_EPOCH is '{fixed}' ({error}), expected seconds since 1970. Correct or unset it."
        ) from error


def package_version() -> str:
    """Returns the installed version, or ``unknown`` when the package runs from source without being installed."""
    try:
        return metadata.version("nni_prune_ext")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"
