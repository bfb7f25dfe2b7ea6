"""``plan``: a dry run that says what hangs together, what is reachable, and what would go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nni_prune_ext.cli import options as o

if TYPE_CHECKING:
    from nni_prune_ext.costs import Costs
    from nni_prune_ext.graph.channel_groups import ChannelGroups
    from nni_prune_ext.pipeline import PruneResult


def plan(
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
    max_ratio: o.MaxRatio = 0.9,
    min_channels: o.MinChannels = 1,
    multiple: o.Multiple = 1,
    exclude: o.Exclude = [],  # noqa: B006
    layer: o.LayerLimits = [],  # noqa: B006
    scope: o.ScopeOption = "global",
    batch_size: o.BatchSize = 128,
    seed: o.Seed = 0,
    save: Annotated[Path | None, typer.Option(help="Write the plan as JSON here.")] = None,
) -> None:
    """Lists channel groups, protected layers and the feasible range; with --target also what would go."""
    from nni_prune_ext.allocation import CostModel, check_feasible  # imported here to keep --help instant
    from nni_prune_ext.certificate import verify_groups
    from nni_prune_ext.cli.job import open_job, read_limits, read_options
    from nni_prune_ext.costs import count_costs
    from nni_prune_ext.data.batches import split_batches
    from nni_prune_ext.export.artefact_folder import check_writable
    from nni_prune_ext.graph.channel_groups import trace_channel_groups
    from nni_prune_ext.pipeline import checked_scope, method_options, method_spec, parse_targets
    from nni_prune_ext.pipeline import prune as run_prune

    chosen = read_options(option)
    method_options(method_spec(method), chosen)
    targets = parse_targets(target) if target else ()
    limits = read_limits(max_ratio, min_channels, multiple, exclude, layer)
    checked = checked_scope(scope)
    if save is not None:
        check_writable(save.parent)
    job = open_job(
        model,
        weights=weights,
        pretrained=pretrained,
        data=data,
        num_classes=num_classes,
        input_shape=input_shape,
        image_size=image_size,
        limit_images=limit_images,
        download=download,
        mean=mean,
        std=std,
        seed=seed,
    )
    groups = verify_groups(job.model, job.example, trace_channel_groups(job.model, job.example), seed=seed)
    dense = count_costs(job.model, job.example)
    lowest = check_feasible(CostModel.of(job.model, groups, dense), targets, limits)
    result = None
    if targets:
        result = run_prune(
            job.model,
            job.example,
            method=method,
            target=targets,
            options=chosen,
            limits=limits,
            scope=checked,
            train_batches=split_batches(job.source, "train", batch_size, seed=seed) if job.source else None,
            groups=groups,
            seed=seed,
        )
    _show(model, groups, dense, lowest, result)
    if result is not None and save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        result.plan.save(save)
        typer.echo(f"plan written to {save}")


def _show(
    model: str, groups: ChannelGroups, dense: Costs, lowest: dict[str, float], result: PruneResult | None
) -> None:
    from rich.console import Console  # imported here to keep --help instant
    from rich.table import Table

    from nni_prune_ext.cli.job import tell_what_is_not_pruned

    title = f"{model}: {len(groups)} channel groups, {groups.num_channels} removable channels"
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
        typer.echo(f"target {achieved.target}: asked {achieved.asked:,.6g}, achieved {achieved.achieved:,.6g}")
