"""Blocks of filters that fire together, and the channels that can go because they reach nobody."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.gates.blocks import block_size, firing_together
from nni_prune_ext.gates.gated_network import GatedNetwork, Gates
from nni_prune_ext.gates.placement import chosen_places, new_gates
from nni_prune_ext.gates.static_core import ReachCounter, leak
from nni_prune_ext.graph.channel_groups import ChannelGroups, trace_channel_groups
from nni_prune_ext.graph.gate_tracing import trace_gate_flow
from nni_prune_ext.plan import plan_from_channels
from nni_prune_ext.surgery import cut_channels

# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "largest", "size"),
    [
        (64, 16, 16), (64, 8, 8), (63, 16, 1), (32, 16, 8), (32, 8, 8), (16, 16, 4), (16, 4, 4), (24, 16, 4),
        (24, 8, 4), (96, 16, 16), (12, 4, 1), (8, 16, 1), (1280, 16, 16), (40, 16, 8), (36, 8, 4), (64, 1, 1),
        (1, 16, 1), (60, 16, 4), (20, 16, 4),
    ],
)  # fmt: skip
def test_the_size_of_blocks_leaves_four_and_divides(channels: int, largest: int, size: int) -> None:
    assert size == block_size(channels, largest)


def test_filters_that_fire_for_the_same_images_share_a_block() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.rand(40, 4, generator=generator) < torch.tensor([0.9, 0.7, 0.5, 0.2])
    kind_of = torch.tensor([2, 0, 1, 3, 0, 0, 2, 1, 3, 3, 2, 1, 0, 1, 2, 3])

    blocks = firing_together(kinds[:, kind_of], 4)

    assert {kind: {0: 0, 1: 1, 2: 2, 3: 3}[kind] for kind in range(4)} == {
        int(kind): int(block) for kind, block in zip(kind_of, blocks)
    }, "the busiest first"
    assert 4 == len({(int(kind), int(block)) for kind, block in zip(kind_of, blocks)})


def together_by_hand(firing: list[list[bool]], size: int) -> list[int]:
    channels = len(firing[0])
    left, blocks = list(range(channels)), [-1] * channels
    for block in range(channels // size):
        first = max(left, key=lambda c: (sum(row[c] for row in firing), -c))
        others = [c for c in left if c != first]
        others.sort(key=lambda c: (-sum(row[c] == row[first] for row in firing), c))
        for member in [first, *others[: size - 1]]:
            blocks[member] = block
            left.remove(member)
    return blocks


@given(st.data(), st.integers(1, 5), st.sampled_from([1, 2, 4]), st.integers(1, 8))
def test_blocks_are_those_of_a_slow_loop_and_equal_in_size(
    data: st.DataObject, count: int, size: int, images: int
) -> None:
    rows = data.draw(
        st.lists(
            st.lists(st.booleans(), min_size=count * size, max_size=count * size), min_size=images, max_size=images
        )
    )

    blocks = firing_together(torch.tensor(rows), size).tolist()

    assert together_by_hand(rows, size) == blocks
    assert [size] * count == [blocks.count(block) for block in range(count)]


# -- static core -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A residual stream with a branch, a pointwise–depthwise pair, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.Conv2d(8, 6, 1),
        )
        self.point, self.deep, self.last = (
            nn.Conv2d(6, 10, 1),
            nn.Conv2d(10, 10, 3, padding=1, groups=10),
            nn.Conv2d(10, 8, 1),
        )
        self.norm, self.head = nn.BatchNorm2d(10), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        x = functional.relu(x + self.back(functional.relu(self.inner(x))))
        x = functional.relu(self.norm(self.deep(functional.relu(self.point(x)))))
        return self.head(functional.relu(self.last(x)).mean((2, 3)))


def images(count: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def gated(model: nn.Module, closed: dict[str, list[int]], *, patterns: list[str] | None = None) -> GatedNetwork:
    """Returns a network whose heads decide per image; some filters are closed for all, every other one fires."""
    torch.manual_seed(1)
    network = GatedNetwork(model, new_gates(chosen_places(trace_gate_flow(model, images(1)), patterns))).eval()
    for place, head in zip(network.gates.places, network.gates.all_heads()):
        gone = closed.get(place.layer, [])
        with torch.no_grad():
            head.weight[:, :-1].normal_(0, 3)
            head.bias.uniform_(0.2, 1.2)
            head.weight[gone], head.bias[gone] = 0.0, -100.0
            network(images())
            never = ~network.gates.open_channels()[place.layer].any(0)
            never[gone] = False
            head.bias[never] = 50.0
    return network


def net() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    nn.init.normal_(model.norm.running_mean, 0, 0.5)
    nn.init.normal_(model.norm.bias, 1, 0.5)
    return model


def rates_of(network: GatedNetwork, x: Tensor) -> tuple[ChannelGroups, dict[str, Tensor]]:
    groups = trace_channel_groups(network.model, x[:1])
    counter = ReachCounter(groups, trace_gate_flow(network.model, x[:1]))
    with torch.no_grad():
        for part in x.split(5):
            network(part)
            counter.add(network.gates.open_channels())
    assert len(x) == counter.images
    return groups, counter.rates()


def silent(rates: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: torch.nonzero(rate == 0).flatten().tolist() for name, rate in rates.items()}


def without(network: GatedNetwork, gone: dict[str, list[int]], x: Tensor) -> GatedNetwork:
    groups = trace_channel_groups(network.model, x[:1])
    removal = cut_channels(network.model, plan_from_channels(groups, gone), x[:1], groups=groups)
    places = {place.layer: place for place in trace_gate_flow(removal.model, x[:1]).places}
    gates: Gates = network.gates.follow(removal.kept, [places[own.layer] for own in network.gates.places])
    return GatedNetwork(removal.model, gates).eval()


def test_a_rate_is_how_often_a_channel_reaches_a_reader() -> None:
    network, x = gated(net(), {}), images()

    _, rates = rates_of(network, x)
    with torch.no_grad():
        network(x)
    opened = network.gates.open_channels()

    assert torch.allclose(opened["inner"].float().mean(0), rates["inner"])
    stream = opened["stem"] | opened["back"]
    read = (opened["stem"].float().mean(0), stream.float().mean(0))
    assert all(bool((own <= rates["stem"] + 1e-6).all()) for own in read)
    assert torch.allclose(stream.float().mean(0), rates["stem"])
    assert bool((opened["deep"].float().mean(0) <= rates["point"] + 1e-6).all()), "its next reader is behind that gate"
    assert torch.allclose(opened["last"].float().mean(0), rates["last"])


CLOSED = {"inner": [2, 5], "stem": [1, 4], "back": [1, 3], "point": [0, 7, 8], "deep": [0], "last": [3]}
SILENT = {"inner": [2, 5], "stem": [1], "point": [0], "last": [3]}


def test_a_stream_channel_is_silent_only_if_all_its_writers_are_and_a_depthwise_one_only_if_its_own_gate_is() -> None:
    _, rates = rates_of(gated(net(), CLOSED), images())

    assert SILENT == silent(rates)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_removing_what_reaches_nobody_changes_nothing_for_any_input_without_leak(
    dtype: torch.dtype, tolerance: float
) -> None:
    network, x = gated(net(), CLOSED), images()
    _, rates = rates_of(network, x)
    network.to(dtype)

    compact = without(network, silent(rates), x.to(dtype))

    unseen = torch.cat([images(32, seed=7), 20 * images(16, seed=8), torch.zeros(1, 3, 6, 6)]).to(dtype)
    with torch.no_grad():
        expected, found = network(unseen), compact(unseen)
    for whole, cut in ((network.model, compact.model), (network.gates, compact.gates)):
        assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in whole.parameters())
    assert float((expected - found).abs().max() / expected.abs().max()) < tolerance


def test_removing_a_depthwise_channel_whose_input_fires_changes_nothing_either() -> None:
    network, x = gated(net(), {"deep": [6]}), images()
    _, rates = rates_of(network, x)
    gone = {name: own for name, own in silent(rates).items() if own}

    compact = without(network, gone, x) if gone else copy.deepcopy(network)

    with torch.no_grad():
        expected, found = network(x), compact(x)
    assert torch.allclose(expected, found, atol=1e-5), "the head of the depthwise layer reads its input, too"


def test_removing_a_depthwise_channel_whose_input_alone_is_dead_would_change_the_network() -> None:
    network, x = gated(net(), {"point": [7]}), images()
    _, rates = rates_of(network, x)

    compact = without(network, {"point": [7]}, x)

    assert 7 not in silent(rates)["point"]
    with torch.no_grad():
        assert not torch.allclose(network(x), compact(x), atol=1e-3), "a norm makes something of its zeros"


def test_an_input_that_leaks_gets_other_logits_and_the_leak_says_how_much() -> None:
    model = net()
    network = gated(model, {"inner": [2]})
    head = network.gates.head("inner")
    x = images()
    with torch.no_grad():  # filter 5 opens where channel 0 of the stem is far larger than all others
        head.weight[5] = 0
        head.weight[5, 0], head.bias[5] = 10.0, -9.5
        network.gates.head("stem").bias[0] = 50.0
        model.stem.bias[0] = 0.0
    _, rates = rates_of(network, x)
    gone = {"inner": [2, 5]}
    assert gone["inner"] == silent(rates)["inner"]
    leaking = 60 * model.stem.weight[0].detach().flip(0)[None, :, :1, :1].expand(1, 3, 6, 6).clone()
    with torch.no_grad():
        probe = torch.cat([60 * images(200, seed=5), leaking])
        network(probe)
        fires = network.gates.open_channels()["inner"][:, 5]
    assert 0 < int(fires.sum()) < 201

    compact = without(network, gone, x)

    with torch.no_grad():
        apart = (network(probe) - compact(probe)).abs().amax(1)
        scale = float(network(probe).abs().max())
    assert float(apart[~fires].max()) < 1e-5 * scale
    assert float(apart[fires].max()) > 1e-3
    _, unseen = rates_of(network, probe)
    removed = {"inner": torch.tensor([k in gone["inner"] for k in range(8)])}
    assert pytest.approx(float(fires.float().mean()) / 2) == leak(unseen, removed)
    assert 0.0 == leak(rates, removed)


def test_nothing_removed_leaks_nothing() -> None:
    rates = {"a": torch.tensor([0.5, 1.0]), "b": torch.tensor([0.25])}

    assert 0.0 == leak(rates, {})
    assert 0.0 == leak(rates, {"a": torch.tensor([False, False])})
    assert 0.375 == leak(rates, {"a": torch.tensor([True, False]), "b": torch.tensor([True])})


def test_ungated_readers_and_writers_reach() -> None:
    network, x = gated(net(), {"inner": [2]}, patterns=["inner"]), images()

    _, rates = rates_of(network, x)

    assert {"inner": [2], "stem": [], "point": [], "last": []} == silent(rates)
    assert all(bool((rates[name] == 1).all()) for name in ("stem", "point", "last"))


def test_a_reader_that_is_not_followed_is_always_reached() -> None:
    torch.manual_seed(0)
    upwards = nn.ConvTranspose2d(8, 4, 2, stride=2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), upwards, nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()

    _, rates = rates_of(gated(model, {"0": [2, 3]}, patterns=["0"]), images())

    assert [1.0] * 8 == rates["0"].tolist()


class SharedReader(nn.Module):
    """One layer that reads two others in turn, as the head of a detector reads its levels."""

    def __init__(self, order: tuple[int, int]) -> None:
        super().__init__()
        self.levels = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)])
        self.tower, self.last, self.order = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4), order

    def forward(self, x: Tensor) -> Tensor:
        read = [self.tower(functional.relu(self.levels[k](x))) for k in self.order]
        return self.last(functional.relu(read[0]).mean((2, 3)) + functional.relu(read[1]).amax((2, 3)))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_channel_reaches_a_layer_that_is_called_twice_through_either_call(order: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network, x = gated(SharedReader(order), {"levels.1": [2, 3], "levels.0": [3]}), images()

    _, rates = rates_of(network, x)

    (tied,) = [name for name in rates if name.startswith("levels")]
    assert [3] == silent(rates)[tied], "channel 2 is open in the other level"


class AroundItsNorm(nn.Module):
    """A stem that is read in front of the first norm as well, as networks of pre-activations do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.inner = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.last, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.inner(functional.relu(self.norm(x)))
        return self.head(functional.relu(self.last(x)).mean((2, 3)))


def test_a_stem_that_goes_around_its_gate_reaches_its_readers() -> None:
    torch.manual_seed(0)
    network, x = gated(AroundItsNorm().eval(), {"stem": [2], "inner": [2, 3]}), images()
    _, rates = rates_of(network, x)
    gone = {name: own for name, own in silent(rates).items() if own}

    compact = without(network, gone, x) if gone else copy.deepcopy(network)

    with torch.no_grad():
        assert torch.allclose(network(x), compact(x), atol=1e-5)
