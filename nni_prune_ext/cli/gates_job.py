"""What the commands about gates share: opening the job, and the first images of a split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from nni_prune_ext.workbench import Job

Data = Annotated[str, typer.Option(help="digits, cifar10:ROOT, imagefolder:PATH, or module.path:factory.")]
Images = Annotated[int, typer.Option("--images", min=8, help="How many images are looked at.")]


def gates_job(
    model: str,
    data: str,
    weights: Path | None,
    pretrained: bool,
    num_classes: int | None,
    image_size: int | None,
    limit_images: int | None,
    download: bool,
    mean: str | None,
    std: str | None,
    *,
    seed: int,
    known: object = None,
) -> Job:
    """Builds the model and opens the data as the options of a command say; see ``open_job``."""
    from nni_prune_ext.cli.job import open_job  # imported here to keep --help instant
    from nni_prune_ext.export.artefact_folder import ModelSpec

    return open_job(
        model,
        weights=weights,
        pretrained=pretrained,
        data=data,
        num_classes=num_classes,
        input_shape=None,
        image_size=image_size,
        limit_images=limit_images,
        download=download,
        mean=mean,
        std=std,
        seed=seed,
        known=known if isinstance(known, ModelSpec) else None,
    )


def images_and_labels(job: Job, split: str, count: int) -> list[tuple[Tensor, Tensor]]:
    """Returns the first images of a split with their labels, as one batch.

    Raises:
        ConfigError: the data are no images with labels.
    """
    from nni_prune_ext.errors import ConfigError  # imported here to keep --help instant

    if job.source is None:
        raise ConfigError("The data are loaders of any task, expected images with labels. Use the Python functions.")
    batches = job.batches(split, count)
    assert batches is not None
    images, labels = next(iter(batches))
    return [(images, labels)]
