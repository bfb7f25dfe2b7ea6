"""``gates specialise``: a compact file in the layout of this machine, kept in a cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nni_prune_ext.cli import options as o
from nni_prune_ext.cli.gates_job import Data, Images

if TYPE_CHECKING:
    from nni_prune_ext.ort_specialisation import Specialised


def specialise(
    onnx: Annotated[Path, typer.Option(help="A gated network's ONNX file, of the flavour compact.")],
    data: Data,
    cache: Annotated[Path | None, typer.Option(help="Folder of the cache; the user's own by default.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say whether the cache has a file that works.")] = False,
    limit_images: o.LimitImages = None,
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
        limit=limit_images,
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
