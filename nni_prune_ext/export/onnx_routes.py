"""Writes a gated network as a few static sub-networks, one ONNX file per route, and leaves routing to the caller.

For runtimes that cannot run widths that depend on the data (TensorRT, CUDA graphs), and for batches: images are sorted
by route first, by what the caller knows about them (class, camera, time of day) or by the router that is written
beside. Every file is compared with PyTorch. A route is another function than the gated network: it closes for all of
its images what seldom fires for them. So the ways to run images are measured side by side, on images that found no
route.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from torch import Tensor, nn

from nni_prune_ext.costs import count_costs
from nni_prune_ext.errors import ConfigError
from nni_prune_ext.export.artefact_folder import complete_or_absent
from nni_prune_ext.export.manifest import Part
from nni_prune_ext.export.onnx_gated import one_image_tensor
from nni_prune_ext.export.onnx_static import ExportResult, export_onnx, published
from nni_prune_ext.export.parity import FAIL
from nni_prune_ext.export.provenance import package_version, provenance
from nni_prune_ext.export.route_judging import RouteJudge, remarks
from nni_prune_ext.export.route_router import prefix_macs, router_graph
from nni_prune_ext.export.routes_folder import ROUTER, RoutesIndex, check_routes_folder, remove_earlier_routes
from nni_prune_ext.gates.fixed_masks import SubNetworks
from nni_prune_ext.gates.gated_network import GatedNetwork
from nni_prune_ext.gates.route_rule import RouteRule, learn_rule
from nni_prune_ext.gates.routes import Routes, check_routes, find_routes, fired_filters, head_logits
from nni_prune_ext.inputs import ExampleInputs, map_tensors

LIMITS = (
    "any runtime and any batch size, but all images of a batch take one route: the caller sorts them by route; another "
    "function than the gated network: what seldom fires in a route is closed for all of its images"
)
"""What this flavour cannot do; said at export and written into the files."""
_COMPARED = 64
"""Images on which files are compared with PyTorch."""
_LEARNT_ON = 1024
"""Most images that the router learns from."""


@dataclass(frozen=True)
class RoutedExport:
    """A folder with one ONNX file per route.

    Attributes:
        folder: where they are, with ``routes.json``.
        index: what ``routes.json`` says: files, shares, MACs, accuracy, the router, remarks.
        routes: the routes themselves, with their masks.
        networks: the sub-networks, in the same order.
        exports: per route the written file, and how far it is from PyTorch.
    """

    folder: Path
    index: RoutesIndex
    routes: Routes
    networks: tuple[nn.Module, ...]
    exports: tuple[ExportResult, ...]


def export_routes(
    network: GatedNetwork,
    example_inputs: ExampleInputs,
    folder: Path,
    calibration: Tensor,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    routes: int = 3,
    keep: float = 0.5,
    router: bool = True,
    multiple: int = 1,
    dynamic_batch: bool = True,
    opset: int = 18,
    seed: int = 0,
    fail: float = FAIL,
) -> RoutedExport:
    """Writes a gated network as static sub-networks, one per group of images; the network is left as it was.

    Args:
        network: with one image tensor as its input, and class scores ``(N, classes)`` as its first output if there are
            labels.
        folder: where the files go; an unchanged earlier export there is replaced by a complete and checked one only.
        calibration: images ``(N, C, H, W)``, some hundred, that the routes are found on.
        images: others, that judge: accuracy, how often the router is right, and parity are measured on them.
        labels: classes of ``images``, ``(N,)``; without them there is no accuracy.
        routes: how many; fewer are made where images fire alike.
        keep: a filter stays open in a route if it fires for this share of its images, more than 0 and at most 1.
        router: also write ``router.onnx``, which names the route of an image.
        multiple: groups of channels that are cut keep a multiple of this many, at no loss: ONNX Runtime's CPU provider
            is slow below 4, and quickest with 16 on AVX-512.
        dynamic_batch: leave the batch size open; without, it is 1.
        opset: ONNX operator set.
        seed: of the search for routes.
        fail: largest relative difference to PyTorch that passes.

    Raises:
        ConfigError: a number is out of range, or images and labels do not fit together.
        CertificateError: a sub-network is not the gated network with its masks fixed.
        ExportError: a network cannot be written.
        ParityError: a file does not compute what PyTorch computes.
        OutputError: the folder holds something else, or cannot be written.
    """
    folder = Path(folder)
    check_routes(routes, keep)
    _check(images, labels)
    example = map_tensors(example_inputs, lambda tensor: tensor[:1])
    device = one_image_tensor(example).device
    check_routes_folder(folder)
    made = SubNetworks(network, example, multiple=multiple)
    found = find_routes(network, example, calibration, routes=routes, keep=keep, seed=seed)
    single = find_routes(network, example, calibration, routes=1, keep=keep)
    compared = images[:_COMPARED].to(device)
    given = [compared] if dynamic_batch else [image[None] for image in compared]
    networks = tuple(made.of(own.opened, compared) for own in found.routes)
    judge = RouteJudge(network, example, found, images, labels)
    with complete_or_absent(folder) as draft:
        exports = tuple(
            export_onnx(
                own,
                example,
                draft / f"route-{number}.onnx",
                opset=opset,
                dynamic_batch=dynamic_batch,
                properties={"flavour": "static", "limits": LIMITS, "route": f"{number} of {len(networks)}"},
                given_inputs=given,
                fail=fail,
            )
            for number, own in enumerate(networks)
        )
        described = [judge.route(own, sub) for own, sub in zip(found.routes, networks)]
        routed = None
        if router and len(networks) > 1:
            rule = _rule(network, example, found, calibration[:_LEARNT_ON])
            graph = router_graph(network, example, rule, dynamic_batch=dynamic_batch, opset=opset)
            ports, facts = {graph.graph.input[0].name: one_image_tensor(example)}, {"flavour": "router"}
            onnx.helper.set_model_props(graph, provenance(network, ports, opset=opset, exporter="dynamo", extra=facts))
            routed = judge.router(graph, rule)
            published(graph, draft / ROUTER, network)
        routings = judge.routings(networks, made.of(single.routes[0].opened, compared))
        index = RoutesIndex(
            package_version=package_version(),
            routes=tuple(described),
            router=routed,
            keep=keep,
            weights=dict(found.weights),
            routings=routings,
            images=len(images),
            remarks=tuple(remarks(routes, described, routed, routings)),
            limits=LIMITS,
            parts={path.name: Part.of(path) for path in sorted(draft.iterdir())},
        )
        index.save(draft)
        remove_earlier_routes(folder)
    return RoutedExport(folder, index, found, networks, tuple(_at(own, folder) for own in exports))


def _check(images: Tensor, labels: Tensor | None) -> None:
    if not len(images):
        raise ConfigError("There are 0 images to judge the routes on, expected 64 or more. Pass images (N, C, H, W).")
    if labels is not None and len(labels) != len(images):
        raise ConfigError(
            f"There are {len(labels)} labels for {len(images)} images, expected one per image. Pass both of one set."
        )


def _rule(network: GatedNetwork, example_inputs: ExampleInputs, routes: Routes, images: Tensor) -> RouteRule:
    logits = head_logits(network, images)
    dense = count_costs(network.model, example_inputs).macs
    costs = [macs / dense for macs in prefix_macs(network, example_inputs)]
    return learn_rule(logits, routes.assign(fired_filters(network, logits)), costs)


def _at(made: ExportResult, folder: Path) -> ExportResult:
    data_path = made.data_path and folder / made.data_path.name
    return replace(made, path=folder / made.path.name, data_path=data_path)
