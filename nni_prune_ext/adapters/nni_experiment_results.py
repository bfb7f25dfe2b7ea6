"""What came of an experiment: one record per trial, as JSON, CSV and a table, with the Pareto fronts."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.markup import escape
from rich.table import Table

from nni_prune_ext.report import number_text
from nni_prune_ext.text_files import write_text

COSTS = ("macs", "params", "latency_ms")
TRIALS_JSON, TRIALS_CSV = "trials.json", "trials.csv"
RESULT = "result.json"


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        id: NNI's.
        number: its place in the order of start, from 1; NNI's own numbers begin again when it resumes.
        status: NNI's: ``SUCCEEDED``, ``FAILED``, ``RUNNING`` and so on.
        parameters: what was sampled.
        metrics: final numbers: ``default``, ``metric``, ``macs``, ``params``, ``latency_ms`` and others.
        intermediate: validation metric of each epoch of method and recovery.
        seconds: from start to end; ``None`` while it runs.
        artefact: folder of the pruned network, on this machine.
        error: why it failed.
    """

    id: str
    number: int
    status: str
    parameters: Mapping[str, Any]
    metrics: Mapping[str, float] = field(default_factory=dict)
    intermediate: tuple[float, ...] = ()
    seconds: float | None = None
    artefact: str | None = None
    error: str | None = None

    @property
    def default(self) -> float | None:
        """What the tuner maximised."""
        return self.metrics.get("default")

    @property
    def label(self) -> str:
        """The parameters in one line."""
        return ", ".join(_texts(self.parameters))


def trials_of(jobs: Sequence[Any], metrics: Mapping[str, Sequence[Any]], folder: Path) -> tuple[Trial, ...]:
    """Makes records of NNI's trial jobs; what trials left in their own folders is added where it is found.

    Args:
        jobs: NNI's trial jobs.
        metrics: trial's id → NNI's reports.
        folder: of the experiment.
    """
    found = {path.parent.name: path for path in folder.glob(f"environments/*/trials/*/{RESULT}")}
    ordered = sorted(jobs, key=lambda job: (job.startTime or 0, job.sequenceId or 0))
    return tuple(
        _trial(number, job, metrics.get(job.trialJobId, ()), found.get(job.trialJobId))
        for number, job in enumerate(ordered, 1)
    )


def _trial(number: int, job: Any, reports: Sequence[Any], result: Path | None) -> Trial:
    left = _read(result)
    final = next((report.data for report in reversed(reports) if report.type == "FINAL"), None)
    if final is None and job.finalMetricData:
        final = job.finalMetricData[-1].data
    numbers = final if isinstance(final, dict) else {} if final is None else {"default": final}
    steps = sorted((r for r in reports if r.type == "PERIODICAL"), key=lambda r: r.timestamp)
    values = [r.data.get("default") if isinstance(r.data, dict) else r.data for r in steps]
    ended = job.endTime if job.endTime and job.endTime > 0 else None
    return Trial(
        id=job.trialJobId,
        number=number,
        status=job.status,
        parameters=left.get("parameters") or (job.hyperParameters[-1].parameters if job.hyperParameters else {}),
        metrics=numbers,
        intermediate=tuple(float(value) for value in left.get("intermediate", values) if value is not None),
        seconds=(ended - job.startTime) / 1000 if ended else None,
        artefact=left.get("artefact"),
        error=left.get("error") if job.status != "SUCCEEDED" else None,
    )


def _read(result: Path | None) -> dict[str, Any]:
    try:
        content = json.loads(result.read_bytes()) if result else {}
    except (OSError, ValueError):  # half written by a trial that was killed
        return {}
    return content if isinstance(content, dict) else {}


def pareto_front(trials: Sequence[Trial], cost: str) -> tuple[Trial, ...]:
    """Returns the trials that no other beats in both metric and cost, by falling cost; equals count once.

    Args:
        cost: ``macs``, ``params`` or ``latency_ms``.
    """
    able = [trial for trial in trials if cost in trial.metrics and _metric(trial) is not None]
    front: list[Trial] = []
    best = float("-inf")
    for trial in sorted(able, key=lambda trial: (trial.metrics[cost], -(_metric(trial) or 0.0), trial.number)):
        if (_metric(trial) or 0.0) > best:
            best = _metric(trial) or 0.0
            front.append(trial)
    return tuple(reversed(front))


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """Returns the trial with the highest result among those that met their target, or among all if none did."""
    able = [trial for trial in trials if trial.status == "SUCCEEDED" and trial.default is not None]
    met = [trial for trial in able if trial.metrics.get("target_met", 1.0)]
    return max(met or able, key=lambda trial: (trial.default or 0.0, -trial.number), default=None)


def _metric(trial: Trial) -> float | None:
    if trial.status != "SUCCEEDED":
        return None
    return trial.metrics.get("metric", trial.default)


def write_results(folder: Path, trials: Sequence[Trial], facts: Mapping[str, object]) -> None:
    """Writes ``trials.json`` and ``trials.csv``: all trials, which of them are on a Pareto front, and the best one.

    Raises:
        OutputError: the folder cannot be written.
    """
    fronts = {cost: [trial.id for trial in pareto_front(trials, cost)] for cost in COSTS}
    best = best_trial(trials)
    content = {**facts, "best": best.id if best else None, "pareto": fronts,
               "trials": [asdict(trial) for trial in trials]}  # fmt: skip
    write_text(folder / TRIALS_JSON, json.dumps(content, indent=1, default=str) + "\n")
    write_text(folder / TRIALS_CSV, _csv(trials, fronts))


def _csv(trials: Sequence[Trial], fronts: Mapping[str, Sequence[str]]) -> str:
    flat = [dict(_flat(trial.parameters)) for trial in trials]
    parameters = list(dict.fromkeys(name for one in flat for name in one))
    metrics = list(dict.fromkeys(name for trial in trials for name in trial.metrics))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    pareto = [f"pareto_{cost}" for cost in COSTS]
    writer.writerow(["number", "id", "status", *parameters, *metrics, *pareto, "seconds", "artefact", "error"])
    for trial, own in zip(trials, flat):
        writer.writerow([
            trial.number, trial.id, trial.status, *(own.get(name, "") for name in parameters),
            *(trial.metrics.get(name, "") for name in metrics), *(int(trial.id in fronts[cost]) for cost in COSTS),
            "" if trial.seconds is None else trial.seconds, trial.artefact or "", trial.error or "",
        ])  # fmt: skip
    return text.getvalue()


def _flat(parameters: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """Returns nested choices as columns: ``method``, ``method.steps``."""
    found: list[tuple[str, object]] = []
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            inner = {key: entry for key, entry in value.items() if key != "_name"}
            found += [(prefix + name, value.get("_name", ""))] if "_name" in value else []
            found += _flat(inner, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found


def _texts(parameters: Mapping[str, Any]) -> list[str]:
    return [str(value) if name in ("method", "target") else f"{name}={value}" for name, value in _flat(parameters)]


_COST_TEXTS: Final[tuple[tuple[str, Callable[[float], str]], ...]] = (
    ("macs", number_text.count),
    ("params", number_text.count),
    ("latency_ms", "{:.2f}".format),
)


def results_table(trials: Sequence[Trial], *, metric: str = number_text.TOP1) -> Table:
    """Returns the dense network and all trials for the terminal, the best first.

    Costs come with their share of the dense network's. Marks say which cost's Pareto front a trial is on.

    Args:
        metric: name of the validation metric; anything but ``top-1`` is no percentage.
    """
    fronts = {cost: {trial.id for trial in pareto_front(trials, cost)} for cost in COSTS}
    table = Table(title="trials, best first", title_justify="left", pad_edge=False)
    for heading in (
        "trial",
        "parameters",
        "status",
        f"validation {metric}",
        "result",
        "MACs",
        "params",
        "ms",
        "Pareto",
    ):
        table.add_column(heading, justify="left" if heading in ("trial", "parameters", "status", "Pareto") else "right")
    accuracy = number_text.accuracy(metric)
    ordered = sorted(trials, key=lambda one: (one.default is None, -(one.default or 0.0), one.number))
    dense = next((_dense(trial) for trial in ordered if _dense(trial)), None)
    if dense is not None:
        metric_text = accuracy(dense["metric"]) if "metric" in dense else "–"
        costs = (_with_share(dense, name, shown) for name, shown in _COST_TEXTS)
        table.add_row("dense", "", "", metric_text, "", *costs, "", end_section=True)
    for trial in ordered:
        value, found = trial.metrics.get("metric"), trial.metrics
        table.add_row(
            f"{trial.number} {trial.id}",
            escape(trial.label),
            trial.status.lower(),
            "–" if value is None else accuracy(value),
            "–" if trial.default is None else f"{trial.default:.4f}",
            *(_with_share(found, name, shown) for name, shown in _COST_TEXTS),
            ", ".join(cost.removesuffix("_ms") for cost in COSTS if trial.id in fronts[cost]),
        )
    return table


def _dense(trial: Trial) -> dict[str, float]:
    """Returns what a trial reported of the dense network."""
    mark = "dense_"
    return {name.removeprefix(mark): value for name, value in trial.metrics.items() if name.startswith(mark)}


def _with_share(found: Mapping[str, float], name: str, shown: Callable[[float], str]) -> str:
    """Returns a cost and its share of the dense network's, as far as they are known."""
    if name not in found:
        return "–"
    share = f" ({number_text.share(found[name], found[f'dense_{name}'])})" if f"dense_{name}" in found else ""
    return shown(found[name]) + share
