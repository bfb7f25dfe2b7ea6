"""What gating would save, against a loop over single images of a network written down by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from nni_prune_ext.costs import count_costs
from nni_prune_ext.errors import ConfigError
from nni_prune_ext.gates import GatedNetwork, estimate_gating, measure_gating, solve_mass
from nni_prune_ext.gates.blocks import firing_together
from nni_prune_ext.gates.placement import chosen_places, new_gates
from nni_prune_ext.graph.gate_tracing import trace_gate_flow
from nni_prune_ext.testing.method_bench import BenchNet, modes_of, traces_on

EXAMPLE = torch.zeros(1, 3, 6, 6)
GRID = (0.2, 0.5, 0.8, 0.95)


class Tiny(nn.Module):
    """Two gated convolutions and a classifier, statistics at random."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)
        nn.init.normal_(self.norm.running_mean, 0, 0.3)
        nn.init.uniform_(self.norm.running_var, 0.3, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.one(x)))
        return self.head(torch.relu(self.two(x)).amax((2, 3)))


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny().eval()


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 3, 6, 6, generator=generator), torch.randint(4, (4,), generator=generator))
        for _ in range(count)
    ]


def wanted(maps: Tensor, mass: float) -> list[int]:
    """The filters of one image that hold the mass, one after the other."""
    heat = [float(own.abs().max()) for own in maps]
    if not sum(heat):
        return list(range(len(heat)))
    chosen: list[int] = []
    for place in sorted(range(len(heat)), key=lambda k: (-heat[k], k)):
        if chosen and sum(heat[k] for k in chosen) + heat[place] > (mass + 1e-5) * sum(heat):
            break
        chosen.append(place)
    return chosen


def macs_by_hand(model: Tiny, mass: float, *, applied: bool) -> list[int]:
    """MACs of every image, heads included: 3→8 and 8→6."""
    result = []
    for images, _ in batches():
        for image in images:
            first = torch.relu(model.norm(model.one(image[None])))[0]
            one = wanted(first, mass)
            if applied:
                first = first * torch.tensor([k in one for k in range(8)])[:, None, None]
            two = wanted(torch.relu(model.two(first[None]))[0], mass)
            result.append(36 * 9 * (3 * len(one) + len(one) * len(two)) + 4 * len(two) + 8 * 3 + 6 * 8)
    return result


DENSE = 36 * 9 * (3 * 8 + 8 * 6) + 4 * 6


@torch.no_grad()
@pytest.mark.parametrize("applied", [False, True])
def test_estimates_are_those_of_a_slow_loop(applied: bool) -> None:
    model = tiny()

    found = estimate_gating(model, EXAMPLE, batches(), masses=GRID)

    assert list(GRID) == [own.mass for own in found]
    for own in found:
        each = macs_by_hand(model, own.mass, applied=applied)
        macs = own.closed_loop if applied else own.open_loop
        assert macs is not None
        assert (DENSE, 12, 8 * 3 + 6 * 8) == (macs.dense, macs.images, macs.heads)
        assert pytest.approx(sum(each) / 12) == macs.mean
        assert (min(each), max(each)) == (macs.smallest, macs.largest)
        assert pytest.approx(float(torch.tensor(each).double().std(correction=0))) == macs.spread
    if applied:
        assert any(own.closed_loop.mean != own.open_loop.mean for own in found if own.closed_loop is not None)


class Wide(Tiny):
    """The same with sixteen filters per layer: four blocks of four."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3)
        self.head = nn.Linear(16, 4)


def wide() -> Wide:
    torch.manual_seed(0)
    return Wide().eval()


def opened(maps: Tensor, blocks: Tensor, mass: float) -> Tensor:
    """Which filters of one image are open if blocks are switched, ``(C,)``, one block after the other."""
    heat = torch.stack([maps[blocks == k].abs().amax((1, 2)).sum() for k in range(int(blocks.max()) + 1)])
    chosen = wanted(heat[:, None, None], mass)
    return torch.tensor([int(block) in chosen for block in blocks])


def block_macs_by_hand(model: Wide, mass: float, size: int) -> list[int]:
    """MACs of every image with blocks by their firing at this mass and targets applied: 4 × 4 and 2 × 2 pixels."""
    images = torch.cat([own for own, _ in batches()])
    first = torch.relu(model.norm(model.one(images)))
    second = torch.relu(model.two(first))
    blocks = [
        firing_together(torch.tensor([[k in wanted(own, mass) for k in range(16)] for own in maps]), size)
        for maps in (first, second)
    ]
    result = []
    for own in first:
        one = opened(own, blocks[0], mass)
        two = opened(torch.relu(model.two((own * one[:, None, None])[None]))[0], blocks[1], mass)
        n, m, units = int(one.sum()), int(two.sum()), 16 // size
        result.append(9 * (16 * 3 * n + 4 * n * m) + 4 * m + 3 * units + 16 * units)
    return result


@torch.no_grad()
def test_estimates_with_blocks_are_those_of_a_slow_loop() -> None:
    model = wide()

    found = estimate_gating(model, EXAMPLE, batches(), masses=GRID, block=4)
    single = estimate_gating(model, EXAMPLE, batches(), masses=GRID)

    for own, alone in zip(found, single):
        each = block_macs_by_hand(model, own.mass, 4)
        assert own.closed_loop is not None
        assert alone.closed_loop is not None
        assert pytest.approx(sum(each) / 12) == own.closed_loop.mean
        assert (min(each), max(each)) == (own.closed_loop.smallest, own.closed_loop.largest)
        assert (3 + 16) * 4 == own.closed_loop.heads == own.open_loop.heads
        assert alone.closed_loop.mean != own.closed_loop.mean
    assert any(own.closed_loop.mean != own.open_loop.mean for own in found if own.closed_loop is not None)


def test_a_mass_for_blocks_brings_their_macs_to_the_share() -> None:
    model = wide()

    mass = solve_mass(model, EXAMPLE, batches(), 0.5, block=4)

    assert mass != solve_mass(model, EXAMPLE, batches(), 0.5)
    (found,) = estimate_gating(model, EXAMPLE, batches(), masses=[mass], block=4)
    assert found.closed_loop is not None
    assert 0.5 == pytest.approx(found.closed_loop.share, abs=0.1), "blocks by this mass, not by that of single filters"


@pytest.mark.parametrize("block", [0, 2, 32])
def test_other_blocks_are_refused(block: int) -> None:
    with pytest.raises(ConfigError, match=f"The block is {block}, expected one of 1, 4, 8, 16"):
        estimate_gating(tiny(), EXAMPLE, batches(), block=block)
    with pytest.raises(ConfigError, match=f"The block is {block}"):
        solve_mass(tiny(), EXAMPLE, batches(), 0.5, block=block)


def test_more_mass_costs_more() -> None:
    shares = [own.open_loop.share for own in estimate_gating(tiny(), EXAMPLE, batches(), closed_loop=False)]

    assert all(before <= after for before, after in pairwise(shares))
    assert shares[0] < shares[-1]


def test_uniform_estimates_drop_the_same_share_everywhere() -> None:
    (found,) = estimate_gating(tiny(), EXAMPLE, batches(), masses=(0.5,), uniform=True, closed_loop=False)

    most = 36 * 9 * (3 * 4 + 4 * 3) + 4 * 3 + 8 * 3 + 6 * 8
    assert most == found.open_loop.largest
    assert found.closed_loop is None
    assert found.accuracy is None


def test_the_metric_sees_the_oracle_network() -> None:
    model, seen = tiny(), []

    def evaluate(network: nn.Module) -> float:
        assert isinstance(network, GatedNetwork)
        assert not network.training
        logits = network(batches(1)[0][0])
        seen.append((logits, network.gates.open_channels()["one"]))
        return float(len(seen))

    found = estimate_gating(model, EXAMPLE, batches(), masses=(0.3, 1.0), evaluate=evaluate)

    assert [1.0, 2.0] == [own.accuracy for own in found]
    images = batches(1)[0][0]
    first = torch.relu(model.norm(model.one(images)))
    expected = [[k in wanted(maps, 0.3) for k in range(8)] for maps in first]
    assert expected == seen[0][1].tolist()
    assert torch.allclose(model(images), seen[1][0], atol=1e-5), "with the whole mass nothing is lost"
    assert not torch.allclose(model(images), seen[0][0], atol=1e-2)


def test_a_run_of_ones_own_is_called_once_for_every_batch_and_pass() -> None:
    model, calls = tiny(), []

    def run(network: nn.Module, batch: tuple[Tensor, Tensor]) -> object:
        calls.append(batch)
        return network(batch[0])

    estimate_gating(model, EXAMPLE, batches(), masses=(0.5, 0.9), run=run)

    assert 3 + 2 * 3 == len(calls), "one open pass, two closed ones"


@pytest.mark.parametrize("batch", [batches(1)[0], batches(1)[0][0], [batches(1)[0][0], None]])
def test_batches_are_images_or_images_with_something(batch: object) -> None:
    (found,) = estimate_gating(tiny(), EXAMPLE, [batch], masses=(0.9,), data="some")

    assert 4 == found.open_loop.images
    assert "some" == found.open_loop.data


# -- the mass for a share ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.45, 0.6])
def test_the_mass_solved_for_is_the_largest_that_stays_below_the_share(share: float) -> None:
    model = tiny()

    mass = solve_mass(model, EXAMPLE, batches(), share)

    at, above = (
        estimate_gating(model, EXAMPLE, batches(), masses=(own,))[0].closed_loop for own in (mass, mass + 1 / 1024)
    )
    assert at is not None
    assert above is not None
    assert at.share <= share < above.share
    assert mass * 1024 == int(mass * 1024)


def test_the_mass_for_less_is_smaller() -> None:
    masses = [solve_mass(tiny(), EXAMPLE, batches(), share) for share in (0.25, 0.4, 0.6)]

    assert masses == sorted(masses)
    assert 3 == len(set(masses))


@pytest.mark.parametrize("share", [0.01, 1.5])
def test_a_share_that_no_mass_reaches_is_refused_with_what_is_possible(share: float) -> None:
    model = tiny()
    least = estimate_gating(model, EXAMPLE, batches(), masses=(0.0,))[0].closed_loop
    most = estimate_gating(model, EXAMPLE, batches(), masses=(1.0,))[0].closed_loop
    assert least is not None
    assert most is not None

    with pytest.raises(ConfigError) as caught:
        solve_mass(model, EXAMPLE, batches(), share)

    for number in (share, least.share, most.share):
        assert f"{number:.3g}" in str(caught.value)


# -- errors and manners ------------------------------------------------------------------------------------------------


def test_no_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="no batch"):
        estimate_gating(tiny(), EXAMPLE, [])
    with pytest.raises(ConfigError, match="no batch"):
        solve_mass(tiny(), EXAMPLE, iter([]), 0.5)


@pytest.mark.parametrize(("mass", "uniform"), [(-0.1, False), (1.01, False), (1.0, True), (float("nan"), False)])
def test_a_mass_out_of_range_is_refused(mass: float, uniform: bool) -> None:
    with pytest.raises(ConfigError, match="expected 0–1"):
        estimate_gating(tiny(), EXAMPLE, batches(), masses=(0.5, mass), uniform=uniform)


def test_a_network_without_a_place_and_an_unknown_layer_are_refused() -> None:
    with pytest.raises(ConfigError, match="no usual place"):
        estimate_gating(nn.Sequential(nn.Flatten(), nn.Linear(108, 4)), EXAMPLE, batches())
    with pytest.raises(ConfigError, match="'three'.*one, two"):
        estimate_gating(tiny(), EXAMPLE, batches(), layers=["one", "three"])


def test_named_layers_alone_are_gated() -> None:
    (found,) = estimate_gating(tiny(), EXAMPLE, batches(), masses=(0.3,), layers=["tw*"])

    assert 6 * 8 == found.open_loop.heads
    assert 36 * 9 * 3 * 8 == found.open_loop.layers["one"]


class Sometimes(nn.Module):
    """Runs its second convolution for some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.skip = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), False

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        x = x if self.skip else torch.relu(self.two(x))
        return x.mean((2, 3)).sum(1, keepdim=True) * torch.ones(4)


@pytest.mark.parametrize("skipped", [(True, True), (False, True)], ids=["never", "not again"])
def test_a_gated_layer_that_does_not_run_on_a_batch_is_refused(skipped: tuple[bool, bool]) -> None:
    model, turns = Sometimes(), iter(skipped * 3)

    def run(network: nn.Module, batch: tuple[Tensor, Tensor]) -> object:
        network.skip = next(turns)
        return network(batch[0])

    with pytest.raises(ConfigError, match="'two' did not run"):
        estimate_gating(model, EXAMPLE, batches(2), masses=(0.5,), run=run)


def test_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = BenchNet().train()
    model.stem.eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = modes_of(model)
    data = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(2)]

    estimate_gating(model, data[0][:1], data, masses=(0.5, 0.9), evaluate=lambda network: float(network(data[0]).sum()))

    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert modes == modes_of(model)
    assert [] == traces_on(model)


def test_an_estimate_costs_nobody_random_numbers() -> None:
    model, random_state = tiny(), torch.get_rng_state()

    estimate_gating(model, EXAMPLE, batches(), masses=(0.5,))

    assert torch.equal(random_state, torch.get_rng_state())


def test_the_model_is_left_as_it_was_when_the_run_raises() -> None:
    model = BenchNet().train()

    def run(network: nn.Module, batch: tuple[Tensor, Tensor]) -> object:
        network(torch.randn(4, 3, 8, 8))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        estimate_gating(model, torch.zeros(1, 3, 8, 8), batches(1), run=run)

    assert [] == traces_on(model)
    assert model.training
    assert torch.equal(torch.zeros(12), model.stem[1].running_mean)


def test_a_gated_network_is_measured_with_its_own_heads() -> None:
    model = tiny()
    gates = new_gates(chosen_places(trace_gate_flow(model, EXAMPLE)))
    with torch.no_grad():
        gates.head("one").bias[:5] = -9.0
        gates.head("two").bias[2:] = -9.0
    gates.masks = "open"

    macs, firing = measure_gating(GatedNetwork(model, gates), EXAMPLE, batches())

    assert 36 * 9 * (3 * 3 + 3 * 2) + 4 * 2 + 8 * 3 + 6 * 8 == macs.mean == macs.largest
    assert count_costs(model, EXAMPLE).macs == macs.dense == DENSE
    assert [0.0] * 5 + [1.0] * 3 == firing["one"].rate.tolist()
    assert (4, 2, 0) == (firing["two"].never, firing["two"].always, firing["two"].varying)
    assert "open" == gates.masks
