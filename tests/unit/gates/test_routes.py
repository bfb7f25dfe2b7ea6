"""Images grouped by what fires for them, and the rule that names an image's group from the first heads."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.gates.gated_network import GatedNetwork
from nni_prune_ext.gates.placement import chosen_places, new_gates
from nni_prune_ext.gates.route_rule import learn_rule, skill
from nni_prune_ext.gates.routes import Routes, find_routes, fired_filters, head_logits
from nni_prune_ext.graph.gate_tracing import trace_gate_flow

EXAMPLE = torch.zeros(1, 3, 6, 6)


def gated(*, units: dict[str, Tensor] | None = None) -> GatedNetwork:
    """Returns a network of two gated layers whose heads read which input channel is brightest."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 9, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 4),
    ).eval()  # fmt: skip
    network = GatedNetwork(
        model, new_gates(chosen_places(trace_gate_flow(model, EXAMPLE)), softmax=False, units=units)
    ).eval()
    for head in network.gates.all_heads():
        nn.init.normal_(head.weight, 0, 3)
        nn.init.normal_(head.bias, 0, 0.5)
    return network


def kinds(counts: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns images of several kinds, each with a bright channel of its own, and their kinds."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    kind = kind[torch.randperm(len(kind), generator=generator)]
    images = 0.02 * torch.randn(len(kind), 3, 6, 6, generator=generator)
    images[torch.arange(len(kind)), kind] += 1.0
    return images, kind


def varied(count: int, seed: int) -> Tensor:
    """Returns images of one colour each."""
    return torch.randn(count, 3, 1, 1, generator=torch.Generator().manual_seed(seed)).expand(-1, -1, 6, 6).clone()


def spread(points: Tensor, weights: Tensor, groups: Tensor) -> float:
    total = 0.0
    for group in groups.unique():
        own = points[groups == group]
        total += float((((own - own.mean(0)) ** 2) * weights).sum())
    return total


def points_of(network: GatedNetwork, images: Tensor, found: Routes) -> tuple[Tensor, Tensor]:
    fired = fired_filters(network, head_logits(network, images))
    weights = torch.cat([torch.full((own.shape[1],), found.weights[layer]) for layer, own in fired.items()])
    return torch.cat(list(fired.values()), 1).float(), weights


# -- finding -----------------------------------------------------------------------------------------------------------


def test_images_of_one_kind_take_one_route_and_the_most_frequent_route_is_the_first() -> None:
    network, (images, kind) = gated(), kinds((10, 40, 25))

    found = find_routes(network, EXAMPLE, images)

    named = found.assign(fired_filters(network, head_logits(network, images)))
    assert torch.equal(torch.tensor([2, 0, 1])[kind], named)
    assert [pytest.approx(40 / 75), pytest.approx(25 / 75), pytest.approx(10 / 75)] == [r.share for r in found.routes]
    assert [0, 1, 2] == [own.index for own in found.routes]


def test_the_grouping_is_the_best_of_all_groupings() -> None:
    network, images = gated(), varied(9, seed=3)

    found = find_routes(network, EXAMPLE, images, routes=2)

    points, weights = points_of(network, images, found)
    named = found.assign(fired_filters(network, head_logits(network, images)))
    every = (torch.tensor((0, *rest)) for rest in itertools.product((0, 1), repeat=8))
    assert pytest.approx(min(spread(points, weights, own) for own in every)) == spread(points, weights, named)
    assert spread(points, weights, named) > 0


def test_a_filter_weighs_what_it_multiplies() -> None:
    network = gated()

    found = find_routes(network, EXAMPLE, kinds((4, 4))[0], routes=2)

    first, second = 36 * 9 * 3 * 6, 36 * 9 * 6 * 9
    assert pytest.approx(first / 6 / (first + second)) == found.weights["0"]
    assert pytest.approx(second / 9 / (first + second)) == found.weights["2"]


@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
def test_a_filter_stays_open_if_it_fires_often_enough_in_its_route(keep: float) -> None:
    network = gated()
    images = varied(40, seed=1)

    found = find_routes(network, EXAMPLE, images, routes=2, keep=keep)

    fired = fired_filters(network, head_logits(network, images))
    named = found.assign(fired)
    for route in found.routes:
        for layer, opened in route.opened.items():
            rate = fired[layer][named == route.index].float().mean(0)
            assert torch.allclose(rate, route.centre[layer])
            expected = rate >= keep
            expected[rate.argmax()] = True
            assert torch.equal(expected, opened)


def test_a_layer_never_closes_altogether() -> None:
    network = gated()
    with torch.no_grad():  # every image opens one filter of the last layer, and hardly two the same
        network.gates.head("2").weight.normal_(0, 0.1)
        network.gates.head("2").bias.fill_(-5.0)
    images = varied(40, seed=1)

    found = find_routes(network, EXAMPLE, images, routes=1, keep=1.0)

    (route,) = found.routes
    assert float(route.centre["2"].max()) < 1
    assert [int(route.centre["2"].argmax())] == torch.nonzero(route.opened["2"]).flatten().tolist()


def test_images_that_fire_alike_make_fewer_routes() -> None:
    network, images = gated(), kinds((6, 6))[0]

    found = find_routes(network, EXAMPLE, torch.cat([images] * 2), routes=5)

    distinct = len({tuple(own.tolist()) for own in points_of(network, images, found)[0]})
    assert distinct >= len(found.routes) >= 2
    assert pytest.approx(1.0) == sum(own.share for own in found.routes)
    assert all(own.share > 0 for own in found.routes)


def test_one_seed_gives_one_answer_and_the_global_generator_is_left_alone() -> None:
    network, images = gated(), varied(60, seed=1)
    state = torch.get_rng_state()

    one, other = (find_routes(network, EXAMPLE, images, routes=4, seed=3) for _ in range(2))

    for first, second in zip(one.routes, other.routes, strict=True):
        assert all(torch.equal(own, second.centre[layer]) for layer, own in first.centre.items())
    assert torch.equal(state, torch.get_rng_state())
    assert {} == network.gates.logits


def test_filters_of_a_unit_fire_together() -> None:
    units = {"0": torch.tensor([1, 0, 0, 2, 1, 2])}
    network, images = gated(units=units), kinds((8, 8))[0]

    fired = fired_filters(network, head_logits(network, images))

    with torch.no_grad():
        network(images)
    assert all(torch.equal(own, network.gates.open_channels()[layer]) for layer, own in fired.items())
    assert torch.equal(fired["0"][:, 0], fired["0"][:, 4])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"routes": 0}, "number of routes is 0, expected 1 or more"),
        ({"keep": 0.0}, "stays open is 0.0, expected more than 0"),
        ({"keep": 1.5}, "stays open is 1.5, expected more than 0"),
        ({"routes": 9}, "9 routes are to be found on 8 images"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find_routes(gated(), EXAMPLE, kinds((4, 4))[0], **options)


def test_gates_that_follow_something_else_are_refused() -> None:
    network = gated()
    network.gates.masks = "open"

    with pytest.raises(ConfigError, match="follow 'open', expected 'predicted'"):
        find_routes(network, EXAMPLE, kinds((4, 4))[0])


def test_a_network_without_gates_is_refused() -> None:
    with pytest.raises(ConfigError, match="no gate left"):
        find_routes(gated().without(["0", "2"]), EXAMPLE, kinds((4, 4))[0])


# -- the rule ----------------------------------------------------------------------------------------------------------


def noise(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_a_rule_reads_as_few_layers_as_tell_the_routes() -> None:
    right = torch.arange(3).repeat(100)
    telling = nn.functional.one_hot(right, 3).float() + 0.1 * noise(300, 3, 0)
    logits = {"a": noise(300, 5, 1), "b": torch.ones(300, 2), "c": 5 + 0.01 * telling, "d": telling}

    rule = learn_rule(logits, right, [0.0, 0.1, 0.2, 0.3])

    assert ("a", "b", "c") == rule.layers
    unseen = {name: torch.roll(own, 3, 0) + 0.001 * noise(300, own.shape[1], 9) for name, own in logits.items()}
    assert float((rule.assign(unseen) == right).float().mean()) > 0.98


def test_a_rule_reads_nothing_that_costs_too_much() -> None:
    right = torch.arange(2).repeat(50)
    logits = {"a": noise(100, 3, 0), "b": noise(100, 3, 1), "c": right[:, None].float()}

    assert ("a", "b") >= learn_rule(logits, right, [0.1, 0.2, 0.26]).layers
    assert ("a", "b", "c") == learn_rule(logits, right, [0.1, 0.2, 0.25]).layers
    assert ("a",) == learn_rule(logits, right, [0.9, 0.95, 1.0]).layers, "the first one may always be read"


def test_how_much_a_rule_reads_is_not_decided_on_what_it_has_learnt_by_heart() -> None:
    telling = noise(60, 1, 0)
    right = (telling + noise(60, 1, 5) > 0).long().flatten()

    assert ("a",) == learn_rule({"a": telling, "b": noise(60, 400, 1)}, right, [0.0, 0.0]).layers


def test_a_rule_is_ridge_regression() -> None:
    right = torch.randint(3, (40,), generator=torch.Generator().manual_seed(0))
    logits = {"a": 3 + noise(40, 4, 1) * torch.tensor([1.0, 10.0, 0.1, 0.0])}

    rule = learn_rule(logits, right, [0.0])

    read = logits["a"].double()[:, :3]
    read = (read - read.mean(0)) / read.std(0, correction=0)
    wanted = nn.functional.one_hot(right, 3).double()
    by_hand = torch.linalg.inv(read.T @ read + 0.4 * torch.eye(3).double()) @ read.T @ (wanted - wanted.mean(0))
    expected = read @ by_hand + wanted.mean(0)
    assert torch.allclose(expected.float(), logits["a"] @ rule.weight + rule.bias, atol=1e-4)


@pytest.mark.parametrize(
    ("agreement", "most_frequent", "expected"), [(1.0, 0.4, 1.0), (0.4, 0.4, 0.0), (0.7, 0.4, 0.5), (1.0, 1.0, 0.0)]
)
def test_skill_is_measured_from_the_most_frequent_route(
    agreement: float, most_frequent: float, expected: float
) -> None:
    assert pytest.approx(expected) == skill(agreement, most_frequent)
