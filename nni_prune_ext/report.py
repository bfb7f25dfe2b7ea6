"""Before and after in one table, and the same facts as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from nni_prune_ext.text_files import write_text


@dataclass(frozen=True)
class Row:
    """One network in a before/after table; ``None`` is printed as a dash: not measured, or not asked for.

    Attributes:
        name: the variant: the dense network, or the method that pruned it.
        macs: multiply–accumulates of one input.
        params: number of parameters.
        top1_removed: accuracy (0–1) right after the removal, before any recovery.
        top1: accuracy at the end, in PyTorch.
        top1_onnx: accuracy of the ONNX file on ONNX Runtime, same images.
        onnx_bytes: size of the ONNX file.
        latency_ms: median latency of one input on ONNX Runtime's CPU, one thread.
        latency_ratio: latency divided by the dense network's, measured side by side.
        certificate: largest relative error between removal and silencing.
        parity: largest relative error between ONNX Runtime and PyTorch.
        parity_limit: the largest such error that would have been let pass.
        asked: the targets asked for, and what was achieved.
        seconds: time that the method, the removal and the recovery took.
    """

    name: str
    macs: int
    params: int
    top1_removed: float | None = None
    top1: float | None = None
    top1_onnx: float | None = None
    onnx_bytes: int | None = None
    latency_ms: float | None = None
    latency_ratio: float | None = None
    certificate: float | None = None
    parity: float | None = None
    parity_limit: float | None = None
    asked: str = ""
    seconds: float | None = None


HEADINGS = (
    "network",
    "MACs",
    "left",
    "params",
    "left",
    "top-1 cut",
    "top-1",
    "top-1 ORT",
    "ONNX",
    "ms",
    "× dense",
    "certificate",
    "parity",
)
"""Columns of the table, on the terminal and in Markdown."""


def before_after_table(rows: Sequence[Row], *, title: str, caption: str = "") -> Table:
    """Returns a table for the terminal; the first row is the dense network, to which shares refer."""
    table = Table(title=title, caption=caption or None, title_justify="left", caption_justify="left", pad_edge=False)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "network" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row, rows[0]))
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    """Returns the same table as Markdown."""
    lines = [" | ".join(HEADINGS), "|".join(["---", *["---:"] * (len(HEADINGS) - 1)])]
    lines += [" | ".join(_cells(row, rows[0])) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def write_report(path: Path, rows: Sequence[Row], facts: Mapping[str, object]) -> None:
    """Writes rows and facts as JSON, atomically.

    Raises:
        OutputError: the file cannot be written.
    """
    write_text(path, json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1, default=str) + "\n")


def _cells(row: Row, dense: Row) -> list[str]:
    return [
        row.name,
        _count(row.macs),
        _share(row.macs, dense.macs),
        _count(row.params),
        _share(row.params, dense.params),
        _percent(row.top1_removed),
        _percent(row.top1),
        _percent(row.top1_onnx),
        _bytes(row.onnx_bytes),
        "–" if row.latency_ms is None else f"{row.latency_ms:.2f}",
        "–" if row.latency_ratio is None else f"{row.latency_ratio:.2f}",
        _error(row.certificate),
        _error(row.parity),
    ]


def _count(value: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return str(value)


def _share(value: int, dense: int) -> str:
    return f"{100 * value / dense:.1f} %" if dense else "–"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


def _bytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 1024:.0f} KiB" if value < 1 << 20 else f"{value / (1 << 20):.2f} MiB"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}"
