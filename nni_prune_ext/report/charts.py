"""The charts of the page, each as SVG text, or ``None`` where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, TypeVar

from nni_prune_ext.report import number_text
from nni_prune_ext.report.facts import EpochFacts, WidthFacts
from nni_prune_ext.report.label_places import place_labels
from nni_prune_ext.report.rows import Kind
from nni_prune_ext.report.svg import FONT, GRID, INK, MUTED, PAPER, SERIES, TRACK, as_svg, empty_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Row = TypeVar("_Row")
WIDTH = 350
"""Of every chart, in SVG units: no wider than a phone, so that letters keep their size there; a desk scales it up."""
MARKERS: Mapping[Kind, str] = {"dense": "o", "control": "D", "gated": "^", "pruned": "s"}
LAYERS_PER_CHART = 40
_STROKES = ("-", "--", ":")
"""Of lines that share a colour in one chart."""


@dataclass(frozen=True)
class Network:
    """One point of a scatter.

    Attributes:
        label: what stands beside it.
        kind: gives its marker.
        run: number of its run, from 0; gives its colour.
        cost: MACs or milliseconds.
        accuracy: top-1, 0–1, or another metric of which more is better.
    """

    label: str
    kind: Kind
    run: int
    cost: float
    accuracy: float


def pareto_front(networks: Sequence[Network]) -> list[Network]:
    """Returns the networks that no other one beats in cost and accuracy at once, cheapest first."""
    front: list[Network] = []
    for network in sorted(networks, key=lambda one: (one.cost, -one.accuracy)):
        if not front or network.accuracy > front[-1].accuracy:
            front.append(network)
    return front


def scatter(networks: Sequence[Network], *, axis: str, name: str, metric: str = number_text.TOP1) -> str | None:
    """Returns accuracy over cost with the Pareto front; ``None`` without a network whose accuracy is a number."""
    networks = [network for network in networks if math.isfinite(network.accuracy)]
    if not networks:
        return None
    unit, scale = _unit(max(network.cost for network in networks)) if axis == "MACs" else ("ms", 1.0)
    percent = 100.0 if metric == number_text.TOP1 else 1.0
    with empty_figure(WIDTH, 300) as figure:
        axes = figure.subplots()
        at = [(network.cost / scale, percent * network.accuracy) for network in networks]
        front = [(one.cost / scale, percent * one.accuracy) for one in pareto_front(networks)]
        axes.plot(*zip(*front), drawstyle="steps-post", color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1.5)
        for network, (x, y) in zip(networks, at):
            colour = SERIES[network.run % len(SERIES)]
            marker = MARKERS[network.kind]
            face = colour if network.kind == "pruned" else PAPER
            axes.plot([x], [y], marker, markersize=7, markerfacecolor=face, markeredgecolor=colour, mew=1.6, zorder=3)
        _pad(axes, at, least=percent / 100)
        axes.set_xlabel(f"{axis} ({unit})" if unit else axis)
        axes.set_ylabel("top-1 (%)" if metric == number_text.TOP1 else elided(metric, 30))
        place_labels(axes, at, [one.label for one in networks], stairs=front, colour=INK, line=MUTED)
        return as_svg(figure, name=name, description=f"{metric} over {axis}, {len(networks)} networks")


def width_charts(widths: Sequence[WidthFacts], *, name: str, of: str = "channels") -> list[str]:
    """Returns the share of channels (or weights) that every layer keeps, in charts of at most so many layers each."""
    names = short_names([width.layer for width in widths])
    shown = [width.model_copy(update={"layer": short}) for width, short in zip(widths, names)]
    return [_width_chart(part, name=f"{name}-{number}", of=of) for number, part in enumerate(in_parts(shown))]


def in_parts(rows: Sequence[_Row]) -> list[Sequence[_Row]]:
    """Returns the rows of a long bar chart in parts of about the same length, one per chart."""
    num_charts = math.ceil(len(rows) / LAYERS_PER_CHART)
    size = math.ceil(len(rows) / max(num_charts, 1))
    return [rows[start : start + size] for start in range(0, len(rows), size)] if rows else []


def short_names(layers: Sequence[str]) -> list[str]:
    """Returns the names of layers without the modules that hold all of them."""
    modules = [layer.split(".")[:-1] for layer in layers]
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*modules))
    shared = len(list(same)) if len(modules) > 1 else 0
    return [".".join(layer.split(".")[shared:]) for layer in layers]


def training_curve(epochs: Sequence[EpochFacts], *, stage: str, name: str) -> str | None:
    """Returns loss and validation metric over the epochs of one stage, with its phases; ``None`` without a loss."""
    losses = [_number(epoch.loss) for epoch in epochs]
    metrics = [_number(epoch.metric) for epoch in epochs]
    panels = [(label, values) for label, values in (("loss", losses), ("validation metric", metrics)) if _any(values)]
    if not panels:
        return None
    with empty_figure(WIDTH, 40 + 150 * len(panels)) as figure:
        for index, (axes, (label, values)) in enumerate(
            zip(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels)
        ):
            marker = "o" if len(values) <= 40 else ""
            axes.plot(
                range(1, len(values) + 1), values, marker=marker, ls="-", color=SERIES[index], markersize=3.5, lw=1.6
            )
            axes.set_ylabel(label)
            axes.set_xlim(0.5, len(values) + 0.5)
            axes.margins(y=0.12)
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            axes.grid(axis="x", visible=False)
        _mark_phases(figure.axes, epochs)
        figure.axes[-1].set_xlabel("epoch")
        return as_svg(figure, name=name, description=f"Training curves of {stage}, {len(epochs)} epochs")


def note_charts(notes: Sequence[Mapping[str, float | None]], *, name: str, most: int = 12) -> dict[str, str]:
    """Returns what the method logged over its progress, one small chart per key; ``family/name`` keys share one."""
    charts: dict[str, str] = {}
    for number, (family, keys) in enumerate(list(note_families(notes).items())[:most]):
        lines = [
            [(_number(note.get("progress")), _number(note.get(key))) for note in notes if key in note] for key in keys
        ]
        if max(len(line) for line in lines) < 2:  # a single point is no curve
            continue
        legend_rows = -(-len(lines) // 2) if len(lines) > 1 else 0
        with empty_figure(WIDTH, 170 + 17 * legend_rows) as figure:
            axes = figure.subplots()
            for place, (key, line) in enumerate(zip(keys, lines)):
                marker = "o" if len(line) <= 40 else ""
                stroke, colour = _STROKES[place // len(SERIES) % len(_STROKES)], SERIES[place % len(SERIES)]
                label = elided(key.partition("/")[2], 22)
                axes.plot(*zip(*line), marker=marker, ls=stroke, color=colour, markersize=3.5, lw=1.6, label=label)
            axes.set_xlabel("progress")
            axes.set_xlim(-0.02, 1.02)
            axes.margins(y=0.15)
            axes.grid(axis="x", visible=False)
            if legend_rows:
                figure.legend(loc="outside lower left", ncols=2, fontsize=FONT, frameon=False)
            charts[family] = as_svg(figure, name=f"{name}-{number}", description=f"{family} over progress")
    return charts


def note_families(notes: Sequence[Mapping[str, float | None]]) -> dict[str, list[str]]:
    """Returns what is drawn together → its keys: ``ratio/conv1`` and ``ratio/conv2`` are both of the family ratio."""
    families: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for note in notes for key in note if key != "progress"):
        families.setdefault(key.partition("/")[0], []).append(key)
    return families


def _width_chart(widths: Sequence[WidthFacts], *, name: str, of: str) -> str:
    bar = 17
    with empty_figure(WIDTH, 34 + bar * len(widths)) as figure:
        axes = figure.subplots()
        for row, width in enumerate(widths):
            kept = width.after / width.before if width.before else 0.0
            axes.barh(row, 100, height=0.62, color=TRACK)
            axes.barh(row, 100 * kept, height=0.62, color=SERIES[0])
            counts = f"{width.before} → {width.after}"
            text = counts if of == "channels" else number_text.share(width.after, width.before)
            axes.text(105, row, text, va="center", size=FONT, color=INK if kept < 1 else MUTED)
        axes.set_yticks(range(len(widths)), [elided(width.layer, 22) for width in widths], size=FONT)
        axes.set_ylim(len(widths) - 0.4, -0.6)
        axes.set_xlim(0, 152)
        axes.set_xticks([0, 50, 100], ["0", "50", "100 % kept"], size=FONT)
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)
        return as_svg(figure, name=name, description=f"Share of {of} kept in {len(widths)} layers")


def _mark_phases(panels: Sequence[Axes], epochs: Sequence[EpochFacts]) -> None:
    """Separates phases by lines, and names those that are wide enough for their name."""
    starts = [i for i, one in enumerate(epochs) if i == 0 or one.phase != epochs[i - 1].phase]
    for start, end in zip(starts, [*starts[1:], len(epochs)]):
        for axes in panels:
            if start:
                axes.axvline(start + 0.5, color=GRID, linewidth=1.2, zorder=0.5)
        room = int((end - start) / len(epochs) * (WIDTH - 80) / 7)
        if epochs[start].phase and room >= min(4, len(epochs[start].phase)):
            text, top = elided(epochs[start].phase, max(room, 2)), panels[0]
            place = ((start + end) / 2 + 0.5, 1.03)
            top.text(*place, text, transform=top.get_xaxis_transform(), ha="center", size=FONT, color=MUTED)


def elided(text: str, length: int) -> str:
    """Returns the text, without its middle if it is too long."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def _pad(axes: Axes, at: Sequence[tuple[float, float]], *, least: float) -> None:
    """Leaves room around the points, and does not blow up a difference in accuracy below the least one that counts."""
    for limits, values, smallest in (
        (axes.set_xlim, [x for x, _ in at], 0.1 * max(x for x, _ in at)),
        (axes.set_ylim, [y for _, y in at], least),
    ):
        low, high = min(values), max(values)
        span = max(high - low, smallest) or 1.0
        middle = (low + high) / 2
        limits(middle - 0.68 * span, middle + 0.68 * span)


def _unit(largest: float) -> tuple[str, float]:
    return next(((unit, size) for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if largest >= size), ("", 1.0))


def _number(value: float | None) -> float:
    return math.nan if value is None or not math.isfinite(value) else value


def _any(values: Sequence[float]) -> bool:
    return any(not math.isnan(value) for value in values)
