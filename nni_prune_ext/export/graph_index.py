"""What an ONNX graph holds, found by name: constants, writers, numbers of readers, and shapes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

Array: TypeAlias = npt.NDArray[np.generic]
Shape: TypeAlias = tuple[int | None, ...]

_LARGEST_SHAPE = 16
"""Constants with more numbers than this say nothing about the shapes of other values."""


class GraphIndex:
    """A graph's contents by name. It does not follow later changes of the graph.

    Attributes:
        constants: Initializers that a caller of the graph cannot override.
        writers: The node that writes each value.
        readers: How often each value is read, by nodes, by branches of control flow, and as an output.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        inputs = {value.name for value in graph.input}
        self.constants = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in inputs}
        self.writers = {name: node for node in graph.node for name in node.output if name}
        self.readers = Counter(name for node in graph.node for name in names_read(node))
        self.readers.update(output.name for output in graph.output)

    def constant(self, name: str) -> Array | None:
        """Returns the value of a constant, or None if the name is something else."""
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)


def names_read(node: onnx.NodeProto) -> Iterator[str]:
    """Yields what a node reads, also what its branches take from outside or from themselves."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from names_read(inner)
            yield from (output.name for output in graph.output)


def attribute(node: onnx.NodeProto, name: str) -> object:
    """Returns the value of an attribute, or None if the node does not have it."""
    return next((onnx.helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), None)


def integers(node: onnx.NodeProto, name: str) -> tuple[int, ...] | None:
    """Returns an attribute that is a list of integers, or None if the node does not have it."""
    return next((tuple(entry.ints) for entry in node.attribute if entry.name == name), None)


def inferred_shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Returns the shape of every value that onnx can infer, with None for open sizes."""
    graph = onnx.shape_inference.infer_shapes(_without_weights(model), data_prop=True).graph
    shapes: dict[str, Shape] = {
        value.name: tuple(
            size.dim_value if size.HasField("dim_value") else None for size in value.type.tensor_type.shape.dim
        )
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }
    return {**shapes, **{tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}}


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the model with inputs in place of large constants: inference copies a model several times."""
    graph = onnx.GraphProto(name=model.graph.name)
    for field in ("node", "input", "output", "value_info"):
        getattr(graph, field).extend(getattr(model.graph, field))
    given = {value.name for value in graph.input}
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= _LARGEST_SHAPE:
            graph.initializer.add().CopyFrom(tensor)
        elif tensor.name not in given:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def opset_of(model: onnx.ModelProto) -> int:
    """Returns the version of the standard operators that the model uses."""
    return next((entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"}), 1)


def remove_unused(graph: onnx.GraphProto) -> None:
    """Removes nodes and constants that no output depends on."""
    needed = {output.name for output in graph.output}
    for index in reversed(range(len(graph.node))):
        if needed.isdisjoint(graph.node[index].output):
            del graph.node[index]
        else:
            needed.update(names_read(graph.node[index]))
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in needed:
            del graph.initializer[index]
