"""``gates``: what per-input gates would save, before any training; gated networks as ONNX, faster on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nni_prune_ext.cli import options as o

if TYPE_CHECKING:
    from torch import Tensor

    from nni_prune_ext.export.onnx_gated import Flavour, GatedExport
    from nni_prune_ext.gates import GatingEstimate
    from nni_prune_ext.ort_specialisation import Specialised
    from nni_prune_ext.workbench import Job

FLAVOURS = ("mask", "compact", "fastest")

app = typer.Typer(no_args_is_help=True, help="Per-input gates: what they would save, and their ONNX files.")

Data = Annotated[str, typer.Option(help="digits, cifar10:ROOT, imagefolder:PATH, or module.path:factory.")]
Images = Annotated[int, typer.Option("--images", min=8, help="How many images are looked at.")]


@app.command()
def estimate(
    model: o.ModelName,
    data: Data,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    num_classes: o.NumClasses = None,
    image_size: o.ImageSize = None,
    limit_images: o.LimitImages = None,
    download: o.Download = False,
    mean: o.Mean = None,
    std: o.Std = None,
    mass: Annotated[list[float], typer.Option(help="Share of the heat to keep, 0–1; repeatable.")] = [],  # noqa: B006
    macs: Annotated[float | None, typer.Option(help="Also find the mass for this share of the dense MACs.")] = None,
    gate: Annotated[list[str], typer.Option(help="Name pattern of a layer to gate; repeatable.")] = [],  # noqa: B006
    uniform: Annotated[bool, typer.Option("--uniform", help="Masses are shares of the filters that go.")] = False,
    images: Images = 512,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Says what gates would save and what perfect ones would cost in accuracy; trains and writes nothing."""
    from nni_prune_ext.cli.job import tell_json  # imported here to keep --help instant
    from nni_prune_ext.errors import ConfigError
    from nni_prune_ext.gates import estimate_gating, solve_mass
    from nni_prune_ext.gates.estimates import MASSES
    from nni_prune_ext.training import accuracy

    if macs is not None and uniform:
        raise ConfigError(
            "--macs and --uniform were both given, expected one: the mass is solved for, not the share. Leave one out."
        )
    job = _job(model, data, weights, pretrained, num_classes, image_size, limit_images, download, mean, std, seed=seed)
    batches = _images_and_labels(job, "train", images)
    found = estimate_gating(
        job.model,
        job.example,
        batches,
        masses=mass or [own for own in MASSES if own < 1 or not uniform],
        layers=gate or None,
        uniform=uniform,
        evaluate=lambda network: accuracy(network, batches),
        data=f"{len(batches[0][1])} training images",
    )
    solved = None if macs is None else solve_mass(job.model, job.example, batches, macs, layers=gate or None)
    if json:
        tell_json("done", estimates=[_facts(own) for own in found], macs=macs, mass=solved)
        return
    _show(found, accuracy(job.model, batches), uniform=uniform)
    if solved is not None:
        typer.echo(f"for {macs:.0%} of the dense MACs (closed loop): mass {solved:.3f}")


@app.command()
def export(
    model: o.ModelName,
    artefact: Annotated[Path, typer.Option(help="Artefact folder with a gated network.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="The ONNX file to write.")],
    flavour: Annotated[str, typer.Option(help="mask, compact, or fastest: measured on this machine.")] = "fastest",
    fold: Annotated[bool, typer.Option("--fold", help="Layers that do not gain lose their gates.")] = False,
    image_size: o.ImageSize = None,
    num_classes: o.NumClasses = None,
    download: o.Download = False,
    images: Images = 64,
    opset: Annotated[int, typer.Option(help="ONNX operator set.")] = 18,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Writes the gated network of an artefact folder as ONNX and compares masks and outputs with PyTorch."""
    from nni_prune_ext.cli.job import tell_json  # imported here to keep --help instant
    from nni_prune_ext.deployment import load_gated
    from nni_prune_ext.errors import ConfigError
    from nni_prune_ext.export.artefact_folder import GATED, ONNX, ModelSpec, check_writable
    from nni_prune_ext.export.manifest import checked_manifest
    from nni_prune_ext.export.onnx_gated import export_gated
    from nni_prune_ext.gated_deployment import export_fastest
    from nni_prune_ext.gates import GatedNetwork

    if flavour not in FLAVOURS:
        known_ones = f"{', '.join(FLAVOURS[:-1])} or {FLAVOURS[-1]}"
        raise ConfigError(f"The flavour is '{flavour}', expected {known_ones}. Choose one of these.")
    if flavour == "mask" and fold:
        raise ConfigError(
            "The flavour mask gathers and folds nothing, but --fold was given, expected compact. Leave --fold out."
        )
    checked_manifest(artefact, needed=(GATED,))
    check_writable(out.parent)
    known = ModelSpec.load(artefact)
    job = _job(model, data, None, False, num_classes, image_size, None, download, None, None, seed=seed, known=known)
    network = load_gated(job.model, artefact, job.example)
    if not isinstance(network, GatedNetwork):
        raise ConfigError(
            f"The gated network of '{artefact}' is a {type(network).__name__}, expected a GatedNetwork: its method "
            "does not gate by heads. Export it with code of that method."
        )
    given = _images_and_labels(job, "test", images)[0][0]
    out.parent.mkdir(parents=True, exist_ok=True)
    verdict, rows = "", {}
    if flavour == "fastest":
        dense = artefact.parent / "dense" / ONNX  # where a run puts it
        references = {"dense": dense} if dense.is_file() else None
        best = export_fastest(network, job.example, out, given, references=references, fold=fold, opset=opset)
        made, verdict, rows = best.export, best.verdict, {row.name: row.ratio for row in best.latency.rows}
    else:
        kind: Flavour = "mask" if flavour == "mask" else "compact"
        made = export_gated(network, job.example, out, flavour=kind, images=given, fold=fold, opset=opset)
    if json:
        tell_json("done", **_export_facts(made), verdict=verdict, latency_ratios=rows)
        return
    _tell(made, verdict, rows)


@app.command()
def specialise(
    onnx: Annotated[Path, typer.Option(help="A gated network's ONNX file, of the flavour compact.")],
    data: Data,
    cache: Annotated[Path | None, typer.Option(help="Folder of the cache; the user's own by default.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say whether the cache has a file that works.")] = False,
    download: o.Download = False,
    mean: o.Mean = None,
    std: o.Std = None,
    images: Images = 64,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Caches a compact file in this machine's blocked layout, if that computes the same and is faster; CPU only."""
    from nni_prune_ext.cli.job import read_numbers, tell_json  # imported here to keep --help instant
    from nni_prune_ext.data.batches import split_batches
    from nni_prune_ext.data.sources import open_data
    from nni_prune_ext.ort_specialisation import open_specialised, specialise_ort_cpu, taken_shape

    source = open_data(
        data,
        image_size=taken_shape(onnx)[1],
        seed=seed,
        download=download,
        mean=read_numbers("--mean", mean),
        std=read_numbers("--std", std),
    )
    given = next(iter(split_batches(source, "test", images, seed=seed)))[0]
    if check:
        found = open_specialised(onnx, cache_folder=cache, images=given)
    else:
        found = specialise_ort_cpu(onnx, given, cache_folder=cache)
    if json:
        tell_json("done", specialised=found.reason is None, **found.to_dict())
        return
    _tell_file(found)


def _tell_file(found: Specialised) -> None:
    if found.reason is not None:
        typer.echo(f"Run the portable file, {found.path}: {found.reason}.")
        return
    assert found.parity is not None
    typer.echo(
        f"{found.path}: for this machine only, blocks of {found.block}, {found.parity.agreement:.4%} of the mask bits "
        f"agree with the portable file on {found.parity.images} images, largest relative difference "
        f"{found.parity.max_rel:.1e}"
    )
    typer.echo(f"takes × {found.latency_ratio:.2f} of the portable file's time")
    for name, reason in found.left.items():
        typer.echo(f"  not in this layout: {name}, {reason}")


def _job(
    model: str,
    data: str,
    weights: Path | None,
    pretrained: bool,
    num_classes: int | None,
    image_size: int | None,
    limit_images: int | None,
    download: bool,
    mean: str | None,
    std: str | None,
    *,
    seed: int,
    known: object = None,
) -> Job:
    from nni_prune_ext.cli.job import open_job  # imported here to keep --help instant
    from nni_prune_ext.export.artefact_folder import ModelSpec

    return open_job(
        model,
        weights=weights,
        pretrained=pretrained,
        data=data,
        num_classes=num_classes,
        input_shape=None,
        image_size=image_size,
        limit_images=limit_images,
        download=download,
        mean=mean,
        std=std,
        seed=seed,
        known=known if isinstance(known, ModelSpec) else None,
    )


def _images_and_labels(job: Job, split: str, count: int) -> list[tuple[Tensor, Tensor]]:
    """Returns the first images of a split with their labels, as one batch.

    Raises:
        ConfigError: the data are no images with labels.
    """
    from nni_prune_ext.errors import ConfigError  # imported here to keep --help instant

    if job.source is None:
        raise ConfigError("The data are loaders of any task, expected images with labels. Use the Python functions.")
    batches = job.batches(split, count)
    assert batches is not None
    images, labels = next(iter(batches))
    return [(images, labels)]


def _facts(own: GatingEstimate) -> dict[str, float | None]:
    closed = own.closed_loop
    assert closed is not None
    return {
        "mass": own.mass,
        "open_loop_macs_share": own.open_loop.share,
        "closed_loop_macs_share": closed.share,
        "closed_loop_spread": closed.spread / closed.dense,
        "official_macs_share": closed.official_share,
        "accuracy": own.accuracy,
    }


def _show(found: list[GatingEstimate], dense: float, *, uniform: bool) -> None:
    from rich.console import Console  # imported here to keep --help instant
    from rich.table import Table

    table = Table(
        caption="closed: targets applied; official: counted as the paper's code does; ceiling: perfect heads, nothing "
        f"trained; dense {dense:.2%}, on the same training images",
        caption_justify="left",
    )
    for heading in (
        "filters that go" if uniform else "mass",
        "MACs open",
        "closed",
        "± per image",
        "official",
        "ceiling",
    ):
        table.add_column(heading, justify="right")
    for own in found:
        facts = _facts(own)
        cells = [f"{facts[key]:.1%}" for key in list(facts)[1:5]]
        table.add_row(f"{own.mass:g}", *cells, f"{own.accuracy:.2%}")
    Console(width=120).print(table)


def _export_facts(made: GatedExport) -> dict[str, object]:
    return {
        "path": str(made.path),
        "flavour": made.flavour,
        "gathered": list(made.gathered),
        "masked": dict(made.masked),
        "folded": list(made.folded),
        "parity": made.parity.to_dict() if made.parity else None,
        "limits": made.limits,
        "size_bytes": made.size_bytes,
    }


def _tell(made: GatedExport, verdict: str, rows: dict[str, float]) -> None:
    assert made.parity is not None
    typer.echo(
        f"{made.path}: flavour {made.flavour}, {made.size_bytes:,} bytes, {made.parity.agreement:.4%} of the mask bits "
        f"agree with PyTorch on {made.parity.images} images, largest relative difference {made.parity.max_rel:.1e}"
    )
    if made.flavour == "compact":
        typer.echo(f"open filters only: {', '.join(made.gathered) or 'no layer'}")
    if made.folded:
        typer.echo(f"no longer gated, so this is another function: {', '.join(made.folded)}")
    for name, ratio in rows.items():
        typer.echo(f"  {name}: × {ratio:.2f}")
    typer.echo(f"{verdict} ".lstrip() + f"Limits: {made.limits}.")
