"""The router: standard ONNX from images to the number of their route, made of the first layers of a gated network."""

from __future__ import annotations

from itertools import accumulate
from math import prod

import onnx

from nni_prune_ext.export.gate_graphs import mask_form
from nni_prune_ext.export.gate_markers import read_markers
from nni_prune_ext.export.gated_graph import marked_graph
from nni_prune_ext.export.graph_index import inferred_shapes, remove_unused
from nni_prune_ext.export.graph_writer import GraphWriter
from nni_prune_ext.export.single_input import fix_batch
from nni_prune_ext.gates.gated_network import GatedNetwork
from nni_prune_ext.gates.route_rule import RouteRule
from nni_prune_ext.graph.gate_tracing import trace_gate_flow
from nni_prune_ext.inputs import ExampleInputs

OUTPUT = "route"


def prefix_macs(network: GatedNetwork, example_inputs: ExampleInputs) -> list[int]:
    """Returns, per gated layer, the multiply–accumulates per image of what runs before it and of the heads up to it."""
    flow = trace_gate_flow(network.model, example_inputs)
    layers = [own.layer for own in flow.layers]
    before = [0, *accumulate(own.macs for own in flow.layers)]
    heads = accumulate(head.macs for head in network.gates.all_heads())
    return [before[layers.index(place.layer)] + own for place, own in zip(network.gates.places, heads)]


def router_graph(
    network: GatedNetwork,
    example_inputs: ExampleInputs,
    rule: RouteRule,
    *,
    dynamic_batch: bool = True,
    opset: int = 18,
) -> onnx.ModelProto:
    """Returns a graph from images ``(N, C, H, W)`` to route numbers ``(N,)`` int64; the network is left as it was.

    Raises:
        ExportError: the network cannot be exported.
    """
    marked = marked_graph(network, example_inputs, opset=opset)
    logits = {marker.name: marker.logits for marker in read_markers(marked.graph)}
    model = mask_form(marked)
    graph, writer = model.graph, GraphWriter(model.graph)
    for node in graph.node:
        writer.copy(node)
    read = writer.node("Concat", [logits[layer] for layer in rule.layers], "router/logits", axis=1)
    weight = writer.constant(rule.weight.numpy(), "router/weight")
    bias = writer.constant(rule.bias.numpy(), "router/bias")
    values = writer.node("Gemm", [read, weight, bias], "router/values")
    writer.node("ArgMax", [values], OUTPUT, axis=1, keepdims=0)
    writer.finish(graph)
    batch = graph.input[0].type.tensor_type.shape.dim[0]
    del graph.output[:]
    sizes = [batch.dim_param or batch.dim_value]
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
