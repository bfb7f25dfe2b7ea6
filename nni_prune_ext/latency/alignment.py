"""Which multiples of channels a runtime likes: found by timing one convolution at a few widths."""

from __future__ import annotations

from dataclasses import dataclass

from nni_prune_ext.latency.layers import Layer
from nni_prune_ext.latency.stopwatch import Stopwatch

BASE, BLOCK = 64, 16
"""Width of the probe, and the largest multiple that is looked for."""
OFFSETS = (1, 2, 4, 8)
MAY_COST = 0.05
"""How much more than its share of the work a width may cost and still count as one that the runtime likes."""
_PROBE = Layer(
    weight="probe", size=(28, 28), kernel=(3, 3), stride=(1, 1), dilation=(1, 1), padding=(1, 1, 1, 1)
)  # fmt: skip


@dataclass(frozen=True)
class Alignment:
    """What the probe found.

    Attributes:
        multiple: the smallest multiple of channels without a penalty.
        penalties: offset from a multiple of 16 → by how much the time lies above that of the work, as a share of it.
    """

    multiple: int
    penalties: dict[int, float]

    def __str__(self) -> str:
        """Says what was found, for messages and reports."""
        found = ", ".join(f"{100 * penalty:+.0f} % at 16k+{offset}" for offset, penalty in self.penalties.items())
        return f"widths are kept at multiples of {self.multiple}, as a probe of this runtime suggests ({found})"


def probe_alignment(stopwatch: Stopwatch) -> Alignment:
    """Times a convolution at 64 channels, at a few more, and at 80; between these two, work says what to expect."""
    widths = (BASE, *(BASE + offset for offset in OFFSETS), BASE + BLOCK)
    times = stopwatch.layers_ms((_PROBE, width, width) for width in widths)
    ms = {width: times[_PROBE, width, width] for width in widths}
    low, high = ms[BASE], max(ms[BASE + BLOCK], ms[BASE])
    penalties = {}
    for offset in OFFSETS:
        work = ((BASE + offset) ** 2 - BASE**2) / ((BASE + BLOCK) ** 2 - BASE**2)
        penalties[offset] = ms[BASE + offset] / (low + (high - low) * work) - 1
    multiple = BLOCK
    for offset in reversed(OFFSETS):  # a multiple is liked only if all larger ones are
        if penalties[offset] > MAY_COST:
            break
        multiple = offset
    return Alignment(multiple, penalties)
