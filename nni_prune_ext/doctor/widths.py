"""Channel groups of an ONNX graph, and the same graph with some of them wider or narrower, to be timed.

Wider groups get channels of zeros, so that the network computes what it did; narrower ones lose their last channels,
which makes another function of the same shapes. Where an operator mixes or moves channels in a way that is not followed
here, the groups that reach it keep their widths: nothing is proposed for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from nni_prune_ext.doctor.network import Network
from nni_prune_ext.export.graph_cleaning import constants_to_initializers

_PER_CHANNEL = frozenset(
    ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Selu", "Softplus", "Erf",
     "Sqrt", "Exp", "Identity", "Dropout", "Cast", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
)  # fmt: skip
_BETWEEN = frozenset({"Add", "Sub", "Mul", "Div"})
Axis: TypeAlias = tuple[tuple[int, int], ...]
"""An axis as a row of segments: (group, positions per channel)."""


@dataclass(frozen=True)
class WidthGroup:
    """Channels of a graph that can only be resized together.

    Attributes:
        root: the first layer that writes them.
        layers: all layers that write or read them.
        width: their number.
    """

    root: str
    layers: tuple[str, ...]
    width: int


class Widths:
    """The widths of a graph that can be changed."""

    def __init__(self, network: Network) -> None:
        """Follows the channels through the graph."""
        self._model = onnx.ModelProto()
        self._model.CopyFrom(network.model)
        constants_to_initializers(self._model)
        self._layer_of_node = network.layer_of_node
        self._shapes = network.shapes
        self._weights = {tensor.name: tuple(tensor.dims) for tensor in self._model.graph.initializer}
        self._sizes: list[int] = []
        self._parent: list[int] = []
        self._fixed: set[int] = set()
        self._values: dict[str, Axis] = {}
        self._axes: dict[tuple[str, int], Axis] = {}
        self._grouped: dict[int, Axis] = {}  # number of a depthwise node → its channels
        self._written: dict[int, list[str]] = {}
        self._read: dict[int, list[str]] = {}
        self._follow()

    def groups(self) -> tuple[WidthGroup, ...]:
        """Returns the groups that can be resized, in the order of the graph."""
        fixed = {self._find(index) for index in self._fixed}
        writers = self._by_group(self._written)
        readers = self._by_group(self._read)
        return tuple(
            WidthGroup(names[0], tuple(dict.fromkeys([*names, *readers.get(group, ())])), self._sizes[group])
            for group, names in writers.items()
            if group not in fixed
        )

    def resized(self, widths: Mapping[str, int]) -> onnx.ModelProto:
        """Returns the graph with other widths.

        Args:
            widths: root of a group → its new number of channels.
        """
        roots = {names[0]: group for group, names in self._by_group(self._written).items()}
        new = {roots[root]: width for root, width in widths.items()}
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        changed = {key: axis for key, axis in self._axes.items() if any(self._find(g) in new for g, _ in axis)}
        for name in {name for name, _ in changed}:
            array = numpy_helper.to_array(tensors[name])
            for (owner, dim), axis in changed.items():
                if owner == name:
                    array = self._resized_axis(array, dim, axis, new)
            tensors[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))
        for index, axis in self._grouped.items():
            count = next(a for a in model.graph.node[index].attribute if a.name == "group")
            count.i = sum(new.get(self._find(group), self._sizes[group]) for group, _ in axis)
        return model

    def _resized_axis(
        self, array: NDArray[np.generic], dim: int, axis: Axis, new: Mapping[int, int]
    ) -> NDArray[np.generic]:
        parts, start = [], 0
        for group, factor in axis:
            old = self._sizes[group]
            wanted = new.get(self._find(group), old)
            part = np.take(array, range(start, start + min(old, wanted) * factor), axis=dim)
            padding = [(0, max(wanted - old, 0) * factor if index == dim else 0) for index in range(array.ndim)]
            parts.append(np.pad(part, padding))
            start += old * factor
        return np.concatenate(parts, axis=dim)

    def _by_group(self, layers: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
        result: dict[int, list[str]] = {}
        for group, names in layers.items():
            result.setdefault(self._find(group), []).extend(names)
        return result

    # -- following the graph -----------------------------------------------------------------------------------

    def _follow(self) -> None:
        graph = self._model.graph
        for port in graph.input:
            if port.name not in self._weights:
                self._values[port.name] = self._fixed_axis(port.name)
        for index, node in enumerate(graph.node):
            if not self._step(index, node):
                self._fix(self._values.get(name, ()) for name in node.input)
                for name in node.output:
                    self._values[name] = self._fixed_axis(name)
        self._fix(self._values.get(port.name, ()) for port in graph.output)
        if any(a.type == onnx.AttributeProto.GRAPH for node in graph.node for a in node.attribute):
            self._fixed.update(range(len(self._sizes)))  # branches may read any value of the graph

    def _step(self, index: int, node: onnx.NodeProto) -> bool:
        """Follows one node; says whether its kind is known."""
        source = self._values.get(node.input[0], ()) if node.input else ()
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            return self._weighted(index, node, source)
        if node.op_type in _PER_CHANNEL:
            self._values[node.output[0]] = source
        elif node.op_type == "BatchNormalization":
            for name in node.input[1:]:
                self._tie((name, 0), source)
            self._values[node.output[0]] = source
        elif node.op_type in _BETWEEN:
            return self._between(node)
        elif node.op_type == "Concat" and _integer(node, "axis", 0) == 1:
            self._values[node.output[0]] = tuple(part for name in node.input for part in self._values.get(name, ()))
        elif node.op_type == "ReduceMean" and self._spatial_mean(node):
            self._values[node.output[0]] = source
        elif node.op_type in ("Flatten", "Reshape") and self._flattens(node):
            places = math.prod(self._shapes[node.input[0]][2:])
            self._values[node.output[0]] = tuple((group, factor * places) for group, factor in source)
            node.op_type = "Flatten"  # a reshape names the width, which may change
            del node.input[1:], node.attribute[:]
        else:
            return False
        return True

    def _weighted(self, index: int, node: onnx.NodeProto, source: Axis) -> bool:
        weight = self._weights.get(node.input[1])
        if weight is None or len(self._shapes.get(node.input[0], ())) != (2 if len(weight) == 2 else len(weight)):
            return False
        layer = self._layer_of_node.get(node.name)
        if layer is None:
            return False
        groups = _integer(node, "group", 1)
        if groups > 1:
            if node.op_type != "Conv" or weight[:2] != (groups, 1):
                return False
            self._tie((node.input[1], 0), source)
            self._grouped[index] = target = source
        else:
            linear_out = 0 if _integer(node, "transB", 0) else 1
            out_dim = 0 if node.op_type == "Conv" else 1 if node.op_type == "ConvTranspose" else linear_out
            self._tie((node.input[1], 1 - out_dim), source)
            target = self._new_axis(weight[out_dim])
            self._tie((node.input[1], out_dim), target)
            for group, _ in target:
                self._written.setdefault(group, []).append(layer)
        for group, _ in source:
            self._read.setdefault(group, []).append(layer)
        for name in node.input[2:]:
            self._tie((name, len(self._weights.get(name, (0,))) - 1), target)
        self._values[node.output[0]] = target
        return True

    def _between(self, node: onnx.NodeProto) -> bool:
        """Ties two operands channel by channel; a parameter may have one value for all channels."""
        rank = len(self._shapes.get(node.output[0], ()))
        axes = [self._values[name] for name in node.input if self._values.get(name)]
        if rank < 2 or not axes:
            return False
        for axis in axes[1:]:
            self._unite(axes[0], axis)
        for name in node.input:
            shape = self._weights.get(name, ())
            dim = len(shape) - (rank - 1)
            if dim >= 0 and shape[dim] > 1:
                self._tie((name, dim), axes[0])
            if name not in self._weights and not self._values.get(name):
                return False
        self._values[node.output[0]] = axes[0]
        return True

    def _spatial_mean(self, node: onnx.NodeProto) -> bool:
        given = [dim for attribute in node.attribute if attribute.name == "axes" for dim in attribute.ints]
        tensors = [t for t in self._model.graph.initializer if t.name in node.input[1:]]  # where opset 18 has them
        given += [int(dim) for tensor in tensors for dim in numpy_helper.to_array(tensor)]
        rank = len(self._shapes.get(node.input[0], ()))
        return bool(given) and rank > 2 and all(dim % rank >= 2 for dim in given)

    def _flattens(self, node: onnx.NodeProto) -> bool:
        before, after = self._shapes.get(node.input[0], ()), self._shapes.get(node.output[0], ())
        return len(before) >= 2 and after == (before[0], math.prod(before[1:]))

    # -- groups ------------------------------------------------------------------------------------------------

    def _new_axis(self, size: int) -> Axis:
        self._sizes.append(size)
        self._parent.append(len(self._parent))
        return ((len(self._parent) - 1, 1),)

    def _fixed_axis(self, name: str) -> Axis:
        shape = self._shapes.get(name, ())
        if len(shape) < 2:
            return ()
        axis = self._new_axis(shape[1])
        self._fix([axis])
        return axis

    def _fix(self, axes: Iterable[Axis]) -> None:
        self._fixed.update(group for axis in axes for group, _ in axis)

    def _tie(self, key: tuple[str, int], axis: Axis) -> None:
        """Says that an axis of a parameter has the channels of a value."""
        name, dim = key
        if name not in self._weights or sum(self._sizes[g] * factor for g, factor in axis) != self._weights[name][dim]:
            self._fix([axis])  # it is computed, or something about it is not understood
        elif key in self._axes:
            self._unite(self._axes[key], axis)
        else:
            self._axes[key] = axis

    def _unite(self, first: Axis, second: Axis) -> None:
        alike = [(self._sizes[g], factor) for g, factor in first] == [(self._sizes[g], factor) for g, factor in second]
        if not alike:
            self._fix([first, second])
            return
        for (one, _), (other, _) in zip(first, second):
            low, high = sorted((self._find(one), self._find(other)))
            self._parent[high] = low

    def _find(self, group: int) -> int:
        while self._parent[group] != group:
            group = self._parent[group]
        return group


def _integer(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)
