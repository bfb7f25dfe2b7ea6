"""The benchmark scripts about latency: what they write, and what their accuracy and tables are of."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from nni_prune_ext.runtimes.base import Availability

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("macs_and_latency"), importlib.import_module("latency_targets")


class Runtime:
    """One whose library is missing until it is there."""

    there = False

    def availability(self) -> Availability:
        return Availability(self.there, "there is no driver")


def test_a_missing_runtime_is_a_row_with_the_reason_once_and_is_tried_again(scripts, tmp_path, monkeypatch, capsys):
    macs, _ = scripts
    used, measured = Runtime(), []
    monkeypatch.setattr(macs, "runtime", lambda name: used)
    monkeypatch.setattr(macs, "measure", lambda name, todo, options: measured.append((name, todo)))
    out = tmp_path / "out.jsonl"
    asked = ["macs_and_latency.py", str(out), "--network", "resnet50", "--on", "onnxruntime-cuda", "--batch", "8"]
    monkeypatch.setattr("sys.argv", asked)
    macs.main()
    macs.main()

    (row,) = macs.rows(out)
    assert ("resnet50", "onnxruntime-cuda", 8, "fp32") == macs.key(row)
    assert "there is no driver" == row["not_measured"]
    assert "not measured: there is no driver" in capsys.readouterr().out
    assert not measured
    used.there = True
    macs.main()
    assert [("resnet50", [("onnxruntime-cuda", 8, "fp32")])] == measured


def test_a_measured_row_takes_the_place_of_the_reason_and_of_no_other_row(scripts, tmp_path):
    macs, _ = scripts
    out = tmp_path / "out.jsonl"
    mine, other = macs.of("resnet50", "cuda", 8, "fp32"), macs.of("resnet50", "cuda", 32, "fp32")
    for row in ({**mine, "not_measured": "why"}, {**other, "cells": {}}, {**mine, "cells": {"dense": {}}}):
        macs.put(out, row)

    assert [{**other, "cells": {}}, {**mine, "cells": {"dense": {}}}] == macs.rows(out)


def test_every_image_is_judged_after_the_norms_have_seen_the_other_half_only(scripts, monkeypatch):
    macs, _ = scripts
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(1)).eval()
    images = torch.arange(10.0).reshape(10, 1, 1, 1)
    seen, judged = [], []
    monkeypatch.setattr(macs, "recalibrate_batchnorm", lambda own, batches: seen.append(torch.cat(list(batches))))

    def accuracy(own, batches):
        judged.append(torch.cat([labels for _, labels in batches]))
        return 0.25 if len(judged) == 1 else 0.75

    monkeypatch.setattr(macs.npe, "accuracy", accuracy)

    assert {"top1": 0.5} == macs.accuracy(model, images, as_it_is=False)
    assert [set(range(0, 10, 2)), set(range(1, 10, 2))] == [set(part.tolist()) for part in judged]
    for part, others in zip(judged, seen, strict=True):
        assert set(range(10)) - set(part.tolist()) == set(others.flatten().int().tolist())
    seen.clear()
    macs.accuracy(model, images, as_it_is=True)
    assert not seen


def test_the_table_of_latency_targets_counts_the_runs_within_three_percent_on_either_side(scripts):
    _, targets = scripts
    row = {"network": "resnet50", "runtime": "cpu", "batch": 1, "target": "latency=0.5", "macs_ratio": 0.5,
           "error_bar": 0.01, "seconds": 60}  # fmt: skip

    table = targets.table([{**row, "latency_ratio": share} for share in (0.484, 0.486, 0.51, 0.516)])

    assert "| resnet50 | cpu, batch 1 | 0.5 | 4 | 2 | 0.498 (0.484 to 0.516) | 0.500 | 1.0 % | 60 |" in table


@pytest.mark.parametrize("name", ["latency_targets", "macs_and_latency"])
def test_committed_rows_are_of_one_run_each_and_say_where_they_were_measured(scripts, name):
    lines = (FOLDER / "results" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    keys = ("network", "target", "run", "runtime", "batch", "precision")

    assert len({tuple(row.get(key) for key in keys) for row in found}) == len(found)
    assert all(row["environment"]["cpu"] and row["environment"]["onnxruntime-gpu"] for row in found)
