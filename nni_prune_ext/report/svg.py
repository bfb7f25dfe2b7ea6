"""The look of the charts, and how a matplotlib figure becomes SVG that lives inside the page.

Colours are drawn as place-holders and become CSS variables of the page, so that a chart follows light and dark. The
same figure gives the same text: no dates, and identifiers that depend on the content only.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape, quoteattr

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FONT = 11.5
"""Size of all text, in SVG units."""
POINTS_PER_INCH = 72
"""With this many dots per inch, one pixel of matplotlib is one unit of the SVG."""
INK, MUTED, GRID, PAPER, TRACK = "#010101", "#020202", "#030303", "#040404", "#050505"
SERIES = ("#060601", "#060602", "#060603", "#060604", "#060605", "#060606")
_VARIABLES = {
    INK: "var(--ink, #1d2126)",
    MUTED: "var(--muted, #666d75)",
    GRID: "var(--line, #dfe2e5)",
    PAPER: "var(--paper, #ffffff)",
    TRACK: "var(--track, #dce3ea)",
    **{colour: f"var(--series-{n}, #2f6da8)" for n, colour in enumerate(SERIES, start=1)},
}
_STYLE: dict[Any, Any] = {  # Any: matplotlib types its keys as Literals from 3.11 on, and as str before
    "figure.dpi": POINTS_PER_INCH,
    "font.family": "DejaVu Sans",  # ships with matplotlib and is wide: what fits in it fits in the reader's font
    "font.size": FONT,
    "svg.fonttype": "none",
    "svg.hashsalt": "nni_prune_ext",
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.labelsize": FONT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
}


@contextmanager
def empty_figure(width: float, height: float) -> Iterator[Figure]:
    """Yields a figure of so many SVG units, in the page's style; the style ends with the block."""
    import matplotlib as mpl  # imported here because it takes a second
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width / POINTS_PER_INCH, height / POINTS_PER_INCH))
        FigureCanvasAgg(figure)
        yield figure


def as_svg(figure: Figure, *, name: str, description: str) -> str:
    """Returns the figure as one ``<svg>`` element.

    Args:
        name: makes identifiers unique in a page with several charts; letters, digits and dashes.
        description: for readers who do not see the chart.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"#0[0-9]0[0-9]0[0-9]\b", lambda found: _VARIABLES.get(found[0], found[0]), text)
    size = re.search(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', text)
    assert size is not None  # matplotlib writes it
    widest = round(1.25 * float(size[1]))
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-label={quoteattr(description)} viewBox="0 0 {size[1]} {size[2]}" style="max-width: {widest}px">'
        f"<title>{escape(description)}</title>"
    )
    return opening + text[text.index(">") + 1 :].rstrip()
