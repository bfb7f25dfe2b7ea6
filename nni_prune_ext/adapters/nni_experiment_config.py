"""NNI's configuration of an experiment whose trials prune: on this machine, or by a given file."""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Mapping
from copy import deepcopy
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Final, get_args

import yaml
from nni.experiment import AlgorithmConfig, ExperimentConfig
from nni.experiment.config.utils import camel_case, fields, is_instance, is_missing, unset_base_path
from nni.tools.package_utils import create_builtin_class_instance, get_algo_meta, get_all_algo_meta

from nni_prune_ext.errors import ConfigError

TRIAL_MODULE = "nni_prune_ext.adapters.nni_trial"
_WITHOUT_ARGUMENTS = ("gridsearch", "batch", "batchtuner")
_SEEDED = ("tpe", "random")
_ONLY_IN_NNI: Final = ("pbt", "pbttuner", "smac", "networkmorphism")
"""Tuners that cannot be tried in another process: they need the manager's environment, or write files."""


def experiment_config(
    space: Mapping[str, object],
    *,
    file: Path | None,
    code: Path,
    recipe: str,
    arguments: list[str],
    folder: Path,
    trials: int,
    concurrency: int,
    tuner: str,
    seed: int,
) -> ExperimentConfig:
    """Returns the configuration of an experiment: one of local trials, or the given file with our trial filled in.

    Args:
        file: an NNI configuration; what it sets stays, except for search space, trial command and working directory.
        code: where trials run; a remote service copies this folder.
        recipe: what trials have in common, as a path from there.
        arguments: further arguments of the trial program.
        folder: NNI keeps everything of the experiment here.

    Raises:
        ConfigError: the file is none of NNI's, or does not fit together, or there is no such tuner or assessor.
    """
    named = f" {file}" if file else ""
    try:
        config = ExperimentConfig("local") if file is None else _loaded(file)
        is_here = getattr(config.training_service, "platform", None) == "local"
        python = shlex.quote(sys.executable) if is_here else "python3"
        config.trial_command = f"{python} -m {TRIAL_MODULE} {shlex.join([recipe, *arguments])}"
        config.search_space, config.search_space_file = dict(space), None
        config.experiment_working_directory = str(folder)
        if file is None:
            config.experiment_name = config.experiment_name or "nni_prune_ext"
            config.training_service.use_active_gpu = True
        if file is None or config.trial_code_directory in (None, ".", str(file.parent)):
            config.trial_code_directory = str(code)
        if file is None or config.max_trial_number is None:
            config.max_trial_number = trials
        if file is None or not isinstance(config.trial_concurrency, int):
            config.trial_concurrency = concurrency
        if file is None or config.tuner is None:
            config.tuner = AlgorithmConfig(name=tuner, class_args=_tuner_arguments(tuner, seed))
        checked = config.canonical_copy()
    except (OSError, ValueError, TypeError, AttributeError, AssertionError, yaml.YAMLError) as error:
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line  # NNI has asserts without a text
        raise ConfigError(
            f"NNI does not take the configuration{named}: {type(error).__name__}: {reason}. "
            "Expected an experiment configuration of NNI 3.0. Correct it, or leave --config out to run on this machine."
        ) from error
    for kind in ("tuner", "assessor"):
        if (algorithm := getattr(checked, kind)) is not None and algorithm.name is not None:
            _try_algorithm(kind, algorithm.name, algorithm.class_args, space)
    return config


def _loaded(file: Path) -> ExperimentConfig:
    try:
        config = ExperimentConfig.load(file)
    finally:
        unset_base_path()  # NNI 3.0 leaves the file's folder set when it fails, and then refuses the next file
    if is_missing(config.training_service):
        raise ValueError("trainingService is missing, expected for example {platform: local}")
    for entry in fields(config):  # NNI itself works with wrong values first, and stumbles without naming the key
        value = getattr(config, entry.name)
        if not is_missing(value) and not is_instance(value, entry.type):
            raise ValueError(f"{camel_case(entry.name)} is {value!r}, expected {_types(entry.type)}")
    return config


def _types(hint: Any) -> str:
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    return " or ".join(getattr(kind, "__name__", str(kind)).strip("_") for kind in kinds)


def _try_algorithm(kind: str, name: str, arguments: Mapping[str, object] | None, space: Mapping[str, object]) -> None:
    """Makes the tuner or assessor as NNI's own process will, and lets a tuner see the search space.

    Raises:
        ConfigError: NNI has none of that name, or it does not take its arguments or the search space.
    """
    found = get_algo_meta(name)
    known = [algorithm.name for algorithm in get_all_algo_meta() if algorithm.algo_type == kind]
    if found is None or found.algo_type != kind:
        alike = {one.lower(): one for one in known}
        close = [alike[one] for one in get_close_matches(name.lower(), alike, n=1)]
        hint = f"Did you mean '{close[0]}'?" if close else "Choose one of them, or register yours (nnictl algo)."
        raise ConfigError(f"NNI has no {kind} '{name}', expected one of {', '.join(known)}. {hint}")
    try:
        if found.is_advisor or name.lower() in _ONLY_IN_NNI:
            import_module(str(found.class_name).rpartition(".")[0])
            return
        made = create_builtin_class_instance(name, deepcopy(arguments), kind + "s")
        if kind == "tuner":
            made.update_search_space(deepcopy(dict(space)))
    except Exception as error:  # whatever an algorithm, perhaps the user's own, says to what it does not take
        raise ConfigError(
            f"NNI's {kind} '{name}' cannot be used here: {type(error).__name__}: {error}. Expected it to take its "
            f"arguments {arguments or {}} and the search space, and its packages to be installed. Choose another one, "
            "for example TPE."
        ) from error


def _tuner_arguments(tuner: str, seed: int) -> dict[str, object] | None:
    name = tuner.lower()
    if name in _WITHOUT_ARGUMENTS:
        return None
    arguments: dict[str, object] = {"optimize_mode": "maximize"}
    return {**arguments, "seed": seed} if name in _SEEDED else arguments
