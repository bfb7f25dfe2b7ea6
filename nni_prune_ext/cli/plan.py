"""``plan``: a dry run that says what hangs together, what is reachable, and what would go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nni_prune_ext.cli import options as o


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
    from rich.console import Console  # imported here to keep --help instant
    from rich.table import Table

    from nni_prune_ext.allocation import CostModel, check_feasible
    from nni_prune_ext.certificate import verify_groups
    from nni_prune_ext.cli.job import open_job, read_limits, read_options
    from nni_prune_ext.costs import count_costs
    from nni_prune_ext.data.batches import split_batches
    from nni_prune_ext.deployment import check_writable
    from nni_prune_ext.graph.channel_groups import trace_channel_groups
    from nni_prune_ext.pipeline import checked_scope, method_spec, parse_targets
    from nni_prune_ext.pipeline import prune as run_prune

    method_spec(method)
    targets = parse_targets(target)
    limits = read_limits(max_ratio, min_channels, multiple, exclude, layer)
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
        batches = split_batches(job.source, "train", batch_size, seed=seed) if job.source else None
        result = run_prune(
            job.model,
            job.example,
            method=method,
            target=targets,
            options=read_options(option),
            limits=limits,
            scope=checked_scope(scope),
            train_batches=batches,
            groups=groups,
            seed=seed,
        )
    console = Console()
    table = Table(
        title=f"{model}: {len(groups)} channel groups, {groups.num_channels} removable channels", title_justify="left"
    )
    for heading in ("root", "channels", "layers", "would go" if result else ""):
        table.add_column(heading)
    for group in groups:
        gone = len(result.plan.removed.get(group.name, ())) if result else None
        table.add_row(
            group.name,
            str(group.num_channels),
            str(len({m.tensor.rpartition(".")[0] for m in group.members})),
            "" if gone is None else str(gone),
        )
    console.print(table)
    for protected in groups.protected:
        console.print(
            f"protected: {protected.root} ({protected.width}): {protected.reason}", markup=False, highlight=False
        )
    for name in groups.rewrites:
        console.print(f"rewritten exactly before the cut: {name}", markup=False, highlight=False)
    if groups.unreached:
        console.print(
            f"not reached by the forward pass, left as they are: {', '.join(groups.unreached)}",
            markup=False,
            highlight=False,
        )
    console.print(
        f"dense: {dense.macs:,} MACs, {dense.params:,} parameters, {dense.weight_bytes:,} bytes; reachable: down to "
        f"{lowest['macs'] / max(dense.macs, 1):.3f} of the MACs, {lowest['params'] / max(dense.params, 1):.3f} of the "
        f"parameters, ratio up to {lowest['ratio']:.3f}",
        highlight=False,
    )
    if result is not None:
        for achieved in result.achieved:
            console.print(
                f"target {achieved.target}: asked {achieved.asked:,.6g}, achieved {achieved.achieved:,.6g}",
                highlight=False,
            )
        assert result.certificate is None or result.certificate.exact
        if save is not None:
            save.parent.mkdir(parents=True, exist_ok=True)
            result.plan.save(save)
            console.print(f"plan written to {save}", highlight=False)
