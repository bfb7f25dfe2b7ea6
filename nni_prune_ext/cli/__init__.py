"""The command line: one file per verb; nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import os
import sys

import typer

from nni_prune_ext import __version__
from nni_prune_ext.cli.benchmark import benchmark
from nni_prune_ext.cli.doctor import doctor
from nni_prune_ext.cli.experiment import experiment
from nni_prune_ext.cli.export import export
from nni_prune_ext.cli.gates import app as gates
from nni_prune_ext.cli.json_lines import json_line
from nni_prune_ext.cli.list_plugins import list_plugins
from nni_prune_ext.cli.plan import plan
from nni_prune_ext.cli.prune import prune
from nni_prune_ext.cli.quantize import quantize
from nni_prune_ext.cli.report import report
from nni_prune_ext.cli.run import run
from nni_prune_ext.cli.sensitivity import sensitivity
from nni_prune_ext.cli.transfer import transfer
from nni_prune_ext.errors import CertificateError, NniPruneExtError, ParityError, TrainingError

HONEST_FAILURES = (CertificateError, ParityError, TrainingError)
"""The work was done as asked and failed: exit code 1. Every other mistake is the user's to mend: 2."""
INTERRUPTED = 130
"""The exit code after Ctrl-C."""

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
app.command("experiment")(experiment)
app.command("transfer")(transfer)
app.command("export")(export)
app.command("quantize")(quantize)
app.add_typer(gates, name="gates")
app.command("benchmark")(benchmark)
app.command("sensitivity")(sensitivity)
app.command("doctor")(doctor)
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
        _run()
    except NniPruneExtError as error:
        process = f" (process {os.environ.get('RANK')})" if several else ""
        typer.echo(f"error{process}: {error}", err=True)
        code = 1 if isinstance(error, HONEST_FAILURES) else 2
        _tell_machines(error, str(error), code)
        sys.exit(code)
    except SystemExit as end:
        if several and not end.code:
            from nni_prune_ext.training.processes import part  # imported here to keep --help instant

            part()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)  # torch 2.11 at times aborts a process whose group is gone while the interpreter shuts down
        raise


def _run() -> None:
    """Runs the verb; of a failure that is none of ours machines are told as well, before it is shown as usual."""
    try:
        code = app(standalone_mode=False) or 0
    except NniPruneExtError:
        raise
    except typer.Abort as error:
        typer.echo("Aborted!", err=True)
        _tell_machines(error, "interrupted", 1)
        sys.exit(1)
    except Exception as error:
        code, show = getattr(error, "exit_code", 1), getattr(error, "show", None)
        _tell_machines(error, getattr(error, "message", "") or str(error), code)
        if show is None:
            raise
        show()  # an unknown option or a missing argument: typer's own classes have no public name
    if code == INTERRUPTED:
        _tell_machines(KeyboardInterrupt(), "interrupted", code)
    sys.exit(code)


def _tell_machines(error: BaseException, message: str, code: int) -> None:
    """Prints a failure as one JSON object, if the command speaks JSON."""
    if "--json" in sys.argv[1:]:
        typer.echo(json_line("error", {"kind": type(error).__name__, "message": message, "exit_code": code}))
