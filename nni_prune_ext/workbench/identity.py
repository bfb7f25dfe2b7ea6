"""What decides the outcome of a run, and of each of its stages: checkpoints of anything else are refused."""

from __future__ import annotations

import hashlib

import torch

from nni_prune_ext.checkpoints import Json, fingerprint
from nni_prune_ext.data.image_arrays import DataSource, ImageArrays
from nni_prune_ext.training.processes import world_size
from nni_prune_ext.workbench.preparation import Prepared, planned_epochs

_BASE = {"model", "data", "train", "loss", "metric", "device", "seed"}
_OUTSIDE = {"out", "measure", "keep_checkpoints", "title"}


def base_identity(prepared: Prepared) -> dict[str, Json]:
    """Returns what the base training depends on, and with it everything after it."""
    return {
        "recipe": prepared.recipe.model_dump(mode="json", include=_BASE),
        "weights": fingerprint(prepared.job.model),
        "images": _images(prepared.job.source),
        "processes": world_size(),
    }


def control_identity(prepared: Prepared) -> dict[str, Json]:
    """Returns what the control depends on besides."""
    recipe = prepared.recipe
    return {"training": recipe.training.model_dump(mode="json"), "control_epochs": planned_epochs(recipe)}


def run_identity(prepared: Prepared) -> dict[str, Json]:
    """Returns what a whole run depends on: all but its place and its measurement."""
    recipe = prepared.recipe.model_dump(mode="json", exclude=_OUTSIDE)
    return {**base_identity(prepared), "recipe": recipe}


def _images(source: DataSource | None) -> Json:
    """Returns a hash per split and the normalisation; loaders are known by their name in the recipe only."""
    if source is None:
        return None
    hashes: dict[str, Json] = {name: _hash(split) for name, split in source.splits().items()}
    return {**hashes, "mean": list(source.mean), "std": list(source.std), "augment": source.augment}


def _hash(split: ImageArrays) -> str:
    digest = hashlib.sha256(f"{tuple(split.images.shape)}".encode())
    for tensor in (split.images, split.labels):
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
