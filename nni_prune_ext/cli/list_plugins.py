"""``list``: what is registered, without importing any of it; and everything about one of them, by its name."""

from __future__ import annotations

import json as json_text
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from nni_prune_ext.cli import options as o
from nni_prune_ext.cli.json_lines import json_line

if TYPE_CHECKING:
    from nni_prune_ext.registry import Kind

KINDS: tuple[Kind, ...] = ("pruners", "schedulers", "runtimes")


def list_plugins(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="[KIND or NAME]", help="pruners, schedulers, runtimes, models; or the name of one of them."
        ),
    ] = "",
    check: Annotated[
        bool, typer.Option("--check", help="Import each one: summaries, and whether runtimes are usable.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Lists pruners, schedulers, runtimes and built-in models; or the settings of the one that is named."""
    from nni_prune_ext.models.builtin import builtin_names  # imported here to keep --help instant
    from nni_prune_ext.registry import plugins

    if kind and kind not in (*KINDS, "models"):
        facts = _facts_of(kind)
        typer.echo(json_line("done", facts)) if json else _show_one(facts)
        return
    found: dict[str, dict[str, dict[str, object]]] = {
        one: {name: {**_facts(one, name, check=check)} for name in plugins(one)} for one in KINDS if kind in ("", one)
    }
    if json:
        models = {"models": builtin_names()} if kind in ("", "models") else {}
        typer.echo(json_line("done", {**found, **models}))
        return
    for one, entries in found.items():
        typer.echo(f"{one}:")
        for name, facts in entries.items():
            origin = "" if facts["distribution"] == "nni_prune_ext" else f"  ({facts['distribution']})"
            typer.echo(f"  {name:22} {_line(facts) if check else facts['location']}{origin}")
    if not check and kind != "models":
        typer.echo("(what each one does, and whether runtimes are usable here: nni-prune-ext list --check)")
        typer.echo("(the settings of one: nni-prune-ext list NAME)")
    if kind in ("", "models"):
        typer.echo("models:")
        typer.echo(f"  built in: {', '.join(builtin_names())}")
        typer.echo("  others:   torchvision:NAME, timm:NAME, module.path:factory")


def _facts_of(name: str) -> dict[str, object]:
    """Returns everything about the plugin or built-in model of this name."""
    from nni_prune_ext.errors import ConfigError  # imported here to keep --help instant
    from nni_prune_ext.models.builtin import builtin_names
    from nni_prune_ext.registry import plugins
    from nni_prune_ext.specs import did_you_mean

    for kind in KINDS:
        if name in plugins(kind):
            return _facts(kind, name, check=True)
    if ":" in name:  # a method that is not registered, as `prune --method` takes it
        return {"name": name, "kind": "pruners", **_method_facts(name)}
    if name in builtin_names():
        return {"name": name, "kind": "models", "summary": f"built in; use it as `nni-prune-ext prune {name} …`"}
    known = [*KINDS, "models", *(plugin for kind in KINDS for plugin in plugins(kind)), *builtin_names()]
    raise ConfigError(
        f"There is no '{name}' to list. Expected one of pruners, schedulers, runtimes, models, or the name of one of "
        f"them; `nni-prune-ext list` shows all.{did_you_mean(name, known)}"
    )


def _facts(kind: Kind, name: str, *, check: bool) -> dict[str, object]:
    """Returns what is known about a plugin; it is imported only if ``check`` says so."""
    from nni_prune_ext.registry import plugins  # imported here to keep --help instant

    plugin = plugins(kind)[name]
    facts: dict[str, object] = {
        "name": name,
        "kind": kind,
        "location": plugin.location,
        "distribution": plugin.distribution,
    }
    return {**facts, **_details(kind, name)} if check else facts


def _details(kind: Kind, name: str) -> dict[str, object]:
    from nni_prune_ext.deployment import runtime  # imported here because it loads torch
    from nni_prune_ext.registry import load_plugin
    from nni_prune_ext.schedules import SchedulerSpec

    if kind == "runtimes":
        return {**asdict(runtime(name).availability())}
    if kind == "schedulers":
        scheduler = load_plugin("schedulers", name)
        if isinstance(scheduler, SchedulerSpec):
            return {"type": scheduler.kind, "summary": scheduler.summary, "needs_data": scheduler.needs_data}
        return {"summary": str(scheduler)}
    return _method_facts(name)


def _method_facts(name: str) -> dict[str, object]:
    from nni_prune_ext.methods.options import option_facts  # imported here because it loads torch
    from nni_prune_ext.pipeline import method_spec

    spec = method_spec(name)
    return {
        "summary": spec.summary,
        "reference": spec.reference,
        "products": sorted(spec.products),
        "needs_data": spec.needs_data,
        "options": [{**asdict(fact), "valid": fact.valid} for fact in option_facts(spec.options)],
    }


def _line(facts: dict[str, object]) -> str:
    """Says what a plugin does in one line."""
    if facts["kind"] == "runtimes":
        return f"{'usable' if facts['usable'] else 'not usable'}: {facts['reason']}"
    said = f"{facts['summary']}{' (needs data)' if facts.get('needs_data') else ''}"
    return f"{facts['type']}: {said}" if "type" in facts else said


def _show_one(facts: dict[str, object]) -> None:
    typer.echo(f"{facts['name']} ({str(facts['kind'])[:-1]}): {_line(facts)}")
    if "distribution" in facts:
        typer.echo(f"  from:      {facts['distribution']}, {facts['location']}")
    if facts["kind"] != "pruners":
        return
    products = facts["products"]
    assert isinstance(products, list)
    typer.echo(f"  reference: {facts['reference']}")
    typer.echo(f"  products:  {', '.join(products).replace('_', ' ')}")
    typer.echo(f"  data:      {'needed' if facts['needs_data'] else 'not needed, unless an option trains'}")
    options = facts["options"]
    assert isinstance(options, list)
    if not options:
        typer.echo("  no options")
        return
    typer.echo("  options (recipe: options.NAME, command line: --option NAME=VALUE):")
    _show_table(options)


def _show_table(options: list[dict[str, object]]) -> None:
    from rich import box  # imported here to keep --help instant
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("option", "type", "default", "valid", "to search", "what it does", "default from"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("option", "default"))
    for option in options:
        default = "none" if option["default"] is None else json_text.dumps(option["default"]).strip('"')
        span = option["search"]
        searched = f"{span[0]:g} to {span[1]:g}" if isinstance(span, tuple) else ""
        shown = (str(option[key]) for key in ("description", "source"))
        table.add_row(str(option["name"]), str(option["type"]), default, str(option["valid"]), searched, *shown)
    console = Console(highlight=False, markup=False)
    console.width = max(console.width, 120)
    console.print(table)
