"""The GPU benchmark continues where it stopped, and never mixes pieces of different ONNX files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "benchmarks" / "gpu_evidence.py"
PIECE = ("onnxruntime-cuda", "fp32", "l1")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_evidence", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def artefacts(tmp_path: Path) -> Path:
    for name in ("dense", "l1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_text(name)
    return tmp_path


def save_piece(script: ModuleType, artefacts: Path, status: str) -> None:
    found = {"status": status, "network": "l1", "onnx_sha256": script.fingerprints(artefacts, "l1")}
    script.piece_path(artefacts, PIECE).write_text(json.dumps(found))


def test_a_measured_piece_is_done_and_merged(script: ModuleType, artefacts: Path) -> None:
    save_piece(script, artefacts, "measured")

    assert script.is_done(artefacts, PIECE, artefacts)
    assert ["measured"] == [piece["status"] for piece in script.current_pieces(artefacts, artefacts)]


def test_a_piece_that_could_not_be_measured_is_tried_again(script: ModuleType, artefacts: Path) -> None:
    save_piece(script, artefacts, "NOT MEASURED")

    assert not script.is_done(artefacts, PIECE, artefacts)


@pytest.mark.parametrize("changed", ["dense", "l1"])
def test_a_piece_of_an_older_file_is_measured_again_and_not_merged(
    script: ModuleType, artefacts: Path, changed: str
) -> None:
    save_piece(script, artefacts, "measured")

    (artefacts / changed / "model.onnx").write_text("newer")

    assert not script.is_done(artefacts, PIECE, artefacts)
    assert [] == script.current_pieces(artefacts, artefacts)


def test_a_piece_of_an_unknown_file_or_a_network_that_is_gone_is_not_merged(
    script: ModuleType, artefacts: Path
) -> None:
    script.piece_path(artefacts, PIECE).write_text('{"status": "measured", "network": "gone"}')

    assert not script.is_done(artefacts, PIECE, artefacts)
    assert [] == script.current_pieces(artefacts, artefacts)
