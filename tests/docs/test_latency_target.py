"""``examples/latency_target.py``: what it prints and writes was measured on its files; wrong input leaves nothing."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
import torch
from markdown_blocks import ROOT
from PIL import Image

import nni_prune_ext as npe
from nni_prune_ext import evaluation, pipeline
from nni_prune_ext.data.sources import IMAGENET_MEAN, IMAGENET_STD
from nni_prune_ext.errors import RuntimeUnavailableError
from nni_prune_ext.export import artefact_writing
from nni_prune_ext.latency import stopwatch
from nni_prune_ext.runtimes.base import Availability
from nni_prune_ext.runtimes.onnxruntime_cpu import OnnxRuntimeCpu

SIZE, EDGE = 32, 2
"""Of the smoke run's images, and what is cut off on every side of the files."""


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program as a module, with little time for every measurement."""
    spec = importlib.util.spec_from_file_location("latency_target", ROOT / "examples" / "latency_target.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for place in (stopwatch, artefact_writing):
        monkeypatch.setattr(place, "export_onnx", partial(export_in_time, place.export_onnx))
    monkeypatch.setattr(evaluation, "SHORTEST_SAMPLE_SECONDS", 1e-6)
    monkeypatch.setattr(stopwatch, "_LAYER_ROUNDS", 2)
    monkeypatch.setattr(stopwatch, "_SECONDS", 0.0)
    monkeypatch.setattr(stopwatch, "_REPEATS", 1)
    monkeypatch.setattr(module, "SESSIONS", 3)
    monkeypatch.setenv("NNI_PRUNE_EXT_CACHE", str(tmp_path / "cache"))
    return module


def export_in_time(export: Callable[..., object], *given: object, **options: object) -> object:
    """Exports by the exporter that takes no seconds."""
    return export(*given, **{**options, "exporter": "torchscript"})


@pytest.fixture
def folders(tmp_path: Path) -> Callable[[str, int], Path]:
    """Makes a folder of noise images in ten classes."""

    def make(name: str, seed: int) -> Path:
        draws = np.random.default_rng(seed)
        for label in "abcdefghij":
            (tmp_path / name / label).mkdir(parents=True)
            for number in range(2):
                pixels = draws.integers(0, 256, (SIZE + 2 * EDGE, SIZE + 2 * EDGE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / name / label / f"{number}.png")
        return tmp_path / name

    return make


def bare_top1(model: Path, images: Path) -> float:
    """Runs an ONNX file with onnxruntime alone; the images are read by hand."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    right = []
    for label, folder in enumerate(sorted(images.iterdir())):
        for path in folder.iterdir():
            pixels = np.asarray(Image.open(path), np.float32)[EDGE:-EDGE, EDGE:-EDGE] / 255
            image = ((pixels - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)).transpose(2, 0, 1)[None]
            right.append(session.run(None, {session.get_inputs()[0].name: image})[0].argmax() == label)
    return float(np.mean(right))


def test_asked_and_achieved_come_from_a_measurement_of_the_files(
    example: ModuleType,
    folders: Callable[[str, int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    timed: list[list[str]] = []
    measure = example.measure_latency

    def slower(entries, inputs, *, seed: int, **how):  # the pruned file takes 0.91, 0.92, 0.93 of the dense one's time
        timed.append([entry.onnx_path.parent.name for _, entry in entries.values() if entry.onnx_path.is_file()])
        report = measure(entries, inputs, seed=seed, **{**how, "min_seconds": 0.0})
        dense, pruned = report.rows
        return replace(report, rows=(replace(dense, p50_ms=5.0 + seed), replace(pruned, ratio=0.91 + seed / 100)))

    monkeypatch.setattr(example, "measure_latency", slower)
    train, held_out, out = folders("train", 0), folders("held_out", 1), tmp_path / "out"

    given = ["--smoke", "--num-classes", "10", "--train", str(train), "--data", str(held_out), "--recover-epochs", "1"]

    code = example.main([*given, "--learning-rate", "1e-5", "--target", "latency=0.8", "--out", str(out)])

    printed, complaint = capsys.readouterr()
    assert "error: " not in complaint
    written = json.loads((out / "results.json").read_text())
    assert [["dense", "pruned"]] * 3 == timed
    assert (1, False) == (code, written["met"])
    assert pytest.approx((6.0, 0.8 * 6.0, 0.92 * 6.0)) == tuple(
        written[f"{k}_ms"] for k in ("dense", "asked", "achieved")
    )
    assert "asked 4.8 ms, achieved 5.52 ms, 0.920 of the dense 6 ms: MISSED" in printed
    assert "median on onnxruntime-cpu, batch 1, 1 thread, cpu time, A/A error" in printed
    assert max(session["error_bar"] for session in written["sessions"]) == written["error_bar"]
    assert written["macs"]["pruned"] < written["macs"]["dense"]
    assert max(written["parity"].values()) < 1e-4
    assert 20 == written["top1"]["images"]
    for name in ("dense", "pruned"):
        assert bare_top1(out / name / "model.onnx", held_out) == written["top1"][f"{name} on onnxruntime-cpu"]
    assert not any("UNKNOWN" in note or "not recovered" in note for note in written["notes"])
    assert any("dense network was not trained" in note for note in written["notes"])


def test_without_images_the_accuracy_is_said_to_be_unknown(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    code = example.main(["--smoke", "--target", "latency=900ms", "--out", str(out)])

    printed, complaint = capsys.readouterr()
    assert "error: " not in complaint
    written = json.loads((out / "results.json").read_text())
    assert (0, True, 900.0) == (code, written["met"], written["asked_ms"])
    assert 900.0 > written["achieved_ms"] > 0
    assert "top-1: not measured" in printed
    assert "not measured" == written["top1"]
    assert "note: accuracy is UNKNOWN" in printed
    assert "note: not recovered" in printed
    assert "random weights" in printed
    assert {"dense", "pruned", "results.json"} == {path.name for path in out.iterdir()}


def refused(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs the program on wrong input and returns what it says; it must leave nothing."""
    out = tmp_path / "out"

    code = example.main([*(str(argument) for argument in arguments), "--out", str(out)])

    said = capsys.readouterr()
    assert 2 == code
    assert not out.exists()
    assert not list(tmp_path.glob(".unfinished-*"))
    return said.err.partition("error: ")[2]


def test_weights_of_another_network_or_none_at_all_are_refused(example, tmp_path, capsys) -> None:
    foreign, code, missing = tmp_path / "foreign.safetensors", tmp_path / "code.pt", tmp_path / "missing.pt"
    npe.save_weights(npe.build_model("resnet20"), foreign)
    torch.save(npe.build_model("resnet20"), code)

    assert "belongs to another model" in refused(example, tmp_path, capsys, "--weights", foreign)
    assert "never executed" in refused(example, tmp_path, capsys, "--weights", code)
    assert "no weights file" in refused(example, tmp_path, capsys, "--weights", missing)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "squeezenet1_2"], "torchvision has no model 'squeezenet1_2'"),
        (["--network", "lraspp_mobilenet_v3_large"], "does not classify images"),
        (["--target", "macs=0.5"], "expected one such as latency=0.7"),
        (["--target", "latency=7"], "has no unit"),
        (["--on", "abacus"], "abacus"),
        (["--data", "nowhere"], "no folder 'nowhere'"),
        (["--recover-epochs", "1"], "needs training data"),
    ],
)
def test_what_cannot_be_done_is_refused(example, tmp_path, capsys, arguments: list[str], message: str) -> None:
    assert message in refused(example, tmp_path, capsys, "--smoke", *arguments)


def test_a_runtime_that_cannot_be_used_says_so(example, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(OnnxRuntimeCpu, "availability", lambda self: Availability(False, "It is on holiday."))

    assert "'onnxruntime-cpu' here. It is on holiday." in refused(example, tmp_path, capsys, "--smoke")


def test_a_failure_after_the_export_leaves_nothing(example, tmp_path, capsys, monkeypatch) -> None:
    def by_macs(model, inputs, *, target, latency, **options) -> npe.PruneResult:
        return pipeline.prune(model, inputs, target="macs=0.9", **options)

    def fell_back(*given, **options) -> None:
        raise RuntimeUnavailableError("It fell back.")

    monkeypatch.setattr(npe, "prune", by_macs, raising=False)
    monkeypatch.setattr(example, "measure_latency", fell_back)

    assert "It fell back." in refused(example, tmp_path, capsys, "--smoke")


def test_images_must_fit_the_network_and_be_held_out(example, folders, tmp_path, capsys) -> None:
    train = folders("train", 0)
    ten = ("--smoke", "--num-classes", "10")

    assert "10 class folders together, expected 1000" in refused(example, tmp_path, capsys, "--smoke", "--data", train)
    assert "in one only" in refused(example, tmp_path, capsys, *ten, "--train", train, "--data", train)


def test_a_folder_with_something_in_it_is_left_alone(example, tmp_path, capsys) -> None:
    (tmp_path / "results.json").write_text("mine")

    assert 2 == example.main(["--smoke", "--out", str(tmp_path)])

    assert "is not empty" in capsys.readouterr().err
    assert "mine" == (tmp_path / "results.json").read_text()
