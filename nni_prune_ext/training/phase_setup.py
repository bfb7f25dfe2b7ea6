"""What surrounds the steps of a phase: modes, trainable parameters, memory format, and the word for no memory left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from nni_prune_ext.errors import TrainingError
from nni_prune_ext.inputs import map_tensors, tensors_in
from nni_prune_ext.methods.base import Batch, Phase
from nni_prune_ext.training.method_run import MethodRun


@contextmanager
def prepared(run: MethodRun, phase: Phase) -> Iterator[None]:
    """Sets modes, trainable parameters and memory format; restores them on the model that is current at the end.

    Batch norms that the user has frozen (in evaluation mode, no parameter trainable) stay in evaluation mode. A host
    that trains sets modes itself.
    """
    modes = {name: module.training for name, module in run.model.named_modules()}
    required = {name: parameter.requires_grad for name, parameter in run.model.named_parameters()}
    frozen = [module for module in run.model.modules() if _is_frozen_norm(module)]
    formatted = run.settings.channels_last and bool(phase.epochs)
    formatted = formatted and all(p.is_contiguous() for p in run.model.parameters())
    try:
        for name, parameter in run.model.named_parameters():
            parameter.requires_grad_(phase.trainable(name) if phase.trainable is not None else required[name])
        if phase.epochs and run.host_epoch is None:
            run.model.train()
            for module in frozen:
                module.eval()
        if formatted:
            _format(run.model, torch.channels_last)
        yield
    finally:
        run.default_optimizer, run.optimizers, run.attached = None, [], None
        for name, module in run.model.named_modules():
            module.training = modes.get(name, module.training)
        for name, parameter in run.model.named_parameters():
            parameter.requires_grad_(required.get(name, parameter.requires_grad))
            parameter.grad = None
        if formatted:
            _format(run.model, torch.contiguous_format)
        run.leave()


@contextmanager
def memory_explained(batches: Sequence[Batch]) -> Iterator[None]:
    """Turns running out of memory into an error that says which batch was tried."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(word in str(error) for word in ("can't allocate memory", "STATUS_ALLOC_FAILED")):
            raise
        raise TrainingError(
            f"Memory ran out on a batch of {_described(batches[-1]) if batches else 'another process'}. Expected it to "
            "fit. Halve the batch size and double accumulation_steps: the gradients stay the same."
        ) from error


def channels_last(batch: Batch) -> Batch:
    """Returns a batch whose images ``(N, C, H, W)``, at any depth, are in channels-last memory format."""
    return map_tensors(batch, lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)


def _format(model: nn.Module, layout: torch.memory_format) -> None:
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)


def _is_frozen_norm(module: nn.Module) -> bool:
    if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.training:
        return False
    own = list(module.parameters())
    return bool(own) and not any(parameter.requires_grad for parameter in own)


def _described(batch: Batch) -> str:
    shapes = [tuple(item.shape) for item in tensors_in(batch) if item.dim()]
    if not shapes:
        return f"type {type(batch).__name__}"
    return f"size {shapes[0][0]}, shapes {', '.join(map(str, shapes))}"
