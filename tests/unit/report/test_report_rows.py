"""Rows as tables for the terminal and for Markdown."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from nni_prune_ext.report import HEADINGS, Row, before_after_table, comparison_table, markdown_table
from nni_prune_ext.report.number_text import count, duration, points, share, size

ROWS = [Row("dense", macs=2_000_000, params=1000, kind="dense"), Row("[l1]", macs=1_000_000, params=250, top1=0.5)]


def printed(table: Table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_numbers_are_written_with_their_unit():
    assert ("62.67 M", "484 KiB", "1.71 MiB") == (count(62_669_200), size(495_616), size(1_791_281))
    assert ("49.9 %", "–") == (share(62_669_200, 125_485_696), share(1, 0))
    assert ("−4.07 points", "+0.26 points", "±0.00 points") == (points(-0.0407), points(0.0026), points(0.0))
    assert ("4.2 s", "5 min 09 s", "2 h 05 min") == (duration(4.2), duration(308.79), duration(7500))


def test_markdown_says_shares_of_the_first_row_and_dashes_for_what_is_unknown():
    lines = markdown_table(ROWS).splitlines()

    assert len(ROWS) + 2 == len(lines)
    assert lines[0].startswith("| network | MACs | left |")
    assert "| [l1] | 1.00 M | 50.0 % | 250 | 25.0 % | – | 50.00 % | – | – | – | – | – | – |" == lines[3]


def test_the_terminal_table_prints_names_that_look_like_markup():
    text = printed(before_after_table(ROWS, title="tiny", caption="a caption"))

    assert "[l1]" in text
    assert "a caption" in text
    assert all(heading in text for heading in HEADINGS)


def test_the_comparison_puts_every_run_under_its_name_and_refers_shares_to_its_own_dense_network():
    text = printed(comparison_table({"one": ROWS, "[two]": [Row("dense", 400, 40), Row("l2", 100, 30)]}, title="both"))

    assert text.index("one") < text.index("[l1]") < text.index("[two]") < text.index("l2")
    assert "25.0 %" in next(line for line in text.splitlines() if "l2" in line)


def test_another_metric_than_top1_is_named_and_is_no_percentage():
    text = printed(before_after_table(ROWS, title="tiny", metric="mean_iou"))

    assert all(heading in text for heading in ("mean_iou cut", "mean_iou ORT", "0.5000"))
    assert "50.00 %" not in text
    assert "top-1" not in text
    assert "| mean_iou |" in markdown_table(ROWS, metric="mean_iou")


def test_runs_of_several_metrics_share_a_column_under_both_names():
    text = printed(comparison_table({"one": ROWS, "two": ROWS}, title="both", metrics={"two": "dice"}))

    assert "top-1 / dice" in text
    assert all(number in text for number in ("50.00 %", "0.5000"))


def test_a_long_name_of_a_run_breaks_and_leaves_the_numbers_whole():
    console = Console(width=160)
    row = Row("dense-trained-longer", 125_485_696, 853_018, 0.1231, 0.8989, 0.8989, 3_436_363, 1.33, 1.0, 3e-16, 5e-7)

    with console.capture() as capture:
        console.print(comparison_table({"1. a long title of a run · and_a_long_folder_name": [row]}, title="one"))

    found = capture.get()
    assert "…" not in found
    assert all(number in found for number in ("125.49 M", "853.02 k", "100.0 %", "12.31 %", "3.28 MiB", "5e-07"))
