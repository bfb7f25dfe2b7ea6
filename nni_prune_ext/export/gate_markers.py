"""The marker nodes that stand for gates in an exported graph, and the standard ONNX that computes what is open.

A marker ``Gate(x, logits; name, units) -> y`` in the domain ``nni_prune_ext`` says that ``y[n, c]`` is ``x[n, c]``
where unit ``units[c]`` is open for input ``n``, and zero elsewhere. A unit is open if its logit is positive or the
first largest one: at least one is always open, even if every logit is negative or NaN. ONNX Runtime 1.31 never
returns from a convolution without input channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from nni_prune_ext.errors import ExportError
from nni_prune_ext.export.graph_index import GraphIndex, Shape, attribute, integers
from nni_prune_ext.export.graph_writer import GraphWriter

DOMAIN = "nni_prune_ext"
OPERATOR = "Gate"


@dataclass(frozen=True)
class Marker:
    """One marker node.

    Attributes:
        name: Name of the gate.
        features: The value that is gated, ``(N, C, H, W)``.
        logits: One number per input and unit, ``(N, U)``.
        output: The gated value.
        units: The unit of each channel, ``(C,)``.
        conv: The convolution that writes `features`, if its open filters alone can be computed.
        refusal: Why they cannot, if `conv` is None.
    """

    name: str
    features: str
    logits: str
    output: str
    units: tuple[int, ...]
    conv: onnx.NodeProto | None
    refusal: str | None

    @property
    def num_units(self) -> int:
        """Number of units, each of them with at least one channel."""
        return max(self.units) + 1


def is_marker(node: onnx.NodeProto) -> bool:
    """Says whether a node is a gate's marker."""
    return node.domain == DOMAIN and node.op_type == OPERATOR


def read_markers(graph: onnx.GraphProto) -> tuple[Marker, ...]:
    """Returns the markers of a graph in its order.

    Raises:
        ExportError: If a marker has no name or a name twice, or if its units leave a number out.
    """
    index = GraphIndex(graph)
    markers = tuple(_read(node, index) for node in graph.node if is_marker(node))
    for name, count in Counter(marker.name for marker in markers).items():
        if count > 1:
            raise ExportError(
                f"{count} gates are called '{name}', expected one gate per name. Give each marker its layer's name."
            )
    return markers


def _read(node: onnx.NodeProto, index: GraphIndex) -> Marker:
    recorded, units = attribute(node, "name"), integers(node, "units")
    name = recorded.decode() if isinstance(recorded, bytes) else ""
    if not name or not units or len(node.input) != 2:
        raise ExportError(
            f"The marker '{node.name}' has the name {name!r}, the units {units} and {len(node.input)} inputs, expected "
            "a name, one unit per channel, and the inputs x and logits. Write it with both attributes."
        )
    if set(units) != set(range(max(units) + 1)):
        raise ExportError(
            f"The units of gate '{name}' are {sorted(set(units))}, expected every number from 0 on: a unit without "
            "channels could be the only open one. Number the units without gaps."
        )
    conv = index.writers.get(node.input[0])
    refusal = _refusal(conv, index)
    return Marker(name, node.input[0], node.input[1], node.output[0], units, None if refusal else conv, refusal)


def _refusal(conv: onnx.NodeProto | None, index: GraphIndex) -> str | None:
    """Says why the filters of a layer cannot be gathered, or None if they can."""
    if conv is None or conv.op_type != "Conv" or conv.domain:
        return f"the gated value is written by {'an input' if conv is None else conv.op_type}, not by Conv"
    if attribute(conv, "group") not in (None, 1):
        return f"the convolution has {attribute(conv, 'group')} groups, a number that ONNX fixes"
    if not set(conv.input[1:]) - {""} <= index.constants.keys():
        return "the weight or bias of the convolution is computed"
    if index.constants[conv.input[1]].data_type != onnx.TensorProto.FLOAT:
        return "the weight of the convolution is not float32"
    if index.readers[conv.output[0]] > 1:
        return "the output of the convolution is read by others than the gate"
    return None


def check_sizes(markers: tuple[Marker, ...], shapes: Mapping[str, Shape]) -> None:
    """Compares the units of every gate with the sizes of its two inputs.

    Raises:
        ExportError: If there is not one unit per channel and one logit per unit.
    """
    for marker in markers:
        features, logits = shapes.get(marker.features), shapes.get(marker.logits)
        if features is None or len(features) != 4 or features[1] != len(marker.units):
            raise ExportError(
                f"Gate '{marker.name}' has {len(marker.units)} channels for features of shape {features}, expected "
                "(N, C, H, W) with as many channels. Give every channel a unit."
            )
        if logits is None or len(logits) != 2 or logits[1] != marker.num_units:
            raise ExportError(
                f"Gate '{marker.name}' has {marker.num_units} units for logits of shape {logits}, expected (N, U) with "
                "as many columns. Let the head compute one logit per unit."
            )


def open_name(gate: str) -> str:
    """Returns the name of the boolean value ``(N, U)`` that says which units of a gate are open."""
    return f"gate/{gate}/open"


def write_open(writer: GraphWriter, marker: Marker) -> str:
    """Writes the nodes that compute which units are open and returns the name of the result, ``(N, U)`` bool."""
    prefix = f"gate/{marker.name}"
    zero = writer.constant(np.zeros((), np.float32), "gate/zero")
    numbers = writer.constant(np.arange(marker.num_units)[None], f"gate/units_{marker.num_units}")
    positive = writer.node("Greater", [marker.logits, zero], f"{prefix}/positive")
    largest = writer.node("ArgMax", [marker.logits], f"{prefix}/largest", axis=1, keepdims=1)
    guard = writer.node("Equal", [numbers, largest], f"{prefix}/guard")
    return writer.node("Or", [positive, guard], open_name(marker.name))


def write_mask(writer: GraphWriter, marker: Marker) -> None:
    """Writes the gate as a multiplication with zeros and ones, which works for any batch and any runtime."""
    prefix = f"gate/{marker.name}"
    mask = write_open(writer, marker)
    if marker.units != tuple(range(marker.num_units)):
        units = writer.constant(np.asarray(marker.units), f"{prefix}/units")
        mask = writer.node("Gather", [mask, units], f"{prefix}/channels", axis=1)
    factors = writer.node("Cast", [mask], f"{prefix}/factors", to=onnx.TensorProto.FLOAT)
    axes = writer.constant(np.array([2, 3]), "gate/spatial_axes")
    spread = writer.node("Unsqueeze", [factors, axes], f"{prefix}/spread")
    writer.node("Mul", [marker.features, spread], marker.output)
