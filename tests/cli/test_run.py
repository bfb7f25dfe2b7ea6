"""``run``, and ``prune`` as the same thing in other words: exit codes, JSON lines, dry runs, resuming."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nni_prune_ext import cli
from nni_prune_ext.cli.job import tell_json
from nni_prune_ext.errors import (
    CertificateError,
    CheckpointError,
    ConfigError,
    ExportError,
    ParityError,
    RecipeError,
    TargetError,
    TrainingError,
)
from nni_prune_ext.recipes import load_recipe

RECIPE = """\
model: tiny_for_run:build
data: {source: "tiny_for_run:images", batch_size: 20}
method: l1
target: macs=0.6
training: {learning_rate: 0.02, warmup_epochs: 0.5}
recovery: 2
distillation: {weight: 0.5}
measure: false
out: out
"""
SAME_AS_OPTIONS = [
    *("prune", "tiny_for_run:build", "--data", "tiny_for_run:images", "--batch-size", "20", "--target", "macs=0.6"),
    *("--learning-rate", "0.02", "--warmup-epochs", "0.5", "--epochs", "2", "--distill", "0.5", "--no-measure"),
]
MODULE = '''
from torch import nn
from nni_prune_ext.data.sources import open_data
from nni_prune_ext.methods.base import MethodSpec, NoOptions, Outcome, Phase, PruningMethod
from nni_prune_ext.plan import PruningPlan, plan_from_channels


def build(num_classes=10, in_channels=1):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )


def images():
    return open_data("digits", limit=80)


class TooLittle(PruningMethod):
    """Removes one channel, whatever is asked for."""

    def __init__(self, options):
        pass

    def phases(self):
        return [Phase("only")]

    def finish(self, context):
        return Outcome(plan_from_channels(context.groups, {context.groups.groups[0].name: [0]}))


TOO_LITTLE = MethodSpec("too-little", "Removes one channel.", "none", NoOptions, TooLittle)
'''
TIMES = ("seconds", "latency_ms", "latency_ratio")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder with a recipe and a module with a tiny network."""
    (tmp_path / "tiny_for_run.py").write_text(MODULE)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("tiny_for_run", None)


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nni-prune-ext", *words])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def rows_without_times(run: Path) -> list[dict[str, object]]:
    rows = json.loads((run / "report.json").read_text())["rows"]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts)


def test_prune_is_run_with_the_recipe_that_its_options_say(folder, command):
    by_recipe = command("run", "recipe.yaml")
    by_options = command(*SAME_AS_OPTIONS, "--out", "other")

    assert (0, 0) == (by_recipe[0], by_options[0]), by_recipe[2] + by_options[2]
    assert rows_without_times(folder / "out") == rows_without_times(folder / "other")
    assert (folder / "out" / "recipe.yaml").read_text() == (folder / "other" / "recipe.yaml").read_text().replace(
        "out: other", "out: out"
    )


@pytest.mark.parametrize("words", [["run", "recipe.yaml"], [*SAME_AS_OPTIONS, "--out", "out"]], ids=["run", "prune"])
def test_a_dry_run_shows_the_whole_recipe_and_the_work_and_writes_nothing(words, folder, command):
    before = files_of(folder)

    code, out, _ = command(*words, "--dry-run")

    assert 0 == code
    assert before == files_of(folder)
    assert "# recovery: 2 epochs, 160 images" in out
    assert "# in all: 4 epochs, 320 images" in out
    (folder / "shown.yaml").write_text(out)
    assert load_recipe(folder / "recipe.yaml") == load_recipe(folder / "shown.yaml")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--set", "training.learning_rate=-1"], "--set training.learning_rate=-1: training.learning_rate is -1"),
        (["--set", "target=macs=0.0001"], "cannot be met"),
        (["--set", "data.source=nowhere"], "There is no data source 'nowhere'"),
        (["--set", "model=resnet21"], "id you mean"),
        (["--set", "model.weights=none.pt"], "none.pt"),
        (["--set", "limits.exclude=[nothing]"], "matches no layer"),
        (["--set", "loss=tiny_for_run:none"], "tiny_for_run:none"),
    ],
)
def test_a_dry_run_finds_mistakes(words, expected, folder, command):
    before = files_of(folder)

    code, out, err = command("run", "recipe.yaml", "--dry-run", *words)

    assert (2, "") == (code, out)
    assert err.startswith("error: ")
    assert expected in err
    assert before == files_of(folder)


def test_a_dry_run_finds_a_folder_that_is_taken(folder, command):
    (folder / "out").mkdir()
    (folder / "out" / "thesis.txt").write_text("mine")

    assert 2 == command("run", "recipe.yaml", "--dry-run")[0]
    assert 0 == command("run", "recipe.yaml", "--dry-run", "--overwrite")[0]
    assert ["thesis.txt"] == [path.name for path in (folder / "out").iterdir()]


def test_a_plan_for_machines_is_one_object(folder, command):
    words = ["plan", "tiny_for_run:build", "--input-shape", "1,1,16,16", "--target", "macs=0.6", "--json"]

    code, out, _ = command(*words)

    found = json.loads(out)
    assert (0, "plan") == (code, found["event"])
    assert [("0", 8), ("3", 16)] == [(group["root"], group["channels"]) for group in found["groups"]]
    assert sum(group["removed"] for group in found["groups"]) > 0
    assert found["targets"][0]["met"]


def test_a_dry_run_for_machines_is_one_object(folder, command):
    _, out, _ = command("run", "recipe.yaml", "--dry-run", "--json", "--seed", "3")

    found = json.loads(out)

    assert ("dry-run", 3) == (found["event"], found["recipe"]["seed"])


def test_events_for_machines_are_one_object_per_line_and_the_last_says_what_came_of_it(folder, command):
    code, out, err = command("run", "recipe.yaml", "--json", "--out", "there", "--set", "control=false")

    events = [json.loads(line) for line in out.splitlines()]

    assert (0, "") == (code, err)
    assert {"phase", "epoch", "note", "done"} == {event["event"] for event in events}
    assert "done" == events[-1]["event"]
    assert ["dense", "l1"] == [row["name"] for row in events[-1]["rows"]]
    assert events[-1]["met"]
    assert all(Path(path).exists() for path in (events[-1]["report"], events[-1]["report_page"]))
    assert not (folder / "out").exists()


def test_a_finished_run_is_already_done(folder, command):
    command("run", "recipe.yaml")
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")}

    resumed = command("run", "recipe.yaml", "--resume")
    refused = command("run", "recipe.yaml")
    other = command("run", "recipe.yaml", "--resume", "--set", "recovery=3")

    assert 0 == resumed[0]
    assert "already done" in resumed[1]
    assert 2 == refused[0]
    assert "--overwrite" in refused[2]
    assert 2 == other[0]
    assert "recipe.recovery.epochs was 2, is 3" in other[2]
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")}


def test_a_missed_target_is_delivered_told_and_exit_code_1(folder, command):
    code, out, _ = command("run", "recipe.yaml", "--set", "method=tiny_for_run:TOO_LITTLE")

    assert 1 == code
    assert ": missed by " in out
    assert (folder / "out" / "too-little" / "model.onnx").is_file()


def test_training_that_fails_is_exit_code_1_and_can_be_resumed(folder, command):
    code, _, err = command("run", "recipe.yaml", "--set", "training.learning_rate=1e30")

    assert 1 == code
    assert "The loss is" in err
    assert "Lower the learning rate" in err
    assert 2 == command("run", "recipe.yaml")[0]


PLACES = {
    "model: tiny_for_run:build": ("model: resnet21", "recipe.yaml:1: model.name: There is no built-in model"),
    'source: "tiny_for_run:images"': ("source: nowhere", "recipe.yaml:2: data.source: There is no data source"),
    "method: l1": ("method: l1\nloss: tiny_for_run:none", "recipe.yaml:4: loss: 'tiny_for_run:none' cannot be"),
    "recovery: 2": (
        "recovery: 2\nmetric: tiny_for_run:TOO_LITTLE",
        "recipe.yaml:7: metric: 'tiny_for_run:TOO_LITTLE' is a",
    ),
    "target: macs=0.6": ("target: macs=0.0001", "recipe.yaml:4: target: "),
    "measure: false": (
        "measure: false\nlimits:\n  layers:\n    nothing: {max_ratio: 0.1}",
        "recipe.yaml:11: limits.layers.nothing: The limit for 'nothing' matches no layer",
    ),
    "distillation: {weight: 0.5}": (
        "distillation:\n  features: [deep]",
        "recipe.yaml:8: distillation.features: The distillation feature 'deep' is not a module",
    ),
}


@pytest.mark.parametrize("part", PLACES)
def test_what_only_the_model_or_the_data_can_tell_is_named_with_key_and_line_too(part, folder, command):
    text, expected = PLACES[part]
    (folder / "recipe.yaml").write_text(RECIPE.replace(part, text))

    code, _, err = command("run", "recipe.yaml", "--dry-run")

    assert 2 == code
    assert err.startswith(f"error: {expected}")


def test_a_mistake_in_an_option_is_named_with_the_option(folder, command):
    code, _, err = command(*SAME_AS_OPTIONS, "--out", "out", "--target", "macs=0.0001")

    assert 2 == code
    assert err.startswith("error: --target: ")


def test_the_recipe_of_a_run_is_not_overwritten_by_itself(folder, command):
    (folder / "out").mkdir()
    (folder / "recipe.yaml").rename(folder / "out" / "recipe.yaml")

    code, _, err = command("run", "out/recipe.yaml", "--overwrite")

    assert 2 == code
    assert "lies in the folder 'out' that --overwrite replaces" in err
    assert RECIPE == (folder / "out" / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "kind", "expected"),
    [
        (["run", "recipe.yaml", "--json", "--set", "seed=-1"], "RecipeError", 2),
        (["run", "recipe.yaml", "--json", "--set", "training.learning_rate=1e30"], "TrainingError", 1),
        (["run", "--json", "--no-such-option"], "NoSuchOption", 2),
        (["run", "--json"], "MissingParameter", 2),
    ],
)
def test_every_failure_is_one_object_for_machines_as_well(words, kind, expected, folder, command):
    code, out, err = command(*words)

    event = json.loads(out.splitlines()[-1])
    assert (expected, "error", kind, expected) == (code, event["event"], event["kind"], event["exit_code"])
    assert event["message"]
    assert err


def test_a_number_that_json_does_not_have_is_null(capsys):
    tell_json("done", rows=[{"top1": float("nan"), "macs": 3}])

    assert {"event": "done", "rows": [{"top1": None, "macs": 3}]} == json.loads(capsys.readouterr().out)


def test_a_failure_that_nobody_expected_is_told_to_machines_and_keeps_its_traceback(monkeypatch, command, capsys):
    def fail(standalone_mode: bool) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(cli, "app", fail)

    with pytest.raises(ZeroDivisionError):
        command("run", "--json")

    event = {"event": "error", "kind": "ZeroDivisionError", "message": "by zero", "exit_code": 1}
    assert event == json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (CertificateError, 1),
        (ParityError, 1),
        (TrainingError, 1),
        (ExportError, 2),
        (TargetError, 2),
        (RecipeError, 2),
        (ConfigError, 2),
        (CheckpointError, 2),
    ],
)
def test_honest_failures_are_told_from_mistakes_by_the_exit_code(error, expected, monkeypatch, command):
    def fail(standalone_mode: bool) -> None:
        raise error("what was wrong")

    monkeypatch.setattr(cli, "app", fail)

    assert (expected, "", "error: what was wrong\n") == command()


def test_a_killed_run_goes_on_and_ends_the_same(folder, command):
    reference = command("run", "recipe.yaml", "--out", "reference", "--set", "recovery=6")
    words = ["run", "recipe.yaml", "--set", "recovery=6"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "nni_prune_ext", *words], env=environment, stderr=subprocess.PIPE)
    saved = folder / "out" / "checkpoints" / "prune" / "recovery" / "000002" / "state.json"
    deadline = time.monotonic() + 60
    while not saved.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()

    resumed = command(*words, "--resume")

    assert (0, 0) == (reference[0], resumed[0]), resumed[2]
    assert "continued from checkpoint" in resumed[2]
    plans = [(folder / name / "l1" / "plan.json").read_text() for name in ("reference", "out")]
    assert plans[0] == plans[1]
    assert not list(folder.rglob("*unfinished*"))
