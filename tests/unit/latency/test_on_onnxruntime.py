"""The whole way on a real runtime: structure only, for times are not the same twice."""

from __future__ import annotations

import json
from pathlib import Path

from nni_prune_ext.latency import LatencyConditions, stopwatch
from nni_prune_ext.pipeline import prune


def test_a_latency_is_aimed_at_and_measured(network, images, groups, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NNI_PRUNE_EXT_CACHE", str(tmp_path))
    monkeypatch.setattr(stopwatch, "_SECONDS", 0.0)
    monkeypatch.setattr(stopwatch, "_REPEATS", 1)
    export = stopwatch.export_onnx
    quickly = {"exporter": "torchscript"}  # the other one takes seconds
    monkeypatch.setattr(stopwatch, "export_onnx", lambda *args, **options: export(*args, **{**options, **quickly}))
    conditions = LatencyConditions(batch=2, clock="cpu")

    result = prune(network, images, target=["latency=0.999", "macs=0.8"], groups=groups, latency=conditions)

    found = result.latency
    assert ["latency", "macs"] == [achieved.target.metric for achieved in result.achieved]
    assert result.achieved[1].met
    assert (found.achieved_ms, found.dense_ms) == (result.achieved[0].achieved, result.achieved[0].dense)
    assert ("cpu", conditions) == (found.clock, found.conditions)
    assert found.achieved_ms > 0
    assert {1, 2, 4, 8} == set(found.probe)
    assert ["cut halfway to the limits", "cut to the limits"] == [one.network for one in found.networks][:2]
    assert found.networks[0].predicted_ms is None
    assert found.environment["onnx"]
    [file] = (tmp_path / "latency").iterdir()
    kept = json.loads(file.read_text())
    assert (2, found.layers_measured) == (kept["where"]["batch"], len(kept["ms"]))
    assert conditions.model_dump() == json.loads(json.dumps(found.to_dict()))["conditions"]
