"""What can be known about a job before any work: the model, its data, what is reachable, how much there is to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from nni_prune_ext.allocation import CostModel, check_feasible
from nni_prune_ext.certificate import verify_groups
from nni_prune_ext.costs import Costs, count_costs
from nni_prune_ext.data.batches import BatchLoader, split_batches
from nni_prune_ext.data.image_arrays import DataSource
from nni_prune_ext.data.sources import open_data
from nni_prune_ext.errors import RecipeError
from nni_prune_ext.export.artefact_folder import ModelSpec
from nni_prune_ext.graph.channel_groups import ChannelGroups, trace_channel_groups
from nni_prune_ext.models.loading import build_model
from nni_prune_ext.pipeline import parse_targets
from nni_prune_ext.recipes import Recipe, method_epochs
from nni_prune_ext.specs import import_factory
from nni_prune_ext.training import Evaluate, LossFunction, accuracy, cross_entropy
from nni_prune_ext.training.processes import own_device

EVALUATION_BATCH = 500
"""Images per batch where nothing is trained."""


@dataclass(frozen=True)
class Job:
    """A model with example inputs and, where given, data; and what is needed to build the model again."""

    model: nn.Module
    spec: ModelSpec
    example: tuple[Tensor, ...]
    source: DataSource | None


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
    dense: Costs
    groups: ChannelGroups | None
    reachable: dict[str, float]

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return device_of(self.recipe)

    def training_batches(self) -> BatchLoader | None:
        """Returns batches of the training split, if there is data."""
        data = self.recipe.data
        if data is None or self.job.source is None:
            return None
        return split_batches(self.job.source, "train", data.batch_size, seed=self.recipe.seed, device=self.device)

    def test_batches(self) -> BatchLoader | None:
        """Returns batches of the test split, which nothing is chosen by, if there is data."""
        return split_batches(self.job.source, "test", EVALUATION_BATCH) if self.job.source else None

    def validation(self) -> Evaluate | None:
        """Returns the accuracy on the validation split as a function of a model, if there is data."""
        if self.job.source is None:
            return None
        batches = split_batches(self.job.source, "val", EVALUATION_BATCH)

        def evaluate(model: nn.Module) -> float:
            device = next(model.parameters()).device
            return accuracy(model, ((images.to(device), labels.to(device)) for images, labels in batches))

        return evaluate


def prepare(recipe: Recipe) -> Prepared:
    """Opens model and data of a recipe, traces the channels and makes sure that the target can be reached.

    Raises:
        NniPruneExtError: any of it is impossible; nothing was written.
    """
    loss = _loss(recipe)
    job = open_job(recipe)
    groups, reachable = None, {}
    dense = count_costs(job.model, job.example)
    if recipe.method is not None:
        groups = verify_groups(job.model, job.example, trace_channel_groups(job.model, job.example), seed=recipe.seed)
        targets = parse_targets(recipe.target) if recipe.target else ()
        reachable = check_feasible(CostModel.of(job.model, groups, dense), targets, recipe.limits)
    return Prepared(recipe, job, loss, dense, groups, reachable)


def open_job(recipe: Recipe, *, known: ModelSpec | None = None, image_size: int | None = None) -> Job:
    """Builds the model and opens the data; example inputs are one image of the data, or of ``model.input_shape``.

    Args:
        known: what an artefact folder says about classes and inputs; the recipe wins.
        image_size: height and width of the example input where there is no data.
    """
    model, source = recipe.model, _opened_data(recipe)
    if model.input_shape:
        shape = model.input_shape
    elif source:
        shape = (1, *source.input_shape)
    elif known and not image_size:
        shape = known.input_shape
    else:
        shape = (1, known.input_shape[1] if known else 3, *_default_size(model.name, image_size))
    described = source or known
    classes = described.num_classes if model.num_classes is None and described else model.num_classes
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        network = build_model(
            model.name,
            num_classes=classes,
            in_channels=shape[1],
            weights=model.weights,
            pretrained=model.pretrained,
        )
        example = torch.randn(shape)
    spec = ModelSpec(
        model=model.name,
        num_classes=classes,
        input_shape=shape,
        mean=described.mean if described else None,
        std=described.std if described else None,
    )
    return Job(network, spec, (example,), source)


def work_to_do(prepared: Prepared) -> list[str]:
    """Says in sentences what a run would do, with its epochs and images."""
    recipe, source = prepared.recipe, prepared.job.source
    images = len(source.train) if source else 0
    lines = [f"dense: {prepared.dense.macs:,} MACs, {prepared.dense.params:,} parameters"]
    epochs = 0
    if recipe.train:
        lines.append(f"base training: {_work(recipe.train.epochs, images)}")
        epochs += recipe.train.epochs
    if recipe.method:
        reach = prepared.reachable["macs"] / max(prepared.dense.macs, 1)
        lines.append(f"method {recipe.method} to {', '.join(recipe.target)}; reachable: {reach:.3f} of the MACs")
        steps = planned_epochs(recipe)
        parts = {"training between the method's steps": steps - recipe.recovery_epochs}
        parts["recovery"] = recipe.recovery_epochs
        parts["control, the dense network trained as long"] = steps if wants_control(recipe) else 0
        lines += [f"{name}: {_work(count, images)}" for name, count in parts.items() if count]
        epochs += sum(parts.values())
    if source:
        lines.append(f"validation on {len(source.val):,} images, test on {len(source.test):,}")
    return [*lines, f"in all: {_work(epochs, images)}"]


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
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device is 'cuda', but torch sees no GPU here, expected one. Set device to cpu or auto.")
    cuda = recipe.device != "cpu" and torch.cuda.is_available()
    return own_device(torch.device("cuda" if cuda else "cpu"))


def _loss(recipe: Recipe) -> LossFunction:
    if recipe.loss is None:
        return cross_entropy
    return cast("Callable[..., Tensor]", import_factory(recipe.loss, error=RecipeError))


def _opened_data(recipe: Recipe) -> DataSource | None:
    data = recipe.data
    if data is None:
        return None
    return open_data(
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


def _work(epochs: int, images: int) -> str:
    return f"{epochs} epochs, {epochs * images:,} images"
