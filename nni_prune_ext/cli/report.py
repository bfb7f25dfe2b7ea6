"""``report``: one HTML page and one table about one or several runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nni_prune_ext.cli.out_file import refuse_existing

if TYPE_CHECKING:
    from nni_prune_ext.report import RunReport


_PRINTED = {"rows", "targets", "metric"}


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Run folders, artefact folders or report.json files.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON instead of a table.")] = False,
) -> None:
    """Writes one self-contained HTML page that compares runs, and prints their joint table."""
    from nni_prune_ext.export.artefact_folder import check_writable  # imported here to keep --help instant
    from nni_prune_ext.report import RunReport, write_html

    refuse_existing(out, overwrite, example="compare.html")
    reports = [RunReport.load(run) for run in runs]
    check_writable(out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_html(out, reports)
    if as_json:
        _print_json(runs, reports, out)
    else:
        _print_table(reports, out)


def _print_json(runs: list[Path], reports: list[RunReport], out: Path) -> None:
    import json

    shown = [
        {"run": str(run), "title": one.heading, **json.loads(one.model_dump_json(include=_PRINTED))}
        for run, one in zip(runs, reports)
    ]
    typer.echo(json.dumps({"event": "done", "out": str(out), "runs": shown}))


def _print_table(reports: list[RunReport], out: Path) -> None:
    from rich.console import Console

    from nni_prune_ext.report import comparison_table
    from nni_prune_ext.report.run_names import run_names
    from nni_prune_ext.report.verdicts import target_verdict

    console = Console(width=160)
    several = len(reports) > 1
    names = [f"{number}. {name}" for number, name in enumerate(run_names(reports), start=1)] if several else [""]
    metrics = {name: one.metric_name for name, one in zip(names, reports)}
    title = f"{len(reports)} runs" if several else reports[0].heading
    rows = {name: one.rows for name, one in zip(names, reports)}
    console.print(comparison_table(rows, title=title, metrics=metrics))
    for number, one in enumerate(reports, start=1):
        for target in one.targets:
            sentence = target_verdict(target).text
            console.print(f"{number}. {sentence}" if several else sentence, highlight=False, markup=False)
    console.print(f"report in {out}", highlight=False, markup=False)
