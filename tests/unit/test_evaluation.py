"""The measurement, on runtimes whose clock and speed are made up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.evaluation import (
    accuracy_of_session,
    environment,
    file_size_bytes,
    measure_latency,
    throughput,
)
from nni_prune_ext.runtimes.base import Array, Availability, InferenceSession, Precision, RunnableModel
from nni_prune_ext.runtimes.torch_eager import TorchEager

X = np.zeros((2, 3), np.float32)
MODEL = RunnableModel()


class FakeClock:
    """Time that passes only when a fake model runs; the speed of the machine changes from round to round."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        for name in ("thread_time", "perf_counter"):
            monkeypatch.setattr(time, name, lambda: self.seconds)  # the module that evaluation imports


class FakeRuntime:
    """Runs nothing, and takes a given time for it; it is also its own session."""

    name = "fake"
    providers = ("fake",)
    node_placement: Mapping[str, int] = {"fake": 1}

    def __init__(self, clock: FakeClock, seconds: Sequence[float], device: str = "cpu") -> None:
        self.clock = clock
        self.seconds = seconds
        self.device = device
        self.calls: list[int] = []

    def availability(self) -> Availability:
        return Availability(True, "It is made up.")

    @contextmanager
    def session(
        self, source: RunnableModel, *, threads: int | None = 1, precision: Precision = "fp32"
    ) -> Iterator[InferenceSession]:
        yield self

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        return [inputs[0]]

    def bind(self, inputs: Sequence[Array]) -> Callable[[], object]:
        number = int(inputs[0].flat[0])

        def run_once() -> None:
            self.calls.append(number)
            self.clock.seconds += self.seconds[number % len(self.seconds)]

        return run_once


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return FakeClock(monkeypatch)


def test_ratios_are_taken_within_rounds_and_the_first_entry_is_measured_twice(clock: FakeClock) -> None:
    dense, pruned = FakeRuntime(clock, [0.004, 0.008]), FakeRuntime(clock, [0.001, 0.002])
    inputs = [[np.full((2, 3), number, np.float32)] for number in range(2)]

    report = measure_latency(
        {"dense": (dense, MODEL), "pruned": (pruned, MODEL)}, inputs, rounds=4, min_seconds=0, threads=1
    )

    assert ["dense", "pruned"] == [row.name for row in report.rows]
    assert [1.0, 0.25] == pytest.approx([row.ratio for row in report.rows])
    assert [6.0, 1.5] == pytest.approx([row.p50_ms for row in report.rows])
    assert 8.0 == pytest.approx(report.rows[0].p95_ms)
    assert [1.0, 0.0] == pytest.approx([report.aa_ratio, report.error_bar])
    assert (4, "cpu", 2) == (report.rounds, report.clock, report.batch_size)
    assert report.to_dict() == json.loads(json.dumps(report.to_dict()), object_hook=_lists_as_tuples)


def _lists_as_tuples(values: dict[str, object]) -> dict[str, object]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def test_entries_may_have_inputs_of_their_own(clock: FakeClock) -> None:
    shapes: dict[str, list[tuple[int, ...]]] = {"wide": [], "narrow": []}

    class Noting(FakeRuntime):
        def bind(self, inputs: Sequence[Array]) -> Callable[[], object]:
            shapes[self.kind].append(inputs[0].shape)
            return super().bind(inputs)

    entries = {}
    for kind in shapes:
        made = Noting(clock, [1.0])
        made.kind = kind
        entries[kind] = (made, MODEL)

    report = measure_latency(entries, {"wide": [[np.zeros((2, 9))]], "narrow": [[np.zeros((2, 4))]]}, min_seconds=0)

    assert ({(2, 9)}, {(2, 4)}) == (set(shapes["wide"]), set(shapes["narrow"]))
    assert 2 == report.batch_size


def test_short_runs_are_timed_together_until_the_clock_can_resolve_them(clock: FakeClock) -> None:
    quick = FakeRuntime(clock, [0.0005])

    report = measure_latency({"quick": (quick, MODEL)}, [[X]], rounds=3, min_seconds=0)

    assert 6 == report.rows[0].runs_per_sample
    assert 2 * (5 + 3 * 6) == len(quick.calls)  # A/A: warm-up and samples of two sessions
    assert 0.5 == pytest.approx(report.rows[0].p50_ms)


def test_rounds_go_on_until_the_time_has_passed(clock: FakeClock) -> None:
    model = FakeRuntime(clock, [0.005])

    report = measure_latency({"model": (model, MODEL)}, [[X]], rounds=1, min_seconds=0.1)

    assert report.rounds in {10, 11}  # 2 * 5 ms in each round; the sum of floats is not exact


def test_the_order_is_random_and_the_same_for_one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def order(seed: int) -> list[int]:
        clock = FakeClock(monkeypatch)
        calls: list[int] = []
        runtimes = [FakeRuntime(clock, [0.01]) for _ in range(3)]
        for runtime in runtimes:
            runtime.calls = calls  # one list for all
        entries = {str(index): (runtime, MODEL) for index, runtime in enumerate(runtimes)}
        bind = FakeRuntime.bind
        monkeypatch.setattr(
            FakeRuntime, "bind", lambda self, _: bind(self, [np.full(1, runtimes.index(self), np.float32)])
        )
        measure_latency(entries, [[X]], rounds=10, min_seconds=0, seed=seed)
        monkeypatch.setattr(FakeRuntime, "bind", bind)
        return calls

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert sorted(order(0)) == sorted(order(1))


def test_cpu_time_is_refused_where_it_does_not_count_the_work(clock: FakeClock) -> None:
    cpu, gpu = FakeRuntime(clock, [0.01]), FakeRuntime(clock, [0.01], device="cuda")

    with pytest.raises(ConfigError, match="threads=2 on cpu"):
        measure_latency({"cpu": (cpu, MODEL)}, [[X]], threads=2, clock="cpu")
    with pytest.raises(ConfigError, match="threads=1 on cpu, cuda"):
        measure_latency({"cpu": (cpu, MODEL), "gpu": (gpu, MODEL)}, [[X]], clock="cpu")
    report = measure_latency({"cpu": (cpu, MODEL), "gpu": (gpu, MODEL)}, [[X]], rounds=2, min_seconds=0)
    assert "wall" == report.clock


def test_nothing_to_measure_is_a_mistake(clock: FakeClock) -> None:
    with pytest.raises(ConfigError, match="0 entries"):
        measure_latency({}, [[X]])


def test_throughput_counts_images_and_not_batches(clock: FakeClock) -> None:
    result = throughput(FakeRuntime(clock, [0.25]), MODEL, [X], min_seconds=1.0)

    assert (8.0, 4, 2) == (result.images_per_s, result.runs, result.batch_size)


def test_accuracy_is_the_share_of_right_labels(clock: FakeClock) -> None:
    scores = np.asarray([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]], np.float32)
    batches = [(scores, np.asarray([1, 0, 0])), (scores[:1], np.asarray([1]))]

    assert 0.75 == accuracy_of_session(FakeRuntime(clock, [0.0]), batches)
    with pytest.raises(ConfigError, match="0 images"):
        accuracy_of_session(FakeRuntime(clock, [0.0]), [])


def test_the_size_of_a_file_includes_the_weights_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"12345")

    assert 5 == file_size_bytes(path)
    (tmp_path / "model.onnx.data").write_bytes(b"123")
    assert 8 == file_size_bytes(path)


def test_the_environment_names_what_a_measurement_depends_on() -> None:
    described = environment()

    assert {"cpu", "torch", "onnxruntime", "gpu", "gpu_driver", "torch_threads", "date"} <= described.keys()
    assert all(described.values())


def test_a_real_model_is_slower_than_one_with_a_tenth_of_its_work() -> None:
    large = RunnableModel(module=nn.Sequential(*[nn.Linear(256, 256) for _ in range(20)]))
    small = RunnableModel(module=nn.Sequential(*[nn.Linear(256, 256) for _ in range(2)]))
    inputs = [[np.zeros((8, 256), np.float32)]]

    report = measure_latency(
        {"large": (TorchEager(), large), "small": (TorchEager(), small)}, inputs, rounds=10, min_seconds=0
    )

    assert report.rows[1].ratio < 0.5
    assert "cpu" == report.clock
