"""What was measured, as files: a page with heat maps, limits for the allocator, a ``config_list`` for NNI."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from nni_prune_ext.report import number_text
from nni_prune_ext.report.charts import LAYERS_PER_CHART, WIDTH, elided
from nni_prune_ext.report.page import sections_page
from nni_prune_ext.report.page_parts import Cell, Chart, Column, Group, Section, Table
from nni_prune_ext.report.svg import FONT, INK, SERIES, TRACK, as_svg, empty_figure
from nni_prune_ext.sensitivity.measuring import Sensitivity, SensitivityPoint
from nni_prune_ext.text_files import write_text

LIMITS, NNI_CONFIG, PAGE = "limits.json", "nni_config.json", "sensitivity.html"
_NOTE = "Every group was pruned alone and nothing was trained; changes of several groups do not add up."
_BETWEEN = (
    "Between two measured ratios the drop is taken to grow linearly; nothing is concluded beyond the largest one."
)
_NARROWEST_WITH_TEXT = 11.0
"""Cells of a heat map that are narrower, in per cent of its width, hold no number."""


def write_sensitivity(folder: Path, found: Sensitivity, *, max_drop: float) -> None:
    """Writes ``sensitivity.html``, ``limits.json`` and ``nni_config.json`` into a folder, each atomically.

    Args:
        max_drop: largest drop of the metric that a group alone may cost, in the metric's own unit.

    Raises:
        ConfigError: ``max_drop`` is out of range.
        OutputError: a file cannot be written.
    """
    limits, config = found.limits(max_drop), found.nni_config(max_drop)
    write_text(folder / LIMITS, limits.model_dump_json(indent=1, exclude_defaults=True) + "\n")
    write_text(folder / NNI_CONFIG, json.dumps(config, indent=1) + "\n")
    subtitle = " · ".join([found.method, f"{len(found.channels)} groups", *([found.data] if found.data else [])])
    sections = [_changes(found), _limits(found, max_drop)]
    write_text(folder / PAGE, sections_page("Sensitivity of channel groups", subtitle, sections))


def _changes(found: Sensitivity) -> Section:
    metric, change = number_text.accuracy(found.metric_name), number_text.accuracy_difference(found.metric_name)
    groups = list(found.channels)
    parts = [groups[start : start + LAYERS_PER_CHART] for start in range(0, len(groups), LAYERS_PER_CHART)]
    unit = "points" if found.metric_name == number_text.TOP1 else "its own unit"
    caption = f"Change of {found.metric_name}, {unit}, by share of the channels removed"
    charts = [Chart(_heat_map(found, part, f"sensitivity-{n}"), caption) for n, part in enumerate(parts, start=1)]
    timed = any(point.latency_ratio is not None for point in found.points)
    headings = ["channels", "removed", found.metric_name, "to dense", "MACs left", *(["latency"] if timed else [])]
    rows = [
        [
            Cell(group),
            Cell(str(found.channels[group])),
            Cell(number_text.percent(point.ratio)),
            Cell(metric(point.metric)),
            Cell(change(-found.drop(point))),
            Cell(number_text.percent(point.macs_share)),
            *([Cell(_latency(point))] if timed else []),
        ]
        for group in groups
        for point in found.of(group)
    ]
    columns = [Column("group", numeric=False), *(Column(heading) for heading in headings)]
    table = Table("All points", columns, [Group(rows)], folded=len(rows) > LAYERS_PER_CHART)
    return Section("Changes", [f"The dense network is at {metric(found.dense)}. {_NOTE}"], charts, [table], beside=True)


def _limits(found: Sensitivity, max_drop: float) -> Section:
    columns = [Column("group", numeric=False), Column("largest ratio"), Column("layers", numeric=False, wraps=True)]
    rows = [
        [Cell(name), Cell(number_text.percent(ratio)), Cell(", ".join(found.layers[name]))]
        for name, ratio in found.largest_ratios(max_drop).items()
    ]
    drop = number_text.accuracy(found.metric_name)(max_drop)
    table = Table(f"Largest ratio for a drop of {drop} at most", columns, [Group(rows)], note=_BETWEEN)
    return Section("Limits", tables=[table])


def _latency(point: SensitivityPoint) -> str:
    return "not measured" if point.latency_ratio is None else f"{point.latency_ratio:.3f} ×"


def _heat_map(found: Sensitivity, groups: Sequence[str], name: str) -> str:
    """Draws one row per group, a cell per measured ratio, deeper where more of the dense metric is lost."""
    scale = 100.0 if found.metric_name == number_text.TOP1 else 1.0
    width = _cell_width(found, groups)
    with empty_figure(WIDTH, 34 + 17 * len(groups)) as figure:
        axes = figure.subplots()
        for row, group in enumerate(groups):
            for point in found.of(group):
                lost, at = found.drop(point), 100 * point.ratio
                depth = min(max(lost / max(abs(found.dense), 1e-9), 0.0), 1.0) if math.isfinite(lost) else 1.0
                for colour, alpha in ((TRACK, 0.5), (SERIES[0], 0.75 * depth**0.5)):
                    axes.barh(row, width, left=at - width / 2, height=0.86, color=colour, alpha=alpha)
                if width >= _NARROWEST_WITH_TEXT:
                    text = f"{-scale * lost:+.1f}".replace("-", "−") if math.isfinite(lost) else "–"
                    axes.text(at, row, text, ha="center", va="center", size=FONT - 1.5, color=INK)
        axes.set_yticks(range(len(groups)), [elided(group, 22) for group in groups], size=FONT)
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xticks([25, 50, 75], ["25", "50", "75 % removed"], size=FONT)
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)
        return as_svg(figure, name=name, description=f"Change of the metric, {len(groups)} groups pruned alone")


def _cell_width(found: Sensitivity, groups: Sequence[str]) -> float:
    """Returns a width in per cent at which cells of one row do not overlap."""
    ratios = [[point.ratio for point in found.of(group)] for group in groups]
    gaps = [after - before for row in ratios for before, after in pairwise(row)]
    return min(18.0, 90 * min(gaps, default=1.0))
