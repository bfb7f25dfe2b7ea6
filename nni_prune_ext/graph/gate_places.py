"""Where per-input gates can sit in a network, and what every layer reads from them: pure data.

Every channel of every activation has a *signal*: it is zero for an image if that signal is closed for this image.
Behind a gate a channel carries the gate's signal; additions make signals that are closed only if all of their parts
are; what does not keep zeros (a second norm, a sigmoid, a shift) makes channels that are always open. So the
multiplications that an image really needs can be counted, and channels found that never reach anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Signals = NDArray[np.int64]
"""One signal per channel, ``(C,)``; 0 is always open."""

ACTIVATIONS: Mapping[str, Callable[..., Tensor]] = {
    "relu": functional.relu,
    "relu6": functional.relu6,
    "hardtanh": functional.hardtanh,
    "leaky_relu": functional.leaky_relu,
    "silu": functional.silu,
    "hardswish": functional.hardswish,
    "gelu": functional.gelu,
    "elu": functional.elu,
    "selu": functional.selu,
    "celu": functional.celu,
    "mish": functional.mish,
    "tanh": torch.tanh,
}
"""Functions with f(0) = 0: a gate in front of them is the same as one behind them."""


@dataclass(frozen=True)
class Activation:
    """An activation as the network calls it.

    Attributes:
        name: a key of ``ACTIVATIONS``.
        settings: its keyword arguments.
    """

    name: str
    settings: tuple[tuple[str, object], ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the activation of a tensor, as a new tensor."""
        return ACTIVATIONS[self.name](x, **dict(self.settings))


@dataclass(frozen=True)
class GatePlace:
    """A convolution whose filters can be switched per image.

    Attributes:
        layer: its module; a head reads what it reads.
        point: the module whose output ``(N, C, H, W)`` is switched: the norm behind it, or the convolution itself.
        inputs: channels that it reads.
        channels: its filters.
        groups: of the convolution.
        activation: what follows the point directly, if it keeps zeros.
        unsuitable: why it is not gated unless it is named; empty for the usual places.
        alone: whether nobody reads what the convolution writes in front of the point.
    """

    layer: str
    point: str
    inputs: int
    channels: int
    groups: int
    activation: Activation | None
    unsuitable: str = ""
    alone: bool = True


@dataclass(frozen=True)
class LayerFlow:
    """What one call of a convolution or linear layer reads and writes.

    Attributes:
        layer: its module.
        reads: signal of every channel that it reads, ``(C_in,)``.
        writes: signal of every channel that it writes, ``(C_out,)``.
        positions: how often its weight is applied per image.
        kernel: weights per filter and input channel.
        groups: of the convolution.
    """

    layer: str
    reads: Signals
    writes: Signals
    positions: int
    kernel: int
    groups: int = 1

    @property
    def macs(self) -> int:
        """Counts multiply–accumulates per image with everything open."""
        return self.positions * self.kernel * len(self.writes) * (len(self.reads) // self.groups)


@dataclass(frozen=True)
class GateFlow:
    """All layers and places of one network; pure data.

    Attributes:
        layers: in forward order.
        places: where gates can sit, in forward order.
        unions: a signal, and the two of which one must be open for it to be open; in the order in which they arise.
        num_signals: signals are numbered below this.
    """

    layers: tuple[LayerFlow, ...]
    places: tuple[GatePlace, ...]
    unions: tuple[tuple[Signals, Signals, Signals], ...] = ()
    num_signals: int = 1

    @property
    def usual(self) -> tuple[GatePlace, ...]:
        """Returns the places that are gated unless somebody says otherwise."""
        return tuple(place for place in self.places if not place.unsuitable)

    def layer(self, name: str) -> LayerFlow:
        """Returns the flow of a layer that is called once."""
        return next(own for own in self.layers if own.layer == name)

    def open_signals(self, open_channels: Mapping[str, Tensor]) -> Tensor:
        """Returns for every image which signals are open, ``(N, num_signals)`` bool.

        Args:
            open_channels: layer → ``(N, C)`` bool, for gated layers.
        """
        first = next(iter(open_channels.values()))
        result = torch.ones(len(first), self.num_signals, dtype=torch.bool, device=first.device)
        for name, own in open_channels.items():
            result[:, torch.from_numpy(self.layer(name).writes).to(first.device)] = own
        for made, one, other in self.unions:
            places = [torch.from_numpy(part).to(first.device) for part in (made, one, other)]
            result[:, places[0]] = result[:, places[1]] | result[:, places[2]]
        return result
