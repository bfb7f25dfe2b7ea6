"""Charts of gated layers: how their filters fire, and whether that is seldom enough to gain time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from nni_prune_ext.report.charts import WIDTH, elided, in_parts, short_names
from nni_prune_ext.report.gate_facts import GateLayerFacts
from nni_prune_ext.report.svg import FONT, INK, PAPER, SERIES, TRACK, as_svg, empty_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAR, _ROOM = 17, 60
"""Height of a layer, and of axis and legend."""


def firing_charts(layers: Sequence[GateLayerFacts], *, name: str) -> list[str]:
    """Returns which share of the filters of every layer run always, for some images and never."""
    return [_firing(part, name=f"{name}-{number}") for number, part in enumerate(in_parts(_short(layers)))]


def break_even_charts(layers: Sequence[GateLayerFacts], gathered: Collection[str], *, name: str) -> list[str]:
    """Returns the firing rate of every layer beside its break-even rate, for layers that have one.

    Args:
        gathered: layers that compute their open filters only.
    """
    marked = [layer.layer in gathered for layer in layers if layer.break_even is not None]
    shown = _short([layer for layer in layers if layer.break_even is not None])
    parts = in_parts(list(zip(shown, marked)))
    return [_break_even(part, name=f"{name}-{number}") for number, part in enumerate(parts)]


def _short(layers: Sequence[GateLayerFacts]) -> list[GateLayerFacts]:
    names = short_names([layer.layer for layer in layers])
    return [layer.model_copy(update={"layer": name}) for layer, name in zip(layers, names)]


def _firing(layers: Sequence[GateLayerFacts], *, name: str) -> str:
    from matplotlib.patches import Patch  # imported here because it takes a second

    kinds = (("always", SERIES[1]), ("for some images", SERIES[0]), ("never", TRACK))
    with empty_figure(WIDTH, _ROOM + _BAR * len(layers)) as figure:
        axes = figure.subplots()
        for row, layer in enumerate(layers):
            start, counts = 0.0, (layer.always, layer.varying, layer.never)
            for (_, colour), count in zip(kinds, counts):
                width = 100 * count / layer.filters if layer.filters else 0.0
                axes.barh(row, width, left=start, height=0.62, color=colour)
                start += width
        numbers = [f"{layer.always} / {layer.varying} / {layer.never}" for layer in layers]
        _finish(axes, layers, numbers, most=100, ticks=((0, "0"), (50, "50"), (100, "100 %")))
        handles = [Patch(color=colour, label=label) for label, colour in kinds]
        figure.legend(handles=handles, loc="outside lower left", ncols=3, fontsize=FONT, frameon=False)
        varying = sum(layer.varying for layer in layers)
        described = f"Filters of {len(layers)} gated layers by how they fire; {varying} fire for some images only"
        return as_svg(figure, name=name, description=described)


def _break_even(layers: Sequence[tuple[GateLayerFacts, bool]], *, name: str) -> str:
    from matplotlib.lines import Line2D  # imported here because it takes a second
    from matplotlib.patches import Patch

    with empty_figure(WIDTH, _ROOM + _BAR + _BAR * len(layers)) as figure:
        axes = figure.subplots()
        for row, (layer, gathered) in enumerate(layers):
            bound = layer.break_even or 0.0
            face = SERIES[0] if gathered else PAPER
            axes.barh(row, layer.rate, height=0.62, color=face, edgecolor=SERIES[0], linewidth=1.2)
            axes.plot([bound, bound], [row - 0.45, row + 0.45], color=INK, linewidth=2, solid_capstyle="butt")
        numbers = [f"{layer.rate:.2f} / {layer.break_even or 0.0:.2f}" for layer, _ in layers]
        _finish(axes, [layer for layer, _ in layers], numbers, most=1, ticks=((0, "0"), (0.5, "0.5"), (1, "1")))
        handles = [
            Patch(facecolor=SERIES[0], edgecolor=SERIES[0], label="firing, gathered"),
            Patch(facecolor=PAPER, edgecolor=SERIES[0], label="firing, not gathered"),
            Line2D([], [], color=INK, marker="|", linestyle="none", markersize=10, mew=2, label="break-even"),
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=FONT, frameon=False)
        count = sum(gathered for _, gathered in layers)
        described = f"Firing rate beside break-even rate of {len(layers)} gated layers, of which {count} are gathered"
        return as_svg(figure, name=name, description=described)


def _finish(
    axes: Axes,
    layers: Sequence[GateLayerFacts],
    numbers: Sequence[str],
    *,
    most: float,
    ticks: Sequence[tuple[float, str]],
) -> None:
    """Names the rows on the left, and writes their numbers on the right."""
    axes.set_yticks(range(len(layers)), [elided(layer.layer, 20) for layer in layers], size=FONT)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlim(0, 1.02 * most)
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(layers)), numbers, size=FONT, color=INK)
    right.spines[:].set_visible(False)
    axes.set_xticks([at for at, _ in ticks], [text for _, text in ticks], size=FONT)
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
