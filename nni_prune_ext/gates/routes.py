"""Routes through a gated network: images grouped by the filters that fire for them, one fixed mask per group.

Images are points, one coordinate per filter, 1 where it fires; k-means groups them. A filter weighs as much as the
multiplications that it stands for, so that small layers with many filters do not decide alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.gates.gated_network import GatedNetwork
from nni_prune_ext.gates.heads import open_units
from nni_prune_ext.graph.gate_tracing import trace_gate_flow
from nni_prune_ext.graph.state import untouched
from nni_prune_ext.inputs import ExampleInputs

_BATCH = 64
_STARTS = 8
"""How often k-means begins anew; the closest grouping counts."""
_ROUNDS = 100


@dataclass(frozen=True)
class Route:
    """One group of images and the filters that stay open for it.

    Attributes:
        index: its number; the most frequent route is 0.
        opened: layer → which filters are open, ``(C,)`` bool.
        share: of the images that the routes were found on, 0–1.
        centre: layer → how often each filter fires for these images, ``(C,)`` float32, 0–1.
    """

    index: int
    opened: Mapping[str, Tensor]
    share: float
    centre: Mapping[str, Tensor]


@dataclass(frozen=True)
class Routes:
    """All routes of a network, and the rule that gives an image its route: the nearest centre.

    Attributes:
        routes: most frequent first.
        weights: layer → what one filter counts in a distance; over all filters they sum to 1.
    """

    routes: tuple[Route, ...]
    weights: Mapping[str, float]

    def assign(self, fired: Mapping[str, Tensor]) -> Tensor:
        """Returns the route of every image, ``(N,)`` int64, from layer → which filters fire, ``(N, C)`` bool."""
        points = torch.cat([fired[name] for name in self.weights], 1).float()
        centres = torch.stack([torch.cat([own.centre[name] for name in self.weights]) for own in self.routes])
        return _nearest(points, centres, _per_filter(fired, self.weights))


def head_logits(network: GatedNetwork, images: Tensor) -> dict[str, Tensor]:
    """Returns layer → what its head says, ``(N, U)`` float32 on the CPU, for images ``(N, C, H, W)``."""
    parts: dict[str, list[Tensor]] = {place.layer: [] for place in network.gates.places}
    device = next(network.parameters()).device
    with untouched(network), torch.no_grad():
        for part in images.split(_BATCH):  # type: ignore[no-untyped-call]
            network(part.to(device))
            for layer, own in network.gates.logits.items():
                parts[layer].append(own.detach().cpu())
    network.gates.forget()
    return {layer: torch.cat(own) for layer, own in parts.items()}


def fired_filters(network: GatedNetwork, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns layer → which filters fire, ``(N, C)`` bool, where its head says this."""
    return {layer: open_units(own)[:, network.gates.head(layer).units.cpu()] for layer, own in logits.items()}


def find_routes(
    network: GatedNetwork,
    example_inputs: ExampleInputs,
    images: Tensor,
    *,
    routes: int = 3,
    keep: float = 0.5,
    seed: int = 0,
) -> Routes:
    """Groups images by the filters that fire for them; the network is left as it was.

    Args:
        images: ``(N, C, H, W)``, some hundred; they should take no part in judging the result.
        routes: how many groups; fewer are found where images fire alike. One is the plain static sub-network.
        keep: a filter stays open in a route if it fires for this share of its images, 0–1; one per layer always does.
        seed: of the first centres.

    Raises:
        ConfigError: there is no gate, too few images, or a number out of range.
    """
    check_routes(routes, keep)
    if not network.gates.places:
        raise ConfigError("The network has no gate left, expected one at least. Export it as a plain network.")
    if network.gates.masks != "predicted":
        raise ConfigError(
            f"The gates of the network follow '{network.gates.masks}', expected 'predicted': routes are those of the "
            'heads. Set network.gates.masks = "predicted".'
        )
    if len(images) < routes:
        raise ConfigError(
            f"{routes} routes are to be found on {len(images)} images, expected some hundred images. Pass more, or ask "
            "for fewer routes."
        )
    fired = fired_filters(network, head_logits(network, images))
    flow = trace_gate_flow(network.model, example_inputs)
    total = sum(flow.layer(name).macs for name in fired)
    weights = {name: flow.layer(name).macs / own.shape[1] / total for name, own in fired.items()}
    points = torch.cat(list(fired.values()), 1).float()
    groups = _grouped(points, _per_filter(fired, weights), routes, torch.Generator().manual_seed(seed))
    counts = groups.bincount()
    found = []
    for index, place in enumerate(counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]):
        centre = {name: own[groups == place].float().mean(0) for name, own in fired.items()}
        opened = {name: _opened(rate, keep) for name, rate in centre.items()}
        found.append(Route(index, opened, float(counts[place]) / len(images), centre))
    return Routes(tuple(found), weights)


def check_routes(routes: int, keep: float) -> None:
    """Refuses numbers out of range.

    Raises:
        ConfigError: there would be no route, or no filter to keep.
    """
    if routes < 1:
        raise ConfigError(f"The number of routes is {routes}, expected 1 or more. 3 is the usual number.")
    if not 0 < keep <= 1:
        raise ConfigError(
            f"The firing rate from which a filter stays open is {keep}, expected more than 0 and at most 1. 0.5 keeps "
            "what fires for every second image of a route."
        )


def _opened(rate: Tensor, keep: float) -> Tensor:
    opened = rate >= keep
    opened[rate.argmax()] = True
    return opened


def _per_filter(fired: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    return torch.cat([torch.full((fired[name].shape[1],), weight) for name, weight in weights.items()])


def _nearest(points: Tensor, centres: Tensor, weights: Tensor) -> Tensor:
    """Returns the number of the nearest centre, ``(N,)``: |x - c|² without |x|², which is the same for all centres.

    Args:
        points: ``(N, D)``.
        centres: ``(K, D)``.
        weights: of the coordinates, ``(D,)``.
    """
    return (2 * points @ (weights * centres).T - (weights * centres**2).sum(1)).argmax(1)


def _grouped(points: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Returns the group of every point, ``(N,)``: the best of several runs of k-means."""
    best, smallest = torch.zeros(len(points), dtype=torch.int64), float("inf")
    for _ in range(_STARTS):
        centres = _first_centres(points, weights, count, generator)
        groups = _nearest(points, centres, weights)
        for _ in range(_ROUNDS):
            centres = torch.stack(
                [points[groups == k].mean(0) if bool((groups == k).any()) else own for k, own in enumerate(centres)]
            )
            before, groups = groups, _nearest(points, centres, weights)
            if torch.equal(before, groups):
                break
        spread = float(((points - centres[groups]) ** 2 @ weights).sum())
        if spread < smallest:
            best, smallest = groups, spread
    return best


def _first_centres(points: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws points far from each other (k-means++); fewer than asked for if there are no others."""
    drawn = [points[int(torch.randint(len(points), (), generator=generator))]]
    while len(drawn) < count:
        away = torch.stack([(points - own) ** 2 @ weights for own in drawn]).amin(0)
        if not bool((away > 0).any()):
            break
        drawn.append(points[int(torch.multinomial(away, 1, generator=generator))])
    return torch.stack(drawn)
