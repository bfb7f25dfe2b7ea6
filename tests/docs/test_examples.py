"""The examples that the documentation shows run as they stand."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import subprocess
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


def test_psap_and_its_ratios_run_in_an_nni_script() -> None:
    program = [sys.executable, str(ROOT / "examples" / "nni_psap.py"), "--smoke"]

    done = subprocess.run(
        program, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )

    assert 0 == done.returncode, done.stderr[-2000:]
    difference = float(done.stdout.partition("ONNX: ")[2].partition("difference ")[2].split()[0])
    assert difference < 1e-4
    assert "layers lose 0.50 to 0.50" in done.stdout, "the same everywhere"
    low, _, high = done.stdout.partition("PSAPRatioPruner: layers lose ")[2].split()[:3]
    assert float(low) < 0.5 < float(high)


def test_reconstruction_and_its_control_run_in_an_nni_script() -> None:
    program = [sys.executable, str(ROOT / "examples" / "nni_reconstruction.py"), "--smoke"]

    done = subprocess.run(
        program, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )

    assert 0 == done.returncode, done.stderr[-2000:]
    difference = float(done.stdout.partition("ONNX: ")[2].partition("difference ")[2].split()[0])
    assert difference < 1e-4
    dense, control, joint = (
        int(done.stdout.partition(f"{name}: ")[2].split()[0].replace(",", ""))
        for name in ("dense", "weight 0", "weight 10")
    )
    assert control == joint < dense
    assert "reconstruction error" in done.stdout.partition("weight 10: ")[2].partition("\n")[0]


def test_ftwt_and_its_ratios_run_in_an_nni_script() -> None:
    program = [sys.executable, str(ROOT / "examples" / "nni_ftwt.py"), "--smoke"]

    done = subprocess.run(
        program, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )

    assert 0 == done.returncode, done.stderr[-2000:]
    difference = float(done.stdout.partition("ONNX: ")[2].partition("difference ")[2].split()[0])
    assert difference < 1e-4
    dense, core = (
        int(done.stdout.partition(f"{name}: ")[2].split()[0].replace(",", ""))
        for name in ("dense", "static core, without gates")
    )
    assert core < dense
    assert "filters vary with the image" in done.stdout
    low, _, high = done.stdout.partition("FTWTRatioPruner: layers lose ")[2].split()[:3]
    assert float(low) < float(high)


def test_firing_per_class_is_printed_and_drawn(tmp_path: Path) -> None:
    drawn = tmp_path / "firing.png"
    program = [sys.executable, str(ROOT / "examples" / "ftwt_firing.py"), "--smoke", "--out", str(drawn)]

    done = subprocess.run(
        program, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )

    assert 0 == done.returncode, done.stderr[-2000:]
    assert 19 == done.stdout.count(" never, "), "one line per gated layer"
    assert drawn.read_bytes().startswith(b"\x89PNG")


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


def run_in_folder(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a program of the examples in an empty folder, in a process of its own with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_nni_program_before_and_after_differs_in_the_package_name_only() -> None:
    before, after = (
        (ROOT / "examples" / "nni_migration" / f"{name}.py").read_text(encoding="utf-8").splitlines()
        for name in ("before", "after")
    )

    changed = [(old, new) for old, new in zip(before[1:], after[1:], strict=True) if old != new]

    assert [
        ("from nni.compression.pruning import L1NormPruner", "from nni_prune_ext.pruning import L1NormPruner"),
        ("from nni.compression.speedup import ModelSpeedup", "from nni_prune_ext.speedup import ModelSpeedup"),
    ] == changed


def test_the_nni_program_runs_after_the_change(tmp_path: Path) -> None:
    result = run_in_folder(tmp_path, str(ROOT / "examples" / "nni_migration" / "after.py"), "--smoke")

    assert 0 == result.returncode, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert ["dense", "masked", "sped up", "fine-tuned"] == [line["network"] for line in lines]
    assert lines[2]["params"] < 0.4 * lines[0]["params"]


def test_the_nni_program_still_fails_before_the_change(tmp_path: Path) -> None:
    result = run_in_folder(tmp_path, str(ROOT / "examples" / "nni_migration" / "before.py"), "--smoke")

    assert 0 != result.returncode, "NNI works again: the pages that say otherwise need a change"
    assert "'NoneType' object has no attribute 'startswith'" in result.stderr


def test_torch_pruning_takes_our_criterion(tmp_path: Path) -> None:
    result = run_in_folder(tmp_path, str(ROOT / "examples" / "torch_pruning_criterion.py"), "--smoke")

    assert 0 == result.returncode, result.stderr
    assert "exact" in result.stdout


def test_the_mask_search_is_shown_beside_its_controls(tmp_path: Path) -> None:
    result = run_in_folder(tmp_path, str(ROOT / "examples" / "jackpots.py"), "--smoke", "--controls")

    assert 0 == result.returncode, result.stderr
    rows = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if line.startswith("│")}
    searched = ["search", "magnitude", "random-start", "unrestricted"]
    assert ["dense", "dense-trained-longer", *searched] == list(rows)
    plans = [json.loads((tmp_path / "jackpots_output" / name / "plan.json").read_text()) for name in searched]
    assert 1 == len({tuple(sorted((root, len(gone)) for root, gone in plan["removed"].items())) for plan in plans})
    search, magnitude, random_start, _ = (json.dumps(plan["removed"], sort_keys=True) for plan in plans)
    assert 3 == len({search, magnitude, random_start}), "the same counts, but other channels"
    assert (tmp_path / "jackpots_output" / "search" / "model.onnx").is_file()


def test_single_weights_are_searched_as_well(tmp_path: Path) -> None:
    result = run_in_folder(tmp_path, str(ROOT / "examples" / "jackpots.py"), "--smoke", "--unstructured")

    assert 0 == result.returncode, result.stderr
    assert "resnet20 on digits, sparsity=0.9" in result.stdout
    assert (tmp_path / "jackpots_output" / "search" / "masks.safetensors").is_file()


def test_the_mask_search_runs_in_an_nni_script(tmp_path: Path) -> None:
    result = run_in_folder(tmp_path, str(ROOT / "examples" / "nni_jackpots.py"), "--smoke")

    assert 0 == result.returncode, result.stderr
    (searched,) = re.findall(r"^searched, tuned, removed: ([\d,]+) parameters, top-1 ([\d.]+)$", result.stdout, re.M)
    (written,) = re.findall(r"^ONNX: top-1 ([\d.]+), difference (\S+)$", result.stdout, re.M)
    (dense,) = re.findall(r"^dense: ([\d,]+) parameters", result.stdout, re.M)
    assert int(searched[0].replace(",", "")) < 0.3 * int(dense.replace(",", ""))
    assert float(searched[1]) == pytest.approx(float(written[0]), abs=0.004), "one image of 449 may lie on the edge"
    assert float(written[1]) < 1e-4
    assert ["ReplacePruner", "ShortRestrictionPruner"] == re.findall(r"^L1 under (\w+):", result.stdout, re.M)
