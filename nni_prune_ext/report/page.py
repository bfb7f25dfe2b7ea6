"""One self-contained HTML page about one run, or about several runs compared: no script, nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from nni_prune_ext.errors import ArtefactError
from nni_prune_ext.report.accuracy_charts import accuracy_section
from nni_prune_ext.report.facts import RunReport
from nni_prune_ext.report.network_tables import asked_achieved, before_after, has_gated
from nni_prune_ext.report.page_parts import Figure, Section, Tone, Verdict
from nni_prune_ext.report.recipe_differences import differences_section
from nni_prune_ext.report.run_names import run_names
from nni_prune_ext.report.sections import run_sections
from nni_prune_ext.report.verdicts import is_met, key_figures, target_verdict, verdicts
from nni_prune_ext.text_files import write_text

if TYPE_CHECKING:
    import jinja2


@dataclass(frozen=True)
class _Run:
    """One run as the template needs it; ``number`` is 0 on a page about one run."""

    number: int
    heading: str
    subtitle: str
    verdicts: Sequence[Verdict]
    figures: Sequence[Figure]
    sections: Sequence[Section]


def write_html(path: Path, reports: Sequence[RunReport]) -> None:
    """Writes one page about one run, or a comparison of several, atomically.

    Raises:
        ArtefactError: there is no report.
        OutputError: the file cannot be written.
    """
    write_text(path, page(reports))


def page(reports: Sequence[RunReport]) -> str:
    """Returns the page; the same reports give the same text.

    Raises:
        ArtefactError: there is no report.
    """
    if not reports:
        raise ArtefactError("There is nothing to show: 0 reports, expected at least one. Give a run folder.")
    alone = len(reports) == 1
    names = run_names(reports)
    runs = [_run(report, index, names[index], alone=alone) for index, report in enumerate(reports)]
    return _template().render(
        title=reports[0].heading if alone else f"{len(reports)} runs compared",
        verdicts=[] if alone else list(_comparison_verdicts(reports)),
        runs=runs,
        shared=[] if alone else list(_shared_sections(reports)),
        alone=alone,
    )


def sections_page(title: str, subtitle: str, sections: Sequence[Section], *, verdicts: Sequence[Verdict] = ()) -> str:
    """Returns a page of sections, without figures."""
    alone = _Run(0, title, subtitle, verdicts, (), sections)
    return _template().render(title=title, verdicts=[], runs=[alone], shared=[], alone=True)


def _run(report: RunReport, index: int, name: str, *, alone: bool) -> _Run:
    return _Run(
        number=0 if alone else index + 1,
        heading=report.heading if alone else name,
        subtitle=_subtitle(report, folder=report.folder.name if alone and report.folder else ""),
        verdicts=verdicts(report),
        figures=key_figures(report),
        sections=list(run_sections(report, run=index, alone=alone)),
    )


def _shared_sections(reports: Sequence[RunReport]) -> Iterator[Section]:
    yield differences_section(reports)
    yield Section("Asked and achieved", tables=[asked_achieved(reports)])
    yield Section("Before and after", tables=before_after(reports), marks=True, gated=has_gated(reports))
    yield accuracy_section(reports)


def _subtitle(report: RunReport, *, folder: str) -> str:
    made = f"made {report.created[:16].replace('T', ' ')}" if report.created else "date unknown"
    return " · ".join(
        (
            f"model {report.model or 'unknown'}",
            f"method {report.method}" if report.method else "no method",
            f"data {report.data}" if report.data else "no data recorded",
            f"seed {'unknown' if report.seed is None else report.seed}",
            made,
            *([f"folder {folder}"] if folder else []),
        )
    )


def _comparison_verdicts(reports: Sequence[RunReport]) -> Iterator[Verdict]:
    """Yields how many targets were met, then every missed one."""
    found = [(number, target) for number, report in enumerate(reports, start=1) for target in report.targets]
    missed = [(number, target) for number, target in found if is_met(target) is False]
    met = sum(is_met(target) is True for _, target in found)
    unknown = len(found) - met - len(missed)
    text = f"{met} of {len(found)} targets met" + (f", {unknown} unknown." if unknown else ".")
    tone: Tone = "bad" if missed else "good" if met and not unknown else "missing"
    yield Verdict(tone, text) if found else Verdict("", "No run was asked for a target.")
    for number, target in missed:
        yield Verdict("bad", f"Run {number}: {target_verdict(target).text}")


def _template() -> jinja2.Template:
    import jinja2  # imported here to keep it out of every other verb

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nni_prune_ext.report", package_path=""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(breakable=_breakable, unbroken=_unbroken)
    return environment.get_template("page.html.j2")


def _breakable(text: str) -> Markup:
    """Returns the text with places where a long name may break."""
    return Markup(re.sub(r"(?<=[_.:/,-])(?=\w)", "<wbr>", str(escape(text))))


def _unbroken(text: str) -> str:
    """Returns the text with numbers that stay beside their units."""
    return re.sub(r"(?<=\d) (?=(?:%|[GMk]|[KM]iB|ms|s|min|h|points)(?!\w))|(?<=×) (?=\d)", "\u00a0", text)
