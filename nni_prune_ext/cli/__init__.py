"""The command line: one file per verb; nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import sys

import typer

from nni_prune_ext import __version__
from nni_prune_ext.cli.export import export
from nni_prune_ext.cli.list_plugins import list_plugins
from nni_prune_ext.cli.plan import plan
from nni_prune_ext.cli.prune import prune
from nni_prune_ext.errors import NniPruneExtError

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
app.command("export")(export)


@app.callback(invoke_without_command=True)
def _version(show: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Runs the command line; a user's mistake is one clear message and exit code 2."""
    sys.path.insert(0, "")  # so that module.path:factory finds the user's own modules
    try:
        app()
    except NniPruneExtError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
