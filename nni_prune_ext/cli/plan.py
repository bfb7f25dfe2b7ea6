"""``plan``: says what hangs together, what is reachable, and what would go; trains and writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nni_prune_ext.cli import options as o

if TYPE_CHECKING:
    from nni_prune_ext.pipeline import PruneResult
    from nni_prune_ext.recipes import Origins, Recipe
    from nni_prune_ext.workbench import Prepared


def plan(
    context: typer.Context,
    model: o.ModelName,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    data: o.Data = None,
    num_classes: o.NumClasses = None,
    input_shape: o.InputShape = None,
    image_size: o.ImageSize = None,
    limit_images: o.LimitImages = None,
    download: o.Download = False,
    mean: o.Mean = None,
    std: o.Std = None,
    method: o.Method = "l1",
    target: o.Targets = [],  # noqa: B006 (typer reads the default, nobody changes it)
    option: o.Options = [],  # noqa: B006
    on: o.LatencyRuntime = "onnxruntime-cpu",
    batch: o.LatencyBatch = 1,
    percentile: o.LatencyPercentile = 50,
    threads: o.LatencyThreads = 1,
    clock: o.LatencyClock = "auto",
    max_ratio: o.MaxRatio = 0.9,
    min_channels: o.MinChannels = 1,
    multiple: o.Multiple = None,
    exclude: o.Exclude = [],  # noqa: B006
    layer: o.LayerLimits = [],  # noqa: B006
    limits: o.LimitsFile = None,
    scope: o.ScopeOption = "global",
    batch_size: o.BatchSize = 128,
    settings: o.Settings = [],  # noqa: B006
    seed: o.Seed = 0,
    save: Annotated[Path | None, typer.Option(help="Write the plan as JSON here.")] = None,
    json: o.Json = False,
) -> None:
    """Lists channel groups, protected layers and the feasible range; with --target also what would go."""
    from nni_prune_ext.cli.job import recipe_of  # imported here to keep --help instant
    from nni_prune_ext.cli.progress import Notes
    from nni_prune_ext.export.artefact_folder import check_writable
    from nni_prune_ext.pipeline import prune
    from nni_prune_ext.workbench import prepare

    recipe, origins = recipe_of(context, settings, method=method, complete=False)
    _refuse_sparsity(recipe, origins)
    if save is not None:
        check_writable(save.parent)
    prepared = prepare(recipe, origins=origins)
    result = None
    if recipe.target:
        result = prune(
            prepared.job.model,
            prepared.job.example,
            method=recipe.method or method,
            target=recipe.target,
            options=recipe.options,
            limits=recipe.limits,
            scope=recipe.scope,
            train_batches=prepared.training_batches(),
            loss=prepared.loss,
            settings=recipe.training,
            groups=prepared.groups,
            latency=recipe.latency,
            watcher=None if json else Notes(),
            seed=recipe.seed,
        )
    (_show_json if json else _show)(prepared, result)
    if result is not None and save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        result.plan.save(save)
        typer.echo(f"plan written to {save}", err=json)


def _refuse_sparsity(recipe: Recipe, origins: Origins) -> None:
    """Refuses to plan masks of single weights: a plan says which channels go.

    Raises:
        TargetError: a sparsity was asked for.
    """
    from nni_prune_ext.allocation import parse_targets, sparsity_of  # imported here to keep --help instant
    from nni_prune_ext.errors import TargetError

    if recipe.target and sparsity_of(parse_targets(recipe.target)) is not None:
        with origins.named("target"):
            raise TargetError(
                f"The target {recipe.target[0]} masks single weights and removes no channel, so there is no plan for "
                "it. Expected macs, params, memory, latency or ratio. Ask for one of these, or use "
                "`nni-prune-ext prune`."
            )


def _show(prepared: Prepared, result: PruneResult | None) -> None:
    from rich.console import Console  # imported here to keep --help instant
    from rich.table import Table

    from nni_prune_ext.cli.job import tell_what_is_not_pruned
    from nni_prune_ext.export.unaligned_widths import unaligned_convolutions, unaligned_sentence

    groups, dense, lowest = prepared.groups, prepared.dense, prepared.reachable
    assert groups is not None
    title = f"{prepared.recipe.model.name}: {len(groups)} channel groups, {groups.num_channels} removable channels"
    table = Table(title=title, title_justify="left")
    for heading in ("root", "channels", "layers", *(["would go"] if result else [])):
        table.add_column(heading)
    for group in groups:
        layers = len({member.tensor.rpartition(".")[0] for member in group.members})
        gone = [str(len(result.plan.removed.get(group.name, ())))] if result else []
        table.add_row(group.name, str(group.num_channels), str(layers), *gone)
    Console().print(table)
    for protected in groups.protected:
        typer.echo(f"protected: {protected.root} ({protected.width}): {protected.reason}")
    for name in groups.rewrites:
        typer.echo(f"rewritten exactly before the cut: {name}")
    tell_what_is_not_pruned(groups)
    typer.echo(f"dense: {dense.macs:,} MACs, {dense.params:,} parameters, {dense.weight_bytes:,} bytes")
    typer.echo(
        f"reachable: down to {lowest['macs'] / max(dense.macs, 1):.3f} of the MACs, "
        f"{lowest['params'] / max(dense.params, 1):.3f} of the parameters, ratio up to {lowest['ratio']:.3f}"
    )
    for achieved in result.achieved if result else ():
        typer.echo(f"target {achieved}")
    for sentence in result.latency.sentences() if result and result.latency else ():
        typer.echo(sentence)
    unaligned = unaligned_convolutions(result.model) if result else {}
    if unaligned:
        typer.echo(f"warning: {unaligned_sentence(unaligned)}", err=True)


def _show_json(prepared: Prepared, result: PruneResult | None) -> None:
    from nni_prune_ext.cli.job import tell_json  # imported here to keep --help instant
    from nni_prune_ext.export.unaligned_widths import unaligned_convolutions

    groups = prepared.groups
    assert groups is not None
    removed = result.plan.removed if result else {}
    tell_json(
        "plan",
        model=prepared.recipe.model.name,
        groups=[
            {"root": group.name, "channels": group.num_channels, "removed": len(removed.get(group.name, ()))}
            for group in groups
        ],
        protected=[vars(protected) for protected in groups.protected],
        rewrites=list(groups.rewrites),
        unreached=list(groups.unreached),
        value_dependent=list(groups.value_dependent),
        dense=prepared.dense.as_dict(),
        reachable=prepared.reachable,
        unaligned=unaligned_convolutions(result.model) if result else {},
        targets=[
            {"target": str(a.target), "dense": a.dense, "asked": a.asked, "achieved": a.achieved, "met": a.met}
            for a in (result.achieved if result else ())
        ],
        latency=result.latency.to_dict() if result and result.latency else None,
    )
