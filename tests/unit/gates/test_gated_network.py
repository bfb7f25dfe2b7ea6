"""A gated network against a forward pass written by hand, its two losses, and the manners of its hooks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.errors import NniPruneExtError
from nni_prune_ext.gates.firing_targets import mass_targets
from nni_prune_ext.gates.gated_network import GatedNetwork, Gates
from nni_prune_ext.gates.placement import chosen_places, new_gates
from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.graph.gate_tracing import trace_gate_flow
from nni_prune_ext.plan import plan_from_channels
from nni_prune_ext.surgery import cut_channels
from nni_prune_ext.testing.method_bench import BenchNet, traces_on


class Net(nn.Module):
    """A stem, a residual branch, a depthwise pair, a classifier; small enough to be written down again by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.inner_norm = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.back, self.back_norm = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
        self.deep, self.head = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        y = functional.leaky_relu(self.inner_norm(self.inner(x)), 0.2)
        y = self.back_norm(self.back(y))
        y += x
        return self.head(torch.tanh(self.deep(functional.relu(y))).mean((2, 3)))


LAYERS = ("stem", "inner", "back", "deep")


def networks(*, detached: bool = True, lively: bool = True, units: dict[str, Tensor] | None = None) -> GatedNetwork:
    """Returns a network with random statistics and heads that decide per image."""
    torch.manual_seed(0)
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    flow = trace_gate_flow(model, images()[:1])
    gates = new_gates(chosen_places(flow), detached=detached, units=units)
    assert [place.layer for place in gates.places] == list(LAYERS)
    if lively:
        for head in gates.all_heads():
            nn.init.normal_(head.weight[:, :-1], 0, 4)
            nn.init.normal_(head.bias, 0, 1)
    return GatedNetwork(model, gates).eval()


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def mask_by_hand(network: GatedNetwork, layer: str, x: Tensor) -> Tensor:
    head = network.gates.head(layer)
    shares = x.amax((2, 3)).softmax(1)
    logits = shares @ head.weight[:, :-1].T + head.bias
    opened = logits > 0
    for row, own in zip(opened, logits):
        row[own.argmax()] = True
    return opened


def masked_by_hand(network: GatedNetwork, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The gated forward, masks behind the activation where there is one."""
    net, masks = network.model, {}

    def gate(layer: str, given: Tensor, out: Tensor) -> Tensor:
        masks[layer] = mask_by_hand(network, layer, given)
        return out * masks[layer][:, :, None, None]

    x = gate("stem", x, functional.relu(net.norm(net.stem(x))))
    y = gate("inner", x, functional.leaky_relu(net.inner_norm(net.inner(x)), 0.2))
    y = functional.relu(gate("back", y, net.back_norm(net.back(y))) + x)
    y = gate("deep", y, torch.tanh(net.deep(y)))
    return net.head(y.mean((2, 3))), masks


# -- forward -----------------------------------------------------------------------------------------------------------


def test_the_gated_network_is_the_masked_one_written_by_hand() -> None:
    network, x = networks(), images(32)

    with torch.no_grad():
        logits = network(x)
        expected, masks = masked_by_hand(network, x)

    assert torch.allclose(expected, logits, atol=1e-6)
    assert all(torch.equal(masks[layer], network.gates.opened[layer]) for layer in LAYERS)
    rates = torch.cat([own.float().mean(0) for own in masks.values()])
    assert 0.1 < float(rates.mean()) < 0.9, "some are open, some are closed"
    assert bool(((rates > 0) & (rates < 1)).any()), "and some vary"


def test_what_is_open_decides_image_by_image() -> None:
    network, x = networks(), images(6)

    with torch.no_grad():
        together, alone = network(x), torch.cat([network(x[k : k + 1]) for k in range(6)])

    assert torch.allclose(alone, together, atol=1e-6)


def test_heads_begin_with_a_network_that_computes_what_it_did() -> None:
    network, x = networks(lively=False), images()

    with torch.no_grad():
        assert torch.equal(network.model(x), network(x))


def test_open_masks_leave_the_network_as_it_is_and_need_no_heads() -> None:
    network, x = networks(), images()
    network.gates.masks = "open"

    with torch.no_grad():
        assert torch.equal(network.model(x), network(x))
    assert {} == network.gates.logits
    assert all(bool(own.all()) for own in network.gates.open_channels().values())


def test_targets_are_made_from_the_unswitched_output_of_the_switched_input() -> None:
    network, x = networks(), images()
    network.gates.targets, network.gates.masks = lambda heat: mass_targets(heat, 0.6), "targets"
    net = network.model

    with torch.no_grad():
        network(x)
        first = functional.relu(net.norm(net.stem(x)))
        wanted = mass_targets(first.amax((2, 3)), 0.6)
        second = functional.leaky_relu(net.inner_norm(net.inner(first * wanted[:, :, None, None])), 0.2)
        second_wanted = mass_targets(second.abs().amax((2, 3)), 0.6)
        third = net.back_norm(net.back(second * second_wanted[:, :, None, None])).abs().amax((2, 3))

    found = network.gates
    assert torch.equal(wanted, found.wanted["stem"])
    assert torch.equal(second_wanted, found.wanted["inner"])
    assert torch.allclose(third, found.heats["back"], atol=1e-6), "absolute values, no activation"
    assert all(torch.equal(found.wanted[layer], found.opened[layer]) for layer in LAYERS)
    assert not bool(wanted.all())


def test_a_closed_filter_can_be_wanted_again() -> None:
    network, x = networks(), images()
    network.gates.targets = torch.ones_like
    for head in network.gates.all_heads():
        nn.init.constant_(head.bias, -100.0)

    with torch.no_grad():
        network(x)

    assert [1] * 5 == network.gates.opened["stem"].sum(1).tolist()
    assert bool((network.gates.heats["stem"] > 0).float().mean() > 0.5), "heat is measured in front of the gate"


def test_a_block_is_switched_as_one() -> None:
    blocks = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    network = networks(units={"inner": blocks})

    with torch.no_grad():
        network(images(16))

    opened = network.gates.open_channels()["inner"]
    assert (16, 8) == tuple(opened.shape)
    assert (16, 4) == tuple(network.gates.opened["inner"].shape)
    assert torch.equal(opened[:, ::2], opened[:, 1::2])


def test_low_precision_runs_with_logits_in_full_precision() -> None:
    network, x = networks(), images()

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = network(x)

    assert torch.bfloat16 is logits.dtype
    assert bool(logits.isfinite().all())
    assert {torch.float32} == {own.dtype for own in network.gates.logits.values()}


def test_a_network_in_double_precision_keeps_its_heads() -> None:
    network, x = networks(), images(16)
    with torch.no_grad():
        expected = network(x)
        opened = dict(network.gates.opened)
        network.model.double()
        found = network(x.double())

    assert torch.allclose(expected.double(), found, atol=1e-4)
    assert sum(int((opened[layer] != network.gates.opened[layer]).sum()) for layer in LAYERS) <= 1


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detached", [True, False])
def test_the_task_loss_does_not_reach_the_heads(detached: bool) -> None:
    network = networks(detached=detached).train()

    network(images()).square().sum().backward()

    assert [None] * 8 == [parameter.grad for parameter in network.gates.parameters()]
    assert all(parameter.grad is not None for parameter in network.model.parameters())


def test_the_task_loss_reaches_open_filters_only() -> None:
    network = networks()
    for head in network.gates.all_heads():
        head.weight.detach().zero_()
    with torch.no_grad():
        network.gates.head("inner").bias.copy_(torch.tensor([1.0, -1, -1, 1, -1, -1, -1, -1]))

    network(images()).square().sum().backward()

    moved = network.model.inner.weight.grad.abs().sum((1, 2, 3)) > 0
    assert [True, False, False, True, False, False, False, False] == moved.tolist()


@pytest.mark.parametrize("detached", [True, False])
def test_only_a_joint_mask_loss_reaches_the_network(detached: bool) -> None:
    network = networks(detached=detached).train()
    network.gates.targets = lambda heat: mass_targets(heat, 0.6)

    network(images())
    network.gates.mask_loss().backward()

    reached = {
        name for name, own in network.model.named_parameters() if own.grad is not None and float(own.grad.abs().sum())
    }
    assert all(parameter.grad is not None for parameter in network.gates.parameters())
    if detached:
        assert set() == reached
    else:
        assert {"stem.weight", "inner.weight", "back.weight"} <= reached
        assert not any(name.startswith(("deep", "head")) for name in reached), "no head is behind these"


def test_the_mask_loss_sums_over_units_and_means_over_images_and_layers() -> None:
    network = networks()
    network.gates.targets = lambda heat: mass_targets(heat, 0.6)
    with torch.no_grad():
        network(images())

    total = 0.0
    for layer in LAYERS:
        logits, wanted = network.gates.logits[layer].double(), network.gates.wanted[layer]
        chance = torch.sigmoid(logits)
        total += float(-torch.where(wanted, chance.log(), (1 - chance).log()).sum(1).mean())

    assert pytest.approx(total / 4, rel=1e-5) == float(network.gates.mask_loss())


def test_steps_on_the_mask_loss_bring_heads_closer_to_their_targets() -> None:
    network = networks(lively=False)
    network.gates.targets = lambda heat: mass_targets(heat, 0.6)
    optimizer = torch.optim.SGD(network.gates.parameters(), 0.1, momentum=0.9)
    agreement = []
    for _ in range(60):
        optimizer.zero_grad()
        network(images())
        network.gates.mask_loss().backward()
        optimizer.step()
        agreement.append(float((network.gates.opened["stem"] == network.gates.wanted["stem"]).float().mean()))

    assert agreement[-1] > max(agreement[0], 0.7)


# -- manners -----------------------------------------------------------------------------------------------------------


def test_gates_are_on_the_network_only_while_it_runs() -> None:
    network, x = networks(), images()
    before = network.model(x)

    network(x)

    assert [] == traces_on(network.model)
    assert torch.equal(before, network.model(x))


def test_gates_come_off_when_the_network_raises() -> None:
    network = networks()

    with pytest.raises(RuntimeError):
        network(torch.randn(2, 5, 6, 6))
    with pytest.raises(ZeroDivisionError), network.gates.on(network.model):
        raise ZeroDivisionError
    assert [] == traces_on(network.model)


def test_gates_that_are_on_already_give_the_same_when_they_are_put_on_again() -> None:
    network, x = networks(), images()
    with torch.no_grad():
        expected = network(x)

        with network.gates.on(network.model):
            inside = network.model(x)
            nested = network(x)
            after = network.model(x)
        outside = network.model(x)

    assert torch.equal(expected, inside)
    assert torch.allclose(expected, nested, atol=1e-6), "a mask twice is a mask once"
    assert torch.equal(expected, after)
    assert not torch.equal(expected, outside)
    assert [] == traces_on(network.model)


def test_a_copy_after_a_forward_pass_with_gradients_is_the_same_network() -> None:
    network, x = networks(), images()
    network.gates.targets = torch.ones_like
    logits = network(x)

    for again in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert {} == again.gates.logits == again.gates.opened == again.gates.wanted == again.gates.heats
        assert torch.equal(logits, again(x))
        assert again.gates.head("stem").weight is not network.gates.head("stem").weight
    network.gates.mask_loss().backward()
    assert 4 == len(network.gates.logits), "the original keeps what it saw"


def test_a_state_dict_brings_the_heads_back() -> None:
    network, x = networks(), images()
    other = networks(lively=False)

    other.load_state_dict(network.state_dict())

    assert torch.equal(network(x), other(x))


def test_without_a_layer_all_its_filters_run() -> None:
    network, x = networks(), images()

    fewer = network.without(["inner", "deep"])

    with torch.no_grad():
        found = fewer(x)
        by_hand = copy.deepcopy(network)
        for layer in ("inner", "deep"):
            nn.init.constant_(by_hand.gates.head(layer).bias, 1000.0)
        expected = by_hand(x)
    assert ["stem", "back"] == [place.layer for place in fewer.gates.places]
    assert torch.allclose(expected, found, atol=1e-6)
    assert 4 == len(network.gates.places)
    assert fewer.model is not network.model
    with torch.no_grad():
        assert torch.equal(network.model(x), network.without(LAYERS)(x))


def test_without_keeps_the_rule_of_an_oracle() -> None:
    network, x = networks(), images()
    network.gates.targets, network.gates.masks = lambda heat: mass_targets(heat, 0.6), "targets"

    with torch.no_grad():
        network.without(["inner"])(x)


def test_masks_by_targets_without_a_rule_for_them_are_refused_in_words() -> None:
    network = networks()
    network.gates.masks = "targets"

    with pytest.raises(NniPruneExtError):
        network(images())


# -- cuts --------------------------------------------------------------------------------------------------------------


def after_cut(model: nn.Module, gates: Gates, removed: dict[str, list[int]], x: Tensor) -> GatedNetwork:
    groups = trace_channel_groups(model, x[:1])
    removal = cut_channels(model, plan_from_channels(groups, removed), x[:1], groups=groups)
    places = {place.layer: place for place in trace_gate_flow(removal.model, x[:1]).places}
    return GatedNetwork(removal.model, gates.follow(removal.kept, [places[own.layer] for own in gates.places]))


def close_always(gates: Gates, channels: dict[str, list[int]]) -> None:
    for layer, gone in channels.items():
        head = gates.head(layer)
        with torch.no_grad():
            head.weight[gone] = 0
            head.bias[gone] = -5.0


def test_gates_follow_a_cut_of_channels_that_are_never_open() -> None:
    network, x = networks(), images(16)
    close_always(network.gates, {"inner": [1, 4, 5]})

    compact = after_cut(network.model, network.gates, {"inner": [1, 4, 5]}, x).eval()

    with torch.no_grad():
        expected, found = network(x), compact(x)
    assert torch.allclose(expected, found, atol=1e-5)
    assert 3.0 == float(compact.gates.head("back").removed)
    assert 0.0 == float(compact.gates.head("stem").removed)
    assert 5 == compact.gates.head("inner").num_units


def test_gates_follow_a_cut_of_a_stream_and_its_depthwise_layer() -> None:
    network, x = networks(), images(16)
    gone = [0, 3]
    close_always(network.gates, {"stem": gone, "back": gone, "deep": gone})

    compact = after_cut(network.model, network.gates, {"stem": gone}, x).eval()

    with torch.no_grad():
        expected, found = network(x), compact(x)
    assert torch.allclose(expected, found, atol=1e-5)
    assert 4 == compact.gates.places[3].groups == compact.gates.places[3].inputs
    assert [2.0, 2.0] == [float(compact.gates.head(layer).removed) for layer in ("inner", "deep")]
    assert [0, 1, 2, 3] == compact.gates.head("deep").units.tolist()


def test_gates_follow_two_cuts() -> None:
    network, x = networks(), images(16)
    close_always(network.gates, {"inner": [1, 4, 5]})

    once = after_cut(network.model, network.gates, {"inner": [4]}, x)
    twice = after_cut(once.model, once.gates, {"inner": [1, 4]}, x).eval()  # 5 is the fourth now

    with torch.no_grad():
        assert torch.allclose(network(x), twice(x), atol=1e-5)
    assert 3.0 == float(twice.gates.head("back").removed)


def test_gates_follow_cuts_of_grouped_and_multiplying_depthwise_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=8), nn.ReLU(),
        nn.Conv2d(16, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    ).eval()  # fmt: skip
    x = images(8)
    places = chosen_places(trace_gate_flow(model, x[:1]), ["*"])
    assert [1, 8, 2, 4] == [place.groups for place in places]
    gates = new_gates(places)
    for head in gates.all_heads():
        nn.init.normal_(head.weight[:, :-1], 0, 4)
    groups = trace_channel_groups(model, x[:1])
    first, later = groups["0"], groups["4"]
    gone = {"0": [0, 1][: first.num_channels - 1], "4": [0]}
    silent = {
        member.tensor.removesuffix(".weight"): member.index[[c in gone[g.name] for c in member.channel]].tolist()
        for g in (first, later)
        for member in g.members
        if member.dim == 0 and member.tensor.endswith("weight")
    }
    close_always(gates, silent)
    network = GatedNetwork(model, gates)

    compact = after_cut(model, gates, gone, x)

    with torch.no_grad():
        assert torch.allclose(network(x), compact(x), atol=1e-5)


def test_gates_of_the_bench_follow_the_largest_cut() -> None:
    torch.manual_seed(0)
    model, x = BenchNet().eval(), torch.randn(8, 3, 8, 8)
    gates = new_gates(chosen_places(trace_gate_flow(model, x[:1])))
    groups = trace_channel_groups(model, x[:1])
    removed = {group.name: list(range(group.num_channels - 1)) for group in groups}

    compact = after_cut(model, gates, removed, x)

    assert bool(compact(x).isfinite().all())
    assert "predicted" == compact.gates.masks
