"""The examples that the documentation shows run as they stand."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

import pytest
import torch
from markdown_blocks import ROOT, blocks_of


@pytest.fixture(autouse=True)
def one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_quickstart_prunes_and_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")

    assert (tmp_path / "pruned.onnx").is_file()
    assert "certificate exact: True" in capsys.readouterr().out


def test_quickstart_is_short() -> None:
    lines = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8").splitlines()

    assert 30 >= len(lines)


def test_own_model_is_pruned_rebuilt_and_run_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    runpy.run_path(str(ROOT / "examples" / "prune_your_own_model.py"), run_name="__main__")

    assert {"plan.json", "model.safetensors", "model.onnx"} <= {p.name for p in (tmp_path / "own_model").iterdir()}
    assert "rebuilt model equals the pruned one: True" in capsys.readouterr().out


def test_the_program_for_production_needs_numpy_and_onnxruntime_only() -> None:
    page = ROOT / "docs" / "how-to" / "run_in_production.md"
    program = next(block.text for block in blocks_of(page) if block.text.startswith("# run_model.py\n"))

    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(program))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }

    assert {"numpy", "onnxruntime"} == imported - set(sys.stdlib_module_names)
