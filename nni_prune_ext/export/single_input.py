"""A graph for one input at a time: sizes become numbers, and reductions over all pixels become pools."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from nni_prune_ext.errors import ExportError
from nni_prune_ext.export.graph_index import Array, GraphIndex, Shape, attribute, integers, remove_unused

_POOLS = {"ReduceMax": "GlobalMaxPool", "ReduceMean": "GlobalAveragePool"}


def fix_batch(model: onnx.ModelProto) -> None:
    """Sets the batch size of a model to 1, in place, and forgets what was inferred for others.

    Raises:
        ExportError: If the model has another fixed batch size.
    """
    graph = model.graph
    open_names = set()
    for port in graph.input:
        sizes = port.type.tensor_type.shape.dim
        if sizes and sizes[0].HasField("dim_value") and sizes[0].dim_value != 1:
            raise ExportError(
                f"The input '{port.name}' has the fixed batch size {sizes[0].dim_value}, expected an open one or 1: "
                "the compact form takes one input at a time. Export with dynamic_batch=True."
            )
        if sizes:
            open_names.add(sizes[0].dim_param)
            sizes[0].dim_value = 1
    for port in graph.output:
        for size in port.type.tensor_type.shape.dim:
            if size.dim_param and size.dim_param in open_names:
                size.dim_value = 1
    del graph.value_info[:]


def simplify(graph: onnx.GraphProto, shapes: Mapping[str, Shape]) -> None:
    """Replaces nodes that read known sizes, and reductions over all pixels, and removes what nothing needs then."""
    index = GraphIndex(graph)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        sizes = _known_sizes(node, shapes)
        if sizes is not None:
            graph.initializer.append(numpy_helper.from_array(sizes, node.output[0]))
        else:
            nodes += _as_pool(node, index, shapes) or [_copy(node)]
    del graph.node[:]
    graph.node.extend(nodes)
    remove_unused(graph)


def _known_sizes(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> Array | None:
    """Returns the result of a Shape node if it is known."""
    shape = shapes.get(node.input[0]) if node.op_type == "Shape" and not node.domain else None
    if shape is None:
        return None
    start, end = attribute(node, "start"), attribute(node, "end")
    part = shape[start if isinstance(start, int) else 0 : end if isinstance(end, int) else len(shape)]
    known = [size for size in part if size is not None]
    return np.array(known, np.int64) if len(known) == len(part) else None


def _as_pool(node: onnx.NodeProto, index: GraphIndex, shapes: Mapping[str, Shape]) -> list[onnx.NodeProto] | None:
    """Returns a global pool in place of a reduction or a pool over all pixels: the form that runtimes make fast."""
    shape = shapes.get(node.input[0] if node.input else "")
    if shape is None or len(shape) != 4 or node.domain:
        return None
    output = node.output[0]
    if node.op_type == "MaxPool" and len(node.output) == 1 and integers(node, "kernel_shape") == shape[2:]:
        covers = not any(integers(node, "pads") or ()) and attribute(node, "auto_pad") in (None, b"NOTSET", b"VALID")
        return [onnx.helper.make_node("GlobalMaxPool", [node.input[0]], [output], name=node.name)] if covers else None
    if node.op_type not in _POOLS or reduced_axes(node, index, 4) != {2, 3}:
        return None
    pool = _POOLS[node.op_type]
    if attribute(node, "keepdims") != 0:
        return [onnx.helper.make_node(pool, [node.input[0]], [output], name=node.name)]
    pooled = f"{output}/pooled"
    return [
        onnx.helper.make_node(pool, [node.input[0]], [pooled], name=node.name),
        onnx.helper.make_node("Flatten", [pooled], [output], name=f"{node.name}/Flatten", axis=1),
    ]


def reduced_axes(node: onnx.NodeProto, index: GraphIndex, rank: int) -> set[int] | None:
    """Returns the axes over which a reduction runs, counted from the front, or None if they are computed."""
    axes = integers(node, "axes")
    if axes is None and len(node.input) > 1:
        value = index.constant(node.input[1])
        axes = None if value is None else tuple(int(axis) for axis in value.tolist())
    return None if axes is None else {axis % rank for axis in axes}


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    result = onnx.NodeProto()
    result.CopyFrom(node)
    return result
