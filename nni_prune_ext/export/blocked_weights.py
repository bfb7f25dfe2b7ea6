"""Weights of convolutions in the blocked layout of ONNX Runtime, whole or picked by open blocks.

A ``(O, I, kh, kw)`` weight is stored as ``(O/b, I/b, kh, kw, b of I, b of O)``; that of a convolution with fewer than b
input channels, which reads the standard layout, as ``(O/b, I, kh, kw, b of O)``. Kernels are told the usual shape.
"""

from __future__ import annotations

import math

import numpy as np

from nni_prune_ext.export.graph_index import Array
from nni_prune_ext.export.graph_writer import GraphWriter
from nni_prune_ext.export.picked_values import Picked, PickedValues


class BlockedWeights:
    """Writes weights, biases and numbers of blocks into a graph."""

    def __init__(self, writer: GraphWriter, picked: PickedValues, block: int) -> None:
        self._writer, self._picked, self._block = writer, picked, block
        self._starts: dict[tuple[str, int], str] = {}
        self._blocks: dict[str, str | None] = {}

    def weight(self, name: str) -> str:
        """Writes the weight of a convolution that reads a blocked tensor."""
        found, size = self._found(name), self._block
        rows, columns = found.indices.get(0), found.indices.get(1)
        value = _filled_up(_filled_up(found.value, 0, size), 1, size)
        outputs, inputs, *kernel = value.shape
        parts = value.reshape(outputs // size, size, inputs // size, size, *kernel)
        stored = np.ascontiguousarray(parts.transpose(0, 2, 4, 5, 3, 1))
        piece = math.prod(kernel) * size  # one filter's or input channel's share of a block
        if rows and columns:
            pieces = self._writer.constant(stored.reshape(-1, piece * size), f"{name}/blocked")
            places = self._writer.node("Add", [self._row_starts(rows, inputs // size), columns], f"{name}/places")
            picked = self._writer.node("Gather", [pieces, places], f"{name}/rows_and_columns", axis=0)
            # Two sizes are open: the first Reshape finds the number of filters, the second that of input channels.
            picked = self.reshape(picked, (-1, 0, piece), f"{name}/filters")
            return self.reshape(picked, (0, -1, *kernel), f"{name}/picked")
        if rows:
            return self._rows(name, stored, rows, (-1, inputs, *kernel))
        if columns:
            whole = self._writer.constant(stored.reshape(outputs // size, inputs // size, -1), f"{name}/blocked")
            picked = self._writer.node("Gather", [whole, columns], f"{name}/columns", axis=1)
            return self.reshape(picked, (outputs, -1, *kernel), f"{name}/picked")
        return self._writer.constant(stored.reshape(value.shape), f"{name}/blocked")

    def first_weight(self, name: str) -> str:
        """Writes the weight of a convolution with few input channels, which reads a tensor in the standard layout."""
        found, size = self._found(name), self._block
        value = _filled_up(found.value, 0, size)
        outputs, inputs, *kernel = value.shape
        stored = np.ascontiguousarray(value.reshape(outputs // size, size, inputs, *kernel).transpose(0, 2, 3, 4, 1))
        if 0 in found.indices:
            return self._rows(name, stored, found.indices[0], (-1, inputs, *kernel))
        return self._writer.constant(stored.reshape(value.shape), f"{name}/blocked")

    def bias(self, name: str) -> str:
        """Writes a constant bias, filled up to whole blocks with zeros."""
        value = self._found(name).value
        if len(value) % self._block == 0:
            return name
        return self._writer.constant(_filled_up(value, 0, self._block), f"{name}/blocked")

    def blocks(self, name: str) -> str | None:
        """Writes ``(K, 1)`` numbers of blocks for picked numbers of channels, if those are whole blocks in place."""
        if name not in self._blocks:
            self._blocks[name] = self._write_blocks(name)
        return self._blocks[name]

    def _write_blocks(self, name: str) -> str | None:
        found = self._picked.find(name)
        index = found.indices.get(0) if found and len(found.indices) == 1 else None
        if found is None or index is None or found.value.size != self._picked.blocks[index] * self._block:
            return None
        channels = found.value.reshape(-1, self._block)
        numbers = channels[:, 0].astype(np.int64) // self._block
        if not np.array_equal(channels, numbers[:, None] * self._block + np.arange(self._block)):
            return None
        if np.array_equal(numbers, np.arange(len(numbers))):
            return self.reshape(index, (-1, 1), f"{name}/blocks")
        stored = self._writer.constant(numbers[:, None], f"{name}/of_blocks")
        return self._writer.node("Gather", [stored, index], f"{name}/blocks", axis=0)

    def reshape(self, source: str, shape: tuple[int, ...], name: str) -> str:
        """Writes a Reshape to a fixed shape, in which 0 keeps a size and -1 takes what remains."""
        target = self._writer.constant(np.array(shape), "blocked/shape_" + "_".join(map(str, shape)).replace("-1", "n"))
        return self._writer.node("Reshape", [source, target], name)

    def _found(self, name: str) -> Picked:
        found = self._picked.find(name)
        assert found is not None, "only known weights are stored in blocks"
        return found

    def _rows(self, name: str, stored: Array, rows: str, shape: tuple[int, ...]) -> str:
        whole = self._writer.constant(stored.reshape(stored.shape[0], -1), f"{name}/blocked")
        return self.reshape(self._writer.node("Gather", [whole, rows], f"{name}/rows", axis=0), shape, f"{name}/picked")

    def _row_starts(self, rows: str, columns: int) -> str:
        """Writes the number of the first piece of each open block of filters, ``(K, 1)``."""
        key = rows, columns
        if key not in self._starts:
            starts = np.arange(self._picked.blocks[rows])[:, None] * columns
            stored = self._writer.constant(starts, f"{rows}/starts_{columns}")
            self._starts[key] = self._writer.node("Gather", [stored, rows], f"{rows}/starts", axis=0)
        return self._starts[key]


def _filled_up(value: Array, axis: int, block: int) -> Array:
    """Appends zeros until a size is a multiple of the block."""
    missing = -value.shape[axis] % block
    return np.pad(value, [(0, missing if own == axis else 0) for own in range(value.ndim)])
