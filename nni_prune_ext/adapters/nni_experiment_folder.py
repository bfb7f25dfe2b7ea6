"""A whole experiment in one folder: the dense network once, then trials of a recipe, their results, and going on later.

OUT/experiment.json     what was asked for; OUT/dense: the run that trained the dense network
OUT/code/               the trials' recipe and the dense weights, which a remote service copies
OUT/nni/ID/             NNI's own: database, logs, and one folder per trial with its run and result.json
OUT/trials.json, .csv   all trials, which are on a Pareto front, and the best one
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, TypedDict

import yaml

from nni_prune_ext import __version__
from nni_prune_ext.adapters.nni_experiment import Place, Watched, resume_experiment, run_experiment, trials_begun
from nni_prune_ext.adapters.nni_experiment_config import experiment_config
from nni_prune_ext.adapters.nni_experiment_processes import free_port, signals_as_ctrl_c
from nni_prune_ext.adapters.nni_experiment_results import (
    TRIALS_JSON,
    Trial,
    best_trial,
    pareto_front,
    trials_of,
    write_results,
)
from nni_prune_ext.adapters.nni_experiment_space import checked_space
from nni_prune_ext.deployment import runtime
from nni_prune_ext.errors import ConfigError, OutputError, RuntimeUnavailableError
from nni_prune_ext.export.artefact_folder import WEIGHTS
from nni_prune_ext.recipes import Recipe, recipe_from
from nni_prune_ext.text_files import write_text
from nni_prune_ext.training import Watcher
from nni_prune_ext.workbench import execute, prepare

EXPERIMENT, CODE, DENSE, NNI, RECIPE = "experiment.json", "code", "dense", "nni", "recipe.yaml"
_DENSE_WEIGHTS: Final = "dense.safetensors"
_ABSENT: Final = "absent"


@dataclass(frozen=True)
class ExperimentSettings:
    """How an experiment is run.

    Attributes:
        trials: in all; ``None`` is 10, and when resuming as many as before.
        concurrency: trials at a time; ``None`` is 1, and when resuming as many as before.
        tuner: NNI's name of it: ``TPE``, ``Random``, ``GridSearch``, ``Evolution``, ….
        port: of NNI's web portal; 0 finds a free one.
        config: an NNI configuration file, for example of a remote or Kubernetes service.
        runtime: latency of trials is measured on this registered runtime; as the recipe says by default.
        cost: ``macs``, ``params`` or ``latency_ms``.
        cost_weight: what the tuner maximises is the validation metric − this × (cost ÷ that of the dense network).
    """

    trials: int | None = None
    concurrency: int | None = None
    tuner: str = "TPE"
    port: int = 8080
    config: Path | None = None
    runtime: str | None = None
    cost: str = "macs"
    cost_weight: float = 0.0


@dataclass(frozen=True)
class ExperimentResult:
    """What came of an experiment, so far.

    Attributes:
        identity: its name in NNI, for ``nnictl view``.
        done: all trials that were asked for have ended; otherwise it can be resumed.
    """

    folder: Path
    identity: str
    done: bool
    trials: tuple[Trial, ...] = field(default=())

    @property
    def best(self) -> Trial | None:
        """The trial with the highest result among those that met their target."""
        return best_trial(self.trials)

    def pareto(self, cost: str) -> tuple[Trial, ...]:
        """Returns the trials that no other beats in both metric and ``macs``, ``params`` or ``latency_ms``."""
        return pareto_front(self.trials, cost)


def check_experiment(recipe: Recipe, space: Mapping[str, object], settings: ExperimentSettings) -> None:
    """Makes sure that every choice of the search space makes a sound trial with a target in reach; nothing is written.

    NNI's configuration is made as for the experiment, and its tuner is shown the search space.

    Raises:
        NniPruneExtError: it does not, or the experiment asks for what there is not, or NNI does not take it.
    """
    _check_settings(recipe, settings)
    trials, tried = checked_space(space, _for_trials(recipe, None)), list[Recipe]()
    _config(recipe, space, settings, code=Path.cwd(), recipe_file=RECIPE, folder=Path(NNI))
    for trial in trials:
        alike = trial.model_copy(update={"method": recipe.method or trial.method, "options": {}, "recovery": None})
        alike = alike.model_copy(update={"distillation": None, "training": recipe.training})
        if alike not in tried:  # method and training play no part in what is reachable
            tried.append(alike)
            prepare(alike)


def _check_settings(recipe: Recipe, settings: ExperimentSettings) -> None:
    if recipe.data is None:
        raise ConfigError(
            "The recipe has no data, expected some: trials are compared by the validation metric. Add data to it."
        )
    for name in ("trials", "concurrency"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, expected at least 1. Change it (CLI: --{name}).")
    if settings.cost_weight and settings.cost == "latency_ms" and recipe.measure is None and settings.runtime is None:
        raise ConfigError(
            "Latency counts in the result and is not measured, expected it to be. Set measure in the recipe, or name a "
            "runtime (CLI: --runtime)."
        )
    if settings.runtime is not None and settings.config is None:
        found = runtime(settings.runtime).availability()
        if not found.usable:
            raise RuntimeUnavailableError(f"The runtime '{settings.runtime}' is not usable here: {found.reason}")


@signals_as_ctrl_c()
def run_trials(
    recipe: Recipe,
    space: Mapping[str, object],
    out: Path,
    settings: ExperimentSettings | None = None,
    *,
    resume: bool = False,
    watcher: Watcher | None = None,
    started: Callable[[int], None] = lambda _: None,
) -> ExperimentResult:
    """Runs an experiment of NNI over a recipe; everything goes into one folder, but for NNI's list of experiments.

    The dense network is trained once, if the recipe says so. Ctrl-C, SIGTERM or SIGHUP stops NNI and returns what there
    is.

    Args:
        space: a search space of NNI whose keys are those of :func:`search_space_for`.
        resume: go on with the experiment in ``out``, also after a kill; the recipe and the space must be the same.
        watcher: is told how it goes.
        started: is told the port as soon as NNI's web portal answers.

    Raises:
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP before NNI's manager was there; nothing runs on.
        OutputError: the folder holds something else, or nothing to resume, or cannot be written.
        TrainingError: NNI's manager or tuner failed; the experiment can be resumed.
        ConfigError, RecipeError: see :func:`check_experiment`; or what is resumed is another experiment.
    """
    settings, watcher, out = settings or ExperimentSettings(), watcher or Watcher(), out.resolve()
    known = _known(out, resume=resume)
    asked = {"recipe": recipe.to_yaml(), "space": dict(space)}
    identity = str(known["identity"]) if known else f"npe-{secrets.token_hex(4)}"
    place = Place(identity, out / NNI, settings.port)
    if known:
        _check_same(known, asked, out)
    if begun := place.database.exists():
        _check_settings(recipe, settings)
        _check_trials(settings, place, out)
    else:
        check_experiment(recipe, space, settings)
        free_port(settings.port)  # a mistake here should not come after hours of training
    if resume and not begun:
        watcher.note(f"NNI has nothing of an experiment in '{out}' yet: it begins when the dense network is trained")
    trained = _dense_network(recipe, out, watcher)
    facts: dict[str, Any] = {
        **asked, "identity": identity, "port": known.get("port", settings.port), "version": __version__,
        "begun": known.get("begun") or datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip

    def on_start(real_port: int) -> None:
        _write_json(out / EXPERIMENT, {**facts, "port": real_port})
        watcher.note(f"experiment {identity}: web portal at http://localhost:{real_port}")
        started(real_port)

    _write_json(out / EXPERIMENT, facts)
    if begun:
        watched = resume_experiment(
            place, earlier_port=int(facts["port"]), trials=settings.trials, concurrency=settings.concurrency,
            tell=watcher.note, started=on_start,
        )  # fmt: skip
    else:
        config = _config(recipe, space, settings, **_trial_files(recipe, trained, out, settings), folder=place.folder)
        watched = run_experiment(config, place, tell=watcher.note, started=on_start)
    return _delivered(watched, place, out, facts)


def read_experiment(folder: Path) -> ExperimentResult:
    """Returns the result of an experiment as its folder holds it; NNI is not needed for that.

    Raises:
        OutputError: the folder holds none.
    """
    try:
        content = json.loads((folder / TRIALS_JSON).read_bytes())
        trials = tuple(Trial(**{**one, "intermediate": tuple(one["intermediate"])}) for one in content["trials"])
        return ExperimentResult(folder, str(content["identity"]), bool(content["done"]), trials)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise OutputError(
            f"'{folder}' holds no results of an experiment ({error}), expected {TRIALS_JSON}. Check the folder, or "
            "resume the experiment."
        ) from error


def _known(out: Path, *, resume: bool) -> dict[str, Any]:
    """Returns what the folder says about its experiment; empty if there is none yet."""
    if not resume:
        if out.exists() and any(out.iterdir()):
            hint = " It holds an experiment: go on with --resume." if (out / EXPERIMENT).exists() else ""
            raise OutputError(
                f"The folder '{out}' is not empty, expected an empty or new one.{hint} Choose another one with --out."
            )
        return {}
    if not (out / EXPERIMENT).exists():
        if (out / DENSE).exists():  # interrupted before NNI began
            return {}
        what = "holds no experiment" if out.exists() else "is not there"
        raise OutputError(
            f"There is nothing to resume in '{out}': the folder {what}, expected one with {EXPERIMENT}. Check --out, "
            "or begin without --resume."
        )
    try:
        return dict(json.loads((out / EXPERIMENT).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"Cannot read '{out / EXPERIMENT}': {error}. Expected JSON. Start anew elsewhere.") from error


def _check_same(known: Mapping[str, Any], asked: Mapping[str, Any], out: Path) -> None:
    """Refuses to resume with another recipe or space: NNI goes by what it stored, in silence."""
    for what in ("recipe", "space"):
        old, new = known.get(what), json.loads(json.dumps(asked[what]))
        if new != old:
            if what == "recipe":  # kept as YAML
                old, new = yaml.safe_load(str(old)), yaml.safe_load(new)
            key, was, now = first_difference(old, new)
            raise ConfigError(
                f"The {what} is not that of the experiment in '{out}': {key or what} was {was}, and now is {now}, "
                "expected the same: trials would not be comparable. Undo the change, or begin another experiment in "
                "another folder with --out."
            )


def first_difference(old: object, new: object, key: str = "") -> tuple[str, str, str]:
    """Returns the first entry in which two nested values differ: its dotted key, the old value and the new one."""
    inner: list[tuple[str, object, object]] = []
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        inner = [(f".{name}", old.get(name, _ABSENT), new.get(name, _ABSENT)) for name in {**old, **new}]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        inner = [(f"[{place}]", *both) for place, both in enumerate(zip(old, new))]
    for name, was, now in inner:
        if was != now:
            return first_difference(was, now, (key + name).lstrip("."))
    was, now = (value if value is _ABSENT else json.dumps(value, default=str) for value in (old, new))
    return key, str(was), str(now)


def _check_trials(settings: ExperimentSettings, place: Place, out: Path) -> None:
    begun = trials_begun(place)
    if settings.trials is not None and settings.trials < begun:
        raise ConfigError(
            f"trials is {settings.trials}, but the experiment in '{out}' has {begun} already, expected at least as "
            "many: it is their number in all. Raise it (CLI: --trials), or leave it out to go on as before."
        )


def _dense_network(recipe: Recipe, out: Path, watcher: Watcher) -> Path | None:
    """Returns the weights of the dense network, training it first if the recipe says so."""
    if recipe.train is None:
        return recipe.model.weights
    dense = recipe.model_copy(
        update={"method": None, "options": {}, "target": (), "recovery": None, "distillation": None, "control": None,
                "measure": None, "out": out / DENSE, "keep_checkpoints": False}
    )  # fmt: skip
    return execute(dense, resume=True, watcher=watcher).folder / DENSE / WEIGHTS


def _for_trials(recipe: Recipe, weights: Path | str | None) -> Recipe:
    """Returns what trials have in common: the recipe without the training of the dense network."""
    values = yaml.safe_load(recipe.to_yaml())
    values.pop("train", None)
    values.pop("out", None)
    values.setdefault("control", False)
    if weights is not None:
        values["model"] = {**values["model"], "weights": str(weights), "pretrained": False}
    return recipe_from(values, complete=False)


def _trial_files(recipe: Recipe, weights: Path | None, out: Path, settings: ExperimentSettings) -> _TrialFiles:
    """Writes what trials need, and returns where they run and their recipe as a path from there."""
    code, is_local = out / CODE, settings.config is None
    code.mkdir(parents=True, exist_ok=True)
    (out / NNI).mkdir(parents=True, exist_ok=True)
    if weights is not None:
        shutil.copyfile(weights, code / _DENSE_WEIGHTS)
        weights = code / _DENSE_WEIGHTS if is_local else Path(_DENSE_WEIGHTS)
    write_text(code / RECIPE, _for_trials(recipe, weights).to_yaml())
    if is_local:
        return {"code": Path.cwd(), "recipe_file": str(code / RECIPE)}
    return {"code": code, "recipe_file": RECIPE}


class _TrialFiles(TypedDict):
    code: Path
    recipe_file: str


def _config(
    recipe: Recipe,
    space: Mapping[str, object],
    settings: ExperimentSettings,
    *,
    code: Path,
    recipe_file: str,
    folder: Path,
) -> Any:
    """Returns NNI's configuration; nothing is written."""
    concurrency, arguments = settings.concurrency or 1, []
    if settings.runtime is not None:
        arguments += ["--runtime", settings.runtime]
    if settings.cost_weight:
        arguments += ["--cost", settings.cost, "--cost-weight", str(settings.cost_weight)]
    if settings.config is None and "OMP_NUM_THREADS" not in os.environ:
        arguments += ["--threads", str(max(1, _cores() // concurrency))]
    return experiment_config(
        space,
        file=settings.config,
        code=code,
        recipe=recipe_file,
        arguments=arguments,
        folder=folder,
        trials=settings.trials or 10,
        concurrency=concurrency,
        tuner=settings.tuner,
        seed=recipe.seed,
    )


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _delivered(watched: Watched, place: Place, out: Path, facts: Mapping[str, Any]) -> ExperimentResult:
    trials = trials_of(watched.jobs, watched.metrics, place.folder / place.identity)
    write_results(out, trials, {**facts, "done": watched.done})
    return ExperimentResult(out, place.identity, watched.done, trials)


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=1, default=str) + "\n")
