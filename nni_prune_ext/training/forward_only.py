"""What forward passes alone can do: measure accuracy and repair batch-norm statistics."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from accelerate.utils import send_to_device
from torch import nn

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.methods.base import Batch
from nni_prune_ext.training.method_run import seeded
from nni_prune_ext.training.settings import Batches


def recalibrate_batchnorm(
    model: nn.Module,
    batches: Batches,
    *,
    count: int = 100,
    forward: Callable[[nn.Module, Batch], object] | None = None,
    seed: int = 0,
) -> None:
    """Re-estimates running statistics of all batch norms as the plain average over ``count`` batches, in place.

    Channels were removed, so means and variances behind them have moved; this repairs them without training.

    Args:
        forward: how the model is called on a batch, for example the user's loss; by default on the batch, or on its
            first item.
        seed: of the order where the data draws from a global generator; these are left as they are.

    Raises:
        ConfigError: there is no batch. Whatever is raised, the statistics are as before.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    device = next(norms[0].buffers()).device
    momenta = [norm.momentum for norm in norms]
    before = [copy.deepcopy(norm.state_dict()) for norm in norms]
    seen, whole = 0, False
    with modes_kept(model):
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        try:
            with torch.no_grad(), seeded(model, seed):
                for batch in islice(batches, count):
                    (forward or _call_on_inputs)(model, send_to_device(batch, device))
                    seen += 1
            whole = seen > 0
        finally:
            for norm, momentum, buffers in zip(norms, momenta, before):
                norm.momentum = momentum
                if not whole:
                    norm.load_state_dict(buffers)
    if not seen:
        raise ConfigError("The data for batch-norm recalibration gave no batch, expected at least one. Check the data.")


def accuracy(model: nn.Module, batches: Batches) -> float:
    """Returns top-1 accuracy (0–1) over ``(images, labels)`` batches in evaluation mode; NaN without a batch."""
    right = total = 0
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    with modes_kept(model), torch.no_grad():
        model.eval()
        for given in batches:
            images, labels = send_to_device(given, device)
            right += int((model(images).argmax(1) == labels).sum())
            total += len(labels)
    return right / total if total else math.nan


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Puts the training modes of all modules back afterwards."""
    training = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def _call_on_inputs(model: nn.Module, batch: Batch) -> object:
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)
