"""Starting, watching and resuming NNI's manager, on a stand-in for it; and the names of NNI that this rests on."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace

import nni_node
import pytest
import requests
from nni import trial
from nni.experiment import Experiment, launcher, rest

from nni_prune_ext.adapters import nni_experiment as adapter
from nni_prune_ext.adapters.nni_experiment import Place, TunerLog, resume_experiment, run_experiment
from nni_prune_ext.errors import ConfigError, TrainingError

MANAGER = Path(nni_node.__path__[0]) / "core"
QUIET = {"tell": lambda _: None, "started": lambda _: None, "poll_seconds": 0.0}


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
            current = next((one for one in made if one.port is not None), None)
            if current is None:
                raise requests.ConnectionError
            return current.answer(question)

        monkeypatch.setattr(adapter.rest, "get", get)

    return use


def place(tmp_path: Path) -> Place:
    return Place("x", tmp_path, 0)


DONE = ("DONE", [], [job("A", "SUCCEEDED")])
TUNER_ERROR = """\
[2026-11-20 17:00:00] ERROR (nni.main/MainThread) Builtin name is not found: foo
Traceback (most recent call last):
  File "nni/__main__.py", line 85, in <module>
    main()
RuntimeError: Builtin name is not found: foo
"""
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


def test_a_tuner_that_failed_is_quoted_and_not_started_again(manager, tmp_path, monkeypatch) -> None:
    """NNI's manager knows only that it did not connect."""
    log, one = place(tmp_path).tuner_log, StandIn([NO_TUNER])
    manager(one)
    log.parent.mkdir(parents=True)
    log.write_text(TUNER_ERROR.replace("foo", "an earlier start"))
    monkeypatch.setattr(one, "start", lambda port, run_mode: (setattr(one, "port", port), append(log, TUNER_ERROR)))

    with pytest.raises(TrainingError, match="RuntimeError: Builtin name is not found: foo"):
        run_experiment(None, place(tmp_path), **QUIET)


def test_what_an_earlier_tuner_logged_is_not_the_reason(manager, tmp_path) -> None:
    log = place(tmp_path).tuner_log
    log.parent.mkdir(parents=True)
    log.write_text(TUNER_ERROR)
    manager(StandIn([NO_TUNER]), StandIn([DONE]))

    assert run_experiment(None, place(tmp_path), **QUIET).done


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", None),
        ("[2026-11-20 17:00:00] INFO (nni.main/MainThread) ERROR (no)\n", None),
        ("[2026-11-20 17:00:00] ERROR (nni/MainThread) it broke\n[2026-11-20 17:00:01] INFO (nni/M) bye\n", "it broke"),
    ],
)
def test_the_last_error_of_the_tuner_is_found(tmp_path, text, error) -> None:
    log = TunerLog(tmp_path / "dispatcher.log")
    append(log.path, text)

    assert error == log.error()


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


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


def test_a_start_that_is_interrupted_leaves_no_process(manager, tmp_path, monkeypatch) -> None:
    one, ended = StandIn([]), []
    manager(one)
    monkeypatch.setattr(one, "start", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(adapter, "end_processes", ended.append)

    with pytest.raises(KeyboardInterrupt):
        run_experiment(None, place(tmp_path), **QUIET)
    assert ["x"] == ended


def test_a_stop_that_is_interrupted_leaves_no_process(manager, tmp_path, monkeypatch) -> None:
    one, ended = StandIn([DONE]), []
    manager(one)
    monkeypatch.setattr(one, "stop", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(adapter, "end_processes", ended.append)

    with pytest.raises(KeyboardInterrupt):
        run_experiment(None, place(tmp_path), **QUIET)
    assert ["x"] == ended


def test_names_of_nni_that_are_not_documented_are_still_there() -> None:
    assert ["port", "api", "prefix"] == list(inspect.signature(rest.get).parameters)
    assert ["exp_id", "exp_dir"] == list(inspect.signature(launcher.get_stopped_experiment_config).parameters)
    assert "_params['parameter_id']" in inspect.getsource(trial.report_final_result)
    assert "create" == Experiment(None, id="x")._action
    assert "'resume'" in inspect.getsource(Experiment.resume)


def test_the_manager_still_speaks_and_starts_its_processes_as_it_did() -> None:
    assert adapter.NO_CONNECTION in (MANAGER / "tuner_command_channel.js").read_text()
    assert "/env/" in (MANAGER.parent / "common" / "trial_keeper" / "keeper.js").read_text()
    assert "--exp_params" in (MANAGER.parent / "common" / "utils.js").read_text()
    assert "experiment_id" in launcher.NniManagerArgs.__annotations__
    assert "TUNER_NO_MORE_TRIAL" in (MANAGER / "nnimanager.js").read_text()
