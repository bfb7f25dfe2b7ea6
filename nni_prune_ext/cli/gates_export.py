"""``gates export``: writes the gated network of an artefact folder as ONNX, in one flavour or as routes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nni_prune_ext.cli import options as o
from nni_prune_ext.cli.gates_job import Data, gates_job, images_and_labels
from nni_prune_ext.cli.out_file import refuse_existing

if TYPE_CHECKING:
    from torch import Tensor

    from nni_prune_ext.export.onnx_gated import Flavour, GatedExport
    from nni_prune_ext.export.onnx_routes import RoutedExport
    from nni_prune_ext.gated_deployment import FastestFlavour
    from nni_prune_ext.gates import GatedNetwork
    from nni_prune_ext.workbench import Job

FLAVOURS = ("mask", "compact", "static", "fastest")
CALIBRATION_IMAGES = 512
"""Images that routes are found on, and as many that judge them, unless --images says otherwise."""


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
    limit_images: o.LimitImages = None,
    num_classes: o.NumClasses = None,
    download: o.Download = False,
    images: Annotated[int | None, typer.Option(min=8, help="How many images; 64, or 512 for static.")] = None,
    opset: Annotated[int, typer.Option(help="ONNX operator set.")] = 18,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file if it exists; for static, an earlier export.")
    ] = False,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Writes the gated network of an artefact folder as ONNX and compares masks and outputs with PyTorch."""
    from nni_prune_ext.cli.job import tell_json  # imported here to keep --help instant
    from nni_prune_ext.errors import ConfigError
    from nni_prune_ext.export.artefact_folder import GATED, ModelSpec
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
    _check_out(out, flavour, overwrite)
    known = ModelSpec.load(artefact)
    job = gates_job(
        model, data, None, False, num_classes, image_size, limit_images, download, None, None, seed=seed, known=known
    )
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
    given = images_and_labels(job, "test", images or 64)[0][0]
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


def _check_out(out: Path, flavour: str, overwrite: bool) -> None:
    """Makes sure that the file, or the folder of routes, can be written, and that nothing is lost unless it may be.

    Raises:
        OutputError: it cannot, or something would be.
    """
    from nni_prune_ext.export.artefact_folder import check_unused, check_writable  # imported here: --help is instant
    from nni_prune_ext.export.routes_folder import check_routes_folder

    if flavour != "static":
        refuse_existing(out, overwrite, example="gated.onnx")
        check_writable(out.parent)
        return
    check_routes_folder(out)
    if not overwrite:
        check_unused(out)


def _check_fits(reference: Path, images: Tensor) -> None:
    """Refuses a dense network that does not take one of the images.

    Raises:
        ConfigError: its input is another.
        ModelError: it cannot be read as ONNX.
    """
    from nni_prune_ext.errors import ConfigError  # imported here to keep --help instant
    from nni_prune_ext.export.onnx_inputs import input_shape, written_shape

    shape, wanted = input_shape(reference), (1, *images.shape[1:])
    if (shape[0] or 1, *shape[1:]) != wanted:
        raise ConfigError(
            f"The dense network '{reference}' takes inputs of {written_shape(shape)}, expected "
            f"{written_shape(wanted)}, one image at a time, as the gated network does. Name another file with --dense."
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

    calibration, (given, labels) = (images_and_labels(job, split, images)[0] for split in ("train", "test"))
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
