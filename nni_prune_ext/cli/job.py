"""What the verbs share: opening the user's model and data, reading limits and options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from nni_prune_ext.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nni_prune_ext.allocation import Limits
    from nni_prune_ext.data.sources import DataSource
    from nni_prune_ext.export.artefact_folder import ModelSpec
    from nni_prune_ext.graph.channel_groups import ChannelGroups


@dataclass
class Job:
    """A model with example inputs and, where given, data; and what is needed to build the model again."""

    model: nn.Module
    spec: ModelSpec
    example: tuple[torch.Tensor, ...]
    source: DataSource | None


def open_job(
    model: str,
    *,
    weights: Path | None,
    pretrained: bool,
    data: str | None,
    num_classes: int | None,
    input_shape: str | None,
    image_size: int | None,
    limit_images: int | None,
    download: bool,
    mean: str | None,
    std: str | None,
    seed: int,
    known: ModelSpec | None = None,
) -> Job:
    """Builds the model and opens the data; example inputs are one image of the data, or of ``--input-shape``.

    Args:
        known: what an artefact folder says about classes and inputs; the options given win.
    """
    import torch  # imported here to keep --help instant

    from nni_prune_ext.data.sources import open_data
    from nni_prune_ext.export.artefact_folder import ModelSpec
    from nni_prune_ext.models.loading import build_model

    torch.manual_seed(seed)
    source = None
    if data is not None:
        source = open_data(
            data,
            image_size=image_size,
            limit=limit_images,
            seed=seed,
            download=download,
            mean=_floats("--mean", mean),
            std=_floats("--std", std),
        )
    if input_shape:
        shape = _shape(input_shape, model)
    elif source:
        shape = (1, *source.input_shape)
    elif known and not image_size:
        shape = known.input_shape
    else:
        shape = (1, known.input_shape[1] if known else 3, *_default_size(model, image_size))
    described = source or known
    classes = described.num_classes if num_classes is None and described else num_classes
    network = build_model(model, num_classes=classes, in_channels=shape[1], weights=weights, pretrained=pretrained)
    spec = ModelSpec(model=model, num_classes=classes, input_shape=shape)
    return Job(network, spec, (torch.randn(shape),), source)


def tell_what_is_not_pruned(groups: ChannelGroups) -> None:
    """Prints what the trace did not see: parameters without use, and branches on values."""
    if groups.unreached:
        typer.echo(f"not reached by the forward pass, left as they are: {', '.join(groups.unreached)}")
    if groups.value_dependent:
        typer.echo(
            f"warning: the forward pass reads values of tensors ({', '.join(groups.value_dependent)}); if it branches "
            "on them, only the branch that the example input took is known to be exact",
            err=True,
        )


def read_limits(max_ratio: float, min_channels: int, multiple: int, exclude: list[str], layer: list[str]) -> Limits:
    """Reads the options that limit a plan; ``layer`` entries are ``PATTERN=MIN:MAX``."""
    from pydantic import ValidationError  # imported here to keep --help instant

    from nni_prune_ext.allocation import LayerLimit, Limits

    layers = {}
    for text in layer:
        pattern, _, span = text.rpartition("=")
        low, _, high = span.partition(":")
        try:
            layers[pattern] = LayerLimit(min_ratio=float(low or 0), max_ratio=float(high or 1))
        except ValueError as error:
            raise ConfigError(
                f"Cannot read the layer limit '{text}'. Expected PATTERN=MIN:MAX with ratios in 0–1, for "
                "example 'layer1.*=0:0.3'."
            ) from error
    try:
        return Limits(
            max_ratio=max_ratio, min_channels=min_channels, multiple=multiple, exclude=tuple(exclude), layers=layers
        )
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{name} is {first['input']!r}: {first['msg']}. Change it.") from error


def read_options(options: list[str]) -> dict[str, object]:
    """Reads ``KEY=VALUE`` options of a method; values are JSON where they parse, text otherwise."""
    import json  # imported here beside its only use

    result: dict[str, object] = {}
    for text in options:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"Cannot read the option '{text}'. Expected KEY=VALUE, for example steps=4.")
        try:
            result[key] = json.loads(value)
        except json.JSONDecodeError:
            result[key] = value
    return result


def _shape(text: str, model: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError as error:
        raise ConfigError(
            f"Cannot read the input shape '{text}'. Expected N,C,H,W, for example 1,3,224,224."
        ) from error
    takes_images = ":" not in model or model.startswith(("cifar:", "torchvision:", "timm:"))
    if len(shape) < (4 if takes_images else 2) or min(shape) < 1:
        raise ConfigError(
            f"The input shape '{text}' is not usable for '{model}'. Expected positive sizes N,C,H,W: batch, channels, "
            "height and width. Give for example --input-shape 1,3,224,224."
        )
    return shape


def _floats(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"Cannot read {option} '{text}'. Expected one number per channel, for example 0.485,0.456,0.406."
        ) from error


def _default_size(model: str, image_size: int | None) -> tuple[int, int]:
    size = image_size or (224 if ":" in model and not model.startswith("cifar:") else 32)
    return size, size
