"""Charts: valid XML, the same every time, and no label on top of another."""

from __future__ import annotations

import math
from itertools import combinations
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sample_reports import sample

from nni_prune_ext.report import RunReport
from nni_prune_ext.report.charts import (
    LAYERS_PER_CHART,
    Network,
    elided,
    note_charts,
    pareto_front,
    scatter,
    training_curve,
    width_charts,
)
from nni_prune_ext.report.facts import EpochFacts, WidthFacts
from nni_prune_ext.report.label_places import place_labels

NETWORKS = [
    Network("dense", "dense", 0, 125e6, 0.89),
    Network("control <&>", "control", 0, 125e6, 0.90),
    Network("l1", "pruned", 0, 62e6, 0.85),
    Network("worse", "pruned", 1, 70e6, 0.80),
]


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def widths(count: int) -> list[WidthFacts]:
    return [WidthFacts(layer=f"layer{n}.conv", before=64, after=64 - n % 60) for n in range(count)]


def test_the_front_holds_what_no_other_network_beats():
    front = pareto_front(NETWORKS)

    assert ["l1", "control <&>"] == [network.label for network in front]


def test_the_scatter_names_every_network_and_its_axes():
    found = texts(scatter(NETWORKS, axis="MACs", name="a") or "")

    assert {"dense", "control <&>", "l1", "worse", "MACs (M)", "top-1 (%)"} <= set(found)


def test_another_metric_names_the_axis_and_keeps_its_scale():
    found = texts(scatter(NETWORKS, axis="MACs", name="a", metric="mean_iou") or "")

    assert "mean_iou" in found
    assert all(float(text) <= 1.5 for text in found if text.startswith("0."))
    assert not {"top-1 (%)", "85", "90"} & set(found)


def test_the_same_networks_give_the_same_svg_without_a_date():
    first, second = (scatter(NETWORKS, axis="latency", name="a") for _ in range(2))

    assert first == second
    assert "dc:date" not in (first or "")


def test_charts_follow_the_colours_of_the_page_and_keep_their_identifiers_apart():
    first, second = (scatter(NETWORKS, axis="MACs", name=name) or "" for name in ("a", "b"))

    assert "var(--series-1" in first
    assert "#0" not in first.replace("url(#", "").replace('href="#', "")
    identifiers = [
        {node.get("id") for node in ElementTree.fromstring(svg).iter() if node.get("id")} for svg in (first, second)
    ]
    assert identifiers[0]
    assert not identifiers[0] & identifiers[1]


@pytest.mark.parametrize("accuracy", [0.0, 0.9])
def test_one_network_alone_can_be_drawn(accuracy):
    assert "dense" in texts(scatter([Network("dense", "dense", 0, 5.0, accuracy)], axis="MACs", name="a") or "")


def test_a_network_whose_metric_is_no_number_is_left_out():
    lost = Network("lost", "pruned", 0, 4.0, float("nan"))

    assert "lost" not in texts(scatter([*NETWORKS, lost], axis="MACs", name="a") or "")
    assert scatter([lost], axis="MACs", name="a") is None


def test_nothing_to_draw_is_no_chart():
    assert scatter([], axis="MACs", name="a") is None
    assert [] == width_charts([], name="a")
    assert training_curve([EpochFacts(epoch=0)], stage="l1", name="a") is None
    assert {} == note_charts([{"progress": 0.5}], name="a")
    assert {} == note_charts([{"progress": 0.5, "once": 1.0}], name="a")


@pytest.mark.parametrize("count", [1, 3, 40, 41, 150])
def test_every_layer_has_its_bar_and_its_numbers(count):
    charts = width_charts(widths(count), name="w")

    assert math.ceil(count / LAYERS_PER_CHART) == len(charts)
    found = [text for chart in charts for text in texts(chart)]
    assert {f"64 → {64 - n % 60}" for n in range(count)} <= set(found)
    assert count == sum(text.startswith("layer") for text in found)


def test_what_all_names_begin_with_is_left_out():
    found = width_charts([WidthFacts(layer=f"features.block{n}.conv1", before=8, after=4) for n in range(3)], name="w")

    assert {"block0.conv1", "block1.conv1", "block2.conv1"} <= set(texts(found[0]))


def test_long_names_lose_their_middle_and_keep_their_end():
    assert "backbone.f…rs.12.conv2" == elided("backbone.features.denseblock.layers.12.conv2", 22)
    assert "short" == elided("short", 22)


def test_curves_name_their_phases_and_skip_what_is_no_number():
    report = RunReport.model_validate(sample())
    broken = [*report.curves["l1"], EpochFacts(phase="recovery", epoch=9, loss=math.nan)]

    found = texts(training_curve(broken, stage="l1", name="a") or "")

    assert {"loss", "validation metric", "epoch", "l1", "recovery"} <= set(found)


def test_a_stage_without_validation_has_one_panel():
    found = texts(training_curve([EpochFacts(phase="x", epoch=0, loss=1.0)], stage="x", name="a") or "")

    assert "validation metric" not in found


def test_every_logged_number_has_its_chart_up_to_a_limit():
    notes = [{"progress": n / 5, **{f"key{k}": float(n) for k in range(20)}} for n in range(6)]

    charts = note_charts(notes, name="n", most=12)

    assert [f"key{k}" for k in range(12)] == list(charts)
    assert all("progress" in texts(svg) for svg in charts.values())


def test_drawing_leaves_matplotlib_as_it_was():
    before = dict(mpl.rcParams)

    scatter(NETWORKS, axis="MACs", name="a")

    assert before == dict(mpl.rcParams)


def test_labels_of_close_points_do_not_overlap():
    figure = Figure(figsize=(6, 5), dpi=72)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 10)
    points = [(5 + 0.1 * n, 5 + 0.05 * n) for n in range(8)]

    left_out = place_labels(axes, points, [f"network {n}" for n in range(8)], colour="k", line="k")

    boxes = [text.get_window_extent() for text in axes.texts]
    assert [] == left_out
    assert 8 == len(boxes)
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_labels_without_room_are_left_out_and_named():
    figure = Figure(figsize=(1, 1), dpi=72)
    FigureCanvasAgg(figure)
    axes = figure.subplots()

    left_out = place_labels(axes, [(0.5, 0.5)], ["far too long a label for this"], colour="k", line="k")

    assert ["far too long a label for this"] == left_out
