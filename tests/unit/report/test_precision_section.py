"""The section about lower precision: both losses, each against the right network; and nothing where there is none."""

from __future__ import annotations

import copy

from sample_reports import DENSE, PRUNED, sample

from nni_prune_ext.report import RunReport
from nni_prune_ext.report.page import page
from nni_prune_ext.report.page_parts import Table
from nni_prune_ext.report.precision_section import precision_section
from nni_prune_ext.report.verdicts import key_figures, parity_verdict

PARITY = {"max_rel": 0.05, "top1_agreement": 0.98}
INT8 = {"calibration": {"method": "minmax", "images": 100, "sha256": "0"}, "reduced": 57, "parity": PARITY}


def reduced(of: dict[str, object], top1: float | None, **conversion: object) -> dict[str, object]:
    own = {"name": f"{of['name']}-int8", "precision": "int8", "of": of["name"], "kind": of["kind"], "top1_onnx": top1}
    return {"macs": of["macs"], "params": of["params"], "onnx_bytes": 900, "conversion": {**INT8, **conversion}, **own}


def report() -> RunReport:
    content = copy.deepcopy(sample())
    content["rows"] = [
        DENSE,
        reduced(DENSE, 0.8951),
        PRUNED,
        reduced(PRUNED, 0.8507, kept_float={"conv1/Conv": "named in keep_float"}),
    ]
    return RunReport.model_validate(content)


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.groups[0].rows]


def test_both_losses_are_shown_apart() -> None:
    losses = texts(precision_section(report()).tables[0])

    by_pruning, by_precision = [row[3] for row in losses], [row[4] for row in losses]
    assert [["dense", "fp32"], ["dense", "int8"], ["l1", "fp32"], ["l1", "int8"]] == [row[:2] for row in losses]
    assert ["–", "–"] == by_pruning[:2]
    assert "4.04" in by_pruning[2]
    assert by_pruning[2] == by_pruning[3]
    assert ("–", "–") == (by_precision[0], by_precision[2])
    assert "0.10" in by_precision[1]
    assert "0.50" in by_precision[3]


def test_how_files_were_made_and_what_stayed_in_float32_is_said() -> None:
    section = precision_section(report())

    assert [["dense-int8", "minmax", "100", "57"], ["l1-int8", "minmax", "100", "57"]] == [
        row[:4] for row in texts(section.tables[1])
    ]
    assert "In float32 in l1-int8: conv1/Conv: named in keep_float." in section.paragraphs


def test_figures_and_parity_are_of_float32_networks() -> None:
    assert [figure.label for figure in key_figures(report())][:1] == ["MACs left"]
    assert "not measured for" not in parity_verdict(report()).text


def test_the_page_has_the_section_only_where_there_are_such_rows() -> None:
    without = RunReport.model_validate(copy.deepcopy(sample()))

    assert "Accuracy of every file" in page([report()])
    assert "Accuracy of every file" not in page([without])
