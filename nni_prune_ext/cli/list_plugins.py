"""``list``: what is registered, without importing any of it."""

from __future__ import annotations

from typing import Annotated

import typer


def list_plugins(
    kind: Annotated[str, typer.Argument(help="pruners, schedulers, runtimes or models; all if left out.")] = "",
    check: Annotated[
        bool, typer.Option("--check", help="Import each one: summaries, and whether runtimes are usable.")
    ] = False,
) -> None:
    """Lists pruners, schedulers, runtimes and built-in models."""
    from nni_prune_ext.errors import ConfigError  # imported here to keep --help instant
    from nni_prune_ext.models.builtin import builtin_names
    from nni_prune_ext.registry import Kind, plugins

    kinds: tuple[Kind, ...] = ("pruners", "schedulers", "runtimes")
    if kind and kind not in (*kinds, "models"):
        raise ConfigError(f"There is no list of '{kind}'. Expected one of pruners, schedulers, runtimes, models.")
    for one in kinds:
        if kind in ("", one):
            typer.echo(f"{one}:")
            for name, plugin in plugins(one).items():
                detail = _detail(one, name) if check else plugin.location
                typer.echo(
                    f"  {name:22} {detail}"
                    + ("" if plugin.distribution == "nni_prune_ext" else f"  ({plugin.distribution})")
                )
    if not check and kind != "models":
        typer.echo("(what each one does, and whether runtimes are usable here: nni-prune-ext list --check)")
    if kind in ("", "models"):
        typer.echo("models:")
        typer.echo(f"  built in: {', '.join(builtin_names())}")
        typer.echo("  others:   torchvision:NAME, timm:NAME, module.path:factory")


def _detail(kind: str, name: str) -> str:
    from nni_prune_ext.deployment import runtime  # imported here because it loads torch
    from nni_prune_ext.methods.base import MethodSpec
    from nni_prune_ext.registry import load_plugin
    from nni_prune_ext.schedules import SchedulerSpec

    if kind == "runtimes":
        availability = runtime(name).availability()
        return f"{'usable' if availability.usable else 'not usable'}: {availability.reason}"
    spec = load_plugin("pruners" if kind == "pruners" else "schedulers", name)
    if isinstance(spec, MethodSpec):
        return spec.summary + (" (needs data)" if spec.needs_data else "")
    return f"{spec.kind}: {spec.summary}" if isinstance(spec, SchedulerSpec) else str(spec)
