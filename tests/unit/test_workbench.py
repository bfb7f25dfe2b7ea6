"""The workbench: what a recipe leaves in its folder, how it is continued, and that the test split selects nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nni_prune_ext.data import DataSource, ImageArrays, Loaders
from nni_prune_ext.data.sources import open_data
from nni_prune_ext.deployment import load_pruned
from nni_prune_ext.errors import (
    ArtefactError,
    CheckpointError,
    ConfigError,
    OutputError,
    RecipeError,
    TargetError,
)
from nni_prune_ext.models.loading import build_model
from nni_prune_ext.recipes import Recipe, load_recipe, recipe_from
from nni_prune_ext.report import RunReport
from nni_prune_ext.training import EpochLog, Watcher
from nni_prune_ext.workbench import check_recipe_survives, execute, prepare, work_to_do
from nni_prune_ext.workbench.run_lock import LOCK, check_free, locked

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


def digits_with_another_pixel() -> DataSource:
    source = few_digits()
    images = source.val.images.clone()
    images[0, 0, 0, 0] ^= 1
    return dataclasses.replace(source, val=ImageArrays(images, source.val.labels))


CHANGED = {"pixel": False}


def digits_that_change() -> DataSource:
    return digits_with_another_pixel() if CHANGED["pixel"] else few_digits()


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.head(self.deep(self.body(images)))}


def scenes(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    images = torch.randn(count, 4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return [{"image": one, "mask": (one[:, 0] > 0).long()} for one in images]


def scene_loaders() -> Loaders:
    return Loaders(scenes(4, 0), scenes(2, 1), scenes(3, 2), torch.randn(1, 1, 8, 8))


def scene_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["image"])["out"], batch["mask"])


def loss_without_gradient(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    return scene_loss(model, batch).item()


def share_of_right_pixels(model: nn.Module, batches) -> torch.Tensor:
    assert not model.training
    return torch.stack([(model(b["image"])["out"].argmax(1) == b["mask"]).float().mean() for b in batches]).mean()


def pixel_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return model(batch[0])["out"].square().mean()


def broken_metric(model: nn.Module, batches) -> float:
    raise KeyError("mask")


def no_number(model: nn.Module, batches) -> str:
    return "good"


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
    settings = {"distillation": {"weight": 0.5}, "limits": {"multiple": 1}, "control": False}
    other = execute(job(tmp_path / "out", **settings))
    swapped = execute(
        job(
            tmp_path / "swapped",
            **settings,
            data={"source": "test_workbench:digits_with_other_test_images", "batch_size": 20},
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
    with pytest.raises(CheckpointError, match=r"recipe.train.learning_rate was 0.05, is 0.5"):
        execute(job(tmp_path / "out", train={"epochs": 2, "learning_rate": 0.5}), resume=True)


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
        with pytest.raises(CheckpointError, match=r"recipe\.train was .*, is None"):
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


SEGMENTATION = {
    "model": "test_workbench:Segmenter",
    "data": "test_workbench:scene_loaders",
    "loss": "test_workbench:scene_loss",
    "metric": "test_workbench:share_of_right_pixels",
}


def test_a_segmentation_network_is_trained_pruned_and_reported_by_its_own_metric(tmp_path):
    done = execute(job(tmp_path / "out", **SEGMENTATION, measure={"rounds": 2, "min_seconds": 0}))

    assert ["dense", "dense-trained-longer", "l1"] == [row.name for row in done.rows]
    assert all(0 < row.top1 <= 1 and 0 < row.validation <= 1 and row.parity is not None for row in done.rows)
    assert all(row.latency_ms for row in done.rows)
    assert {None} == {row.top1_onnx for row in done.rows}
    assert done.caption.endswith("; in the columns top-1: test_workbench:share_of_right_pixels")
    curve = RunReport.load(done.folder).curves["train"]
    assert max(log.metric for log in curve) == done.rows[0].validation
    assert "base training: 2 epochs, 8 batches" in work_to_do(prepare(job(tmp_path / "x", **SEGMENTATION)))


def pair_loaders() -> Loaders:
    images = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    pairs = [(images[i : i + 8], torch.arange(8) % 2) for i in (0, 8, 16)]
    return Loaders(pairs, pairs, pairs, images[:1], num_classes=2)


def test_loaders_of_images_and_labels_are_measured_like_images_in_memory(tmp_path):
    done = execute(job(tmp_path / "out", data="test_workbench:pair_loaders", control=False))

    assert all(row.top1 is not None for row in done.rows)
    assert [row.top1 for row in done.rows] == [row.top1_onnx for row in done.rows]
    assert 2 == prepare(job(tmp_path / "x", data="test_workbench:pair_loaders")).job.spec.num_classes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"metric": None}, r"Top-1 accuracy is the metric where none is named, but a batch is a dict.*--metric"),
        ({"metric": None, "data": DATA, "loss": "test_workbench:pixel_loss"}, r"but the model returns a dict"),
        ({"metric": "test_workbench:broken_metric"}, r"'test_workbench:broken_metric' failed on one batch, a dict"),
        ({"metric": "test_workbench:no_number"}, r"no_number' returned a str, expected one number"),
        ({"metric": "test_workbench:nothing"}, r"test_workbench:nothing' cannot be imported"),
        ({"loss": None}, r"The loss 'cross-entropy' failed on one batch, a dict"),
        (
            {"loss": "test_workbench:loss_without_gradient"},
            r"returned a float, expected a scalar tensor with a gradient",
        ),
        ({"distillation": {"features": ["deeper"]}}, r"feature 'deeper' is not a module of Segmenter"),
    ],
)
def test_a_loss_or_metric_that_does_not_fit_is_refused_before_any_work(changes, expected, tmp_path):
    with pytest.raises((RecipeError, ConfigError), match=expected):
        execute(job(tmp_path / "out", **{**SEGMENTATION, **changes}))

    assert not (tmp_path / "out").exists()


class Notes(Watcher):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "macs=0.7"},
        {"distillation": {"weight": 0.3}},
        {"method": "l2"},
        {"training": {"gamma": 0.2}},
    ],
    ids=["target", "distillation", "method", "training"],
)
def test_a_correction_of_what_follows_keeps_the_base_training(changes, tmp_path):
    with pytest.raises(Interrupted):
        execute(job(tmp_path / "out"), watcher=Stops(2))
    notes = Notes()

    done = execute(job(tmp_path / "out", **changes), resume=True, watcher=notes)

    assert done.met
    assert any("continued from checkpoint" in text and "'train'" in text for text in notes.texts)


def test_a_correction_of_a_stage_that_has_begun_says_what_differs_and_what_can_be_kept(tmp_path):
    with pytest.raises(Interrupted):
        execute(job(tmp_path / "out"), watcher=Stops(3))

    with pytest.raises(CheckpointError, match=r"gamma was 0.1, is 0.2.*delete '.*prune' and resume.*--overwrite"):
        execute(job(tmp_path / "out", training={"gamma": 0.2}), resume=True)


def test_the_control_is_trained_for_all_planned_epochs_whatever_the_patience(tmp_path):
    training = {"patience": 1, "learning_rate": 1e-9}

    done = execute(job(tmp_path / "out", train=None, recovery=4, training=training))

    curves = RunReport.load(done.folder).curves
    assert (2, 4) == (len(curves["l1"]), len(curves["dense-trained-longer"]))


def test_data_that_changed_is_refused_on_resume(tmp_path, monkeypatch):
    recipe = job(tmp_path / "out", data={"source": "test_workbench:digits_that_change", "batch_size": 20})
    with pytest.raises(Interrupted):
        execute(recipe, watcher=Stops(1))
    monkeypatch.setitem(CHANGED, "pixel", True)

    with pytest.raises(CheckpointError, match=r"images\.val was '\w+', is '\w+'"):
        execute(recipe, resume=True)


@pytest.mark.parametrize("lost", ["report.html", "l1/model.onnx", "dense/manifest.json"])
def test_a_finished_run_that_is_no_longer_whole_is_told(lost, tmp_path):
    recipe = job(tmp_path / "out", train=None, recovery=1, control=False)
    execute(recipe)
    (tmp_path / "out" / lost).unlink()

    with pytest.raises(ArtefactError, match=rf"no longer whole: .*{Path(lost).name}.*--overwrite"):
        execute(recipe, resume=True)


def test_a_finished_run_that_is_no_longer_whole_is_delivered_again_from_kept_checkpoints(tmp_path):
    recipe = job(tmp_path / "out", train=None, recovery=1, control=False, keep_checkpoints=True)
    first, notes = execute(recipe), Notes()
    (tmp_path / "out" / "l1" / "model.onnx").unlink()

    again = execute(recipe, resume=True, watcher=notes)

    assert not again.already_done
    assert any("no longer whole" in text for text in notes.texts)
    assert [row.top1 for row in first.rows] == [row.top1 for row in again.rows]
    assert execute(recipe, resume=True).already_done


def test_a_second_run_on_the_same_folder_is_refused_with_the_number_of_the_process(tmp_path):
    out = tmp_path / "out"
    with locked(out), pytest.raises(OutputError, match=rf"in use by process {os.getpid()} on "):
        execute(job(out), overwrite=True)

    assert not out.exists()


HOLDS_A_LOCK = """
import sys, time
from pathlib import Path
from nni_prune_ext.workbench.run_lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_killed_process_is_free_even_before_anybody_has_waited_for_it(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDS_A_LOCK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert "locked\n" == holder.stdout.readline()
    with pytest.raises(OutputError, match=rf"in use by process {holder.pid} on "):
        check_free(tmp_path)

    holder.kill()
    while holder.stdout.read():  # its end closes the pipe; the process is not reaped yet
        pass

    with locked(tmp_path):
        assert os.getpid() == json.loads((tmp_path / LOCK).read_text())["pid"]
    holder.wait()


def test_an_empty_lock_that_a_kill_left_is_taken_over(tmp_path):
    (tmp_path / LOCK).touch()

    check_free(tmp_path)

    assert not (tmp_path / LOCK).exists()


def test_a_run_that_fails_leaves_no_lock(tmp_path):
    with pytest.raises(Interrupted):
        execute(job(tmp_path / "out"), watcher=Stops(1))

    assert not (tmp_path / "out" / LOCK).exists()


@pytest.mark.parametrize("file", ["recipe.yaml", "checkpoints/mine.yaml", "l1/mine.yaml"])
def test_a_recipe_in_the_folder_that_it_replaces_is_refused(file, tmp_path):
    with pytest.raises(RecipeError, match="lies in the folder .* that --overwrite replaces"):
        check_recipe_survives(tmp_path / "out" / file, tmp_path / "out")

    check_recipe_survives(tmp_path / "recipe.yaml", tmp_path / "out")
    check_recipe_survives(tmp_path / "out" / "mine.yaml", tmp_path / "out")
