"""Starts, watches, resumes and stops experiments of NNI; nothing here imports torch, nor does NNI's tuner process."""

from __future__ import annotations

import atexit
import contextlib
import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import nni
import requests
from nni.experiment import Experiment, ExperimentConfig, RunMode, rest
from nni.experiment.launcher import get_stopped_experiment_config

from nni_prune_ext.adapters.nni_experiment_processes import end_processes, free_port
from nni_prune_ext.errors import ConfigError, TrainingError

STARTS: Final = 4
"""How often a tuner that did not connect is started again: NNI gives it 10 seconds, which a busy machine may need."""
NO_CONNECTION = "Tuner did not connect"
PATIENCE: Final = 5
"""Questions in a row that NNI's manager may leave unanswered, each for up to NNI's 20 seconds."""
_ENDED = ("SUCCEEDED", "FAILED", "USER_CANCELED", "SYS_CANCELED", "EARLY_STOPPED")
Job: TypeAlias = Any  # nni.experiment.TrialJob: NNI is not typed
Tell: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where an experiment lives.

    Attributes:
        identity: its name in NNI.
        folder: NNI's folder of experiments.
        port: of the web portal; 0 finds a free one.
    """

    identity: str
    folder: Path
    port: int

    @property
    def database(self) -> Path:
        """NNI's record of the experiment; missing until its manager has begun it."""
        return self.folder / self.identity / "db" / "nni.sqlite"

    @property
    def tuner_log(self) -> Path:
        """What the process of the tuner writes."""
        return self.folder / self.identity / "log" / "dispatcher.log"


@dataclass(frozen=True)
class Watched:
    """What an experiment looked like when watching it ended.

    Attributes:
        done: all trials that were asked for have ended, or the tuner had no more.
        jobs: NNI's trial jobs.
        metrics: trial's id → NNI's metric data of all its reports.
    """

    done: bool
    jobs: tuple[Job, ...]
    metrics: Mapping[str, list[Any]]


@dataclass(frozen=True)
class _Watching:
    """How an experiment is watched: see :func:`run_experiment` and :func:`resume_experiment`."""

    tell: Tell
    started: Callable[[int], None]
    poll_seconds: float
    trials: int | None = None
    concurrency: int | None = None
    repeats: _Repeats | None = None


def run_experiment(
    config: ExperimentConfig,
    place: Place,
    *,
    tell: Tell,
    started: Callable[[int], None],
    poll_seconds: float = 2.0,
) -> Watched:
    """Runs a new experiment until all its trials have ended or Ctrl-C, and stops NNI's manager.

    A tuner that did not connect within NNI's 10 seconds is started again.

    Args:
        tell: is told how it goes.
        started: is told the port as soon as the portal answers.

    Raises:
        TrainingError: NNI's manager or its tuner failed; the experiment can be resumed.
        ConfigError: the port is in use.
    """
    place = replace(place, port=free_port(place.port))
    watching = _Watching(tell, started, poll_seconds)
    return _once(Experiment(config, id=place.identity), place, watching) or _again(place, watching)


def resume_experiment(
    place: Place,
    *,
    earlier_port: int,
    trials: int | None,
    concurrency: int | None,
    tell: Tell,
    started: Callable[[int], None],
    poll_seconds: float = 2.0,
) -> Watched:
    """Goes on with a stopped or killed experiment; trials that were running go on where they were.

    A manager that outlived the program that started it is taken over. NNI goes by the configuration that it stored,
    so that only the number of trials, also at a time, can be changed.

    Args:
        earlier_port: where the manager was last.
        trials: in all; as before by default.
        concurrency: at a time; as before by default.

    Raises:
        TrainingError: see :func:`run_experiment`.
        ConfigError: NNI has nothing stored, or the port is in use.
    """
    watching = _Watching(tell, started, poll_seconds, trials, concurrency)
    alive = _lives(place.identity, earlier_port)
    if alive and (trials, concurrency) != (None, None):  # a running manager that was done asks its tuner no more
        tell(f"NNI's manager is still running on port {earlier_port}: stopped, to begin it with the new numbers")
        with _stopped_at_end(Experiment.connect(earlier_port)):
            alive = False
    if alive:
        tell(f"NNI's manager is still running on port {earlier_port}: taken over")
        place = replace(place, port=earlier_port)
        return _once(Experiment.connect(earlier_port), place, watching) or _again(place, watching)
    if ended := end_processes(place.identity):
        tell(f"{ended} processes of a killed manager were still running: ended, trials go on from their checkpoints")
    place = replace(place, port=free_port(place.port))
    return _once(_stored(place), place, replace(watching, repeats=_Repeats())) or _again(place, watching)


def _once(experiment: Experiment, place: Place, watching: _Watching) -> Watched | None:
    """Starts and watches an experiment, unless it runs; whatever happens, none of its processes is left.

    Returns:
        ``None`` if the tuner took too long to connect, which is worth another try.
    """
    log = TunerLog(place.tuner_log)
    with _stopped_at_end(experiment):
        if experiment.port is None:
            _begin(experiment, place.port)
        watching.started(place.port)
        return _watched(experiment, watching, log)


def _again(place: Place, watching: _Watching) -> Watched:
    """Gives an experiment whose tuner did not connect another one, a few times; its configuration is stored."""
    for start in range(2, STARTS + 1):
        watching.tell(f"NNI's tuner did not connect within 10 seconds; start {start} of {STARTS}")
        watched = _once(_stored(place), place, replace(watching, repeats=_Repeats()))
        if watched is not None:
            return watched
    raise TrainingError(
        f"NNI's tuner did not connect within 10 seconds, {STARTS} times in a row, expected it to; '{place.tuner_log}' "
        "holds no error. The machine is too busy. Go on when there is less to do (CLI: --resume)."
    )


def trials_begun(place: Place) -> int:
    """Returns how many trials an experiment has, by NNI's own record, which also a running manager keeps."""
    try:
        with contextlib.closing(sqlite3.connect(f"{place.database.as_uri()}?mode=ro", uri=True)) as database:
            (number,) = database.execute("SELECT COUNT(DISTINCT trialJobId) FROM TrialJobEvent").fetchone()
    except sqlite3.Error:  # damaged, or empty because the manager was killed at once: told when NNI reads it
        return 0
    return int(number)


def _stored(place: Place) -> Experiment:
    """Returns an experiment with the configuration that NNI stored, also where its manager was killed."""
    try:
        config = get_stopped_experiment_config(place.identity, place.folder)
    except Exception as error:  # whatever SQLite and NNI make of a damaged or missing database
        raise ConfigError(
            f"NNI has no experiment '{place.identity}' in '{place.folder}' to resume ({error!r}), "
            "expected its database. Start anew in another folder."
        ) from error
    experiment = Experiment(config, id=place.identity)
    experiment._action = "resume"  # Experiment.resume() would not let us choose where NNI's processes write
    return experiment


def _begin(experiment: Experiment, port: int) -> None:
    """Starts NNI's manager; what it and the tuner print goes to files beside their logs."""
    try:
        experiment.start(port, run_mode=RunMode.Detach)
    except (RuntimeError, OSError, ValueError) as error:  # requests' errors are OSErrors
        raise TrainingError(
            f"NNI's manager did not start: {error}. Expected its web portal to answer. Try again, or look into the "
            "folder log of the experiment."
        ) from error


@contextmanager
def _stopped_at_end(experiment: Experiment) -> Iterator[None]:
    """Stops NNI's manager at the end of the block, also one that does not answer; trials that run are interrupted."""
    try:
        yield
    finally:
        atexit.unregister(experiment.stop)
        try:
            if experiment.port is not None and _answer(experiment.port, "/check-status") is not None:
                experiment.stop()
        finally:  # nothing to do, unless starting or stopping was itself interrupted
            end_processes(experiment.id)


@dataclass
class TunerLog:
    """What the process of NNI's tuner has logged since this was made."""

    path: Path
    _known: int = field(init=False)

    def __post_init__(self) -> None:
        self._known = len(self._content())

    def error(self) -> str | None:
        """Returns the last error: its last line, or what was said if no exception follows; ``None`` without one."""
        entries = re.split(
            r"^(?=\[\d{4}-\d\d-\d\d )", self._content()[self._known :].decode(errors="replace"), flags=re.M
        )
        errors = [found[1] for entry in entries if (found := re.match(r"\[.*?\] ERROR \(.*?\) (.*)", entry, re.S))]
        return errors[-1].strip().splitlines()[-1] if errors and errors[-1].strip() else None

    def _content(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError:  # no tuner has started yet
            return b""


def _answer(port: int, question: str) -> Any:
    """Returns what the manager says, or ``None`` if there is none."""
    try:
        return rest.get(port, question)
    except (requests.RequestException, ValueError):
        return None


def _lives(identity: str, port: int) -> bool:
    found = _answer(port, "/experiment") if 0 < port < 65536 else None
    return isinstance(found, dict) and found.get("id") == identity


def _watched(experiment: Experiment, watching: _Watching, log: TunerLog) -> Watched | None:
    """Watches until the end or Ctrl-C; ``None`` if the tuner took too long to connect."""
    told: set[str] = set()
    try:
        _change(experiment, watching.trials, watching.concurrency)
        while True:
            status = _status(experiment)
            if status["status"] == "ERROR":
                errors, reason = [str(error) for error in status.get("errors", [])], log.error()
                if reason is None and any(NO_CONNECTION in error for error in errors):
                    return None
                raise TrainingError(
                    f"NNI's experiment ended in an error: {reason or '; '.join(errors) or 'unknown'}. Expected it to "
                    f"go on. Look into the folder '{log.path.parent}', then resume (CLI: --resume)."
                )
            jobs = experiment.list_trial_jobs()
            _tell_news(jobs, told, watching.tell)
            if watching.repeats is not None:
                watching.repeats.cancel(experiment, jobs, watching.tell)
            ended = all(job.status in _ENDED for job in jobs)
            if status["status"] == "DONE" or (status["status"] == "TUNER_NO_MORE_TRIAL" and ended and jobs):
                return _seen(experiment, done=True)
            time.sleep(watching.poll_seconds)
    except KeyboardInterrupt:
        watching.tell("interrupted: stopping NNI's manager and its trials")
        return _seen(experiment, done=False)


class _Repeats:
    """Trials that a resumed tuner samples again: NNI 3.0 tells it of finished trials only, not of interrupted ones."""

    def __init__(self) -> None:
        self._originals: dict[str, str] | None = None
        self._cancelled: set[str] = set()

    def cancel(self, experiment: Experiment, jobs: list[Job], tell: Tell) -> None:
        """Cancels repeats of the trials that were interrupted, and asks for as many others."""
        unfinished = [job for job in jobs if job.status not in _ENDED and job.hyperParameters]
        unfinished.sort(key=lambda job: job.startTime or 0)
        if self._originals is None:
            self._originals = {}
            for job in unfinished:
                self._originals.setdefault(_sampled(job), job.trialJobId)
        for job in unfinished:
            original = self._originals.get(_sampled(job), job.trialJobId)
            if job.status == "RUNNING" and original != job.trialJobId and job.trialJobId not in self._cancelled:
                self._cancelled.add(job.trialJobId)
                asked = experiment.get_experiment_profile()["params"].get("maxTrialNumber")
                if asked is not None:
                    experiment.update_max_trial_number(asked + 1)
                experiment.kill_trial_job(job.trialJobId)
                tell(f"trial {job.trialJobId} repeats {original}: cancelled, another one will be tried")


def _sampled(job: Job) -> str:
    return json.dumps(job.hyperParameters[0].parameters, sort_keys=True, default=str)


def _change(experiment: Experiment, trials: int | None, concurrency: int | None) -> None:
    if concurrency is not None:
        experiment.update_trial_concurrency(concurrency)
    if trials is not None:
        experiment.update_max_trial_number(trials)
        for _ in range(20):  # an experiment that was done needs a moment to notice that it is not
            if _status(experiment)["status"] != "DONE" or len(experiment.list_trial_jobs()) >= trials:
                return
            time.sleep(0.5)


def _status(experiment: Experiment) -> dict[str, Any]:
    for _ in range(PATIENCE):
        found = _answer(experiment.port, "/check-status")
        if found is not None:
            return dict(found)
        time.sleep(1)
    raise TrainingError(
        f"NNI's manager on port {experiment.port} no longer answers, expected it to run until all trials have ended. "
        "It was killed or crashed; nothing that has ended is lost. Go on (CLI: --resume)."
    )


def _tell_news(jobs: list[Job], told: set[str], tell: Tell) -> None:
    for job in jobs:
        if job.status in _ENDED and job.trialJobId not in told:
            told.add(job.trialJobId)
            data = job.finalMetricData[-1].data if job.finalMetricData else None
            value = data.get("default") if isinstance(data, dict) else data
            result = f": {value:.4f}" if isinstance(value, (int, float)) else ""
            tell(f"trial {job.trialJobId} {job.status.lower()}{result} ({len(told)} ended)")


def _seen(experiment: Experiment, *, done: bool) -> Watched:
    return Watched(done, tuple(experiment.list_trial_jobs()), experiment.get_job_metrics())


def recorded_parameters(channel: str, trial: str) -> dict[str, Any] | None:
    """Returns what NNI's manager has on record for a trial: its parameters and their number; ``None`` if it cannot say.

    NNI 3.0 hands parameters out in the order in which trials ask, not to the trial that they were made for: trials
    that start together, or after one that died early, get each other's (``training_service/v3/compat.js``).

    Args:
        channel: ``NNI_TRIAL_COMMAND_CHANNEL``, an address of the manager for trials on its own machine.
    """
    found = re.fullmatch(r"http://localhost:(\d+)/env/.+", channel)
    if found is None:
        return None
    for _ in range(PATIENCE):  # NNI writes its record just after it has started the trial
        answer = _answer(int(found[1]), f"/trial-jobs/{trial}")
        if isinstance(answer, dict) and answer.get("hyperParameters"):
            return dict(json.loads(answer["hyperParameters"][-1]))
        time.sleep(1)
    return None


def silence() -> None:
    """Keeps NNI's own messages off standard output; they are in the experiment's log all the same."""
    nni.silence_stdout()
