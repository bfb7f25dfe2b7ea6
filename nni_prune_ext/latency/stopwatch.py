"""Times layers and whole networks under the conditions of a target, with the protocol of ``evaluation``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from nni_prune_ext.errors import ExportError
from nni_prune_ext.evaluation import LatencyReport, LatencyRow, measure_latency
from nni_prune_ext.export.onnx_static import export_onnx
from nni_prune_ext.inputs import ExampleInputs, map_tensors, tensors_in
from nni_prune_ext.latency.cache import LatencyCache
from nni_prune_ext.latency.conditions import LatencyConditions
from nni_prune_ext.latency.layers import Layer
from nni_prune_ext.latency.micro_models import micro_model
from nni_prune_ext.runtimes.base import Array, RunnableModel
from nni_prune_ext.runtimes.registered import usable_runtime
from nni_prune_ext.training.processes import from_main, is_main

Exporter = Literal["torchscript", "auto"]
LayerAt = tuple[Layer, int, int]
"""A layer, the channels that it reads, and those that it writes."""
_REPEATS = 5
"""Sessions of each network: where a session's memory lies makes a difference of up to 2 %."""
_ROUNDS = {50: 8, 95: 40, 99: 120}
"""Rounds in which networks are timed, in each session, by percentile."""
_SECONDS = 0.3
"""Shortest time for these rounds together."""
_LAYER_ROUNDS = 10
_AT_ONCE = 16
"""Layers that are timed side by side."""
_DENSE, _SHIPPED = "dense", "dense as shipped"


@dataclass(frozen=True)
class NetworkTimes:
    """Whole networks, timed side by side.

    Attributes:
        dense_ms: time of the dense network.
        shares: network → its time as a share of the dense one's (for the median: the median of the ratios in a round);
            the median over several sessions.
        error_bar: differences of shares below it mean nothing (A/A).
        clock: ``cpu`` or ``wall``.
        rounds: number of samples of each network, over all sessions.
        tails_ms: network → its 95th and its 99th percentile, the medians over the sessions.
    """

    dense_ms: float
    shares: Mapping[str, float]
    error_bar: float
    clock: str
    rounds: int
    tails_ms: Mapping[str, tuple[float, float]] = field(default_factory=dict)


class Stopwatch:
    """Times layers and networks that descend from one dense network.

    In several processes the main one measures, and all get its numbers.

    Args:
        model: the dense network, on the device where it would run.
        example_inputs: they are cut or repeated to the batch of the conditions.
        cache_folder: where measured layers are kept; the user's cache folder by default.

    Raises:
        UnknownPluginError, RuntimeUnavailableError: the runtime cannot be used here.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        conditions: LatencyConditions,
        *,
        cache_folder: Path | None = None,
    ) -> None:
        self.conditions = conditions
        self.inputs = batch_of(example_inputs, conditions.batch)
        self._model = model
        self._runtime = usable_runtime(conditions.runtime)
        self._device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        self._cache = LatencyCache(conditions, str(self._device), cache_folder)
        self._folder = TemporaryDirectory(prefix="nni_prune_ext-latency-")
        self._exported: dict[Exporter, RunnableModel] = {}
        self._as_shipped: float | None = None
        self.from_cache = self.measured = 0

    def layers_ms(self, layers: Iterable[LayerAt]) -> dict[LayerAt, float]:
        """Returns the median time of each layer in milliseconds; what was measured before comes from the cache."""
        wanted = {at: at[0].key(at[1], at[2]) for at in layers}
        times = self._layers(wanted) if is_main() else {}
        times, self.measured, self.from_cache = from_main((times, self.measured, self.from_cache))
        return {at: times[key] for at, key in wanted.items()}

    def networks(self, networks: Mapping[str, nn.Module], *, as_shipped: bool = False) -> NetworkTimes:
        """Times networks against the dense one.

        ONNX files are written by the quicker exporter, and the time of the dense network is corrected by what the one
        that ships makes different.

        Args:
            as_shipped: write ONNX files by the exporter that ships them: slower.

        Raises:
            ExportError: a network cannot be written as ONNX.
        """
        return from_main(self._networks(networks, as_shipped) if is_main() else NetworkTimes(0, {}, 0, "", 0))

    def _layers(self, wanted: Mapping[LayerAt, str]) -> dict[str, float]:
        known = self._cache.read()
        new = {key: at for at, key in wanted.items() if key not in known}
        self.from_cache += len(set(wanted.values())) - len(new)
        self.measured += len(new)
        keys = sorted(new)
        for start in range(0, len(keys), _AT_ONCE):
            some = {key: new[key] for key in keys[start : start + _AT_ONCE]}
            found = self._timed_layers(some)
            self._cache.add(found)
            known |= found
        return known

    def _timed_layers(self, layers: Mapping[str, LayerAt]) -> dict[str, float]:
        models, inputs = {}, {}
        with TemporaryDirectory() as folder:
            for number, (key, (layer, read, written)) in enumerate(layers.items()):
                path = Path(folder) / f"{number}.onnx"
                models[key], arrays = micro_model(layer, read, written, self.conditions.batch, path, self._device)
                inputs[key] = [arrays]
            report = self._measure(models, inputs, rounds=_LAYER_ROUNDS, min_seconds=0.0)
        return {row.name: row.p50_ms for row in report.rows}

    def _networks(self, networks: Mapping[str, nn.Module], as_shipped: bool) -> NetworkTimes:
        exporter: Exporter = "auto" if as_shipped else "torchscript"
        models = {_DENSE: self._dense(exporter)}
        if not as_shipped and self._as_shipped is None:
            models[_SHIPPED] = self._dense("auto")
        for number, (name, network) in enumerate(networks.items()):
            models[name] = self._runnable(network, exporter, f"{number}.onnx")
        arrays: list[Array] = [
            np.ascontiguousarray(tensor.detach().cpu().numpy()) for tensor in tensors_in(self.inputs)
        ]
        rounds = _ROUNDS[self.conditions.percentile]
        reports = [
            self._measure(models, [arrays], rounds=rounds, min_seconds=_SECONDS, seed=seed) for seed in range(_REPEATS)
        ]
        shares = {name: self._share(reports, name) for name in models}
        if _SHIPPED in shares:
            self._as_shipped = shares[_SHIPPED]
        dense_ms = median(self._ms(report.rows[0]) for report in reports)
        return NetworkTimes(
            dense_ms=dense_ms * (1.0 if as_shipped else self._as_shipped or 1.0),
            shares={name: shares[name] for name in networks},
            error_bar=abs(median(report.aa_ratio for report in reports) - 1),
            clock=reports[0].clock,
            rounds=sum(report.rounds for report in reports),
            tails_ms={name: _tails(reports, name) for name in networks},
        )

    def _measure(
        self,
        models: Mapping[str, RunnableModel],
        inputs: Sequence[Sequence[Array]] | Mapping[str, Sequence[Sequence[Array]]],
        *,
        rounds: int,
        min_seconds: float,
        seed: int = 0,
    ) -> LatencyReport:
        entries, own = {name: (self._runtime, model) for name, model in models.items()}, self.conditions
        return measure_latency(
            entries, inputs, rounds=rounds, min_seconds=min_seconds, threads=own.threads, clock=own.clock, seed=seed
        )

    def _ms(self, row: LatencyRow) -> float:
        return {50: row.p50_ms, 95: row.p95_ms, 99: row.p99_ms}[self.conditions.percentile]

    def _share(self, reports: Sequence[LatencyReport], name: str) -> float:
        """Returns the median over the sessions of a network's time as a share of the dense one's."""
        rows = [(next(row for row in report.rows if row.name == name), report.rows[0]) for report in reports]
        if self.conditions.percentile == 50:
            return median(row.ratio for row, _ in rows)
        return median(self._ms(row) / self._ms(dense) for row, dense in rows)

    def _dense(self, exporter: Exporter) -> RunnableModel:
        if exporter not in self._exported:
            self._exported[exporter] = self._runnable(self._model, exporter, f"dense-{exporter}.onnx")
        return self._exported[exporter]

    def _runnable(self, network: nn.Module, exporter: Exporter, name: str) -> RunnableModel:
        path = Path(self._folder.name) / name
        try:
            export_onnx(network, self.inputs, path, exporter=exporter, check=False)
        except ExportError:
            if exporter == "auto":
                raise
            return self._runnable(network, "auto", name)
        return RunnableModel(path, network)


def _tails(reports: Sequence[LatencyReport], name: str) -> tuple[float, float]:
    rows = [row for report in reports for row in report.rows if row.name == name]
    return median(row.p95_ms for row in rows), median(row.p99_ms for row in rows)


def batch_of(example_inputs: ExampleInputs, batch: int) -> ExampleInputs:
    """Returns example inputs for so many images: the first one of each tensor, as often as that."""
    if all(tensor.dim() and tensor.shape[0] == batch for tensor in tensors_in(example_inputs)):
        return example_inputs

    def resized(tensor: Tensor) -> Tensor:
        return tensor[:1].repeat(batch, *[1] * (tensor.dim() - 1)) if tensor.dim() else tensor

    return map_tensors(example_inputs, resized)
