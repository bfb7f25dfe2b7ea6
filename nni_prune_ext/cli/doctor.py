"""``doctor``: why a pruned network is not faster, layer by layer, and which widths to round."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nni_prune_ext.cli import options as o
from nni_prune_ext.cli.job import NO_ADVICE
from nni_prune_ext.cli.json_lines import json_line

if TYPE_CHECKING:
    from rich.table import Table

    from nni_prune_ext.doctor import Diagnosis, Side

NUM_INPUTS = 4
"""Different inputs that the rounds rotate over."""
TOP = 15
"""Layers in the table, unless all are asked for."""


def doctor(
    dense: Annotated[Path, typer.Argument(help="Artefact folder or ONNX file before the cut.", show_default=False)],
    pruned: Annotated[Path, typer.Argument(help="The same network after the cut.", show_default=False)],
    on: Annotated[str, typer.Option("--on", help="A registered runtime that can record nodes.")] = "onnxruntime-cpu",
    batch: Annotated[int, typer.Option(min=1, help="Images per run.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of one run.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Fewest runs of each network; at least 20.")] = 30,
    seconds: Annotated[float, typer.Option(min=0, help="Shortest time of each latency measurement.")] = 1.0,
    multiple: Annotated[int, typer.Option(min=0, help="What the advice rounds widths to; 0 gives no advice.")] = 16,
    profile: Annotated[
        list[Path],
        typer.Option(help="Profile that ONNX Runtime recorded elsewhere, dense first; twice. Nothing is timed then."),
    ] = [],  # noqa: B006 (typer reads the default, nobody changes it)
    every: Annotated[
        bool, typer.Option("--all", help=f"Show all layers, not only the {TOP} that take longest.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the advice here, for --limits; never replaces a file.")
    ] = None,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Says why a pruned network is not faster, and which widths to round; every time is measured."""
    from nni_prune_ext.export import onnx_inputs  # imported here to keep --help instant
    from nni_prune_ext.text_files import write_text

    _check_out(out)
    files = {name: onnx_inputs.onnx_file(path) for name, path in onnx_inputs.named_networks([dense, pruned]).items()}
    common = onnx_inputs.common_shape({name: onnx_inputs.input_shape(path) for name, path in files.items()}, [batch])
    shape = (batch, *(int(size or 0) for size in common[1:]))
    paths = (*files.values(),)
    if profile:
        found = _recorded(paths, profile, shape)
    else:
        found = _measured(paths, shape, on, rounds, seconds, threads, multiple, seed)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, _advice_text(found))
    if json:
        typer.echo(json_line("done", found.to_dict()))
    else:
        _show(found, every)
    if out is not None:
        said = f"advice written to {out}" if found.limits else f"no advice: {found.no_advice}; so says {out}"
        typer.echo(said, err=json)


def _advice_text(found: Diagnosis) -> str:
    """Returns the advice as limits, or limits that say nothing and why."""
    import json  # imported here: the option of this name hides it

    if found.limits is None:
        return json.dumps({"layers": {}, NO_ADVICE: found.no_advice}, indent=1) + "\n"
    return found.limits.model_dump_json(exclude_unset=True, indent=1) + "\n"


def _check_out(out: Path | None) -> None:
    from nni_prune_ext.errors import OutputError  # imported here to keep --help instant
    from nni_prune_ext.export.artefact_folder import check_writable

    if out is None:
        return
    if out.exists():
        raise OutputError(
            f"'{out}' exists already, expected a new file for the advice. Choose another name with --out."
        )
    check_writable(out.parent)


def _recorded(paths: tuple[Path, ...], profiles: list[Path], shape: tuple[int, ...]) -> Diagnosis:
    from nni_prune_ext.doctor import diagnose_recorded  # imported here to keep --help instant
    from nni_prune_ext.errors import ConfigError

    if len(profiles) != 2:
        raise ConfigError(
            f"--profile was given {len(profiles)} times, expected twice: of the dense network, then of the pruned one. "
            "Name both, or none."
        )
    return diagnose_recorded(paths[0], paths[1], (profiles[0], profiles[1]), [shape])


def _measured(
    paths: tuple[Path, ...],
    shape: tuple[int, ...],
    on: str,
    rounds: int,
    seconds: float,
    threads: int,
    multiple: int,
    seed: int,
) -> Diagnosis:
    import numpy as np  # imported here to keep --help instant

    from nni_prune_ext.doctor import diagnose

    draws = np.random.default_rng(seed)
    return diagnose(
        paths[0],
        paths[1],
        [[draws.standard_normal(shape, dtype=np.float32)] for _ in range(NUM_INPUTS)],
        on=on,
        rounds=rounds,
        min_seconds=seconds,
        threads=threads,
        multiple=multiple,
        seed=seed,
    )


def _show(found: Diagnosis, every: bool) -> None:
    from rich.console import Console  # imported here to keep --help instant

    console = Console(width=160, highlight=False)
    console.print(_layer_table(found, every))
    for sentence in found.sentences():
        console.print(sentence, markup=False, soft_wrap=True)


def _layer_table(found: Diagnosis, every: bool) -> Table:
    from rich.markup import escape  # imported here to keep --help instant
    from rich.table import Table

    longest = sorted(found.layers, key=lambda row: -row.after.time.ms)[: None if every else TOP]
    caption = (
        f"medians of {found.num_runs} runs in turns; ± is the error bar of the time after the cut; share of the "
        f"{found.after.ms:.3f} ms in all nodes; {len(found.layers) - len(longest)} layers not shown (--all)"
    )
    table = Table(caption=caption, caption_justify="left", pad_edge=False)
    for heading in ("layer", "kind", "before", "after", "× MACs", "ms before", "ms after", "±", "share", "layout"):
        table.add_column(heading, justify="left" if heading in ("layer", "kind", "layout") else "right", no_wrap=True)
    for row in (row for row in found.layers if row in longest):
        table.add_row(
            escape(row.name),
            row.after.layer.kind,
            *(f"{side.layer.in_channels} → {side.layer.out_channels}" for side in (row.before, row.after)),
            f"{row.macs_ratio:.2f}",
            *(f"{ms:.3f}" for ms in (row.before.time.ms, row.after.time.ms, row.after.time.error_ms)),
            f"{100 * row.share:.1f} %",
            " → ".join(dict.fromkeys((_layout(row.before), _layout(row.after)))),
        )
    for kind in found.others:
        table.add_row(
            f"{kind.op} × {kind.count_after} (before {kind.count_before})", *[""] * 4, f"{kind.before.ms:.3f}",
            f"{kind.after.ms:.3f}", f"{kind.after.error_ms:.3f}", f"{100 * kind.after.ms / found.after.ms:.1f} %", "",
        )  # fmt: skip
    return table


def _layout(side: Side) -> str:
    return "blocked" if side.blocked else "plain"
