"""``benchmark``: artefact folders and ONNX files measured against each other on the runtimes of this machine."""

from __future__ import annotations

import json as json_text
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nni_prune_ext.cli import options as o
from nni_prune_ext.cli.json_lines import finite_values, json_line

if TYPE_CHECKING:
    from rich.table import Table

    from nni_prune_ext.data.image_arrays import DataSource
    from nni_prune_ext.evidence import Evidence
    from nni_prune_ext.evidence.results import Timing
    from nni_prune_ext.report import page_parts

FILE_NAME = "evidence.json"
ONLY_IF_ASKED = {
    "torch-compile": "It compiles for minutes per network and is measured only if asked for: --on torch-compile"
}
"""Runtime → why it is not among those that are taken by default."""


class PrecisionName(str, Enum):
    """Type of the arithmetic."""

    fp32 = "fp32"
    fp16 = "fp16"


class ClockName(str, Enum):
    """What latency is timed with."""

    auto = "auto"
    cpu = "cpu"
    wall = "wall"


class DeviceName(str, Enum):
    """Where PyTorch runs."""

    cpu = "cpu"
    cuda = "cuda"


def benchmark(
    networks: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER_OR_ONNX...", help="Artefact folders or .onnx files; the first one is the reference."
        ),
    ],
    on: Annotated[
        list[str],
        typer.Option(
            "--on", help="A registered runtime; repeatable. All that are usable but torch-compile by default."
        ),
    ] = [],  # noqa: B006 (typer reads the default, nobody changes it)
    batch: Annotated[list[int], typer.Option("--batch", min=1, help="Images per run; repeatable.")] = [1],  # noqa: B006
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of one run.")] = 1,
    precision: Annotated[PrecisionName, typer.Option(help="Type of the arithmetic.")] = PrecisionName.fp32,
    clock: Annotated[
        ClockName, typer.Option(help="Of latency: CPU time of one thread, elapsed time, or what counts the work.")
    ] = ClockName.auto,
    rounds: Annotated[int, typer.Option(min=1, help="Fewest rounds in which all networks take turns.")] = 30,
    seconds: Annotated[float, typer.Option(min=0, help="Shortest time of each measurement.")] = 2.0,
    fresh: Annotated[
        int, typer.Option(min=0, help="Fresh processes per network and runtime, for cold start and peak memory.")
    ] = 3,
    runtime_option: Annotated[
        list[str], typer.Option("--runtime-option", help="RUNTIME:KEY=VALUE for a runtime; repeatable.")
    ] = [],  # noqa: B006
    model: Annotated[
        str | None, typer.Option(help="How the original model of the folders is built, where they do not say.")
    ] = None,
    device: Annotated[DeviceName, typer.Option(help="Where the PyTorch runtimes run.")] = DeviceName.cpu,
    data: o.Data = None,
    image_size: o.ImageSize = None,
    limit_images: o.LimitImages = None,
    download: o.Download = False,
    mean: o.Mean = None,
    std: o.Std = None,
    seed: o.Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write everything that was measured as JSON to this .json file or folder.")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Write one page about it: .html or .md.")] = None,
    json: o.Json = False,
) -> None:
    """Measures accuracy, parity, latency, throughput, memory, cold start and size of networks, side by side."""
    from nni_prune_ext.deployment import runtime  # imported here to keep --help instant
    from nni_prune_ext.evidence import Building, Conditions, collect_evidence, common_shape, read_networks
    from nni_prune_ext.evidence.page import check_page_name, write_evidence_page
    from nni_prune_ext.evidence.results import NotMeasured
    from nni_prune_ext.export.artefact_folder import check_writable
    from nni_prune_ext.registry import plugins
    from nni_prune_ext.text_files import write_text

    _check_device(device)
    options = _runtime_options(runtime_option)
    left_out = {} if on else ONLY_IF_ASKED
    names = dict.fromkeys(on or plugins("runtimes"))
    runtimes = {name: runtime(name, options.get(name)) for name in names if name not in left_out}
    _check_used(options, list(runtimes))
    if page is not None:
        check_page_name(page)
    file = None if out is None else out if out.suffix == ".json" else out / FILE_NAME
    for path in filter(None, (file, page)):
        check_writable(path.parent)
    read = read_networks(networks, model=model, device=device.value)
    common_shape(read, batch)
    conditions = Conditions(
        batches=tuple(dict.fromkeys(batch)),
        threads=threads,
        precision=precision.value,
        clock=clock.value,
        rounds=rounds,
        seconds=seconds,
        fresh=fresh,
        seed=seed,
    )
    evidence = collect_evidence(
        read,
        runtimes,
        conditions,
        source=_opened(data, image_size, limit_images, seed, download, mean, std),
        building=Building(options, model, device.value),
        progress=lambda text: typer.echo(text, err=True),
    )
    skipped = (NotMeasured(name, reason) for name, reason in left_out.items())
    evidence = replace(evidence, not_measured=(*evidence.not_measured, *skipped))
    for path in filter(None, (file, page)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if file is not None:
        write_text(file, json_text.dumps(finite_values(evidence.facts()), indent=1, allow_nan=False) + "\n")
    if page is not None:
        write_evidence_page(page, evidence)
    if json:
        typer.echo(json_line("done", evidence.facts()))
    else:
        _show(evidence)
    _end(evidence, asked=bool(on), tell=json)


def _opened(
    data: str | None,
    image_size: int | None,
    limit_images: int | None,
    seed: int,
    download: bool,
    mean: str | None,
    std: str | None,
) -> DataSource | None:
    from nni_prune_ext.cli.job import read_numbers  # imported here to keep --help instant
    from nni_prune_ext.data.sources import open_data

    if data is None:
        return None
    return open_data(
        data,
        image_size=image_size,
        limit=limit_images,
        seed=seed,
        download=download,
        mean=read_numbers("--mean", mean),
        std=read_numbers("--std", std),
    )


def _check_device(device: DeviceName) -> None:
    import torch  # imported here to keep --help instant

    from nni_prune_ext.errors import ConfigError

    if device is DeviceName.cuda and not torch.cuda.is_available():
        raise ConfigError(
            "--device is cuda, but PyTorch sees no CUDA device, expected one. Leave it out, or run this where there is "
            "a GPU."
        )


def _runtime_options(texts: Sequence[str]) -> dict[str, dict[str, object]]:
    """Reads ``RUNTIME:KEY=VALUE`` texts; values are JSON where they parse, text otherwise."""
    from nni_prune_ext.cli.job import read_options  # imported here to keep --help instant
    from nni_prune_ext.errors import ConfigError

    options: dict[str, dict[str, object]] = {}
    for text in texts:
        name, colon, pair = text.partition(":")
        if not colon or not name:
            raise ConfigError(
                f"Cannot read --runtime-option '{text}'. Expected RUNTIME:KEY=VALUE, for example "
                "onnxruntime-cuda:cuda_graph=true."
            )
        options.setdefault(name, {}).update(read_options([pair]))
    return options


def _check_used(options: dict[str, dict[str, object]], runtimes: Sequence[str]) -> None:
    from nni_prune_ext.errors import ConfigError  # imported here to keep --help instant

    unused = [name for name in options if name not in runtimes]
    if unused:
        raise ConfigError(
            f"--runtime-option names '{unused[0]}', which is not measured, expected one of: {', '.join(runtimes)}. Add "
            f"--on {unused[0]}, or leave the option out."
        )


def _end(evidence: Evidence, *, asked: bool, tell: bool) -> None:
    """Ends the command with exit code 2 if what was asked for gave no row.

    Args:
        tell: say what was not measured in any case, since no table did.
    """
    from nni_prune_ext.evidence.tables import missing_place  # imported here to keep --help instant

    failed = any(one.what == "everything" for one in evidence.not_measured) and (asked or not evidence.timings)
    for one in evidence.not_measured if failed or tell else ():
        typer.echo(f"not measured on {missing_place(one)}: {one.reason}", err=True)
    if failed:
        raise typer.Exit(2)


def _show(evidence: Evidence) -> None:
    from rich.console import Console  # imported here to keep --help instant

    from nni_prune_ext.evidence.tables import missing_table

    console = Console(width=180, highlight=False)
    for timing in evidence.timings:
        console.print(_timing_table(evidence, timing))
    missing = missing_table(evidence)
    if missing is not None:
        console.print(_as_rich(missing))
    where = evidence.environment
    if evidence.timings:
        console.print(
            f"measured on {where['cpu']}, {where['cpu_count']} CPUs, GPU {where['gpu']}, Python {where['python']}, "
            f"torch {where['torch']}, at {where['date']}",
            markup=False,
        )


def _timing_table(evidence: Evidence, timing: Timing) -> Table:
    from rich.markup import escape  # imported here to keep --help instant
    from rich.table import Table

    from nni_prune_ext.evidence.tables import conditions_text, ran_on, shown_quantities
    from nni_prune_ext.export.onnx_inputs import written_shape

    batch = timing.latency.batch_size
    rows = [row for row in evidence.rows() if (row.runtime, row.batch) == (timing.runtime, batch)]
    quantities = [quantity for quantity in shown_quantities(rows) if quantity.heading != "batch"]
    title = f"{timing.runtime}, batch {batch}, input {written_shape(evidence.input_shape)}"
    caption = f"{conditions_text(timing)} Nodes were run by {'; '.join(dict.fromkeys(map(ran_on, rows)))}."
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", pad_edge=False)
    table.add_column("network", no_wrap=True)
    for quantity in quantities:
        table.add_column(quantity.heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(escape(row.network), *(quantity.shown(row) or "–" for quantity in quantities))
    return table


def _as_rich(found: page_parts.Table) -> Table:
    from rich.markup import escape  # imported here to keep --help instant
    from rich.table import Table

    table = Table(title=found.caption, title_justify="left", pad_edge=False)
    for column in found.columns:
        table.add_column(column.heading, no_wrap=not column.wraps, overflow="fold")
    for group in found.groups:
        for row in group.rows:
            table.add_row(*(escape(cell.text) for cell in row))
    return table
