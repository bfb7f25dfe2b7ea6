"""``gates``: what per-input gates would save, before any training; gated networks as ONNX, faster on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nni_prune_ext.cli import options as o
from nni_prune_ext.cli.onnx_files import input_shape, written

if TYPE_CHECKING:
    from torch import Tensor

    from nni_prune_ext.export.onnx_gated import Flavour, GatedExport
    from nni_prune_ext.export.onnx_routes import RoutedExport
    from nni_prune_ext.gated_deployment import FastestFlavour
    from nni_prune_ext.gates import GatedNetwork, GatingEstimate
    from nni_prune_ext.ort_specialisation import Specialised
    from nni_prune_ext.workbench import Job

FLAVOURS = ("mask", "compact", "static", "fastest")
CALIBRATION_IMAGES = 512
"""Images that routes are found on, and as many that judge them, unless --images says otherwise."""

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
    block: Annotated[int, typer.Option(help="Filters switched together, at most: 1, 4, 8 or 16.")] = 1,
    images: Images = 512,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Says what gates would save and what perfect ones would cost in accuracy; trains and writes nothing."""
    from nni_prune_ext.cli.job import tell_json  # imported here to keep --help instant
    from nni_prune_ext.errors import ConfigError
    from nni_prune_ext.gates import estimate_gating, solve_mass
    from nni_prune_ext.gates.blocks import check_block
    from nni_prune_ext.gates.estimates import MASSES
    from nni_prune_ext.training import accuracy

    if macs is not None and uniform:
        raise ConfigError(
            "--macs and --uniform were both given, expected one: the mass is solved for, not the share. Leave one out."
        )
    check_block(block)
    job = _job(model, data, weights, pretrained, num_classes, image_size, limit_images, download, mean, std, seed=seed)
    batches = _images_and_labels(job, "train", images)
    found = estimate_gating(
        job.model,
        job.example,
        batches,
        masses=mass or [own for own in MASSES if own < 1 or not uniform],
        layers=gate or None,
        uniform=uniform,
        block=block,
        evaluate=lambda network: accuracy(network, batches),
        data=f"{len(batches[0][1])} training images",
    )
    solved = None
    if macs is not None:
        solved = solve_mass(job.model, job.example, batches, macs, layers=gate or None, block=block)
    if json:
        tell_json("done", estimates=[_facts(own) for own in found], block=block, macs=macs, mass=solved)
        return
    _show(found, accuracy(job.model, batches), uniform=uniform, block=block)
    if solved is not None:
        typer.echo(f"for {macs:.0%} of the dense MACs (closed loop): mass {solved:.3f}")


@app.command()
def export(
    model: o.ModelName,
    artefact: Annotated[Path, typer.Option(help="Artefact folder with a gated network.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="The ONNX file to write; for static, the folder.")],
    flavour: Annotated[str, typer.Option(help=f"{', '.join(FLAVOURS)} (measured on this machine).")] = "fastest",
    fold: Annotated[bool, typer.Option("--fold", help="Layers that do not gain lose their gates.")] = False,
    dense: Annotated[Path | None, typer.Option(help="ONNX file of the dense network, timed beside them.")] = None,
    routes: Annotated[int | None, typer.Option(min=1, help="static: how many sub-networks; 3 by default.")] = None,
    keep: Annotated[float | None, typer.Option(help="static: firing rate that keeps a filter, 0.5 by default.")] = None,
    multiple: Annotated[int | None, typer.Option(min=1, help="static: widths are multiples of this.")] = None,
    no_router: Annotated[bool, typer.Option("--no-router", help="static: write no router.onnx.")] = False,
    image_size: o.ImageSize = None,
    num_classes: o.NumClasses = None,
    download: o.Download = False,
    images: Annotated[int | None, typer.Option(min=8, help="How many images; 64, or 512 for static.")] = None,
    opset: Annotated[int, typer.Option(help="ONNX operator set.")] = 18,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Writes the gated network of an artefact folder as ONNX and compares masks and outputs with PyTorch."""
    from nni_prune_ext.cli.job import tell_json  # imported here to keep --help instant
    from nni_prune_ext.errors import ConfigError
    from nni_prune_ext.export.artefact_folder import GATED, ModelSpec, check_writable
    from nni_prune_ext.export.manifest import checked_manifest
    from nni_prune_ext.export.onnx_gated import export_gated
    from nni_prune_ext.gated_deployment import export_fastest

    if flavour not in FLAVOURS:
        known_ones = f"{', '.join(FLAVOURS[:-1])} or {FLAVOURS[-1]}"
        raise ConfigError(f"The flavour is '{flavour}', expected {known_ones}. Choose one of these.")
    if flavour == "mask" and fold:
        raise ConfigError(
            "The flavour mask gathers and folds nothing, but --fold was given, expected compact. Leave --fold out."
        )
    if flavour != "fastest" and dense is not None:
        raise ConfigError(
            f"--dense was given, but the flavour {flavour} is written without timing anything, expected fastest. Leave "
            "one of the two out."
        )
    if flavour != "static" and ({routes, keep, multiple} != {None} or no_router):
        raise ConfigError(
            f"--routes, --keep, --multiple or --no-router was given with the flavour {flavour}, expected static: no "
            "other flavour has routes. Leave them out, or ask for --flavour static."
        )
    if flavour == "static" and fold:
        raise ConfigError(
            "The flavour static has no gates to fold, but --fold was given, expected none. Leave --fold out."
        )
    checked_manifest(artefact, needed=(GATED,))
    reference = _reference(dense, artefact, out) if flavour == "fastest" else None
    check_writable(out.parent)
    known = ModelSpec.load(artefact)
    job = _job(model, data, None, False, num_classes, image_size, None, download, None, None, seed=seed, known=known)
    network = _gated_network(job, artefact)
    if flavour == "static":
        found = _export_static(
            network,
            job,
            out,
            images=images or CALIBRATION_IMAGES,
            routes=3 if routes is None else routes,
            keep=0.5 if keep is None else keep,
            multiple=1 if multiple is None else multiple,
            router=not no_router,
            opset=opset,
            seed=seed,
        )
        if json:
            tell_json("done", path=str(found.folder), flavour="static", **found.index.model_dump(mode="json"))
        else:
            _tell_routes(found)
        return
    given = _images_and_labels(job, "test", images or 64)[0][0]
    if reference is not None:
        _check_fits(reference, given)
    out.parent.mkdir(parents=True, exist_ok=True)
    best: FastestFlavour | None = None
    if flavour == "fastest":
        references = None if reference is None else {"dense": reference}
        best = export_fastest(network, job.example, out, given, references=references, fold=fold, opset=opset)
        made = best.export
    else:
        kind: Flavour = "mask" if flavour == "mask" else "compact"
        made = export_gated(network, job.example, out, flavour=kind, images=given, fold=fold, opset=opset)
    if json:
        tell_json("done", **_export_facts(made), **_timing_facts(best, reference))
        return
    _tell(made, best, reference)


def _reference(dense: Path | None, artefact: Path, out: Path) -> Path | None:
    """Returns the ONNX file of the dense network: the one given, or that of the run, if there is one.

    Raises:
        ConfigError: the one given is not there, or would be overwritten.
    """
    from nni_prune_ext.errors import ConfigError  # imported here to keep --help instant
    from nni_prune_ext.export.artefact_folder import ONNX

    if dense is None:
        own = artefact.parent / "dense" / ONNX  # where a run puts it
        return own if own.is_file() else None
    if not dense.is_file():
        raise ConfigError(
            f"There is no file '{dense}', expected the ONNX file of the dense network. Name it with --dense, or leave "
            "--dense out."
        )
    if dense.resolve() == out.resolve():
        raise ConfigError(f"--dense and --out are both '{dense}', expected two files. Write to another one.")
    return dense


def _check_fits(reference: Path, images: Tensor) -> None:
    """Refuses a dense network that does not take one of the images.

    Raises:
        ConfigError: its input is another.
        ModelError: it cannot be read as ONNX.
    """
    from nni_prune_ext.errors import ConfigError  # imported here to keep --help instant

    shape, wanted = input_shape(reference), (1, *images.shape[1:])
    if (shape[0] or 1, *shape[1:]) != wanted:
        raise ConfigError(
            f"The dense network '{reference}' takes inputs of {written(shape)}, expected {written(wanted)}, one image "
            "at a time, as the gated network does. Name another file with --dense."
        )


def _gated_network(job: Job, artefact: Path) -> GatedNetwork:
    """Reads the gated network of an artefact folder.

    Raises:
        ConfigError: its method does not gate by heads.
    """
    from nni_prune_ext.deployment import load_gated  # imported here to keep --help instant
    from nni_prune_ext.errors import ConfigError
    from nni_prune_ext.gates import GatedNetwork

    network = load_gated(job.model, artefact, job.example)
    if not isinstance(network, GatedNetwork):
        raise ConfigError(
            f"The gated network of '{artefact}' is a {type(network).__name__}, expected a GatedNetwork: its method "
            "does not gate by heads. Export it with code of that method."
        )
    return network


def _export_static(
    network: GatedNetwork,
    job: Job,
    out: Path,
    *,
    images: int,
    routes: int,
    keep: float,
    multiple: int,
    router: bool,
    opset: int,
    seed: int,
) -> RoutedExport:
    """Finds routes on training images and judges them on test images."""
    from nni_prune_ext.export.onnx_routes import export_routes  # imported here to keep --help instant

    calibration, (given, labels) = (_images_and_labels(job, split, images)[0] for split in ("train", "test"))
    return export_routes(
        network,
        job.example,
        out,
        calibration[0],
        given,
        labels,
        routes=routes,
        keep=keep,
        multiple=multiple,
        router=router,
        opset=opset,
        seed=seed,
    )


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


def _show(found: list[GatingEstimate], dense: float, *, uniform: bool, block: int) -> None:
    from rich.console import Console  # imported here to keep --help instant
    from rich.table import Table

    table = Table(
        caption="closed: targets applied; official: counted as the paper's code does; ceiling: perfect heads, nothing "
        f"trained; dense {dense:.2%}, on the same training images"
        + (f"; blocks of up to {block} filters" if block > 1 else ""),
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


def _timing_facts(best: FastestFlavour | None, reference: Path | None) -> dict[str, object]:
    return {
        "verdict": "" if best is None else best.verdict,
        "latency_ratios": {} if best is None else {row.name: row.ratio for row in best.latency.rows},
        "refused": {} if best is None else dict(best.refused),
        "dense": None if reference is None else str(reference),
    }


def _tell(made: GatedExport, best: FastestFlavour | None, reference: Path | None) -> None:
    assert made.parity is not None
    typer.echo(
        f"{made.path}: flavour {made.flavour}, {made.size_bytes:,} bytes, {made.parity.agreement:.4%} of the mask bits "
        f"agree with PyTorch on {made.parity.images} images, largest relative difference {made.parity.max_rel:.1e}"
    )
    if made.flavour == "compact":
        typer.echo(f"open filters only: {', '.join(made.gathered) or 'no layer'}")
    if made.folded:
        typer.echo(f"no longer gated, so this is another function: {', '.join(made.folded)}")
    if best is not None:
        for row in best.latency.rows:
            typer.echo(f"  {row.name}: × {row.ratio:.2f}")
        for name, reason in best.refused.items():
            typer.echo(f"  {name}: not considered. {reason}")
        typer.echo(
            "no dense network was timed, ratios are to the static core; --dense names one"
            if reference is None
            else f"ratios are to the dense network {reference}"
        )
        typer.echo(best.verdict)
    typer.echo(f"Limits: {made.limits}.")


def _tell_routes(made: RoutedExport) -> None:
    index = made.index
    for own, export in zip(index.routes, made.exports):
        assert export.parity is not None
        typer.echo(
            f"{export.path}: {own.share:.1%} of the images that the routes were found on, {own.macs_share:.3f} of the "
            f"MACs, accuracy {_percent(own.accuracy)} on its {own.images} test images, largest relative difference to "
            f"PyTorch {export.parity.max_rel:.1e}"
        )
    if index.router is not None:
        typer.echo(
            f"{made.folder / index.router.file}: {index.router.macs_share:.3f} of the MACs, right for "
            f"{index.router.agreement:.1%} of {index.images} test images (the most frequent route: "
            f"{index.router.most_frequent:.1%})"
        )
    for name, way in index.routings.items():
        typer.echo(f"  {name}: {way.macs_share:.3f} of the MACs, accuracy {_percent(way.accuracy)}")
    for remark in index.remarks:
        typer.echo(f"note: {remark}")
    typer.echo(f"Limits: {index.limits}.")


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.2%}"
