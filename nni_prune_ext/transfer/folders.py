"""Networks of artefact folders, and the folder of a comparison: what the command line needs around a transfer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nni_prune_ext.data.detection import DetectionSource, open_detection
from nni_prune_ext.data.image_arrays import DataSource
from nni_prune_ext.data.sources import open_data
from nni_prune_ext.errors import ConfigError, ModelError, OutputError
from nni_prune_ext.export.artefact_folder import MASKS, PLAN, WEIGHTS, ModelSpec, check_unused
from nni_prune_ext.export.artefact_loading import load_masks, load_pruned
from nni_prune_ext.export.manifest import checked_manifest
from nni_prune_ext.models.loading import build_model, load_weights
from nni_prune_ext.plan import PruningPlan
from nni_prune_ext.surgery import cut_channels
from nni_prune_ext.transfer.results import REPORT

STATE = "state"
RANDOM = "random weights"
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, eq=False)
class FolderNetwork:
    """A network of an artefact folder, its weight masks, and how it was described there."""

    model: nn.Module
    masks: Mapping[str, Tensor]
    spec: ModelSpec


def named_networks(
    texts: Sequence[str], *, model: str | None = None, random_control: bool = False, seed: int = 0
) -> dict[str, FolderNetwork]:
    """Reads ``NAME=FOLDER``, or ``FOLDER``, whose own name it then has.

    Args:
        model: specification of all networks, instead of what the folders say; needed where that is a factory, because
            no folder decides what code is imported.
        random_control: adds the last network's architecture with random weights.
        seed: of those.

    Raises:
        ConfigError: a name is there twice.
        ArtefactError, PlanError, WeightsError, ModelError: a folder is damaged, or does not say what network it holds.
    """
    found: dict[str, FolderNetwork] = {}
    for text in texts:
        name, _, place = text.rpartition("=")
        folder = Path(place).expanduser()
        name = name or folder.resolve().name
        if name in found or (random_control and name == RANDOM):
            raise ConfigError(f"Two networks are called '{name}', expected every name once. Give NAME=FOLDER.")
        found[name] = _network(folder, model)
    if random_control:
        last = Path(texts[-1].rpartition("=")[2]).expanduser()
        found[RANDOM] = _network(last, model, random_seed=seed)
    return found


def pixel_normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None, networks: Mapping[str, FolderNetwork]
) -> Normalisation | None:
    """Returns what was given, else what the first network was trained with; ``None`` if nobody says.

    Raises:
        ConfigError: only one of both was given, or not for three channels.
    """
    first = next(iter(networks.values())).spec
    if mean is None and std is None:
        return (first.mean, first.std) if first.mean is not None and first.std is not None else None
    if mean is None or std is None or len(mean) != 3 or len(std) != 3:
        raise ConfigError(f"--mean is {mean} and --std is {std}, expected both, with three numbers each.")
    return tuple(mean), tuple(std)


def open_second_data(
    spec: str, *, image_size: str | None, limit: int | None, normalisation: Normalisation | None
) -> DataSource | DetectionSource:
    """Opens ``voc:FOLDER``, ``coco:FOLDER``, or a source of images with classes; images have three channels.

    Args:
        image_size: ``H,W``, or one number for both.

    Raises:
        DataError: there is no such data, it is damaged, or not of RGB images.
        ConfigError: the size is none, or not square for a source with classes.
    """
    size = _size(image_size)
    if spec.partition(":")[0] in ("voc", "coco"):
        return open_detection(spec, image_size=size, limit=limit)
    if size is not None and size[0] != size[1]:
        raise ConfigError(f"--image-size is {image_size}, expected one number for images with classes.")
    mean, std = normalisation or (None, None)
    return open_data(spec, image_size=size and size[0], limit=limit, mean=mean, std=std)


def check_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Makes sure that a comparison may be written to a folder; makes and removes nothing.

    Raises:
        ConfigError: going on and starting anew are both asked for.
        OutputError: it holds something else, or a comparison and neither was asked for.
    """
    if resume and overwrite:
        raise ConfigError("Both --resume and --overwrite were given, expected at most one. Go on, or start anew.")
    if not _is_ours(out):
        check_unused(out)
    elif not resume and not overwrite:
        raise OutputError(
            f"The folder '{out}' holds a comparison, expected an empty or new one. Go on with it (--resume), "
            "replace it (--overwrite), or choose another folder with --out."
        )


def clear_folder(out: Path) -> None:
    """Removes a comparison from its folder; what else lies there stays."""
    shutil.rmtree(out / STATE, ignore_errors=True)
    for path in [out / REPORT, out / "report.html", *out.glob("*-seed*.safetensors")]:
        path.unlink(missing_ok=True)


def _is_ours(out: Path) -> bool:
    return (out / STATE / "identity.json").exists() or (out / REPORT).exists()


def _network(folder: Path, model: str | None, *, random_seed: int | None = None) -> FolderNetwork:
    checked_manifest(folder, needed=(WEIGHTS,))
    spec = ModelSpec.load(folder)
    name = model or (spec.model if spec is not None else None)
    if spec is None or not name:
        raise ModelError(
            f"'{folder}' does not say what network it holds, expected a model.json with a name. Name it with --model."
        )
    if model is None and ":" in name and name.partition(":")[0] not in ("torchvision", "timm", "cifar"):
        raise ModelError(
            f"'{folder}' was made from the factory '{name}', and no folder decides what code is imported. If you trust "
            f"it, name it: --model {name}."
        )
    if len(spec.input_shape) != 4 or spec.input_shape[1] != 3:
        raise ModelError(
            f"'{folder}' holds a network for inputs {spec.input_shape}, expected images (N, 3, H, W). Choose another."
        )
    known = spec.model_copy(update={"model": name})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random_seed or 0)
        dense = build_model(name, num_classes=spec.num_classes)
    if random_seed is not None:
        if (folder / PLAN).exists():
            example = torch.zeros(spec.input_shape)
            dense = cut_channels(dense, PruningPlan.load(folder / PLAN), example).model
        return FolderNetwork(dense, {}, known)
    if (folder / PLAN).exists():
        dense = load_pruned(dense, folder)
    else:
        load_weights(dense, folder / WEIGHTS)
    return FolderNetwork(dense, load_masks(folder) if (folder / MASKS).exists() else {}, known)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.replace("x", ",").split(",")]
        height, width = numbers if len(numbers) > 1 else numbers * 2
    except ValueError:
        height = width = 0
    if min(height, width) < 1:
        raise ConfigError(f"Cannot read --image-size '{text}', expected H,W or one number, for example 240,320.")
    return height, width
