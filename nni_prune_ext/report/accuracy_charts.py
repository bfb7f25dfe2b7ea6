"""The section that draws accuracy against cost; runs that cannot be compared get charts of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nni_prune_ext.report import charts
from nni_prune_ext.report.charts import Network
from nni_prune_ext.report.comparable_runs import machine_name, same_measurement, same_task, task_name
from nni_prune_ext.report.facts import RunReport
from nni_prune_ext.report.network_tables import has_gated
from nni_prune_ext.report.page_parts import Chart, Section
from nni_prune_ext.report.rows import Row

_FRONT = "Up and to the left is better. The dashed line is the Pareto front: networks that no other one beats in both."
_LABELS = "Numbers in brackets are runs; a point without room for a label is in the table."
_TASKS = (
    "The runs differ in data, input or metric: they have charts of their own and no common front, because their "
    "accuracies and costs cannot be compared."
)
_MACHINES = (
    "Latencies were measured on different machines, with different runtimes or settings, or under conditions that were "
    "not recorded: they have charts of their own and no common front."
)
_TIMES = (
    "Latencies of different runs were measured at different times; measure the networks side by side with "
    "nni-prune-ext benchmark before a small difference counts."
)


@dataclass(frozen=True)
class _Axis:
    name: str
    cost: Callable[[Row], float | None]
    groups: Callable[[Sequence[RunReport]], list[list[int]]]
    group_name: Callable[[Sequence[RunReport]], str]


_AXES = (
    _Axis("MACs", lambda row: row.macs, same_task, task_name),
    _Axis(
        "latency",
        lambda row: row.latency_ms,
        same_measurement,
        lambda group: f"{task_name(group)}, {machine_name(group)}",
    ),
)


def accuracy_section(reports: Sequence[RunReport]) -> Section:
    """Returns accuracy over MACs and over latency, over all networks of all runs that can be compared."""
    shown: list[Chart] = []
    missing: list[str] = []
    drawn: dict[str, list[list[int]]] = {}
    for axis in _AXES:
        found = [(group, _networks(reports, group, axis.cost)) for group in axis.groups(reports)]
        found = [(group, networks) for group, networks in found if networks]
        drawn[axis.name] = [group for group, _ in found]
        if not found:
            missing.append(
                f"There is no chart over {axis.name}: no network has both accuracy and {axis.name} measured."
            )
        shown += [
            _chart(reports, group, networks, axis, number if len(found) > 1 else None)
            for number, (group, networks) in enumerate(found, start=1)
        ]
    lead = [" ".join([_FRONT, *([_LABELS] if len(reports) > 1 else [])]), *_remarks(drawn)] if shown else []
    return Section(
        "Accuracy against cost", [*lead, *missing], shown, beside=True, marks=bool(shown), gated=has_gated(reports)
    )


def _remarks(drawn: dict[str, list[list[int]]]) -> list[str]:
    """Returns why there are several charts of a kind, and what a common one does not say."""
    tasks, measurements = drawn["MACs"], drawn["latency"]
    return [
        *([_TASKS] if len(tasks) > 1 else []),
        *([_MACHINES] if any(sum(run in task for run, *_ in measurements) > 1 for task in tasks) else []),
        *([_TIMES] if any(len(group) > 1 for group in measurements) else []),
    ]


def _chart(
    reports: Sequence[RunReport], group: Sequence[int], networks: Sequence[Network], axis: _Axis, number: int | None
) -> Chart:
    """Draws one group of runs; ``number`` is its place among several, ``None`` for the only one."""
    metric = reports[group[0]].metric_name
    name = f"pareto-{axis.name.lower()}" + (f"-{number}" if number else "")
    caption = f"{_accuracy(metric)} over {axis.name}"
    if number:
        runs = ", ".join(str(run + 1) for run in group)
        caption += f", run{'s' if len(group) > 1 else ''} {runs}: {axis.group_name([reports[run] for run in group])}"
    svg = charts.scatter(networks, axis=axis.name, name=name, metric=metric)
    assert svg is not None  # there is a network
    return Chart(svg, caption)


def _accuracy(metric: str) -> str:
    return "Top-1 accuracy" if metric == "top-1" else metric


def _networks(reports: Sequence[RunReport], group: Sequence[int], cost: Callable[[Row], float | None]) -> list[Network]:
    """Returns the networks with accuracy and cost; those of several runs that coincide share one label."""
    found = [
        (row.name, reports[run].kind(row), run, price, row.top1)
        for run in group
        for row in reports[run].rows
        if (price := cost(row)) is not None and row.top1 is not None
    ]
    networks = []
    for name, kind, run, price, accuracy in found:
        runs = [str(other + 1) for label, _, other, *at in found if (label, at) == (name, [price, accuracy])]
        label = charts.elided(name, 22) + (f" ({', '.join(runs)})" if len(reports) > 1 else "")
        networks.append(Network(label, kind, run, price, accuracy))
    return sorted(networks, key=lambda one: one.kind != "pruned")  # pruned ones get their labels first
