"""``prune``: the main job for one model and one method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nni_prune_ext.cli import options as o


def prune(
    model: o.ModelName,
    out: Annotated[Path, typer.Option(help="Folder for report.json and one artefact folder per network.")],
    target: o.Targets,
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
    option: o.Options = [],  # noqa: B006 (typer reads the default, nobody changes it)
    max_ratio: o.MaxRatio = 0.9,
    min_channels: o.MinChannels = 1,
    multiple: o.Multiple = 1,
    exclude: o.Exclude = [],  # noqa: B006
    layer: o.LayerLimits = [],  # noqa: B006
    scope: o.ScopeOption = "global",
    epochs: Annotated[int, typer.Option(min=0, help="Epochs of recovery after the cut.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of all training.")] = 0.01,
    batch_size: o.BatchSize = 128,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 autocast in training.")] = "fp32",
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Train in channels-last memory format.")
    ] = False,
    control: Annotated[
        bool, typer.Option(help="With --epochs: train the dense network as long, as a row beside it.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
    seed: o.Seed = 0,
) -> None:
    """Prunes, certifies, recovers, exports to ONNX, checks parity, and measures before and after."""
    import copy  # imported here to keep --help instant
    import time

    from rich.console import Console

    from nni_prune_ext.cli.job import open_job, read_limits, read_options, tell_what_is_not_pruned
    from nni_prune_ext.data.batches import split_batches
    from nni_prune_ext.deployment import (
        Variant,
        compare_variants,
        latency_caption,
        measurement_facts,
        result_facts,
    )
    from nni_prune_ext.export.artefact_folder import check_unused, check_writable
    from nni_prune_ext.pipeline import checked_scope, method_options, method_spec, parse_targets
    from nni_prune_ext.pipeline import prune as run_prune
    from nni_prune_ext.report import before_after_table, write_report
    from nni_prune_ext.training import EpochLog, checked_settings, fit

    spec, targets = method_spec(method), parse_targets(target)
    options = read_options(option)
    method_options(spec, options)
    limits = read_limits(max_ratio, min_channels, multiple, exclude, layer)
    settings = checked_settings(learning_rate=learning_rate, precision=precision, channels_last=channels_last)
    checked = checked_scope(scope)
    (check_writable if overwrite else check_unused)(out)
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
    train = split_batches(job.source, "train", batch_size, seed=seed) if job.source else None
    test = split_batches(job.source, "test", 500) if job.source else None
    console = Console(width=160)

    def tell(text: str) -> None:
        console.print(text, style="dim", highlight=False)

    def show(log: EpochLog) -> None:
        tell(f"{log.phase} epoch {log.epoch + 1}: loss {log.loss:.4f}, {log.seconds:.0f} s")

    began = time.perf_counter()
    result = run_prune(
        job.model,
        job.example,
        method=method,
        target=targets,
        options=options,
        limits=limits,
        scope=checked,
        train_batches=train,
        recover_epochs=epochs,
        settings=settings,
        seed=seed,
        on_epoch=show,
    )
    tell_what_is_not_pruned(result.groups)
    variants = [Variant("dense", job.model), Variant(method, result.model, result, time.perf_counter() - began)]
    trained = len(result.logs)
    if control and trained and train is not None:
        longer, began = copy.deepcopy(job.model), time.perf_counter()
        fit(longer, train, epochs=trained, settings=settings, on_epoch=show, name="dense")
        variants.insert(1, Variant("dense-trained-longer", longer, seconds=time.perf_counter() - began))
    rows, latency = compare_variants(
        variants,
        out,
        job.example,
        test_batches=test,
        progress=tell,
        spec=job.spec,
        overwrite=overwrite,
    )
    facts = {"model": model, "data": data, "seed": seed, "recovery_epochs": epochs}
    write_report(out / "report.json", rows, {**facts, **measurement_facts(latency), **result_facts(result)})
    console.print(before_after_table(rows, title=f"{model}, {method}", caption=latency_caption(latency, test is None)))
    for achieved in result.achieved:
        console.print(
            f"target {achieved.target}: asked {achieved.asked:,.6g}, achieved {achieved.achieved:,.6g}", highlight=False
        )
    console.print(f"artefacts in {out / method}, report in {out / 'report.json'}", highlight=False)
