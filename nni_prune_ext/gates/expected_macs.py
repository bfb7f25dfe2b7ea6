"""What a gated network costs: multiply–accumulates per image, counted honestly and as the paper's code counts them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nni_prune_ext.graph.gate_places import GateFlow, LayerFlow


@dataclass(frozen=True)
class ExpectedMacs:
    """MACs per image over a set of images.

    Attributes:
        data: name of the set.
        images: how many.
        dense: MACs of the plain network that the shares refer to, without heads.
        mean: of the honest count, heads included.
        spread: standard deviation over the images.
        smallest: of any image.
        largest: of any image.
        heads: MACs of all heads, which are part of ``mean``.
        official: the count of the paper's code, for comparison with its tables.
        layers: layer → mean MACs, for every convolution and linear layer.
    """

    data: str
    images: int
    dense: int
    mean: float
    spread: float
    smallest: float
    largest: float
    heads: int
    official: float
    layers: Mapping[str, float]

    @property
    def share(self) -> float:
        """The honest mean as a share of the dense network."""
        return self.mean / self.dense

    @property
    def official_share(self) -> float:
        """The paper's count as a share of the dense network."""
        return self.official / self.dense

    def facts(self) -> dict[str, float]:
        """Returns the numbers worth a line in a report."""
        return {
            "expected_macs": self.mean,
            "expected_macs_share": self.share,
            "expected_macs_spread": self.spread,
            "official_macs_share": self.official_share,
            "head_macs_share": self.heads / self.dense,
        }


class MacCounter:
    """Adds up the MACs of a gated network, batch by batch."""

    def __init__(self, flow: GateFlow, *, dense: int, other: int = 0, heads: int = 0) -> None:
        """Takes the flow of the network, MACs per image of the dense one, of all else that multiplies, and of heads."""
        self.flow, self.dense, self.other, self.heads = flow, dense, other, heads
        self._honest: list[Tensor] = []
        self._official: list[Tensor] = []
        self._layers: dict[str, list[Tensor]] = {}

    def add(self, open_channels: Mapping[str, Tensor]) -> Tensor:
        """Counts one batch; returns the MACs of every image, ``(N,)`` float64.

        Args:
            open_channels: layer → which filters are open, ``(N, C)`` bool.
        """
        signals = self.flow.open_signals(open_channels)
        total = torch.full((len(signals),), float(self.other + self.heads), dtype=torch.float64, device=signals.device)
        for layer in self.flow.layers:
            own = _layer_macs(layer, signals)
            self._layers.setdefault(layer.layer, []).append(own)
            total += own
        self._honest.append(total.cpu())
        self._official.append(official_macs(self.flow, open_channels).cpu())
        return total

    def result(self, data: str) -> ExpectedMacs:
        """Returns what was counted so far."""
        honest, official = torch.cat(self._honest), torch.cat(self._official)
        return ExpectedMacs(
            data=data,
            images=len(honest),
            dense=self.dense,
            mean=float(honest.mean()),
            spread=float(honest.std(correction=0)),
            smallest=float(honest.min()),
            largest=float(honest.max()),
            heads=self.heads,
            official=float(official.mean()),
            layers={name: float(torch.cat(parts).mean()) for name, parts in self._layers.items()},
        )


def expected_macs(
    flow: GateFlow,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    data: str,
    dense: int,
    other: int = 0,
    heads: int = 0,
) -> ExpectedMacs:
    """Counts the MACs of a gated network over a set of images.

    An input channel counts if any of the gates that could silence it is open, so that what comes out of a residual
    addition is mostly dense; a depthwise filter counts if its input and its output are open. Heads, ungated layers and
    the classifier count in full. What happens to be zero without a gate counts, too: nothing knows beforehand.

    Args:
        batches: per batch, layer → which filters are open, ``(N, C)`` bool.
        data: name of the set of images.
        dense: MACs per image of the dense network.
        other: MACs per image of what is neither a convolution nor a linear layer.
        heads: MACs per image of all heads.
    """
    counter = MacCounter(flow, dense=dense, other=other, heads=heads)
    for open_channels in batches:
        counter.add(open_channels)
    return counter.result(data)


def official_macs(flow: GateFlow, open_channels: Mapping[str, Tensor]) -> Tensor:
    """Counts as the code of the paper does, ``(N,)``: not what an image needs, only for comparison with its tables.

    A layer is charged for its open filters times the open filters of the gate before it, also where a residual addition
    lies between them; the inputs per group are rounded down, so that depthwise layers cost nothing as soon as one
    channel is off; heads and the classifier are left out.
    """
    first = next(iter(open_channels.values()))
    total = torch.zeros(len(first), dtype=torch.float64, device=first.device)
    before: Tensor | None = None
    for layer in flow.layers:
        if layer.kernel == 1 and layer.positions == 1 and layer.layer not in open_channels:
            continue  # linear layers
        inputs = len(layer.reads)
        read = torch.full_like(total, inputs) if before is None or before.shape[1] != inputs else before.sum(1).double()
        own = open_channels.get(layer.layer)
        written = torch.full_like(total, len(layer.writes)) if own is None else own.sum(1).double()
        total += written * layer.positions * layer.kernel * (read / layer.groups).floor()
        before = own if own is not None else before
    return total


def _layer_macs(layer: LayerFlow, signals: Tensor) -> Tensor:
    """Returns the MACs of one layer for every image, ``(N,)`` float64."""
    reads, writes = (signals[:, torch.from_numpy(own).to(signals.device)] for own in (layer.reads, layer.writes))
    parts_in, parts_out = (own.reshape(len(own), layer.groups, -1).sum(2).double() for own in (reads, writes))
    return (parts_in * parts_out).sum(1) * (layer.positions * layer.kernel)
