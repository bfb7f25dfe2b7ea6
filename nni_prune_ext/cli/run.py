"""``run``: carries out a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nni_prune_ext.cli import options as o


def run(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A YAML file; see docs/reference/recipes.md.", show_default=False)],
    settings: o.Settings = [],  # noqa: B006 (typer reads the default, nobody changes it)
    out: Annotated[Path | None, typer.Option(help="Folder of the run, instead of the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed, instead of the recipe's.")] = None,
    dry_run: o.DryRun = False,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Carries out a recipe: train, prune, recover, export, check and measure, as far as it says."""
    from nni_prune_ext.cli.job import carry_out, set_options  # imported here to keep --help instant
    from nni_prune_ext.recipes import override, read_yaml, recipe_from
    from nni_prune_ext.workbench import check_recipe_survives

    values, origins = read_yaml(recipe)
    set_options(context, values, origins)
    override(values, origins, settings)
    checked = recipe_from(values, origins=origins)
    if overwrite:
        check_recipe_survives(recipe, checked.out)
    carry_out(checked, origins, dry_run=dry_run, resume=resume, overwrite=overwrite, as_json=json)
