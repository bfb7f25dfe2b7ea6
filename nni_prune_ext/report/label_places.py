"""Puts labels beside points so that they cover neither points nor each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from nni_prune_ext.report.svg import FONT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Box: TypeAlias = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""
_GAP, _POINT = 2.0, 6.0
_RADII = (9.0, 18.0, 30.0, 44.0, 60.0)
_ANGLES = (0, 180, 90, 270, 35, 145, 325, 215, 65, 115, 295, 245)


def place_labels(
    axes: Axes,
    at: Sequence[tuple[float, float]],
    labels: Sequence[str],
    *,
    stairs: Sequence[tuple[float, float]] = (),
    colour: str,
    line: str,
) -> list[str]:
    """Writes each label near its point, with a line to it if it had to move away.

    Points at the same place with the same label get one label.

    Args:
        stairs: points that steps join, first across and then up or down; labels keep clear of them.

    Returns:
        the labels for which there was no room.
    """
    figure = axes.figure
    figure.canvas.draw()  # constrained layout settles where the axes are
    bounds = axes.get_window_extent().extents
    points = [tuple(axes.transData.transform(point)) for point in at]
    taken: list[Box] = [_around(x, y) for x, y in points]
    taken += _steps([tuple(axes.transData.transform(point)) for point in stairs])
    left_out = []
    for label, (x, y) in dict.fromkeys((label, (round(x, 1), round(y, 1))) for label, (x, y) in zip(labels, points)):
        width, height = _extent(axes, label)
        box = next((b for b in _candidates(x, y, width, height) if _inside(b, bounds) and _free(b, taken)), None)
        if box is None:
            left_out.append(label)
            continue
        taken.append(box)
        _draw(axes, label, (x, y), box, colour=colour, line=line)
    return left_out


def _candidates(x: float, y: float, width: float, height: float) -> Iterable[Box]:
    """Yields boxes around a point, near ones first."""
    for radius in _RADII:
        for angle in _ANGLES:
            across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            left = x + radius * across - width * (1 - across) / 2
            bottom = y + radius * up - height * (1 - up) / 2
            yield left, bottom, left + width, bottom + height


def _extent(axes: Axes, label: str) -> tuple[float, float]:
    text = axes.text(0, 0, label, size=FONT)
    extent = text.get_window_extent()
    text.remove()
    return extent.width, extent.height


def _draw(axes: Axes, label: str, point: tuple[float, float], box: Box, *, colour: str, line: str) -> None:
    left, bottom, right, top = box
    place = axes.transData.inverted().transform(((left + right) / 2, (bottom + top) / 2))
    axes.text(float(place[0]), float(place[1]), label, size=FONT, color=colour, ha="center", va="center", zorder=4)
    near = (min(max(point[0], left), right), min(max(point[1], bottom), top))
    if math.dist(near, point) > 14:
        ends = axes.transData.inverted().transform([point, near])
        axes.plot(ends[:, 0], ends[:, 1], color=line, linewidth=0.7, zorder=2)


def _around(x: float, y: float) -> Box:
    return x - _POINT, y - _POINT, x + _POINT, y + _POINT


def _steps(corners: Sequence[tuple[float, ...]]) -> list[Box]:
    boxes: list[Box] = []
    for (left, low), (right, high) in itertools.pairwise(corners):
        boxes += [(left, low, right, low), (right, min(low, high), right, max(low, high))]
    return boxes


def _inside(box: Box, bounds: Sequence[float]) -> bool:
    return box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]


def _free(box: Box, taken: Sequence[Box]) -> bool:
    return all(
        box[0] > other[2] + _GAP or box[2] < other[0] - _GAP or box[1] > other[3] + _GAP or box[3] < other[1] - _GAP
        for other in taken
    )
