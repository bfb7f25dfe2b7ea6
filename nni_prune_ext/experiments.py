"""The face for NNI experiments: search over methods, their options and targets, with trials that prune for real.

Importing it loads NNI and torch; the process of NNI's tuner imports neither this package nor torch.
"""

from __future__ import annotations

from nni_prune_ext.adapters.nni_experiment import silence as silence_nni
from nni_prune_ext.adapters.nni_experiment_folder import (
    ExperimentResult,
    ExperimentSettings,
    check_experiment,
    read_experiment,
    run_trials,
)
from nni_prune_ext.adapters.nni_experiment_results import COSTS, Trial, best_trial, pareto_front, results_table
from nni_prune_ext.adapters.nni_experiment_space import search_space_for, trial_recipe

__all__ = [
    "COSTS",
    "ExperimentResult",
    "ExperimentSettings",
    "Trial",
    "best_trial",
    "check_experiment",
    "pareto_front",
    "read_experiment",
    "results_table",
    "run_trials",
    "search_space_for",
    "silence_nni",
    "trial_recipe",
]
