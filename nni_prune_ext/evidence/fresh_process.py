"""Cold start and peak memory of one network on one runtime, each time in a Python process of its own.

What the first run in a process costs (reading the file, optimising its graph, compiling, building engines) happens
once, and memory that a process has taken it often keeps: neither can be seen beside other networks. Compilers that keep
what they built get an empty cache in every process, so that each of them starts cold.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict
from torch import nn

from nni_prune_ext.deployment import runtime
from nni_prune_ext.errors import RuntimeUnavailableError
from nni_prune_ext.evaluation import WARM_UPS
from nni_prune_ext.evidence.networks import rebuilt
from nni_prune_ext.runtimes.base import Precision, RunnableModel

LONGEST_SECONDS = 900
"""After which a process is ended and counts as failed."""
_STATUS = Path("/proc/self/status")
_RESET_PEAK = Path("/proc/self/clear_refs")
_OWN_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


class FreshTask(BaseModel):
    """What one process measures.

    Attributes:
        runtime: a registered runtime.
        options: of that runtime.
        onnx_path: the ONNX file.
        folder: the artefact folder, where the runtime takes the PyTorch module; ``None`` for ONNX runtimes.
        model: how the original model is built, if the folder does not say.
        device: where the module runs.
        input_shape: of one image, without the batch.
        batches: images per run, rising.
        threads: CPU threads of one run.
        precision: type of the arithmetic.
        seed: of the random input.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: str
    options: dict[str, bool | int | float | str | None] = {}
    onnx_path: Path
    folder: Path | None = None
    model: str | None = None
    device: str = "cpu"
    input_shape: tuple[int, ...]
    batches: tuple[int, ...] = (1,)
    threads: int = 1
    precision: Precision = "fp32"
    seed: int = 0


class FreshResult(BaseModel):
    """What one process found; ``host_peak_bytes`` is by batch size, ``None`` where the system does not say."""

    load_ms: float
    first_run_ms: float
    host_peak_bytes: dict[int, int | None]


@dataclass(frozen=True)
class FreshRuns:
    """Medians over fresh processes.

    Attributes:
        cold_start_ms: from opening the file, or the folder for PyTorch, to the first result. Libraries are imported and
            the runtime is checked before.
        load_ms: the part of it until the session is open.
        first_run_ms: the rest: the first run, at the smallest batch size.
        host_peak_bytes: by batch size, by how much the peak of the process's resident memory lies above what it held
            before the network was loaded; ``None`` where the system does not say. For PyTorch it is the weights and
            what running adds: rebuilding the network, compiling it and starting the libraries does not count.
        processes: how many there were.
    """

    cold_start_ms: float
    load_ms: float
    first_run_ms: float
    host_peak_bytes: Mapping[int, int | None]
    processes: int

    def to_dict(self) -> dict[str, object]:
        """Returns it as JSON-ready values."""
        return {**asdict(self), "host_peak_bytes": {str(size): value for size, value in self.host_peak_bytes.items()}}


def measure_fresh(task: FreshTask, processes: int) -> FreshRuns:
    """Runs a task in so many processes, one after the other.

    Raises:
        RuntimeUnavailableError: a process failed; the last line that it wrote says why.
    """
    results = [_in_a_process(task) for _ in range(processes)]
    peaks = {size: [result.host_peak_bytes[size] for result in results] for size in task.batches}
    return FreshRuns(
        cold_start_ms=statistics.median(result.load_ms + result.first_run_ms for result in results),
        load_ms=statistics.median(result.load_ms for result in results),
        first_run_ms=statistics.median(result.first_run_ms for result in results),
        host_peak_bytes={size: _median(found) for size, found in peaks.items()},
        processes=processes,
    )


def run_task(task: FreshTask) -> FreshResult:
    """Does the work of one process, in this one."""
    chosen = runtime(task.runtime, task.options)
    chosen.availability()  # may try a provider on a model of its own: not part of loading this one
    draws = np.random.default_rng(task.seed)
    inputs = {n: draws.standard_normal((n, *task.input_shape), dtype=np.float32) for n in task.batches}
    began = time.perf_counter()
    module = None if task.folder is None else rebuilt(task.folder, task.model).to(task.device)
    rebuild_seconds = time.perf_counter() - began
    before = _held_bytes(module)
    source = RunnableModel(task.onnx_path, module)
    began = time.perf_counter()
    with chosen.session(source, threads=task.threads, precision=task.precision) as session:
        load_seconds = rebuild_seconds + time.perf_counter() - began
        began = time.perf_counter()
        session.run([inputs[task.batches[0]]])
        first_run_seconds = time.perf_counter() - began
        if module is not None:  # libraries have started: the cut of a pruned network starts them early
            before = _held_bytes(module)
        peaks: dict[int, int | None] = {}
        for size, images in inputs.items():
            run_once = session.bind([images])
            for _ in range(WARM_UPS):
                run_once()
            peak = _resident_bytes("VmHWM")
            peaks[size] = None if before is None or peak is None else max(peak - before, 0)
    return FreshResult(load_ms=1e3 * load_seconds, first_run_ms=1e3 * first_run_seconds, host_peak_bytes=peaks)


def main() -> None:
    """Does the task that the command line holds as JSON, and prints what it found as the last line."""
    print(run_task(FreshTask.model_validate_json(sys.argv[1])).model_dump_json())  # noqa: T201 (read by the parent)


def _in_a_process(task: FreshTask) -> FreshResult:
    command = [sys.executable, "-c", f"import {__name__} as module; module.main()", task.model_dump_json()]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **dict.fromkeys(_OWN_CACHES, folder)}
        environment["PYTHONPATH"] = os.pathsep.join(path or "." for path in sys.path)
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=True
            )
        except subprocess.TimeoutExpired as error:
            raise _failed(f"it did not end within {LONGEST_SECONDS} s") from error
        except subprocess.CalledProcessError as error:
            raise _failed((error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]) from error
    return FreshResult.model_validate_json(done.stdout.splitlines()[-1])


def _failed(reason: str) -> RuntimeUnavailableError:
    return RuntimeUnavailableError(
        f"A fresh process could not run the network: {reason.rstrip('.')}. Expected it to load and run as it does in "
        "this process. Leave cold start and memory out with --fresh 0."
    )


def _median(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known)) if len(known) == len(values) else None


def _held_bytes(module: nn.Module | None) -> int | None:
    """Starts the count of the peak; returns what the process holds now, without the weights of the module."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc alone can give freed memory back
        ctypes.CDLL(None).malloc_trim(0)  # what running would take of it would not be seen
    held = _resident_bytes("VmRSS") if _reset_peak() else None
    tensors = [] if module is None else [*module.parameters(), *module.buffers()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.device.type == "cpu")
    return None if held is None else held - weights


def _reset_peak() -> bool:
    """Makes the kernel forget the peak of resident memory so far; says whether it did (Linux only)."""
    try:
        _RESET_PEAK.write_text("5")
    except OSError:
        return False
    return True


def _resident_bytes(which: str) -> int | None:
    """Reads the resident memory of this process, ``VmRSS`` for now and ``VmHWM`` for the peak; Linux only."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{which}:")]
    return 1024 * int(found[0]) if found else None
