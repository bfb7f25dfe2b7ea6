"""Which runs may stand in one chart: accuracies of the same data, latencies of the same machine."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

from nni_prune_ext.report import number_text
from nni_prune_ext.report.facts import RunReport
from nni_prune_ext.report.page_parts import words


def same_task(reports: Sequence[RunReport]) -> list[list[int]]:
    """Returns the runs, by their place, in groups of the same data, input and metric.

    Different models may share a group: a small dense network and a large pruned one are rivals. But if one model
    appears with different dense MACs, or if the recipe of a run is not known, its input may differ too; then only runs
    with the same dense MACs share a group.
    """
    groups = _grouped(range(len(reports)), lambda run: _task(reports[run]))
    return [part for group in groups for part in _split_by_macs(reports, group)]


def same_measurement(reports: Sequence[RunReport]) -> list[list[int]]:
    """Returns the groups of ``same_task``, split by machine, runtime and conditions; a run without them is alone."""
    return [
        part
        for group in same_task(reports)
        for part in _grouped(group, lambda run: _conditions(reports[run]) or ("alone", run))
    ]


def task_name(reports: Sequence[RunReport]) -> str:
    """Returns data, input and dense cost of a group of ``same_task``, for the caption of a chart."""
    first = reports[0]
    data, model = (_part(first, name) for name in ("data", "model"))
    costs = " / ".join(dict.fromkeys(number_text.count(report.rows[0].macs) for report in reports))
    known = (
        (data.get("image_size"), "image size {}"),
        (model.get("input_shape"), "input {}"),
        (data.get("limit_images"), "at most {} images"),
    )
    inputs = [text.format(words(value).text) for value, text in known if value]
    return ", ".join([first.data or "data unknown", *inputs, f"dense {costs} MACs"])


def machine_name(reports: Sequence[RunReport]) -> str:
    """Returns machine, runtime and batch of a group of ``same_measurement``, for the caption of a chart."""
    report, latency = reports[0], reports[0].latency
    if latency is None:
        return "conditions unknown"
    runtimes = ", ".join(dict.fromkeys(row.runtime or "runtime unknown" for row in latency.rows))
    gpu = report.environment.get("gpu")
    machine = f"{report.environment.get('cpu') or 'CPU unknown'}" + (f", {gpu}" if gpu and gpu != "none" else "")
    return f"{machine}, {runtimes}, batch {latency.batch_size or 'unknown'}"


def _grouped(runs: Sequence[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.values())


def _task(report: RunReport) -> Hashable:
    data, model = (_part(report, name) for name in ("data", "model"))
    inputs = data.get("image_size"), data.get("limit_images"), model.get("input_shape")
    return report.data, report.metric, repr(inputs)


def _part(report: RunReport, name: str) -> Mapping[str, object]:
    found = (report.recipe or {}).get(name)
    return found if isinstance(found, Mapping) else {}


def _split_by_macs(reports: Sequence[RunReport], group: Sequence[int]) -> list[list[int]]:
    macs = [reports[run].rows[0].macs for run in group]
    models = {(reports[run].model, cost) for run, cost in zip(group, macs)}
    one_input = len({model for model, _ in models}) == len(models) and all(reports[run].recipe for run in group)
    return [list(group)] if one_input else _grouped(group, lambda run: reports[run].rows[0].macs)


def _conditions(report: RunReport) -> tuple[object, ...] | None:
    """Returns what latencies must share to be comparable; ``None`` if it was not recorded."""
    latency, environment = report.latency, report.environment
    if latency is None or "cpu" not in environment:
        return None
    runtimes = frozenset(row.runtime for row in latency.rows)
    providers = frozenset(row.providers for row in latency.rows)
    machine = tuple(str(environment.get(name)) for name in ("cpu", "cpu_capability", "cpu_count", "gpu"))
    return (*machine, runtimes, providers, latency.batch_size, latency.threads, latency.clock)
