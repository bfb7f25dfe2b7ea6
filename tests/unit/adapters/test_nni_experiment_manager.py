"""Starting, watching and resuming NNI's manager, on a stand-in for it; and the names of NNI that this rests on."""

from __future__ import annotations

import inspect
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nni_node
import psutil
import pytest
import requests
from nni import trial
from nni.experiment import Experiment, launcher, rest

from nni_prune_ext.adapters import nni_experiment as adapter
from nni_prune_ext.adapters.nni_experiment import Place, end_orphans, free_port, resume_experiment, run_experiment
from nni_prune_ext.adapters.nni_experiment_config import TRIAL_MODULE, experiment_config
from nni_prune_ext.errors import ConfigError, TrainingError

MANAGER = Path(nni_node.__path__[0]) / "core"
SPACE = {"target": {"_type": "choice", "_value": ["macs=0.5"]}}
QUIET = {"tell": lambda _: None, "started": lambda _: None, "poll_seconds": 0.0}


def config(tmp_path: Path, **more):
    values = {"file": None, "code": tmp_path, "recipe": "my recipe.yaml", "arguments": ["--threads", "2"],
              "folder": tmp_path / "nni", "trials": 4, "concurrency": 2, "tuner": "TPE", "seed": 7}  # fmt: skip
    return experiment_config(SPACE, **{**values, **more})


def job(name: str, status: str, sampled: str = "a", start: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        trialJobId=name, status=status, startTime=start, finalMetricData=[],
        hyperParameters=[SimpleNamespace(parameters={"target": sampled})],
    )  # fmt: skip


class StandIn:
    """An experiment whose manager answers from a script: one (status, errors, jobs) per question."""

    def __init__(self, script) -> None:
        self.script, self.now = list(script), ("RUNNING", [], [])
        self.calls: list[tuple] = []
        self.asked = 0
        self.port: int | None = None
        self.id = "x"

    def start(self, port, run_mode):
        self.port = port
        self.calls.append(("start", run_mode.value))

    def stop(self):
        self.calls.append(("stop",))
        self.port = None

    def answer(self, question):
        if question == "/experiment":
            return {"id": self.id}
        self.asked += 1
        assert self.asked < 100, "it never ends"
        if self.script:
            said = self.script.pop(0)
            if isinstance(said, BaseException):
                raise said
            self.now = said
        return {"status": self.now[0], "errors": self.now[1]}

    def list_trial_jobs(self):
        return self.now[2]

    def get_job_metrics(self):
        return {}

    def get_experiment_profile(self):
        return {"params": {"maxTrialNumber": 6}}

    def update_max_trial_number(self, number):
        self.calls.append(("trials", number))

    def update_trial_concurrency(self, number):
        self.calls.append(("concurrency", number))

    def kill_trial_job(self, name):
        self.calls.append(("kill", name))


@pytest.fixture
def manager(monkeypatch):
    """Puts stand-ins in the place of NNI's experiments, in the order in which they are made."""
    made: list[StandIn] = []

    def use(*stand_ins: StandIn) -> None:
        made.extend(stand_ins)
        waiting = list(stand_ins)
        monkeypatch.setattr(adapter, "Experiment", lambda config, id: waiting.pop(0))
        monkeypatch.setattr(adapter, "get_stopped_experiment_config", lambda *_: None)
        monkeypatch.setattr(adapter.time, "sleep", lambda _: None)

        def get(port, question):
            current = next(one for one in made if one.port is not None)
            return current.answer(question)

        monkeypatch.setattr(adapter.rest, "get", get)

    return use


def place(tmp_path: Path) -> Place:
    return Place("x", tmp_path, 0)


DONE = ("DONE", [], [job("A", "SUCCEEDED")])
NO_TUNER = ("ERROR", ["tuner_command_channel: Tuner did not connect in 10 seconds. Please check tuner log."], [])


def test_an_experiment_is_watched_until_it_is_done_and_then_stopped(manager, tmp_path) -> None:
    one = StandIn([("RUNNING", [], [job("A", "RUNNING")]), DONE])
    manager(one)
    told: list[str] = []

    watched = run_experiment(None, place(tmp_path), **{**QUIET, "tell": told.append})

    assert (True, ["A"]) == (watched.done, [found.trialJobId for found in watched.jobs])
    assert [("start", "detach"), ("stop",)] == one.calls
    assert ["trial A succeeded (1 ended)"] == told


def test_a_tuner_that_has_tried_everything_ends_the_experiment(manager, tmp_path) -> None:
    """NNI itself would wait for ever for the trials that it was asked for."""
    running = ("TUNER_NO_MORE_TRIAL", [], [job("A", "SUCCEEDED"), job("B", "RUNNING")])
    manager(StandIn([running, ("TUNER_NO_MORE_TRIAL", [], [job("A", "SUCCEEDED"), job("B", "FAILED")])]))

    assert run_experiment(None, place(tmp_path), **QUIET).done


def test_a_tuner_that_did_not_connect_is_started_again(manager, tmp_path) -> None:
    first, second, third = StandIn([NO_TUNER]), StandIn([NO_TUNER]), StandIn([DONE])
    manager(first, second, third)

    watched = run_experiment(None, place(tmp_path), **QUIET)

    assert watched.done
    assert ("stop",) == first.calls[-1] == second.calls[-1]
    assert "resume" == second._action == third._action


def test_a_tuner_that_never_connects_is_an_error(manager, tmp_path) -> None:
    manager(*[StandIn([NO_TUNER]) for _ in range(adapter.STARTS)])

    with pytest.raises(TrainingError, match="4 times in a row.*dispatcher.log"):
        run_experiment(None, place(tmp_path), **QUIET)


def test_an_experiment_that_fails_says_why(manager, tmp_path) -> None:
    one = StandIn([("ERROR", ["Dispatcher stream error, tuner may have crashed."], [])])
    manager(one)

    with pytest.raises(TrainingError, match="tuner may have crashed"):
        run_experiment(None, place(tmp_path), **QUIET)
    assert ("stop",) == one.calls[-1]


def test_a_manager_that_was_killed_is_noticed_and_not_stopped(manager, tmp_path) -> None:
    one = StandIn([("RUNNING", [], []), *[requests.ConnectionError()] * 20])
    manager(one)

    with pytest.raises(TrainingError, match="no longer answers.*nothing that has ended is lost"):
        run_experiment(None, place(tmp_path), **QUIET)
    assert [("start", "detach")] == one.calls


def test_ctrl_c_stops_the_manager_and_returns_what_there_is(manager, tmp_path) -> None:
    one = StandIn([("RUNNING", [], [job("A", "SUCCEEDED"), job("B", "RUNNING")]), KeyboardInterrupt(), DONE])
    manager(one)

    watched = run_experiment(None, place(tmp_path), **QUIET)

    assert (False, 2) == (watched.done, len(watched.jobs))
    assert ("stop",) == one.calls[-1]


def test_resuming_changes_the_numbers_in_the_running_manager(manager, tmp_path) -> None:
    one = StandIn([("DONE", [], [job("A", "SUCCEEDED")]), ("RUNNING", [], [job("A", "SUCCEEDED")]), DONE])
    manager(one)

    resume_experiment(place(tmp_path), earlier_port=1, trials=9, concurrency=3, **QUIET)

    assert [("concurrency", 3), ("trials", 9)] == one.calls[1:3]
    assert "resume" == one._action


def test_a_trial_that_repeats_an_interrupted_one_is_cancelled_once(manager, tmp_path) -> None:
    first = [job("done", "SUCCEEDED", "a"), job("interrupted", "WAITING", "b", 2)]
    repeat = [*first[:1], job("interrupted", "SUCCEEDED", "b", 2), job("repeat", "RUNNING", "b", 3)]
    other = [job("other", "RUNNING", "c", 4), job("as done", "RUNNING", "a", 5)]
    one = StandIn([("RUNNING", [], first), ("RUNNING", [], repeat), ("RUNNING", [], [*repeat, *other]), DONE])
    manager(one)

    resume_experiment(place(tmp_path), earlier_port=1, trials=None, concurrency=None, **QUIET)

    assert [("trials", 7), ("kill", "repeat")] == one.calls[1:3]
    assert ("stop",) == one.calls[3]


def test_a_new_experiment_may_sample_the_same_twice(manager, tmp_path) -> None:
    one = StandIn([("RUNNING", [], [job("A", "RUNNING"), job("B", "RUNNING")]), DONE])
    manager(one)

    run_experiment(None, place(tmp_path), **QUIET)

    assert [("start", "detach"), ("stop",)] == one.calls


def test_there_is_nothing_to_resume_without_a_database(tmp_path) -> None:
    with pytest.raises(ConfigError, match="NNI has no experiment 'x'"):
        resume_experiment(place(tmp_path), earlier_port=1, trials=None, concurrency=None, **QUIET)


def test_trials_of_a_killed_manager_are_ended_and_no_others() -> None:
    program = ["-c", "import time; time.sleep(60)", TRIAL_MODULE]
    ours, other = (
        subprocess.Popen([sys.executable, *program], env={**os.environ, "NNI_EXP_ID": name}) for name in ("mine", "no")
    )
    told: list[str] = []
    try:
        end_orphans("mine", told.append)

        assert not psutil.pid_exists(ours.pid)
        assert other.poll() is None
        assert told == ["1 trials of a killed manager were still running: ended, they go on from their checkpoints"]
    finally:
        ours.kill()
        other.kill()


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]

        with pytest.raises(ConfigError, match=f"Port {port} is in use.*--port"):
            free_port(port)
    assert free_port(0) > 0


def test_local_trials_run_our_program_with_this_python(tmp_path) -> None:
    made = config(tmp_path)

    assert f"{sys.executable} -m {TRIAL_MODULE} 'my recipe.yaml' --threads 2" == made.trial_command
    assert (4, 2, "local") == (made.max_trial_number, made.trial_concurrency, made.training_service.platform)
    assert {"optimize_mode": "maximize", "seed": 7} == made.tuner.class_args
    assert SPACE == made.search_space


@pytest.mark.parametrize(
    ("tuner", "arguments"), [("GridSearch", None), ("Evolution", {"optimize_mode": "maximize"}), ("Batch", None)]
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


def test_names_of_nni_that_are_not_documented_are_still_there() -> None:
    assert ["port", "api", "prefix"] == list(inspect.signature(rest.get).parameters)
    assert ["exp_id", "exp_dir"] == list(inspect.signature(launcher.get_stopped_experiment_config).parameters)
    assert "_params['parameter_id']" in inspect.getsource(trial.report_final_result)
    assert "create" == Experiment(None, id="x")._action
    assert "'resume'" in inspect.getsource(Experiment.resume)


def test_the_manager_still_speaks_of_a_tuner_that_did_not_connect() -> None:
    assert adapter.NO_CONNECTION in (MANAGER / "tuner_command_channel.js").read_text()
    assert "/env/" in (MANAGER.parent / "common" / "trial_keeper" / "keeper.js").read_text()
    assert "TUNER_NO_MORE_TRIAL" in (MANAGER / "nnimanager.js").read_text()
