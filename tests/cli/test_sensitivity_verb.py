"""``sensitivity``: the files that it writes, how it goes on, what it says to machines and to mistakes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nni_prune_ext import cli
from nni_prune_ext.allocation import Limits

MODULE = """
from torch import nn
from nni_prune_ext.data.sources import open_data


def build(num_classes=10, in_channels=1):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )


def images():
    return open_data("digits", limit=80)
"""
CALL = ("sensitivity", "tiny_for_sensitivity:build", "--data", "tiny_for_sensitivity:images", "--out", "out")

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    (tmp_path / "tiny_for_sensitivity.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def invoke(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nni-prune-ext", *words])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return invoke


def test_numbers_limits_and_page_are_written(command: Command) -> None:
    code, out, err = command(*CALL, "--ratio", "0.5", "--max-drop", "1", "--recalibrate", "1")
    assert code == 0, err
    assert {"sensitivity.json", "limits.json", "nni_config.json", "sensitivity.html"} == {
        path.name for path in Path("out").iterdir()
    }
    limits = Limits.model_validate_json(Path("out/limits.json").read_text())
    assert {name: own.max_ratio for name, own in limits.layers.items()} == {"0": 0.5, "3": 0.5}
    assert "2 of 2: 3 without 50%" in err
    assert "limits.json" in out
    assert json.loads(Path("out/sensitivity.json").read_text())["job"]["data"] == "80 validation images of digits"


def test_a_second_call_measures_nothing_again_and_draws_other_limits(command: Command) -> None:
    assert command(*CALL, "--ratio", "0.5", "--max-drop", "1")[0] == 0
    before = Path("out/sensitivity.json").read_bytes()
    code, out, _ = command(*CALL, "--ratio", "0.5", "--max-drop", "0", "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [event["event"] for event in events] == ["point", "point", "done"]
    assert Path("out/sensitivity.json").read_bytes() == before
    limits = Limits.model_validate_json(Path("out/limits.json").read_text())
    assert {n: own.max_ratio for n, own in limits.layers.items()} == pytest.approx(events[-1]["largest_ratios"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ratio", "1.5"), "ratio 1.5 is out of range"),
        (("--max-drop", "-1"), "largest drop is -1"),
        (("--method", "ftwt"), "has no scores"),
        (("--on", "onnxruntime-cuda"), "onnxruntime-cuda cannot be used here"),
        (("--exclude", "nothing"), "matches no layer"),
    ],
)
def test_mistakes_end_with_2_and_leave_nothing(command: Command, words: tuple[str, ...], message: str) -> None:
    code, _, err = command(*CALL, *words)
    assert code == 2
    assert message in err
    assert not Path("out/limits.json").exists()


def test_another_job_in_the_folder_is_refused(command: Command) -> None:
    assert command(*CALL, "--ratio", "0.5")[0] == 0
    before = Path("out/sensitivity.json").read_bytes()
    code, _, err = command(*CALL, "--ratio", "0.5", "--method", "l2")
    assert code == 2
    assert "method was" in err
    assert Path("out/sensitivity.json").read_bytes() == before
