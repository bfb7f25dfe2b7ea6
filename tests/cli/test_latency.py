"""A latency target as a user meets it: options, recipe keys, what is said of it, and mistakes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from typing import ClassVar

import pytest
import torch
from torch import nn

from nni_prune_ext import cli
from nni_prune_ext.latency import start
from nni_prune_ext.latency.layers import find_layers
from nni_prune_ext.latency.stopwatch import LayerAt, NetworkTimes
from nni_prune_ext.recipes import load_recipe

MODULE = """
from torch import nn


def build(num_classes=10, in_channels=1):
    return nn.Sequential(
        nn.Conv2d(in_channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes),
    )
"""
MODEL = ["tiny_for_latency:build", "--input-shape", "1,1,8,8"]


class Stopwatch:
    """One millisecond per thousand weights of one position; in final measurements by ``late`` more."""

    late: ClassVar[list[float]] = []

    def __init__(self, model, example_inputs, conditions) -> None:
        self.model, self.inputs, self.conditions = model, example_inputs, conditions
        self.measured = self.from_cache = 0

    def layers_ms(self, layers: Iterable[LayerAt]) -> dict[LayerAt, float]:
        return {at: at[1] * at[2] / 1e3 for at in layers}

    def networks(self, networks: Mapping[str, nn.Module], *, as_shipped: bool = False) -> NetworkTimes:
        late, dense = self.late.pop(0) if as_shipped and self.late else 1.0, self._whole(self.model)
        shares = {name: late * self._whole(network) / dense for name, network in networks.items()}
        return NetworkTimes(dense, shares, 0.01, "cpu", 30, dict.fromkeys(networks, (2.0, 3.0)))

    def _whole(self, network: nn.Module) -> float:
        tensors = dict(network.named_parameters())
        widths = (layer.widths(tensors[layer.weight].shape) for layer in find_layers(network, self.inputs))
        return sum(read * written for read, written in widths) / 1e3


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the command line in an empty folder that has a tiny network and a stopwatch of known times."""
    (tmp_path / "tiny_for_latency.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(start, "Stopwatch", Stopwatch)

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
    sys.modules.pop("tiny_for_latency", None)


def test_a_plan_says_what_was_measured_and_what_would_go(command) -> None:
    code, said, problem = command("plan", *MODEL, "--target", "latency=0.5", "--multiple", "1")

    assert (0, True) == (code, "target latency=0.5: asked 1.36 ms, achieved" in said), problem
    assert "median on onnxruntime-cpu, batch 1, 1 thread, cpu time, A/A error 1.0 %" in said
    assert "cut by weight magnitude: predicted" in said
    assert "measuring whole networks" in problem


def test_a_plan_for_machines_holds_the_evidence(command) -> None:
    words = ("--target", "latency=1ms", "--target", "macs=0.9", "--batch", "2", "--percentile", "95", "--clock", "wall")
    code, said, problem = command("plan", *MODEL, *words, "--threads", "2", "--on", "torch-eager", "--json")

    assert 0 == code, problem
    found = json.loads(said)["latency"]
    assert {"runtime": "torch-eager", "batch": 2, "percentile": 95, "threads": 2, "clock": "wall"} == found[
        "conditions"
    ]
    assert 1.0 == found["asked_ms"]
    assert ["latency=1ms", "macs=0.9"] == [target["target"] for target in json.loads(said)["targets"]]


def test_a_run_reports_a_latency_that_was_met(command, tmp_path) -> None:
    code, said, problem = command("prune", *MODEL, "--target", "latency=0.5", "--no-measure", "--out", "out")

    assert (0, True) == (code, "target latency=0.5: asked 1.36 ms, achieved" in said), problem
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["latency_target"]["environment"]["cpu"]
    page = (tmp_path / "out" / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    for words in ("Latency: target met", "Asked for at most 1.36 ms (latency=0.5)", "Target: cut to the limits"):
        assert words in page, words
    recipe = (tmp_path / "out" / "recipe.yaml").read_text()
    assert "multiple" not in recipe
    assert load_recipe(tmp_path / "out" / "recipe.yaml").aims_at_latency
    again = command("run", "out/recipe.yaml", "--out", "again")
    assert 0 == again[0]
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("out", "again"))
    assert first["widths"] == second["widths"]


def test_a_latency_that_was_missed_ends_with_exit_code_1(command, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Stopwatch, "late", [1.2, 1.6])
    code, said, problem = command("prune", *MODEL, "--target", "latency=0.5", "--no-measure", "--out", "out")

    assert (1, True) == (code, ": missed by" in said), problem
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Latency: target MISSED" in page
    assert "above what was asked for" in page
    targets = json.loads((tmp_path / "out" / "report.json").read_text())["targets"]
    assert targets[0]["achieved"] == pytest.approx(1.2 * targets[0]["asked"], rel=0.03), "the better of two tries"


def last_lines(said: str) -> str:
    """Returns the line before the one that names the files."""
    assert said.splitlines()[-1].startswith("artefacts in ")
    return said.splitlines()[-2]


@pytest.mark.parametrize(
    ("late", "code", "verdict"),
    [([], 0, "): met"), ([1.2, 1.6], 1, "): MISSED, the latency is "), ([0.8, 0.7], 0, "): met, the latency is ")],
)
def test_the_last_lines_say_asked_and_achieved_and_how_it_was_measured(
    late, code, verdict, command, monkeypatch
) -> None:
    monkeypatch.setattr(Stopwatch, "late", list(late))
    ended, said, problem = command("prune", *MODEL, "--target", "latency=0.5", "--no-measure", "--out", "out")

    assert code == ended, problem
    found = re.fullmatch(
        r"latency: asked for at most 1\.36 ms, achieved ([0-9.]+) ms \(median on onnxruntime-cpu, batch 1, 1 thread, "
        r"cpu time, A/A error 1\.0 %, 30 rounds; p95 2 ms, p99 3 ms(\): .*)",
        last_lines(said),
    )
    assert found is not None, said
    assert found[2].startswith(verdict) if late else found[2] == verdict
    if late:
        off = 100 * (float(found[1]) / 1.36 - 1)
        share = re.search(r"the latency is ([0-9.]+) % (above|below) what was asked for: ", found[2])
        assert share is not None
        assert abs(off) == pytest.approx(float(share[1]), abs=0.5)
        assert (off > 0) == (share[2] == "above")


def test_the_percentiles_of_the_last_measurement_are_in_the_report(command, tmp_path) -> None:
    command("prune", *MODEL, "--target", "latency=0.5", "--no-measure", "--out", "out")

    found = json.loads((tmp_path / "out" / "report.json").read_text())["latency_target"]
    assert (2.0, 3.0) == (found["p95_ms"], found["p99_ms"])
    assert "p95 2 ms" in (tmp_path / "out" / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize("target", ["latency=500ms", "latency=1.0"])
def test_a_target_that_the_dense_network_meets_is_said_to_ask_for_nothing(target, command, tmp_path) -> None:
    code, said, problem = command("prune", *MODEL, "--target", target, "--no-measure", "--out", "out")

    words = "the dense network already meets it with 2.72 ms"
    assert 0 == code, problem
    assert f"warning: target {target.removesuffix('.0')}: {words}" in problem
    assert f"): met, {words}" in last_lines(said)
    page = (tmp_path / "out" / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert f"met, {words}" in page


def test_a_target_below_the_dense_latency_is_no_warning(command) -> None:
    code, said, problem = command("prune", *MODEL, "--target", "latency=0.99", "--no-measure", "--out", "out")

    assert 0 == code, problem
    assert "already meets" not in said + problem


def test_a_recipe_names_the_runtime_in_short_or_in_full(tmp_path) -> None:
    text = "model: resnet20\nmethod: l1\ntarget: latency=2.0ms\nlatency: {}\n"
    (tmp_path / "short.yaml").write_text(text.format("torch-eager"))
    (tmp_path / "full.yaml").write_text(text.format("{runtime: torch-eager, batch: 8}"))

    assert ("torch-eager", 1) == vars_of(load_recipe(tmp_path / "short.yaml"))
    assert ("torch-eager", 8) == vars_of(load_recipe(tmp_path / "full.yaml"))


def vars_of(recipe) -> tuple[str, int]:
    return recipe.latency.runtime, recipe.latency.batch


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--target", "latency=2"], "has no unit"),
        (["--target", "latency=2h"], "units us, ms and s"),
        (["--target", "latency=0.5", "--percentile", "42"], "--percentile is 42: expected 50, 95 or 99"),
        (["--target", "latency=0.5", "--batch", "0"], "--batch is 0: expected a value greater"),
        (["--target", "latency=0.5", "--threads", "4", "--clock", "cpu"], "it counts one thread only"),
        (["--target", "latency=0.5", "--clock", "sun"], "--clock is 'sun': expected 'auto', 'cpu' or 'wall'"),
        (["--target", "latency=0.5", "--on", "nonsense"], "nonsense"),
        (["--target", "latency=0.5", "--target", "sparsity=0.5"], "cannot be met together"),
        (["--target", "macs=0.5", "--on", "torch-eager"], "no target is about latency"),
        (["--target", "latency=0.5", "--method", "ftwt", "--data", "digits"], "switched per image"),
        (["--target", "latency=0.01"], "cannot be met"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(words, what, command, tmp_path) -> None:
    code, _, problem = command("prune", *MODEL, *words, "--out", "out")

    assert (2, True) == (code, what in problem), problem
    assert not list(tmp_path.glob("out/*"))


def test_a_runtime_that_is_not_here_says_what_to_install(command) -> None:
    if torch.cuda.is_available():
        pytest.skip("it is here")
    code, _, problem = command("plan", *MODEL, "--target", "latency=0.5", "--on", "onnxruntime-cuda")

    assert 2 == code
    assert problem.startswith("error: --on: Nothing can be measured on the runtime 'onnxruntime-cuda' here.")
