"""The evidence as one self-contained page, in HTML or Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.evidence.charts import saving_chart, throughput_chart
from nni_prune_ext.evidence.results import Evidence
from nni_prune_ext.evidence.tables import (
    NOT_MEASURED,
    evidence_table,
    markdown,
    missing_place,
    missing_table,
    networks_table,
)
from nni_prune_ext.export.onnx_inputs import written_shape
from nni_prune_ext.report.page import sections_page
from nni_prune_ext.report.page_parts import Chart, Section, Verdict, pairs
from nni_prune_ext.text_files import write_text

_LINE = "On the dashed line, latency falls as MACs do; above it, a part of the saving is lost."
_MARKDOWN, _HTML = ".md", ".html"


def check_page_name(path: Path) -> None:
    """Refuses a name that says neither HTML nor Markdown.

    Raises:
        ConfigError: it does not.
    """
    if path.suffix not in (_MARKDOWN, _HTML):
        raise ConfigError(
            f"The page '{path}' ends in '{path.suffix}', expected {_HTML} or {_MARKDOWN}. Choose one of them."
        )


def write_evidence_page(path: Path, evidence: Evidence) -> None:
    """Writes the page, atomically; the end of its name says in which form.

    Raises:
        ConfigError: the name ends neither in ``.html`` nor in ``.md``.
        OutputError: the file cannot be written.
    """
    check_page_name(path)
    write_text(path, evidence_html(evidence) if path.suffix == _HTML else evidence_markdown(evidence))


def evidence_html(evidence: Evidence) -> str:
    """Returns the page as HTML."""
    return sections_page(
        _title(evidence), _subtitle(evidence), list(_sections(evidence)), verdicts=list(_verdicts(evidence))
    )


def evidence_markdown(evidence: Evidence) -> str:
    """Returns the page as Markdown, without charts."""
    parts = [f"# {_title(evidence)}\n", f"{_subtitle(evidence)}\n"]
    parts.append("".join(f"* {verdict.text}\n" for verdict in _verdicts(evidence)))
    for section in _sections(evidence):
        if section.tables:
            parts.append(f"## {section.title}\n")
            parts += [markdown(table) for table in section.tables]
    return "\n".join(parts)


def _title(evidence: Evidence) -> str:
    names = [network.name for network in evidence.networks]
    return f"Evidence for {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _subtitle(evidence: Evidence) -> str:
    own = evidence.conditions
    return " · ".join(
        (
            f"input {written_shape(evidence.input_shape)}",
            f"data {evidence.data}" if evidence.data else "made-up inputs, accuracy not measured",
            own.precision,
            f"{own.threads} thread(s)",
            f"made {evidence.environment['date'][:16].replace('T', ' ')}",
        )
    )


def _verdicts(evidence: Evidence) -> Iterator[Verdict]:
    """Yields what every runtime measured, and everything that was not."""
    rows = evidence.rows()
    for runtime in dict.fromkeys(row.runtime for row in rows):
        own = [row for row in rows if row.runtime == runtime]
        batches = ", ".join(map(str, dict.fromkeys(row.batch for row in own)))
        count = len({row.network for row in own})
        yield Verdict("good", f"{runtime}: {count} of {len(evidence.networks)} networks measured, batch {batches}.")
    for one in evidence.not_measured:
        yield Verdict("missing", f"{missing_place(one)}: {NOT_MEASURED}. {one.reason}")


def _sections(evidence: Evidence) -> Iterator[Section]:
    yield Section("Networks", tables=[networks_table(evidence)])
    yield Section("Evidence", tables=[evidence_table(evidence)])
    charts = list(_charts(evidence))
    if charts:
        yield Section("Latency, MACs and throughput", [_LINE], charts, beside=True)
    missing = missing_table(evidence)
    if missing is not None:
        yield Section(NOT_MEASURED, tables=[missing])
    conditions = pairs("Conditions", asdict(evidence.conditions))
    yield Section("How it was measured", tables=[conditions, pairs("Environment", evidence.environment)], beside=True)


def _charts(evidence: Evidence) -> Iterator[Chart]:
    rows = evidence.rows()
    saving = saving_chart(rows, name="saving")
    if saving:
        yield Chart(saving, "Latency left over MACs left")
    for number, runtime in enumerate(dict.fromkeys(row.runtime for row in rows), start=1):
        own = [row for row in rows if row.runtime == runtime]
        throughput = throughput_chart(own, name=f"throughput-{number}")
        if throughput:
            yield Chart(throughput, f"Throughput on {runtime}")
