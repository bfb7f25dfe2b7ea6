"""How well heads predict their targets."""

from __future__ import annotations

import torch
from torch import Tensor

from nni_prune_ext.gates.gated_network import Gates


class PredictionCounter:
    """Adds up hits and misses of all heads together, batch by batch."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def add(self, gates: Gates) -> None:
        """Counts the last forward pass, in which targets were made."""
        rows = [
            torch.stack([(own & wanted).sum(), own.sum(), wanted.sum()])
            for own, wanted in ((gates.opened[layer], gates.wanted[layer]) for layer in gates.wanted)
        ]
        counts = torch.stack(rows).sum(0)
        self._counts = counts if self._counts is None else self._counts + counts

    def result(self) -> dict[str, float]:
        """Returns precision (open units that were wanted) and recall (wanted units that were open), 0–1."""
        if self._counts is None:
            return {}
        both, opened, wanted = (float(count) for count in self._counts)
        return {"head_precision": both / max(opened, 1), "head_recall": both / max(wanted, 1)}
