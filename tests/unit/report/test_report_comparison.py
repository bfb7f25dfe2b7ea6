"""Several runs on one page: what differs, what they are called, and which may share a chart."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from sample_reports import sample

from nni_prune_ext.report import RunReport
from nni_prune_ext.report.accuracy_charts import accuracy_section
from nni_prune_ext.report.comparable_runs import same_measurement, same_task
from nni_prune_ext.report.recipe_differences import differences_section, differing_keys
from nni_prune_ext.report.run_names import folder_names, run_names


def report(**changes: object) -> RunReport:
    """Returns the sample with top-level keys changed, and ``data``, ``model`` and ``macs`` where they belong."""
    content = copy.deepcopy(sample())
    content["recipe"] = {"model": {"name": "resnet56"}, "data": {"source": "cifar10:ROOT"}, "seed": 7, "out": "a"}
    content["rows"][0]["macs"] = changes.pop("macs", content["rows"][0]["macs"])
    return RunReport.model_validate(content | changes)


def recipe(**data: object) -> dict[str, object]:
    return {"recipe": {"model": {"name": "resnet56"}, "data": {"source": "cifar10:ROOT", **data}}}


def test_keys_that_differ_are_dotted_down_to_the_innermost_one():
    first = {"model": "a", "training": {"learning_rate": 0.1, "momentum": 0.9}, "target": ["macs=0.5"], "out": "x"}
    second = {"model": "a", "training": {"learning_rate": 0.2, "momentum": 0.9}, "target": ["macs=0.4"], "out": "y"}

    assert [("training", "learning_rate"), ("target",)] == differing_keys([first, second])


def test_a_block_that_only_some_runs_have_is_one_key_unless_those_differ():
    block = {"temperature": 4, "weight": 0.5}

    assert [("distillation",)] == differing_keys([{"distillation": None}, {"distillation": block}])
    assert [("distillation", "weight")] == differing_keys(
        [{"distillation": None}, {"distillation": block}, {"distillation": {**block, "weight": 1}}]
    )
    assert [("options",)] == differing_keys([{"options": {}}, {"options": {"steps": 3}}])
    assert [("new",)] == differing_keys([{}, {"new": 3}])


def test_the_table_has_one_column_per_run_and_shortens_long_values():
    weights = "/a/long/way/down/to/the/weights/of/a/network.safetensors"
    first = report(folder=Path("/x/one"), recipe={"seed": 1, "weights": None, "patience": 3})
    second = report(folder=Path("/x/two"), recipe={"seed": 2, "weights": weights})

    [table] = differences_section([first, second]).tables

    assert [("recipe key", 0), ("one", 1), ("two", 2)] == [(column.heading, column.run) for column in table.columns]
    rows = [[cell.text for cell in row] for row in table.groups[0].rows]
    assert ["seed", "1", "2"] == rows[0]
    assert ["patience", "3", "not given"] == rows[2]
    assert ["weights", "none"] == rows[1][:2]
    assert "…" in rows[1][2]
    assert len(rows[1][2]) < len(weights)
    assert weights == table.groups[0].rows[1][2].exact


def test_equal_and_absent_recipes_are_said():
    same = differences_section([report(), report(title="another")])
    absent = differences_section([report(), report(recipe=None)])
    some = differences_section([report(), report(recipe=None), report(recipe={"seed": 8})])

    assert ["The recipes are the same, but for title and folder."] == list(same.paragraphs)
    assert "No recipe was recorded for run 2." in absent.paragraphs
    assert not absent.tables
    assert "not recorded" in [cell.text for row in some.tables[0].groups[0].rows for cell in row]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/r/a", "/r/b"], ["a", "b"]),
        (["/r/a/run", "/r/b/run", "/r/c"], ["a/run", "b/run", "c"]),
        (["/r/a", "/r/a"], ["a", "a"]),
        ([None, "/r/a"], ["", "a"]),
    ],
)
def test_folders_are_named_by_as_much_of_their_path_as_tells_them_apart(folders, names):
    assert names == folder_names([report(folder=folder and Path(folder)) for folder in folders])


def test_an_artefact_folder_is_named_with_its_run(tmp_path):
    (tmp_path / "run" / "l1").mkdir(parents=True)
    (tmp_path / "run" / "l1" / "manifest.json").touch()

    assert ["resnet56, l1 · run/l1"] == run_names([report(folder=tmp_path / "run" / "l1")])


def test_a_folder_called_like_the_run_is_not_repeated():
    assert ["tiny"] == run_names([report(title="tiny", folder=Path("/r/tiny"))])


@pytest.mark.parametrize(
    "other",
    [
        {"data": "digits"},
        {"metric": "module:mean_iou"},
        recipe(image_size=64),
        recipe(limit_images=300),
        {"recipe": {"model": {"name": "resnet56", "input_shape": [1, 3, 64, 64]}, "data": {"source": "cifar10:ROOT"}}},
        {"macs": 4 * 125_485_696},
        {"recipe": None, "model": "resnet20", "macs": 40_000_000},
    ],
)
def test_runs_of_another_task_do_not_share_a_front(other):
    assert [[0, 2], [1]] == same_task([report(), report(**other), report()])


def test_another_model_on_the_same_data_is_a_rival_on_the_same_front():
    assert [[0, 1]] == same_task([report(), report(model="resnet20", macs=40_000_000)])


@pytest.mark.parametrize(
    "other",
    [
        {"environment": {"cpu": "another"}},
        {"environment": {"cpu": "AMD EPYC", "gpu": "H200"}},
        {"environment": {}},
        {"latency": None},
        {"latency": sample()["latency"] | {"batch_size": 8}},
        {"latency": sample()["latency"] | {"threads": 4}},
        {"latency": {**sample()["latency"], "rows": [{"name": "dense", "runtime": "tensorrt"}]}},
    ],
)
def test_latencies_of_other_machines_runtimes_or_conditions_do_not_share_a_front(other):
    runs = [report(), report(**other), report()]

    assert [[0, 1, 2]] == same_task(runs)
    assert [[0, 2], [1]] == same_measurement(runs)


def test_runs_whose_conditions_are_unknown_are_each_alone():
    assert [[0], [1]] == same_measurement([report(latency=None), report(latency=None)])


def test_separate_charts_name_their_runs_and_the_page_says_why():
    section = accuracy_section([report(), report(data="digits"), report(environment={"cpu": "another"})])

    captions = [chart.caption for chart in section.charts]
    assert 2 + 3 == len(captions)
    assert "Top-1 accuracy over MACs, runs 1, 3: cifar10:ROOT, dense 125.49 M MACs" == captions[0]
    assert captions[2].endswith("run 1: cifar10:ROOT, dense 125.49 M MACs, AMD EPYC, onnxruntime-cpu, batch 1")
    assert captions[3].endswith("run 3: cifar10:ROOT, dense 125.49 M MACs, another, onnxruntime-cpu, batch 1")
    text = " ".join(section.paragraphs)
    assert "differ in data, input or metric" in text
    assert "different machines" in text
    assert "measured at different times" not in text  # no chart holds the latencies of two runs


def test_a_common_chart_of_latencies_says_that_they_were_measured_apart():
    section = accuracy_section([report(), report()])

    assert ["Top-1 accuracy over MACs", "Top-1 accuracy over latency"] == [chart.caption for chart in section.charts]
    assert "measured at different times" in " ".join(section.paragraphs)
    assert "no common front" not in " ".join(section.paragraphs)
