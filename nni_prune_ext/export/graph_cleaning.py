"""Clean-up of exported graphs: nothing of this machine stays in them, and nothing that hinders a runtime.

Works in place on an ``onnx.ModelProto`` that is being written and that nobody else holds.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np
import onnx

_SCOPES = "pkg.torch.onnx.name_scopes"
_FOLDED = frozenset({"Cast", "Concat", "ConstantOfShape", "Gather", "Reshape", "Slice", "Squeeze", "Transpose"})
"""What the TorchScript exporter computes sizes and paddings with; weights are folded by the exporter itself."""


def name_nodes_after_layers(model: onnx.ModelProto) -> None:
    """Renames nodes to ``layer/Operator`` where the exporter recorded the PyTorch layer; call before stripping."""
    seen: Counter[str] = Counter()
    for node in model.graph.node:
        recorded = {entry.key: entry.value for entry in node.metadata_props}.get(_SCOPES)
        if recorded is None:
            continue
        # The list goes from the model down to the operation: ['', 'layer1', 'layer1.conv', 'conv2d'].
        # Operations outside every layer can have a scope of the exporter's own, with a leading underscore.
        scopes = [scope for scope in ast.literal_eval(recorded)[:-1] if scope and not scope.startswith("_empty_")]
        layer = scopes[-1] if scopes else ""
        name = f"{layer}/{node.op_type}".lstrip("/")
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def strip_traces(message: _Message) -> None:
    """Removes documentation strings and metadata from everything in the model: they hold local paths and code."""
    for field, value in message.ListFields():
        if field.name in {"metadata_props", "doc_string"}:
            message.ClearField(field.name)
        elif field.type == field.TYPE_MESSAGE:
            for child in value if isinstance(value, Iterable) else (value,):
                assert isinstance(child, _Message)
                strip_traces(child)


def remove_identities(model: onnx.ModelProto) -> None:
    """Removes ``Identity`` nodes, which the TorchScript exporter puts on shared weights.

    They keep ONNX Runtime from fusing: an INT8 ResNet-50 runs four times slower with them.
    """
    outputs = {output.name for output in model.graph.output}
    sources: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "Identity" and node.output[0] not in outputs:
            sources[node.output[0]] = sources.get(node.input[0], node.input[0])
    _remove_writers(model.graph, sources)
    _rename_inputs(model.graph, sources)


def constants_to_initializers(model: onnx.ModelProto) -> None:
    """Turns ``Constant`` nodes with a tensor into initializers of the graph."""
    constants = {
        node.output[0]: node.attribute[0].t
        for node in model.graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    for name, value in constants.items():
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(value)
        tensor.name = name
    _remove_writers(model.graph, constants)


def fold_constants(model: onnx.ModelProto) -> None:
    """Computes sizes and paddings whose parts are all known, and removes initializers that nobody reads any more."""
    from onnx.reference import ReferenceEvaluator  # imported here because it loads all operators of ONNX

    graph, outputs = model.graph, {output.name for output in model.graph.output}
    known = {tensor.name: tensor for tensor in graph.initializer}
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    for node in list(graph.node):
        given = [name for name in node.input if name]
        if node.op_type not in _FOLDED or not set(given) <= known.keys() or node.output[0] in outputs:
            continue
        values = {name: onnx.numpy_helper.to_array(known[name]) for name in given}
        (value,) = ReferenceEvaluator(node, opsets=opsets).run(None, values)
        tensor = onnx.numpy_helper.from_array(np.asarray(value), node.output[0])
        graph.initializer.append(tensor)
        known[tensor.name] = tensor
        graph.node.remove(node)
    remove_unread(model)


def remove_unread(model: onnx.ModelProto) -> None:
    """Removes initializers that no node reads and that are no output."""
    read = {output.name for output in model.graph.output} | set(_names_read(model.graph))
    for index in reversed(range(len(model.graph.initializer))):
        if model.graph.initializer[index].name not in read:
            del model.graph.initializer[index]


def drop_unused_domains(model: onnx.ModelProto) -> None:
    """Removes operator sets that no node is of; ONNX Runtime lists all that it knows."""
    used = {node.domain for node in model.graph.node} | {""}
    for index in reversed(range(len(model.opset_import))):
        if model.opset_import[index].domain not in used:
            del model.opset_import[index]


class _Field(Protocol):
    name: str
    type: int
    TYPE_MESSAGE: int


@runtime_checkable
class _Message(Protocol):
    """The part of protobuf's messages that is used here; protobuf has no type hints of its own."""

    def ListFields(self) -> list[tuple[_Field, object]]: ...  # noqa: N802 (protobuf's name)
    def ClearField(self, name: str) -> None: ...  # noqa: N802


def _remove_writers(graph: onnx.GraphProto, names: Container[str]) -> None:
    """Removes the nodes whose first output has one of the names."""
    for index in reversed(range(len(graph.node))):
        if graph.node[index].output[0] in names:
            del graph.node[index]


def _names_read(graph: onnx.GraphProto) -> Iterator[str]:
    """Yields the names that nodes read, also in the branches of control flow."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from (output.name for output in attribute.g.output)
                yield from _names_read(attribute.g)


def _rename_inputs(graph: onnx.GraphProto, sources: dict[str, str]) -> None:
    """Replaces the names of values that nodes read, also in the branches of control flow."""
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = sources.get(name, name)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename_inputs(attribute.g, sources)
