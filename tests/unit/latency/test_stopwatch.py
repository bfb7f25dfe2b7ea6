"""Networks are timed in several sessions each, on a runtime whose clock and speed are made up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from nni_prune_ext.errors import ExportError
from nni_prune_ext.latency import LatencyConditions, stopwatch
from nni_prune_ext.latency.layers import Layer
from nni_prune_ext.latency.stopwatch import Stopwatch
from nni_prune_ext.runtimes.base import RunnableModel


class MadeUp:
    """A run takes a millisecond per output feature; files of the slow exporter run a tenth longer."""

    name = "made-up"
    device = "cpu"
    providers = ("made-up",)
    node_placement: Mapping[str, int] = {"made-up": 1}

    def __init__(self) -> None:
        self.seconds, self.opened = 0.0, 0
        self.pace: Callable[[int, int], float] = lambda session, run: 1.0
        """Session and run, both from 0, → by how much longer it takes."""

    @contextmanager
    def session(self, source: RunnableModel, *, threads: int | None = 1, precision: str = "fp32") -> Iterator[object]:
        number, self.opened = self.opened, self.opened + 1
        factor = 1.1 if source.onnx_path.read_text() == "auto" else 1.0
        yield _Session(self, number, factor * source.module.out_features / 1e3)


class _Session:
    device, providers, node_placement = MadeUp.device, MadeUp.providers, MadeUp.node_placement

    def __init__(self, runtime: MadeUp, number: int, seconds: float) -> None:
        self.runtime, self.number, self.seconds, self.runs = runtime, number, seconds, 0

    def bind(self, inputs: object) -> Callable[[], object]:
        def run_once() -> None:
            self.runtime.seconds += self.seconds * self.runtime.pace(self.number, self.runs)
            self.runs += 1

        return run_once


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    runtime = MadeUp()
    for name in ("thread_time", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: runtime.seconds)
    monkeypatch.setattr(stopwatch, "usable_runtime", lambda name: runtime)
    monkeypatch.setattr(
        stopwatch, "export_onnx", lambda model, inputs, path, *, exporter, check: path.write_text(exporter)
    )
    return runtime


def watch(tmp_path: Path, **conditions: object) -> Stopwatch:
    return Stopwatch(nn.Linear(3, 20), torch.ones(1, 3), LatencyConditions(**conditions), cache_folder=tmp_path)


def test_the_dense_time_is_that_of_the_file_that_ships(tmp_path: Path, made_up: MadeUp) -> None:
    own = watch(tmp_path)

    quick = own.networks({"half": nn.Linear(3, 10)})
    again = own.networks({"half": nn.Linear(3, 10)})
    shipped = own.networks({"half": nn.Linear(3, 10)}, as_shipped=True)

    assert [pytest.approx(22.0)] * 3 == [times.dense_ms for times in (quick, again, shipped)]
    assert [{"half": pytest.approx(0.5)}] * 3 == [times.shares for times in (quick, again, shipped)]
    assert (pytest.approx(0.0), "cpu") == (shipped.error_bar, shipped.clock)
    assert shipped.rounds >= 30


def test_one_session_that_lies_badly_in_memory_does_not_count(tmp_path: Path, made_up: MadeUp) -> None:
    own = watch(tmp_path)
    own.networks({})
    made_up.pace = lambda session, run: 1.5 if session == opened + 1 else 1.0
    opened = made_up.opened

    times = own.networks({"half": nn.Linear(3, 10)})

    assert {"half": pytest.approx(0.5)} == times.shares


def test_a_percentile_is_that_of_single_runs(tmp_path: Path, made_up: MadeUp) -> None:
    made_up.pace = lambda session, run: 3.0 if run % 10 == 0 else 1.0

    assert watch(tmp_path).networks({}).dense_ms == pytest.approx(22.0)
    assert watch(tmp_path, percentile=95).networks({}).dense_ms == pytest.approx(66.0)


def test_the_tails_are_medians_over_the_sessions_of_their_percentiles(tmp_path: Path, made_up: MadeUp) -> None:
    first_report = range(3)
    made_up.pace = lambda session, run: 9.0 if session in first_report else 3.0 if run % 40 == 0 else 1.0

    times = watch(tmp_path, percentile=95).networks({"half": nn.Linear(3, 10)}, as_shipped=True)

    p95_ms, p99_ms = times.tails_ms["half"]
    assert 11.0 == pytest.approx(p95_ms)
    assert 11.0 < p99_ms <= 33.0


def test_a_network_that_the_quick_exporter_cannot_write_goes_through_the_other(
    tmp_path: Path, made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(model: nn.Module, inputs: object, path: Path, *, exporter: str, check: bool) -> None:
        if exporter == "torchscript":
            raise ExportError("not this one")
        path.write_text(exporter)

    monkeypatch.setattr(stopwatch, "export_onnx", export)

    assert watch(tmp_path).networks({"half": nn.Linear(3, 10)}).shares == {"half": pytest.approx(0.5)}


def test_layers_are_timed_side_by_side(tmp_path: Path, made_up: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MadeUp, "session", _layer_session)
    layer = Layer(weight="w", size=())
    wanted = [(layer, 3, written) for written in range(1, 40)]

    times = watch(tmp_path).layers_ms(wanted)

    assert {at: pytest.approx(at[2]) for at in wanted} == times


@contextmanager
def _layer_session(self: MadeUp, source: RunnableModel, **options: object) -> Iterator[object]:
    yield _Session(self, 0, source.module.out_features / 1e3)
