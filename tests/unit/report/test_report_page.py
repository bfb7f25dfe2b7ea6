"""The page: parsed, every number in it, nothing from elsewhere, and honest about what is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from sample_reports import sample

from nni_prune_ext.errors import ArtefactError
from nni_prune_ext.report import RunReport, write_html
from nni_prune_ext.report.page import page

VOID = {"meta", "link", "br", "img", "input", "hr", "wbr"}


class Parsed(HTMLParser):
    """Keeps text, elements with their ancestors, and refuses elements that are not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.elements.append((tag, found, [name for _, name in self.open]))
        if tag not in VOID:
            self.open.append((tag, found.get("class") or ""))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), [name for _, name in self.open]))

    def handle_endtag(self, tag):
        assert tag == self.open.pop()[0]

    def handle_data(self, data):
        if self.open and self.open[-1][0] != "style":
            self.text += data.replace("\xa0", " ")


def parsed(*contents: dict[str, object]) -> Parsed:
    return Parsed(page([RunReport.model_validate(content) for content in contents]))


def test_every_number_that_should_show_does_show():
    text = parsed(sample(layers=30)).text

    rows = ("125.49 M", "62.67 M", "49.9 %", "440.16 k", "51.6 %", "12.31 %", "85.56 %", "85.57 %", "1.71 MiB")
    measured = ("1.109", "0.819", "1.458", "0.8602", "25.00 %", "4e-16", "5e-07", "1e-04", "5 min 09 s", "7 min 20 s")
    conditions = (
        "CPU time",
        "1 thread",
        "batch 1",
        "87 rounds",
        "A/A error 0.8 %",
        "× 0.993",
        "CPUExecutionProvider 136",
    )
    certificate = ("1e-09", "float64", "0.1233", "0.9275")
    settings = ("bf16", "0.02", "0.0371", "temperature", "AMD EPYC", "2.11.0", "normalisation", "learning_rate: 0.02")
    for expected in (*rows, *measured, *conditions, *certificate, *settings):
        assert expected in text, expected
    assert all(f"{w['before']} → {w['after']}" in text for w in sample(layers=30)["widths"])
    assert all(p["reason"] in text for p in sample()["protected"])
    assert all(f"{epoch['loss']:.4f}" in text for epoch in sample()["curves"]["l1"])
    assert all(f"{note['sparsity']:.6g}" in text for note in sample()["notes"])


def test_a_met_target_is_said_with_what_was_asked_and_achieved():
    text = parsed(sample()).text

    assert "MACs: target met. Asked for at most 62.74 M (macs=0.5), achieved 62.67 M, 73.65 k (0.12 %) below." in text


def test_a_missed_target_is_said_first_and_with_its_distance():
    text = parsed(sample(met=False)).text

    verdict = "MACs: target MISSED, 3.38 M (5.4 %) above the bound."
    assert text.index(verdict) < text.index("Certificate") < text.index("Before and after")


def test_a_missed_ratio_is_a_distance_in_points():
    ratio = {"target": "ratio=0.5", "dense": 0.0, "asked": 0.5, "achieved": 0.48, "met": False}

    text = parsed(sample() | {"targets": [ratio]}).text

    assert "target MISSED, 2 points below the bound. Asked for at least 50.00 % (ratio=0.5), achieved 48.00 %" in text


def test_a_broken_certificate_and_a_broken_parity_stand_out():
    content = sample()
    content["certificate"] |= {"exact": False, "max_relative_error": 0.3}
    content["rows"][2]["parity"] = 0.01

    text = parsed(content).text

    assert "Certificate: NOT exact. Largest relative error 3e-01" in text
    assert "Parity: BROKEN for l1." in text


def test_differences_within_the_error_of_the_measurement_are_named():
    assert "Not distinguishable from dense: dense-trained-longer." in parsed(sample()).text


def test_missing_values_are_said_and_no_cell_is_blank():
    rows = [{"name": "dense", "macs": 1000, "params": 50, "top1": 0.5}, {"name": "l2", "macs": 500, "params": 30}]

    html = page([RunReport.model_validate({"format": 1, "rows": rows})])
    text = Parsed(html).text

    for expected in (
        "model unknown",
        "No target was asked for.",
        "unknown whether the removal is exact",
        "unknown whether ONNX Runtime agrees",
        "Latency was not measured.",
        "The widths of the layers were not recorded.",
        "No training was recorded.",
        "No protected layers were recorded.",
        "The environment was not recorded.",
        "No recipe was recorded.",
        "There is no chart over latency",
        "not measured",
        "Not measured for any network: latency × dense, top-1 ONNX, ONNX file, latency (ms).",
    ):
        assert expected in text, expected
    assert "></td>" not in html
    assert "None" not in text


def test_unknown_conditions_of_a_measurement_are_said():
    content = sample() | {"latency": {"rows": [{"name": "dense", "p50_ms": 1.0}]}}

    text = parsed(content).text

    assert "Clock: unknown. As many threads as the runtime chose, batch unknown, an unknown number of rounds" in text
    assert "The A/A error was not measured" in text


@pytest.mark.parametrize("runs", [1, 3])
def test_a_malicious_name_stays_text(runs):
    evil = '<script>alert("x")</script>'
    content = sample() | {"title": "", "model": evil, "data": evil, "options": {evil: evil}, "recipe": {"model": evil}}
    content["rows"][2]["name"] = content["widths"][0]["layer"] = content["protected"][0]["reason"] = evil
    content["curves"] = {evil: sample()["curves"]["l1"]}

    found = parsed(*[content] * runs)

    assert "script" not in {tag for tag, _, _ in found.elements}
    assert evil in found.text


@pytest.mark.parametrize("runs", [1, 4])
def test_nothing_comes_from_elsewhere(runs):
    html = page([RunReport.model_validate(sample())] * runs)
    found = Parsed(html)

    tags = {tag for tag, _, _ in found.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "image"}
    references = [
        value
        for _, attributes, _ in found.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "data", "action")
    ]
    assert all(reference and reference.startswith("#") for reference in references)
    assert "@import" not in html
    assert "url(http" not in html
    assert "http" not in html.replace('xmlns="http://www.w3.org/2000/svg"', "").replace(
        'xmlns:xlink="http://www.w3.org/1999/xlink"', ""
    )


@pytest.mark.parametrize("runs", [1, 4])
def test_tables_scroll_in_their_own_box_and_identifiers_are_unique(runs):
    found = parsed(*[sample()] * runs)

    tables = [ancestors for tag, _, ancestors in found.elements if tag == "table"]
    assert tables
    assert all("scroll" in ancestors for ancestors in tables)
    identifiers = [attributes["id"] for _, attributes, _ in found.elements if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    targets = {(attributes.get("href") or "")[1:] for tag, attributes, _ in found.elements if tag in ("a", "use")}
    assert targets - {""} <= set(identifiers)


def test_the_page_fits_phones_and_both_colour_schemes_and_paper():
    html = page([RunReport.model_validate(sample())])

    for expected in ('name="viewport"', "prefers-color-scheme: dark", "@media print", '<html lang="en">'):
        assert expected in html


def test_every_chart_is_valid_xml():
    html = page([RunReport.model_validate(sample(layers=90))])

    charts = [f"<svg{part.split('</svg>')[0]}</svg>" for part in html.split("<svg")[1:]]

    assert 2 + 3 + 2 + 2 == len(charts)
    assert all(ElementTree.fromstring(chart).get("viewBox") for chart in charts)


def test_several_runs_share_one_table_and_one_scatter_and_keep_their_own_sections():
    found = parsed(sample(), sample(method="fpgm"), sample(method="taylor", met=False))

    assert "3 runs compared" in found.text
    assert "2 of 3 targets met." in found.text
    assert "Run 3: MACs: target MISSED, 3.38 M (5.4 %) above the bound." in found.text
    assert 1 == found.text.count("Accuracy against cost")
    assert ["run-1", "run-2", "run-3"] == [a["id"] for tag, a, _ in found.elements if tag == "article"]
    assert "dense (1, 2, 3)" in found.text
    assert all(label in found.text for label in ("l1 (1)", "fpgm (2)", "taylor (3)"))


def test_a_run_without_a_target_was_asked_for_none():
    found = parsed(sample(), sample() | {"targets": []})

    assert "none asked" in found.text
    assert "No target was asked for." in found.text
    assert "1 of 1 targets met." in found.text
    assert "unknown" not in found.text[found.text.index("Asked and achieved") : found.text.index("Before and after")]


def test_what_was_not_cut_needs_no_certificate():
    content = sample() | {"certificate": None}
    content["rows"][2] |= {"macs": 125_485_696, "params": 853_018, "certificate": None, "top1_removed": None}

    text = parsed(content).text

    assert "Certificate: nothing was cut, so there was nothing to certify." in text
    assert "Nothing was cut, so there was nothing to certify." in text
    assert "No certificate was made." not in text
    assert "Not measured" not in text


def test_gates_on_what_was_not_cut_need_no_certificate_either():
    content = sample() | {"certificate": None}
    content["rows"][2] |= {"macs": 125_485_696, "params": 853_018, "certificate": None, "top1_removed": None}
    content["rows"].append({**content["rows"][0], "name": "mask", "kind": "gated", "params": 900_000})

    assert "Certificate: nothing was cut, so there was nothing to certify." in parsed(content).text


def test_an_empty_cut_beside_real_ones_is_named():
    content = sample() | {"certificate": None}
    content["rows"].append({**content["rows"][0], "name": "empty", "kind": "pruned"})

    assert "nothing was cut" in parsed(content).text


def test_a_single_epoch_is_a_sentence_and_no_chart():
    content = sample()
    content["curves"] = {"l1": content["curves"]["l1"][:1], "none": []}

    html = page([RunReport.model_validate(content)])

    assert "l1: 1 epoch, 1 min 02 s; loss 1.5000, validation metric 0.5700." in Parsed(html).text
    assert "none: no epoch of training." in html
    assert "Training curves" not in html


def test_the_accuracy_is_named_after_its_metric_and_is_no_percentage():
    content = sample() | {"metric": "my_metrics:mean_iou"}

    text = parsed(content).text

    assert "mean_iou ONNX" in text
    assert "0.8556" in text
    assert "−0.0407 to dense" in text
    assert "85.56 %" not in text
    assert "op-1" not in text


def test_settings_that_are_off_are_none_and_not_unknown():
    assert "patiencenone" in parsed(sample()).text.replace("\n", "")


def test_the_folder_stands_under_the_title_of_one_run_and_in_the_headings_of_several(tmp_path):
    reports = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(sample()))
        reports.append(RunReport.load(tmp_path / name))

    alone, both = Parsed(page(reports[:1])), Parsed(page(reports))

    assert "folder first" in alone.text
    assert 4 <= both.text.count("resnet56, l1 · second")
    assert str(tmp_path) not in both.text


def test_the_same_reports_give_the_same_page():
    reports = [RunReport.model_validate(sample(method=method)) for method in ("l1", "l2")]

    assert page(reports) == page(reports)


def test_the_page_is_written_whole(tmp_path):
    reports = [RunReport.model_validate(sample())]

    write_html(tmp_path / "report.html", reports)

    assert page(reports) == (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ["report.html"] == [path.name for path in tmp_path.iterdir()]


def test_reports_are_read_without_loading_what_only_drawing_needs():
    program = "import sys, nni_prune_ext.report; print({'torch', 'matplotlib', 'jinja2', 'yaml'} & set(sys.modules))"

    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert "set()" == printed.strip()


def test_no_report_is_refused():
    with pytest.raises(ArtefactError, match="0 reports, expected at least one"):
        page([])


MASKED = [{"layer": "conv1", "before": 432, "after": 216}, {"layer": "layer1.0.conv1", "before": 2304, "after": 58}]


def sparse() -> dict[str, object]:
    """Returns the report of a run that masked single weights: every network has the costs of the dense one."""
    report = sample(method="jackpots")
    dense, _, pruned = report["rows"]
    pruned.update(macs=dense["macs"], params=dense["params"], weight_sparsity=0.9, certificate=None)
    target = {"target": "sparsity=0.9", "dense": 0.0, "asked": 0.9, "achieved": 0.9001, "met": True}
    return {**report, "targets": [target], "masked": MASKED, "certificate": None}


def test_masked_weights_are_a_share_with_a_bound_in_points():
    text = parsed(sparse()).text

    assert "Share of weights masked: target met. Asked for at least 90.00 % (sparsity=0.9), achieved 90.01 %" in text
    assert "0.01 points above" in text
    assert "Weights at zero" in text


def test_a_missed_sparsity_is_a_distance_in_points():
    report = sparse()
    report["targets"][0].update(achieved=0.85, met=False)

    text = parsed(report).text

    assert "Share of weights masked: target MISSED, 5 points below the bound" in text


def test_every_masked_layer_shows_what_it_keeps():
    text = parsed(sparse()).text

    assert "274 of 2,736 weights in 2 masked layers are left" in text
    assert "conv143221650.0%layer1.0.conv12,304582.5%" in "".join(text.split())
    assert "Weights kept" not in parsed(sample()).text


def test_every_phase_shows_how_it_ended():
    report = sample(method="jackpots")
    report["curves"]["jackpots"] = [
        {"phase": phase, "epoch": epoch, "loss": loss, "metric": metric}
        for phase, epoch, loss, metric in (
            ("search", 0, 0.91, 0.2501),
            ("search", 1, 0.81, 0.3502),
            ("freeze", 0, 0.71, 0.7503),
            ("tune", 0, 0.61, 0.8504),
        )
    ]

    text = parsed(report).text
    phases = text.split("Phases", 1)[1].split("All epochs")[0]

    ends = ["0.8100", "0.3502", "0.7100", "0.7503", "0.6100", "0.8504"]
    assert ends == re.findall(r"0\.\d{4}", phases)
    assert "what the method trains itself has happened by then" in text


def test_a_stage_with_one_phase_has_no_table_of_phases():
    report = sample(method="jackpots")
    report["curves"] = {"jackpots": [{"phase": "recovery", "epoch": n, "loss": 1.0 / (n + 1)} for n in range(3)]}

    text = parsed(report).text

    assert "loss at its end" not in text
    assert "what the method trains itself" not in text
