"""Carries tensors with only their open channels from one layer to the next, and fills them up where that must end.

A compact tensor ``(1, K, …)`` holds the channels that a gate left open; all others have one known number in them,
zero right behind the gate. Every value keeps its name for the full tensor, which is written only if something reads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from nni_prune_ext.errors import ExportError
from nni_prune_ext.export.filter_selections import SelectedWeights, Selection, write_selection
from nni_prune_ext.export.gate_markers import Marker, is_marker, read_markers, write_mask
from nni_prune_ext.export.graph_index import Array, GraphIndex, Shape, attribute, names_read
from nni_prune_ext.export.graph_writer import GraphWriter
from nni_prune_ext.export.single_input import reduced_axes

# Operators whose output at a place depends on the inputs at that place alone.
# fmt: off
_ELEMENTWISE = frozenset({
    "Abs", "Add", "Celu", "Clip", "Div", "Dropout", "Elu", "Erf", "Exp",
    "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Max", "Min", "Mish", "Mul",
    "Neg", "Pow", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub",
    "Sum", "Tanh", "ThresholdedRelu",
})
# fmt: on
# Operators whose output is zero where their first input is, whatever the finite second one.
_SCALING = frozenset({"Mul", "PRelu"})
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"})
_REDUCTIONS = frozenset({"ReduceMax", "ReduceMean", "ReduceMin"})
_RESHAPING = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})
_ADDING_OPSET = 16
"""First operator set in which ScatterND can add."""


@dataclass(frozen=True)
class _Compact:
    """A tensor that holds open channels only.

    Attributes:
        value: Name of the tensor.
        selection: Which channels it holds.
        fill: The number in all places of all other channels.
    """

    value: str
    selection: Selection
    fill: float


class CompactRewriter:
    """Rewrites the graph of a network for one input so that chosen gates compute their open filters alone."""

    def __init__(self, graph: onnx.GraphProto, shapes: Mapping[str, Shape], opset: int) -> None:
        """Takes a graph with markers and the shapes of its values; nothing changes before `rewrite`."""
        self._graph = graph
        self._shapes = shapes
        self._opset = opset
        self._index = GraphIndex(graph)
        self._writer = GraphWriter(graph)
        self._weights = SelectedWeights(self._writer, self._index)
        self._compact: dict[str, _Compact] = {}
        self._filled: set[str] = set()

    def rewrite(self, gathered: Iterable[Marker]) -> None:
        """Rewrites the graph in place; the gates that are not gathered become masks."""
        chosen = {marker.output: marker for marker in gathered}
        # These convolutions need their gate's logits, which may be computed later: they move to their markers.
        moved = {marker.features for marker in chosen.values()}
        markers = {marker.output: marker for marker in read_markers(self._graph)}
        for node in self._graph.node:
            if is_marker(node):
                marker = markers[node.output[0]]
                self._gathered_layer(marker) if marker.output in chosen else self._masked_layer(marker)
            elif not moved.intersection(node.output) and not self._stays_compact(node):
                self._plain(node)
        for output in self._graph.output:
            self._full(output.name)
        self._writer.finish(self._graph)

    def _gathered_layer(self, marker: Marker) -> None:
        assert marker.conv is not None, "only gates behind a convolution are gathered"
        self._full(marker.logits)
        selection = write_selection(self._writer, marker)
        output = self._writer.fresh(f"{marker.output}/compact")
        self._convolution(marker.conv, selection, output)
        self._compact[marker.output] = _Compact(output, selection, 0.0)

    def _masked_layer(self, marker: Marker) -> None:
        self._full(marker.features)
        self._full(marker.logits)
        write_mask(self._writer, marker)

    def _plain(self, node: onnx.NodeProto) -> None:
        """Leaves a node as it is and gives it full tensors."""
        for name in names_read(node):
            self._full(name)
        self._writer.copy(node)

    def _stays_compact(self, node: onnx.NodeProto) -> bool:
        """Writes a node so that it works on compact tensors, or says that it cannot."""
        if node.domain or not any(name in self._compact for name in node.input):
            return False
        if node.op_type == "Conv":
            return self._reading_convolution(node)
        rules: list[tuple[frozenset[str], Callable[[onnx.NodeProto], bool]]] = [
            (_ELEMENTWISE, self._elementwise),
            (_SCALING, self._scaling),
            (frozenset({"Add"}), self._adding),
            (_POOLS, self._pool),
            (_REDUCTIONS, self._reduction),
            (_RESHAPING, self._reshaping),
        ]
        return any(node.op_type in operators and rule(node) for operators, rule in rules)

    def _reading_convolution(self, node: onnx.NodeProto) -> bool:
        if self._columns(node) is None:
            return False
        self._convolution(node, None, node.output[0])
        return True

    def _columns(self, conv: onnx.NodeProto) -> Selection | None:
        """Returns which input channels a convolution can leave out, or None if it should read a full tensor.

        A single pixel is not worth it: filling it up costs less than picking weights.
        """
        compact = self._compact.get(conv.input[0])
        if compact is None or compact.fill or conv.input[1] not in self._index.constants:
            return None
        grouped = attribute(conv, "group") not in (None, 1)
        return None if grouped or set(self._shapes[conv.input[0]][2:]) == {1} else compact.selection

    def _convolution(self, conv: onnx.NodeProto, rows: Selection | None, output: str) -> None:
        """Writes a convolution with some of its filters, some of its input channels, or both."""
        columns = self._columns(conv)
        source = self._full(conv.input[0]) if columns is None else self._compact[conv.input[0]].value
        bias = list(conv.input[2:])
        if rows is not None and bias and bias[0]:
            bias = [self._weights.bias(bias[0], rows)]
        for name in bias if rows is None else ():
            self._full(name)
        result = onnx.NodeProto()
        result.CopyFrom(conv)
        del result.input[:]
        result.input.extend([source, self._weights.weight(conv.input[1], rows, columns), *bias])
        result.output[0] = output
        if attribute(conv, "kernel_shape") is None:  # which runtimes read off constant weights only
            kernel = self._index.constants[conv.input[1]].dims[2:]
            result.attribute.append(onnx.helper.make_attribute("kernel_shape", list(kernel)))
        self._writer.copy(result)

    def _elementwise(self, node: onnx.NodeProto) -> bool:
        """Keeps one selection's tensors compact if everything else that the node reads is a single constant."""
        compact = {name: self._compact[name] for name in node.input if name in self._compact}
        constants = {name: self._index.constant(name) for name in node.input if name and name not in compact}
        ranks = {len(self._shapes[name]) for name in compact}
        scalars = {name: value for name, value in constants.items() if value is not None and value.size == 1}
        if (
            len(scalars) < len(constants)
            or len(ranks) > 1
            or any(value.ndim > min(ranks) for value in scalars.values())
        ):
            return False
        selection = next(iter(compact.values())).selection
        if any(entry.selection != selection for entry in compact.values()) or any(node.output[1:]):
            return False
        fill = _on_scalars(node, {name: entry.fill for name, entry in compact.items()}, scalars, self._opset)
        if not math.isfinite(fill):
            return False
        self._keep(node, selection, fill)
        return True

    def _scaling(self, node: onnx.NodeProto) -> bool:
        """Multiplies a compact tensor with the same channels of a full one."""
        first, second = node.input
        if node.op_type == "Mul" and not self._is_blank(first):
            first, second = second, first
        if not self._is_blank(first):
            return False
        selection = self._compact[first].selection
        sizes = self._shapes.get(second)
        if sizes is None or None in sizes or len(sizes) > len(self._shapes[first]):
            return False
        axis = len(sizes) - len(self._shapes[first]) + 1
        factor = self._full(second)
        if axis >= 0 and sizes[axis] != 1:
            index = self._weights.channels(selection)
            factor = self._writer.node("Gather", [factor, index], f"{second}/{selection.gate}", axis=axis)
        self._keep(node, selection, 0.0, [self._compact[first].value, factor])
        return True

    def _adding(self, node: onnx.NodeProto) -> bool:
        """Adds a compact tensor to a full one of the same size, which gives a full one."""
        first, second = node.input
        if self._is_blank(first) and not self._is_blank(second):
            first, second = second, first
        shape = self._shapes.get(second, ())
        if not self._is_blank(second) or self._shapes.get(first) != shape or len(shape) < 3:
            return False
        if self._opset < _ADDING_OPSET:
            return False
        axis = self._writer.constant(np.array([0]), "gate/batch_axis")
        data = self._writer.node("Squeeze", [self._full(first), axis], f"{node.output[0]}/full")
        total = self._scatter(data, self._compact[second], node.output[0], reduction="add")
        self._writer.node("Unsqueeze", [total, axis], node.output[0])
        return True

    def _pool(self, node: onnx.NodeProto) -> bool:
        """Pools the open channels; an average counts zeros outside the picture, so the others must be zero too."""
        compact = self._compact[node.input[0]]
        if any(node.output[1:]) or (node.op_type == "AveragePool" and compact.fill):
            return False
        self._keep(node, compact.selection, compact.fill)
        return True

    def _reduction(self, node: onnx.NodeProto) -> bool:
        shape = self._shapes[node.input[0]]
        axes = reduced_axes(node, self._index, len(shape))
        if node.input[0] not in self._compact or not axes or axes & {0, 1}:
            return False
        compact = self._compact[node.input[0]]
        self._keep(node, compact.selection, compact.fill)
        return True

    def _reshaping(self, node: onnx.NodeProto) -> bool:
        """Keeps a tensor compact if its channels stay apart."""
        before, after = self._shapes[node.input[0]], self._shapes.get(node.output[0], ())
        sizes = [size for size in after[2:] if size is not None]
        if node.input[0] not in self._compact or before[:2] != after[:2] or len(sizes) != len(after) - 2:
            return False
        compact = self._compact[node.input[0]]
        output = self._weights.reshape(compact.value, (1, -1, *sizes), f"{node.output[0]}/compact")
        self._compact[node.output[0]] = _Compact(output, compact.selection, compact.fill)
        return True

    def _is_blank(self, name: str) -> bool:
        """Says whether a tensor is compact with zeros in the channels that it does not hold."""
        return name in self._compact and not self._compact[name].fill

    def _keep(self, node: onnx.NodeProto, selection: Selection, fill: float, inputs: list[str] | None = None) -> None:
        """Writes a node that reads and gives compact tensors."""
        result = onnx.NodeProto()
        result.CopyFrom(node)
        read = inputs or [self._compact[name].value if name in self._compact else name for name in node.input]
        del result.input[:]
        result.input.extend(read)
        result.output[0] = self._writer.fresh(f"{node.output[0]}/compact")
        self._writer.copy(result)
        self._compact[node.output[0]] = _Compact(result.output[0], selection, fill)

    def _full(self, name: str) -> str:
        """Makes sure that the full tensor of a value is written, and returns its name, which is the value's."""
        compact = self._compact.get(name)
        if compact is None or name in self._filled:
            return name
        self._filled.add(name)
        shape = [size for size in self._shapes[name] if size is not None]
        if len(shape) != len(self._shapes[name]):
            raise ExportError(
                f"The size of '{name}' behind gate '{compact.selection.gate}' is {self._shapes[name]}, expected "
                "numbers. Export with a fixed picture size, or leave that gate out of those that are gathered."
            )
        if math.prod(shape) == shape[1]:
            self._fill_vector(name, compact, shape)
        else:
            self._fill_picture(name, compact, shape)
        return name

    def _fill_vector(self, name: str, compact: _Compact, shape: list[int]) -> None:
        ground = self._writer.constant(
            np.full(shape, compact.fill, np.float32), f"gate/ground_{_spelled(shape, compact.fill)}"
        )
        index = self._weights.channels(compact.selection, (1, -1, *shape[2:]))
        self._writer.node("ScatterElements", [ground, index, compact.value], name, axis=1)

    def _fill_picture(self, name: str, compact: _Compact, shape: list[int]) -> None:
        axis = self._writer.constant(np.array([0]), "gate/batch_axis")
        ground = self._ground(shape[1:], compact.fill)
        total = self._scatter(ground, compact, name)
        self._writer.node("Unsqueeze", [total, axis], name)

    def _ground(self, shape: list[int], fill: float) -> str:
        """Writes a tensor full of one number; it takes no room in the file."""
        name = f"gate/ground_{_spelled(shape, fill)}"
        if name not in self._filled:
            self._filled.add(name)
            sizes = self._writer.constant(np.array(shape), f"gate/sizes_{_spelled(shape)}")
            value = onnx.helper.make_tensor("value", onnx.TensorProto.FLOAT, [1], [fill])
            self._writer.copy(onnx.helper.make_node("ConstantOfShape", [sizes], [name], name=name, value=value))
        return name

    def _scatter(self, data: str, compact: _Compact, name: str, **attributes: str) -> str:
        """Writes the open channels into, or adds them to, a ``(C, …)`` tensor."""
        axis = self._writer.constant(np.array([0]), "gate/batch_axis")
        updates = self._writer.node("Squeeze", [compact.value, axis], f"{name}/updates")
        index = self._weights.channels(compact.selection, (-1, 1))
        return self._writer.node("ScatterND", [data, index, updates], f"{name}/scattered", **attributes)


def _spelled(shape: Iterable[int], fill: float | None = None) -> str:
    sizes = "x".join(map(str, shape))
    return sizes if not fill else f"{sizes}_{fill:.9g}"


def _on_scalars(node: onnx.NodeProto, fills: Mapping[str, float], constants: Mapping[str, Array], opset: int) -> float:
    """Returns what an elementwise node computes from numbers: onnx's own reference says it."""
    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    del alone.output[1:]
    feeds: dict[str, Array] = {name: np.full((1, 1), fill, np.float32) for name, fill in fills.items()}
    feeds.update(constants)
    ports = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    result = onnx.helper.make_tensor_value_info(alone.output[0], onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([alone], "numbers", ports, [result])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    (output,) = ReferenceEvaluator(model).run(None, feeds)
    return float(np.asarray(output).reshape(-1)[0])
