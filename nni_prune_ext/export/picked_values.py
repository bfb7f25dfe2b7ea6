"""What a compact graph picks by its open blocks: weights, biases and channel numbers, found by evaluation.

A picked value is computed from constants and index lists alone. Evaluated with all blocks open it is the whole value;
evaluated with every second block open it shows which axis an index picks from. So nothing here depends on the nodes
with which the compact form happens to pick.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from nni_prune_ext.export.graph_index import Array, GraphIndex, Shape, attribute

_LONGEST_CHAIN = 64
"""More nodes than this do not compute a picked value: one takes at most a dozen."""


@dataclass(frozen=True)
class Picked:
    """A constant, or what open blocks pick from one.

    Attributes:
        value: all of it, in the order in which compact tensors hold channels.
        indices: axis → name of the list of open blocks that picks from it, for the axes that are picked from.
    """

    value: Array
    indices: Mapping[int, str]


class PickedValues:
    """The picked values of a compact graph; each is evaluated once."""

    def __init__(self, graph: onnx.GraphProto, shapes: Mapping[str, Shape], opset: int) -> None:
        self._index = GraphIndex(graph)
        self._opset = opset
        self.blocks = _index_lists(self._index, shapes)
        """Name of each list of open blocks → number of blocks, open or not."""
        self._known: dict[str, Picked | None] = {}

    def find(self, name: str) -> Picked | None:
        """Returns a constant, or what is picked from one, or None if the value is something else."""
        if name not in self._known:
            self._known[name] = self._find(name)
        return self._known[name]

    def _find(self, name: str) -> Picked | None:
        constant = self._index.constant(name)
        if constant is not None:
            return Picked(constant, {})
        nodes = self._chain(name)
        if nodes is None:
            return None
        lists = sorted({own for node in nodes for own in node.input} & self.blocks.keys())
        reference = self._reference(name, nodes, lists)
        everything: dict[str, Array] = {own: np.arange(self.blocks[own]) for own in lists}
        (value,) = reference.run(None, everything)
        indices: dict[int, str] = {}
        for own in lists:
            some = np.arange(self.blocks[own])[::2]
            (kept,) = reference.run(None, {**everything, own: some})
            axis = _picked_axis(np.asarray(value), np.asarray(kept), self.blocks[own], some)
            if axis is None or axis in indices:
                return None
            indices[axis] = own
        return Picked(np.asarray(value), indices)

    def _chain(self, name: str) -> list[onnx.NodeProto] | None:
        """Returns the nodes that compute a value from constants and lists of open blocks, in order, if it is so."""
        found: dict[str, onnx.NodeProto] = {}

        def visit(own: str) -> bool:
            if not own or own in found or own in self.blocks or own in self._index.constants:
                return True
            node = self._index.writers.get(own)
            if node is None or node.domain or len(node.output) != 1 or len(found) > _LONGEST_CHAIN:
                return False
            if not all(visit(read) for read in node.input):
                return False
            found[own] = node
            return True

        return list(found.values()) if visit(name) else None

    def _reference(self, name: str, nodes: list[onnx.NodeProto], lists: list[str]) -> ReferenceEvaluator:
        """Returns what computes a value from lists of open blocks."""
        read = {own for node in nodes for own in node.input}
        constants = [self._index.constants[own] for own in sorted(read & self._index.constants.keys())]
        ports = [onnx.helper.make_tensor_value_info(own, onnx.TensorProto.INT64, [None]) for own in lists]
        result = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None)
        graph = onnx.helper.make_graph(nodes, "picked", ports, [result], constants)
        return ReferenceEvaluator(
            onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", self._opset)])
        )


def _index_lists(index: GraphIndex, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Returns the lists of open blocks: the second row of what NonZero says about one row of blocks."""
    found = {}
    for name, node in index.writers.items():
        source = index.writers.get(node.input[0]) if node.op_type == "Gather" and not node.domain else None
        if source is None or source.op_type != "NonZero" or attribute(node, "axis") not in (None, 0):
            continue
        row, sizes = index.constant(node.input[1]), shapes.get(source.input[0], ())
        if row is not None and row.shape == () and int(row) == 1 and len(sizes) == 2 and sizes[0] == 1 and sizes[1]:
            found[name] = sizes[1]
    return found


def _picked_axis(value: Array, kept: Array, blocks: int, some: Array) -> int | None:
    """Returns the axis of which some blocks were kept, or None if that is not what happened, or one block is all."""
    if value.ndim != kept.ndim:
        return None
    axes = [axis for axis, size in enumerate(value.shape) if size != kept.shape[axis]]
    if len(axes) != 1 or value.shape[axes[0]] % blocks:
        return None
    places = np.arange(value.shape[axes[0]]).reshape(blocks, -1)[some].reshape(-1)
    return axes[0] if np.array_equal(value.take(places, axis=axes[0]), kept) else None
