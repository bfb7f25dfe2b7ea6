"""``experiment`` as a user meets it: one real experiment of NNI, and everything else on a stand-in for it."""

from __future__ import annotations

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from nni_prune_ext import cli, experiments
from nni_prune_ext.adapters.nni_experiment_processes import end_processes, free_port
from nni_prune_ext.cli.experiment import read_tuned
from nni_prune_ext.errors import ConfigError
from nni_prune_ext.experiments import ExperimentResult, Trial
from nni_prune_ext.registry import plugins

RECIPE = """\
model: tiny_for_search:build
data: {source: "tiny_for_search:images", batch_size: 20}
method: l1
training: {learning_rate: 0.02}
recovery: 1
measure: false
"""
MODULE = """
from torch import nn
from nni_prune_ext.data.sources import open_data


def build(num_classes=10, in_channels=1):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )


def images():
    return open_data("digits", limit=40)
"""
FAILED = Trial("B", 2, "FAILED", {"target": "macs=0.7"}, error="it broke")
GOOD = Trial("A", 1, "SUCCEEDED", {"target": "macs=0.5"}, {"default": 0.8, "metric": 0.8}, artefact="there/l1")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder with a recipe and a module with a tiny network."""
    (tmp_path / "tiny_for_search.py").write_text(MODULE)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("tiny_for_search", None)


@pytest.fixture
def command(folder, monkeypatch, capsys):
    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nni-prune-ext", "experiment", "recipe.yaml", "--out", "out", *words])
        monkeypatch.setattr(sys, "path", [*sys.path])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def asked(monkeypatch):
    """Stands in for the run of the trials: notes what was asked for; returns what the test puts in ``result``."""
    calls = {"result": ExperimentResult(Path("out"), "npe-1", True, (GOOD, FAILED))}

    def run(recipe, space, out, settings, *, resume, watcher):
        calls.update(recipe=recipe, space=space, out=out, settings=settings, resume=resume)
        return calls["result"]

    monkeypatch.setattr(experiments, "run_trials", run)
    monkeypatch.setattr(experiments, "silence_nni", lambda: None)
    return calls


def test_a_tuner_of_nni_tries_every_target(folder, command) -> None:
    """The real thing: NNI's manager, tuner and portal, with a home and settings of their own."""
    (folder / "space.json").write_text(
        json.dumps({"target": {"_type": "choice", "_value": ["macs=0.7", "macs=0.9"]},
                    "limits.min_channels": {"_type": "choice", "_value": [1]}})
    )  # fmt: skip
    words = ["--method", "l2", "--search", "space.json", "--trials", "3", "--tuner", "GridSearch", "--port", "0"]
    environment = {**os.environ, "HOME": str(folder / "home"), "NNI_CONFIG_DIR": str(folder / "settings"),
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    (folder / "home").mkdir()

    done = subprocess.run(
        [sys.executable, "-m", "nni_prune_ext", "experiment", "recipe.yaml", "--out", "out", *words, "--json"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip

    assert 0 == done.returncode, done.stdout + done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    rows = list(csv.DictReader((folder / "out" / "trials.csv").open()))
    assert ("done", True, 2) == (last["event"], last["done"], len(last["trials"])), "the tuner had no third one"
    assert {"macs=0.7", "macs=0.9"} == {row["target"] for row in rows}
    assert {"l2"} == {row["method"] for row in rows}
    assert all((Path(row["artefact"]) / "model.onnx").is_file() for row in rows)
    assert all(len(trial["intermediate"]) == 1 for trial in last["trials"])
    assert {"nni-experiments"} >= {path.name for path in (folder / "home").iterdir() if not path.name.startswith(".")}
    assert 0 == end_processes(last["identity"])
    code, _, errors = command(*words, "--trials", "1", "--resume")
    assert 2 == code
    assert "trials is 1, but the experiment" in errors
    assert "has 2 already" in errors


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals of Unix")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_other_signals_that_end_a_program_stop_manager_and_trials(folder, name) -> None:
    words = ["--target", "macs=0.7", "--target", "macs=0.9", "--port", "0", "--json", "--trials", "6"]
    environment = {**os.environ, "HOME": str(folder / "home"), "NNI_CONFIG_DIR": str(folder / "settings"),
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    (folder / "home").mkdir()

    with subprocess.Popen(
        [sys.executable, "-m", "nni_prune_ext", "experiment", "recipe.yaml", "--out", "out", *words],
        env=environment, stdout=subprocess.PIPE, text=True,
    ) as program:  # fmt: skip
        next(line for line in program.stdout if " succeeded" in line)
        program.send_signal(getattr(signal, name))
        rest = program.stdout.read().splitlines()

    facts = json.loads((folder / "out" / "experiment.json").read_text())
    assert 130 == program.returncode
    assert any("stopping NNI's manager" in line for line in rest)
    assert 0 == end_processes(facts["identity"])
    assert facts["port"] == free_port(facts["port"])
    assert not experiments.read_experiment(folder / "out").done


@pytest.mark.slow
def test_a_tuner_that_fails_in_its_own_process_is_quoted_after_one_start(folder) -> None:
    (folder / "tuners.py").write_text("from nni.tuner import Tuner\n\n\nclass Broken(Tuner):\n    x = 1 / 0\n")
    (folder / "own.yml").write_text(
        "trainingService: {platform: local}\ntuner: {className: tuners.Broken, codeDirectory: .}\n"
    )
    words = ["--target", "macs=0.7", "--port", "0", "--config", "own.yml"]
    environment = {**os.environ, "HOME": str(folder), "NNI_CONFIG_DIR": str(folder / "settings"),
                   "OMP_NUM_THREADS": "1"}  # fmt: skip

    done = subprocess.run(
        [sys.executable, "-m", "nni_prune_ext", "experiment", "recipe.yaml", "--out", "out", *words],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip

    assert 1 == done.returncode
    assert "NNI's experiment ended in an error: ZeroDivisionError: division by zero" in done.stderr
    assert "start 2 of" not in done.stdout + done.stderr
    assert 0 == end_processes(json.loads((folder / "out" / "experiment.json").read_text())["identity"])


@pytest.mark.slow
def test_a_manager_that_outlives_the_command_is_taken_over(folder) -> None:
    """Two trials at a time, which NNI itself may give each other's parameters; the command is killed in between."""
    choices = [word for method in ("l1", "l2", "fpgm") for word in ("--method", method)]
    words = [*choices, "--target", "macs=0.7", "--target", "macs=0.9", "--tuner", "GridSearch", "--port", "0", "--json"]
    command = [sys.executable, "-m", "nni_prune_ext", "experiment", "recipe.yaml", "--out", "out", *words]
    environment = {**os.environ, "HOME": str(folder / "home"), "NNI_CONFIG_DIR": str(folder / "settings"),
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    (folder / "home").mkdir()

    with subprocess.Popen(
        [*command, "--trials", "6", "--concurrency", "2"], env=environment, stdout=subprocess.PIPE, text=True
    ) as first:
        next(line for line in first.stdout if " succeeded" in line)
        first.kill()
    second = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=600)

    assert 0 == second.returncode, second.stderr
    assert "taken over" in second.stdout
    last = json.loads(second.stdout.splitlines()[-1])
    tried = sorted((trial["parameters"]["method"]["_name"], trial["parameters"]["target"]) for trial in last["trials"])
    assert sorted((m, t) for m in ("l1", "l2", "fpgm") for t in ("macs=0.7", "macs=0.9")) == tried
    assert tried == sorted(on_record(next((folder / "out" / "nni").glob("npe-*"))))


def test_the_example_searches_all_methods_rebuilds_the_best_and_its_portal_answers(tmp_path) -> None:
    program = Path(__file__).resolve().parents[2] / "examples" / "nni_experiment.py"
    environment = {**os.environ, "HOME": str(tmp_path), "NNI_CONFIG_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}

    done = subprocess.run(
        [sys.executable, str(program), "--smoke", "--out", "out"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip

    assert 0 == done.returncode, done.stderr
    assert "the web portal answers with 200" in done.stdout
    assert "trials, best first" in done.stdout
    result = experiments.read_experiment(tmp_path / "out")
    trials = result.trials
    assert sorted(plugins("pruners")) == sorted(one.parameters["method"]["_name"] for one in trials)
    assert {"SUCCEEDED"} == {one.status for one in trials}
    assert result.best is not None
    assert f"rebuilt: validation {result.best.metrics['metric']:.4f}" in done.stdout, "from its artefact alone"


def on_record(experiment: Path) -> list[tuple[str, str]]:
    """Returns method and target of every trial as NNI's database has them; each trial must have run those."""
    found = []
    with sqlite3.connect(experiment / "db" / "nni.sqlite") as database:
        rows = database.execute("SELECT trialJobId, data FROM TrialJobEvent WHERE data IS NOT NULL").fetchall()
    for trial, data in rows:
        parameters = json.loads(data)["parameters"]
        (result,) = experiment.glob(f"environments/*/trials/{trial}/result.json")
        assert parameters == json.loads(result.read_text())["parameters"]
        found.append((parameters["method"]["_name"], parameters["target"]))
    return found


def test_options_become_a_search_space(command, asked) -> None:
    code, _, _ = command(
        *("--method", "l1", "--method", "taylor", "--target", "macs=0.5", "--target", "macs=0.7"),
        *("--epochs", "1", "--epochs", "2", "--tune", "steps=1:3", "--tune", "schedule", "--trials", "7"),
        *("--concurrency", "2", "--tuner", "Random", "--port", "0", "--cost", "params", "--cost-weight", "0.3"),
    )

    methods = asked["space"]["method"]["_value"]
    assert 0 == code
    assert ["l1", "taylor"] == [method["_name"] for method in methods]
    assert {"_type": "randint", "_value": [1, 4]} == methods[0]["steps"]
    assert "agp" in methods[1]["schedule"]["_value"]
    assert ["macs=0.5", "macs=0.7"] == asked["space"]["target"]["_value"]
    assert [1, 2] == asked["space"]["recovery.epochs"]["_value"]
    settings = asked["settings"]
    assert (7, 2, "Random", 0) == (settings.trials, settings.concurrency, settings.tuner, settings.port)
    assert ("params", 0.3) == (settings.cost, settings.cost_weight)


def test_the_recipe_says_what_the_options_do_not(command, asked) -> None:
    command("--set", "target=params=0.6", "--resume")

    assert ["params=0.6"] == asked["space"]["target"]["_value"]
    assert [{"_name": "l1"}] == asked["space"]["method"]["_value"]
    assert asked["resume"]


def test_bounds_that_hold_together_are_not_searched(command, asked) -> None:
    command("--set", "target=[macs=0.5, params=0.6]")

    assert ["method"] == list(asked["space"])
    assert ("macs=0.5", "params=0.6") == asked["recipe"].target


def test_a_file_joins_the_search_space_and_wins(command, asked, folder) -> None:
    space = {"target": {"_type": "choice", "_value": ["macs=0.8"]}}
    (folder / "space.json").write_text(json.dumps(space))

    command("--search", "space.json")
    assert space == {key: asked["space"][key] for key in space}

    command("--search", "space.json", "--target", "macs=0.5", "--method", "l2")
    assert space["target"] == asked["space"]["target"], "the file wins"
    assert [{"_name": "l2"}] == asked["space"]["method"]["_value"]


def test_the_best_trial_and_the_failed_ones_are_told(command, asked) -> None:
    code, out, errors = command("--target", "macs=0.5")

    assert 0 == code
    assert "best trial: 1 A (macs=0.5); artefact in there/l1" in out
    assert "trial B failed: it broke" in errors


def test_an_experiment_without_any_result_fails(command, asked) -> None:
    asked["result"] = ExperimentResult(Path("out"), "npe-1", True, (FAILED,))

    assert 1 == command("--target", "macs=0.5")[0]


def test_an_interrupted_experiment_says_how_to_go_on(command, asked) -> None:
    asked["result"] = ExperimentResult(Path("out"), "npe-1", False, (GOOD,))

    code, _, errors = command("--target", "macs=0.5")

    assert 130 == code
    assert "--resume" in errors


def test_machines_get_json(command, asked) -> None:
    code, out, _ = command("--target", "macs=0.5", "--json")

    last = json.loads(out.splitlines()[-1])
    assert (0, "done", "A", 2) == (code, last["event"], last["best"]["id"], len(last["trials"]))


def test_a_dry_run_checks_everything_and_writes_nothing(command, asked, folder) -> None:
    code, out, _ = command("--target", "macs=0.7", "--dry-run")

    assert 0 == code
    assert '#   target: {"_type": "choice", "_value": ["macs=0.7"]}' in out
    assert not (folder / "out").exists()
    assert "recipe" not in asked


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--method", "tailor", "--target", "macs=0.5"], "Did you mean 'taylor'"),
        (["--target", "macs=0.5", "--tune", "steps=one"], "Cannot read --tune 'steps=one'"),
        (["--target", "macs=0.5", "--tune", "stepz"], "None of the methods l1 has the option 'stepz'"),
        (["--target", "macs=0.5", "--cost", "money"], "--cost is 'money', expected macs, params, latency_ms"),
        (["--target", "macs=0.5", "--search", "no.json"], "Cannot read the search space 'no.json'"),
        (["--target", "macs=0.0001", "--dry-run"], "cannot be met"),
        (["--dry-run"], "it needs a goal"),
        (["--target", "macs=0.5", "--tuner", "Foo", "--dry-run"], "NNI has no tuner 'Foo', expected one of"),
        (["--target", "macs=0.5", "--config", "no.yml", "--dry-run"], "NNI does not take the configuration no.yml"),
        (["--set", "target=macs=0.5", "--set", "mode=x"], "there is no such key"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(command, asked, words, says) -> None:
    code, _, errors = command(*words)

    assert 2 == code
    assert says in errors
    assert "Traceback" not in errors


def test_there_must_be_something_to_resume(command, folder) -> None:
    code, _, errors = command("--target", "macs=0.7", "--resume")

    assert 2 == code
    assert "There is nothing to resume in" in errors
    assert not (folder / "out").exists()


def test_a_search_space_that_is_a_list_is_refused(command, asked, folder) -> None:
    (folder / "space.json").write_text("[]")

    assert "is a list, expected an object" in command("--search", "space.json", "--target", "macs=0.5")[2]


def test_ranges_to_tune_are_read() -> None:
    assert ("steps", (1.0, 4.0)) == read_tuned("steps=1:4")
    assert ("schedule", None) == read_tuned("schedule")
    with pytest.raises(ConfigError, match="NAME=LOW:HIGH"):
        read_tuned("steps=1")
