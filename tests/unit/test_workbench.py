"""The workbench: what a recipe leaves in its folder, how it is continued, and that the test split selects nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from nni_prune_ext.data.sources import DataSource, open_data
from nni_prune_ext.deployment import load_pruned
from nni_prune_ext.errors import CheckpointError, ConfigError, OutputError, RecipeError, TargetError
from nni_prune_ext.models.loading import build_model
from nni_prune_ext.recipes import Recipe, load_recipe, recipe_from
from nni_prune_ext.report import RunReport
from nni_prune_ext.training import EpochLog, Watcher
from nni_prune_ext.workbench import execute, prepare, work_to_do

NETWORK, DATA = "test_workbench:small_network", "test_workbench:few_digits"


def small_network(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )


def few_digits() -> DataSource:
    return open_data("digits", limit=80)


def digits_with_other_test_images() -> DataSource:
    source = few_digits()
    return dataclasses.replace(source, test=source.val)


class Interrupted(Exception):
    pass


class Stops(Watcher):
    """Ends the run after so many epochs, as a kill would."""

    def __init__(self, after: int) -> None:
        self.left = after

    def epoch(self, log: EpochLog) -> None:
        self.left -= 1
        if not self.left:
            raise Interrupted


def job(out: Path, **changes: object) -> Recipe:
    values: dict[str, object] = {
        "model": NETWORK,
        "data": {"source": DATA, "batch_size": 20},
        "train": {"epochs": 2, "learning_rate": 0.05},
        "method": "l1",
        "target": "macs=0.6",
        "recovery": 2,
        "measure": False,
        "out": out,
    }
    return recipe_from({**values, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = load_pruned(build_model(NETWORK, in_channels=1), folder, (torch.randn(1, 1, 16, 16),))
    return model.state_dict()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run, for tests that only look at it."""
    out = tmp_path_factory.mktemp("run") / "out"
    return execute(job(out, distillation={"weight": 0.5}))


def test_a_run_leaves_reports_recipe_and_artefacts_and_no_checkpoints(done):
    assert ["dense", "dense-trained-longer", "l1", "recipe.yaml", "report.html", "report.json"] == sorted(
        path.name for path in done.folder.iterdir()
    )
    assert {"report.json", "report.html", "plan.json", "manifest.json"} <= {
        path.name for path in (done.folder / "l1").iterdir()
    }
    assert [("dense", "dense"), ("dense-trained-longer", "control"), ("l1", "pruned")] == [
        (row.name, row.kind) for row in done.rows
    ]


def test_the_report_says_what_was_done(done):
    report = RunReport.load(done.folder)

    assert {"train": 2, "l1": 2, "dense-trained-longer": 2} == {name: len(c) for name, c in report.curves.items()}
    assert [("0", 8), ("3", 16)] == [(width.layer, width.before) for width in report.widths]
    assert any(width.after < width.before for width in report.widths)
    assert report.targets[0].met
    assert report.certificate is not None
    assert report.certificate.exact
    assert report.distillation == {"temperature": 4.0, "weight": 0.5, "features": [], "feature_weight": 100.0}


def test_the_recipe_in_the_folder_is_the_recipe_that_ran(done):
    recipe = load_recipe(done.folder / "recipe.yaml")

    assert recipe == job(done.folder, distillation={"weight": 0.5})


def test_the_selected_epoch_is_the_best_on_the_validation_split(done):
    report = RunReport.load(done.folder)

    for row, curve in (("dense", "train"), ("dense-trained-longer", "dense-trained-longer"), ("l1", "l1")):
        found = next(r for r in report.rows if r.name == row)
        assert max(log.metric for log in report.curves[curve]) == found.validation


def test_the_test_split_changes_nothing_but_the_numbers_about_it(done, tmp_path):
    other = execute(
        job(tmp_path / "out", distillation={"weight": 0.5}, data={"source": f"{DATA}", "batch_size": 20}, control=False)
    )
    swapped = execute(
        job(
            tmp_path / "swapped",
            distillation={"weight": 0.5},
            data={"source": "test_workbench:digits_with_other_test_images", "batch_size": 20},
            control=False,
        )
    )

    assert other.rows[-1].top1 != swapped.rows[-1].top1 or other.rows[0].top1 != swapped.rows[0].top1
    for name, tensor in weights(other.folder / "l1").items():
        torch.testing.assert_close(tensor, weights(swapped.folder / "l1")[name], rtol=0, atol=0)


@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_an_interrupted_run_goes_on_and_ends_the_same(after, done, tmp_path):
    recipe = job(tmp_path / "out", distillation={"weight": 0.5})
    with pytest.raises(Interrupted):
        execute(recipe, watcher=Stops(after))

    resumed = execute(recipe, resume=True)

    assert done.result is not None
    assert resumed.result is not None
    assert done.result.plan.removed == resumed.result.plan.removed
    for name, tensor in weights(done.folder / "l1").items():
        torch.testing.assert_close(tensor, weights(resumed.folder / "l1")[name], rtol=0, atol=0)
    assert [(r.name, r.top1, r.macs) for r in done.rows] == [(r.name, r.top1, r.macs) for r in resumed.rows]


def test_a_finished_run_is_not_repeated(done):
    before = {path: path.stat().st_mtime_ns for path in done.folder.rglob("*")}

    again = execute(job(done.folder, distillation={"weight": 0.5}), resume=True)

    assert again.already_done
    assert [row.top1 for row in done.rows] == [row.top1 for row in again.rows]
    assert before == {path: path.stat().st_mtime_ns for path in done.folder.rglob("*")}


def test_resume_with_another_recipe_says_what_differs(done, tmp_path):
    with pytest.raises(CheckpointError, match=r"recipe.recovery.epochs was 2, is 3"):
        execute(job(done.folder, distillation={"weight": 0.5}, recovery=3), resume=True)

    with pytest.raises(Interrupted):
        execute(job(tmp_path / "out"), watcher=Stops(1))
    with pytest.raises(CheckpointError, match=r"recipe.training.learning_rate was 0.01, is 0.5"):
        execute(job(tmp_path / "out", training={"learning_rate": 0.5}), resume=True)


def test_a_folder_with_checkpoints_is_refused_with_a_hint_and_replaced_when_asked(tmp_path):
    recipe = job(tmp_path / "out", train=None, recovery=1, control=False)
    with pytest.raises(Interrupted):
        execute(recipe, watcher=Stops(1))

    with pytest.raises(
        OutputError, match=r"--overwrite\. It holds the checkpoints of a run: go on with it with --resume"
    ):
        execute(recipe)
    with pytest.raises(ConfigError, match="at most one"):
        execute(recipe, resume=True, overwrite=True)

    done = execute(recipe.model_copy(update={"seed": 1}), overwrite=True)

    assert not (done.folder / "checkpoints").exists()
    assert 1 == RunReport.load(done.folder).seed


def test_checkpoints_stay_when_asked(tmp_path):
    recipe = job(tmp_path / "out", train=None, recovery=1, control=False, keep_checkpoints=True)

    execute(recipe)

    assert list((tmp_path / "out" / "checkpoints").rglob("identity.json"))
    assert execute(recipe, resume=True).already_done


def test_overwriting_spares_a_folder_that_is_not_ours(tmp_path):
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out" / "checkpoints" / "mine.txt").write_text("mine")

    execute(job(tmp_path / "out", train=None, recovery=1, control=False, keep_checkpoints=True), overwrite=True)

    assert "mine" == (tmp_path / "out" / "checkpoints" / "mine.txt").read_text()


def test_a_recipe_without_a_method_trains_and_delivers_the_dense_network(tmp_path):
    done = execute(
        job(tmp_path / "out", method=None, target=(), recovery=None),
    )

    assert ["dense"] == [row.name for row in done.rows]
    assert (tmp_path / "out" / "dense" / "model.onnx").is_file()
    assert 2 == len(RunReport.load(tmp_path / "out").curves["train"])
    report = json.loads((tmp_path / "out" / "dense" / "report.json").read_text())
    assert "dense" == report["rows"][0]["name"]


def test_without_training_no_checkpoints_are_made(tmp_path):
    done = execute(
        job(
            tmp_path / "out",
            train=None,
            recovery=None,
            data=None,
            model={"name": NETWORK, "input_shape": [1, 1, 16, 16]},
        )
    )

    assert ["dense", "l1"] == [row.name for row in done.rows]
    assert done.rows[-1].top1 is None


def test_a_target_out_of_reach_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TargetError):
        execute(job(tmp_path / "out", target="macs=0.0001"))

    assert not (tmp_path / "out").exists()


def test_a_recipe_without_a_folder_is_refused():
    with pytest.raises(RecipeError, match="out is missing"):
        execute(job(Path("x")).model_copy(update={"out": None}))


def test_work_to_do_counts_epochs_and_images(tmp_path):
    lines = work_to_do(prepare(job(tmp_path / "out", recovery=3)))

    assert "base training: 2 epochs, 160 images" in lines
    assert "recovery: 3 epochs, 240 images" in lines
    assert "in all: 8 epochs, 640 images" in lines


def test_opening_a_job_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    prepare(job(tmp_path / "out"))

    assert torch.equal(expected, torch.rand(3))


def test_going_on_in_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")

    with pytest.raises(OutputError, match=r"holds 'thesis.txt' and no run"):
        execute(job(tmp_path / "out"), resume=True)

    assert ["thesis.txt"] == [path.name for path in (tmp_path / "out").iterdir()]


def test_another_recipe_never_goes_on_in_an_interrupted_run_nor_removes_it(tmp_path):
    with pytest.raises(Interrupted):
        execute(job(tmp_path / "out", method=None, target=[], recovery=None, control=None), watcher=Stops(1))
    before = sorted(path.relative_to(tmp_path) for path in (tmp_path / "out" / "checkpoints").rglob("*.safetensors"))

    for changes in ({"train": None, "recovery": 1}, {"train": None, "recovery": None, "control": None}):
        with pytest.raises(CheckpointError, match=r"recipe\.method was None, is 'l1'"):
            execute(job(tmp_path / "out", **changes), resume=True)

    after = sorted(path.relative_to(tmp_path) for path in (tmp_path / "out" / "checkpoints").rglob("*.safetensors"))
    assert before == after != []


def test_an_interrupted_overwrite_is_continued_and_not_taken_for_the_old_run(tmp_path):
    recipe = job(tmp_path / "out", train=None, recovery=2, control=False)
    execute(recipe)
    with pytest.raises(Interrupted):
        execute(recipe, overwrite=True, watcher=Stops(1))

    again = execute(recipe, resume=True)

    assert not again.already_done
