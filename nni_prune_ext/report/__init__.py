"""What a run reports: rows and facts as tables, as JSON and as one HTML page."""

from __future__ import annotations

from nni_prune_ext.report.facts import RunReport, write_report
from nni_prune_ext.report.page import write_html
from nni_prune_ext.report.rows import HEADINGS, Row, before_after_table, comparison_table, markdown_table

__all__ = [
    "HEADINGS",
    "Row",
    "RunReport",
    "before_after_table",
    "comparison_table",
    "markdown_table",
    "write_html",
    "write_report",
]
