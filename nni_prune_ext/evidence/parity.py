"""How far the outputs of a runtime are from those of PyTorch in float32 on the CPU, over all images."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import numpy as np
from torch import nn

from nni_prune_ext.evidence.results import OutputParity
from nni_prune_ext.runtimes.base import Array, RunnableModel
from nni_prune_ext.runtimes.torch_eager import TorchEager


def reference_outputs(module: nn.Module, batches: Iterable[Array]) -> list[list[Array]]:
    """Returns the outputs of a module for every batch, in float32 on the CPU; the module stays as and where it is."""
    source = RunnableModel(module=copy.deepcopy(module).cpu())
    with TorchEager().session(source, threads=None) as session:
        return [session.run([images]) for images in batches]


class ParityCount:
    """Adds up differences batch by batch."""

    def __init__(self) -> None:
        self._max_rel = self._sum_rel = 0.0
        self._values = self._images = self._agreeing = 0
        self._classes = True

    def add(self, expected: Sequence[Array], actual: Sequence[Array]) -> None:
        """Compares the outputs of one batch, one array per output; images are counted along the first dimension.

        Outputs of other number or shape, and values that are not finite, count as infinitely far.
        """
        if len(expected) != len(actual) or any(a.shape != b.shape for a, b in zip(expected, actual)):
            self._max_rel = math.inf
            return
        for one, other in zip(expected, actual):
            self._add_output(np.asarray(one, np.float64), np.asarray(other, np.float64))
        first, found = expected[0], actual[0]
        self._images += first.shape[0] if first.ndim else 1
        self._classes = self._classes and first.ndim == 2 and first.shape[1] > 1
        if self._classes:
            self._agreeing += int((first.argmax(axis=1) == found.argmax(axis=1)).sum())

    def _add_output(self, expected: Array, actual: Array) -> None:
        difference = np.abs(np.asarray(expected, np.float64) - np.asarray(actual, np.float64))
        if not difference.size:
            return
        scale = float(np.abs(np.asarray(expected, np.float64)).max()) or 1.0
        largest = float(difference.max()) / scale
        self._max_rel = max(self._max_rel, largest if math.isfinite(largest) else math.inf)
        self._sum_rel += float(difference.sum()) / scale
        self._values += difference.size

    def result(self) -> OutputParity | None:
        """Returns what was found; ``None`` if nothing was compared."""
        if not self._values and self._max_rel == 0:
            return None
        mean = self._sum_rel / self._values if math.isfinite(self._max_rel) else math.inf
        agreement = self._agreeing / self._images if self._classes and self._images else None
        return OutputParity(self._max_rel, mean, agreement, self._images)
