"""The example and the benchmark of the speedup run, in their small forms."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


@pytest.fixture(autouse=True)
def one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_taylor_with_agp_ends_in_a_smaller_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["nni_taylor_agp.py", "--smoke"])

    runpy.run_path(str(EXAMPLES / "nni_taylor_agp.py"), run_name="__main__")

    shown = capsys.readouterr().out
    sizes = [int(text.replace(",", "")) for text in re.findall(r"^\S+: ([\d,]+) parameters", shown, re.MULTILINE)]
    assert "Certificate: removed equals silenced" in shown
    assert sizes[1] == sizes[2] < 0.4 * sizes[0]


def test_a_cell_of_the_benchmark_has_all_ways_and_a_table(tmp_path: Path) -> None:
    benchmark = runpy.run_path(str(EXAMPLES / "benchmarks" / "nni_speedup.py"))
    rows = tmp_path / "rows.jsonl"

    benchmark["run_model"]("resnet18", ["l1"], rows)

    row = json.loads(rows.read_text())
    assert ("works", "works", "works") == (row["ours"], row["exact"], row["fx"])
    assert row["ours_params"] == row["fx_params"] < row["params"]
    assert 0.0 == row["ours_vs_fx"]
    assert row["ours_vs_simulation"] < 1e-5
    assert "| resnet18 | 1 | 1 | 1 | 1 | 1 | 1 | 0 | 1 |" in benchmark["table"]([row])
