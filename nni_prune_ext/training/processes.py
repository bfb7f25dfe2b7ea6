"""Several processes that train one network: who they are, how batches are dealt out, how tensors are averaged.

Processes are started by ``torchrun`` or ``accelerate launch`` and set up by Accelerate's ``PartialState``: NCCL on
GPUs, gloo on CPUs. Gradients are averaged in one flat buffer after the backward pass instead of by
DistributedDataParallel: parameters appear and disappear when channels are cut, and a method's own parameters have to
follow too. What is lost is the overlap of communication with the backward pass.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from nni_prune_ext.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import PartialState

    from nni_prune_ext.methods.base import Batch

T = TypeVar("T")


def world_size() -> int:
    """Returns the number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Returns the number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def is_main() -> bool:
    """Says whether this process is the one that writes files and speaks."""
    return rank() == 0


def wait_for_everyone() -> None:
    """Returns when every process has come here."""
    if world_size() > 1:
        _state().wait_for_everyone()


def wait_for_main() -> None:
    """Returns when every process has come here, however long the main one takes: it may be exporting and measuring."""
    if world_size() > 1:
        _state()
        patient = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
        torch.distributed.barrier(group=patient)
        torch.distributed.destroy_process_group(patient)


def stay_on_cpu() -> None:
    """Lets the processes compute on the CPU although there are GPUs; to be called before anything else of them."""
    if world_size() > 1:
        os.environ["ACCELERATE_USE_CPU"] = "true"


def part() -> None:
    """Ends the work of several processes, when everyone has come here; an exit without it may abort the others."""
    if world_size() > 1 and torch.distributed.is_initialized():
        wait_for_everyone()
        torch.distributed.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """Returns where this process should train a model that the user holds on ``device``."""
    return device if world_size() == 1 else cast("torch.device", _state().device)


def share_weights(model: nn.Module) -> None:
    """Gives every process the main one's parameters and buffers, in place."""
    if world_size() > 1:
        _state()
        for tensor in [*model.parameters(), *model.buffers()]:
            plain = tensor.detach().contiguous().reshape(-1)
            torch.distributed.broadcast(plain.view(torch.uint8), 0)  # as bytes: gloo does not know every type
            tensor.detach().copy_(plain.view(tensor.shape))


def from_main(value: T) -> T:
    """Returns the main process's value (anything that can be sent) in every process."""
    if world_size() == 1:
        return value
    from accelerate.utils import broadcast_object_list  # imported here: one process does not need it

    _state()
    return cast("list[T]", broadcast_object_list([value]))[0]


def averaged(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the mean of every tensor over all processes; in one process the tensors themselves."""
    if world_size() == 1 or not values:
        return dict(values)
    device = _state().device
    flat = torch.cat([value.detach().to(device, torch.float64).flatten() for value in values.values()])
    torch.distributed.all_reduce(flat)
    parts = torch.split(flat / world_size(), [value.numel() for value in values.values()])
    return {k: part.view(v.shape).to(v.device, v.dtype) for (k, v), part in zip(values.items(), parts)}


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Adds up the gradients of all processes, in place; a parameter without one anywhere stays without."""
    if world_size() == 1 or not parameters:
        return
    _state()
    has_one = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    torch.distributed.all_reduce(has_one)
    used = [p for p, count in zip(parameters, has_one.tolist()) if count]
    for dtype in dict.fromkeys(p.dtype for p in used):  # in the same order everywhere
        own = [p for p in used if p.dtype == dtype]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in own])
        torch.distributed.all_reduce(flat)
        for parameter, part in zip(own, torch.split(flat, [p.numel() for p in own])):
            parameter.grad = part.view(parameter.shape).clone()


def average_statistics(model: nn.Module) -> None:
    """Gives every floating-point buffer of a model (running statistics) its mean over all processes, in place."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    if world_size() > 1:
        for name, mean in averaged(buffers).items():
            buffers[name].copy_(mean)


def share_random_states() -> None:
    """Gives every process the main one's global generators: they drift apart where one has more batches to work on."""
    if world_size() > 1:
        state, numpy_state, python_state = from_main((torch.get_rng_state(), np.random.get_state(), random.getstate()))
        torch.set_rng_state(state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def dealt(batches: Iterable[Batch]) -> Iterator[tuple[Batch | None, bool]]:
    """Deals batches out: yields every batch of an epoch in its order, and whether it is this process's.

    A batch of another process may be ``None``: those of a ``DataLoader`` over a map-style dataset are not even loaded.
    """
    world, own = world_size(), rank()
    _refuse_divided(batches)
    if world > 1 and isinstance(batches, DataLoader) and _can_be_divided(batches):
        yield from _dealt_by_index(batches)
        return
    for number, batch in enumerate(batches):
        yield batch, number % world == own


def apart(batches: Iterable[Batch]) -> Iterable[Batch]:
    """Returns the same data for a look beside the loop: a loader with persistent workers has one iterator only."""
    if not isinstance(batches, DataLoader) or not batches.persistent_workers:
        return batches
    own = copy.copy(batches)
    vars(own).update(persistent_workers=False, _iterator=None)  # a loader refuses to be changed by assignment
    return own


def _refuse_divided(batches: Iterable[Batch]) -> None:
    """Refuses data of which every process has only a part already: it would be divided twice."""
    parts = getattr(getattr(batches, "sampler", None), "num_replicas", 1)
    if world_size() > 1 and parts > 1:
        raise ConfigError(
            f"The DataLoader has a sampler that divides the data among {parts} processes, expected the whole data in "
            "every process: batches are dealt out here. Use shuffle=True, or a sampler without parts."
        )


def _can_be_divided(loader: DataLoader[Batch]) -> bool:
    plain = type(loader).__iter__ is DataLoader.__iter__
    return plain and loader.batch_sampler is not None and not isinstance(loader.dataset, IterableDataset)


def _dealt_by_index(loader: DataLoader[Batch]) -> Iterator[tuple[Batch | None, bool]]:
    share = _Share(cast("Iterable[list[int]]", loader.batch_sampler))
    divided: DataLoader[Batch] = DataLoader(
        loader.dataset,
        batch_sampler=share,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )
    loaded = iter(divided)
    first = list(islice(loaded, 1))  # from here on the number of all batches is known
    for number in range(share.total):
        own = number % world_size() == rank()
        yield (first.pop() if first else next(loaded)) if own else None, own


class _Share:
    """The indices of this process's batches; it draws the whole epoch, as one process would."""

    def __init__(self, batch_sampler: Iterable[list[int]]) -> None:
        self.batch_sampler = batch_sampler
        self.total = 0

    def __iter__(self) -> Iterator[list[int]]:
        """Yields them."""
        indices = list(self.batch_sampler)
        self.total = len(indices)
        yield from indices[rank() :: world_size()]


def _state() -> PartialState:
    from accelerate import PartialState  # imported here: one process does not need it

    return PartialState(cpu=not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU") == "true")
