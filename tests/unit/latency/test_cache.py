"""Measured times are kept per machine and conditions; a damaged file costs time, never the run."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from nni_prune_ext.latency import cache
from nni_prune_ext.latency.cache import LatencyCache, cache_folder
from nni_prune_ext.latency.conditions import LatencyConditions
from nni_prune_ext.latency.layers import Layer
from nni_prune_ext.latency.stopwatch import Stopwatch, batch_of

LAYER = Layer(weight="w", size=(2, 2), kernel=(1, 1), stride=(1, 1), dilation=(1, 1), padding=(0,) * 4)


@pytest.fixture
def stopwatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stopwatch that says 1.5 ms for every layer, and notes what it timed."""
    timed: list[str] = []

    def made(**conditions: object) -> Stopwatch:
        own = Stopwatch(
            nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 1, 1), LatencyConditions(**conditions), cache_folder=tmp_path
        )
        monkeypatch.setattr(own, "_timed_layers", lambda layers: timed.extend(layers) or dict.fromkeys(layers, 1.5))
        return own

    made.timed = timed
    return made


def test_a_second_run_takes_times_from_the_cache(stopwatch) -> None:
    first, second = stopwatch(), stopwatch()

    assert {(LAYER, 4, 8): 1.5, (LAYER, 8, 4): 1.5} == first.layers_ms([(LAYER, 4, 8), (LAYER, 8, 4)])
    assert {(LAYER, 4, 8): 1.5} == second.layers_ms([(LAYER, 4, 8)])
    assert (2, 0, 0, 1) == (first.measured, first.from_cache, second.measured, second.from_cache)
    assert 2 == len(stopwatch.timed)


def test_equal_work_is_timed_once(stopwatch) -> None:
    twin = LAYER.model_copy(update={"weight": "other"})

    stopwatch().layers_ms([(LAYER, 4, 8), (twin, 4, 8)])

    assert 1 == len(stopwatch.timed)


@pytest.mark.parametrize("other", [{"batch": 2}, {"threads": 2}, {"clock": "wall"}, {"runtime": "torch-eager"}])
def test_other_conditions_are_timed_anew(other, stopwatch) -> None:
    stopwatch().layers_ms([(LAYER, 4, 8)])
    stopwatch(**other).layers_ms([(LAYER, 4, 8)])

    assert 2 == len(stopwatch.timed)


def test_another_machine_or_version_has_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = LatencyCache(LatencyConditions(), "cpu", tmp_path)
    known = cache.environment()
    others = []
    for name in ("cpu", "onnxruntime-gpu", "torch", "gpu"):
        monkeypatch.setattr(cache, "environment", lambda name=name: {**known, name: "another"})
        others.append(LatencyCache(LatencyConditions(), "cpu", tmp_path).path)

    assert 5 == len({here.path, *others})


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": 1}', '{"format": 2, "where": {}, "ms": {}}', None, "negative", "text"]
)
def test_a_damaged_file_is_measured_anew_and_replaced(content, stopwatch, tmp_path: Path, caplog) -> None:
    first = stopwatch()
    first.layers_ms([(LAYER, 4, 8)])
    [path] = (tmp_path / "latency").iterdir()
    whole = json.loads(path.read_text())
    [key] = whole["ms"]
    spoilt = {None: {**whole, "where": {}}, "negative": {**whole, "ms": {key: -1}}, "text": {**whole, "ms": {key: "1"}}}
    path.write_text(json.dumps(spoilt[content]) if content in spoilt else content)

    with caplog.at_level(logging.WARNING):
        stopwatch().layers_ms([(LAYER, 4, 8)])

    assert 2 == len(stopwatch.timed)
    assert "measured anew" in caplog.text
    assert whole == json.loads(path.read_text())


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog) -> None:
    (tmp_path / "latency").write_text("a file in the way")

    with caplog.at_level(logging.WARNING):
        LatencyCache(LatencyConditions(), "cpu", tmp_path).add({"conv": 1.0})

    assert "cannot be kept" in caplog.text


def test_times_of_two_runs_come_together(tmp_path: Path) -> None:
    first, second = (LatencyCache(LatencyConditions(), "cpu", tmp_path) for _ in range(2))

    first.add({"a": 1.0})
    second.add({"b": 2.0})

    assert {"a": 1.0, "b": 2.0} == first.read()
    assert not [path for path in (tmp_path / "latency").iterdir() if path.suffix == ".tmp"]


def test_the_folder_is_the_users_or_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NNI_PRUNE_EXT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tmp_path / "nni_prune_ext" == cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert Path.home() / ".cache" / "nni_prune_ext" == cache_folder()
    monkeypatch.setenv("NNI_PRUNE_EXT_CACHE", str(tmp_path / "own"))
    assert tmp_path / "own" == cache_folder()


def test_the_how_to_names_the_folder_and_both_variables_and_a_deleted_folder_is_measured_anew(
    monkeypatch: pytest.MonkeyPatch, stopwatch, tmp_path: Path
) -> None:
    for variable in ("NNI_PRUNE_EXT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    folder = LatencyCache(LatencyConditions(), "cpu").path.parent.relative_to(Path.home())
    text = (Path(__file__).parents[3] / "docs" / "how-to" / "choose_a_target.md").read_text(encoding="utf-8")

    assert all(words in text for words in (f"rm -r ~/{folder}`", f"`${cache.FOLDER_VARIABLE}`", "`$XDG_CACHE_HOME`"))
    stopwatch().layers_ms([(LAYER, 4, 8)])
    shutil.rmtree(tmp_path / folder.name)
    stopwatch().layers_ms([(LAYER, 4, 8)])
    assert 2 == len(stopwatch.timed)


def test_inputs_are_cut_or_repeated_to_the_batch() -> None:
    x = torch.arange(6.0).reshape(2, 3)

    assert x is batch_of(x, 2)
    assert [[0.0, 1.0, 2.0]] == batch_of(x, 1).tolist()
    assert (5, 3) == tuple(batch_of((x, {"scale": torch.tensor(2.0)}), 5)[0].shape)
