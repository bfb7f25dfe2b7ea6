"""The program that NNI runs for every trial: what was sampled becomes a recipe, and its outcome the trial's result.

    python -m nni_prune_ext.adapters.nni_trial recipe.yaml --runtime onnxruntime-cpu

Without NNI it carries out the recipe as it stands. The trial's folder (``NNI_OUTPUT_DIR``) holds the run in ``run/``
and ``result.json``. A trial that was interrupted goes on where it was when NNI starts it again.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import nni
import nni.trial
import torch

from nni_prune_ext.adapters.nni_experiment import recorded_parameters
from nni_prune_ext.adapters.nni_experiment_results import COSTS, RESULT
from nni_prune_ext.adapters.nni_experiment_space import trial_recipe
from nni_prune_ext.deployment import compare_latency, runtime
from nni_prune_ext.errors import ConfigError, NniPruneExtError, RuntimeUnavailableError, TrainingError
from nni_prune_ext.export.artefact_folder import ONNX, ModelSpec
from nni_prune_ext.recipes import Recipe, load_recipe
from nni_prune_ext.report import Row
from nni_prune_ext.text_files import write_text
from nni_prune_ext.training import EpochLog, Watcher
from nni_prune_ext.workbench import execute
from nni_prune_ext.workbench.execution import CONTROL, RunResult

RUN = "run"
_OF_THE_DENSE_NETWORK = ("train", CONTROL, "control")
_IMAGES: Final = 8
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialSettings:
    """What all trials of an experiment have in common, beside the recipe.

    Attributes:
        runtime: latency is measured on this registered runtime; the recipe's own measurement by default.
        cost: ``macs``, ``params`` or ``latency_ms``, which makes a trial worse.
        cost_weight: how much: ``default`` is the metric − weight × (cost ÷ that of the dense network).
        threads: CPU threads of training; PyTorch's choice by default.
    """

    runtime: str | None = None
    cost: str = "macs"
    cost_weight: float = 0.0
    threads: int | None = None


def run_trial(
    base: Recipe,
    parameters: Mapping[str, object],
    folder: Path,
    settings: TrialSettings,
    *,
    report: Callable[[float], None],
) -> dict[str, float]:
    """Carries out one trial in its folder and returns its final result: numbers, that to maximise as ``default``.

    Args:
        report: is told the validation metric of every epoch of method and recovery.

    Raises:
        NniPruneExtError: the parameters make no recipe, or the run failed; ``result.json`` says why as well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts: dict[str, object] = {"parameters": dict(parameters)}
    is_same = _earlier_parameters(folder) in (None, json.loads(json.dumps(facts["parameters"], default=str)))
    _write(folder, facts)
    try:
        recipe = trial_recipe(base, parameters).model_copy(update={"out": folder / RUN})
        _check(recipe, settings)
        run = execute(recipe, resume=is_same, overwrite=not is_same, watcher=_Reports(report))
        metrics = _metrics(run, recipe, settings)
        pruned = run.networks[-1]
        if run.result is not None:  # of all epochs, also those before an interruption, whose reports may be lost
            facts["intermediate"] = [log.metric for log in run.result.logs if log.metric is not None]
        facts |= {"metrics": metrics, "row": vars(pruned), "artefact": str(run.folder / pruned.name),
                  "report": str(run.report), "targets": list(run.targets)}  # fmt: skip
    except NniPruneExtError as error:
        facts["error"] = str(error)
        raise
    finally:
        _write(folder, facts)
    return metrics


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one trial for NNI, or the recipe itself outside NNI; a mistake is one message and exit code 2."""
    options = _parser().parse_args(arguments)
    settings = TrialSettings(options.runtime, options.cost, options.cost_weight, options.threads)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        base = load_recipe(options.recipe, complete=False)
        folder = Path(os.environ.get("NNI_OUTPUT_DIR") or options.out)
        result = run_trial(base, sampled_parameters(), folder, settings, report=nni.report_intermediate_result)
    except NniPruneExtError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:  # how NNI stops a trial; its checkpoints stay
        return 130
    nni.report_final_result(result)
    return 0


def sampled_parameters() -> dict[str, object]:
    """Returns what NNI sampled for this very trial; nothing outside NNI."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NNI's remark that it is not there, which is allowed
        received = nni.get_next_parameter()
    channel, trial = os.environ.get("NNI_TRIAL_COMMAND_CHANNEL", ""), os.environ.get("NNI_TRIAL_JOB_ID", "")
    record = recorded_parameters(channel, trial)
    if record is not None and record["parameters"] != received:
        _logger.warning("NNI handed over %s, which is another trial's; on record is %s", received, record["parameters"])
        nni.trial._params = record  # results are told with the number of these parameters
        received = record["parameters"]
    return dict(received or {})


class _Reports(Watcher):
    """Hands the validation metric of every epoch after the dense network's own training to NNI."""

    def __init__(self, report: Callable[[float], None]) -> None:
        self._report = report

    def epoch(self, log: EpochLog) -> None:
        """Reports an epoch, if a metric was measured."""
        if log.metric is not None and math.isfinite(log.metric) and log.phase not in _OF_THE_DENSE_NETWORK:
            self._report(log.metric)
        _logger.info("%s epoch %d: loss %.4f, metric %s", log.phase, log.epoch + 1, log.loss, log.metric)

    def note(self, text: str) -> None:
        """Writes a note to the trial's log."""
        _logger.info("%s", text)


def _earlier_parameters(folder: Path) -> object:
    """Returns what an earlier start of the same trial got; ``None`` if there was none."""
    try:
        return json.loads((folder / RESULT).read_bytes())["parameters"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _write(folder: Path, facts: Mapping[str, object]) -> None:
    write_text(folder / RESULT, json.dumps(facts, indent=1, default=str) + "\n")


def _check(recipe: Recipe, settings: TrialSettings) -> None:
    """Finds out before the work what would only fail after it."""
    if recipe.data is None or recipe.method is None:
        missing = "data" if recipe.data is None else "method"
        raise ConfigError(
            f"The trial's recipe has no {missing}, expected one: trials are compared by the validation metric of their "
            f"pruned networks. Add {missing} to the recipe or to the search space."
        )
    if settings.runtime is not None:
        found = runtime(settings.runtime).availability()
        if not found.usable:
            raise RuntimeUnavailableError(f"The runtime '{settings.runtime}' is not usable here: {found.reason}")


def _metrics(run: RunResult, recipe: Recipe, settings: TrialSettings) -> dict[str, float]:
    dense, pruned = run.networks[0], run.networks[-1]
    if pruned.validation is None or not math.isfinite(pruned.validation):
        raise TrainingError(
            f"The validation metric of the trial is {pruned.validation}, expected a finite number. Lower the learning "
            "rate, or prune less."
        )
    latency = {row.name: row.latency_ms for row in (dense, pruned)}
    if settings.runtime is not None:
        latency = _measured(run, recipe, settings.runtime)
    found: dict[str, float | None] = {
        "metric": pruned.validation,
        "macs": pruned.macs,
        "params": pruned.params,
        "latency_ms": latency[pruned.name],
        "dense_metric": dense.validation,
        "dense_macs": dense.macs,
        "dense_params": dense.params,
        "dense_latency_ms": latency[dense.name],
        "target_met": float(run.met),
    }
    default = pruned.validation - settings.cost_weight * _share(found, settings)
    return {
        "default": default,
        **{name: value for name, value in found.items() if value is not None and math.isfinite(value)},
    }


def _share(found: Mapping[str, float | None], settings: TrialSettings) -> float:
    """Returns the cost of the pruned network as a share of the dense one's."""
    if not settings.cost_weight:
        return 0.0
    cost, dense = found[settings.cost], found[f"dense_{settings.cost}"]
    if cost is None or not dense:
        raise ConfigError(
            f"The trial's {settings.cost} was not measured, expected it, because it counts in the result. Set measure "
            "in the recipe, or name a runtime."
        )
    return cost / dense


def _measured(run: RunResult, recipe: Recipe, name: str) -> dict[str, float | None]:
    """Measures the dense and the pruned network side by side on a runtime, one image at a time."""
    rows: tuple[Row, Row] = (run.networks[0], run.networks[-1])
    paths = {row.name: run.folder / row.name / ONNX for row in rows}
    spec = ModelSpec.load(run.folder / rows[0].name)
    assert spec is not None  # the workbench writes it
    images = torch.randn(_IMAGES, *spec.input_shape[1:], generator=torch.Generator().manual_seed(recipe.seed))
    times = recipe.measure.model_dump() if recipe.measure else {}
    report = compare_latency(paths, images, on=name, **times)
    return {row.name: row.p50_ms for row in report.rows}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Runs one trial of an NNI experiment, or its recipe without NNI.")
    parser.add_argument("recipe", type=Path, help="recipe that trials have in common")
    parser.add_argument("--runtime", help="measure latency on this registered runtime")
    parser.add_argument("--cost", choices=COSTS, default="macs", help="what makes a trial worse")
    parser.add_argument("--cost-weight", type=float, default=0.0, help="how much: the share of the dense cost × this")
    parser.add_argument("--threads", type=int, help="CPU threads of training")
    parser.add_argument("--out", default="trial", help="folder of the trial outside NNI")
    return parser


if __name__ == "__main__":
    sys.path.insert(0, "")  # so that module.path:factory finds the user's own modules
    sys.exit(main())
