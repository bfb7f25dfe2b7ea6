"""What can be known about a job before any work: the model, its data, what is reachable, how much there is to do."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from nni_prune_ext.allocation import CostModel, Limits, check_feasible, counted_only, parse_targets, sparsity_of
from nni_prune_ext.certificate import verify_groups
from nni_prune_ext.costs import Costs, count_costs
from nni_prune_ext.data.batches import BatchLoader, split_batches
from nni_prune_ext.data.image_arrays import DataSource
from nni_prune_ext.data.loaders import Loaders
from nni_prune_ext.data.sources import open_source
from nni_prune_ext.data.splitting import split_off
from nni_prune_ext.deployment import Metric
from nni_prune_ext.errors import ConfigError, NniPruneExtError, RecipeError, WeightsError
from nni_prune_ext.export.artefact_folder import ModelSpec
from nni_prune_ext.graph.channel_groups import ChannelGroups, trace_channel_groups
from nni_prune_ext.inputs import ExampleInputs, tensors_in
from nni_prune_ext.latency import LatencyConditions
from nni_prune_ext.lower_precision import LowerPrecision
from nni_prune_ext.models.loading import build_model
from nni_prune_ext.recipes import Origins, Recipe, method_epochs
from nni_prune_ext.runtimes.registered import usable_runtime
from nni_prune_ext.training import Batches, Evaluate, LossFunction
from nni_prune_ext.training.processes import own_device
from nni_prune_ext.workbench.loss_and_metric import opened_loss, opened_metric, try_loss, try_metric

EVALUATION_BATCH = 500
"""Images per batch where nothing is trained."""
TRIAL_BATCH = 8
"""Images on which loss and metric are tried before any work, at most."""


@dataclass(frozen=True)
class Job:
    """A model with example inputs and, where given, data; and what is needed to build the model again.

    Attributes:
        source: images in memory.
        loaders: batches of any task, in the place of ``source``.
    """

    model: nn.Module
    spec: ModelSpec
    example: ExampleInputs
    source: DataSource | None
    loaders: Loaders | None = None

    def batches(
        self, split: str, batch_size: int = EVALUATION_BATCH, *, seed: int = 0, device: torch.device | str = "cpu"
    ) -> Batches | None:
        """Returns batches of a split, if there is data; loaders decide on size and place themselves."""
        if self.loaders is not None:
            return self.loaders.splits()[split]
        if self.source is None:
            return None
        return split_batches(self.source, split, batch_size, seed=seed, device=device)


@dataclass(frozen=True)
class Prepared:
    """A job that was opened, traced and found feasible.

    Attributes:
        groups: verified channel groups; ``None`` where nothing is pruned.
        dense: costs of the dense network.
        reachable: the lowest reachable ``macs``, ``params``, ``memory`` and the highest ``ratio``.
    """

    recipe: Recipe
    job: Job
    loss: LossFunction
    metric: Metric
    dense: Costs
    groups: ChannelGroups | None
    reachable: dict[str, float]

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return device_of(self.recipe)

    def training_batches(self) -> Batches | None:
        """Returns batches of the training split, if there is data."""
        size = self.recipe.data.batch_size if self.recipe.data else EVALUATION_BATCH
        return self.job.batches("train", size, seed=self.recipe.seed, device=self.device)

    def test_batches(self) -> Batches | None:
        """Returns batches of the test split, which nothing is chosen by, if there is data."""
        return self.job.batches("test")

    def validation(self) -> Evaluate | None:
        """Returns the metric on the validation split as a function of a model, if there is data."""
        batches = self.job.batches("val")
        return None if batches is None else lambda model: self.metric(model, batches)


def prepare(recipe: Recipe, *, origins: Origins | None = None) -> Prepared:
    """Opens model and data of a recipe, tries loss and metric, traces the channels and checks the target.

    Args:
        origins: where the keys of the recipe were written, for messages.

    Raises:
        NniPruneExtError: any of it is impossible; nothing was written.
    """
    origins = origins or Origins()
    loss, metric = opened_loss(recipe, origins), opened_metric(recipe, origins)
    device_of(recipe)
    job = open_job(recipe, origins=origins)
    groups, reachable = None, {}
    dense = count_costs(job.model, job.example)
    if recipe.method is not None:
        groups = verify_groups(job.model, job.example, trace_channel_groups(job.model, job.example), seed=recipe.seed)
        with origins.named(*_limit_key(recipe, groups)):
            recipe.limits.check(groups)
        with origins.named("target"):
            targets = parse_targets(recipe.target) if recipe.target else ()
            bounds = counted_only(targets)  # a sparsity can always be reached, a latency must be measured
            reachable = check_feasible(CostModel.of(job.model, groups, dense), bounds, recipe.limits)
        if recipe.aims_at_latency:
            with origins.named("latency", "runtime"):
                usable_runtime((recipe.latency or LatencyConditions()).runtime)
    _check_quantize(recipe, job, origins)
    prepared = Prepared(recipe, job, loss, metric, dense, groups, reachable)
    _try_on_data(prepared, origins)
    return prepared


def _try_on_data(prepared: Prepared, origins: Origins) -> None:
    """Tries loss and metric on one batch each, where there is data."""
    recipe, job = prepared.recipe, prepared.job
    size = min(TRIAL_BATCH, recipe.data.batch_size) if recipe.data else TRIAL_BATCH
    train, val = job.batches("train", size, seed=recipe.seed), job.batches("val", size)
    if train is None or val is None:
        return
    try_loss(job.model, train, prepared.loss, recipe, origins)
    try_metric(job.model, val, prepared.metric, recipe, origins)


def _check_quantize(recipe: Recipe, job: Job, origins: Origins) -> None:
    """Makes sure that files of lower precision can be made, before any work."""
    section = recipe.quantize
    if section is None:
        return
    if job.source is None and job.loaders is not None and "int8" in section.precision:
        raise RecipeError(
            f"{origins.subject(('quantize',))} asks for int8, but the data are loaders, expected images in memory to "
            "calibrate on. Leave int8 out, and use quantize_onnx on the ONNX file with images of your own."
        )
    layers = [name for name, part in job.model.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    for pattern in section.keep_float:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise RecipeError(
                f"{origins.subject(('quantize', 'keep_float'))}: '{pattern}' matches no convolution or linear layer, "
                f"expected one of {', '.join(layers[:8])}{', …' if len(layers) > 8 else ''}. Correct the pattern."
            )


def lower_precision(prepared: Prepared) -> LowerPrecision | None:
    """Returns which files of lower precision a run makes, with training images to calibrate on, if any."""
    section, source = prepared.recipe.quantize, prepared.job.source
    if section is None:
        return None
    images = calibration_images(source, section.images, seed=prepared.recipe.seed) if source else None
    return LowerPrecision(section.precision, images, section.calibration, section.keep_float)


def calibration_images(source: DataSource, count: int, *, seed: int) -> torch.Tensor:
    """Returns training images as the network sees them when it is used, ``(N, C, H, W)`` float32, classes balanced."""
    _, drawn = split_off(source.train.labels, min(count, len(source.train)), seed=seed)
    images, _ = next(iter(BatchLoader(source.train.subset(drawn), len(drawn), mean=source.mean, std=source.std)))
    return images


def _limit_key(recipe: Recipe, groups: ChannelGroups) -> tuple[str, ...]:
    """Returns the key of the first limit that matches no layer, or of all limits."""
    for pattern in recipe.limits.exclude:
        if not _fits(Limits(exclude=(pattern,)), groups):
            return ("limits", "exclude")
    for pattern, limit in recipe.limits.layers.items():
        if not _fits(Limits(layers={pattern: limit}), groups):
            return ("limits", "layers", pattern)
    return ("limits",)


def _fits(limits: Limits, groups: ChannelGroups) -> bool:
    try:
        limits.check(groups)
    except ConfigError:
        return False
    return True


def open_job(
    recipe: Recipe, *, known: ModelSpec | None = None, image_size: int | None = None, origins: Origins | None = None
) -> Job:
    """Builds the model and opens the data; example inputs are one image of the data, or of ``model.input_shape``.

    Args:
        known: what an artefact folder says about classes and inputs; the recipe wins.
        image_size: height and width of the example input where there is no data.
        origins: where the keys of the recipe were written, for messages.
    """
    model, origins = recipe.model, origins or Origins()
    with origins.named("data", "source"):
        data = _opened_data(recipe)
    source, loaders = (None, data) if isinstance(data, Loaders) else (data, None)
    shape = _input_shape(recipe, data, known, image_size)
    described = source or known
    holder = loaders or described
    classes = holder.num_classes if model.num_classes is None and holder else model.num_classes
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        network = _built(recipe, classes, _channels(shape), origins)
        example: ExampleInputs = (torch.randn(shape),)
    if loaders and not model.input_shape:
        example = loaders.example_inputs
    spec = ModelSpec(
        model=model.name,
        num_classes=classes,
        input_shape=shape,
        mean=described.mean if described else None,
        std=described.std if described else None,
    )
    return Job(network, spec, example, source, loaders)


def _built(recipe: Recipe, classes: int | None, channels: int, origins: Origins) -> nn.Module:
    model = recipe.model
    try:
        return build_model(
            model.name, num_classes=classes, in_channels=channels, weights=model.weights, pretrained=model.pretrained
        )
    except WeightsError as error:
        raise origins.placed(error, "model", "weights" if model.weights else "pretrained") from error
    except NniPruneExtError as error:
        raise origins.placed(error, "model", "name") from error


def _input_shape(
    recipe: Recipe, data: DataSource | Loaders | None, known: ModelSpec | None, image_size: int | None
) -> tuple[int, ...]:
    model = recipe.model
    if model.input_shape:
        return model.input_shape
    if isinstance(data, Loaders):
        return tuple(next(tensors_in(data.example_inputs)).shape)
    if data:
        return (1, *data.input_shape)
    if known and not image_size:
        return known.input_shape
    return (1, known.input_shape[1] if known else 3, *_default_size(model.name, image_size))


def _channels(shape: tuple[int, ...]) -> int:
    """Returns the channels of an input ``(N, C, …)``, or of a single image ``(C, H, W)``."""
    return shape[0] if len(shape) == 3 else shape[1] if len(shape) > 1 else 3


def work_to_do(prepared: Prepared) -> list[str]:
    """Says in sentences what a run would do, with its epochs and images."""
    recipe, source, loaders = prepared.recipe, prepared.job.source, prepared.job.loaders
    amount = _amount(prepared.job)
    lines = [f"dense: {prepared.dense.macs:,} MACs, {prepared.dense.params:,} parameters"]
    epochs = 0
    if recipe.train:
        lines.append(f"base training: {_work(recipe.train.epochs, amount)}")
        epochs += recipe.train.epochs
    if recipe.method:
        reach = f"; reachable: {prepared.reachable['macs'] / max(prepared.dense.macs, 1):.3f} of the MACs"
        masked = sparsity_of(parse_targets(recipe.target)) is not None
        lines.append(f"method {recipe.method} to {', '.join(recipe.target)}{'' if masked else reach}")
        if recipe.aims_at_latency:
            where = recipe.latency or LatencyConditions()
            lines.append(f"latency: {where}; layers and a few networks are measured before the method runs")
        steps = planned_epochs(recipe)
        parts = {"training between the method's steps": steps - recipe.recovery_epochs}
        parts["recovery"] = recipe.recovery_epochs
        parts["control, the dense network trained as long"] = steps if wants_control(recipe) else 0
        lines += [f"{name}: {_work(count, amount)}" for name, count in parts.items() if count]
        epochs += sum(parts.values())
    if source:
        lines.append(f"validation on {len(source.val):,} images, test on {len(source.test):,}")
    if loaders:
        lines.append(f"validation and test by {recipe.metric or 'top-1 accuracy'} on the loaders")
    return [*lines, f"in all: {_work(epochs, amount)}"]


def planned_epochs(recipe: Recipe) -> int:
    """Returns the epochs of method and recovery together."""
    return method_epochs(recipe) + recipe.recovery_epochs


def wants_control(recipe: Recipe) -> bool:
    """Says whether the dense network is to be trained as long, as a row of its own."""
    return recipe.control is not False and planned_epochs(recipe) > 0


def device_of(recipe: Recipe) -> torch.device:
    """Returns where this process computes.

    Raises:
        RecipeError: a GPU is asked for and there is none.
    """
    return device_called(recipe.device)


def device_called(name: str) -> torch.device:
    """Returns where this process computes, for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        RecipeError: it is called otherwise, or a GPU is asked for and there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"device is '{name}', expected auto, cpu or cuda. Choose one of them.")
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device is 'cuda', but torch sees no GPU here, expected one. Set device to cpu or auto.")
    cuda = name != "cpu" and torch.cuda.is_available()
    return own_device(torch.device("cuda" if cuda else "cpu"))


def _opened_data(recipe: Recipe) -> DataSource | Loaders | None:
    data = recipe.data
    if data is None:
        return None
    return open_source(
        data.source,
        image_size=data.image_size,
        limit=data.limit_images,
        seed=recipe.seed,
        download=data.download,
        mean=data.mean,
        std=data.std,
    )


def _default_size(model: str, image_size: int | None) -> tuple[int, int]:
    size = image_size or (224 if ":" in model and not model.startswith("cifar:") else 32)
    return size, size


def _amount(job: Job) -> tuple[int | None, str]:
    """Returns how much one epoch is, and of what; ``None`` where the data does not say."""
    if job.loaders is not None:
        return len(job.loaders.train) if isinstance(job.loaders.train, Sized) else None, "batches"
    return len(job.source.train) if job.source else 0, "images"


def _work(epochs: int, amount: tuple[int | None, str]) -> str:
    count, unit = amount
    return f"{epochs} epochs" if count is None else f"{epochs} epochs, {epochs * count:,} {unit}"
