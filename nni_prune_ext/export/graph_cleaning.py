"""Clean-up of exported graphs: nothing of this machine stays in them, and nothing that hinders a runtime.

Works in place on an ``onnx.ModelProto`` that is being written and that nobody else holds.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Container, Iterable
from typing import Protocol, runtime_checkable

import onnx

_SCOPES = "pkg.torch.onnx.name_scopes"


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


def _rename_inputs(graph: onnx.GraphProto, sources: dict[str, str]) -> None:
    """Replaces the names of values that nodes read, also in the branches of control flow."""
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = sources.get(name, name)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename_inputs(attribute.g, sources)
