"""What a recipe may say: its sections and keys, with defaults and ranges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationInfo, field_validator, model_validator

from nni_prune_ext.allocation import Limits, Scope, latency_of, parse_targets
from nni_prune_ext.errors import TargetError
from nni_prune_ext.export.int8 import FEWEST_IMAGES, Calibration
from nni_prune_ext.export.precision_check import Reduced
from nni_prune_ext.latency.conditions import LatencyConditions
from nni_prune_ext.training.distillation import Distillation
from nni_prune_ext.training.settings import TrainingSettings

SHORT_FORMS = {
    "model": "name", "data": "source", "train": "epochs", "recovery": "epochs", "quantize": "precision",
    "latency": "runtime",
}  # fmt: skip
"""Sections that may be written as one value: ``model: resnet20`` is ``model: {name: resnet20}``."""


class ModelSection(BaseModel):
    """The network, and where its weights come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="`resnet56`, `torchvision:NAME`, `timm:NAME` or `module.path:factory`")
    weights: Path | None = Field(default=None, description="weights of the dense network: safetensors or a safe `.pt`")
    pretrained: bool = Field(default=False, description="let torchvision or timm download its weights")
    num_classes: int | None = Field(default=None, ge=1, strict=True, description="classes; the data's own by default")
    input_shape: tuple[int, ...] | None = Field(default=None, description="N,C,H,W of the example; the data's own")

    @field_validator("input_shape", mode="before")
    @classmethod
    def _read_shape(cls, value: object) -> object:
        return value.replace("x", ",").split(",") if isinstance(value, str) else value

    @field_validator("input_shape")
    @classmethod
    def _check_shape(cls, value: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        name = str(info.data.get("name", ""))
        takes_images = ":" not in name or name.startswith(("cifar:", "torchvision:", "timm:"))
        if value is not None and (len(value) < (4 if takes_images else 2) or min(value) < 1):
            raise ValueError(
                f"Not a usable input shape for '{name}': {','.join(map(str, value))}. Expected positive sizes N,C,H,W: "
                "batch, channels, height and width, for example 1,3,224,224"
            )
        return value


class DataSection(BaseModel):
    """The images: the training split trains, the validation split selects, the test split is only reported on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(min_length=1, description="`digits`, `cifar10:ROOT`, `imagefolder:PATH` or `module:factory`")
    batch_size: int = Field(default=128, ge=1, strict=True, description="images per training batch")
    image_size: int | None = Field(default=None, ge=1, strict=True, description="height and width of the images")
    limit_images: int | None = Field(default=None, ge=1, strict=True, description="at most so many images per split")
    download: bool = Field(default=False, description="let torchvision download CIFAR-10")
    mean: tuple[float, ...] | None = Field(default=None, description="per channel, for pixels in 0–1; the source's own")
    std: tuple[float, ...] | None = Field(default=None, description="per channel, for pixels in 0–1; the source's own")

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _read_numbers(cls, value: object) -> object:
        if isinstance(value, str):
            return value.split(",")
        return [value] if isinstance(value, (int, float)) else value


class TrainSection(TrainingSettings):
    """Training of the dense network before anything else: epochs, and the settings of ``training``."""

    epochs: int = Field(ge=1, strict=True, description="epochs of the dense network's own training")

    def settings(self) -> TrainingSettings:
        """Returns the settings without the epochs."""
        return TrainingSettings.model_validate(self.model_dump(exclude={"epochs"}))


class RecoverySection(BaseModel):
    """Training of the compact network after the cut, with the settings of ``training``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(ge=0, strict=True, description="epochs after the cut")


class MeasureSection(BaseModel):
    """How long latency is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounds: int = Field(default=30, ge=2, strict=True, description="rounds in which all networks take turns")
    min_seconds: float = Field(default=2.0, ge=0, description="shortest time for all rounds together")


class QuantizeSection(BaseModel):
    """Which files of lower precision are made of every network, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: tuple[Reduced, ...] = Field(default=("int8",), min_length=1, description="`int8`, `fp16`, or a list")
    calibration: Calibration = Field(
        default="minmax", description="`minmax`, `entropy` or `percentile`; `dynamic` needs no images"
    )
    images: int = Field(default=256, ge=FEWEST_IMAGES, strict=True, description="training images that calibrate int8")
    keep_float: tuple[str, ...] = Field(default=(), description="name patterns of layers that stay in float32")

    @field_validator("precision", "keep_float", mode="before")
    @classmethod
    def _read_one(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("precision")
    @classmethod
    def _check_once(cls, value: tuple[Reduced, ...]) -> tuple[Reduced, ...]:
        return tuple(dict.fromkeys(value))


class Recipe(BaseModel):
    """A whole job: model, data, base training, method and target, recovery, measurement.

    Whether its parts fit each other is checked by :func:`recipe_from`, :func:`load_recipe` and the workbench.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str | None = Field(default=None, description="of the report; model and method by default")
    model: ModelSection
    data: DataSection | None = None
    train: TrainSection | None = None
    method: str | None = Field(default=None, description="a registered pruner; without one the recipe only trains")
    options: dict[str, JsonValue] = Field(default={}, description="of the method; see `nni-prune-ext list METHOD`")
    target: tuple[str, ...] = Field(
        default=(), description="`macs=`, `params=`, `memory=`, `latency=`, `ratio=` or `sparsity=`"
    )
    latency: LatencyConditions | None = Field(default=None, description="where a latency target is measured")
    limits: Limits = Limits()
    scope: Scope = Field(default="global", description="`global`: one ranking; `local`: one ratio for all groups")
    training: TrainingSettings = TrainingSettings()
    recovery: RecoverySection | None = None
    distillation: Distillation | None = None
    loss: str | None = Field(default=None, description="`module.path:function` of (model, batch); cross-entropy")
    metric: str | None = Field(
        default=None, description="`module.path:function` of (model, batches), higher is better; top-1 accuracy"
    )
    control: bool | None = Field(
        default=None, description="a row for the dense network, trained as long; on where something trains"
    )
    measure: MeasureSection | None = MeasureSection()
    quantize: QuantizeSection | None = None
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where it computes; `auto` takes a GPU if there is one"
    )
    keep_checkpoints: bool = Field(default=False, description="keep OUT/checkpoints when the run is done")
    seed: int = Field(default=0, ge=0, strict=True, description="of everything random")
    out: Path | None = Field(default=None, description="the run's folder")

    @model_validator(mode="before")
    @classmethod
    def _read_short_forms(cls, values: object) -> object:
        return _written_out(values) if isinstance(values, Mapping) else values

    @field_validator("target", mode="before")
    @classmethod
    def _read_target(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("target")
    @classmethod
    def _check_target(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            if value:
                parse_targets(value)
        except TargetError as error:
            raise ValueError(str(error)) from error
        return value

    @property
    def aims_at_latency(self) -> bool:
        """Whether a target is about latency."""
        return bool(self.target) and latency_of(parse_targets(self.target)) is not None

    @property
    def recovery_epochs(self) -> int:
        """The epochs of training after the cut."""
        return self.recovery.epochs if self.recovery else 0

    def to_yaml(self) -> str:
        """Returns the recipe as YAML, with every default written out; keys without a value are left out."""
        values = self.model_dump(mode="json", exclude_none=True)
        if self.measure is None:  # left out, it would be measured as usual
            values = {key: values.get(key, False) for key in type(self).model_fields if key in {*values, "measure"}}
        text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
        return text


def all_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of all keys, those of sections included."""
    for name, info in model.model_fields.items():
        yield prefix + name
        section = section_in(info.annotation)
        if section is not None:
            yield from all_keys(section, f"{prefix}{name}.")


def section_in(annotation: object) -> type[BaseModel] | None:
    """Returns the pydantic class in an annotation, also within ``| None``, ``tuple`` and ``dict``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(section_in, get_args(annotation))), None)


def _written_out(values: Mapping[str, object]) -> dict[str, object]:
    full = dict(values)
    for section, key in SHORT_FORMS.items():
        kinds = (str, list) if section == "quantize" else (str, int)
        if isinstance(full.get(section), kinds) and not isinstance(full[section], bool):
            full[section] = {key: full[section]}
    if isinstance(full.get("measure"), bool):
        full["measure"] = {} if full["measure"] else None
    for section in ("limits", "training", "options"):
        if section in full and full[section] is None:  # a heading with nothing below it
            full[section] = {}
    return full
