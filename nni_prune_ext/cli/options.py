"""The options that several verbs take, with one wording each, and the recipe key that each one sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

RECIPE_KEYS = {
    "model": "model.name",
    "weights": "model.weights",
    "pretrained": "model.pretrained",
    "num_classes": "model.num_classes",
    "input_shape": "model.input_shape",
    "data": "data.source",
    "batch_size": "data.batch_size",
    "image_size": "data.image_size",
    "limit_images": "data.limit_images",
    "download": "data.download",
    "mean": "data.mean",
    "std": "data.std",
    "method": "method",
    "option": "options",
    "target": "target",
    "on": "latency.runtime",
    "batch": "latency.batch",
    "percentile": "latency.percentile",
    "threads": "latency.threads",
    "clock": "latency.clock",
    "max_ratio": "limits.max_ratio",
    "min_channels": "limits.min_channels",
    "multiple": "limits.multiple",
    "exclude": "limits.exclude",
    "layer": "limits.layers",
    "scope": "scope",
    "epochs": "recovery.epochs",
    "optimizer": "training.optimizer",
    "learning_rate": "training.learning_rate",
    "weight_decay": "training.weight_decay",
    "schedule": "training.schedule",
    "warmup_epochs": "training.warmup_epochs",
    "precision": "training.precision",
    "channels_last": "training.channels_last",
    "accumulation_steps": "training.accumulation_steps",
    "patience": "training.patience",
    "loss": "loss",
    "metric": "metric",
    "distill": "distillation.weight",
    "temperature": "distillation.temperature",
    "control": "control",
    "measure": "measure",
    "quantize": "quantize.precision",
    "calibration": "quantize.calibration",
    "calibration_images": "quantize.images",
    "keep_float": "quantize.keep_float",
    "device": "device",
    "keep_checkpoints": "keep_checkpoints",
    "seed": "seed",
    "out": "out",
}
"""Option → the key of a recipe that it sets."""
NOT_IN_RECIPES = ("recipe", "settings", "limits", "save", "dry_run", "resume", "overwrite", "json")
"""Options about the command itself."""

ModelName: TypeAlias = Annotated[
    str, typer.Argument(help="resnet56, torchvision:NAME, timm:NAME, or module.path:factory.", show_default=False)
]
Weights: TypeAlias = Annotated[
    Path | None, typer.Option(help="Weights of the dense model: safetensors or a weights-only .pt.")
]
Pretrained: TypeAlias = Annotated[
    bool, typer.Option("--pretrained", help="Let torchvision or timm download its weights.")
]
Data: TypeAlias = Annotated[
    str | None, typer.Option(help="digits, cifar10:ROOT, imagefolder:PATH, or module.path:factory.")
]
NumClasses: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="Classes of the model; the data's own by default.")
]
InputShape: TypeAlias = Annotated[
    str | None, typer.Option(help="N,C,H,W of the example input; the data's own by default.")
]
ImageSize: TypeAlias = Annotated[int | None, typer.Option(min=1, help="Height and width of the images.")]
LimitImages: TypeAlias = Annotated[int | None, typer.Option(min=1, help="At most so many images per split.")]
Download: TypeAlias = Annotated[bool, typer.Option("--download", help="Let torchvision download CIFAR-10.")]
Mean: TypeAlias = Annotated[str | None, typer.Option(help="Mean per channel, comma-separated, for pixels in 0–1.")]
Std: TypeAlias = Annotated[str | None, typer.Option(help="Standard deviation per channel, comma-separated.")]
Method: TypeAlias = Annotated[str, typer.Option(help="A registered pruner; see `list pruners`.")]
Targets: TypeAlias = Annotated[
    list[str],
    typer.Option(
        "--target",
        help="macs=, params=, memory=, latency= (upper bounds), ratio= (share removed) or sparsity= (share of weights "
        "masked); repeatable.",
    ),
]
LatencyRuntime: TypeAlias = Annotated[
    str, typer.Option("--on", help="Runtime on which a latency target is measured; see `list runtimes`.")
]
LatencyBatch: TypeAlias = Annotated[int, typer.Option("--batch", help="Images per run, for a latency target.")]
LatencyPercentile: TypeAlias = Annotated[
    int, typer.Option("--percentile", help="50, 95 or 99: of the times of single runs, for a latency target.")
]
LatencyThreads: TypeAlias = Annotated[
    int, typer.Option("--threads", help="CPU threads of one run, for a latency target.")
]
LatencyClock: TypeAlias = Annotated[
    str, typer.Option("--clock", help="auto, cpu or wall, for a latency target; auto: CPU time where it counts.")
]
Options: TypeAlias = Annotated[list[str], typer.Option("--option", help="KEY=VALUE for the method; repeatable.")]
MaxRatio: TypeAlias = Annotated[float, typer.Option(help="Largest share of a group's channels that may go.")]
MinChannels: TypeAlias = Annotated[int, typer.Option(help="Smallest number of channels of a group.")]
Multiple: TypeAlias = Annotated[
    int | None,
    typer.Option(
        help="Keep widths at multiples of this. Left out: by width, 16, 8 or 1; with a latency target a probe decides."
    ),
]
Exclude: TypeAlias = Annotated[list[str], typer.Option(help="Name pattern of layers that stay whole; repeatable.")]
LayerLimits: TypeAlias = Annotated[
    list[str], typer.Option("--layer", help="PATTERN=MIN:MAX pruning ratios; repeatable.")
]
LimitsFile: TypeAlias = Annotated[
    Path | None,
    typer.Option("--limits", help="JSON file of limits, such as the advice of `doctor`; options win over it."),
]
ScopeOption: TypeAlias = Annotated[
    str, typer.Option("--scope", help="global: one ranking; local: one ratio for all groups.")
]
Calibration: TypeAlias = Annotated[
    str, typer.Option(help="How int8 takes its ranges: minmax, entropy, percentile, or dynamic.")
]
CalibrationImages: TypeAlias = Annotated[int, typer.Option(min=8, help="Training images that calibrate int8.")]
KeepFloat: TypeAlias = Annotated[
    list[str], typer.Option(help="Name pattern of layers that stay in float32; repeatable.")
]
Seed: TypeAlias = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
BatchSize: TypeAlias = Annotated[int, typer.Option(min=1, help="Images per batch.")]
Settings: TypeAlias = Annotated[
    list[str], typer.Option("--set", help="KEY=VALUE of any recipe key, for example training.gamma=0.2; repeatable.")
]
DryRun: TypeAlias = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, show the whole recipe and the work; write nothing.")
]
Resume: TypeAlias = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in --out where it was interrupted.")
]
Overwrite: TypeAlias = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON object per line, for machines.")]
