"""``gates specialise``: what it passes on, what it says, and what it says to mistakes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import Tensor

from nni_prune_ext import cli, ort_specialisation
from nni_prune_ext.export.gated_parity import GatedParity
from nni_prune_ext.ort_specialisation import Specialised

SIZE = 7
PARITY = GatedParity(9, 90, 1.0, 9, 3e-7, 0.5, 1e-4, True)
FOUND = Specialised(
    Path("cache/net.1.onnx"), Path("net.onnx"), None, 16, PARITY, 0.68, ("first",), {"second": "it has groups"}
)

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with pictures and the file of a network without gates."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / "pictures" / split / label).mkdir(parents=True)
            for number in range(5):
                pixels = random.integers(0, 256, (SIZE + 2, SIZE + 2, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pictures" / split / label / f"{number}.png")
    weight = numpy_helper.from_array(random.normal(0, 1, (4, 3, 3, 3)).astype(np.float32), "weight")
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, size, size])
        for name, channels, size in (("x", 3, SIZE), ("y", 4, SIZE - 2))
    ]
    graph = helper.make_graph([helper.make_node("Conv", ["x", "weight"], ["y"])], "net", ports[:1], ports[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), "net.onnx")
    return tmp_path


@pytest.fixture
def command(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    def invoke(*words: str) -> tuple[int, str, str]:
        given = ["nni-prune-ext", "gates", "specialise", "--data", "imagefolder:pictures", *words]
        monkeypatch.setattr(sys, "argv", given)
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return invoke


def test_a_network_without_gates_runs_as_it_is(command: Command, folder: Path) -> None:
    code, out, err = command("--onnx", "net.onnx", "--cache", "cache")

    assert (0, "") == (code, err)
    assert out.startswith("Run the portable file, net.onnx: ")
    assert not (folder / "cache").exists()


def test_without_an_entry_check_says_so(command: Command, folder: Path) -> None:
    code, out, err = command("--onnx", "net.onnx", "--cache", "cache", "--check", "--json")

    facts = json.loads(out)
    assert (0, "", "done", False, "net.onnx") == (code, err, facts["event"], facts["specialised"], facts["path"])
    assert facts["reason"]
    assert not (folder / "cache").exists()


def test_what_was_cached_is_told(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def specialised(portable: Path, images: Tensor, *, cache_folder: Path | None) -> Specialised:
        given.update(portable=portable, shape=tuple(images.shape), cache=cache_folder)
        return FOUND

    monkeypatch.setattr(ort_specialisation, "specialise_ort_cpu", specialised)

    code, out, err = command("--onnx", "net.onnx", "--cache", "cache", "--images", "9")
    assert (0, "") == (code, err)
    assert {"portable": Path("net.onnx"), "shape": (9, 3, SIZE, SIZE), "cache": Path("cache")} == given
    for part in ("cache/net.1.onnx: for this machine only", "blocks of 16", "100.0000% of the mask bits", "9 images"):
        assert part in out
    assert "takes × 0.68 of the portable file's time" in out
    assert "not in this layout: second, it has groups" in out

    command("--onnx", "net.onnx", "--limit-images", "6")
    assert (6, 3, SIZE, SIZE) == given["shape"]

    code, out, _ = command("--onnx", "net.onnx", "--json")
    assert given["cache"] is None
    assert json.loads(out) == {"event": "done", "specialised": True, **json.loads(json.dumps(FOUND.to_dict()))}


def test_check_makes_nothing_and_takes_what_is_there(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def opened(portable: Path, *, cache_folder: Path | None, images: Tensor | None) -> Specialised:
        assert images is not None
        given.update(portable=portable, images=len(images), cache=cache_folder)
        return replace(FOUND, latency_ratio=0.7)

    monkeypatch.setattr(ort_specialisation, "open_specialised", opened)
    monkeypatch.setattr(ort_specialisation, "specialise_ort_cpu", None)

    code, out, _ = command("--onnx", "net.onnx", "--check")

    assert 0 == code
    assert {"portable": Path("net.onnx"), "images": 10, "cache": None} == given
    assert "takes × 0.70" in out


def test_mistakes_are_told(command: Command) -> None:
    code, _, err = command("--onnx", "missing.onnx")
    assert (2, True) == (code, "'missing.onnx' cannot be read: No such file" in err)

    code, _, err = command("--onnx", "net.onnx", "--images", "3")
    assert 2 == code
    assert "--images" in err
