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
    with unchanged_globals(model):
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
def unchanged_globals(model: nn.Module) -> Iterator[None]:
    """Restores the random state of the model's devices, and runs attention as separate operations meanwhile."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=devices):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
