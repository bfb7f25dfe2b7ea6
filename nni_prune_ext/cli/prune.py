"""``prune``: the main job for one model and one method; its options are a recipe in other words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nni_prune_ext.cli import options as o


def prune(
    context: typer.Context,
    model: o.ModelName,
    out: Annotated[Path, typer.Option(help="Folder for the report and one artefact folder per network.")],
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
    epochs: Annotated[int, typer.Option(min=0, help="Epochs of recovery after the cut.")] = 0,
    distill: Annotated[
        float | None, typer.Option(help="Share of the loss that learns from the dense network's logits, in 0–1.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Temperature of the distillation.")] = None,
    optimizer: Annotated[str, typer.Option(help="sgd or adamw.")] = "sgd",
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of all training.")] = 0.01,
    weight_decay: Annotated[float, typer.Option(help="L2 for sgd, decoupled for adamw.")] = 5e-4,
    schedule: Annotated[str, typer.Option(help="cosine, step or constant.")] = "cosine",
    warmup_epochs: Annotated[float, typer.Option(help="Epochs of linear rise to the peak learning rate.")] = 0.0,
    batch_size: o.BatchSize = 128,
    accumulation_steps: Annotated[int, typer.Option(help="Batches per optimizer step.")] = 1,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 autocast in training.")] = "fp32",
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Train in channels-last memory format.")
    ] = False,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many epochs without a better validation accuracy.")
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="module.path:function of (model, batch); cross-entropy by default.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="module.path:function of (model, batches), higher is better; top-1 by default.")
    ] = None,
    control: Annotated[
        bool | None,
        typer.Option(
            "--control/--no-control",
            help="With training: train the dense network as long, as a row beside it.",
            show_default="control, where something trains",
        ),
    ] = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Measure latency side by side.")] = True,
    quantize: Annotated[
        list[str], typer.Option(help="Also make ONNX files in int8 or fp16, with rows of their own; repeatable.")
    ] = [],  # noqa: B006
    calibration: o.Calibration = "minmax",
    calibration_images: o.CalibrationImages = 256,
    keep_float: o.KeepFloat = [],  # noqa: B006
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; auto takes a GPU if there is one.")] = "auto",
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep the checkpoints when the run is done.")
    ] = False,
    settings: o.Settings = [],  # noqa: B006
    seed: o.Seed = 0,
    dry_run: o.DryRun = False,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Prunes, certifies, recovers, exports to ONNX, checks parity, and measures before and after."""
    from nni_prune_ext.cli.job import carry_out, recipe_of  # imported here to keep --help instant

    recipe, origins = recipe_of(context, settings, method=method)
    carry_out(recipe, origins, dry_run=dry_run, resume=resume, overwrite=overwrite, as_json=json)
