"""The measurement over runtimes whose speed is made up: what is compared, and what is said to be missing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nni_prune_ext.data.batches import split_batches
from nni_prune_ext.data.sources import open_data
from nni_prune_ext.errors import ConfigError, ModelError, RuntimeUnavailableError
from nni_prune_ext.evidence import (
    Building,
    Conditions,
    Evidence,
    EvidenceNetwork,
    FreshRuns,
    FreshTask,
    collect_evidence,
)
from nni_prune_ext.evidence.charts import saving_chart, throughput_chart
from nni_prune_ext.evidence.page import evidence_html, evidence_markdown, write_evidence_page
from nni_prune_ext.evidence.tables import evidence_table, missing_table, shown_quantities
from nni_prune_ext.runtimes.base import Array, Availability, InferenceSession, Precision, RunnableModel

SECONDS = {"dense": 0.004, "pruned": 0.001, "alone": 0.002}
QUICK = Conditions(batches=(1, 4), rounds=3, seconds=0, fresh=0)


class Line(nn.Module):
    """Ten classes, of which the pixel sums of an image favour one; ``off`` shifts the first output."""

    def __init__(self, off: float = 0.0) -> None:
        super().__init__()
        self.off = off

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        sums = images.flatten(1).sum(1, keepdim=True)
        outputs = torch.cos(sums * torch.arange(10) + 0.1)
        return outputs + self.off * nn.functional.one_hot(torch.tensor(0), 10)


class FakeRuntime:
    """Takes ONNX paths for names, knows how long each network takes, and computes what ``Line`` computes."""

    def __init__(
        self, clock: list[float], *, takes_modules: bool = False, off: float = 0.0, usable: bool = True
    ) -> None:
        self.name = "fake"
        self.clock = clock
        self.takes_modules = takes_modules
        self.off = off
        self.usable = usable
        self.refused: tuple[str, ...] = ()
        self.opened: list[tuple[RunnableModel, int | None, Precision]] = []

    def availability(self) -> Availability:
        return Availability(self.usable, "It is made up." if self.usable else "It has no device.")

    @contextmanager
    def session(
        self, source: RunnableModel, *, threads: int | None = 1, precision: Precision = "fp32"
    ) -> Iterator[InferenceSession]:
        if self.takes_modules and source.module is None:
            raise ModelError("It needs a module.")
        if not self.takes_modules and source.onnx_path is None:
            raise ModelError("It needs a file.")
        name = source.onnx_path.stem if source.onnx_path else "pruned"
        if name in self.refused:
            raise RuntimeUnavailableError(f"{name} fell back.")
        self.opened.append((source, threads, precision))
        yield FakeSession(self, name)


class FakeSession:
    """A session of ``FakeRuntime``."""

    device = "cpu"
    providers = ("fake",)
    node_placement: Mapping[str, int] = {"fake": 7}

    def __init__(self, runtime: FakeRuntime, name: str) -> None:
        self.runtime = runtime
        self.name = name

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        return [Line(self.runtime.off)(torch.from_numpy(inputs[0])).numpy()]

    def bind(self, inputs: Sequence[Array]) -> Callable[[], object]:
        def run_once() -> None:
            self.runtime.clock[0] += SECONDS[self.name] * len(inputs[0])

        return run_once


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time that passes only when a fake network runs."""
    seconds = [0.0]
    for name in ("thread_time", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: seconds[0])
    return seconds


def network(name: str, macs: int | None = None, *, module: bool = True) -> EvidenceNetwork:
    shape = (None, 1, 8, 8)
    if not module:
        return EvidenceNetwork(name, Path(f"{name}.onnx"), 10, shape)
    return EvidenceNetwork(name, Path(f"{name}.onnx"), 10, shape, Path(name), Line(), "", macs, 5)


NETWORKS = [network("dense", 100), network("pruned", 40), network("alone", module=False)]


def measured(clock: list[float], **runtime_options: object) -> Evidence:
    return collect_evidence(NETWORKS, {"fake": FakeRuntime(clock, **runtime_options)}, QUICK)  # type: ignore[arg-type]


def test_there_is_a_row_per_network_runtime_and_batch_with_latency_beside_macs(clock: list[float]) -> None:
    rows = measured(clock).rows()

    assert [(name, batch) for batch in (1, 4) for name in SECONDS] == [(row.network, row.batch) for row in rows]
    assert [1, 0.25, 0.5] * 2 == pytest.approx([row.latency.ratio for row in rows])
    assert [1, 0.4, None] * 2 == [row.macs_ratio for row in rows]
    assert [4, 1, 2, 16, 4, 8] == pytest.approx([row.latency.p50_ms for row in rows])
    assert [250, 1000, 500] * 2 == pytest.approx([row.throughput.images_per_s for row in rows])
    assert {(0.0, 10, None, None)} == {(row.error_bar, row.size_bytes, row.top1, row.host_peak_bytes) for row in rows}


def test_outputs_are_compared_with_pytorch_where_there_is_a_module(clock: list[float]) -> None:
    evidence = measured(clock, off=0.25)

    assert ["dense", "pruned"] == list(evidence.parity["fake"])
    parity = evidence.parity["fake"]["dense"]
    images = np.random.default_rng(0).standard_normal((8, 1, 1, 8, 8), dtype=np.float32)
    largest = [float(Line()(torch.from_numpy(image)).abs().max()) for image in images]
    assert 0.25 / min(largest) == pytest.approx(parity.max_rel)
    assert sum(0.25 / scale for scale in largest) / 80 == pytest.approx(parity.mean_rel)
    assert 8 == parity.images
    assert 0 < (parity.top1_agreement or 0) <= 1


def test_with_data_accuracy_and_parity_are_over_all_test_images(clock: list[float]) -> None:
    source = open_data("digits", image_size=8, limit=30)
    right = sum(int((Line()(images).argmax(1) == labels).sum()) for images, labels in split_batches(source, "test", 7))

    evidence = collect_evidence(NETWORKS, {"fake": FakeRuntime(clock)}, replace(QUICK, batches=(7,)), source=source)

    assert dict.fromkeys(SECONDS, right / 30) == evidence.accuracy["fake"]
    assert {30} == {parity.images for parity in evidence.parity["fake"].values()}
    assert {1.0} == {parity.top1_agreement for parity in evidence.parity["fake"].values()}
    assert "digits" in evidence.data


def test_a_runtime_of_pytorch_takes_modules_and_says_why_a_file_alone_has_no_row(clock: list[float]) -> None:
    runtime = FakeRuntime(clock, takes_modules=True)

    evidence = collect_evidence(NETWORKS[1:], {"fake": runtime}, QUICK)

    assert {"pruned"} == {row.network for row in evidence.rows()}
    assert all(source.module is not None for source, _, _ in runtime.opened)
    (missing,) = evidence.not_measured
    assert ("fake", "alone", "everything") == (missing.runtime, missing.network, missing.what)
    assert "It needs a module. It is an ONNX file alone: no artefact folder holds its PyTorch module." == missing.reason


def test_a_file_that_does_not_load_is_blamed_itself_though_there_is_a_module(clock: list[float]) -> None:
    class Broken(FakeRuntime):
        def session(self, source: RunnableModel, **options: object):  # type: ignore[override,no-untyped-def]
            if source.onnx_path:
                raise ModelError("The file is broken.")
            return super().session(source)

    evidence = collect_evidence(NETWORKS[:1], {"fake": Broken(clock)}, QUICK)

    assert ["The file is broken."] == [missing.reason for missing in evidence.not_measured]


def test_a_network_that_falls_back_has_no_row_and_the_others_have_theirs(clock: list[float]) -> None:
    runtime = FakeRuntime(clock)
    runtime.refused = ("dense",)

    evidence = collect_evidence(NETWORKS, {"fake": runtime}, QUICK)

    assert ["pruned", "alone"] * 2 == [row.network for row in evidence.rows()]
    assert [1, 2] * 2 == pytest.approx([row.latency.ratio for row in evidence.rows()])
    assert [("dense", "dense fell back.")] == [(own.network, own.reason) for own in evidence.not_measured]


def test_a_runtime_that_is_not_usable_is_in_json_table_and_page_with_its_reason(clock: list[float]) -> None:
    evidence = collect_evidence(NETWORKS, {"fake": FakeRuntime(clock), "far": FakeRuntime(clock, usable=False)}, QUICK)

    table = evidence_table(evidence)
    missing = missing_table(evidence)
    assert ["fake", "far"] == [group.name for group in table.groups]
    assert "all networks: NOT MEASURED" == table.groups[1].rows[0][0].text
    assert missing is not None
    assert ["far", "all networks", "everything", "It has no device."] == [c.text for c in missing.groups[0].rows[0]]
    facts = json.loads(json.dumps(evidence.facts()))
    assert [{"runtime": "far", "reason": "It has no device.", "network": None, "what": "everything"}] == facts[
        "not_measured"
    ]
    for text in (evidence_html(evidence), evidence_markdown(evidence)):
        assert "far: NOT MEASURED. It has no device." in text


def test_conditions_reach_the_runtime_and_the_file(clock: list[float]) -> None:
    runtime = FakeRuntime(clock)
    conditions = replace(QUICK, threads=2, precision="fp16", clock="wall", batches=(4,), seed=3)

    evidence = collect_evidence(NETWORKS, {"fake": runtime}, conditions)

    assert {(2, "fp16")} == {(threads, precision) for _, threads, precision in runtime.opened}
    assert ["wall"] == [timing.latency.clock for timing in evidence.timings]
    facts = json.loads(json.dumps(evidence.facts()))
    assert ([4], 2, "fp16", "wall", 3) == tuple(
        facts["conditions"][key] for key in ("batches", "threads", "precision", "clock", "seed")
    )


def test_cpu_time_of_several_threads_is_refused(clock: list[float]) -> None:
    with pytest.raises(ConfigError, match="counts one thread only"):
        collect_evidence(NETWORKS, {"fake": FakeRuntime(clock)}, replace(QUICK, threads=2, clock="cpu"))


def test_a_clock_that_does_not_count_the_work_is_a_reason_not_a_number(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeSession, "device", "cuda")

    evidence = collect_evidence(NETWORKS, {"fake": FakeRuntime(clock)}, replace(QUICK, clock="cpu"))

    assert [] == evidence.rows()
    assert list(SECONDS) == [missing.network for missing in evidence.not_measured]
    assert all("CPU time was asked for" in missing.reason for missing in evidence.not_measured)


class Fresh:
    """Stands for fresh processes; remembers what they were asked, and fails for one network."""

    def __init__(self) -> None:
        self.tasks: list[FreshTask] = []

    def __call__(self, task: FreshTask, processes: int) -> FreshRuns:
        self.tasks.append(task)
        if task.onnx_path.stem == "pruned":
            raise RuntimeUnavailableError("It died.")
        return FreshRuns(30.0, 20.0, 10.0, {1: 1 << 20, 4: None}, processes)


def test_cold_start_and_memory_come_from_fresh_processes(clock: list[float]) -> None:
    fresh = Fresh()
    building = Building({"fake": {"key": True}}, "resnet20", "cpu")

    evidence = collect_evidence(
        NETWORKS, {"fake": FakeRuntime(clock)}, replace(QUICK, fresh=2, batches=(4, 1)), fresh=fresh, building=building
    )

    assert list(SECONDS) == [task.onnx_path.stem for task in fresh.tasks]
    expected = {"runtime": "fake", "options": {"key": True}, "folder": None, "model": "resnet20", "batches": (1, 4)}
    assert expected.items() <= fresh.tasks[0].model_dump().items()
    by_row = {(row.network, row.batch): row for row in evidence.rows()}
    assert (1 << 20, None) == (by_row["dense", 1].host_peak_bytes, by_row["dense", 4].host_peak_bytes)
    assert by_row["pruned", 1].fresh is None
    assert [("pruned", "cold start and host memory", "It died.")] == [
        (own.network, own.what, own.reason) for own in evidence.not_measured
    ]
    assert {"1": 1 << 20, "4": None} == evidence.facts()["fresh_processes"]["fake"]["dense"]["host_peak_bytes"]  # type: ignore[index]
    assert 6 == len(evidence_table(evidence).groups[0].rows)  # the network with a gap has no further row


def test_a_fresh_process_gets_the_folder_only_where_the_runtime_takes_modules(clock: list[float]) -> None:
    fresh = Fresh()

    collect_evidence(
        NETWORKS[1:2], {"fake": FakeRuntime(clock, takes_modules=True)}, replace(QUICK, fresh=1), fresh=fresh
    )

    assert [Path("pruned")] == [task.folder for task in fresh.tasks]


def test_columns_without_any_number_are_left_out(clock: list[float]) -> None:
    headings = [quantity.heading for quantity in shown_quantities(measured(clock).rows())]

    assert {"p50 ms", "MACs × first", "parity"} <= set(headings)
    assert not {"top-1", "GPU memory", "cold start ms"} & set(headings)


def test_the_page_shows_every_row_in_html_and_markdown(clock: list[float], tmp_path: Path) -> None:
    evidence = measured(clock)

    for name in ("page.html", "page.md"):
        write_evidence_page(tmp_path / name, evidence)
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert all(word in text for word in ("dense", "alone", "MACs × first", "0.400", "fake 7", "p99 ms", "1,000"))
    with pytest.raises(ConfigError, match=r"ends in '.txt', expected .html or .md"):
        write_evidence_page(tmp_path / "page.txt", evidence)


def test_markdown_has_as_many_cells_in_every_line_of_a_table(clock: list[float]) -> None:
    evidence = collect_evidence(NETWORKS, {"far": FakeRuntime(clock, usable=False)}, QUICK)
    for found in (evidence, measured(clock)):
        lines = evidence_markdown(found).split("\n")
        tables = "\n".join(line if line.startswith("|") else "" for line in lines).split("\n\n")
        widths = [{line.count("|") for line in table.strip().split("\n")} for table in tables if table.strip()]

        assert len(widths) >= 4
        assert all(len(width) == 1 for width in widths)


def test_charts_need_something_to_compare(clock: list[float]) -> None:
    rows = measured(clock).rows()

    assert saving_chart(rows, name="a") is not None
    assert saving_chart([row for row in rows if row.network != "pruned"], name="a") is None
    assert throughput_chart(rows, name="b") is not None
    assert throughput_chart([row for row in rows if row.batch == 1], name="b") is None
