"""Numbers as text, the same on the terminal, in Markdown and in HTML."""

from __future__ import annotations

import math
from collections.abc import Callable

TOP1 = "top-1"
"""Name of the accuracy wherever no other metric is recorded."""


def accuracy(metric: str) -> Callable[[float], str]:
    """Returns what writes an accuracy: percent for top-1, the bare number for any other metric."""
    return percent if metric == TOP1 else "{:.4f}".format


def accuracy_difference(metric: str) -> Callable[[float], str]:
    """Returns what writes the difference of two accuracies, with its sign."""
    return points if metric == TOP1 else _signed


def count(value: float) -> str:
    """Returns a count with a unit: ``62.67 M``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.6g}"


def share(value: float, whole: float) -> str:
    """Returns a part of a whole in percent; a dash if the whole is nothing."""
    return f"{100 * value / whole:.1f} %" if whole else "–"


def percent(value: float) -> str:
    """Returns a ratio (0–1) in percent: ``85.56 %``."""
    return f"{100 * value:.2f} %"


def points(difference: float) -> str:
    """Returns the difference of two ratios in percentage points, with its sign: ``−4.07 points``."""
    rounded = round(100 * difference, 2)
    sign = "−" if rounded < 0 else "+" if rounded > 0 else "±"
    return f"{sign}{abs(rounded):.2f} points"


def _signed(difference: float) -> str:
    rounded = round(difference, 4)
    sign = "−" if rounded < 0 else "+" if rounded > 0 else "±"
    return f"{sign}{abs(rounded):.4f}"


def size(num_bytes: float) -> str:
    """Returns a size: ``484 KiB``, ``1.71 MiB``."""
    return f"{num_bytes / 1024:.0f} KiB" if num_bytes < 1 << 20 else f"{num_bytes / (1 << 20):.2f} MiB"


def milliseconds(value: float) -> str:
    """Returns a time in milliseconds with four digits: ``5.528 ms``."""
    return f"{value:.4g} ms"


def error(value: float) -> str:
    """Returns a relative error: ``4e-16``."""
    return f"{value:.0e}"


def duration(seconds: float) -> str:
    """Returns a time span: ``4.2 s``, ``5 min 09 s``, ``2 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def plain(value: float) -> str:
    """Returns a number of unknown meaning with six digits; whole numbers in full."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.6g}"
