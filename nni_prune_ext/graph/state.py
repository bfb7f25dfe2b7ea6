"""Leaving no trace: a model looked at is the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Puts the model in evaluation mode; at the end modes, buffers, random state and global switches are as before."""
    training = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, key, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for key, buffer in module._buffers.items()
    ]
    with unchanged_globals():
        model.eval()
        try:
            yield
        finally:
            for module, mode in training:
                module.training = mode
            with torch.no_grad():
                for module, key, buffer, value in buffers:
                    module._buffers[key] = buffer
                    if buffer is not None and value is not None and not torch.equal(buffer, value):
                        buffer.copy_(value)


@contextmanager
def unchanged_globals() -> Iterator[None]:
    """Restores random state and default dtype, and runs attention as separate operations meanwhile."""
    devices = range(torch.cuda.device_count() if _cuda_in_use() else 0)
    fastpath, dtype = torch.backends.mha.get_fastpath_enabled(), torch.get_default_dtype()
    with torch.random.fork_rng(devices=devices):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            torch.set_default_dtype(dtype)


def seed_generators(seed: int) -> None:
    """Seeds the default generators; ``torch.manual_seed`` would also seed a CUDA that is not in use yet, later."""
    torch.default_generator.manual_seed(seed)
    if _cuda_in_use():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(seed)


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
