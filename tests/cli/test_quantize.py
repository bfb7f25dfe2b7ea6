"""``quantize`` as a user meets it: files, folders, what is told, and exit codes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nni_prune_ext import cli
from nni_prune_ext.data.sources import open_data
from nni_prune_ext.deployment import write_artefacts
from nni_prune_ext.errors import ArtefactError
from nni_prune_ext.export.artefact_folder import ModelSpec
from nni_prune_ext.export.manifest import checked_manifest

DATA = ["--data", "digits", "--image-size", "8", "--limit-images", "60", "--calibration-images", "16"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    source = open_data("digits", image_size=8)
    spec = ModelSpec(input_shape=(1, 1, 8, 8), mean=source.mean, std=source.std)
    folder = tmp_path_factory.mktemp("networks") / "net"
    write_artefacts(model, folder, torch.zeros(1, 1, 8, 8), spec=spec)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "net"))


def run(*arguments: str | Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["nni-prune-ext", "quantize", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out + captured.err


def test_a_folder_gets_the_file_and_its_manifest_knows_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for calibration in ("minmax", "entropy"):  # the second one replaces the first
        code, told = run(
            "--artefact", folder, *DATA, "--calibration", calibration, capsys=capsys, monkeypatch=monkeypatch
        )

        assert 0 == code
        assert "2 of 2 layers in int8" in told
        assert "in float32, " in told
        assert "VNNI" in told
        assert "model.int8.onnx" in checked_manifest(folder).parts


def test_a_file_becomes_fp16_and_machines_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "half.onnx"

    code, told = run("--onnx", folder / "model.onnx", "--out", out, "--precision", "fp16", "--json", capsys=capsys,
                     monkeypatch=monkeypatch)  # fmt: skip

    facts = json.loads(told.splitlines()[-1])
    assert (0, "done", str(out), "fp16", 2) == (
        code, facts["event"], facts["path"], facts["precision"], facts["reduced"],
    )  # fmt: skip
    assert facts["parity"]["passed"]
    assert "slower" in facts["advice"]
    assert out.is_file()


MISTAKES = {
    "": "Neither of --onnx and --artefact was given",
    "--onnx NET/model.onnx --artefact NET": "Both of --onnx and --artefact were given",
    "--onnx NET/model.onnx": "without --out",
    "--artefact NET --out q.onnx": "--out was given with --artefact",
    "--artefact NET --precision int4": "--precision is 'int4', expected int8 or fp16",
    "--artefact NET": "needs images and got none, expected 8 or more from the training data. Pass images",
    "--artefact NET --calibration max": "The calibration is 'max', expected minmax",
    "--artefact NET --data digits": "expected float32 (N, 1, 8, 8)",
    "--artefact NET DATA --keep-float nowhere": "matches no convolution or matrix product",
    "--onnx NET/model.json --out q.onnx --data digits": "is damaged or no ONNX file",
    "--artefact NET/nothing": "holds no manifest.json",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_end_with_two_and_change_nothing(
    folder: Path, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(path.name for path in folder.iterdir())
    arguments = words.replace("DATA", " ".join(DATA)).replace("NET", str(folder)).split()

    code, told = run(*arguments, capsys=capsys, monkeypatch=monkeypatch)

    assert 2 == code
    assert MISTAKES[words] in told
    assert before == sorted(path.name for path in folder.iterdir())
    checked_manifest(folder)


def test_a_file_that_loses_too_much_ends_with_one(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, told = run("--artefact", folder, *DATA, "--max-drop", "-1", capsys=capsys, monkeypatch=monkeypatch)

    assert 1 == code
    assert "points of accuracy" in told
    checked_manifest(folder)


def test_a_damaged_folder_is_refused_first(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"more")

    code, told = run("--artefact", folder, *DATA, capsys=capsys, monkeypatch=monkeypatch)

    assert 2 == code
    assert "is damaged or of another run" in told
    with pytest.raises(ArtefactError):
        checked_manifest(folder)
