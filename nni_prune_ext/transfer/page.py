"""One self-contained HTML page about a transfer: scores, paired differences, parameters, course of the losses."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path

from nni_prune_ext.report import number_text
from nni_prune_ext.report.page import sections_page
from nni_prune_ext.report.page_parts import Cell, Column, Group, Section, Table, pairs
from nni_prune_ext.text_files import write_text
from nni_prune_ext.transfer.results import TransferReport


def write_page(path: Path, report: TransferReport) -> None:
    """Writes the page, atomically."""
    facts = report.facts
    title = f"Transfer to {facts['data']}"
    subtitle = f"head {facts['head']} · {facts['epochs']} epochs · {len(report.networks)} networks"
    write_text(path, sections_page(title, subtitle, list(_sections(report))))


def comparison_rows(report: TransferReport) -> list[list[str]]:
    """Returns per network: name, scores over seeds, mean paired difference to the first one, parameters of all."""
    reference = report.networks[0]
    rows = []
    for name in report.networks:
        found = list(report.scores(name).values())
        rows.append([name, _scores(found), _difference(report, name, reference), _parameters(report, name, "all")])
    return rows


def headings(report: TransferReport) -> list[str]:
    """Returns what stands above the columns of ``comparison_rows``."""
    return ["network", f"{report.metric} in % (each seed)", f"to {report.networks[0]}, points", "parameters"]


def _sections(report: TransferReport) -> Iterator[Section]:
    metrics = list(dict.fromkeys(key for row in report.rows for key in row.metrics))
    note = (
        "Every network was trained alike, with a new head, and measured on the test split after the last epoch; "
        "nothing was selected. Differences are paired by seed: mean ± standard deviation of the sample."
    )
    columns = [Column("network", numeric=False), *(Column(text) for text in headings(report)[1:])]
    rows = [[Cell(text) for text in row] for row in comparison_rows(report)]
    tables = [Table("Scores", columns, [Group(rows)], note=note)]
    if len(metrics) > 1:
        shown = [
            [Cell(name), *(Cell(_scores(_values(report, name, key), alone=False)) for key in metrics)]
            for name in report.networks
        ]
        columns = [Column("network", numeric=False), *(Column(key) for key in metrics)]
        tables.append(Table("All measures, mean in %", columns, [Group(shown)]))
    yield Section("Scores", tables=tables)
    if len(report.networks) > 2:
        yield Section("Pairs", tables=[_pairs(report)])
    parts = {"convolutions": "convolutions", "network": "network without the new head", "all": "all"}
    columns = [Column("network", numeric=False), *(Column(text) for text in parts.values())]
    shown = [[Cell(name), *(Cell(_parameters(report, name, key)) for key in parts)] for name in report.networks]
    note = "Parameters that are not masked; in brackets, the share of the first network's."
    yield Section("Parameters", tables=[Table("Parameters", columns, [Group(shown)], note=note)])
    columns = [Column("network", numeric=False), Column("seed"), Column("mean loss of every epoch", False, wraps=True)]
    shown = [
        [Cell(row.network), Cell(str(row.seed)), Cell(", ".join(f"{loss:.3g}" for loss in row.losses))]
        for row in report.rows
    ]
    yield Section("Training", tables=[Table("Losses", columns, [Group(shown)], folded=True), _facts(report)])


def _facts(report: TransferReport) -> Table:
    return pairs("Data, head and training", {key: value for key, value in report.facts.items() if value is not None})


def _pairs(report: TransferReport) -> Table:
    columns = [Column("row minus column", numeric=False), *(Column(name) for name in report.networks)]
    rows = [
        [Cell(own), *(Cell("" if own == other else _difference(report, own, other)) for other in report.networks)]
        for own in report.networks
    ]
    return Table(f"{report.metric}: paired differences in points", columns, [Group(rows)])


def _values(report: TransferReport, name: str, metric: str) -> list[float]:
    return [row.metrics[metric] for row in report.rows if row.network == name and metric in row.metrics]


def _scores(found: list[float], *, alone: bool = True) -> str:
    if not found:
        return "–"
    each = f" ({', '.join(f'{100 * own:.1f}' for own in found)})" if alone and len(found) > 1 else ""
    return f"{100 * statistics.fmean(found):.1f}{each}"


def _difference(report: TransferReport, name: str, reference: str) -> str:
    mean, deviation, _ = report.differences(name, reference)
    if name == reference or math.isnan(mean):
        return "–"
    signed = f"{100 * mean:+.1f}".replace("-", "−")
    return signed + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def _parameters(report: TransferReport, name: str, part: str) -> str:
    counts = {row.network: row.parameters[part] for row in report.rows}
    whole = counts[report.networks[0]]
    return f"{number_text.count(counts[name])} ({counts[name] / max(whole, 1):.3f})"
