"""One row per network, and rows as before/after tables for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from rich.markup import escape
from rich.table import Table

from nni_prune_ext.report import number_text

Kind: TypeAlias = Literal["dense", "control", "gated", "pruned"]
Precision: TypeAlias = Literal["fp32", "fp16", "int8"]


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
        validation: validation metric of the epoch whose weights were kept; higher is better.
        weight_sparsity: share (0–1) of the weights left that a weight mask holds at zero.
        kind: the dense network, a control (dense, but trained further), a network that is gated per input (its MACs are
            a mean over the test images), or a pruned network.
        precision: of the ONNX file. A row of lower precision knows what the file tells: size, accuracy, latency.
        of: name of the float32 row that a row of lower precision was made from; its folder holds the file.
        conversion: how a file of lower precision was made and compared, as ``ReducedExport.facts`` says it.
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
    validation: float | None = None
    weight_sparsity: float | None = None
    kind: Kind = "pruned"
    precision: Precision = "fp32"
    of: str | None = None
    conversion: Mapping[str, object] | None = None


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


def before_after_table(rows: Sequence[Row], *, title: str, caption: str = "", metric: str = number_text.TOP1) -> Table:
    """Returns a table for the terminal; the first row is the dense network, to which shares refer.

    Args:
        metric: name of what the accuracy columns hold; anything but ``top-1`` is no percentage.
    """
    return comparison_table({"": rows}, title=title, caption=caption, metrics={"": metric})


def comparison_table(
    runs: Mapping[str, Sequence[Row]], *, title: str, caption: str = "", metrics: Mapping[str, str] | None = None
) -> Table:
    """Returns one table over several runs, each under its name; shares refer to the first row of the same run.

    Args:
        metrics: name of what the accuracy columns hold, for each run that has another one than ``top-1``.
    """
    metrics = {name: (metrics or {}).get(name, number_text.TOP1) for name in runs}
    table = Table(title=title, caption=caption or None, title_justify="left", caption_justify="left", pad_edge=False)
    for heading in _headings(" / ".join(dict.fromkeys(metrics.values()))):
        first = heading == HEADINGS[0]
        table.add_column(heading, justify="left" if first else "right", no_wrap=not first, overflow="fold")
    for name, rows in runs.items():
        if name:
            table.add_section()
            table.add_row(f"[bold]{escape(name)}[/bold]")
        for row in rows:
            table.add_row(*(escape(cell) for cell in _cells(row, rows[0], metrics[name])))
    return table


def markdown_table(rows: Sequence[Row], *, metric: str = number_text.TOP1) -> str:
    """Returns the same table as Markdown."""
    headings = _headings(metric)
    lines = [" | ".join(headings), "|".join(["---", *["---:"] * (len(headings) - 1)])]
    lines += [" | ".join(_cells(row, rows[0], metric)) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def _headings(metric: str) -> list[str]:
    return [heading.replace(number_text.TOP1, metric) for heading in HEADINGS]


def _cells(row: Row, dense: Row, metric: str) -> list[str]:
    accuracy = number_text.accuracy(metric)
    return [
        row.name,
        number_text.count(row.macs),
        number_text.share(row.macs, dense.macs),
        number_text.count(row.params),
        number_text.share(row.params, dense.params),
        _or_dash(row.top1_removed, accuracy),
        _or_dash(row.top1, accuracy),
        _or_dash(row.top1_onnx, accuracy),
        _or_dash(row.onnx_bytes, number_text.size),
        _or_dash(row.latency_ms, "{:.2f}".format),
        _or_dash(row.latency_ratio, "{:.2f}".format),
        _or_dash(row.certificate, number_text.error),
        _or_dash(row.parity, number_text.error),
    ]


def _or_dash(value: float | None, text: Callable[[float], str]) -> str:
    return "–" if value is None else text(value)
