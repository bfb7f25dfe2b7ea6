"""The latency of a network from its shapes: measured layers, drawn level with measured networks.

The times of the layers, alone, are added up. What a sum misses (activations, pooling, reordering between layers) is in
a curve from this sum to the time of the whole network, as a share of the dense one's, through a few networks that were
measured; a factor corrects it for the kind of network that is in question.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from nni_prune_ext.graph.channel_groups import ChannelGroups
from nni_prune_ext.latency.layers import Layer
from nni_prune_ext.latency.stopwatch import Stopwatch

_PARTS = (1, 2, 8)
"""Widths at which a layer is measured: the full one, and these parts of it."""


class LayerTable(BaseModel):
    """Measured times of one layer at some widths, in milliseconds.

    Attributes:
        read: channels that it reads, ascending.
        written: channels that it writes, ascending.
        ms: ``[read][written]``, growing in both directions; one column where ``written`` follows from ``read``.
        step: times grow in steps of so many channels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: Layer
    read: tuple[int, ...]
    written: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]
    step: int

    def at(self, shape: Sequence[int]) -> float:
        """Returns the time of the layer with a weight of this shape."""
        read, written = self.layer.widths(shape)
        read, written = _stepped(read, self.step, self.read[-1]), _stepped(written, self.step, self.written[-1])
        columns = [float(np.interp(read, self.read, column)) for column in zip(*self.ms)]
        return columns[0] if len(columns) == 1 else float(np.interp(written, self.written, columns))


class LatencyPredictor(BaseModel):
    """Shapes to milliseconds; a callable for :class:`~nni_prune_ext.allocation.CostModel`.

    Attributes:
        tables: one per call of a layer.
        curve: ``(sum of the layers in ms, share of the dense latency)``, both growing; the last one is the dense model.
        dense_ms: measured latency of the dense model.
        correction: factor on the share of every network but the dense one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tables: tuple[LayerTable, ...]
    curve: tuple[tuple[float, float], ...]
    dense_ms: float
    correction: float = 1.0

    def __call__(self, shapes: Mapping[str, Sequence[int]]) -> float:
        """Returns the latency in milliseconds."""
        total = self.layers_ms(shapes)
        dense = total >= self.curve[-1][0] * (1 - 1e-9)
        return self.dense_ms * (1.0 if dense else min(self.correction * self._uncorrected(total), 1.0))

    def layers_ms(self, shapes: Mapping[str, Sequence[int]]) -> float:
        """Returns the sum of the layers' own times."""
        return sum(table.at(shapes[table.layer.weight]) for table in self.tables)

    def uncorrected_share(self, shapes: Mapping[str, Sequence[int]]) -> float:
        """Returns the share of the dense latency that the curve alone predicts."""
        return self._uncorrected(self.layers_ms(shapes))

    def _uncorrected(self, total: float) -> float:
        return float(np.interp(total, [x for x, _ in self.curve], [y for _, y in self.curve]))

    def through(self, points: Iterable[tuple[float, float]], dense_ms: float) -> LatencyPredictor:
        """Returns the predictor with a curve through measured networks, beside the dense one.

        Args:
            points: ``(sum of the layers in ms, share of the dense latency)`` of each.
        """
        curve = [*sorted(points), (self.curve[-1][0], 1.0)]
        shares = np.minimum.accumulate([share for _, share in curve][::-1])[::-1].tolist()
        return self.model_copy(
            update={"curve": tuple((x, y) for (x, _), y in zip(curve, shares)), "dense_ms": dense_ms}
        )

    def corrected(self, correction: float) -> LatencyPredictor:
        """Returns the predictor with another correction."""
        return self.model_copy(update={"correction": correction})


def measured_tables(
    layers: Sequence[Layer], groups: ChannelGroups, stopwatch: Stopwatch, step: int
) -> LatencyPredictor:
    """Measures all layers at the widths that cuts can lead to.

    Returns:
        a predictor that knows no whole network yet.
    """
    cut = {(member.tensor, member.dim) for group in groups for member in group.members}
    grids = [(layer, *_grid(layer, groups.shapes[layer.weight], cut, step)) for layer in layers]
    times = stopwatch.layers_ms(
        (layer, own, _partner(layer, own, other)) for layer, read, written in grids for own in read for other in written
    )
    tables = []
    for layer, read, written in grids:
        ms = np.array([[times[layer, own, _partner(layer, own, other)] for other in written] for own in read])
        growing = np.maximum.accumulate(np.maximum.accumulate(ms, axis=0), axis=1)  # timing errors are small dips
        tables.append(
            LayerTable(
                layer=layer, read=read, written=written, ms=tuple(tuple(row) for row in growing.tolist()), step=step
            )
        )
    predictor = LatencyPredictor(tables=tuple(tables), curve=((0.0, 1.0),), dense_ms=0.0)
    total = predictor.layers_ms(groups.shapes)
    return predictor.model_copy(update={"curve": ((total, 1.0),)})


def _grid(
    layer: Layer, shape: Sequence[int], cut: set[tuple[str, int]], step: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the channels read and written at which a layer is measured."""
    read, written = layer.widths(shape)
    first, second = (layer.weight, 0) in cut, (layer.weight, 1) in cut
    reads, writes = (first, second) if layer.transposed else (second, first)
    if layer.depthwise:
        return _widths(read, first or second, step), (written,)
    own = math.lcm(step, layer.groups)
    return _widths(read, reads, own), _widths(written, writes, own)


def _partner(layer: Layer, read: int, written: int) -> int:
    """Returns the channels written where so many are read."""
    return read * layer.multiplier if layer.depthwise else written


def _widths(full: int, varies: bool, step: int) -> tuple[int, ...]:
    if not varies:
        return (full,)
    return tuple(sorted({_stepped(-(-full // part), step, full) for part in _PARTS}))


def _stepped(width: int, step: int, full: int) -> int:
    return min(-(-width // step) * step, full)
