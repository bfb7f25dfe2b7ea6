"""Weight masks in an artefact folder: which single weights of the compact model are zero for good."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from torch import Tensor, nn

from nni_prune_ext.errors import ArtefactError, OutputError, WeightsError

Pattern = Literal["2:4", "unstructured"]


class MaskFacts(BaseModel):
    """What a manifest says about one mask: its shape, the share of weights that stay (0–1), and its pattern."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, ...]
    kept: float
    pattern: Pattern


def mask_pattern(mask: Tensor) -> Pattern:
    """Returns whether a mask is one that 2:4 sparse hardware takes.

    Args:
        mask: ``(C_out, C_in, …)`` bool, ``True`` = kept.

    Returns:
        ``2:4`` if of every four neighbours along the input channels at most two are kept.
    """
    if mask.ndim < 2 or not mask.numel() or mask.shape[1] % 4:
        return "unstructured"
    kept = mask.reshape(mask.shape[0], -1, 4, *mask.shape[2:]).sum(dim=2)
    return "2:4" if int(kept.max()) <= 2 else "unstructured"


def mask_facts(masks: Mapping[str, Tensor]) -> dict[str, MaskFacts]:
    """Returns the manifest's facts about every mask."""
    return {
        name: MaskFacts(shape=tuple(mask.shape), kept=float(mask.float().mean()), pattern=mask_pattern(mask))
        for name, mask in masks.items()
    }


def check_masks(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, source: str) -> None:
    """Makes sure that masks belong to weights: same names and shapes, and a zero wherever a mask says so.

    Args:
        source: where the masks come from, for the message.

    Raises:
        ArtefactError: they do not.
    """
    for name, mask in masks.items():
        weight = weights.get(name)
        if weight is None:
            raise ArtefactError(
                f"{source} masks '{name}', expected one of the {len(weights)} tensors of the compact model. The masks "
                "belong to another network; take masks and weights from one run."
            )
        if mask.dtype is not torch.bool or mask.shape != weight.shape:
            raise ArtefactError(
                f"{source} has a mask of {mask.dtype}, shape {tuple(mask.shape)} for '{name}', expected torch.bool and "
                f"{tuple(weight.shape)}. Take masks and weights from one run; masks are those of the compact model."
            )
        alive = int(torch.count_nonzero(weight.cpu()[~mask.cpu()]))
        if alive:
            raise ArtefactError(
                f"{source} says that {int((~mask).sum()):,} weights of '{name}' are zero, but {alive:,} of them are "
                "not. Expected zeros wherever the mask says so. Set them to zero before writing, or take masks and "
                "weights from one run."
            )


def not_finite(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Returns how many values of each tensor are NaN or infinite; tensors without any are left out."""
    counts = {name: int((~torch.isfinite(tensor)).sum()) for name, tensor in tensors.items()}
    return {name: count for name, count in counts.items() if count}


def check_finite(model: nn.Module, *, source: str) -> None:
    """Refuses a network with parameters that are NaN or infinite; buffers may hold infinity, as attention masks do.

    Args:
        source: where the network comes from, for the message.

    Raises:
        WeightsError: it has some.
    """
    found = not_finite(dict(model.named_parameters()))
    for name, count in found.items():
        raise WeightsError(
            f"{source} has {count:,} values that are NaN or infinite in '{name}' ({len(found)} such tensors in all), "
            "expected finite weights. Training has probably diverged: train again with a smaller learning rate, or go "
            "back to weights from before that."
        )


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes named tensors as safetensors; tensors that share memory are written under each of their names.

    Raises:
        OutputError: the file cannot be written.
    """
    content = safetensors.torch.save(
        {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    )
    try:
        path.write_bytes(content)
    except OSError as error:
        raise OutputError(
            f"Cannot write '{path}': {error.strerror or error}. Expected a writable folder with {len(content):,} bytes "
            "free. Choose another place."
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads named tensors from safetensors, onto the CPU.

    Raises:
        ArtefactError: the file is no safetensors file.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(
            f"'{path}' cannot be read ({error}), expected a safetensors file. Copy the whole folder again from where "
            "it was made."
        ) from error
