"""Networks of artefact folders, and the folder of a comparison: what the command line needs around a transfer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nni_prune_ext.data.detection import DetectionSource, open_detection
from nni_prune_ext.data.image_arrays import DataSource
from nni_prune_ext.data.sources import open_data
from nni_prune_ext.errors import ConfigError, ModelError
from nni_prune_ext.export.artefact_folder import MASKS, PLAN, WEIGHTS, ModelSpec
from nni_prune_ext.export.artefact_loading import load_masks, load_pruned
from nni_prune_ext.export.manifest import checked_manifest
from nni_prune_ext.models.loading import build_model, load_weights
from nni_prune_ext.plan import PruningPlan
from nni_prune_ext.surgery import cut_channels
from nni_prune_ext.transfer.comparison import NetworkOrBuilder

RANDOM = "random weights"
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, eq=False)
class FolderNetwork:
    """A network of an artefact folder, or what builds one for a seed; its weight masks, and how it is described."""

    model: NetworkOrBuilder
    masks: Mapping[str, Tensor]
    spec: ModelSpec


def named_networks(
    texts: Sequence[str], *, model: str | None = None, random_control: bool = False
) -> dict[str, FolderNetwork]:
    """Reads ``NAME=FOLDER``, or ``FOLDER``, whose own name it then has.

    Args:
        model: specification of all networks, instead of what the folders say; needed where that is a factory, because
            no folder decides what code is imported.
        random_control: adds the last network's architecture, and its masks, with random weights, new ones per seed.

    Raises:
        ConfigError: a name is there twice.
        ArtefactError, PlanError, WeightsError, ModelError: a folder is damaged, or does not say what network it holds.
    """
    found: dict[str, FolderNetwork] = {}
    for text in texts:
        name, folder = _named(text)
        if name in found or (random_control and name == RANDOM):
            raise ConfigError(f"Two networks are called '{name}', expected every name once. Give NAME=FOLDER.")
        found[name] = _network(folder, model)
    if random_control:
        last = found[next(reversed(found))]
        folder = _named(texts[-1])[1]
        found[RANDOM] = replace(last, model=partial(_random_network, folder, last))
    return found


def pixel_normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None, networks: Mapping[str, FolderNetwork]
) -> Normalisation | None:
    """Returns what was given, else what the networks were trained with; ``None`` if nobody says.

    Raises:
        ConfigError: only one of both was given, or not for three channels; or the networks differ.
    """
    if mean is None and std is None:
        found = {(own.spec.mean, own.spec.std): name for name, own in networks.items()}
        if len(found) > 1:
            raise ConfigError(
                f"The networks {' and '.join(repr(name) for name in found.values())} were made for pixels of different "
                f"mean and standard deviation, {' and '.join(str(key) for key in found)}, expected one for all: "
                "they see the same images. Give --mean and --std."
            )
        ((first, second),) = found
        return (first, second) if first is not None and second is not None else None
    if mean is None or std is None or len(mean) != 3 or len(std) != 3:
        raise ConfigError(f"--mean is {mean} and --std is {std}, expected both, with three numbers each.")
    return tuple(mean), tuple(std)


def on_device(network: NetworkOrBuilder, device: torch.device) -> NetworkOrBuilder:
    """Returns a network, or what builds one, on a device."""
    return network.to(device) if isinstance(network, nn.Module) else lambda seed: network(seed).to(device)


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


def _named(text: str) -> tuple[str, Path]:
    """Reads ``NAME=FOLDER``; a folder may have such a name itself."""
    whole = Path(text).expanduser()
    name, equals, place = text.partition("=")
    if not equals or whole.is_dir():
        return whole.resolve().name, whole
    return name, Path(place).expanduser()


def _random_network(folder: Path, like: FolderNetwork, seed: int) -> nn.Module:
    """Returns the architecture of a network with random weights, masked like it."""
    name = like.spec.model
    assert name is not None, "checked when the folder was read"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = build_model(name, num_classes=like.spec.num_classes).eval()
    if (folder / PLAN).exists():
        made = cut_channels(made, PruningPlan.load(folder / PLAN), torch.zeros(like.spec.input_shape)).model
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if key in like.masks:
                parameter.mul_(like.masks[key])
    return made


def _network(folder: Path, model: str | None) -> FolderNetwork:
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
        dense = build_model(name, num_classes=spec.num_classes)
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
