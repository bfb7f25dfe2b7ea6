"""Batch-norm statistics measured anew while batches run forward, however the loop sets modes."""

from __future__ import annotations

from functools import partial

from torch import nn

from nni_prune_ext.methods.base import MethodContext


class NormMeasurement:
    """Lets every batch norm that trains average over all batches of a phase, from nothing.

    Norms that are kept in evaluation mode, by the user or by a host's loop, stay as they are.

    Attributes:
        measured: the norms that have begun: to be saved and restored.
    """

    def __init__(self) -> None:
        self.measured: set[str] = set()

    def attach(self, context: MethodContext) -> None:
        """Puts it onto the model until the phase is left."""
        for name, norm in context.model.named_modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
                context.on_leave(partial(setattr, norm, "momentum", norm.momentum))
                if name in self.measured:
                    norm.momentum = None
                context.on_leave(norm.register_forward_pre_hook(partial(self._begin, name)).remove)

    def _begin(self, name: str, norm: nn.modules.batchnorm._BatchNorm, args: object) -> None:
        if norm.training and name not in self.measured:
            norm.reset_running_stats()
            norm.momentum = None
            self.measured.add(name)
