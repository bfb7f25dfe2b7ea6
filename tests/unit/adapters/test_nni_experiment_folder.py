"""One folder holds a whole experiment: what is checked first, what trials get, and what going on later needs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nni_prune_ext.adapters import nni_experiment_folder as adapter
from nni_prune_ext.adapters.nni_experiment import Watched
from nni_prune_ext.errors import ConfigError, OutputError, RecipeError, RuntimeUnavailableError, TargetError
from nni_prune_ext.experiments import (
    ExperimentSettings,
    check_experiment,
    read_experiment,
    run_trials,
    search_space_for,
)
from nni_prune_ext.recipes import load_recipe, recipe_from
from nni_prune_ext.runtimes.onnxruntime_tensorrt import OnnxRuntimeTensorRT
from nni_prune_ext.training import Watcher

MODULE = """
from torch import nn
from nni_prune_ext.data.sources import open_data


def build(num_classes=10, in_channels=1):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )


def images():
    return open_data("digits", limit=40)
"""
SPACE = search_space_for(["l1", "l2"], ["macs=0.5", "macs=0.7"])
SETTINGS = ExperimentSettings(port=0)


def job(name: str, default: float) -> SimpleNamespace:
    return SimpleNamespace(
        trialJobId=name, status="SUCCEEDED", startTime=1, endTime=2, sequenceId=0,
        hyperParameters=[SimpleNamespace(parameters={"method": {"_name": "l1"}})],
        finalMetricData=[SimpleNamespace(data={"default": default})],
    )  # fmt: skip


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe that trains a tiny network; the current folder holds its module."""
    (tmp_path / "tiny_for_experiment.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield recipe_with(train={"epochs": 1})
    sys.modules.pop("tiny_for_experiment", None)


def recipe_with(**more):
    values = {"model": "tiny_for_experiment:build", "data": "tiny_for_experiment:images", "method": "l1",
              "target": "macs=0.6", "measure": False}  # fmt: skip
    return recipe_from({**values, **more})


@pytest.fixture
def nni(monkeypatch):
    """Stands in for NNI: notes how it was called, has two trials on record, and lets one succeed."""
    calls = []
    seen = Watched(True, (job("A", 0.9),), {})

    def run(config, place, *, tell, started):
        (place.folder / place.identity / "db").mkdir(parents=True)
        with contextlib.closing(sqlite3.connect(place.database)) as database, database:
            database.execute("CREATE TABLE TrialJobEvent (trialJobId TEXT, event TEXT)")
            rows = [(name, event) for name in "AB" for event in ("WAITING", "RUNNING")]
            database.executemany("INSERT INTO TrialJobEvent VALUES (?, ?)", rows)
        started(12345)
        calls.append(("run", config, place))
        return seen

    def resume(place, **more):
        calls.append(("resume", place, more))
        more["started"](23456)
        return seen

    monkeypatch.setattr(adapter, "run_experiment", run)
    monkeypatch.setattr(adapter, "resume_experiment", resume)
    return calls


def test_the_dense_network_is_trained_once_for_all_trials(recipe, nni, tmp_path) -> None:
    result = run_trials(recipe, SPACE, tmp_path / "out", SETTINGS)

    trials = load_recipe(tmp_path / "out" / "code" / "recipe.yaml", complete=False)
    assert (None, False) == (trials.train, trials.control)
    assert (tmp_path / "out" / "code" / "dense.safetensors") == trials.model.weights
    assert trials.model.weights.read_bytes() == (tmp_path / "out/dense/dense/model.safetensors").read_bytes()
    assert ("A", True) == (result.best.id, result.done)


def test_the_results_can_be_read_again_without_nni(recipe, nni, tmp_path) -> None:
    result = run_trials(recipe, SPACE, tmp_path / "out", SETTINGS)

    again = read_experiment(tmp_path / "out")
    assert (result.trials, result.identity, True) == (again.trials, again.identity, again.done)


def test_local_trials_run_where_the_user_is(recipe, nni, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(adapter, "_cores", lambda: 8)

    asked = ExperimentSettings(
        port=0, trials=3, concurrency=4, runtime="onnxruntime-cpu", cost="params", cost_weight=0.2
    )
    run_trials(recipe, SPACE, tmp_path / "out", asked)

    _, config, _ = nni[0]
    words = config.trial_command.split()
    assert str(tmp_path) == str(config.trial_code_directory)
    assert ["--runtime", "onnxruntime-cpu", "--cost", "params", "--cost-weight", "0.2", "--threads", "2"] == words[-8:]
    assert (3, 4) == (config.max_trial_number, config.trial_concurrency)


def test_other_machines_get_a_folder_that_needs_nothing_else(recipe, nni, tmp_path) -> None:
    file = tmp_path / "remote.yaml"
    (tmp_path / "key").touch()
    file.write_text(
        "trialConcurrency: 5\nnniManagerIp: 10.0.0.1\n"
        "trainingService:\n  platform: remote\n  machineList:\n    - {host: 10.0.0.2, user: me, sshKeyFile: key}\n"
    )

    run_trials(recipe, SPACE, tmp_path / "out", ExperimentSettings(port=0, config=file))

    _, config, _ = nni[0]
    code = tmp_path / "out" / "code"
    assert (str(code), "recipe.yaml") == (str(config.trial_code_directory), config.trial_command.split()[3])
    assert "weights: dense.safetensors" in (code / "recipe.yaml").read_text()
    assert (code / "dense.safetensors").is_file()


def test_resuming_goes_on_with_what_nni_has(recipe, nni, tmp_path) -> None:
    first = run_trials(recipe, SPACE, tmp_path / "out", SETTINGS)

    again = run_trials(recipe, SPACE, tmp_path / "out", ExperimentSettings(port=0, trials=20), resume=True)

    kind, place, more = nni[1]
    assert ("resume", first.identity, 12345, 20) == (kind, place.identity, more["earlier_port"], more["trials"])
    assert first.identity == again.identity
    assert 23456 == json.loads((tmp_path / "out" / "experiment.json").read_text())["port"]


def test_an_experiment_that_nni_never_saw_is_begun_when_resumed_and_that_is_said(recipe, nni, tmp_path) -> None:
    (tmp_path / "out" / "dense").mkdir(parents=True)
    told: list[str] = []
    watcher = Watcher()
    watcher.note = told.append

    run_trials(recipe, SPACE, tmp_path / "out", SETTINGS, resume=True, watcher=watcher)

    assert ["run"] == [call[0] for call in nni]
    assert "NNI has nothing of an experiment" in told[0]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("recipe", r"train\.epochs was 1, and now is 2"),
        ("space", r"target\._value\[1\] was \"macs=0\.7\", and now is \"macs=0\.9\""),
    ],
)
def test_another_experiment_is_not_resumed_and_the_first_difference_is_shown(recipe, nni, tmp_path, what, says) -> None:
    run_trials(recipe, SPACE, tmp_path / "out", SETTINGS)
    other = recipe_with(train={"epochs": 2}) if what == "recipe" else recipe
    space = search_space_for(["l1", "l2"], ["macs=0.5", "macs=0.9"]) if what == "space" else SPACE

    with pytest.raises(ConfigError, match=f"The {what} is not that of the experiment.*{says}"):
        run_trials(other, space, tmp_path / "out", SETTINGS, resume=True)


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 1}, "c": 2}, ("c", "absent", "2")),
        ({"a": 1, "c": None}, {"a": 1}, ("c", "null", "absent")),
        ({"a": [1, 2]}, {"a": [1]}, ("a", "[1, 2]", "[1]")),
        (None, {"a": 1}, ("", "null", '{"a": 1}')),
    ],
)
def test_the_first_difference_names_its_key_and_both_values(old, new, difference) -> None:
    assert difference == adapter.first_difference(old, new)


def test_fewer_trials_than_there_are_already_are_refused_when_resuming(recipe, nni, tmp_path) -> None:
    run_trials(recipe, SPACE, tmp_path / "out", SETTINGS)

    with pytest.raises(ConfigError, match="trials is 1, but the experiment in .* has 2 already"):
        run_trials(recipe, SPACE, tmp_path / "out", ExperimentSettings(port=0, trials=1), resume=True)
    run_trials(recipe, SPACE, tmp_path / "out", ExperimentSettings(port=0, trials=2), resume=True)

    assert ["run", "resume"] == [call[0] for call in nni]


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_an_experiment_is_not_resumed(recipe, nni, tmp_path, exists) -> None:
    out = tmp_path / "out"
    if exists:
        out.mkdir()

    with pytest.raises(OutputError, match="There is nothing to resume in .*out.*without --resume"):
        run_trials(recipe, SPACE, out, SETTINGS, resume=True)
    assert [] == nni
    assert exists == out.exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tuner": "TPF"}, "NNI has no tuner 'TPF', expected one of .*Random.* Did you mean 'TPE'"),
        ({"tuner": "Batch"}, "NNI's tuner 'Batch' cannot be used here"),
        ({"config": "maxTrialNumber: abc\n"}, "trainingService is missing"),
        (
            {"config": "maxTrialNumber: abc\ntrainingService: {platform: local}\n"},
            "maxTrialNumber is 'abc', expected int",
        ),
    ],
)
def test_what_nni_would_not_take_is_refused_before_any_work(recipe, nni, tmp_path, settings, says) -> None:
    if "config" in settings:
        (tmp_path / "config.yml").write_text(settings["config"])
        settings = {"config": tmp_path / "config.yml"}
    asked = ExperimentSettings(port=0, **settings)

    with pytest.raises(ConfigError, match=says):
        check_experiment(recipe, SPACE, asked)
    with pytest.raises(ConfigError, match=says):
        run_trials(recipe, SPACE, tmp_path / "out", asked)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals of Unix")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_other_signals_that_end_a_program_are_like_ctrl_c(recipe, monkeypatch, tmp_path, name) -> None:
    before = signal.signal(getattr(signal, name), signal.SIG_DFL)  # under nohup the tests would ignore one of them

    def run(*_, **__) -> None:
        os.kill(os.getpid(), getattr(signal, name))
        pytest.fail("not interrupted")

    monkeypatch.setattr(adapter, "run_experiment", run)

    try:
        with pytest.raises(KeyboardInterrupt):
            run_trials(recipe_with(), SPACE, tmp_path / "out", SETTINGS)
        assert signal.SIG_DFL == signal.getsignal(getattr(signal, name))
    finally:
        signal.signal(getattr(signal, name), before)


def test_a_folder_with_something_in_it_is_refused(recipe, nni, tmp_path) -> None:
    run_trials(recipe, SPACE, tmp_path / "out", SETTINGS)

    with pytest.raises(OutputError, match="holds an experiment: go on with --resume"):
        run_trials(recipe, SPACE, tmp_path / "out", SETTINGS)
    with pytest.raises(OutputError, match="holds no experiment"):
        run_trials(recipe, SPACE, tmp_path, SETTINGS, resume=True)
    with pytest.raises(OutputError, match="holds no results"):
        read_experiment(tmp_path)


@pytest.mark.parametrize(
    ("values", "space", "settings", "error", "says"),
    [
        ({"data": None, "model": "resnet20"}, SPACE, {}, ConfigError, "has no data"),
        ({}, SPACE, {"trials": 0}, ConfigError, "trials is 0"),
        ({}, SPACE, {"cost": "latency_ms", "cost_weight": 1.0}, ConfigError, "is not measured"),
        ({}, {"target": {"_type": "choice", "_value": ["macs=0.0001"]}}, {}, TargetError, "cannot be met"),
        ({}, {"targets": {"_type": "choice", "_value": [1]}}, {}, RecipeError, "Did you mean 'target'"),
    ],
)
def test_what_would_fail_later_is_refused_first(recipe, tmp_path, values, space, settings, error, says) -> None:
    with pytest.raises(error, match=says):
        check_experiment(recipe_with(**values), space, ExperimentSettings(**settings))
    assert {"tiny_for_experiment.py", "__pycache__"} >= {path.name for path in tmp_path.iterdir()}


def test_a_runtime_that_is_not_usable_is_refused_first(recipe, monkeypatch) -> None:
    monkeypatch.setattr(
        OnnxRuntimeTensorRT, "availability", lambda _: SimpleNamespace(usable=False, reason="no such library")
    )

    with pytest.raises(RuntimeUnavailableError, match="no such library"):
        check_experiment(recipe, SPACE, ExperimentSettings(runtime="onnxruntime-tensorrt"))


def test_a_folder_with_a_damaged_note_is_refused(recipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "experiment.json").write_text("{")

    with pytest.raises(OutputError, match=r"experiment\.json.*Expected JSON"):
        run_trials(recipe, SPACE, tmp_path / "out", SETTINGS, resume=True)
