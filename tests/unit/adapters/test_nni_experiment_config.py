"""NNI's configuration of an experiment: made, read, and refused before any work where NNI would stumble."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nni_prune_ext.adapters.nni_experiment_config import TRIAL_MODULE, experiment_config
from nni_prune_ext.errors import ConfigError

SPACE = {"target": {"_type": "choice", "_value": ["macs=0.5"]}}


def config(tmp_path: Path, **more):
    values = {"file": None, "code": tmp_path, "recipe": "my recipe.yaml", "arguments": ["--threads", "2"],
              "folder": tmp_path / "nni", "trials": 4, "concurrency": 2, "tuner": "TPE", "seed": 7}  # fmt: skip
    return experiment_config(SPACE, **{**values, **more})


def test_local_trials_run_our_program_with_this_python(tmp_path) -> None:
    made = config(tmp_path)

    assert f"{sys.executable} -m {TRIAL_MODULE} 'my recipe.yaml' --threads 2" == made.trial_command
    assert (4, 2, "local") == (made.max_trial_number, made.trial_concurrency, made.training_service.platform)
    assert {"optimize_mode": "maximize", "seed": 7} == made.tuner.class_args
    assert SPACE == made.search_space


@pytest.mark.parametrize(
    ("tuner", "arguments"),
    [
        ("GridSearch", None),
        ("Evolution", {"optimize_mode": "maximize"}),
        ("Random", {"optimize_mode": "maximize", "seed": 7}),
    ],
)
def test_tuners_get_the_arguments_that_they_take(tmp_path, tuner, arguments) -> None:
    assert arguments == config(tmp_path, tuner=tuner).tuner.class_args


def test_a_configuration_of_other_machines_keeps_what_it_says(tmp_path) -> None:
    file = tmp_path / "remote.yaml"
    (tmp_path / "key").touch()
    file.write_text(
        "searchSpace: {}\ntrialCommand: echo\ntrialConcurrency: 5\nmaxTrialNumber: 50\n"
        "tuner: {name: Random}\nnniManagerIp: 10.0.0.1\n"
        "trainingService:\n  platform: remote\n  machineList:\n    - {host: 10.0.0.2, user: me, sshKeyFile: key}\n"
    )

    made = config(tmp_path, file=file, recipe="recipe.yaml", arguments=[])

    assert f"python3 -m {TRIAL_MODULE} recipe.yaml" == made.trial_command
    assert (50, 5, "Random") == (made.max_trial_number, made.trial_concurrency, made.tuner.name)
    assert "10.0.0.2" == made.training_service.machine_list[0].host
    assert SPACE == made.search_space


@pytest.mark.parametrize("text", ["nonsense: 1\n", "- 1\n", "a: [\n", "trainingService: {platform: moon}\n"])
def test_a_configuration_that_is_none_of_nnis_is_refused(tmp_path, text) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)

    with pytest.raises(ConfigError, match=r"NNI does not take the configuration .*bad\.yaml"):
        config(tmp_path, file=file)


def test_a_configuration_that_was_refused_does_not_spoil_the_next(tmp_path) -> None:
    file = tmp_path / "config.yaml"
    for text in ("nonsense: 1\n", "trialConcurrency: 3\ntrainingService: {platform: local}\n"):
        file.write_text(text)
        if text.startswith("nonsense"):
            with pytest.raises(ConfigError, match="nonsense"):
                config(tmp_path, file=file)

    assert 3 == config(tmp_path, file=file).trial_concurrency


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("assessor: {name: Foo}\n", "NNI has no assessor 'Foo', expected one of Medianstop, Curvefitting"),
        ("tuner: {name: Medianstop}\n", "NNI has no tuner 'Medianstop'"),
        ("tuner: {name: TPE, classArgs: {optimise: maximize}}\n", "NNI's tuner 'TPE' cannot be used here.*optimise"),
        ("tuner: TPE\n", "tuner is 'TPE', expected AlgorithmConfig"),
        ("trialConcurrency: two\n", "trialConcurrency is 'two', expected int"),
    ],
)
def test_a_configuration_with_a_wrong_value_is_refused_by_its_key(tmp_path, text, says) -> None:
    file = tmp_path / "config.yml"
    file.write_text(f"trainingService: {{platform: local}}\n{text}")

    with pytest.raises(ConfigError, match=says):
        config(tmp_path, file=file)


def test_tuners_that_work_only_within_nni_are_looked_up(tmp_path) -> None:
    assert "Hyperband" == config(tmp_path, tuner="Hyperband").tuner.name
    assert "pbt" == config(tmp_path, tuner="pbt").tuner.name


def test_a_missing_configuration_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml"):
        config(tmp_path, file=tmp_path / "no.yaml")


def test_the_process_of_the_tuner_imports_neither_torch_nor_this_package() -> None:
    program = (
        "import sys, nni.__main__, nni.algorithms.hpo.tpe_tuner, nni.algorithms.hpo.gridsearch_tuner\n"
        "print([m for m in ('torch', 'nni_prune_ext') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert "[]" == found.stdout.strip().splitlines()[-1]
