"""What the page says about gated networks, and that reports without gates, or older ones, stay as they were."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from gated_reports import REASON, gated_sample, gating, without_compact
from sample_reports import sample

from nni_prune_ext.errors import ArtefactError
from nni_prune_ext.report import RunReport
from nni_prune_ext.report.gates import gates_sections
from nni_prune_ext.report.page import page
from nni_prune_ext.report.page_parts import Section, Table


def report(content: dict[str, object]) -> RunReport:
    return RunReport.model_validate(content)


def section(*entries: dict[str, object]) -> Section:
    [found] = gates_sections(report(gated_sample(*entries)), name="run1")
    return found


def cells(table: Table) -> dict[str, list[str]]:
    """Returns the first cell of every row → the others."""
    [group] = table.groups
    return {row[0].text: [cell.text for cell in row[1:]] for row in group.rows}


def test_the_first_sentence_names_the_images_and_counts_the_filters() -> None:
    [lead] = section(gating(layers=2)).paragraphs

    assert (
        "Measured on 9,973 test images (data: cifar10:ROOT). Of 128 filters in 2 gated layers, 32 run always, 1 never, "
        "and 95 vary: they run for some images only."
    ) == lead


def test_macs_stand_with_their_spread_beside_the_official_count() -> None:
    table = section(gating()).tables[0]

    assert ["mean", "share of dense", "standard deviation", "smallest", "largest"] == [
        column.heading for column in table.columns[1:]
    ]
    assert {
        "what an image needs": ["71.12 M", "56.7 %", "4.57 M", "51.23 M", "98.77 M"],
        "of these, heads": ["1.25 M", "1.0 %", "–", "–", "–"],
        "official: as the paper's code counts": ["60.61 M", "48.3 %", "–", "–", "–"],
        "dense network": ["125.49 M", "100.0 %", "–", "–", "–"],
    } == cells(table)


def test_every_layer_says_how_it_fires_and_what_became_of_it_in_the_compact_file() -> None:
    table = section(gating()).tables[1]

    assert ["filters", "units", "always", "varying", "never", "firing rate", "entropy (bits)", "break-even"] == [
        column.heading for column in table.columns[1:-1]
    ]
    assert "in ftwt-compact" == table.columns[-1].heading
    found = cells(table)
    assert 6 == len(found)
    assert ["64", "4", "16", "47", "1", "0.300", "0.432", "0.75", "gathered"] == found["features.stage0.block1.conv1"]
    assert ["0.432", "none", "masked: it fires at 0.88, and gains below 0.65 only"] == found[
        "features.stage0.block2.conv1"
    ][-3:]


def test_layers_that_lost_their_gates_in_a_file_are_called_folded() -> None:
    own = gating(layers=1, gathered=[])
    [_, compact] = own["files"]
    compact.update(masked={}, folded=["features.stage0.block0.conv1"])

    tables = section(own).tables

    assert "folded: no longer gated" == cells(tables[1])["features.stage0.block0.conv1"][-1]
    assert ["0", "0", "1"] == cells(tables[2])["ftwt-compact"][4:7]


def test_files_say_how_far_masks_and_outputs_agree_and_what_they_cannot_do() -> None:
    found = cells(section(gating()).tables[2])

    assert ["39,990 of 40,000", "61 of 64", "3e-07", "1e-04", "2", "4", "0", "one image at a time"] == found[
        "ftwt-compact"
    ]
    assert ["40,000 of 40,000", "64 of 64"] == found["ftwt-mask"][:2]


def test_a_file_that_was_compared_with_nothing_says_so() -> None:
    own = gating()
    for file in own["files"]:
        file["agreement"] = None

    assert ["not measured"] * 4 == cells(section(own).tables[2])["ftwt-mask"][:4]


def test_a_file_that_could_not_be_written_is_named_with_its_reason() -> None:
    found = section(without_compact(gating()))

    assert {"ftwt-compact": [REASON]} == cells(found.tables[-1])
    assert "break-even" == found.tables[1].columns[-1].heading, "there is no file to gather in"
    assert REASON in page([report(gated_sample(without_compact(gating())))])


def test_without_images_there_is_no_table_of_nothing() -> None:
    own = {**gating(), "data": None, "images": None, "layers": [], "macs": None}

    found = section(own)

    assert ["How filters fire was not measured."] == found.paragraphs
    assert [] == found.charts
    assert ["ONNX files of the gated network"] == [table.caption for table in found.tables]


def test_calibration_images_are_called_that() -> None:
    [lead] = section({**gating(), "data": "training images that the method calibrated on", "images": 96}).paragraphs

    assert lead.startswith("Measured on 96 training images that the method calibrated on (data: cifar10:ROOT). ")


def test_several_gated_networks_have_sections_of_their_own() -> None:
    own = report(gated_sample(gating(), gating(network="other")))

    titles = [found.title for found in gates_sections(own, name="run1")]

    assert ["Gates per input: ftwt", "Gates per input: other"] == titles


@pytest.mark.parametrize("count", [1, 2])
def test_the_page_shows_the_section_once_per_run_with_identifiers_of_its_own(count: int) -> None:
    text = page([report(gated_sample(gating())) for _ in range(count)])

    assert count == len(re.findall(r"<h[23]>Gates per input</h[23]>", text))
    named = re.findall(r'\bid="([^"]+)"', text)
    assert len(named) == len(set(named))


def test_a_run_without_gates_and_an_older_run_with_gates_have_no_section() -> None:
    older = {key: value for key, value in gated_sample().items() if key != "gating"}

    texts = [page([report(sample())]), page([report(older)]), page([report(older), report(gated_sample(gating()))])]

    assert [0, 0, 1] == [text.count("Gates per input</h") for text in texts]
    assert "gated per input" in texts[1], "its marks are explained as before"


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    content = gated_sample(without_compact(gating()))
    (tmp_path / "report.json").write_text(json.dumps(content))

    [own] = RunReport.load(tmp_path).gating

    assert content["gating"] == [own.model_dump(mode="json", exclude_unset=True)]


def test_keys_of_a_later_version_are_let_pass_and_damage_is_named(tmp_path: Path) -> None:
    own = gating()
    own["new"] = own["layers"][0]["new"] = own["macs"]["new"] = own["files"][0]["new"] = 1
    (tmp_path / "report.json").write_text(json.dumps(gated_sample(own)))

    assert 6 == len(RunReport.load(tmp_path).gating[0].layers)

    own["layers"][4]["never"] = -1
    (tmp_path / "report.json").write_text(json.dumps(gated_sample(own)))
    with pytest.raises(ArtefactError, match=r"gating\.0\.layers\.4\.never.* is -1"):
        RunReport.load(tmp_path)
