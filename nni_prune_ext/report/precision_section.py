"""The section about files of lower precision: what pruning cost and what precision cost, apart."""

from __future__ import annotations

from nni_prune_ext.report import number_text
from nni_prune_ext.report.facts import RunReport
from nni_prune_ext.report.page_parts import Cell, Column, Group, Section, Table, cell, words
from nni_prune_ext.report.rows import Row

_LEAD = (
    "Every row is an ONNX file on ONNX Runtime. “by pruning” is the difference of its float32 network to the dense "
    "one, “by precision” that of the file to the same network in float32; both on the same test images."
)
_FILES = (
    "“difference” is the largest one to the outputs of the float32 file, relative to the largest output. int8 files "
    "are calibrated on training images."
)


def precision_section(report: RunReport) -> Section:
    """Returns accuracy, its losses, and how the files were made; for reports with rows of lower precision."""
    reduced = [row for row in report.rows if row.of is not None]
    tables = [_losses(report), _conversions(reduced)]
    left = {row.name: row.conversion.get("kept_float") for row in reduced if row.conversion}
    remarks = [f"In float32 in {name}: {words(layers).text}." for name, layers in left.items() if layers]
    return Section("Precision", [_LEAD, *remarks], tables=tables, beside=True)


def _losses(report: RunReport) -> Table:
    by_name = {row.name: row for row in report.rows}
    dense, text = report.rows[0], number_text.accuracy(report.metric_name)
    difference = number_text.accuracy_difference(report.metric_name)
    columns = [Column("network", numeric=False), Column("precision", numeric=False)]
    columns += [Column(heading) for heading in ("accuracy", "by pruning", "by precision", "latency × dense", "file")]
    rows = []
    for row in report.rows:
        network = by_name.get(row.of or row.name, row)
        by_pruning = _gap(network, dense) if report.kind(network) == "pruned" else None
        by_precision = None if row is network else _gap(row, network)
        rows.append(
            [
                Cell(network.name, mark=report.kind(network)),
                Cell(row.precision),
                cell(row.top1_onnx, text),
                cell(by_pruning, difference, "–"),
                cell(by_precision, difference, "–"),
                cell(row.latency_ratio, "{:.3f}".format),
                cell(row.onnx_bytes, number_text.size),
            ]
        )
    return Table("Accuracy of every file", columns, [Group(rows)])


def _conversions(reduced: list[Row]) -> Table:
    headings = ("calibration", "images", "layers converted", "in float32", "difference", "same class")
    columns = [Column("file", numeric=False), *(Column(heading) for heading in headings)]
    rows = []
    for row in reduced:
        facts = dict(row.conversion or {})
        calibration, parity = facts.get("calibration") or {}, facts.get("parity") or {}
        kept = facts.get("kept_float")
        assert isinstance(calibration, dict)
        assert isinstance(parity, dict)
        rows.append(
            [
                Cell(row.name),
                words(calibration.get("method"), "–"),
                words(calibration.get("images"), "–"),
                words(facts.get("reduced")),
                words(len(kept) if isinstance(kept, dict) else None),
                cell(parity.get("max_rel"), number_text.error),
                cell(parity.get("top1_agreement"), number_text.percent),
            ]
        )
    return Table("How the files were made", columns, [Group(rows)], note=_FILES)


def _gap(row: Row, other: Row) -> float | None:
    return None if row.top1_onnx is None or other.top1_onnx is None else row.top1_onnx - other.top1_onnx
