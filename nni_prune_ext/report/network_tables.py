"""Tables of networks for the page: before and after, latency, and asked against achieved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from nni_prune_ext.report import number_text
from nni_prune_ext.report.facts import LatencyRowFacts, RunReport
from nni_prune_ext.report.page_parts import Cell, Column, Group, Table, cell, words
from nni_prune_ext.report.rows import Row
from nni_prune_ext.report.run_names import run_names
from nni_prune_ext.report.verdicts import SHARES, distance, is_met, target_name, target_number

_Value: TypeAlias = Callable[[RunReport, Row], float | None]
_Text: TypeAlias = Callable[[RunReport], Callable[[float], str]]


@dataclass(frozen=True)
class _Quantity:
    """One column; ``{}`` in its heading stands for the name of the metric."""

    heading: str
    value: _Value
    text: _Text
    pruned_only: bool = False


def _plain(heading: str, value: Callable[[Row], float | None], text: Callable[[float], str]) -> _Quantity:
    return _Quantity(heading, lambda _, row: value(row), lambda _: text)


def _accuracy(heading: str, value: Callable[[Row], float | None], *, pruned_only: bool = False) -> _Quantity:
    def text(report: RunReport) -> Callable[[float], str]:
        return number_text.accuracy(report.metric_name)

    return _Quantity(heading, lambda _, row: value(row), text, pruned_only)


def _left(heading: str, value: Callable[[Row], float]) -> _Quantity:
    def share(report: RunReport, row: Row) -> float | None:
        whole = value(report.rows[0])
        return value(row) / whole if whole else None

    return _Quantity(heading, share, lambda _: lambda part: number_text.share(part, 1))


_RESULT = (
    _accuracy("{}", lambda row: row.top1),
    _left("MACs left", lambda row: row.macs),
    _plain("latency × dense", lambda row: row.latency_ratio, "{:.3f}".format),
    _plain("MACs", lambda row: row.macs, number_text.count),
    _plain("parameters", lambda row: row.params, number_text.count),
    _left("parameters left", lambda row: row.params),
    _accuracy("{} ONNX", lambda row: row.top1_onnx),
    _plain("ONNX file", lambda row: row.onnx_bytes, number_text.size),
    _plain("latency (ms)", lambda row: row.latency_ms, "{:.3f}".format),
)
"""What a reader looks for first stands first: a phone shows three columns beside the network's name."""
_FURTHER = (
    _accuracy("{} after the cut", lambda row: row.top1_removed, pruned_only=True),
    _plain("validation metric", lambda row: row.validation, "{:.4f}".format),
    _plain("weights at zero", lambda row: row.weight_sparsity, number_text.percent),
    replace(_plain("certificate", lambda row: row.certificate, number_text.error), pruned_only=True),
    _plain("parity", lambda row: row.parity, number_text.error),
    _plain("time", lambda row: row.seconds, number_text.duration),
)


def has_gated(reports: Sequence[RunReport]) -> bool:
    """Says whether some network is gated per input: marks need one more word then."""
    return any(report.kind(row) == "gated" for report in reports for row in report.rows)


def before_after(reports: Sequence[RunReport]) -> list[Table]:
    """Returns cost and result, then everything else, over all networks of all runs."""
    note = "“left” and “× dense” refer to the dense network of the same run."
    first = _network_table("Before and after", reports, _RESULT, note)
    cut = "“after the cut” is before recovery; what the method trains itself has happened by then."
    second = _network_table("Recovery and checks", reports, _FURTHER, cut if _trained_inside(reports) else "")
    if len(second.columns) == 1:
        return [replace(first, note=f"{first.note} {second.note}")]
    return [first, second]


def _trained_inside(reports: Sequence[RunReport]) -> bool:
    """Says whether a method had epochs of its own, before recovery."""
    return any(epoch.phase != "recovery" for report in reports for epoch in report.curves.get(report.method or "", ()))


def _network_table(caption: str, reports: Sequence[RunReport], quantities: Sequence[_Quantity], note: str) -> Table:
    """Returns one row per network; what no network knows is said below instead of in a column."""
    metric = " / ".join(dict.fromkeys(report.metric_name for report in reports))
    every = [(report, row) for report in reports for row in report.rows]
    shown = [quantity for quantity in quantities if any(quantity.value(*one) is not None for one in every)]
    cut = any(not report.is_uncut(row) for report, row in every)
    hidden = [one.heading.format(metric) for one in quantities if one not in shown and (cut or not one.pruned_only)]
    columns = [Column("network", numeric=False), *(Column(quantity.heading.format(metric)) for quantity in shown)]
    rows_of = [
        [[_name(report, row), *(_cell(report, row, quantity) for quantity in shown)] for row in report.rows]
        for report in reports
    ]
    absent = f"Not measured for any network: {', '.join(hidden)}." if hidden else ""
    return Table(caption, columns, _groups(reports, rows_of), note=" ".join(filter(None, (note, absent))))


def _groups(reports: Sequence[RunReport], rows_of: Sequence[Sequence[Sequence[Cell]]]) -> list[Group]:
    names = run_names(reports) if len(reports) > 1 else [""]
    return [Group(rows, name, number) for number, (name, rows) in enumerate(zip(names, rows_of), start=1)]


def _name(report: RunReport, row: Row) -> Cell:
    return Cell(row.name, mark=report.kind(row), exact=report.kind(row))


def _cell(report: RunReport, row: Row, quantity: _Quantity) -> Cell:
    value = quantity.value(report, row)
    if value is None and quantity.pruned_only:
        if report.kind(row) in ("dense", "control"):
            return Cell("not cut", "missing")
        if report.is_uncut(row):
            return Cell("nothing was cut", "missing")
    return cell(value, quantity.text(report))


def asked_achieved(reports: Sequence[RunReport]) -> Table:
    """Returns every target of every run with its verdict."""
    columns = [Column("run", numeric=False, wraps=True), Column("target", numeric=False)]
    columns += [Column("verdict", numeric=False), *map(Column, ("asked", "achieved", "distance", "dense"))]
    rows = [
        [Cell(name, run=number), *cells]
        for number, (name, report) in enumerate(zip(run_names(reports), reports), start=1)
        for cells in _target_cells(report)
    ]
    return Table("Asked and achieved", columns, [Group(rows)])


def _target_cells(report: RunReport) -> list[list[Cell]]:
    if not report.targets:
        return [[Cell("none asked", "missing"), *[Cell("–", "missing")] * 5]]
    return [
        [
            Cell(target.target, exact=target_name(target)),
            _VERDICT_CELLS[is_met(target)],
            Cell(target_number(target, target.asked)),
            Cell(target_number(target, target.achieved)),
            Cell(distance(target)),
            Cell(target_number(target, 0.0 if target.metric in SHARES else target.dense)),
        ]
        for target in report.targets
    ]


_VERDICT_CELLS = {True: Cell("met", "good"), False: Cell("MISSED", "bad"), None: Cell("unknown", "missing")}


def latency_table(report: RunReport) -> Table | None:
    """Returns percentiles, ratio and placement of every measured network; ``None`` if nothing was measured."""
    if report.latency is None or not report.latency.rows:
        return None
    headings = ("p50 (ms)", "p95 (ms)", "p99 (ms)", "× dense", "runs per sample", "GPU memory")
    columns = [Column("network", numeric=False), *(Column(heading) for heading in headings)]
    columns += [Column("runtime", numeric=False), Column("nodes run by", numeric=False)]
    return Table("Latency", columns, [Group([_latency_cells(row) for row in report.latency.rows])])


def _latency_cells(row: LatencyRowFacts) -> list[Cell]:
    placement = ", ".join(f"{provider} {nodes}" for provider, nodes in row.node_placement.items())
    return [
        Cell(row.name),
        *(cell(value, "{:.3f}".format) for value in (row.p50_ms, row.p95_ms, row.p99_ms, row.ratio)),
        cell(row.runs_per_sample, number_text.plain, "unknown"),
        cell(row.gpu_memory_bytes, number_text.size),
        words(row.runtime),
        words(placement or ", ".join(row.providers)),
    ]
