"""Artefact folders are complete or absent, hold one run only, and say how their model is built."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from nni_prune_ext import deployment
from nni_prune_ext.deployment import (
    Measurement,
    Variant,
    compare_variants,
    latency_caption,
    load_masks,
    measurement_facts,
    write_artefacts,
)
from nni_prune_ext.errors import ConfigError, ModelError, OutputError, ParityError
from nni_prune_ext.export.artefact_folder import ModelSpec, check_unused, complete_or_absent, remove_earlier_run
from nni_prune_ext.export.example_structure import ExampleStructure
from nni_prune_ext.export.manifest import MethodUse, read_manifest
from nni_prune_ext.export.onnx_static import ExportResult
from nni_prune_ext.export.provenance import provenance
from nni_prune_ext.pipeline import PruneResult, prune

EXAMPLE = torch.zeros(1, 3, 8, 8)
SPEC = ModelSpec(model="mine:net", num_classes=5, input_shape=(1, 3, 8, 8))


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))


@pytest.fixture(scope="module")
def result(dense: nn.Module) -> PruneResult:
    return prune(dense, EXAMPLE, target="macs=0.5", seed=3)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        deployment,
        "compare_latency",
        lambda paths, images, **_: real_latency(paths, images, rounds=2, min_seconds=0.0),
    )


real_latency = deployment.compare_latency


def test_a_specification_survives_the_file_and_is_absent_without_one(tmp_path: Path) -> None:
    SPEC.save(tmp_path)

    assert SPEC == ModelSpec.load(tmp_path)
    assert ModelSpec.load(tmp_path / "none") is None


@pytest.mark.parametrize("text", ["", "{}", '{"model": "m", "input_shape": [1, 3], "format": 2}'])
def test_an_unusable_specification_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.json").write_text(text)

    with pytest.raises(ModelError, match=r"model\.json.*--num-classes"):
        ModelSpec.load(tmp_path)


def test_the_file_of_a_pruned_network_says_how_it_came_to_be(
    tmp_path: Path, dense: nn.Module, result: PruneResult, quick: None
) -> None:
    rows, _ = compare_variants(
        [Variant("dense", dense), Variant("l1", result.model, result)], tmp_path, EXAMPLE, spec=SPEC
    )

    written = {
        p.key.removeprefix("nni_prune_ext."): p.value for p in onnx.load(tmp_path / "l1/model.onnx").metadata_props
    }
    assert ("l1", "l1", "3") == (written["variant"], written["method"], written["seed"])
    assert result.certificate is not None
    assert result.certificate.as_dict() == json.loads(written["certificate"])
    assert "macs=0.5" == json.loads(written["targets"])[0]["target"]
    assert SPEC == ModelSpec.model_validate_json(written["model"])
    assert SPEC.model_copy(update={"example": ExampleStructure.of(EXAMPLE)}) == ModelSpec.load(tmp_path / "l1")
    assert ["dense", "l1"] == [row.name for row in rows] == sorted(path.name for path in tmp_path.iterdir())


def test_a_file_that_fails_the_check_leaves_an_earlier_run_as_it_was(
    tmp_path: Path, dense: nn.Module, result: PruneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.json").write_text('{"rows": [{"name": "l2"}]}')
    write_artefacts(dense, tmp_path / "l2", EXAMPLE)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    export = deployment.export_onnx

    def refuse_pruned(model: nn.Module, *arguments: object, **options: object) -> ExportResult:
        if model is result.model:
            raise ParityError("differs")
        return export(model, *arguments, **options)

    monkeypatch.setattr(deployment, "export_onnx", refuse_pruned)

    with pytest.raises(ParityError):
        compare_variants([Variant("dense", dense), Variant("l1", result.model, result)], tmp_path, EXAMPLE)

    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_pruned_network_may_differ_from_pytorch_by_twice_as_much_as_the_dense_one(
    tmp_path: Path, dense: nn.Module, result: PruneResult, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    export = deployment.export_onnx

    def with_gap(*arguments: object, fail: float, **options: object) -> ExportResult:
        limits.append(fail)
        made = export(*arguments, **options)
        assert made.parity is not None
        return replace(made, parity=replace(made.parity, max_rel=8e-5))

    monkeypatch.setattr(deployment, "export_onnx", with_gap)

    rows, _ = compare_variants([Variant("dense", dense), Variant("l1", result.model, result)], tmp_path, EXAMPLE)

    assert [1e-4, 1.6e-4] == limits == [row.parity_limit for row in rows]


def test_a_folder_in_use_is_refused_and_not_touched(tmp_path: Path, dense: nn.Module) -> None:
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(OutputError, match=r"notes\.txt.*--overwrite"):
        compare_variants([Variant("dense", dense)], tmp_path, EXAMPLE, overwrite=False)

    assert ["notes.txt"] == [path.name for path in tmp_path.iterdir()]
    check_unused(tmp_path / "new")


def test_overwriting_removes_the_networks_of_the_earlier_report_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"rows": [{"name": "l2"}, {"name": "../outside"}, {"name": "fpgm"}]}')
    kept = [tmp_path / "l2" / "notes.txt", tmp_path / "other" / "model.onnx", tmp_path.parent / "outside" / "plan.json"]
    gone = [tmp_path / "l2" / "plan.json", tmp_path / "fpgm" / "model.onnx"]
    for path in kept + gone:
        path.parent.mkdir(exist_ok=True)
        path.touch()

    remove_earlier_run(tmp_path)

    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in [*gone, tmp_path / "fpgm", tmp_path / "report.json"])


def test_writing_again_leaves_no_plan_of_the_earlier_network(
    tmp_path: Path, dense: nn.Module, result: PruneResult
) -> None:
    write_artefacts(result.model, tmp_path / "net", EXAMPLE, plan=result.plan)

    files = write_artefacts(dense, tmp_path / "net", EXAMPLE)

    names = ["manifest.json", "model.json", "model.onnx", "model.safetensors"]
    assert names == sorted(path.name for path in (tmp_path / "net").iterdir())
    assert tmp_path / "net" / "model.onnx" == files.onnx == files.export.path


def test_drafts_of_killed_runs_go_and_those_of_running_ones_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = socket.gethostname()
    gone = [tmp_path / f".unfinished-{here}-{dead.pid}-abc", tmp_path / ".unfinished-elsewhere-1-old"]
    kept = [tmp_path / f".unfinished-{here}-{os.getppid()}-abc", tmp_path / ".unfinished-elsewhere-1-new"]
    for path in gone + kept:
        path.mkdir()
        (path / "model.onnx").touch()
    os.utime(gone[1], (0, 0))

    with complete_or_absent(tmp_path / "net") as draft:
        (draft / "plan.json").touch()
        assert f".unfinished-{here}-{os.getpid()}-" in draft.name

    assert ["net", *sorted(path.name for path in kept)] == sorted(p.name for p in tmp_path.iterdir())[-1:] + sorted(
        p.name for p in tmp_path.iterdir()
    )[:-1]


def test_a_folder_that_holds_nothing_but_the_draft_of_a_killed_run_is_unused(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".unfinished-{socket.gethostname()}-{dead.pid}-abc").mkdir()

    check_unused(tmp_path)

    assert [] == list(tmp_path.iterdir())


def test_the_manifest_is_the_last_file_to_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    replace_file = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, target: moved.append(path.name) or replace_file(path, target))

    with complete_or_absent(tmp_path / "net") as draft:
        for name in ("manifest.json", "model.onnx", "report.json"):
            (draft / name).touch()

    assert ["model.onnx", "report.json", "manifest.json"] == moved


def test_the_date_in_a_file_can_be_fixed(dense: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")

    facts = provenance(dense, {}, opset=18, exporter="dynamo", extra={})

    assert "1970-01-01T00:00:00+00:00" == facts["nni_prune_ext.created"]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "today")
    with pytest.raises(ConfigError, match="today"):
        provenance(dense, {}, opset=18, exporter="dynamo", extra={})


def test_rows_say_what_each_network_is_and_how_many_weights_a_mask_holds_at_zero(
    tmp_path: Path, dense: nn.Module, result: PruneResult, quick: None
) -> None:
    masks = {"3.bias": torch.tensor([True, False, True, True, False])}
    network = copy.deepcopy(result.model)
    network.load_state_dict({**network.state_dict(), "3.bias": masks["3.bias"].float()})
    masked = replace(result, outcome=replace(result.outcome, weight_masks=masks))

    rows, _ = compare_variants(
        [Variant("dense", dense), Variant("longer", dense), Variant("l1", network, masked, options={"steps": 1})],
        tmp_path,
        EXAMPLE,
    )

    assert ["dense", "control", "pruned"] == [row.kind for row in rows]
    assert [None, None, 2 / result.costs.params] == [row.weight_sparsity for row in rows]
    assert MethodUse(name="l1", options={"steps": 1}) == read_manifest(tmp_path / "l1").method
    assert read_manifest(tmp_path / "dense").method is None
    assert torch.equal(masks["3.bias"], load_masks(tmp_path / "l1")["3.bias"])


def test_latency_is_measured_as_long_as_asked_or_not_at_all(tmp_path: Path, dense: nn.Module) -> None:
    rows, latency = compare_variants(
        [Variant("dense", dense)], tmp_path, EXAMPLE, measurement=Measurement(rounds=3, min_seconds=0.0)
    )
    unmeasured, none = compare_variants([Variant("dense", dense)], tmp_path, EXAMPLE, measurement=None)

    assert latency is not None
    assert (3, latency.rows[0].p50_ms) == (latency.rounds, rows[0].latency_ms)
    assert (None, None) == (none, unmeasured[0].latency_ms)
    assert "latency: not measured; no data given: accuracy not measured" == latency_caption(none, without_data=True)
    assert measurement_facts(none)["latency"] is None
