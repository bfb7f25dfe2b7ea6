"""The layers of an ONNX file that this package wrote, and which of them a node of a profile belongs to.

ONNX Runtime profiles the optimised graph, whose nodes are called after those of the file: a fused convolution keeps
its name, one in the blocked layout is called after the value that it writes, ``<value>_nchwc`` (ONNX Runtime 1.31).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import onnx

from nni_prune_ext.errors import ModelError
from nni_prune_ext.export.provenance import PREFIX
from nni_prune_ext.runtimes.onnxruntime_shapes import seen_shapes

_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_FUSED = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "NhwcFusedConv")
_ABSORBED = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Add"})
"""Operators that a convolution takes in when ONNX Runtime fuses, so that it is called after their output."""
_BLOCKED, _BLOCKED_NORM = "_nchwc", "_bn_nchwc"


@dataclass(frozen=True)
class Layer:
    """One layer with weights; a layer that is used several times counts with all its uses.

    Attributes:
        name: its module path, such as ``layer1.0.conv1``.
        kind: ``conv`` with its kernel, ``depthwise``, ``grouped``, ``transposed`` or ``linear``.
        in_channels: what one use reads.
        out_channels: what it writes.
        groups: of a convolution; 1 otherwise.
        macs: of one pass at the batch of the inputs.
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    groups: int
    macs: int


@dataclass(frozen=True)
class Network:
    """An ONNX file as the doctor sees it.

    Attributes:
        path: the file.
        model: its content, with shapes for the inputs that it is diagnosed with.
        shapes: value → shape for these inputs.
        layers: by name, in the order of the graph.
        layer_of_node: node name → layer, for nodes with weights.
    """

    path: Path
    model: onnx.ModelProto
    shapes: Mapping[str, tuple[int, ...]]
    layers: Mapping[str, Layer]
    layer_of_node: Mapping[str, str]

    @classmethod
    def load(cls, path: Path, input_shapes: Sequence[Sequence[int]]) -> Network:
        """Reads a file.

        Args:
            path: what ``export_onnx`` wrote.
            input_shapes: of the arrays that the model is run on.

        Raises:
            ModelError: the file is missing, damaged, or none of this package.
        """
        model = _read(path)
        _fix_inputs(path, model, input_shapes)
        shapes = _shapes(model, input_shapes)
        weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        layers: dict[str, Layer] = {}
        layer_of_node: dict[str, str] = {}
        for node in model.graph.node:
            if node.op_type not in _WEIGHTED:
                continue
            layer = _layer(node, weights.get(node.input[1]) or shapes.get(node.input[1], ()), shapes)
            if layer is not None:
                known = layers.get(layer.name)
                layers[layer.name] = layer if known is None else replace(known, macs=known.macs + layer.macs)
                layer_of_node[node.name] = layer.name
        return cls(path, model, shapes, layers, layer_of_node)

    def owners(self, profiled: Sequence[tuple[str, str]]) -> list[str | None]:
        """Returns the layer of each node of a profile; ``None`` for nodes without weights, such as pools.

        Args:
            profiled: names and operators.
        """
        names = [name for name, op in profiled if op in _FUSED]
        claimed = {name: name for name in names if name in self.layer_of_node}
        producers = {value: node for node in self.model.graph.node for value in node.output}
        open_: dict[str, list[str]] = {}
        for name in names:
            if name in claimed:
                continue
            producer = producers.get(name.removesuffix(_BLOCKED)) if name.endswith(_BLOCKED) else None
            if producer is None:
                extended = [known for known in self.layer_of_node if known and name.startswith(known)]
                found = [max(extended, key=len)] if extended else []
            else:
                found = list(dict.fromkeys(self._sources(producer, producers)))
            open_[name] = found
        # A sum of two convolutions is fused with one of them; the other one has a node of its own.
        for name, found in sorted(open_.items(), key=lambda item: len(item[1])):
            free = [node for node in found if node not in claimed.values()] or found
            if free:
                claimed[name] = free[0]
        return [self.layer_of_node[claimed[name]] if name in claimed else None for name, _ in profiled]

    def operator(self, name: str, op: str) -> str:
        """Returns what a node of a profile is in the file: a norm in the blocked layout runs as a convolution."""
        value = name.removesuffix(_BLOCKED_NORM)
        norms = (node for node in self.model.graph.node if node.op_type == "BatchNormalization")
        is_norm = name.endswith(_BLOCKED_NORM) and any(value in node.output for node in norms)
        return "BatchNormalization" if is_norm else op

    def _sources(self, node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto]) -> Iterator[str]:
        """Yields the nodes with weights whose output a node is, or may have been fused with, the nearest first."""
        if node.name in self.layer_of_node:
            yield node.name
        elif node.op_type in _ABSORBED:
            for value in node.input:
                if value in producers:
                    yield from self._sources(producers[value], producers)


def is_blocked(node_name: str) -> bool:
    """Says whether a node of a profile works in ONNX Runtime's blocked layout."""
    return node_name.endswith(_BLOCKED)


def _shapes(model: onnx.ModelProto, input_shapes: Sequence[Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Returns value → shape: inferred, or seen in a run where that says too little."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    found = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        sizes = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim]
        if -1 not in sizes:
            found[value.name] = tuple(sizes)
    needed = [v for node in model.graph.node if node.op_type in _WEIGHTED for v in (node.input[0], node.output[0])]
    return found if all(name in found for name in needed) else {**found, **seen_shapes(model, input_shapes)}


def _read(path: Path) -> onnx.ModelProto:
    damaged = (onnx.checker.ValidationError, import_module("google.protobuf.message").DecodeError)
    try:
        model = onnx.load(str(path), format="protobuf")  # whatever its name is
    except (OSError, ValueError, *damaged) as error:
        raise ModelError(
            f"'{path}' cannot be read as ONNX ({error}). Expected what `nni-prune-ext export` makes; copy it again."
        ) from error
    if not any(entry.key == f"{PREFIX}version" for entry in model.metadata_props):
        raise ModelError(
            f"'{path}' is no ONNX file of this package: it has no metadata {PREFIX}version. Expected one, because its "
            "nodes bear the names of layers. Export the network with export_onnx or `nni-prune-ext export`."
        )
    return model


def _fix_inputs(path: Path, model: onnx.ModelProto, input_shapes: Sequence[Sequence[int]]) -> None:
    """Writes the shapes of the inputs into the graph, and forgets those of all other values."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [port for port in model.graph.input if port.name not in weights]
    own = [[d.dim_value if d.HasField("dim_value") else None for d in p.type.tensor_type.shape.dim] for p in inputs]
    fits = [
        len(sizes) == len(shape) and all(size in (None, n) for size, n in zip(sizes, shape))
        for sizes, shape in zip(own, input_shapes)
    ]
    if len(inputs) != len(input_shapes) or not all(fits):
        raise ModelError(
            f"'{path}' takes inputs of shapes {own}, but got arrays of {[list(shape) for shape in input_shapes]}. "
            "Expected arrays that fit both networks. Pass inputs of this shape."
        )
    for port, shape in zip(inputs, input_shapes):
        for dim, size in zip(port.type.tensor_type.shape.dim, shape):
            dim.dim_value = size
    del model.graph.value_info[:]
    for port in model.graph.output:
        for dim in port.type.tensor_type.shape.dim:
            dim.Clear()


def _layer(node: onnx.NodeProto, weight: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
    """Reads a node with weights; ``None`` for a product of two activations, as in attention."""
    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    groups = int(given.get("group", 1))
    if len(weight) < 2 or (node.op_type in ("MatMul", "Gemm") and len(weight) != 2):
        return None
    if node.op_type == "Conv":
        wide_in, wide_out = weight[1] * groups, weight[0]
        kind = "depthwise" if groups == wide_in > 1 else "grouped" if groups > 1 else f"conv {_by(weight[2:])}"
    elif node.op_type == "ConvTranspose":
        wide_in, wide_out, kind = weight[0], weight[1] * groups, "transposed"
    else:
        wide_out, wide_in = weight if given.get("transB") else weight[::-1]
        kind = "linear"
    # every position of the output (of the input, if transposed) costs one product per weight that meets it
    places = shapes[node.input[0] if node.op_type == "ConvTranspose" else node.output[0]]
    per_output = weight[1:] if node.op_type in ("Conv", "ConvTranspose") else (wide_in,)
    return Layer(layer_name(node), kind, wide_in, wide_out, groups, math.prod(places) * math.prod(per_output))


def layer_name(node: onnx.NodeProto) -> str:
    """Returns the module path of a node with weights: that of its weight, or else that in the node's own name.

    TorchScript writes paths like ``/layer1/layer1.0/conv1/Conv``, where a part repeats the one before.
    """
    weight: str = node.input[1]
    if weight.endswith(".weight"):
        return weight.removesuffix(".weight")
    parts = [part for part in node.name.split("/")[:-1] if part]
    path: list[str] = []
    for part in parts:
        if path and part.startswith(f"{path[-1]}."):
            path[-1] = part
        else:
            path.append(part)
    return ".".join(path) or str(node.name)


def _by(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))
