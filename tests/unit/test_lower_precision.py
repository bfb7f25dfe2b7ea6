"""Rows and files of lower precision in a run: beside every network, in its manifest, and apart from pruning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from test_workbench import NETWORK, few_digits, job

from nni_prune_ext.data import Loaders
from nni_prune_ext.deployment import onnx_accuracy
from nni_prune_ext.errors import RecipeError
from nni_prune_ext.export.manifest import checked_manifest
from nni_prune_ext.lower_precision import drop_sentences
from nni_prune_ext.recipes import Recipe, recipe_from
from nni_prune_ext.report import Row, RunReport
from nni_prune_ext.training import Watcher
from nni_prune_ext.workbench import RunResult, calibration_images, execute, prepare


def loaders() -> Loaders:
    pairs = [(torch.randn(2, 1, 16, 16), torch.tensor([0, 1]))]
    return Loaders(pairs, pairs, pairs, pairs[0][0][:1], num_classes=10)


def recipe(out: Path, **changes: object) -> Recipe:
    measure = {"rounds": 2, "min_seconds": 0}
    return job(out, control=False, quantize={"precision": ["int8", "fp16"], "images": 40}, measure=measure, **changes)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return execute(recipe(tmp_path_factory.mktemp("run") / "out"))


NAMES = ["dense", "dense-int8", "dense-fp16", "l1", "l1-int8", "l1-fp16"]


def test_every_network_has_a_row_per_precision(done: RunResult) -> None:
    assert NAMES == [row.name for row in done.rows]
    assert ["dense", "l1"] == [row.name for row in done.networks]
    assert [done.folder / "dense", done.folder / "l1"] == done.artefacts
    assert ["fp32", "int8", "fp16"] == [row.precision for row in done.rows[3:]]
    assert [None, "l1", "l1"] == [row.of for row in done.rows[3:]]
    assert all(row.latency_ms and row.latency_ratio for row in done.rows)
    assert done.rows[5].onnx_bytes < done.rows[3].onnx_bytes


def test_accuracy_is_that_of_the_file(done: RunResult) -> None:
    test = done.rows[4]

    batches = prepare(recipe(done.folder)).test_batches()
    assert onnx_accuracy(done.folder / "l1" / "model.int8.onnx", batches) == test.top1_onnx
    assert test.top1 is None


def test_the_files_are_parts_of_the_folder_and_know_their_parent(done: RunResult) -> None:
    for name in ("dense", "l1"):
        manifest = checked_manifest(done.folder / name)
        file = onnx.load(str(done.folder / name / "model.int8.onnx"))
        facts = {entry.key: entry.value for entry in file.metadata_props}

        assert {"model.onnx", "model.int8.onnx", "model.fp16.onnx"} <= manifest.parts.keys()
        assert manifest.parts["model.onnx"].sha256 == facts["nni_prune_ext.parent_sha256"]
        assert 40 == json.loads(facts["nni_prune_ext.calibration"])["images"]
        assert name == facts["nni_prune_ext.variant"]
    assert {"nni_prune_ext.plan", "nni_prune_ext.certificate"} <= facts.keys()


def test_the_report_shows_both_losses_apart(done: RunResult) -> None:
    report = RunReport.load(done.folder)
    html = (done.folder / "report.html").read_text(encoding="utf-8")

    assert report.rows == done.rows
    assert ["dense", "l1"] == [row.name for row in report.networks]
    assert "Accuracy of every file" in html
    assert "by pruning" in html
    assert "not measured for" not in html  # parity is of float32 files


def test_a_finished_run_is_found_again_and_replaced_whole(done: RunResult, tmp_path: Path) -> None:
    assert execute(recipe(done.folder), resume=True).already_done

    out = Path(shutil.copytree(done.folder, tmp_path / "out"))
    execute(job(out, control=False), overwrite=True)

    assert [] == [path.name for path in (out / "l1").iterdir() if "int8" in path.name or "fp16" in path.name]


class Notes(Watcher):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def test_a_file_that_cannot_be_made_has_no_row_and_the_reason_is_told(tmp_path: Path) -> None:
    notes = Notes()
    dynamic = job(tmp_path / "out", control=False, quantize={"calibration": "dynamic"})

    rows = execute(dynamic, watcher=notes).rows

    assert ["dense", "l1"] == [row.name for row in rows]
    assert ["no row dense-int8: The calibration is dynamic", "no row l1-int8: The calibration is dynamic"] == [
        text.partition(",")[0] for text in notes.texts if text.startswith("no row")
    ]


def test_calibration_images_are_training_images_of_all_classes() -> None:
    source = few_digits()

    images = calibration_images(source, 30, seed=0)
    again = calibration_images(source, 30, seed=0)

    pixels = (images * torch.tensor(source.std).view(-1, 1, 1) + torch.tensor(source.mean).view(-1, 1, 1)) * 255
    train = {image.numpy().tobytes() for image in source.train.images}
    assert torch.equal(images, again)
    assert all(image.numpy().tobytes() in train for image in pixels.round().to(torch.uint8))
    assert 30 == len(images)
    assert len(source.train) == len(calibration_images(source, 10_000, seed=0))


def row(name: str, top1: float | None, **more: object) -> Row:
    return Row(name=name, macs=1, params=1, top1_onnx=top1, **more)  # type: ignore[arg-type]


def test_sentences_tell_the_two_losses_apart() -> None:
    rows = [
        row("dense", 0.9, kind="dense"),
        row("dense-int8", 0.895, kind="dense", precision="int8", of="dense"),
        row("l1", 0.87),
        row("l1-int8", 0.862, precision="int8", of="l1"),
        row("l1-fp16", None, precision="fp16", of="l1"),
    ]

    assert [
        "dense-int8: int8 -0.5 points of accuracy",
        "l1-int8: pruning -3.0 points, int8 -0.8 points of accuracy",
    ] == drop_sentences(rows)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"keep_float": ["nowhere*"]}, "quantize.keep_float: 'nowhere*' matches no convolution or linear layer"),
        ({"images": 3}, "quantize.images is 3: expected a value greater than or equal to 8"),
        ({"precision": "int4"}, "Did you mean 'int8'"),
    ],
)
def test_mistakes_are_found_before_any_work(tmp_path: Path, section: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        execute(job(tmp_path / "out", quantize=section))

    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_loaders_cannot_calibrate() -> None:
    values = {"model": NETWORK, "data": "test_lower_precision:loaders", "train": 1, "quantize": "int8"}

    with pytest.raises(RecipeError, match="asks for int8, but the data are loaders"):
        prepare(recipe_from(values))
