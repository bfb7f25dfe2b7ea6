"""The whole diagnosis: on this machine's CPU, from recorded profiles, and refused where nothing can be said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from made_networks import chain, conv, profile, saved

import nni_prune_ext as npe
from nni_prune_ext.doctor.advice import Trials
from nni_prune_ext.doctor.layer_times import Time
from nni_prune_ext.doctor.network import Network
from nni_prune_ext.errors import ConfigError, ModelError, RuntimeUnavailableError
from nni_prune_ext.runtimes.base import Availability
from nni_prune_ext.runtimes.onnxruntime_cpu import OnnxRuntimeCpu

INPUTS = [[np.zeros((1, 3, 8, 8), np.float32)]]
FC = ("fc/Gemm", "Gemm", 0.01, 0)


def pair(folder: Path, widths: Sequence[int], **options) -> tuple[Path, Path]:
    return chain(folder / "dense.onnx", [32, 64, 64]), chain(folder / "pruned.onnx", widths, **options)


def quick(dense: Path, pruned: Path, **options) -> npe.Diagnosis:
    return npe.diagnose(dense, pruned, INPUTS, rounds=20, min_seconds=0.0, **options)


def test_layers_out_of_the_blocked_layout_are_seen_in_a_real_profile(tmp_path: Path) -> None:
    found = quick(*pair(tmp_path, [17, 33, 5]), multiple=0)

    rows = {row.name: row for row in found.layers}
    if not rows["conv1"].before.blocked:
        pytest.skip("this CPU has no blocked layout")
    assert [True, False, False] == [rows[name].after.blocked for name in ("conv0", "conv1", "conv2")]
    assert (17, 33) == (rows["conv1"].after.layer.in_channels, rows["conv1"].after.layer.out_channels)
    assert 64 * (3 * 17 + 17 * 33 + 33 * 5) == sum(rows[f"conv{index}"].after.layer.macs for index in range(3))
    assert {"ReorderOutput"} <= {row.op for row in found.others}
    assert 20 == found.num_runs
    assert 0 < found.floor_ms < 1
    assert ["dense", "pruned"] == [row.name for row in found.latency.rows]
    assert pytest.approx(1.0) == sum(row.share for row in found.layers) + sum(
        row.after.ms / found.after.ms for row in found.others
    )


def test_the_same_widths_as_multiples_stay_in_the_layout(tmp_path: Path) -> None:
    found = quick(*pair(tmp_path, [16, 32, 16]), multiple=0)

    assert [row.before.blocked for row in found.layers] == [row.after.blocked for row in found.layers]
    assert not {"layout", "padding"} & {finding.kind for finding in found.findings}


def test_a_batch_norm_that_stays_is_a_row_of_its_own(tmp_path: Path) -> None:
    found = quick(*pair(tmp_path, [16, 32, 16], norm_after_relu=True), multiple=0)

    norm = next(row for row in found.others if row.op == "BatchNormalization")
    assert (0, 1) == (norm.count_before, norm.count_after)


def test_advice_comes_with_the_diagnosis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trials, "gains", lambda _, pruned, candidates: dict.fromkeys(candidates, Time(0.5, 0.1)))

    found = quick(*pair(tmp_path, [17, 33, 5]))

    assert 1 == len(found.advice), "one change gains as much as all"
    assert found.limits is not None
    assert json.loads(json.dumps(found.to_dict()))["advice"][0]["gain"] == {"ms": 0.5, "error_ms": 0.1}
    assert found.advice[0].sentence in found.sentences()


def test_a_real_trial_times_the_changed_networks(tmp_path: Path) -> None:
    _, pruned = pair(tmp_path, [17, 33, 5])
    network = Network.load(pruned, [(1, 3, 8, 8)])
    trials = Trials(OnnxRuntimeCpu(), INPUTS, 3, 0.0, 1, 0)

    gains = trials.gains(pruned, {f"n{index}": network.model for index in range(9)})

    assert [f"n{index}" for index in range(9)] == list(gains)
    assert len({gain.error_ms for gain in gains.values()}) == 1, "the largest error bar of all batches"


def test_recorded_profiles_say_the_same_without_timing_anything(tmp_path: Path) -> None:
    dense, pruned = pair(tmp_path, [17, 33, 5])
    before = saved(tmp_path / "a.json", profile([conv(0, 0.2), conv(1, 1.0), conv(2, 2.0), FC]))
    after = saved(
        tmp_path / "b.json", profile([conv(0, 0.15), conv(1, 0.9, blocked=False), conv(2, 1.5, blocked=False), FC])
    )

    found = npe.diagnose_recorded(dense, pruned, (before, after), [(1, 3, 8, 8)])

    assert ["layout"] == [finding.kind for finding in found.findings]
    assert (3.21, 2.56) == (pytest.approx(found.before.ms), pytest.approx(found.after.ms))
    assert found.latency is None
    assert found.sentences()[0].startswith("2.560 ms in nodes, 3.210 ms before the cut, for 0.1")
    with pytest.raises(ModelError, match="does not belong"):
        npe.diagnose_recorded(dense, pruned, (before, saved(tmp_path / "c.json", profile([("x", "Conv", 1.0, 0)]))),
                              [(1, 3, 8, 8)])  # fmt: skip


def test_nothing_found_is_said(tmp_path: Path) -> None:
    dense, pruned = pair(tmp_path, [32, 64, 64])
    same = saved(tmp_path / "a.json", profile([conv(0, 0.2), conv(1, 1.0), conv(2, 2.0), FC]))

    found = npe.diagnose_recorded(dense, pruned, (same, same), [(1, 3, 8, 8)])

    assert "Nothing was found above the error bar that keeps it from being faster." == found.sentences()[1]


def test_what_cannot_be_measured_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, pruned = pair(tmp_path, [16, 32, 16])

    with pytest.raises(ConfigError, match="Nothing can be said from 5 rounds"):
        npe.diagnose(dense, pruned, INPUTS, rounds=5)
    with pytest.raises(ConfigError, match="torch-eager does not say how long each node takes"):
        quick(dense, pruned, on="torch-eager")
    with pytest.raises(ModelError, match="Swap them"):
        quick(pruned, dense)
    monkeypatch.setattr(OnnxRuntimeCpu, "availability", lambda self: Availability(False, "It is not installed."))
    with pytest.raises(RuntimeUnavailableError, match="It is not installed"):
        quick(dense, pruned)
