"""``benchmark``: artefact folders and ONNX files timed against each other on the runtimes of this machine."""

from __future__ import annotations

import json as json_text
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nni_prune_ext.cli import options as o
from nni_prune_ext.cli.json_lines import finite_values, json_line
from nni_prune_ext.cli.onnx_files import common_shape, named_files, written_shape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.table import Table

    from nni_prune_ext.data.image_arrays import DataSource
    from nni_prune_ext.evaluation import LatencyReport, Throughput
    from nni_prune_ext.runtimes.base import InferenceRuntime

NUM_INPUTS = 8
"""Different inputs that the rounds rotate over."""
ACCURACY_BATCH = 100


def benchmark(
    networks: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER_OR_ONNX...", help="Artefact folders or .onnx files; the first one is the reference."
        ),
    ],
    on: Annotated[
        list[str], typer.Option("--on", help="A registered runtime; repeatable. All that are usable by default.")
    ] = [],  # noqa: B006 (typer reads the default, nobody changes it)
    batch: Annotated[list[int], typer.Option("--batch", min=1, help="Images per run; repeatable.")] = [1],  # noqa: B006
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of one run.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Fewest rounds in which all networks take turns.")] = 30,
    seconds: Annotated[float, typer.Option(min=0, help="Shortest time of each measurement.")] = 2.0,
    data: o.Data = None,
    image_size: o.ImageSize = None,
    limit_images: o.LimitImages = None,
    download: o.Download = False,
    mean: o.Mean = None,
    std: o.Std = None,
    seed: o.Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Write everything that was measured as JSON here.")] = None,
    json: o.Json = False,
) -> None:
    """Measures latency, throughput, size and, with data, accuracy of networks of one input shape, side by side."""
    from nni_prune_ext.cli.job import read_numbers  # imported here to keep --help instant
    from nni_prune_ext.data.sources import open_data
    from nni_prune_ext.deployment import runtime
    from nni_prune_ext.export.artefact_folder import check_writable
    from nni_prune_ext.registry import plugins
    from nni_prune_ext.text_files import write_text

    runtimes = {name: runtime(name) for name in on or plugins("runtimes")}
    files = named_files(networks)
    shape = common_shape(files, batch)
    if out is not None:
        check_writable(out.parent)
    source = None
    if data is not None:
        source = open_data(
            data,
            image_size=image_size,
            limit=limit_images,
            seed=seed,
            download=download,
            mean=read_numbers("--mean", mean),
            std=read_numbers("--std", std),
        )
    job = _Job(files, shape, tuple(dict.fromkeys(batch)), threads, rounds, seconds, source, seed)
    result = _measure(job, runtimes)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json_text.dumps(finite_values(result.facts()), indent=1, allow_nan=False) + "\n")
    if json:
        typer.echo(json_line("done", result.facts()))
    else:
        _show(result)
    for name, reason in result.unusable.items():
        typer.echo(f"not measured on {name}: {reason}", err=True)
    if result.unusable and (on or not result.timings):
        raise typer.Exit(2)


@dataclass(frozen=True)
class _Job:
    """What is measured and how; ``shape`` is that of one input, its first size ``None`` where the batch is open."""

    files: Mapping[str, Path]
    shape: tuple[int | None, ...]
    batches: tuple[int, ...]
    threads: int
    rounds: int
    seconds: float
    source: DataSource | None
    seed: int


@dataclass(frozen=True)
class _Timing:
    """All networks on one runtime at one batch size."""

    runtime: str
    latency: LatencyReport
    throughput: Mapping[str, Throughput]


@dataclass(frozen=True)
class _Result:
    """Everything measured; ``accuracy`` is by runtime and network, ``unusable`` says why a runtime has no row."""

    job: _Job
    environment: Mapping[str, str]
    timings: Sequence[_Timing]
    accuracy: Mapping[str, Mapping[str, float]]
    unusable: Mapping[str, str]

    def facts(self) -> dict[str, object]:
        """Returns it as JSON values."""
        sizes = _sizes(self.job.files)
        return {
            "format": 1,
            "environment": dict(self.environment),
            "seed": self.job.seed,
            "data": self.job.source.name if self.job.source else None,
            "input_shape": list(self.job.shape),
            "networks": [{"name": n, "path": str(p), "size_bytes": sizes[n]} for n, p in self.job.files.items()],
            "measurements": [
                {
                    "runtime": timing.runtime,
                    "batch": timing.latency.batch_size,
                    "latency": timing.latency.to_dict(),
                    "throughput": {name: value.to_dict() for name, value in timing.throughput.items()},
                }
                for timing in self.timings
            ],
            "accuracy": {name: dict(values) for name, values in self.accuracy.items()},
            "unusable": dict(self.unusable),
        }


def _measure(job: _Job, runtimes: Mapping[str, InferenceRuntime]) -> _Result:
    from nni_prune_ext.errors import ModelError, RuntimeUnavailableError  # imported here to keep --help instant
    from nni_prune_ext.evaluation import environment

    inputs = {size: _inputs(job, size) for size in job.batches}
    timings: list[_Timing] = []
    accuracy: dict[str, dict[str, float]] = {}
    unusable: dict[str, str] = {}
    for name, runtime in runtimes.items():
        availability = runtime.availability()
        if not availability.usable:
            unusable[name] = availability.reason
            continue
        try:
            timed = [_timed(job, runtime, arrays) for arrays in inputs.values()]
            found = _accuracies(job, name)
        except (RuntimeUnavailableError, ModelError) as error:  # it fell back silently, or does not run ONNX files
            unusable[name] = str(error)
            continue
        timings += timed
        if found:
            accuracy[name] = found
    return _Result(job, environment(), timings, accuracy, unusable)


def _inputs(job: _Job, size: int) -> list[NDArray[np.float32]]:
    """Returns different inputs of one batch size: images of the data, or seeded normal numbers."""
    import numpy as np  # imported here to keep --help instant

    from nni_prune_ext.data.batches import split_batches
    from nni_prune_ext.errors import ConfigError

    shape = tuple(int(length or 0) for length in job.shape[1:])
    if job.source is None:
        draws = np.random.default_rng(job.seed)
        return [draws.standard_normal((size, *shape), dtype=np.float32) for _ in range(NUM_INPUTS)]
    if job.source.input_shape != shape:
        raise ConfigError(
            f"The images of '{job.source.name}' are {written_shape((None, *job.source.input_shape))}, expected "
            f"{written_shape(job.shape)} as the networks take. Set --image-size, or choose other --data."
        )
    batches = islice(split_batches(job.source, "test", size), NUM_INPUTS)
    whole = [images.numpy() for images, _ in batches if len(images) == size]
    if not whole:
        raise ConfigError(
            f"The test split of '{job.source.name}' has {len(job.source.test)} images, expected at least --batch "
            f"{size}. Ask for a smaller batch, or raise --limit-images."
        )
    return whole


def _timed(job: _Job, runtime: InferenceRuntime, inputs: Sequence[NDArray[np.float32]]) -> _Timing:
    from nni_prune_ext.evaluation import measure_latency, throughput  # imported here to keep --help instant
    from nni_prune_ext.runtimes.base import RunnableModel

    models = {name: RunnableModel(onnx_path=path) for name, path in job.files.items()}
    latency = measure_latency(
        {name: (runtime, model) for name, model in models.items()},
        [[array] for array in inputs],
        rounds=job.rounds,
        min_seconds=job.seconds,
        threads=job.threads,
        seed=job.seed,
    )
    through = {
        name: throughput(runtime, model, [inputs[0]], min_seconds=job.seconds, threads=job.threads)
        for name, model in models.items()
    }
    return _Timing(runtime.name, latency, through)


def _accuracies(job: _Job, runtime_name: str) -> dict[str, float]:
    from nni_prune_ext.data.batches import split_batches  # imported here to keep --help instant
    from nni_prune_ext.deployment import onnx_accuracy
    from nni_prune_ext.errors import ConfigError

    if job.source is None:
        return {}
    size = job.shape[0] or ACCURACY_BATCH
    if job.shape[0] and len(job.source.test) % job.shape[0]:
        raise ConfigError(
            f"The networks take a batch of {job.shape[0]} only, and the {len(job.source.test)} test images are no "
            "multiple of it: accuracy would leave some out. Export with an open batch, or leave out --data."
        )
    batches = split_batches(job.source, "test", size)
    return {
        name: onnx_accuracy(path, batches, on=runtime_name, threads=job.threads) for name, path in job.files.items()
    }


def _sizes(files: Mapping[str, Path]) -> dict[str, int]:
    from nni_prune_ext.evaluation import file_size_bytes  # imported here to keep --help instant

    return {name: file_size_bytes(path) for name, path in files.items()}


def _show(result: _Result) -> None:
    from rich.console import Console  # imported here to keep --help instant

    console = Console(width=160, highlight=False)
    for timing in result.timings:
        console.print(_table(result, timing))
    if not result.timings:
        return
    where = result.environment
    console.print(
        f"measured on {where['cpu']}, {where['cpu_count']} CPUs, GPU {where['gpu']}, Python {where['python']}, "
        f"torch {where['torch']}, at {where['date']}",
        markup=False,
    )


def _table(result: _Result, timing: _Timing) -> Table:
    from rich.markup import escape  # imported here to keep --help instant
    from rich.table import Table

    latency, accuracy = timing.latency, result.accuracy.get(timing.runtime, {})
    caption = (
        f"{latency.clock} time, {latency.threads} thread(s), {latency.rounds} rounds in turns; the first network "
        f"against itself differs by {100 * latency.error_bar:.1f} %: smaller differences mean nothing. Throughput is "
        "by elapsed time, one network after the other."
    )
    title = f"{timing.runtime}, batch {latency.batch_size}, input {written_shape(result.job.shape)}"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", pad_edge=False)
    for heading in ("network", "p50 ms", "p95 ms", "p99 ms", "× first", "images/s", "ONNX bytes", "top-1"):
        table.add_column(heading, justify="left" if heading == "network" else "right", no_wrap=True)
    sizes = _sizes(result.job.files)
    for row in latency.rows:
        top1 = accuracy.get(row.name)
        table.add_row(
            escape(row.name),
            *(f"{value:.3f}" for value in (row.p50_ms, row.p95_ms, row.p99_ms, row.ratio)),
            f"{timing.throughput[row.name].images_per_s:,.0f}",
            f"{sizes[row.name]:,}",
            "–" if top1 is None else f"{100 * top1:.2f} %",
        )
    return table
