"""NNI's configuration of an experiment whose trials prune: on this machine, or by a given file."""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

import yaml
from nni.experiment import AlgorithmConfig, ExperimentConfig
from nni.experiment.config.utils import unset_base_path

from nni_prune_ext.errors import ConfigError

TRIAL_MODULE = "nni_prune_ext.adapters.nni_trial"
_WITHOUT_ARGUMENTS = ("gridsearch", "batch", "batchtuner")
_SEEDED = ("tpe", "random")


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
        ConfigError: the file is none of NNI's, or does not fit together.
    """
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
        config.validate()
    except (OSError, ValueError, TypeError, AttributeError, AssertionError, yaml.YAMLError) as error:
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line  # NNI has asserts without a text
        raise ConfigError(
            f"NNI does not take the configuration{f' {file}' if file else ''}: {type(error).__name__}: {reason}. "
            "Expected an experiment configuration of NNI 3.0. Correct it, or leave --config out to run on this machine."
        ) from error
    return config


def _loaded(file: Path) -> ExperimentConfig:
    try:
        return ExperimentConfig.load(file)
    finally:
        unset_base_path()  # NNI 3.0 leaves the file's folder set when it fails, and then refuses the next file


def _tuner_arguments(tuner: str, seed: int) -> dict[str, object] | None:
    name = tuner.lower()
    if name in _WITHOUT_ARGUMENTS:
        return None
    arguments: dict[str, object] = {"optimize_mode": "maximize"}
    return {**arguments, "seed": seed} if name in _SEEDED else arguments
