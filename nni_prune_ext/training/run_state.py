"""A training run as JSON values and tensors: model, method, optimizers, random states, position; and back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nni_prune_ext.checkpoints import Json
from nni_prune_ext.errors import CheckpointError, PluginError
from nni_prune_ext.graph.model_copy import named_tensors

if TYPE_CHECKING:
    from nni_prune_ext.training.settings import Batches

State = tuple[dict[str, Json], dict[str, Tensor]]


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors under ``prefix.name``."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def under_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors that are named ``prefix.name``, by their name."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def cuda_devices(model: nn.Module) -> list[int]:
    """Returns the numbers of the GPUs that hold a model."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns all parameters and buffers, also those that a state dict leaves out."""
    return {name: tensor.detach() for name, tensor in named_tensors(model)}


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies saved tensors into a model of the same shapes.

    Raises:
        CheckpointError: names or shapes are not the model's.
    """
    own = model_tensors(model)
    wrong = sorted(own.keys() ^ tensors.keys())
    wrong += [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if wrong:
        raise CheckpointError(
            f"The checkpoint does not fit the model: {', '.join(wrong[:5])} differ in name or shape. Expected its "
            "own model. Start anew in another folder."
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def optimizer_states(optimizers: Sequence[Optimizer]) -> State:
    """Returns moments as tensors, counters and rates as JSON."""
    values: list[Json] = []
    tensors: dict[str, Tensor] = {}
    for number, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        numbers: dict[str, Json] = {}
        for index, entries in state["state"].items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"{number}.{index}.{key}"] = value
                else:
                    numbers[f"{index}.{key}"] = value
        groups = [{k: _plain(v) for k, v in group.items() if k != "params"} for group in state["param_groups"]]
        values.append({"numbers": numbers, "groups": cast("list[Json]", groups)})
    return {"optimizers": values}, tensors


def load_optimizer_states(
    optimizers: Sequence[Optimizer], values: Sequence[Json], tensors: Mapping[str, Tensor]
) -> None:
    """Restores optimizers that were made anew over the same parameters.

    Raises:
        PluginError: there are others than were saved.
    """
    if len(optimizers) != len(values):
        raise PluginError(
            f"The phase makes {len(optimizers)} optimizer(s), but {len(values)} were saved. Expected the same ones "
            "every time. Report this to the method's author."
        )
    for number, (optimizer, saved) in enumerate(zip(optimizers, values)):
        entry = cast("dict[str, Json]", saved)
        own = optimizer.state_dict()
        own["state"] = {}
        for name, value in [
            *under_prefix(str(number), tensors).items(),
            *cast("dict[str, Json]", entry["numbers"]).items(),
        ]:
            index, _, key = name.partition(".")
            own["state"].setdefault(int(index), {})[key] = value
        for group, known in zip(own["param_groups"], cast("list[dict[str, Json]]", entry["groups"])):
            for key, value in known.items():
                group[key] = tuple(value) if isinstance(value, list) else value
        optimizer.load_state_dict(own)


def loader_generators(batches: Batches) -> list[torch.Generator]:
    """Returns the generators that a ``DataLoader`` and its samplers hold, each once."""
    sampler, batch_sampler = getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)
    holders = [batches, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)]
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(own): own for own in found if isinstance(own, torch.Generator)}.values())


def load_loader_states(batches: Batches, tensors: Mapping[str, Tensor]) -> None:
    """Restores the data's own generators, from what :func:`random_states` returned."""
    for number, own in enumerate(loader_generators(batches)):
        if f"loader.{number}" in tensors:
            own.set_state(tensors[f"loader.{number}"])


@contextmanager
def random_kept(devices: Sequence[int] = ()) -> Iterator[None]:
    """Puts the global generators of torch (CPU and these CUDA devices), numpy and Python back afterwards."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def random_states(model: nn.Module, batches: Batches) -> State:
    """Returns the states of every generator that training draws from: torch, CUDA, numpy, Python, the loader's own."""
    tensors = {"torch": torch.get_rng_state()}
    for device in cuda_devices(model):
        tensors[f"cuda.{device}"] = torch.cuda.get_rng_state(device)
    for number, own in enumerate(loader_generators(batches)):
        tensors[f"loader.{number}"] = own.get_state()
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, internal, gauss_next = random.getstate()
    tensors["python"] = torch.tensor(internal, dtype=torch.int64)
    values: dict[str, Json] = {
        "numpy": [str(kind), int(position), int(has_gauss), float(gauss)],
        "python": [version, gauss_next],
    }
    return {"random": values}, tensors


def load_random_states(
    model: nn.Module, batches: Batches, values: Mapping[str, Json], tensors: Mapping[str, Tensor]
) -> None:
    """Restores what :func:`random_states` returned."""
    torch.set_rng_state(tensors["torch"])
    for device in cuda_devices(model):
        if f"cuda.{device}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{device}"], device)
    load_loader_states(batches, tensors)
    kind, position, has_gauss, gauss = cast("tuple[str, int, int, float]", values["numpy"])
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, gauss_next = cast("tuple[int, float | None]", values["python"])
    random.setstate((version, tuple(tensors["python"].tolist()), gauss_next))


def _plain(value: object) -> Json:
    if isinstance(value, Tensor):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return cast("Json", value)
