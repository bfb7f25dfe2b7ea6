"""`transfer` as a user meets it: from artefact folders to a table, a page and weights; continued; what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import nni_prune_ext as npe
from nni_prune_ext.cli.transfer import transfer
from nni_prune_ext.deployment import write_artefacts
from nni_prune_ext.errors import NniPruneExtError
from nni_prune_ext.export.artefact_folder import ModelSpec

QUICK = ("--epochs", "1", "--device", "cpu")
FACTORY = """\
from nni_prune_ext import build_model

def build(num_classes=10):
    print("imported")
    return build_model("resnet20", num_classes=num_classes)
"""


APP = typer.Typer()
APP.command()(transfer)


@dataclass(frozen=True)
class Ended:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str | Path, cwd: Path) -> Ended:
    """Runs the command in this process, as the command line does: 2 and one line for every mistake."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        result = CliRunner().invoke(APP, [str(own) for own in arguments])
    if isinstance(result.exception, NniPruneExtError):
        return Ended(2, result.stdout, f"error: {result.exception}\n")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ended(result.exit_code, result.stdout, result.stderr)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artefacts of a dense, a pruned and a masked network, images of two classes, and images with boxes."""
    root = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    dense, example = npe.build_model("resnet20", num_classes=4).eval(), torch.zeros(1, 3, 16, 16)
    spec = ModelSpec(
        model="resnet20", num_classes=4, input_shape=(1, 3, 16, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2)
    )
    pruned = npe.prune(dense, example, method="l1", target="macs=0.3")
    masks = {"conv1.weight": torch.rand(16, 3, 3, 3) < 0.5}
    masked = npe.build_model("resnet20", num_classes=4).eval()
    with torch.no_grad():
        masked.conv1.weight.mul_(masks["conv1.weight"])
    write_artefacts(dense, root / "dense", example, spec=spec)
    write_artefacts(pruned.model, root / "l1", example, plan=pruned.plan, spec=spec)
    nothing = npe.plan_from_channels(npe.trace_channel_groups(masked, example), {})
    write_artefacts(masked, root / "masked", example, plan=nothing, weight_masks=masks, spec=spec)
    pixels = spec.model_copy(update={"mean": (0.1, 0.1, 0.1)})
    write_artefacts(dense, root / "other_pixels", example, spec=pixels)
    shutil.copytree(root / "dense", root / "macs=0.5")
    write_artefacts(dense, root / "foreign", example, spec=spec.model_copy(update={"model": "my_nets:build"}))
    (root / "my_nets.py").write_text(FACTORY)
    generator = np.random.default_rng(0)
    for number in range(24):
        pixels = generator.integers(0, 100, (16, 16, 3), dtype=np.uint8)
        pixels[..., number % 2] += 100
        path = root / "images" / ("red", "green")[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    for number in range(6):
        (root / "voc" / "JPEGImages").mkdir(parents=True, exist_ok=True)
        (root / "voc" / "Annotations").mkdir(exist_ok=True)
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(root / "voc" / "JPEGImages" / f"{number}.jpg")
        (root / "voc" / "Annotations" / f"{number}.xml").write_text(
            "<annotation><object><name>cell</name><bndbox><xmin>4</xmin><ymin>4</ymin><xmax>20</xmax><ymax>20</ymax>"
            "</bndbox></object></annotation>"
        )
    return root


def test_networks_are_compared_in_a_table_a_page_and_numbers(place: Path, tmp_path: Path) -> None:
    found = run(
        f"wide={place / 'dense'}", place / "l1", "--data", f"imagefolder:{place / 'images'}", "--out", "out",
        "--seeds", "2", "--random-control", *QUICK, cwd=tmp_path,
    )  # fmt: skip

    assert 0 == found.returncode, found.stderr
    content = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert [(n, s) for n in ("wide", "l1", "random weights") for s in (0, 1)] == [
        (row["network"], row["seed"]) for row in content["rows"]
    ]
    facts = content["facts"]
    assert ([0.5, 0.4, 0.3], [0.2, 0.2, 0.2]) == (facts["mean"], facts["std"]), "what the networks were trained with"
    assert "torch" in content["environment"]
    for name in ("wide", "l1", "random weights"):
        assert name in found.stdout
        assert name in (tmp_path / "out" / "report.html").read_text()
    pruned, control = (content["rows"][k]["parameters"] for k in (2, 4))
    assert pruned == control != content["rows"][0]["parameters"]
    stored = safetensors.torch.load_file(tmp_path / "out" / "l1-seed1.safetensors")
    assert 2 == stored["linear.weight"].shape[0], "the new head has the classes of the images"


def test_boxes_are_reported_as_average_precision_in_json_lines(place: Path, tmp_path: Path) -> None:
    found = run(
        place / "l1", "--data", f"voc:{place / 'voc'}", "--out", "out", "--head", "ssdlite", "--maps", "2",
        "--image-size", "32", "--json", *QUICK, cwd=tmp_path,
    )  # fmt: skip

    assert 0 == found.returncode, found.stderr
    events = [json.loads(line) for line in found.stdout.splitlines()]
    assert "done" == events[-1]["event"]
    assert "AP" == events[-1]["metric"]
    assert {"AP", "AP50", "AP75", "AP cell"} == set(events[-1]["rows"][0]["metrics"])


def test_a_masked_network_stays_masked(place: Path, tmp_path: Path) -> None:
    found = run(place / "masked", "--data", f"imagefolder:{place / 'images'}", "--out", "out", *QUICK, cwd=tmp_path)

    assert 0 == found.returncode, found.stderr
    before = safetensors.torch.load_file(place / "masked" / "masks.safetensors")["conv1.weight"].bool()
    after = safetensors.torch.load_file(tmp_path / "out" / "masked-seed0.safetensors")["conv1.weight"]
    assert bool((after[~before] == 0).all())
    assert 0 < int((after == 0).sum()) < after.numel()


def test_the_random_control_of_a_masked_network_is_masked_too_and_new_for_every_seed(
    place: Path, tmp_path: Path
) -> None:
    found = run(
        place / "masked", "--data", f"imagefolder:{place / 'images'}", "--out", "out", "--random-control", "--seeds",
        "2", "--learning-rate", "1e-9", *QUICK, cwd=tmp_path,
    )  # fmt: skip

    assert 0 == found.returncode, found.stderr
    rows = json.loads((tmp_path / "out" / "transfer.json").read_text())["rows"]
    assert rows[0]["parameters"] == rows[2]["parameters"]
    one, two = (
        safetensors.torch.load_file(tmp_path / "out" / f"random weights-seed{seed}.safetensors")["conv1.weight"]
        for seed in (0, 1)
    )
    assert torch.equal(one == 0, two == 0)
    assert not torch.equal(one, two)


def test_every_option_of_the_training_reaches_it(place: Path, tmp_path: Path) -> None:
    found = run(
        place / "dense", "--data", f"voc:{place / 'voc'}", "--out", "out", "--optimizer", "sgd", "--learning-rate",
        "0.002", "--weight-decay", "0.3", "--precision", "bf16", "--channels-last", "--limit-images", "1",
        "--pyramid-channels", "24", "--maps", "2", "--head", "retinanet", "--batch-size", "1", "--image-size", "32,48",
        "--mean", "0.1,0.2,0.3", "--std", "0.4,0.5,0.6", *QUICK, cwd=tmp_path,
    )  # fmt: skip

    assert 0 == found.returncode, found.stderr
    facts = json.loads((tmp_path / "out" / "transfer.json").read_text())["facts"]
    training = facts["training"]
    assert ("sgd", 0.002, 0.3) == (training["optimizer"], training["learning_rate"], training["weight_decay"])
    assert ("bf16", True) == (training["precision"], training["channels_last"])
    assert {"train": 1, "val": 1, "test": 1} == facts["images"]
    assert (24, 2, "retinanet", 1, [3, 32, 48]) == tuple(
        facts[key] for key in ("pyramid_channels", "maps", "head", "batch_size", "input_shape")
    )
    assert ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]) == (facts["mean"], facts["std"])


def test_two_processes_write_one_comparison(place: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "nni_prune_ext",
        "transfer", str(place / "dense"), "--data", f"imagefolder:{place / 'images'}", "--out", "out", "--batch-size",
        "4", "--json", *QUICK,
    ]  # fmt: skip

    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)

    assert 0 == found.returncode, found.stderr
    assert 1 == sum('"event": "done"' in line for line in found.stdout.splitlines()), "one process speaks"
    assert {"dense-seed0.safetensors", "report.html", "state", "transfer.json"} == {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_a_folder_may_be_called_like_a_target_and_names_are_shown_as_they_are(place: Path, tmp_path: Path) -> None:
    found = run(
        "macs=0.5", "lambda[low]=l1", "--data", "imagefolder:images", "--out", tmp_path / "out", *QUICK, cwd=place
    )

    assert 0 == found.returncode, found.stderr
    assert "macs=0.5" in found.stdout
    assert "lambda[low]" in found.stdout


def test_overwriting_with_a_mistake_loses_nothing(place: Path, tmp_path: Path) -> None:
    arguments = (place / "dense", "--data", f"imagefolder:{place / 'images'}", "--out", "out", *QUICK)
    assert 0 == run(*arguments, cwd=tmp_path).returncode
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    assert 2 == run(*arguments, "--overwrite", "--head", "retinanet", cwd=tmp_path).returncode

    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_a_folder_is_continued_replaced_or_refused(place: Path, tmp_path: Path) -> None:
    arguments = (place / "dense", "--data", f"imagefolder:{place / 'images'}", "--out", "out", *QUICK)
    assert 0 == run(*arguments, cwd=tmp_path).returncode
    content = (tmp_path / "out" / "transfer.json").read_bytes()
    (tmp_path / "out" / "mine.txt").write_text("kept")

    again = run(*arguments, cwd=tmp_path)
    assert (2, True) == (again.returncode, "--resume" in again.stderr)
    other = run(*arguments, "--resume", "--batch-size", "4", cwd=tmp_path)
    assert 2 == other.returncode, other.stderr
    both = run(*arguments, "--resume", "--overwrite", cwd=tmp_path)
    assert 2 == both.returncode
    assert content == (tmp_path / "out" / "transfer.json").read_bytes()
    more = run(*arguments, "--resume", "--seeds", "2", cwd=tmp_path)
    assert 0 == more.returncode, more.stderr
    rows = json.loads((tmp_path / "out" / "transfer.json").read_text())["rows"]
    assert json.loads(content)["rows"][0] == rows[0]
    assert 2 == len(rows)
    anew = run(*arguments, "--overwrite", "--batch-size", "4", cwd=tmp_path)
    assert 0 == anew.returncode, anew.stderr
    assert 1 == len(json.loads((tmp_path / "out" / "transfer.json").read_text())["rows"])
    assert not (tmp_path / "out" / "dense-seed1.safetensors").exists()
    assert "kept" == (tmp_path / "out" / "mine.txt").read_text()


def test_a_foreign_folder_stays_as_it_is(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")

    for more in ((), ("--overwrite",), ("--resume",)):
        found = run(
            place / "dense", "--data", f"imagefolder:{place / 'images'}", "--out", "out", *more, *QUICK, cwd=tmp_path
        )
        assert 2 == found.returncode
        assert "thesis.txt" in found.stderr
    assert ["thesis.txt"] == [path.name for path in (tmp_path / "out").iterdir()]


def test_no_folder_decides_what_code_is_imported(place: Path, tmp_path: Path) -> None:
    arguments = (place / "foreign", "--data", f"imagefolder:{place / 'images'}", "--out", tmp_path / "out", *QUICK)

    def run(*given: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nni_prune_ext", "transfer", *(str(own) for own in given)]
        return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300, check=False)

    refused = run(*arguments)
    taken = run(*arguments, "--model", "my_nets:build")

    assert 2 == refused.returncode
    assert refused.stderr.startswith("error: ")
    assert "--model my_nets:build" in refused.stderr
    assert "imported" not in refused.stdout
    assert 0 == taken.returncode, taken.stderr


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no such folder": (["nowhere", "--data", "imagefolder:images"], "nowhere"),
    "no such data": (["dense", "--data", "imagefolder:nowhere"], "There is no folder 'nowhere'"),
    "no such boxes": (["dense", "--data", "voc:nowhere"], "no PASCAL VOC folder"),
    "a name twice": (["a=dense", "a=l1", "--data", "imagefolder:images"], "Two networks are called 'a'"),
    "a detector of classes": (["dense", "--data", "imagefolder:images", "--head", "retinanet"], "holds classes"),
    "an unknown head": (["dense", "--data", "voc:voc", "--head", "yolo"], "head is 'yolo'"),
    "a size that is none": (["dense", "--data", "voc:voc", "--image-size", "big"], "--image-size 'big'"),
    "a flat image of a class": (["dense", "--data", "imagefolder:images", "--image-size", "8,16"], "one number"),
    "networks for other pixels": (["dense", "other_pixels", "--data", "imagefolder:images"], "different mean"),
    "half a normalisation": (["dense", "--data", "imagefolder:images", "--mean", "0,0,0"], "expected both"),
    "no number": (["dense", "--data", "imagefolder:images", "--mean", "a,b,c", "--std", "1,1,1"], "Cannot read --mean"),
    "grey images": (["dense", "--data", "digits"], "digits"),
    "an unknown device": (["dense", "--data", "imagefolder:images", "--device", "tpu"], "device is 'tpu'"),
    "an unknown optimizer": (["dense", "--data", "imagefolder:images", "--optimizer", "lion"], "optimizer"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_told_and_leaves_nothing_behind(case: str, place: Path, tmp_path: Path) -> None:
    arguments, message = MISTAKES[case]

    found = run(*arguments, "--epochs", "1", "--out", tmp_path / "out", cwd=place)

    assert 2 == found.returncode, found.stderr
    assert message in found.stderr
    assert found.stderr.startswith("error: ")
    assert 1 == len(found.stderr.strip().splitlines())
    assert not (tmp_path / "out").exists()
