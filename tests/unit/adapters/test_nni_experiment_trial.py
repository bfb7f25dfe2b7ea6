"""A trial: from what NNI sampled to its final result, on a tiny network; NNI is a stand-in or away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nni_prune_ext.adapters import nni_experiment, nni_trial
from nni_prune_ext.adapters.nni_trial import TrialSettings, main, run_trial
from nni_prune_ext.errors import ConfigError, RecipeError, RuntimeUnavailableError, TrainingError, UnknownPluginError
from nni_prune_ext.recipes import load_recipe
from nni_prune_ext.report import Row
from nni_prune_ext.workbench import RunResult

RECIPE = """\
model: tiny_for_trial:build
data: {source: "tiny_for_trial:images", batch_size: 20}
method: l1
target: macs=0.6
training: {learning_rate: 0.02}
recovery: 2
control: false
measure: {rounds: 2, min_seconds: 0}
"""
MODULE = """
from torch import nn
from nni_prune_ext.data.sources import open_data


def build(num_classes=10, in_channels=1):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )


def images():
    return open_data("digits", limit=80)
"""
CHANNEL = """
import json, os
from nni.runtime.trial_command_channel import TrialCommandChannel


class Channel(TrialCommandChannel):
    def receive_parameter(self):
        return {"parameter_id": 0, "parameters": json.loads(os.environ["SAMPLED"])}

    def send_metric(self, type, parameter_id, trial_job_id, sequence, value):
        with open("sent.jsonl", "a") as file:
            file.write(json.dumps({"type": type, "value": value}) + "\\n")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder with a recipe and a module with a tiny network."""
    (tmp_path / "tiny_for_trial.py").write_text(MODULE)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("tiny_for_trial", None)


def trial(parameters, settings=TrialSettings(), *, overrides=(), report=lambda _: None) -> dict[str, float]:  # noqa: B008
    base = load_recipe(Path("recipe.yaml"), overrides)
    return run_trial(base, parameters, Path("trial"), settings, report=report)


def left() -> dict[str, object]:
    return json.loads(Path("trial/result.json").read_text())


def test_a_trial_reports_its_epochs_and_ends_with_numbers_only(folder) -> None:
    reports: list[float] = []

    result = trial({"method": {"_name": "l2"}, "target": "macs=0.5"}, report=reports.append)

    assert 2 == len(reports)
    assert result["default"] == result["metric"] == max(reports)
    assert 0.5 * result["dense_macs"] >= result["macs"] > 0
    assert 1 >= result["dense_metric"] >= 0
    assert all(isinstance(value, (int, float)) for value in result.values())
    assert result["latency_ms"] > 0


def test_a_trial_leaves_its_artefact_and_says_where(folder) -> None:
    trial({"method": "l2"})

    assert {"method": "l2"} == left()["parameters"]
    assert (Path(str(left()["artefact"])) / "model.onnx").is_file()
    assert "l2" == Path(str(left()["artefact"])).name


def test_a_cost_can_count_in_the_result(folder) -> None:
    result = trial({}, TrialSettings(cost="params", cost_weight=0.5))

    share = result["params"] / result["dense_params"]
    assert pytest.approx(result["metric"] - 0.5 * share) == result["default"]


def test_latency_is_measured_on_the_runtime_asked_for(folder) -> None:
    result = trial({}, TrialSettings(runtime="onnxruntime-cpu"), overrides=["measure=false"])

    assert min(result["latency_ms"], result["dense_latency_ms"]) > 0


def test_without_a_measurement_there_is_no_latency(folder) -> None:
    assert "latency_ms" not in trial({}, overrides=["measure=false"])


def test_a_trial_that_was_done_is_not_done_again(folder) -> None:
    first = trial({"method": "l2"})
    before = Path("trial/run/report.json").stat().st_mtime_ns

    again = trial({"method": "l2"})

    assert first == again
    assert before == Path("trial/run/report.json").stat().st_mtime_ns


def test_an_interrupted_trial_goes_on_with_the_epochs_that_are_left(folder) -> None:
    reports: list[float] = []

    def interrupt(value: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trial({"method": "l2"}, report=interrupt)
    trial({"method": "l2"}, report=reports.append)

    assert (1, 2) == (len(reports), len(left()["intermediate"]))


@pytest.mark.parametrize(
    ("parameters", "settings", "overrides", "error"),
    [
        ({"target": "macs=5"}, TrialSettings(), [], RecipeError),
        ({"method": {"_name": "l1", "steps": 0}}, TrialSettings(), [], ConfigError),
        ({}, TrialSettings(runtime="abacus"), [], UnknownPluginError),
        ({}, TrialSettings(runtime="onnxruntime-tensorrt"), [], RuntimeUnavailableError),
        ({}, TrialSettings(cost="latency_ms", cost_weight=1), ["measure=false"], ConfigError),
    ],
)
def test_a_trial_that_fails_leaves_the_reason(folder, parameters, settings, overrides, error) -> None:
    if settings.runtime == "onnxruntime-tensorrt" and nni_trial.runtime(settings.runtime).availability().usable:
        pytest.skip("TensorRT is usable here")

    with pytest.raises(error) as raised:
        trial(parameters, settings, overrides=overrides)

    assert str(raised.value) == left()["error"]


def test_a_metric_that_is_no_number_fails_the_trial(folder, monkeypatch) -> None:
    row = Row("l1", 1, 1, validation=float("nan"))
    monkeypatch.setattr(nni_trial, "execute", lambda *_, **__: RunResult(Path("trial/run"), (row, row)))

    with pytest.raises(TrainingError, match="validation metric of the trial is nan"):
        trial({})


def test_a_recipe_without_data_cannot_be_compared(folder) -> None:
    (folder / "recipe.yaml").write_text("{model: {name: 'tiny_for_trial:build', input_shape: '1,1,16,16'}}")

    with pytest.raises(ConfigError, match="no data"):
        trial({"method": "l1", "target": "macs=0.6"}, overrides=["method=l2", "target=macs=0.5"])


def test_a_trial_that_nni_starts_again_with_other_parameters_begins_anew(folder) -> None:
    def interrupt(value: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trial({"target": "macs=0.5"}, report=interrupt)
    reports: list[float] = []
    trial({"target": "macs=0.7"}, report=reports.append)

    assert 2 == len(reports)
    assert {"target": "macs=0.7"} == left()["parameters"]


def test_a_trial_goes_by_the_record_and_not_by_what_it_was_handed(monkeypatch) -> None:
    handed, own = {"target": "macs=0.5"}, {"target": "macs=0.7"}
    record = {"parameter_id": 4, "parameters": own}
    monkeypatch.setattr(nni_trial.nni, "get_next_parameter", lambda: handed)
    monkeypatch.setattr(nni_trial.nni.trial, "_params", {"parameter_id": 3, "parameters": handed})
    monkeypatch.setattr(nni_experiment.rest, "get", lambda port, question: {"hyperParameters": [json.dumps(record)]})
    monkeypatch.setenv("NNI_TRIAL_COMMAND_CHANNEL", "http://localhost:8080/env/local-env/A")

    assert own == nni_trial.sampled_parameters()
    assert 4 == nni_trial.nni.trial._params["parameter_id"]


def test_a_trial_far_from_the_manager_takes_what_it_is_handed(monkeypatch) -> None:
    monkeypatch.setattr(nni_trial.nni, "get_next_parameter", lambda: {"target": "macs=0.5"})
    monkeypatch.setattr(nni_experiment.rest, "get", lambda *_: pytest.fail("asked"))
    monkeypatch.setenv("NNI_TRIAL_COMMAND_CHANNEL", "http://10.0.0.1:8081/env/remote-1/A")

    assert {"target": "macs=0.5"} == nni_trial.sampled_parameters()


def test_without_nni_the_recipe_is_carried_out_as_it_stands(folder, monkeypatch, recwarn) -> None:
    sent = []
    monkeypatch.setattr(nni_trial.nni, "report_final_result", sent.append)

    code = main(["recipe.yaml", "--out", "mine"])

    assert 0 == code
    assert 0.6 * sent[0]["dense_macs"] >= sent[0]["macs"]
    assert (folder / "mine" / "run" / "l1" / "model.onnx").is_file()
    assert [] == [str(warning.message) for warning in recwarn if "without runtime" in str(warning.message)]


def test_bad_parameters_are_one_message_and_no_final_result(folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr(nni_trial.nni, "get_next_parameter", lambda: {"targets": "macs=0.5"})
    monkeypatch.setattr(nni_trial.nni, "report_final_result", lambda _: pytest.fail("reported"))

    code = main(["recipe.yaml"])

    assert 2 == code
    assert "error: trial: targets: there is no such key. Did you mean 'target'?" in capsys.readouterr().err


def test_a_trial_that_nni_stops_ends_without_a_traceback(folder, monkeypatch) -> None:
    monkeypatch.setattr(nni_trial, "run_trial", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))

    assert 130 == main(["recipe.yaml"])


def test_the_program_speaks_with_nni(folder) -> None:
    """NNI's own trial library runs, and its channel is a stand-in."""
    (folder / "channel.py").write_text(CHANNEL)
    environment = {
        **os.environ,
        "NNI_PLATFORM": "local",
        "NNI_TRIAL_COMMAND_CHANNEL": "import://channel.Channel",
        "NNI_OUTPUT_DIR": str(folder / "output"),
        "NNI_SYS_DIR": str(folder / "output"),
        "NNI_TRIAL_JOB_ID": "A",
        "SAMPLED": json.dumps({"method": {"_name": "fpgm"}, "target": "macs=0.7", "recovery.epochs": 1}),
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    (folder / "output").mkdir()

    done = subprocess.run(
        [sys.executable, "-m", "nni_prune_ext.adapters.nni_trial", "recipe.yaml"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip

    assert 0 == done.returncode, done.stderr
    sent = [json.loads(line) for line in (folder / "sent.jsonl").read_text().splitlines()]
    assert ["PERIODICAL", "FINAL"] == [one["type"] for one in sent]
    assert sent[0]["value"] == sent[1]["value"]["metric"]
    assert (folder / "output" / "run" / "fpgm" / "model.onnx").is_file()
