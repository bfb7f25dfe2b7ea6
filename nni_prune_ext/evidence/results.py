"""What was measured, and the flat rows that tables, pages and JSON show of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from nni_prune_ext.evaluation import LatencyReport, LatencyRow, Throughput
from nni_prune_ext.evidence.fresh_process import FreshRuns
from nni_prune_ext.evidence.networks import EvidenceNetwork
from nni_prune_ext.runtimes.base import Precision

FORMAT = 2


@dataclass(frozen=True)
class Conditions:
    """How everything is measured.

    Attributes:
        batches: images per run.
        threads: CPU threads of one run.
        precision: type of the arithmetic.
        clock: of latency: CPU time of the measuring thread, elapsed time, or whichever counts the work.
        rounds: fewest rounds in which all networks take turns.
        seconds: shortest time of each measurement.
        fresh: processes per network and runtime, for cold start and peak memory; 0 leaves both out.
        seed: of made-up inputs and of the order within rounds.
    """

    batches: tuple[int, ...] = (1,)
    threads: int = 1
    precision: Precision = "fp32"
    clock: Literal["auto", "cpu", "wall"] = "auto"
    rounds: int = 30
    seconds: float = 2.0
    fresh: int = 3
    seed: int = 0


@dataclass(frozen=True)
class OutputParity:
    """How far the outputs of a runtime are from the same network in PyTorch, in float32 on the CPU.

    Attributes:
        max_rel: largest difference, relative to the largest output of its batch.
        mean_rel: mean difference over all outputs, each relative to the largest output of its batch.
        top1_agreement: share of the images with the same largest class; ``None`` where the first output has no classes.
        images: how many were compared.
    """

    max_rel: float
    mean_rel: float
    top1_agreement: float | None
    images: int


@dataclass(frozen=True)
class Timing:
    """Networks timed together on one runtime at one batch size."""

    runtime: str
    latency: LatencyReport
    throughput: Mapping[str, Throughput]


@dataclass(frozen=True)
class NotMeasured:
    """What has no row, or a row with gaps, and why.

    Attributes:
        runtime: name of the runtime.
        reason: a sentence.
        network: ``None`` if it holds for all.
        what: ``everything``, or what alone is missing.
    """

    runtime: str
    reason: str
    network: str | None = None
    what: Literal["everything", "cold start and host memory"] = "everything"


@dataclass(frozen=True)
class EvidenceRow:
    """One network on one runtime at one batch size; ``None`` was not measured.

    Attributes:
        network: its name.
        runtime: name of the runtime.
        batch: images per run.
        latency: percentiles, ratio to the first network of the runtime, and where it ran.
        error_bar: how far the first network's ratio to itself is from 1: smaller differences mean nothing.
        throughput: images per second.
        size_bytes: of the ONNX file.
        macs: of one image.
        macs_ratio: to the network that the latency ratio refers to.
        top1: accuracy (0–1) on the data given.
        parity: agreement with PyTorch.
        fresh: cold start and memory.
    """

    network: str
    runtime: str
    batch: int
    latency: LatencyRow
    error_bar: float
    throughput: Throughput
    size_bytes: int
    macs: int | None = None
    macs_ratio: float | None = None
    top1: float | None = None
    parity: OutputParity | None = None
    fresh: FreshRuns | None = None

    @property
    def host_peak_bytes(self) -> int | None:
        """Peak of the memory that the network takes on the host at this batch size."""
        return self.fresh.host_peak_bytes.get(self.batch) if self.fresh else None


@dataclass(frozen=True)
class Evidence:
    """Everything that was measured.

    Attributes:
        networks: in the order given; the first one that a runtime runs is the reference of its ratios.
        conditions: how it was measured.
        environment: machine and versions.
        input_shape: of all networks, the first size being ``None`` where the batch is open.
        data: name of the images; ``None`` for made-up inputs.
        timings: one per runtime and batch size.
        accuracy: top-1 by runtime and network.
        parity: by runtime and network.
        fresh: by runtime and network.
        not_measured: what is missing, with reasons.
    """

    networks: Sequence[EvidenceNetwork]
    conditions: Conditions
    environment: Mapping[str, str]
    input_shape: tuple[int | None, ...]
    data: str | None
    timings: Sequence[Timing]
    accuracy: Mapping[str, Mapping[str, float]]
    parity: Mapping[str, Mapping[str, OutputParity]]
    fresh: Mapping[str, Mapping[str, FreshRuns]]
    not_measured: Sequence[NotMeasured]

    def rows(self) -> list[EvidenceRow]:
        """Returns one row per network, runtime and batch size that was measured."""
        networks = {network.name: network for network in self.networks}
        return [self._row(timing, row, networks) for timing in self.timings for row in timing.latency.rows]

    def _row(self, timing: Timing, row: LatencyRow, networks: Mapping[str, EvidenceNetwork]) -> EvidenceRow:
        own, first = networks[row.name], networks[timing.latency.rows[0].name]
        return EvidenceRow(
            network=row.name,
            runtime=timing.runtime,
            batch=timing.latency.batch_size,
            latency=row,
            error_bar=timing.latency.error_bar,
            throughput=timing.throughput[row.name],
            size_bytes=own.size_bytes,
            macs=own.macs,
            macs_ratio=own.macs / first.macs if own.macs is not None and first.macs else None,
            top1=self.accuracy.get(timing.runtime, {}).get(row.name),
            parity=self.parity.get(timing.runtime, {}).get(row.name),
            fresh=self.fresh.get(timing.runtime, {}).get(row.name),
        )

    def facts(self) -> dict[str, object]:
        """Returns everything as JSON values."""
        return {
            "format": FORMAT,
            "environment": dict(self.environment),
            "conditions": asdict(self.conditions),
            "data": self.data,
            "input_shape": list(self.input_shape),
            "networks": [_network_facts(network) for network in self.networks],
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
            "parity": {
                runtime: {name: asdict(value) for name, value in values.items()}
                for runtime, values in self.parity.items()
            },
            "fresh_processes": {
                runtime: {name: value.to_dict() for name, value in values.items()}
                for runtime, values in self.fresh.items()
            },
            "not_measured": [asdict(missing) for missing in self.not_measured],
        }


def _network_facts(network: EvidenceNetwork) -> dict[str, object]:
    return {
        "name": network.name,
        "path": str(network.onnx_path),
        "size_bytes": network.size_bytes,
        "macs": network.macs,
        "params": network.params,
        "no_module": network.no_module or None,
    }
