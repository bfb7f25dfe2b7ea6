"""A stopwatch whose times are a known function of widths, and a network for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import pytest
import torch
from torch import nn

from nni_prune_ext.graph.channel_groups import ChannelGroups, trace_channel_groups
from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.latency import LatencyConditions, start
from nni_prune_ext.latency.layers import find_layers
from nni_prune_ext.latency.stopwatch import LayerAt, NetworkTimes


class FakeStopwatch:
    """Times grow in steps of ``liked`` channels; a network takes more than the sum of its layers."""

    liked: ClassVar[int] = 4
    shipped: ClassVar[float] = 1.0
    """By how much the last measurement of a compact network differs from the earlier ones."""
    made: ClassVar[list[FakeStopwatch]] = []

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs, conditions: LatencyConditions) -> None:
        self.model, self.inputs, self.conditions = model, example_inputs, conditions
        self.measured = self.from_cache = 0
        self.timed: list[str] = []
        FakeStopwatch.made.append(self)

    def layers_ms(self, layers: Iterable[LayerAt]) -> dict[LayerAt, float]:
        times = {at: self._layer(*at) for at in layers}
        self.measured += len(times)
        return times

    def networks(self, networks: Mapping[str, nn.Module], *, as_shipped: bool = False) -> NetworkTimes:
        self.timed += list(networks)
        dense, factor = self.whole(self.model), self.shipped if as_shipped else 1.0
        shares = {name: factor * self.whole(network) / dense for name, network in networks.items()}
        return NetworkTimes(dense, shares, 0.004, "cpu", 30)

    def whole(self, network: nn.Module) -> float:
        """Milliseconds of a network: its layers, slower together than alone; activations; a fixed part."""
        tensors, total = dict(network.named_parameters()), 0.2
        for layer in find_layers(network, self.inputs):
            read, written = layer.widths(tensors[layer.weight].shape)
            total += 1.3 * self._layer(layer, read, written) + 4e-4 * written
        return total

    def _layer(self, layer: object, read: int, written: int) -> float:
        read, written = (-(-width // self.liked) * self.liked for width in (read, written))
        return 0.002 + read * written / 40_000


class Chain(nn.Module):
    """Four convolutions, two of them added up, and a linear layer; 3 × 8 × 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.second = nn.Conv2d(64, 96, 3, padding=1)
        self.third = nn.Conv2d(96, 96, 3, padding=1)
        self.fourth = nn.Conv2d(96, 128, 3, stride=2, padding=1)
        self.last = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu()).relu()
        x = self.fourth((x + self.third(x)).relu()).relu()
        return self.last(x.mean((2, 3)))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeStopwatch]:
    """Everything is timed by the fake stopwatch."""
    monkeypatch.setattr(start, "Stopwatch", FakeStopwatch)
    monkeypatch.setattr(FakeStopwatch, "made", [])
    return FakeStopwatch


@pytest.fixture(scope="session")
def network() -> nn.Module:
    torch.default_generator.manual_seed(0)
    return Chain().eval()


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    return torch.ones(1, 3, 8, 8)


@pytest.fixture(scope="session")
def groups(network: nn.Module, images: torch.Tensor) -> ChannelGroups:
    return trace_channel_groups(network, images)
