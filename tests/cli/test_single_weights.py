"""``sparsity`` as a user meets it: masks of single weights, what the report says of them, and mistakes."""

from __future__ import annotations

import json
import sys

import pytest
from safetensors.torch import load_file

from nni_prune_ext import cli
from nni_prune_ext.deployment import load_masks
from nni_prune_ext.experiments import search_space_for

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
PRUNE = ["prune", "tiny_for_masks:build", "--data", "tiny_for_masks:images", "--batch-size", "20", "--no-measure"]
SEARCH = [*PRUNE, "--method", "lottery_jackpots", "--option", "search_epochs=2", "--option", "tune_epochs=0"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the command line in an empty folder that has a tiny network."""
    (tmp_path / "tiny_for_masks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nni-prune-ext", *words])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    sys.modules.pop("tiny_for_masks", None)


def test_weights_are_masked_tuned_and_reported(tmp_path, command):
    code, said, problem = command(*SEARCH, "--target", "sparsity=0.6", "--epochs", "1", "--out", "out")

    assert (0, True) == (code, "target sparsity=0.6: asked 0.6, achieved 0.6" in said), problem
    folder = tmp_path / "out" / "lottery_jackpots"
    masks, report = load_masks(folder), json.loads((tmp_path / "out" / "report.json").read_text())
    weights = load_file(folder / "model.safetensors")
    assert {"0.weight", "3.weight"} == set(masks)
    assert all(not bool(weights[name][~mask].any()) for name, mask in masks.items())
    kept = {layer["layer"]: (layer["before"], layer["after"]) for layer in report["masked"]}
    assert {name: (mask.numel(), int(mask.sum())) for name, mask in masks.items()} == {
        f"{layer}.weight": counts for layer, counts in kept.items()
    }
    assert ["search", "search", "freeze", "recovery"] == [e["phase"] for e in report["curves"]["lottery_jackpots"]]
    assert all(epoch["metric"] is not None for epoch in report["curves"]["lottery_jackpots"])
    page = (tmp_path / "out" / "report.html").read_text()
    for words in ("Share of weights masked: target met", "Weights kept", "swaps_made", "Phases"):
        assert words in page, words


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--set", "method=l1", "--set", "options=null", "--target", "sparsity=0.6"], "a sparsity masks single"),
        (["--target", "sparsity=0.6", "--target", "macs=0.5"], "cannot be met together"),
        (["--target", "sparsity=1"], "out of range"),
        (["--target", "sparsity=0.6", "--option", "pattern=2:4"], "Ask for sparsity=0.5"),
        (["--target", "macs=0.5", "--option", "pattern=2:4"], "about single weights"),
        (["--target", "sparsity=0.5", "--option", "pattern=4:2"], "options.pattern"),
        (["--target", "sparsity=0.6", "--exclude", "*"], "no weight to mask"),
    ],
)
def test_a_mistake_is_exit_code_2_and_nothing_is_written(words, says, tmp_path, command):
    code, _, problem = command(*SEARCH, "--out", "out", *words)

    assert 2 == code
    assert says in problem
    assert not (tmp_path / "out").exists()


def test_a_mistake_that_the_method_finds_keeps_the_trained_base(tmp_path, command):
    trained = [*SEARCH, "--target", "sparsity=0.5", "--set", "train=1", "--out", "out"]

    refused, _, _ = command(*trained, "--set", "options.pattern=1:4")
    corrected, said, problem = command(*trained, "--set", "options.pattern=2:4", "--resume")

    assert (2, 0) == (refused, corrected), problem
    assert "target sparsity=0.5" in said


def test_there_is_no_plan_for_single_weights(command):
    code, _, problem = command("plan", "tiny_for_masks:build", "--input-shape", "1,1,8,8", "--target", "sparsity=0.5")

    assert 2 == code
    assert "--target: The target sparsity=0.5 masks single weights and removes no channel" in problem


def test_a_search_space_may_hold_several_sparsities_and_channels_beside_them():
    found = search_space_for(["lottery_jackpots"], ["sparsity=0.5", "sparsity=0.9", "macs=0.5"])

    assert ["sparsity=0.5", "sparsity=0.9", "macs=0.5"] == found["target"]["_value"]
