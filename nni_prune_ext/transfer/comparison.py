"""Networks trained alike on a second data set, seed by seed, and compared pair by pair."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from nni_prune_ext.checkpoints import Checkpoints, Json, fingerprint
from nni_prune_ext.data.batches import split_batches
from nni_prune_ext.data.detection import DetectionBatches, DetectionSource
from nni_prune_ext.data.image_arrays import DataSource
from nni_prune_ext.errors import ConfigError
from nni_prune_ext.models.weights import save_weights
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
from nni_prune_ext.transfer.results import REPORT, TransferReport, TransferRow

_BATCH_SIZES = {"classifier": 32}
_DETECTION_BATCH = 8


def transfer_networks(
    networks: Mapping[str, nn.Module],
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
    watcher: Watcher | None = None,
) -> TransferReport:
    """Trains every network with a new head on a second data set, alike, and measures them on its test split.

    All networks see the same images in the same order, and their heads start from the same random numbers where their
    shapes are the same. Nothing is selected: the last epoch counts. The networks are not changed.

    Args:
        networks: name → classifier of images; the first one is the reference, usually the dense one.
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
        watcher: is told how the training goes.

    Raises:
        ConfigError: there is no network or seed, or the head does not fit the source.
        ModelError: a network cannot be a classifier or backbone.
        OutputError: the folder holds another comparison.
        TrainingError: the loss is no number.
    """
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
    identity = job.identity(networks)
    kept = _Kept.opened(folder, identity)
    metric = "AP" if job.detects else "accuracy"
    for seed in seeds:
        for name, network in networks.items():
            if not kept.has(name, seed):
                kept.add(_trained(name, network, seed, job, kept, watcher or Watcher()), metric, job.facts())
    order = list(networks)
    rows = sorted(kept.rows, key=lambda row: (order.index(row.network), row.seed))
    report = TransferReport(tuple(row for row in rows if row.seed in seeds), metric, job.facts())
    if folder is not None:
        report.save(folder / REPORT)
    return report


@dataclass(frozen=True, eq=False)
class _Job:
    source: DataSource | DetectionSource
    head: Head
    epochs: int
    settings: TrainingSettings
    batch_size: int | None
    normalisation: tuple[Sequence[float], Sequence[float]] | None
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
        normalisation = None if self.normalisation is None else [list(own) for own in self.normalisation]
        return {
            "data": source.name,
            "images": sizes,
            "classes": list(source.class_names),
            "input_shape": list(source.input_shape),
            "head": self.head,
            "epochs": self.epochs,
            "batch_size": self.images_per_batch,
            "normalisation": cast("Json", normalisation),
            "maps": self.maps if self.detects else None,
            "pyramid_channels": self.pyramid_channels if self.detects and self.head != "ssdlite" else None,
            "training": self.settings.model_dump(mode="json"),
        }

    def identity(self, networks: Mapping[str, nn.Module]) -> dict[str, Json]:
        prints: dict[str, Json] = {name: fingerprint(network) for name, network in networks.items()}
        masked: dict[str, Json] = {
            name: {key: int(mask.sum()) for key, mask in masks.items()} for name, masks in self.masks.items()
        }
        return {**self.facts(), "networks": prints, "masks": masked}

    def made(self, network: nn.Module) -> nn.Module:
        """Returns the network with its new head."""
        _, height, width = self.source.input_shape
        count = len(self.source.class_names)
        if not self.detects:
            return classifier(network, (height, width), count)
        mean, std = self.normalisation or (None, None)
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


@dataclass
class _Kept:
    """What is finished, and where it is kept."""

    folder: Path | None
    identity: dict[str, Json]
    rows: list[TransferRow]

    @classmethod
    def opened(cls, folder: Path | None, identity: dict[str, Json]) -> _Kept:
        if folder is None:
            return cls(None, identity, [])
        Checkpoints(folder / "state", identity).claim()
        report = folder / REPORT
        return cls(folder, identity, list(TransferReport.load(report).rows) if report.exists() else [])

    def has(self, name: str, seed: int) -> bool:
        return any(row.network == name and row.seed == seed for row in self.rows)

    def checkpoints(self, name: str, seed: int) -> Checkpoints | None:
        if self.folder is None:
            return None
        return Checkpoints(self.folder / "state" / f"{name}-{seed}", {**self.identity, "network": name, "seed": seed})

    def add(self, made: tuple[TransferRow, nn.Module], metric: str, facts: Mapping[str, object]) -> None:
        row, model = made
        self.rows.append(row)
        if self.folder is None:
            return
        save_weights(model, self.folder / f"{row.network}-seed{row.seed}.safetensors")
        TransferReport(tuple(self.rows), metric, facts).save(self.folder / REPORT)
        shutil.rmtree(self.folder / "state" / f"{row.network}-{row.seed}", ignore_errors=True)


def detection_loss(model: nn.Module, batch: Any) -> Tensor:
    """Returns the sum of a torchvision detector's losses on ``(images, targets)``, in training mode."""
    images, targets = batch
    losses: Mapping[str, Tensor] = model(list(images.unbind()), targets)
    return torch.stack([own.float() for own in losses.values()]).sum()


def _trained(
    name: str, network: nn.Module, seed: int, job: _Job, kept: _Kept, watcher: Watcher
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


def _check(networks: Mapping[str, nn.Module], seeds: Sequence[int], epochs: int, job: _Job) -> None:
    if not networks or not seeds or len(set(seeds)) < len(seeds) or epochs < 1:
        raise ConfigError(
            f"There are {len(networks)} networks, the seeds {list(seeds)} and {epochs} epochs, expected at least one "
            "of each, and every seed once."
        )
    unknown = sorted(set(job.masks) - set(networks))
    if unknown:
        raise ConfigError(f"There are masks for '{unknown[0]}', expected one of {', '.join(networks)}. Mend the name.")
    odd = [name for name in networks if not name or any(letter in name for letter in "/\\\0")]
    if odd:
        raise ConfigError(f"A network is called '{odd[0]}', expected a name without slashes: it becomes a file name.")
    if job.detects:
        detection_metric()  # now rather than after hours of training
    for network in networks.values():
        with seeded(network, seeds[0]):
            job.made(network)
