"""The router: standard ONNX from images to the number of their route, made of the first layers of a gated network.

Gates of the first layers fire long before the network is through. Their masks are compared with the centres of the
routes in these coordinates only; whether that is enough is measured, not supposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import onnx
import torch
from torch import Tensor

from nni_prune_ext.export.gate_graphs import mask_form
from nni_prune_ext.export.gate_markers import open_name
from nni_prune_ext.export.gated_graph import marked_graph
from nni_prune_ext.export.graph_index import inferred_shapes, remove_unused
from nni_prune_ext.export.graph_writer import GraphWriter
from nni_prune_ext.export.single_input import fix_batch
from nni_prune_ext.gates.gated_network import GatedNetwork
from nni_prune_ext.gates.routes import Routes
from nni_prune_ext.inputs import ExampleInputs

OUTPUT = "route"
ENOUGH = 0.8
"""Skill at which no further layer is asked."""


def skill(agreement: float, most_frequent: float) -> float:
    """Returns how far a router is from always naming the most frequent route (0) towards being always right (1).

    Args:
        agreement: share of the images on which it names the right route.
        most_frequent: share of the images whose route is the most frequent one.
    """
    return (agreement - most_frequent) / (1 - most_frequent) if most_frequent < 1 else 0.0


def shortest_prefix(routes: Routes, fired: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Returns the first gated layers, as few as tell the routes of some images with enough skill.

    Args:
        fired: layer → which filters fire, ``(N, C)`` bool, in forward order.
    """
    right = routes.assign(fired)
    most_frequent = float(right.bincount().max()) / len(right)
    layers = tuple(fired)
    for count in range(1, len(layers)):
        agreement = float((routes.assign(fired, layers[:count]) == right).float().mean())
        if skill(agreement, most_frequent) >= ENOUGH:
            return layers[:count]
    return layers


def router_graph(
    network: GatedNetwork,
    example_inputs: ExampleInputs,
    routes: Routes,
    layers: tuple[str, ...],
    *,
    dynamic_batch: bool = True,
    opset: int = 18,
) -> onnx.ModelProto:
    """Returns a graph from images ``(N, C, H, W)`` to route numbers ``(N,)`` int64; the network is left as it was.

    Raises:
        ExportError: the network cannot be exported.
    """
    model = mask_form(marked_graph(network, example_inputs, opset=opset))
    graph, writer = model.graph, GraphWriter(model.graph)
    for node in graph.node:
        writer.copy(node)
    weight, bias = _per_unit(network, routes, layers)
    opened = writer.node("Concat", [open_name(layer) for layer in layers], "router/open", axis=1)
    factors = writer.node("Cast", [opened], "router/factors", to=onnx.TensorProto.FLOAT)
    given = [factors, writer.constant(weight.numpy(), "router/weight"), writer.constant(bias.numpy(), "router/bias")]
    nearness = writer.node("Gemm", given, "router/nearness")
    writer.node("ArgMax", [nearness], OUTPUT, axis=1, keepdims=0)
    writer.finish(graph)
    batch = graph.input[0].type.tensor_type.shape.dim[0]
    sizes = [batch.dim_param or batch.dim_value]
    del graph.output[:]
    graph.output.append(onnx.helper.make_tensor_value_info(OUTPUT, onnx.TensorProto.INT64, sizes))
    remove_unused(graph)
    if not dynamic_batch:
        fix_batch(model)
    onnx.checker.check_model(model)
    return model


def graph_macs(model: onnx.ModelProto) -> int:
    """Counts the multiply–accumulates per image of all convolutions and matrix products of a graph."""
    shapes, total = inferred_shapes(model), 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            total += prod(size or 1 for size in (*shapes[node.output[0]][2:], *shapes[node.input[1]]))
        elif node.op_type in ("Gemm", "MatMul"):
            total += prod(size or 1 for size in shapes[node.input[1]])
    return total


def _per_unit(network: GatedNetwork, routes: Routes, layers: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Returns the linear rule for units in the place of filters: those of one unit fire together."""
    weight, bias = routes.linear(layers)
    parts, start = [], 0
    for layer in layers:
        head = network.gates.head(layer)
        units = head.units.cpu()
        own = torch.zeros(head.num_units, weight.shape[1])
        parts.append(own.index_add_(0, units, weight[start : start + len(units)]))
        start += len(units)
    return torch.cat(parts), bias
