"""Networks trained alike on a second data set, seed by seed, and compared pair by pair."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from nni_prune_ext.checkpoints import Json, fingerprint
from nni_prune_ext.data.batches import split_batches
from nni_prune_ext.data.detection import DetectionBatches, DetectionImages, DetectionSource
from nni_prune_ext.data.image_arrays import DataSource, ImageArrays
from nni_prune_ext.data.sources import IMAGENET_MEAN, IMAGENET_STD
from nni_prune_ext.errors import ConfigError
from nni_prune_ext.training import (
    Batches,
    EpochLog,
    LossFunction,
    TrainingSettings,
    Watcher,
    accuracy,
    cross_entropy,
    fit,
    seeded,
)
from nni_prune_ext.transfer.average_precision import average_precision, detection_metric
from nni_prune_ext.transfer.heads import HEADS, DetectorHead, Head, classifier, detector, last_linear
from nni_prune_ext.transfer.kept import Kept
from nni_prune_ext.transfer.results import TransferReport, TransferRow

_BATCH_SIZES = {"classifier": 32}
_DETECTION_BATCH = 8
_LONGEST_NAME = 100


NetworkOrBuilder: TypeAlias = nn.Module | Callable[[int], nn.Module]
"""A network, or what builds one for a seed: a control with random weights."""


def transfer_networks(
    networks: Mapping[str, NetworkOrBuilder],
    source: DataSource | DetectionSource,
    *,
    head: Head | str | None = None,
    epochs: int = 10,
    seeds: Sequence[int] = (0,),
    settings: TrainingSettings | None = None,
    batch_size: int | None = None,
    weight_masks: Mapping[str, Mapping[str, Tensor]] | None = None,
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None,
    maps: int = 3,
    pyramid_channels: int = 256,
    folder: Path | None = None,
    anew: bool = False,
    watcher: Watcher | None = None,
) -> TransferReport:
    """Trains every network with a new head on a second data set, alike, and measures them on its test split.

    All networks see the same images in the same order, and their heads start from the same random numbers where their
    shapes are the same. Nothing is selected: the last epoch counts. The networks are not changed.

    Args:
        networks: name → classifier of images, or a function that builds one for a seed; the first one is the reference,
            usually the dense one.
        head: ``classifier`` for a source of labels, else one of torchvision's detectors (``retinanet``).
        epochs: for every network and seed.
        seeds: of the new head, the order and the variations of the images.
        settings: AdamW at 1e-3 with a warmup of half an epoch, unless given; the best epoch is never selected.
        batch_size: 32, and 8 for detectors, unless given.
        weight_masks: network → weight masks, ``True`` = kept, which training keeps.
        normalisation: mean and standard deviation per channel, of pixels in 0–1; the source's, or ImageNet's, unless
            given.
        maps: feature maps that a detector reads.
        pyramid_channels: width of a detector's pyramid.
        folder: where the report, the trained weights and the state of an interrupted call are kept: the same call goes
            on there.
        anew: removes an earlier comparison from the folder, once all else is checked.
        watcher: is told how the training goes.

    Raises:
        ConfigError: there is no network or seed, or the head does not fit the source.
        ModelError: a network cannot be a classifier or backbone.
        OutputError: the folder holds another comparison.
        TrainingError: the loss is no number.
    """
    if normalisation is None:
        normalisation = (
            (IMAGENET_MEAN, IMAGENET_STD) if isinstance(source, DetectionSource) else (source.mean, source.std)
        )
    if isinstance(source, DataSource):
        source = replace(source, mean=tuple(normalisation[0]), std=tuple(normalisation[1]))
    job = _Job(
        source,
        _head(head, source),
        epochs,
        settings or TrainingSettings(optimizer="adamw", learning_rate=1e-3, weight_decay=0.01, warmup_epochs=0.5),
        batch_size,
        normalisation,
        maps,
        pyramid_channels,
        weight_masks or {},
    )
    _check(networks, seeds, epochs, job)
    identity = job.identity(networks, seeds[0])
    kept = Kept.opened(folder, identity, anew=anew)
    metric = "AP" if job.detects else "accuracy"
    for seed in seeds:
        for name, network in networks.items():
            if not kept.has(name, seed):
                row, model = _trained(name, _of_seed(network, seed), seed, job, kept, watcher or Watcher())
                kept.add(row, model, metric, job.facts())
    order = list(networks)
    kept.rows.sort(key=lambda row: (order.index(row.network), row.seed))
    kept.save(metric, job.facts())
    return TransferReport(tuple(row for row in kept.rows if row.seed in seeds), metric, job.facts())


@dataclass(frozen=True, eq=False)
class _Job:
    source: DataSource | DetectionSource
    head: Head
    epochs: int
    settings: TrainingSettings
    batch_size: int | None
    normalisation: tuple[Sequence[float], Sequence[float]]
    maps: int
    pyramid_channels: int
    masks: Mapping[str, Mapping[str, Tensor]]

    @property
    def detects(self) -> bool:
        return self.head != "classifier"

    @property
    def images_per_batch(self) -> int:
        return self.batch_size or _BATCH_SIZES.get(self.head, _DETECTION_BATCH)

    def facts(self) -> dict[str, Json]:
        """Returns what a reader of the result must know, as JSON."""
        source = self.source
        sizes: dict[str, Json] = {split: len(part) for split, part in source.splits().items()}
        mean, std = (cast("Json", list(own)) for own in self.normalisation)
        return {
            "data": source.name,
            "images": sizes,
            "classes": list(source.class_names),
            "input_shape": list(source.input_shape),
            "head": self.head,
            "epochs": self.epochs,
            "batch_size": self.images_per_batch,
            "mean": mean,
            "std": std,
            "maps": self.maps if self.detects else None,
            "pyramid_channels": self.pyramid_channels if self.detects and self.head != "ssdlite" else None,
            "training": self.settings.model_dump(mode="json"),
        }

    def identity(self, networks: Mapping[str, NetworkOrBuilder], seed: int) -> dict[str, Json]:
        """Returns all that decides about the results: data, networks, masks and versions, by their content."""
        prints: dict[str, Json] = {name: fingerprint(_of_seed(network, seed)) for name, network in networks.items()}
        masked: dict[str, Json] = {name: _print(masks.items()) for name, masks in self.masks.items() if masks}
        augment = None if isinstance(self.source, DetectionSource) else self.source.augment
        return {
            **self.facts(),
            "augment": augment,
            "content": {split: _content_print(part) for split, part in self.source.splits().items()},
            "networks": prints,
            "masks": masked,
            "versions": {name: version(name) for name in ("torch", "torchvision")},
        }

    def made(self, network: nn.Module) -> nn.Module:
        """Returns the network with its new head."""
        _, height, width = self.source.input_shape
        count = len(self.source.class_names)
        if not self.detects:
            return classifier(network, (height, width), count)
        mean, std = self.normalisation
        return detector(
            network, (height, width), count, head=cast("DetectorHead", self.head), maps=self.maps,
            pyramid_channels=self.pyramid_channels, mean=mean, std=std,
        )  # fmt: skip

    def places(self, network: nn.Module, model: nn.Module) -> dict[str, str]:
        """Returns for each parameter of the network that ``model`` still has its name there."""
        prefix = "backbone.body." if self.detects else ""
        _, height, width = self.source.input_shape
        head = None if self.detects else last_linear(network, (height, width))
        found = {name for name, _ in model.named_parameters()}
        return {
            name: prefix + name
            for name, _ in network.named_parameters()
            if prefix + name in found and name.rpartition(".")[0] != head
        }

    def batches(self, split: str, seed: int) -> Batches:
        if isinstance(self.source, DetectionSource):
            part = self.source.splits()[split]
            return DetectionBatches(part, self.images_per_batch, train=split == "train", seed=seed)
        return split_batches(self.source, split, self.images_per_batch, seed=seed)

    def measured(self, model: nn.Module) -> dict[str, float]:
        batches = self.batches("test", 0)
        if not self.detects:
            return {"accuracy": accuracy(model, batches)}
        return average_precision(model, batches, self.source.class_names)


def _of_seed(network: NetworkOrBuilder, seed: int) -> nn.Module:
    return network if isinstance(network, nn.Module) else network(seed)


def _content_print(part: ImageArrays | DetectionImages) -> str:
    """Returns a hash of the images of a split, and of what is known of them."""
    if isinstance(part, ImageArrays):
        return _print([("images", part.images), ("labels", part.labels)])
    own = [
        (f"{name}{number}", getattr(objects, name))
        for number, objects in enumerate(part.objects)
        for name in ("boxes", "labels", "ignored")
    ]
    return _print([("images", part.images), *own])


def _print(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def detection_loss(model: nn.Module, batch: Any) -> Tensor:
    """Returns the sum of a torchvision detector's losses on ``(images, targets)``, in training mode."""
    images, targets = batch
    losses: Mapping[str, Tensor] = model(list(images.unbind()), targets)
    return torch.stack([own.float() for own in losses.values()]).sum()


def _trained(
    name: str, network: nn.Module, seed: int, job: _Job, kept: Kept, watcher: Watcher
) -> tuple[TransferRow, nn.Module]:
    began = time.perf_counter()
    with seeded(network, seed):
        model = job.made(network)
    places = job.places(network, model)
    masks = {places[key]: mask for key, mask in job.masks.get(name, {}).items() if key in places}
    loss: LossFunction = detection_loss if job.detects else cross_entropy
    logs: list[EpochLog] = fit(
        model,
        job.batches("train", seed),
        epochs=job.epochs,
        settings=job.settings.model_copy(update={"select_best": False}),
        loss=loss,
        weight_masks=masks,
        watcher=watcher,
        checkpoints=kept.checkpoints(name, seed),
        name=f"{name}, seed {seed}",
        seed=seed,
    )
    losses = tuple(log.loss for log in logs)
    seconds = round(time.perf_counter() - began, 1)
    return TransferRow(
        name, seed, job.measured(model), counted(model, set(places.values()), masks), losses, seconds
    ), model


def counted(model: nn.Module, network: set[str], masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Returns how many parameters are not masked: in the convolutions of the network, in the network, and in all.

    Args:
        network: the parameters that are not those of the new head.
    """
    convolutions = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)
    }
    counts = {
        name: int(masks[name].sum()) if name in masks else parameter.numel()
        for name, parameter in model.named_parameters()
    }
    inside = {name: count for name, count in counts.items() if name in network}
    return {
        "convolutions": sum(count for name, count in inside.items() if name in convolutions),
        "network": sum(inside.values()),
        "all": sum(counts.values()),
    }


def _head(head: str | None, source: DataSource | DetectionSource) -> Head:
    detects = isinstance(source, DetectionSource)
    chosen = cast("Head", head or ("retinanet" if detects else "classifier"))
    if chosen not in get_args(Head) or (chosen != "classifier") != detects:
        expected = ", ".join(own for own in HEADS if own != "classifier") if detects else "classifier"
        raise ConfigError(
            f"The head is '{chosen}', but '{source.name}' holds {'boxes' if detects else 'classes'}: expected "
            f"{expected}. Choose another head, or other data."
        )
    return chosen


def _check(networks: Mapping[str, NetworkOrBuilder], seeds: Sequence[int], epochs: int, job: _Job) -> None:
    if not networks or not seeds or len(set(seeds)) < len(seeds) or epochs < 1:
        raise ConfigError(
            f"There are {len(networks)} networks, the seeds {list(seeds)} and {epochs} epochs, expected at least one "
            "of each, and every seed once."
        )
    unknown = sorted(set(job.masks) - set(networks))
    if unknown:
        raise ConfigError(f"There are masks for '{unknown[0]}', expected one of {', '.join(networks)}. Mend the name.")
    odd = [name for name in networks if not 0 < len(name) <= _LONGEST_NAME or any(own in name for own in "/\\\0")]
    if odd:
        raise ConfigError(
            f"A network is called '{odd[0]}', expected 1 to {_LONGEST_NAME} letters without slashes: it becomes a file "
            "name."
        )
    if job.detects:
        detection_metric()  # now rather than after hours of training
    for name, given in networks.items():
        network = _of_seed(given, seeds[0])
        _check_masks(name, job.masks.get(name, {}), network)
        with seeded(network, seeds[0]):
            job.made(network)


def _check_masks(name: str, masks: Mapping[str, Tensor], network: nn.Module) -> None:
    shapes = {key: tuple(parameter.shape) for key, parameter in network.named_parameters()}
    for key, mask in masks.items():
        if mask.dtype is not torch.bool or tuple(mask.shape) != shapes.get(key):
            raise ConfigError(
                f"The mask '{key}' of '{name}' is {mask.dtype} of shape {tuple(mask.shape)}, expected torch.bool and "
                f"the shape of that parameter, {shapes.get(key, 'which there is not')}. Mend it."
            )
