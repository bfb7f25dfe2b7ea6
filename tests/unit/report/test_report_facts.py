"""``report.json``: written so that any reader of JSON takes it, and read with every flaw named."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
from sample_reports import sample

from nni_prune_ext.errors import ArtefactError, OutputError
from nni_prune_ext.report import Row, RunReport, write_report


def test_what_is_written_is_read_back(tmp_path):
    rows = [Row("dense", 100, 10, kind="dense"), Row("l1", 50, 5, top1=0.5, validation=0.6, weight_sparsity=0.25)]

    write_report(tmp_path / "report.json", rows, {"model": "resnet20", "seed": 3})
    found = RunReport.load(tmp_path / "report.json")

    assert tuple(rows) == found.rows
    assert (1, "resnet20", 3, None) == (found.format, found.model, found.seed, found.latency)
    assert ["report.json"] == [path.name for path in tmp_path.iterdir()]


def test_a_folder_is_read_by_its_report(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(sample()))

    assert "resnet56, l1" == RunReport.load(tmp_path).heading


def test_numbers_that_are_not_finite_survive_in_strict_json(tmp_path):
    path = tmp_path / "report.json"

    write_report(path, [Row("dense", 1, 1)], {"facts": {"a": math.nan, "b": math.inf, "c": -math.inf}})
    found = RunReport.load(path).facts

    json.loads(path.read_text(), parse_constant=pytest.fail)
    assert math.isnan(found["a"])
    assert (math.inf, -math.inf) == (found["b"], found["c"])


def test_keys_of_a_later_version_are_let_pass_at_every_level(tmp_path):
    content = sample() | {"new": 1}
    content["rows"][0]["new"] = content["targets"][0]["new"] = content["latency"]["new"] = 2
    (tmp_path / "report.json").write_text(json.dumps(content))

    assert 3 == len(RunReport.load(tmp_path).rows)


def test_the_first_row_is_the_dense_network_and_no_title_is_made_up_from_what_is_known():
    found = RunReport.model_validate({"format": 1, "rows": [{"name": "a", "macs": 1, "params": 1}], "model": "tiny"})

    assert "dense" == found.kind(found.rows[0])
    assert "tiny, no method" == found.heading


def damaged(**changes: object) -> str:
    return json.dumps({key: value for key, value in {**sample(), **changes}.items() if value != "gone"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not readable as JSON"),
        ("\x00\x01", "not readable as JSON"),
        ("[1]", "holds a list"),
        ('{"metadata": {}}', "no key 'format'"),
        (damaged(format="gone"), "no key 'format'"),
        (damaged(format=2), "the key 'format' is 2, expected 1"),
        (damaged(rows="gone"), "no key 'rows'"),
        (damaged(rows=[]), "the key 'rows' is []"),
        (damaged(rows=[{"name": "dense", "macs": 1}]), "the key 'rows.0.params'"),
        (damaged(rows=[{"name": "dense", "macs": "many", "params": 1}]), "'rows.0.macs' is 'many'"),
        (damaged(rows=[{"name": "x", "macs": 1, "params": 1, "kind": "odd"}]), "'rows.0.kind' is 'odd'"),
        (damaged(widths=[{"layer": "a", "before": -1, "after": 0}]), "'widths.0.before' is -1"),
        (damaged(curves={"l1": [{"loss": 1}]}), "'curves.l1.0.epoch'"),
        (damaged(targets=[{"target": "macs=0.5", "met": "perhaps"}]), "'targets.0.met' is 'perhaps'"),
    ],
)
def test_a_damaged_old_or_foreign_file_is_refused_by_file_and_key(tmp_path, text, said):
    path = tmp_path / "report.json"
    path.write_text(text)

    with pytest.raises(ArtefactError) as caught:
        RunReport.load(path)

    assert str(path) in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("where", ["nowhere", "."])
def test_a_missing_report_is_named(tmp_path, where):
    with pytest.raises(ArtefactError, match=r"Cannot read '.*(nowhere|report\.json)'.*expected|Expected a run folder"):
        RunReport.load(tmp_path / where)


def artefact(folder: Path, parts: object) -> Path:
    (folder / "report.json").write_text(json.dumps(sample()))
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "parts": parts}))
    return folder / "report.json"


@pytest.mark.parametrize("by_file", [True, False])
def test_the_report_of_an_artefact_folder_is_the_one_that_its_manifest_names(tmp_path, by_file):
    file = artefact(tmp_path, {})
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    artefact(tmp_path, {"report.json": {"sha256": digest, "size_bytes": 1}})

    assert tmp_path == RunReport.load(file if by_file else tmp_path).folder
    file.write_text(file.read_text().replace("0.8556", "0.9956"))

    with pytest.raises(ArtefactError, match=r"report\.json' is damaged or of another run.*expected " + digest[:12]):
        RunReport.load(file if by_file else tmp_path)


@pytest.mark.parametrize("parts", [{}, None, {"report.json": 3}, []])
def test_a_report_that_the_manifest_does_not_name_is_not_of_this_network(tmp_path, parts):
    artefact(tmp_path, parts)

    with pytest.raises(ArtefactError, match="gives no hash for it"):
        RunReport.load(tmp_path)


def test_a_broken_manifest_is_named(tmp_path):
    artefact(tmp_path, {})
    (tmp_path / "manifest.json").write_text("{")

    with pytest.raises(ArtefactError, match=r"manifest\.json' is not readable as JSON"):
        RunReport.load(tmp_path)


def test_the_folder_is_known_after_reading_and_never_written(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(sample()))

    found = RunReport.load(tmp_path / "report.json")

    assert tmp_path.resolve() == found.folder
    assert "folder" not in found.model_dump(mode="json")


@pytest.mark.parametrize(("metric", "name"), [(None, "top-1"), ("a.b:mean_iou", "mean_iou"), ("dice", "dice")])
def test_the_metric_is_called_by_the_name_of_its_function(metric, name):
    assert name == RunReport.model_validate(sample() | {"metric": metric}).metric_name


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    with pytest.raises(OutputError, match="report.json"):
        write_report(tmp_path / "absent" / "report.json", [Row("dense", 1, 1)], {})
