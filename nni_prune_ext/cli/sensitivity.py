"""``sensitivity``: prunes every channel group alone and says what it costs; limits for the next plan come of it."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nni_prune_ext.cli import options as o

if TYPE_CHECKING:
    from nni_prune_ext.sensitivity import Sensitivity, SensitivityPoint


def sensitivity(
    context: typer.Context,
    model: o.ModelName,
    data: o.Data,
    out: Annotated[Path, typer.Option(help="Folder for numbers, limits and page; an interrupted call goes on there.")],
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    num_classes: o.NumClasses = None,
    image_size: o.ImageSize = None,
    limit_images: o.LimitImages = None,
    download: o.Download = False,
    mean: o.Mean = None,
    std: o.Std = None,
    method: o.Method = "l1",
    option: o.Options = [],  # noqa: B006 (typer reads the default, nobody changes it)
    ratio: Annotated[list[float], typer.Option(help="Share of a group's channels to remove; repeatable.")] = [],  # noqa: B006
    max_drop: Annotated[float, typer.Option(help="What a group alone may cost, in the metric's unit.")] = 0.01,
    recalibrate: Annotated[
        int, typer.Option(min=0, help="Training batches on which batch norms are measured anew after every cut.")
    ] = 0,
    timed_on: Annotated[
        str | None, typer.Option("--on", help="Also measure latency on this registered runtime.")
    ] = None,
    max_ratio: o.MaxRatio = 0.9,
    min_channels: o.MinChannels = 1,
    multiple: o.Multiple = None,
    exclude: o.Exclude = [],  # noqa: B006
    batch_size: o.BatchSize = 128,
    settings: o.Settings = [],  # noqa: B006
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Prunes every channel group alone at several ratios, on validation data; writes limits for the next plan."""
    from nni_prune_ext.cli.job import recipe_of, tell_json  # imported here to keep --help instant
    from nni_prune_ext.errors import ConfigError, OutputError
    from nni_prune_ext.export.artefact_folder import check_writable
    from nni_prune_ext.sensitivity import RATIOS, latency_on, measure_sensitivity, write_sensitivity
    from nni_prune_ext.sensitivity.measuring import checked_drop
    from nni_prune_ext.workbench import prepare

    checked_drop(max_drop)
    check_writable(out)
    recipe, origins = recipe_of(context, settings, method=method, complete=False)
    prepared = prepare(recipe, origins=origins)
    validation, training = prepared.validation(), prepared.training_batches()
    if validation is None or training is None:
        raise ConfigError("There are no data to measure on, expected a data set. Pass --data.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot make the folder '{out}': {error}. Choose another place for --out.") from error

    def told(point: SensitivityPoint, number: int, count: int) -> None:
        if json:
            tell_json("point", number=number, of=count, **vars(point))
        else:
            typer.echo(f"{number} of {count}: {point.group} without {point.ratio:.0%}: {point.metric:.4f}", err=True)

    job = prepared.job
    with latency_on(timed_on, job.model, job.example) if timed_on else nullcontext(None) as latency:
        found = measure_sensitivity(
            job.model,
            job.example,
            validation,
            method=method,
            options=recipe.options,
            ratios=ratio or RATIOS,
            limits=recipe.limits,
            batches=training,
            recalibration=list(islice(training, recalibrate)) or None,
            loss=prepared.loss,
            latency=latency,
            groups=prepared.groups,
            file=out / "sensitivity.json",
            data=f"{len(job.source.val)} validation images of {job.source.name}" if job.source else "validation loader",
            metric_name=recipe.metric or "top-1",
            told=told,
            seed=seed,
        )
    write_sensitivity(out, found, max_drop=max_drop)
    if json:
        tell_json("done", out=str(out), dense=found.dense, largest_ratios=found.largest_ratios(max_drop))
    else:
        _show(found, max_drop, out)


def _show(found: Sensitivity, max_drop: float, out: Path) -> None:
    from rich.console import Console  # imported here to keep --help instant
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"dense {found.dense:.4f}; largest ratio for a drop of {max_drop:g}", title_justify="left")
    for heading in ("group", "channels", "largest ratio"):
        table.add_column(heading, justify="left" if heading == "group" else "right")
    for name, ratio in found.largest_ratios(max_drop).items():
        table.add_row(escape(name), str(found.channels[name]), f"{ratio:.3f}")
    Console(width=120).print(table)
    typer.echo(f"numbers, limits.json, nni_config.json and sensitivity.html in {out}")
