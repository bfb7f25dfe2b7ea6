"""Latency, throughput, accuracy, size and memory of models on runtimes, measured so that the numbers can be compared.

Measured on a busy machine, the same model in two sessions looked up to 16 % different when they were timed one after
the other with a wall clock, and 0.6 % when they were interleaved on thread CPU time. So everything that is compared
is timed in one process, in random order within each round; ratios are taken within rounds; and the first entry runs
twice (A/A), which shows how large a difference means nothing.
"""

from __future__ import annotations

import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.runtimes.base import Array, InferenceRuntime, InferenceSession, Precision, RunnableModel

WARM_UPS = 5
SHORTEST_SAMPLE_SECONDS = 0.003

Clock = Literal["cpu", "wall"]


@dataclass(frozen=True)
class LatencyRow:
    """The latency of one entry.

    Attributes:
        name: Name of the entry.
        runtime: Name of its runtime.
        p50_ms: Median time of one run.
        p95_ms: 95th percentile.
        p99_ms: 99th percentile.
        ratio: Median over the rounds of (time of this entry / time of the first entry in the same round).
        runs_per_sample: Runs that were timed together, so that a sample is long enough for the clock.
        providers: What the session could run on.
        node_placement: How many nodes ran on each provider.
        gpu_memory_bytes: By how much the memory in use on the GPU rose from opening the session to the end of its
            warm-up, or None without a GPU. Runtimes keep the memory they took, so this is their peak.
    """

    name: str
    runtime: str
    p50_ms: float
    p95_ms: float
    p99_ms: float
    ratio: float
    runs_per_sample: int
    providers: tuple[str, ...]
    node_placement: Mapping[str, int]
    gpu_memory_bytes: int | None


@dataclass(frozen=True)
class LatencyReport:
    """Latencies of models that were measured together.

    Attributes:
        rows: One row per entry, in the order given; the first is the reference of all ratios.
        aa_ratio: Ratio of the first entry to itself in a second session; 1 if the measurement were perfect.
        error_bar: ``|aa_ratio - 1|``: differences below it mean nothing.
        clock: ``cpu`` is the CPU time of the measuring thread, ``wall`` is elapsed time.
        rounds: Number of samples of every entry.
        threads: CPU threads of one run, or None if the runtimes chose.
        batch_size: First dimension of the first input.
        seed: Seed of the order within rounds.
    """

    rows: tuple[LatencyRow, ...]
    aa_ratio: float
    error_bar: float
    clock: Clock
    rounds: int
    threads: int | None
    batch_size: int
    seed: int

    def to_dict(self) -> dict[str, object]:
        """Returns the report as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class Throughput:
    """Images per second of one model, by elapsed time."""

    images_per_s: float
    batch_size: int
    runs: int
    seconds: float
    threads: int | None

    def to_dict(self) -> dict[str, object]:
        """Returns the report as JSON-ready values."""
        return asdict(self)


def measure_latency(
    entries: Mapping[str, tuple[InferenceRuntime, RunnableModel]],
    inputs: Sequence[Sequence[Array]] | Mapping[str, Sequence[Sequence[Array]]],
    *,
    rounds: int = 30,
    min_seconds: float = 2.0,
    threads: int | None = 1,
    clock: Literal["auto", "cpu", "wall"] = "auto",
    precision: Precision = "fp32",
    seed: int = 0,
) -> LatencyReport:
    """Times models against each other, interleaved in one process.

    Args:
        entries: Runtime and model by name; the first one is the reference.
        inputs: Sets of input arrays, all of one shape; round after round takes the next set. Models whose work
            depends on the input need at least eight. By name of the entry where each takes inputs of its own.
        rounds: Fewest rounds.
        min_seconds: Shortest time for all rounds together; more rounds are run until it has passed.
        threads: CPU threads of one run; None leaves the choice to the runtimes.
        clock: ``auto`` takes the CPU time of the thread if every session runs on the CPU with one thread, else
            elapsed time, which only an idle machine gives reliably.
        precision: Type of the arithmetic.
        seed: Seed of the order within rounds.

    Raises:
        ConfigError: If there is nothing to measure, or CPU time is asked for where it does not count the work.
        RuntimeUnavailableError: If a runtime is not usable or fell back.
    """
    if not entries or not inputs or rounds < 1:
        raise ConfigError(
            f"Nothing to measure: {len(entries)} entries, {len(inputs)} inputs, {rounds} rounds, expected at least one "
            "of each. Pass the models to compare and arrays to run them on."
        )
    own = inputs if isinstance(inputs, Mapping) else dict.fromkeys(entries, inputs)
    with ExitStack() as stack:
        names = [*entries, next(iter(entries))]  # the first one twice
        opened = [_open(stack, *entries[name], own[name], threads, precision) for name in names]
        chosen = _choose_clock(clock, [loaded.session for loaded in opened], threads)
        samples = _sample(opened, rounds, min_seconds, chosen, random.Random(seed))
        ratios = np.median(samples / samples[:, :1], axis=0)
        rows = tuple(
            _row(name, runtime.name, opened[column], samples[:, column], float(ratios[column]))
            for column, (name, (runtime, _)) in enumerate(entries.items())
        )
    aa_ratio = float(ratios[-1])
    batch_size = _batch_size(own[names[0]][0])
    return LatencyReport(rows, aa_ratio, abs(aa_ratio - 1), chosen, len(samples), threads, batch_size, seed)


def throughput(
    runtime: InferenceRuntime,
    model: RunnableModel,
    inputs: Sequence[Array],
    *,
    min_seconds: float = 2.0,
    threads: int | None = None,
    precision: Precision = "fp32",
) -> Throughput:
    """Counts how many images a model gets through in a second, at the batch size of the inputs."""
    with runtime.session(model, threads=threads, precision=precision) as session:
        run_once = session.bind(inputs)
        for _ in range(WARM_UPS):
            run_once()
        runs, start, seconds = 0, time.perf_counter(), 0.0
        while seconds < min_seconds or not runs:
            run_once()
            runs += 1
            seconds = time.perf_counter() - start
    batch_size = _batch_size(inputs)
    return Throughput(runs * batch_size / seconds, batch_size, runs, seconds, threads)


def accuracy_of_session(session: InferenceSession, batches: Iterable[tuple[Array, npt.NDArray[np.int64]]]) -> float:
    """Returns the share of images whose largest class is the label, by the first output of shape (N, classes).

    Args:
        session: A session with one input.
        batches: Images and their labels, of shape (N,).

    Raises:
        ConfigError: If there are no images.
    """
    correct = total = 0
    for images, labels in batches:
        predicted = np.asarray(session.run([images])[0], np.float64).argmax(axis=1)
        correct += int((predicted == labels).sum())
        total += len(labels)
    if not total:
        raise ConfigError(
            "The accuracy was asked for on 0 images, expected at least one. Pass batches of images and labels."
        )
    return correct / total


def file_size_bytes(path: Path) -> int:
    """Returns the size of an ONNX file, with the weights that lie beside it in ``<name>.data``."""
    data_path = path.with_name(path.name + ".data")
    return path.stat().st_size + (data_path.stat().st_size if data_path.is_file() else 0)


def gpu_memory_in_use_bytes() -> int | None:
    """Returns the memory that all programs use on the current GPU, without PyTorch's spare blocks; None without one."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def environment() -> dict[str, str]:
    """Describes the machine and the versions, without which a measurement cannot be read."""
    described = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": str(os.cpu_count()),
        "torch_threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "gpu_driver": _driver_version(),
        "cuda": torch.version.cuda or "none",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    for package in ("nni_prune_ext", "torch", "torchvision", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy"):
        try:
            described[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            described[package] = "not installed"
    return described


@dataclass(frozen=True)
class _Loaded:
    """A session that is warm, with one function per set of inputs that runs it once."""

    session: InferenceSession
    runs: Sequence[Callable[[], object]]
    runs_per_sample: int
    gpu_memory_bytes: int | None


def measurement_facts(latency: LatencyReport | None) -> dict[str, object]:
    """Returns the conditions of a measurement: machine, versions, protocol, samples."""
    return {"environment": environment(), "latency": latency.to_dict() if latency else None}


def latency_caption(latency: LatencyReport | None, without_data: bool = False) -> str:
    """Returns the line under a table that says how latency was measured."""
    how = "latency: not measured"
    if latency is not None:
        how = f"latency: {latency.clock} time, {latency.threads} thread, batch {latency.batch_size}"
        how += f", A/A error {100 * latency.error_bar:.1f} %"
    return how + ("; no data given: accuracy not measured" if without_data else "")


def _open(
    stack: ExitStack,
    runtime: InferenceRuntime,
    model: RunnableModel,
    inputs: Sequence[Sequence[Array]],
    threads: int | None,
    precision: Precision,
) -> _Loaded:
    """Opens and warms a session, and finds how many runs make a sample that the clock can resolve."""
    before = gpu_memory_in_use_bytes()
    session = stack.enter_context(runtime.session(model, threads=threads, precision=precision))
    runs = [session.bind(arrays) for arrays in inputs]
    seconds = []
    for index in range(WARM_UPS):
        start = time.perf_counter()
        runs[index % len(runs)]()
        seconds.append(time.perf_counter() - start)
    after = gpu_memory_in_use_bytes()
    memory = None if before is None or after is None else after - before
    runs_per_sample = math.ceil(SHORTEST_SAMPLE_SECONDS / max(min(seconds), 1e-7))
    return _Loaded(session, runs, runs_per_sample, memory)


def _choose_clock(
    clock: Literal["auto", "cpu", "wall"], sessions: Sequence[InferenceSession], threads: int | None
) -> Clock:
    """Takes CPU time where it counts the work; refuses it where it does not."""
    devices = sorted({session.device for session in sessions})
    counts = devices == ["cpu"] and threads == 1
    if clock == "cpu" and not counts:
        raise ConfigError(
            f"CPU time was asked for with threads={threads} on {', '.join(devices)}, but it counts one thread on the "
            'CPU only. Expected threads=1 and CPU runtimes. Pass clock="wall" or clock="auto".'
        )
    return ("cpu" if counts else "wall") if clock == "auto" else clock


def _sample(
    opened: Sequence[_Loaded], rounds: int, min_seconds: float, clock: Clock, order: random.Random
) -> npt.NDArray[np.float64]:
    """Returns the seconds of one run, with shape (rounds, entries)."""
    now = time.thread_time if clock == "cpu" else time.perf_counter
    samples: list[list[float]] = []
    start = time.perf_counter()
    while len(samples) < rounds or time.perf_counter() - start < min_seconds:
        row = [0.0] * len(opened)
        for column in order.sample(range(len(opened)), len(opened)):
            loaded = opened[column]
            run_once = loaded.runs[len(samples) % len(loaded.runs)]
            began = now()
            for _ in range(loaded.runs_per_sample):
                run_once()
            row[column] = (now() - began) / loaded.runs_per_sample
        samples.append(row)
    return np.asarray(samples)


def _row(name: str, runtime: str, loaded: _Loaded, seconds: npt.NDArray[np.float64], ratio: float) -> LatencyRow:
    p50_ms, p95_ms, p99_ms = (float(value) for value in np.percentile(seconds * 1e3, [50, 95, 99]))
    return LatencyRow(
        name=name,
        runtime=runtime,
        p50_ms=p50_ms,
        p95_ms=p95_ms,
        p99_ms=p99_ms,
        ratio=ratio,
        runs_per_sample=loaded.runs_per_sample,
        providers=loaded.session.providers,
        node_placement=dict(loaded.session.node_placement),
        gpu_memory_bytes=loaded.gpu_memory_bytes,
    )


def _batch_size(inputs: Sequence[Array]) -> int:
    return inputs[0].shape[0] if inputs[0].ndim else 1


def _cpu_name() -> str:
    """Reads the name of the processor; `platform.processor` is often empty on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _driver_version() -> str:
    """Reads the version of the NVIDIA driver from the kernel; known on Linux only."""
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0] if version.is_file() else "unknown (no /proc/driver/nvidia/version)"
