"""``export``: a checked ONNX file of a dense model, of a plan, or of an artefact folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nni_prune_ext.cli import options as o
from nni_prune_ext.cli.json_lines import json_line

if TYPE_CHECKING:
    from nni_prune_ext.export.onnx_static import ExportResult


def export(
    model: o.ModelName,
    out: Annotated[Path, typer.Option(help="The ONNX file to write.")],
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    plan: Annotated[Path | None, typer.Option(help="Remove the channels of this plan.json first.")] = None,
    artefact: Annotated[Path | None, typer.Option(help="Rebuild the compact model of this artefact folder.")] = None,
    num_classes: o.NumClasses = None,
    input_shape: o.InputShape = None,
    image_size: o.ImageSize = None,
    opset: Annotated[int, typer.Option(help="ONNX operator set.")] = 18,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Writes one ONNX file with dynamic batch and checks it against PyTorch on ONNX Runtime."""
    from nni_prune_ext.certificate import remove_channels  # imported here to keep --help instant
    from nni_prune_ext.cli.job import open_job
    from nni_prune_ext.deployment import load_pruned
    from nni_prune_ext.errors import ConfigError
    from nni_prune_ext.export.artefact_folder import PLAN, WEIGHTS, ModelSpec, check_writable
    from nni_prune_ext.export.manifest import checked_manifest
    from nni_prune_ext.export.onnx_static import export_onnx
    from nni_prune_ext.plan import PruningPlan

    if plan is not None and artefact is not None:
        raise ConfigError(
            "--plan and --artefact were both given, expected at most one: an artefact folder holds its own plan."
        )
    loaded = PruningPlan.load(plan) if plan is not None else None
    if artefact is not None:
        checked_manifest(artefact, needed=(PLAN, WEIGHTS))  # before anything in it is believed
    check_writable(out.parent)
    job = open_job(
        model,
        weights=weights,
        pretrained=pretrained,
        data=None,
        num_classes=num_classes,
        input_shape=input_shape,
        image_size=image_size,
        limit_images=None,
        download=False,
        mean=None,
        std=None,
        seed=seed,
        known=ModelSpec.load(artefact) if artefact is not None else None,
    )
    network, properties = job.model, {"model": job.spec.model_dump_json(exclude={"example"})}
    if artefact is not None:
        network = load_pruned(job.model, artefact, job.example)
        properties["plan"] = (artefact / PLAN).read_text(encoding="utf-8")
    elif loaded is not None:
        network = remove_channels(job.model, loaded, job.example, seed=seed).model
        properties["plan"] = loaded.to_json()
    out.parent.mkdir(parents=True, exist_ok=True)
    result = export_onnx(network, job.example, out, opset=opset, properties=properties)
    _tell(result, out, opset, as_json=json)


def _tell(result: ExportResult, out: Path, opset: int, *, as_json: bool) -> None:
    assert result.parity is not None
    if as_json:
        facts = {
            "path": str(out),
            "size_bytes": result.size_bytes,
            "opset": opset,
            "exporter": result.exporter,
            "fallback_reason": result.fallback_reason,
            "parity": {"max_rel": result.parity.max_rel, "num_inputs": result.parity.num_inputs},
        }
        typer.echo(json_line("done", facts))
        return
    typer.echo(
        f"{out}: {result.size_bytes:,} bytes, opset {opset}, exporter {result.exporter}, largest relative difference "
        f"to PyTorch {result.parity.max_rel:.1e} over {result.parity.num_inputs} inputs"
    )
    if result.fallback_reason:
        typer.echo(f"the first exporter failed: {result.fallback_reason}", err=True)
