"""The tables of a measurement, the same for the terminal, for Markdown and for HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nni_prune_ext.evidence.results import Evidence, EvidenceRow, NotMeasured, Timing
from nni_prune_ext.report import number_text
from nni_prune_ext.report.page_parts import Cell, Column, Group, Table, words

NOT_MEASURED = "NOT MEASURED"
_ALL = "all networks"


@dataclass(frozen=True)
class Quantity:
    """One column of numbers."""

    heading: str
    value: Callable[[EvidenceRow], float | None]
    text: Callable[[float], str]

    def shown(self, row: EvidenceRow) -> str | None:
        """Returns the number of a row as text; ``None`` if it was not measured."""
        found = self.value(row)
        return None if found is None else self.text(found)


def _ms(value: float) -> str:
    return f"{value:.3f}"


def _ratio(value: float) -> str:
    return f"{value:.3f}"


def _error(value: float) -> str:
    return number_text.error(value) if value else "0"


QUANTITIES = (
    Quantity("batch", lambda row: row.batch, "{:.0f}".format),
    Quantity("p50 ms", lambda row: row.latency.p50_ms, _ms),
    Quantity("p95 ms", lambda row: row.latency.p95_ms, _ms),
    Quantity("p99 ms", lambda row: row.latency.p99_ms, _ms),
    Quantity("× first", lambda row: row.latency.ratio, _ratio),
    Quantity("A/A", lambda row: row.error_bar, "± {:.3f}".format),
    Quantity("MACs × first", lambda row: row.macs_ratio, _ratio),
    Quantity("images/s", lambda row: row.throughput.images_per_s, "{:,.0f}".format),
    Quantity("top-1", lambda row: row.top1, number_text.percent),
    Quantity("parity", lambda row: row.parity.max_rel if row.parity else None, _error),
    Quantity("same top-1", lambda row: row.parity.top1_agreement if row.parity else None, number_text.percent),
    Quantity("host peak", lambda row: row.host_peak_bytes, number_text.size),
    Quantity("GPU memory", lambda row: row.latency.gpu_memory_bytes, number_text.size),
    Quantity("cold start ms", lambda row: row.fresh.cold_start_ms if row.fresh else None, "{:,.0f}".format),
    Quantity("ONNX file", lambda row: row.size_bytes, number_text.size),
)
"""In the order in which they are shown."""


def shown_quantities(rows: Sequence[EvidenceRow]) -> list[Quantity]:
    """Returns the columns in which some row has a number."""
    return [quantity for quantity in QUANTITIES if any(quantity.value(row) is not None for row in rows)]


def ran_on(row: EvidenceRow) -> str:
    """Says which providers ran how many nodes."""
    placement = row.latency.node_placement
    return ", ".join(f"{provider} {nodes}" for provider, nodes in placement.items()) or "unknown"


def conditions_text(timing: Timing) -> str:
    """Says how the latencies of a table were measured, and which differences mean nothing."""
    latency = timing.latency
    return (
        f"{latency.clock} time, {latency.threads} thread(s), {latency.rounds} rounds in turns; the first network "
        f"against itself differs by {100 * latency.error_bar:.1f} %: smaller differences mean nothing. Throughput is "
        "by elapsed time, one network after the other."
    )


def missing_place(missing: NotMeasured) -> str:
    """Names what was not measured: runtime, and network if it is one alone."""
    part = "" if missing.what == "everything" else f" ({missing.what})"
    return f"{missing.runtime}{f', {missing.network}' if missing.network else ''}{part}"


def evidence_table(evidence: Evidence) -> Table:
    """Returns one row per network, runtime and batch size, those that were not measured among them."""
    rows = evidence.rows()
    quantities = shown_quantities(rows)
    columns = [Column("network", numeric=False), *(Column(quantity.heading) for quantity in quantities)]
    columns.append(Column("nodes run by", numeric=False))
    names = list(dict.fromkeys([row.runtime for row in rows] + [one.runtime for one in evidence.not_measured]))
    groups = [
        Group(_group(name, rows, quantities, evidence.not_measured), name, number)
        for number, name in enumerate(names, start=1)
    ]
    return Table("Evidence", columns, groups, note=" ".join(_notes(evidence)))


def networks_table(evidence: Evidence) -> Table:
    """Returns what is known of every network without running it."""
    first = evidence.networks[0]
    columns = [Column("network", numeric=False), *map(Column, ("MACs", "MACs × first", "parameters", "ONNX file"))]
    columns.append(Column("PyTorch module", numeric=False, wraps=True))
    rows = [
        [
            Cell(network.name),
            _cell(None if network.macs is None else number_text.count(network.macs)),
            _cell(_ratio(network.macs / first.macs) if network.macs is not None and first.macs else None),
            _cell(None if network.params is None else number_text.count(network.params)),
            Cell(number_text.size(network.size_bytes)),
            Cell(network.no_module, "missing") if network.no_module else Cell("read from its folder"),
        ]
        for network in evidence.networks
    ]
    return Table("Networks", columns, [Group(rows)])


def missing_table(evidence: Evidence) -> Table | None:
    """Returns what was not measured, with reasons; ``None`` if nothing is missing."""
    if not evidence.not_measured:
        return None
    columns = [Column("runtime", numeric=False), Column("network", numeric=False), Column("what", numeric=False)]
    columns.append(Column("why", numeric=False, wraps=True))
    rows = [
        [Cell(one.runtime), Cell(one.network or _ALL), Cell(one.what), words(one.reason)]
        for one in evidence.not_measured
    ]
    return Table(NOT_MEASURED, columns, [Group(rows)])


def markdown(table: Table) -> str:
    """Returns a table as Markdown; the name of a group stands in a first column of its own if there is one."""
    named = any(group.name for group in table.groups)
    first = [] if table.headless else [column.heading for column in table.columns]
    headings = (["runtime"] if named else []) + (first or ["" for _ in table.columns])
    marks = ["---"] if named else []
    marks += ["---:" if column.numeric else "---" for column in table.columns]
    lines = [_line(headings), "|" + "|".join(marks) + "|"]
    lines += [
        _line([*([group.name] if named else []), *(cell.text for cell in row)])
        for group in table.groups
        for row in group.rows
    ]
    return "\n".join(lines) + "\n" + (f"\n{table.note}\n" if table.note else "")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _group(
    runtime: str, rows: Sequence[EvidenceRow], quantities: Sequence[Quantity], missing: Sequence[NotMeasured]
) -> list[list[Cell]]:
    found = [
        [Cell(row.network), *(_cell(quantity.shown(row)) for quantity in quantities), Cell(ran_on(row))]
        for row in rows
        if row.runtime == runtime
    ]
    absent = [one for one in missing if one.runtime == runtime and one.what == "everything"]
    gaps = [Cell("–", "missing")] * (len(quantities) + 1)
    return found + [[Cell(f"{one.network or _ALL}: {NOT_MEASURED}", "missing"), *gaps] for one in absent]


def _cell(text: str | None) -> Cell:
    return Cell("–", "missing") if text is None else Cell(text)


def _notes(evidence: Evidence) -> list[str]:
    rows = evidence.rows()
    notes = [
        "“× first” refers to the first network that the runtime ran; ratios are medians within rounds. “A/A” is how "
        "far that network is from itself: smaller differences mean nothing."
    ]
    if any(row.parity for row in rows):
        images = max(row.parity.images for row in rows if row.parity)
        notes.append(
            f"“parity” is the largest difference to PyTorch in float32 on the CPU over {images} images, relative to "
            "the largest output."
        )
    fresh = evidence.conditions.fresh
    if any(row.fresh for row in rows):
        notes.append(
            f"Cold start, from opening the file to the first result, and host peak are medians of {fresh} fresh "
            "process(es); compilers start with empty caches."
        )
    return notes
