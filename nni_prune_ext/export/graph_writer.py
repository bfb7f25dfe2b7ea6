"""Nodes and constants of a graph that is being rewritten, with names that nothing else has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from nni_prune_ext.export.graph_index import Array, names_read


class GraphWriter:
    """Collects nodes in the order of their calculation, and the constants that they need besides the graph's own."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, Array] = {}
        self._taken = {value.name for value in (*graph.input, *graph.initializer)}
        # Names that the graph's own nodes use stay free for exactly one writer: the node or what replaces it.
        self._known = {name for node in graph.node for name in (*node.output, *names_read(node))}

    def copy(self, node: onnx.NodeProto) -> None:
        """Adds a node as it is."""
        self.nodes.append(node)

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        output: str,
        *,
        domain: str = "",
        **attributes: int | float | str | Sequence[int],
    ) -> str:
        """Adds a node with one output and returns that output's name, with a number behind it if it was taken.

        A name of the original graph is given as it is: the new node then takes the place of the old one.
        """
        name = output if output in self._known else self.fresh(output)
        node = onnx.helper.make_node(op_type, list(inputs), [name], name=name, domain=domain)
        node.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)
        return name

    def fresh(self, name: str) -> str:
        """Returns the name, with a number behind it if it was taken, and keeps it from being taken again."""
        candidate, number = name, 1
        while candidate in self._taken or candidate in self._known:
            number += 1
            candidate = f"{name}_{number}"
        self._taken.add(candidate)
        return candidate

    def constant(self, value: Array, name: str) -> str:
        """Returns the name of a constant with this value; equal values under one name are stored once."""
        candidate, number = name, 1
        while candidate in self._taken or candidate in self._known:
            stored = self._constants.get(candidate)
            if stored is not None and stored.dtype == value.dtype and np.array_equal(stored, value):
                return candidate
            number += 1
            candidate = f"{name}_{number}"
        self._taken.add(candidate)
        self._constants[candidate] = value
        return candidate

    def finish(self, graph: onnx.GraphProto) -> None:
        """Puts the collected nodes in place of the graph's own and adds the constants."""
        _replace_nodes(graph, self.nodes)
        for name, value in self._constants.items():
            graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))


def _replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    copies, names = [], {""}
    for node in nodes:  # deleting a node of the graph would empty it, if it is one of these
        result = onnx.NodeProto()
        result.CopyFrom(node)
        number = 1
        while node.name and result.name in names:  # ONNX Runtime refuses two nodes of one name
            number += 1
            result.name = f"{node.name}_{number}"
        names.add(result.name)
        copies.append(result)
    del graph.node[:]
    graph.node.extend(copies)
