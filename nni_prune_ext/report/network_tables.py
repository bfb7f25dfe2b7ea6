"""Tables of networks for the page: before and after, latency, and asked against achieved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nni_prune_ext.report import number_text
from nni_prune_ext.report.facts import LatencyRowFacts, RunReport
from nni_prune_ext.report.page_parts import Cell, Column, Group, Table, cell, words
from nni_prune_ext.report.rows import Row
from nni_prune_ext.report.verdicts import distance, is_met, target_name, target_number


@dataclass(frozen=True)
class _Quantity:
    heading: str
    value: Callable[[Row], float | None]
    text: Callable[[float], str]
    pruned_only: bool = False


_RESULT = (
    _Quantity("top-1", lambda row: row.top1, number_text.percent),
    _Quantity("top-1 ONNX", lambda row: row.top1_onnx, number_text.percent),
    _Quantity("ONNX file", lambda row: row.onnx_bytes, number_text.size),
    _Quantity("latency (ms)", lambda row: row.latency_ms, "{:.3f}".format),
    _Quantity("× dense", lambda row: row.latency_ratio, "{:.3f}".format),
)
_FURTHER = (
    _Quantity("top-1 after the cut", lambda row: row.top1_removed, number_text.percent, pruned_only=True),
    _Quantity("validation metric", lambda row: row.validation, "{:.4f}".format),
    _Quantity("weights at zero", lambda row: row.weight_sparsity, number_text.percent),
    _Quantity("certificate", lambda row: row.certificate, number_text.error, pruned_only=True),
    _Quantity("parity", lambda row: row.parity, number_text.error),
    _Quantity("time", lambda row: row.seconds, number_text.duration),
)


def before_after(reports: Sequence[RunReport]) -> list[Table]:
    """Returns cost and result, then everything else, over all networks of all runs."""
    note = "“left” and “× dense” refer to the dense network of the same run."
    first = _network_table("Before and after", reports, _RESULT, _costs, ("MACs", "left", "parameters", "left"), note)
    second = _network_table("Recovery and checks", reports, _FURTHER, lambda *_: [], (), "")
    if len(second.columns) == 1:
        return [replace(first, note=f"{first.note} {second.note}")]
    return [first, second]


def _network_table(
    caption: str,
    reports: Sequence[RunReport],
    quantities: Sequence[_Quantity],
    start: Callable[[Row, Row], list[Cell]],
    headings: Sequence[str],
    note: str,
) -> Table:
    """Returns one row per network; what no network knows is said below instead of in a column."""
    every = [row for report in reports for row in report.rows]
    shown = [quantity for quantity in quantities if any(quantity.value(row) is not None for row in every)]
    hidden = [quantity.heading for quantity in quantities if quantity not in shown]
    columns = [Column("network", numeric=False)]
    columns += [Column(heading) for heading in (*headings, *(quantity.heading for quantity in shown))]
    rows_of = [
        [[_name(report, row), *start(row, report.rows[0]), *_measured(report, row, shown)] for row in report.rows]
        for report in reports
    ]
    absent = f"Not measured for any network: {', '.join(hidden)}." if hidden else ""
    return Table(caption, columns, _groups(reports, rows_of), note=" ".join(filter(None, (note, absent))))


def _groups(reports: Sequence[RunReport], rows_of: Sequence[Sequence[Sequence[Cell]]]) -> list[Group]:
    several = len(reports) > 1
    return [
        Group(rows, report.heading if several else "", number)
        for number, (report, rows) in enumerate(zip(reports, rows_of), start=1)
    ]


def _name(report: RunReport, row: Row) -> Cell:
    return Cell(row.name, mark=report.kind(row), exact=report.kind(row))


def _costs(row: Row, dense: Row) -> list[Cell]:
    return [
        cell(row.macs, number_text.count),
        Cell(number_text.share(row.macs, dense.macs)),
        cell(row.params, number_text.count),
        Cell(number_text.share(row.params, dense.params)),
    ]


def _measured(report: RunReport, row: Row, shown: Sequence[_Quantity]) -> list[Cell]:
    return [
        Cell("not cut", "missing")
        if quantity.pruned_only and report.kind(row) != "pruned" and quantity.value(row) is None
        else cell(quantity.value(row), quantity.text)
        for quantity in shown
    ]


def asked_achieved(reports: Sequence[RunReport]) -> Table:
    """Returns every target of every run with its verdict."""
    headings = ("dense", "asked", "achieved", "distance")
    columns = [Column("run", numeric=False, wraps=True), Column("target", numeric=False)]
    columns += [*map(Column, headings), Column("verdict", numeric=False)]
    rows = [
        [Cell(report.heading, run=number), *cells]
        for number, report in enumerate(reports, start=1)
        for cells in _target_cells(report)
    ]
    return Table("Asked and achieved", columns, [Group(rows)])


def _target_cells(report: RunReport) -> list[list[Cell]]:
    if not report.targets:
        return [[Cell("none recorded", "missing"), *[Cell("unknown", "missing")] * 5]]
    return [
        [
            Cell(target.target, exact=target_name(target)),
            Cell(target_number(target, target.dense if target.metric != "ratio" else 0.0)),
            Cell(target_number(target, target.asked)),
            Cell(target_number(target, target.achieved)),
            Cell(distance(target)),
            _VERDICT_CELLS[is_met(target)],
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
