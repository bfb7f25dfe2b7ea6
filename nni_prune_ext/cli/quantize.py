"""``quantize``: the int8 or fp16 form of a float32 ONNX file, compared with it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nni_prune_ext.cli import options as o

if TYPE_CHECKING:
    from nni_prune_ext.export.artefact_folder import ModelSpec
    from nni_prune_ext.export.precision_check import Reduced
    from nni_prune_ext.export.reduced_export import ReducedExport

TEST_BATCH = 100


def quantize(
    precision: Annotated[str, typer.Option(help="int8 for the CPU, fp16 for CUDA and TensorRT.")] = "int8",
    onnx: Annotated[Path | None, typer.Option(help="A float32 file that this package wrote.")] = None,
    artefact: Annotated[
        Path | None, typer.Option(help="An artefact folder; the new file goes into it, and into its manifest.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The ONNX file to write; goes with --onnx.")] = None,
    data: o.Data = None,
    calibration: o.Calibration = "minmax",
    calibration_images: o.CalibrationImages = 256,
    keep_float: o.KeepFloat = [],  # noqa: B006 (typer reads the default, nobody changes it)
    max_drop: Annotated[
        float | None, typer.Option(help="Largest loss of accuracy, 0–1.", show_default="0.02; 0.005 for fp16")
    ] = None,
    image_size: o.ImageSize = None,
    limit_images: o.LimitImages = None,
    download: o.Download = False,
    mean: o.Mean = None,
    std: o.Std = None,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Writes a file of lower precision, calibrated on training images and compared on test images."""
    from nni_prune_ext.cli.job import read_numbers, tell_json  # imported here to keep --help instant
    from nni_prune_ext.data.batches import split_batches
    from nni_prune_ext.data.sources import open_data
    from nni_prune_ext.export.int8 import known_calibration
    from nni_prune_ext.export.parent_file import open_parent
    from nni_prune_ext.export.precision_check import DROPS
    from nni_prune_ext.lower_precision import LowerPrecision, convert
    from nni_prune_ext.workbench import calibration_images as drawn

    kind, method = _precision(precision), known_calibration(calibration)
    file, place, spec = _places(onnx, artefact, out, kind)
    open_parent(file)  # before images are read
    images = test = None
    if data is not None:
        source = open_data(
            data,
            image_size=image_size,
            limit=limit_images,
            seed=seed,
            download=download,
            mean=read_numbers("--mean", mean) or (list(spec.mean) if spec and spec.mean else None),
            std=read_numbers("--std", std) or (list(spec.std) if spec and spec.std else None),
        )
        images, test = drawn(source, calibration_images, seed=seed), split_batches(source, "test", TEST_BATCH)
    lower = LowerPrecision((kind,), images, method, tuple(keep_float))
    with place as path:
        made = convert(file, path, kind, lower, test, max_drop=DROPS[kind] if max_drop is None else max_drop)
    if json:
        tell_json("done", path=str(made.path), **made.facts())
    else:
        _tell(made)


def _precision(name: str) -> Reduced:
    from nni_prune_ext.errors import ConfigError  # imported here to keep --help instant

    if name == "int8":
        return "int8"
    if name == "fp16":
        return "fp16"
    raise ConfigError(f"--precision is '{name}', expected int8 or fp16. Choose one of them.")


def _places(
    onnx: Path | None, artefact: Path | None, out: Path | None, kind: Reduced
) -> tuple[Path, AbstractContextManager[Path], ModelSpec | None]:
    """Returns the float32 file, the place of the new one, and how the model of an artefact folder is called.

    Raises:
        ConfigError: the options do not say which file to read, or where to write.
        ArtefactError: the folder is not whole.
    """
    from nni_prune_ext.errors import ConfigError  # imported here to keep --help instant
    from nni_prune_ext.export.artefact_folder import ONNX, REDUCED_ONNX, ModelSpec, check_writable
    from nni_prune_ext.export.manifest import checked_manifest, replacing_part

    if (onnx is None) == (artefact is None):
        raise ConfigError(
            f"{'Neither' if onnx is None else 'Both'} of --onnx and --artefact {'was' if onnx is None else 'were'} "
            "given, expected one of them. Name the file, or the folder that holds it as model.onnx."
        )
    if artefact is not None:
        if out is not None:
            raise ConfigError(
                "--out was given with --artefact, expected with --onnx only: the file goes into the folder. Leave it "
                "out."
            )
        checked_manifest(artefact, needed=(ONNX,))
        return artefact / ONNX, replacing_part(artefact, REDUCED_ONNX[kind]), ModelSpec.load(artefact)
    if out is None:
        raise ConfigError("--onnx was given without --out, expected the name of the file to write. Add --out.")
    check_writable(out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    assert onnx is not None
    return onnx, nullcontext(out), None


def _tell(made: ReducedExport) -> None:
    parity, total = made.parity, len(made.reduced) + len(made.kept_float)
    typer.echo(f"{made.path}: {made.size_bytes:,} bytes, {len(made.reduced)} of {total} layers in {made.precision}")
    for name, reason in made.kept_float.items():
        typer.echo(f"in float32: {name}: {reason}")
    agreement = "" if parity.top1_agreement is None else f", the same class for {100 * parity.top1_agreement:.1f} %"
    typer.echo(f"largest difference to float32 {parity.max_rel:.1e} over {parity.images} images{agreement}")
    if parity.drop is not None:
        typer.echo(f"accuracy {parity.float_top1:.4f} in float32, {parity.top1:.4f} in {made.precision}")
    typer.echo(made.advice)
