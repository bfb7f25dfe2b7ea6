"""``gates``: what per-input gates would save, before any training; gated networks as ONNX, faster on one machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from nni_prune_ext.cli import options as o
from nni_prune_ext.cli.gates_export import export
from nni_prune_ext.cli.gates_job import Data, Images, gates_job, images_and_labels
from nni_prune_ext.cli.gates_specialise import specialise

if TYPE_CHECKING:
    from nni_prune_ext.gates import GatingEstimate

app = typer.Typer(no_args_is_help=True, help="Per-input gates: what they would save, and their ONNX files.")


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
    job = gates_job(
        model, data, weights, pretrained, num_classes, image_size, limit_images, download, mean, std, seed=seed
    )
    batches = images_and_labels(job, "train", images)
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


app.command()(export)
app.command()(specialise)
