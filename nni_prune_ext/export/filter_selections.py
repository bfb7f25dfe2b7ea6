"""Which filters of a gated convolution are open, as index tensors, and the weights and tensors that they pick."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nni_prune_ext.export.gate_markers import Marker, write_open
from nni_prune_ext.export.graph_index import Array, GraphIndex
from nni_prune_ext.export.graph_writer import GraphWriter

_ONE_PASS_WEIGHTS = 2**18
"""Picking rows and columns at once pays from this size on (measured on ONNX Runtime 1.31: 10 to 45 % faster above, a
few microseconds slower below, and slower for 1x1 kernels)."""


@dataclass(frozen=True)
class Selection:
    """The open filters of one gate for the input at hand.

    Channels that open together are moved next to each other, so that a gather moves blocks. The size of a block is
    the largest that divides every unit: with units of 16, 16 and 12 channels, blocks of 4.

    Attributes:
        gate: Name of the gate.
        order: The original channel at each place, block after block.
        block: Channels per block.
        index: Name of the value that holds the numbers of the open blocks, ``(K,)`` int64, ascending, never empty.
    """

    gate: str
    order: tuple[int, ...]
    block: int
    index: str

    @property
    def blocks(self) -> int:
        """Number of blocks, open or not."""
        return len(self.order) // self.block

    @property
    def in_place(self) -> bool:
        """Whether the channels have their original order."""
        return self.order == tuple(range(len(self.order)))


def write_selection(writer: GraphWriter, marker: Marker) -> Selection:
    """Writes the nodes that find the open blocks of a gate."""
    units = np.asarray(marker.units)
    block = math.gcd(*np.bincount(units).tolist())
    order = np.argsort(units, kind="stable") if block > 1 else np.arange(len(units))
    unit_of_block = units[order][::block]
    prefix = f"gate/{marker.name}"
    mask = write_open(writer, marker)
    if not np.array_equal(unit_of_block, np.arange(marker.num_units)):
        mask = writer.node(
            "Gather", [mask, writer.constant(unit_of_block, f"{prefix}/units")], f"{prefix}/blocks", axis=1
        )
    places = writer.node("NonZero", [mask], f"{prefix}/places")  # (2, K): numbers of inputs, all 0, and of blocks
    second = writer.constant(np.asarray(1), "gate/second")
    index = writer.node("Gather", [places, second], f"{prefix}/index", axis=0)
    return Selection(marker.name, tuple(order.tolist()), block, index)


class SelectedWeights:
    """Weights of which a graph picks rows (filters) and columns (input channels) when it runs.

    They are stored so that a gather finds what it moves in one piece, once per way of picking; a weight whose order
    stays keeps its initializer.
    """

    def __init__(self, writer: GraphWriter, index: GraphIndex) -> None:
        self._writer = writer
        self._index = index
        self._channels: dict[tuple[str, tuple[int, ...]], str] = {}

    def weight(self, name: str, rows: Selection | None, columns: Selection | None) -> str:
        """Writes the nodes that pick rows and columns of a ``(O, I, …)`` weight; rows first, which leaves less."""
        value = self._index.constant(name)
        assert value is not None, "only constant weights are picked from"
        inputs, kernel = value.shape[1], value.shape[2:]
        if rows and columns and value.size >= _ONE_PASS_WEIGHTS and math.prod(kernel) > 1:
            return self._in_one_pass(name, value, rows, columns)
        stored = _in_blocks(value, rows, columns)
        picked = name if stored.shape == value.shape and _in_order(rows, columns) else None
        picked = picked or self._writer.constant(stored, f"{name}/blocks")
        if rows:
            picked = self._gather(picked, rows, 0, f"{name}/rows")
            if rows.block > 1:
                after = (columns.blocks, columns.block) if columns and columns.block > 1 else (inputs,)
                picked = self.reshape(picked, (-1, *after, *kernel), f"{name}/filters")
        if columns:
            picked = self._gather(picked, columns, 1, f"{name}/columns")
            if columns.block > 1:
                picked = self.reshape(picked, (0, -1, *kernel), f"{name}/picked")
        return picked

    def _in_one_pass(self, name: str, value: Array, rows: Selection, columns: Selection) -> str:
        """Picks rows and columns at once, by their place among all pieces of one row and one block of columns."""
        places = np.arange(value.shape[0]) * columns.blocks
        key = rows.gate, (columns.blocks, 0)
        if key not in self._channels:
            stored = self._writer.constant(places.reshape(-1, rows.block), f"gate/{rows.gate}/starts_{columns.blocks}")
            starts = self._gather(stored, rows, 0, f"{name}/starts")
            self._channels[key] = starts if rows.block == 1 else self.reshape(starts, (-1, 1), f"{name}/starts_of_rows")
        order = value[np.asarray(rows.order)][:, np.asarray(columns.order)]
        pieces = np.ascontiguousarray(order).reshape(-1, columns.block, *value.shape[2:])
        index = self._writer.node("Add", [self._channels[key], columns.index], f"{name}/pieces_picked")
        stored = self._writer.constant(pieces, f"{name}/pieces")
        picked = self._writer.node("Gather", [stored, index], f"{name}/rows_and_columns", axis=0)
        return self.reshape(picked, (0, -1, *value.shape[2:]), f"{name}/picked")

    def bias(self, name: str, rows: Selection) -> str:
        """Writes the nodes that pick the open filters' entries of a ``(O,)`` bias."""
        value = self._index.constant(name)
        assert value is not None, "only constant biases are picked from"
        stored = _in_blocks(value, rows, None)
        source = name if rows.block == 1 and rows.in_place else self._writer.constant(stored, f"{name}/blocks")
        picked = self._gather(source, rows, 0, f"{name}/rows")
        return picked if rows.block == 1 else self.reshape(picked, (-1,), f"{name}/picked")

    def channels(self, selection: Selection, shape: tuple[int, ...] = (-1,)) -> str:
        """Returns the numbers of the open channels, in the order in which compact tensors hold them.

        Args:
            selection: What is open.
            shape: Shape of the result: ones, and -1 for the number of open channels.
        """
        key = selection.gate, shape
        if key not in self._channels:
            self._channels[key] = self._write_channels(selection, shape)
        return self._channels[key]

    def _write_channels(self, selection: Selection, shape: tuple[int, ...]) -> str:
        if selection.block == 1 and shape == (-1,):
            return selection.index
        prefix = f"gate/{selection.gate}"
        if selection.block == 1:
            return self.reshape(selection.index, shape, f"{prefix}/channels")
        order = self._writer.constant(np.asarray(selection.order).reshape(-1, selection.block), f"{prefix}/order")
        picked = self._gather(order, selection, 0, f"{prefix}/channels_of_blocks")
        return self.reshape(picked, shape, f"{prefix}/channels")

    def reshape(self, source: str, shape: tuple[int, ...], name: str) -> str:
        """Writes a Reshape to a fixed shape, in which 0 keeps a size and -1 takes what remains."""
        target = self._writer.constant(np.array(shape), "gate/shape_" + "_".join(map(str, shape)).replace("-1", "n"))
        return self._writer.node("Reshape", [source, target], name)

    def _gather(self, source: str, selection: Selection, axis: int, name: str) -> str:
        return self._writer.node("Gather", [source, selection.index], name, axis=axis)


def _in_order(*selections: Selection | None) -> bool:
    return all(selection is None or selection.in_place for selection in selections)


def _in_blocks(value: Array, rows: Selection | None, columns: Selection | None) -> Array:
    """Moves the rows and columns of a weight to their places and splits axes so that every block is one entry.

    Columns next to rows in blocks stay unsplit: the Reshape after the rows' Gather splits them.
    """
    kernel = value.shape[2:]
    if rows:
        value = value[np.asarray(rows.order)]
    if columns:
        value = value[:, np.asarray(columns.order)]
    if rows and rows.block > 1:
        return np.ascontiguousarray(value).reshape(rows.blocks, rows.block, *value.shape[1:])
    if columns and columns.block > 1:
        return np.ascontiguousarray(value).reshape(value.shape[0], columns.blocks, columns.block, *kernel)
    return np.ascontiguousarray(value)
