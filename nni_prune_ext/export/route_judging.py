"""Judges routes on images that found none: MACs and accuracy of every way to run them, and how good the router is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from nni_prune_ext.costs import count_costs
from nni_prune_ext.errors import ConfigError, ParityError
from nni_prune_ext.export.gated_parity import run_graph
from nni_prune_ext.export.route_router import OUTPUT, graph_macs
from nni_prune_ext.export.routes_folder import ROUTER, IndexedRoute, IndexedRouter, Routing
from nni_prune_ext.gates.estimates import measure_gating
from nni_prune_ext.gates.gated_network import GatedNetwork
from nni_prune_ext.gates.route_rule import RouteRule, skill
from nni_prune_ext.gates.routes import Route, Routes, fired_filters, head_logits
from nni_prune_ext.graph.state import untouched
from nni_prune_ext.inputs import ExampleInputs, tensors_in

GATED, BY_MASKS, BY_ROUTER = "gated network", "routes by full masks", "routes by the router"
FIRST_FOR_ALL, ONE = "route 0 for all", "one sub-network"
"""Ways to run images. Full masks are what a perfect router would see; the one sub-network is made without routes."""
_SAME_ROUTE = 0.99
"""Share of the images for which the written router must name the route that PyTorch names."""
_HARDLY = 0.2
_LOSS = 0.02
_BATCH = 64


class RouteJudge:
    """Measures routes, one after the other, then the router, then all ways to run images."""

    def __init__(
        self,
        network: GatedNetwork,
        example_inputs: ExampleInputs,
        routes: Routes,
        images: Tensor,
        labels: Tensor | None,
    ) -> None:
        self._network, self._example = network, example_inputs
        self._parts: Sequence[Tensor] = images.split(_BATCH)  # type: ignore[no-untyped-call]
        self._labels = None if labels is None else labels.cpu()
        self._logits = head_logits(network, images)
        self._right = routes.assign(fired_filters(network, self._logits))
        self._named: Tensor | None = None
        self._router_macs = 0
        self._dense = self._macs(network.model)

    def route(self, route: Route, model: nn.Module) -> IndexedRoute:
        """Describes one route."""
        own, hits, macs = self._right == route.index, self._hits(model), self._macs(model)
        return IndexedRoute(
            file=f"route-{route.index}.onnx",
            share=route.share,
            macs=macs,
            macs_share=macs / self._dense,
            images=int(own.sum()),
            accuracy=None if hits is None or not bool(own.any()) else float(hits[own].float().mean()),
            firing_rate={layer: float(rate.mean()) for layer, rate in route.centre.items()},
            centre={layer: tuple(round(value, 4) for value in rate.tolist()) for layer, rate in route.centre.items()},
        )

    def router(self, graph: onnx.ModelProto, rule: RouteRule) -> IndexedRouter:
        """Runs the router and describes it.

        Raises:
            ExportError: it does not run.
            ParityError: it names other routes than PyTorch.
        """
        fixed = graph.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value")
        parts = [image for part in self._parts for image in (part.split(1) if fixed else (part,))]  # type: ignore[no-untyped-call]
        named = torch.from_numpy(np.asarray(run_graph(graph, [part.cpu().numpy() for part in parts])[OUTPUT]))
        expected = rule.assign(self._logits)
        same = float((named == expected).float().mean())
        if same < _SAME_ROUTE:
            raise ParityError(
                f"The router names the route that PyTorch names for {same:.1%} of {len(named)} images, expected "
                f"{_SAME_ROUTE:.0%} or more. The files were not kept. Leave the router out, and report this network."
            )
        self._named, self._router_macs = named, graph_macs(graph)
        return IndexedRouter(
            file=ROUTER,
            layers=rule.layers,
            macs=self._router_macs,
            macs_share=self._router_macs / self._dense,
            agreement=float((named == self._right).float().mean()),
            most_frequent=float(self._right.bincount().max()) / len(named),
        )

    def routings(self, networks: Sequence[nn.Module], single: nn.Module) -> dict[str, Routing]:
        """Returns name → what each way to run images costs, and how accurate it is.

        Args:
            networks: of the routes.
            single: the sub-network that is made without routes.
        """
        macs = torch.tensor([float(self._macs(own)) for own in networks])
        hits = [self._hits(own) for own in networks]

        def routed(named: Tensor, extra: int = 0) -> Routing:
            chosen = None
            if self._labels is not None:
                every = torch.stack([own for own in hits if own is not None])
                chosen = every[named, torch.arange(len(named))]
            return self._routing(float(macs[named].mean()) + extra, chosen)

        gated = measure_gating(self._network, self._example, self._parts)[0]
        result = {GATED: self._routing(gated.mean, self._hits(self._network)), BY_MASKS: routed(self._right)}
        if self._named is not None:
            result[BY_ROUTER] = routed(self._named, self._router_macs)
        result[FIRST_FOR_ALL] = routed(torch.zeros_like(self._right))
        result[ONE] = self._routing(self._macs(single), self._hits(single))
        return result

    def _routing(self, macs: float, hits: Tensor | None) -> Routing:
        return Routing(macs_share=macs / self._dense, accuracy=None if hits is None else float(hits.float().mean()))

    def _macs(self, model: nn.Module) -> int:
        return count_costs(model, self._example).macs

    def _hits(self, model: nn.Module) -> Tensor | None:
        """Returns for which images the largest score is that of the label, ``(N,)`` bool; ``None`` without labels."""
        if self._labels is None:
            return None
        device = next(model.parameters()).device
        with untouched(model), torch.no_grad():
            scores = torch.cat([next(tensors_in(model(part.to(device)))) for part in self._parts])
        if scores.dim() != 2:
            raise ConfigError(
                f"There are labels, but the network's first output has shape {tuple(scores.shape)}, expected class "
                "scores (N, classes). Leave labels out."
            )
        return scores.argmax(1).cpu() == self._labels


def remarks(
    asked: int, routes: Sequence[IndexedRoute], router: IndexedRouter | None, routings: Mapping[str, Routing]
) -> Iterator[str]:
    """Yields what one should know before using the routes.

    Args:
        asked: how many routes were asked for.
    """
    if len(routes) < asked:
        yield f"{len(routes)} of {asked} routes were found: other images fire alike"
    if router is not None:
        if skill(router.agreement, router.most_frequent) < _HARDLY:
            yield (
                f"the router hardly tells routes apart: it is right for {router.agreement:.1%} of the images, and "
                f"always naming the most frequent route would be for {router.most_frequent:.1%}"
            )
        if routings[BY_ROUTER].macs_share >= 1:
            yield (
                f"router and route together take {routings[BY_ROUTER].macs_share:.2f} of the MACs of the network "
                "without gates: route by what you know about the images instead"
            )
    gated, fixed = routings[GATED].accuracy, routings[BY_MASKS].accuracy
    if gated is not None and fixed is not None and fixed < gated - _LOSS:
        yield (
            f"fixed masks cost accuracy: {fixed:.2%} against {gated:.2%} of the gated network, even with the right "
            "route for every image. A smaller keep or more routes close less"
        )
    best, one = routings.get(BY_ROUTER, routings[BY_MASKS]), routings[ONE]
    if len(routes) > 1 and one.macs_share <= best.macs_share and _at_least(one.accuracy, best.accuracy):
        yield (
            f"one sub-network for all images is at least as accurate ({one.accuracy:.2%} against {best.accuracy:.2%}) "
            f"and needs no more MACs ({one.macs_share:.2f} against {best.macs_share:.2f} of those without gates): "
            "routes=1 is the better file"
        )


def _at_least(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and one >= other
