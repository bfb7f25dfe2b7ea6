"""``report``: what the verb reads, writes, prints and refuses."""

from __future__ import annotations

import json

import pytest
import typer
from sample_reports import sample
from typer.testing import CliRunner

from nni_prune_ext.cli.report import report
from nni_prune_ext.errors import ArtefactError, NniPruneExtError, OutputError

APP = typer.Typer()
APP.command()(report)


def run(*arguments: object) -> str:
    found = CliRunner().invoke(APP, [str(argument) for argument in arguments])
    if isinstance(found.exception, NniPruneExtError):
        raise found.exception
    assert 0 == found.exit_code, found.output
    return found.stdout


@pytest.fixture
def folder(tmp_path):
    for name in ("l1", "fpgm"):
        (tmp_path / name / "artefact").mkdir(parents=True)
        text = json.dumps(sample(method=name, met=name == "l1"))
        (tmp_path / name / "report.json").write_text(text)
        (tmp_path / name / "artefact" / "report.json").write_text(text)
    return tmp_path


def test_one_run_is_shown_with_its_targets(folder):
    printed = run(folder / "l1", "--out", folder / "page.html")

    assert "resnet56, l1" in printed
    assert "MACs: target met." in printed
    assert "<!DOCTYPE html>" in (folder / "page.html").read_text(encoding="utf-8")


def test_run_folders_artefact_folders_and_files_are_compared(folder):
    runs = (folder / "l1", folder / "fpgm" / "artefact", folder / "l1" / "report.json")

    printed = run(*runs, "--out", folder / "new" / "page.html")

    for expected in (
        "3 runs",
        "1. resnet56, l1 · l1",
        "2. resnet56, fpgm · artefact",
        "3. resnet56, l1",
        "2. MACs: target MISSED, 3.38 M",
    ):
        assert expected in printed
    assert "3 runs compared" in (folder / "new" / "page.html").read_text(encoding="utf-8")


def test_json_holds_rows_and_targets_of_every_run(folder):
    found = json.loads(run(folder / "l1", folder / "fpgm", "--out", folder / "page.html", "--json"))

    assert ("done", str(folder / "page.html")) == (found["event"], found["out"])
    assert ["resnet56, l1", "resnet56, fpgm"] == [one["title"] for one in found["runs"]]
    assert 62_669_200 == found["runs"][0]["rows"][2]["macs"]
    assert found["runs"][1]["targets"][0]["met"] is False


def test_json_has_null_where_a_number_is_none(folder):
    content = sample()
    content["rows"][0]["top1"] = "NaN"
    (folder / "l1" / "report.json").write_text(json.dumps(content))

    printed = run(folder / "l1", "--out", folder / "page.html", "--json")

    assert json.loads(printed, parse_constant=pytest.fail)["runs"][0]["rows"][0]["top1"] is None


def test_the_report_of_an_artefact_folder_must_be_the_one_of_its_manifest(folder):
    (folder / "l1" / "artefact" / "manifest.json").write_text('{"parts": {"report.json": {"sha256": "0"}}}')

    with pytest.raises(ArtefactError, match=r"report\.json' is damaged or of another run"):
        run(folder / "l1" / "artefact", "--out", folder / "page.html")

    assert not (folder / "page.html").exists()


def test_an_existing_file_is_kept_unless_told_otherwise(folder):
    out = folder / "page.html"
    out.write_text("mine")

    with pytest.raises(OutputError, match=r"page\.html' exists.*--overwrite"):
        run(folder / "l1", "--out", out)

    assert "mine" == out.read_text()
    run(folder / "l1", "--out", out, "--overwrite")
    assert "resnet56" in out.read_text(encoding="utf-8")


def test_a_folder_is_no_place_for_the_page(folder):
    with pytest.raises(OutputError, match="a folder, expected the name of a file"):
        run(folder / "l1", "--out", folder, "--overwrite")


def test_a_run_without_a_report_is_named_and_nothing_is_written(folder):
    with pytest.raises(ArtefactError, match="absent"):
        run(folder / "l1", folder / "absent", "--out", folder / "page.html")

    assert not (folder / "page.html").exists()
