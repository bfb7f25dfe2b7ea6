"""The charts of a measurement, each as SVG text, or ``None`` where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Sequence

from nni_prune_ext.evidence.results import EvidenceRow
from nni_prune_ext.report.charts import WIDTH, elided
from nni_prune_ext.report.label_places import place_labels
from nni_prune_ext.report.svg import FONT, INK, MUTED, SERIES, as_svg, empty_figure


def saving_chart(rows: Sequence[EvidenceRow], *, name: str) -> str | None:
    """Returns the latency left over the MACs left, for every network but the reference; on the line they are equal."""
    rows = [row for row in rows if row.macs_ratio is not None and row.latency.ratio != 1]
    if not rows:
        return None
    at = [(100 * (row.macs_ratio or 0.0), 100 * row.latency.ratio) for row in rows]
    runtimes = list(dict.fromkeys(row.runtime for row in rows))
    several = len({row.batch for row in rows}) > 1
    end = 1.1 * max(100.0, *(value for point in at for value in point))
    with empty_figure(WIDTH, 300 + 17 * len(runtimes)) as figure:
        axes = figure.subplots()
        axes.plot([0, end], [0, end], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1.5)
        for number, runtime in enumerate(runtimes):
            own = [point for row, point in zip(rows, at) if row.runtime == runtime]
            axes.plot(*zip(*own), "o", markersize=7, color=SERIES[number % len(SERIES)], label=runtime, zorder=3)
        axes.set_xlim(0, end)
        axes.set_ylim(0, end)
        axes.set_xlabel("MACs left (%)")
        axes.set_ylabel("latency left (%)")
        labels = [elided(row.network, 20) + (f", batch {row.batch}" if several else "") for row in rows]
        place_labels(axes, at, labels, stairs=[], colour=INK, line=MUTED)
        figure.legend(loc="outside lower left", ncols=1, fontsize=FONT, frameon=False)
        return as_svg(figure, name=name, description=f"Latency left over MACs left, {len(rows)} measurements")


def throughput_chart(rows: Sequence[EvidenceRow], *, name: str) -> str | None:
    """Returns images per second over batch sizes on one runtime, a line per network; ``None`` for one batch size."""
    batches = sorted({row.batch for row in rows})
    if len(batches) < 2:
        return None
    networks = list(dict.fromkeys(row.network for row in rows))
    with empty_figure(WIDTH, 240 + 17 * -(-len(networks) // 2)) as figure:
        axes = figure.subplots()
        for number, network in enumerate(networks):
            line = sorted((row.batch, row.throughput.images_per_s) for row in rows if row.network == network)
            colour = SERIES[number % len(SERIES)]
            axes.plot(*zip(*line), marker="o", color=colour, markersize=4, lw=1.6, label=elided(network, 22))
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("images per run")
        axes.set_ylabel("images per second")
        figure.legend(loc="outside lower left", ncols=2, fontsize=FONT, frameon=False)
        return as_svg(figure, name=name, description=f"Throughput over batch sizes, {len(networks)} networks")
