"""The command line: one file per verb; nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import os
import sys

import typer

from nni_prune_ext import __version__
from nni_prune_ext.cli.benchmark import benchmark
from nni_prune_ext.cli.export import export
from nni_prune_ext.cli.list_plugins import list_plugins
from nni_prune_ext.cli.plan import plan
from nni_prune_ext.cli.prune import prune
from nni_prune_ext.cli.report import report
from nni_prune_ext.cli.run import run
from nni_prune_ext.errors import CertificateError, NniPruneExtError, ParityError, TrainingError

HONEST_FAILURES = (CertificateError, ParityError, TrainingError)
"""The work was done as asked and failed: exit code 1. Every other mistake is the user's to mend: 2."""

app = typer.Typer(
    name="nni-prune-ext",
    help="Exact, certified channel pruning: from a trained PyTorch network to a checked ONNX file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("list")(list_plugins)
app.command("plan")(plan)
app.command("prune")(prune)
app.command("run")(run)
app.command("export")(export)
app.command("benchmark")(benchmark)
app.command("report")(report)


@app.callback(invoke_without_command=True)
def _version(show: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Runs the command line; a mistake is one clear message; exit codes: 0 done, 1 honest failure, 2 usage."""
    sys.path.insert(0, "")  # so that module.path:factory finds the user's own modules
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        app()
    except NniPruneExtError as error:
        process = f" (process {os.environ.get('RANK')})" if several else ""
        typer.echo(f"error{process}: {error}", err=True)
        sys.exit(1 if isinstance(error, HONEST_FAILURES) else 2)
    except SystemExit as end:
        if several and not end.code:
            from nni_prune_ext.training.processes import part  # imported here to keep --help instant

            part()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)  # torch 2.11 at times aborts a process whose group is gone while the interpreter shuts down
        raise
