"""`doctor` as a user meets it: the table, advice as a file that the next plan takes, and its answers to mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner, Result

from nni_prune_ext.allocation import Limits
from nni_prune_ext.cli import app
from nni_prune_ext.cli.doctor import doctor
from nni_prune_ext.doctor.advice import Trials
from nni_prune_ext.doctor.layer_times import Time
from nni_prune_ext.errors import ArtefactError, ConfigError, ModelError, NniPruneExtError, OutputError
from nni_prune_ext.export.manifest import write_manifest
from nni_prune_ext.export.onnx_static import export_onnx
from nni_prune_ext.runtimes.base import RunnableModel
from nni_prune_ext.runtimes.onnxruntime_cpu import OnnxRuntimeCpu

APP = typer.Typer()
APP.command()(doctor)
QUICK = ["--rounds", "20", "--seconds", "0"]


def net(*widths: int) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in zip((3, *widths), widths):
        layers += [nn.Conv2d(before, after, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def written(model: nn.Module, path: Path) -> None:
    export_onnx(model, torch.zeros(1, 3, 8, 8), path, exporter="torchscript", check=False)


def artefact_folder(model: nn.Module, folder: Path) -> None:
    folder.mkdir()
    written(model, folder / "model.onnx")
    write_manifest(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    artefact_folder(net(32, 64, 64), folder / "dense")
    artefact_folder(net(17, 33, 5), folder / "pruned")
    written(net(17, 33, 5), folder / "pruned.onnx")
    written(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), folder / "other.onnx")
    (folder / "text.onnx").write_text("not an ONNX file")
    (folder / "advice.json").write_text('{"multiple": 16}')
    return folder


@pytest.fixture
def same_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every change gains 0.5 ms, and the clock is not asked."""
    monkeypatch.setattr(Trials, "gains", lambda _, pruned, candidates: dict.fromkeys(candidates, Time(0.5, 0.1)))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(APP, [str(argument) for argument in arguments], catch_exceptions=False)


def recorded(path: Path, onnx: Path, runs: int = 4) -> Path:
    with OnnxRuntimeCpu().profiled(RunnableModel(onnx_path=onnx)) as session:
        for _ in range(runs):
            session.run([np.zeros((1, 3, 8, 8), np.float32)])
        path.write_text(json.dumps(session.end()))
    return path


@pytest.mark.usefixtures("same_gains")
def test_layers_findings_and_advice_are_shown_and_the_advice_is_a_file_of_limits(place: Path, tmp_path: Path) -> None:
    found = run(place / "dense", place / "pruned", *QUICK, "--out", tmp_path / "new" / "advice.json")

    assert 0 == found.exit_code
    for text in ("conv 1×1", "17 → 33", "64 → 64", "of the time for 0.1", "differs from itself", "linear"):
        assert text in found.stdout
    assert "Round '0' up from 17 to 32 channels: −0.500 ms alone" in found.stdout
    limits = Limits.model_validate_json((tmp_path / "new" / "advice.json").read_text())
    assert 16 == limits.layers["0"].multiple
    assert f"advice written to {tmp_path / 'new' / 'advice.json'}" in found.stdout


def test_the_advice_is_taken_by_the_next_plan(tmp_path: Path) -> None:
    advice = tmp_path / "advice.json"
    advice.write_text('{"layers": {"layer1.0.conv1": {"max_ratio": 0.9, "multiple": 8}}}')
    words = ["plan", "resnet20", "--target", "ratio=0.3", "--scope", "local", "--json", "--limits", str(advice)]

    plan = CliRunner().invoke(app, words, catch_exceptions=False)

    removed = {group["root"]: group["removed"] for group in json.loads(plan.stdout)["groups"]}
    assert 0 == removed["layer1.0.conv1"] % 8
    assert 0 != removed["layer1.1.conv1"] % 8


def test_json_holds_every_layer_and_no_advice_where_none_was_asked_for(place: Path, tmp_path: Path) -> None:
    found = run(
        place / "dense", place / "pruned.onnx", *QUICK, "--multiple", "0", "--json", "--out", tmp_path / "a.json"
    )

    facts = json.loads(found.stdout)
    assert ["0", "2", "4", "8"] == [row["layer"] for row in facts["layers"]]
    assert (17, 33) == (facts["layers"][1]["after"]["in_channels"], facts["layers"][1]["after"]["out_channels"])
    assert ([], None, 20) == (facts["advice"], facts["limits"], facts["runs"])
    assert "none was asked for, with the multiple 0" == facts["no_advice"]
    assert {"layers": {}, "no_advice": facts["no_advice"]} == json.loads((tmp_path / "a.json").read_text())
    assert f"no advice: none was asked for, with the multiple 0; so says {tmp_path / 'a.json'}" in found.stderr


def test_the_file_of_a_doctor_without_advice_limits_nothing_with_a_warning(tmp_path: Path) -> None:
    advice = tmp_path / "advice.json"
    advice.write_text('{"layers": {}, "no_advice": "no rounding gained anything"}')
    words = ["plan", "resnet20", "--target", "ratio=0.3", "--json"]

    free = CliRunner().invoke(app, words, catch_exceptions=False)
    plan = CliRunner().invoke(app, [*words, "--limits", str(advice)], catch_exceptions=False)

    assert (0, free.stdout) == (plan.exit_code, plan.stdout)
    assert "advice.json' limits nothing, the doctor had no advice: no rounding gained anything" in plan.stderr
    assert "" == free.stderr


def test_recorded_profiles_are_read_and_those_of_another_file_refused(place: Path, tmp_path: Path) -> None:
    dense = recorded(tmp_path / "dense.json", place / "dense" / "model.onnx")
    pruned = recorded(tmp_path / "pruned.json", place / "pruned.onnx")
    other = recorded(tmp_path / "other.json", place / "other.onnx")

    out = tmp_path / "advice.json"
    words = ["--profile", dense, "--profile", pruned, "--all", "--out", out]
    found = run(place / "dense", place / "pruned.onnx", *words)

    assert 0 == found.exit_code
    assert "nothing is timed where profiles are given" == json.loads(out.read_text())["no_advice"]
    assert "medians of 3 runs" in found.stdout
    assert "0 layers not shown" in found.stdout
    with pytest.raises(ModelError, match="does not belong to"):
        run(place / "dense", place / "pruned.onnx", "--profile", dense, "--profile", other)
    with pytest.raises(ConfigError, match="given 1 times, expected twice"):
        run(place / "dense", place / "pruned.onnx", "--profile", dense)


@pytest.mark.parametrize(
    ("first", "second", "error", "message"),
    [
        ("dense", "text.onnx", ModelError, "cannot be read as ONNX"),
        ("dense", "advice.json", ModelError, "cannot be read as ONNX"),
        ("dense", "nothing", ConfigError, "There is nothing at"),
        ("dense", "other.onnx", ModelError, "no layer in common"),
        ("pruned", "dense", ModelError, "Swap them"),
        ("dense", "dense", ConfigError, "given twice"),
    ],
)
def test_a_wrong_pair_is_refused(
    place: Path, first: str, second: str, error: type[NniPruneExtError], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(place / first, place / second, *QUICK, "--multiple", "0")


def test_a_damaged_artefact_folder_is_refused(place: Path, tmp_path: Path) -> None:
    artefact_folder(net(4, 4), tmp_path / "broken")
    (tmp_path / "broken" / "model.onnx").write_bytes(b"x")

    with pytest.raises(ArtefactError, match="damaged"):
        run(place / "dense", tmp_path / "broken")


def test_a_runtime_that_cannot_record_or_does_not_exist_and_few_rounds_are_refused(place: Path) -> None:
    for words, message in (
        (["--on", "torch-eager"], "does not say how long each node takes"),
        (["--on", "onnxruntime-cuda"], "does not say how long each node takes"),
        (["--on", "tflite"], "tflite"),
        (["--rounds", "3"], "Nothing can be said from 3 rounds"),
    ):
        with pytest.raises(NniPruneExtError, match=message):
            run(place / "dense", place / "pruned", *words)


def test_nothing_is_overwritten_and_nothing_is_measured_before_that_is_known(place: Path, tmp_path: Path) -> None:
    (tmp_path / "advice.json").write_text("mine")

    with pytest.raises(OutputError, match="exists already"):
        run(place / "dense", place / "text.onnx", "--out", tmp_path / "advice.json")

    assert "mine" == (tmp_path / "advice.json").read_text()
