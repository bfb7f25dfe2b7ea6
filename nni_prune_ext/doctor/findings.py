"""What keeps a pruned network from being faster: rules over measured times, each silent below its error bar.

What the rules know about ONNX Runtime's blocked layout on CPUs (read from its source and checked by optimised graphs,
1.31.1): a plain convolution enters it if it reads fewer than 16 channels or a multiple of 4, a depthwise one with a
multiple of 4, a grouped one with multiples of 16 per group; what it writes is padded to whole blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nni_prune_ext.doctor.layer_times import LayerRow, ProfiledNetwork, Time

SLOWER_THAN_MACS = 1.25
"""A layer is slow for its MACs if its time kept this many times the share that its MACs kept."""
FAR_FROM_BEST = 0.5
"""… and if it does less than this share of the MACs per second of the best layer of its kind."""
FLOORS = 3
"""A layer within this many times the time of an empty node is bound by overhead."""
_REORDERS = ("ReorderInput", "ReorderOutput")
_NEVER_NEEDED = ("BatchNormalization", "Identity", "Cast", "Expand", "Dropout")
_FUSABLE = ("Relu", "Clip", "LeakyRelu", "HardSwish", "HardSigmoid", "Sigmoid", "Add", "Mul")


@dataclass(frozen=True)
class Finding:
    """One reason why the network is not faster.

    Attributes:
        kind: ``layout``, ``padding``, ``reorders``, ``fusion``, ``slow``, ``small`` or ``copies``.
        sentence: what was seen, with measured times.
        layers: those concerned, the most expensive first; empty where it is about no layer.
        time: what is at stake in one run; ``error_ms`` is its error bar.
    """

    kind: str
    sentence: str
    layers: tuple[str, ...]
    time: Time


def find_reasons(
    before: ProfiledNetwork, after: ProfiledNetwork, rows: Sequence[LayerRow], floor_ms: float | None
) -> tuple[Finding, ...]:
    """Returns the findings, the most expensive first.

    Args:
        before: the dense network.
        after: the pruned one.
        rows: their layers, see `layer_rows`.
        floor_ms: time of an empty node; ``None`` if not measured.
    """
    found = [_reorders(before, after), *_fusion(before, after), _copies(after)]
    if before.on_cpu and after.on_cpu:  # elsewhere the profile holds the time of launching, not of computing
        layout = [row for row in rows if _left_layout(row)]
        padded = [row for row in rows if row.after.computed_channels > row.after.layer.out_channels and _slow(row)]
        rest = [row for row in rows if row not in layout and row not in padded and _slow(row)]
        small = [row for row in rest if floor_ms is not None and row.after.time.ms <= FLOORS * floor_ms]
        slow = [row for row in rest if row not in small and _far_from_best(row, rows)]
        found += [
            _layers("layout", layout, "dropped out of the blocked layout", _misalignment),
            _layers("padding", padded, "compute channels that do not exist", _padding),
            _layers("slow", slow, "hardly gained: memory or overhead bounds them, not arithmetic", _speed),
            _layers("small", small, f"take hardly longer than an empty node ({(floor_ms or 0):.3f} ms)", _ms),
        ]
    return tuple(sorted((f for f in found if f is not None), key=lambda finding: -finding.time.ms))


def misaligned(row: LayerRow) -> str | None:
    """Says why a convolution cannot enter the blocked layout; ``None`` if it can, or is no convolution."""
    layer = row.after.layer
    if layer.kind.startswith("conv") and layer.in_channels >= 16 and layer.in_channels % 4:
        return f"{layer.in_channels} input channels are no multiple of 4"
    if layer.kind == "depthwise" and layer.out_channels % 4:
        return f"{layer.out_channels} channels are no multiple of 4"
    if layer.kind == "grouped" and (layer.in_channels // layer.groups % 16 or layer.out_channels // layer.groups % 16):
        return f"{layer.in_channels // layer.groups} channels per group are no multiple of 16"
    return None


def _left_layout(row: LayerRow) -> bool:
    left = row.before.blocked and not row.after.blocked and misaligned(row) is not None
    return left and row.excess_ms > row.error_ms


def _slow(row: LayerRow) -> bool:
    return row.macs_ratio < 1 and row.excess_ms > row.error_ms


def _far_from_best(row: LayerRow, rows: Iterable[LayerRow]) -> bool:
    best = max(_gmacs_per_s(other) for other in rows if other.after.layer.kind == row.after.layer.kind)
    kept = row.after.time.ms / row.before.time.ms if row.before.time.ms else 0.0
    return kept > SLOWER_THAN_MACS * row.macs_ratio and _gmacs_per_s(row) < FAR_FROM_BEST * best


def _gmacs_per_s(row: LayerRow) -> float:
    return row.after.layer.macs / max(row.after.time.ms, 1e-6) / 1e6


def _layers(kind: str, rows: Sequence[LayerRow], what: str, detail: Callable[[LayerRow], str]) -> Finding | None:
    """Returns one finding about layers that are all above their error bars, if there are any."""
    if not rows:
        return None
    ordered = sorted(rows, key=lambda row: -row.excess_ms)
    now, excess = sum(row.after.time.ms for row in rows), sum(row.excess_ms for row in rows)
    error = sum(row.error_ms for row in rows)
    some = "; ".join(f"'{row.name}' ({detail(row)})" for row in ordered[:3])
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    sentence = (
        f"{_count(len(rows), 'layer')} {what}: {some}{more}. They take {now:.3f} ms; at the speed that they had before "
        f"the cut, their MACs would take {now - excess:.3f} ms."
    )
    return Finding(kind, sentence, tuple(row.name for row in ordered), Time(excess, error))


def _misalignment(row: LayerRow) -> str:
    return f"{misaligned(row)}, {_ms(row)}"


def _padding(row: LayerRow) -> str:
    return f"{row.after.layer.out_channels} channels run as {row.after.computed_channels}, {_ms(row)}"


def _speed(row: LayerRow) -> str:
    return f"{row.macs_ratio:.2f} of the MACs, {_gmacs_per_s(row):.1f} GMAC/s, {_ms(row)}"


def _ms(row: LayerRow) -> str:
    return f"{row.before.time.ms:.3f} → {row.after.time.ms:.3f} ms"


def _reorders(before: ProfiledNetwork, after: ProfiledNetwork) -> Finding | None:
    old, new = before.of_kind(_REORDERS), after.of_kind(_REORDERS)
    was, now = before.time(old), after.time(new)
    extra = Time(now.ms - was.ms, now.error_ms + was.error_ms)
    if extra.ms <= extra.error_ms:
        return None
    sentence = (
        f"{_count(len(new), 'reorder')} between plain and blocked layout, before the cut {len(old)}: {now.ms:.3f} ms, "
        f"before {was.ms:.3f} ms. They stand where layers in one layout meet layers in the other."
    )
    return Finding("reorders", sentence, (), extra)


def _fusion(before: ProfiledNetwork, after: ProfiledNetwork) -> list[Finding]:
    """Finds nodes that a runtime usually takes into a convolution, and those that no network in use needs."""
    found = []
    for op in (*_NEVER_NEEDED, *_FUSABLE):
        old, new = before.of_kind([op]), after.of_kind([op])
        was, now = before.time(old), after.time(new)
        extra = now if op in _NEVER_NEEDED else Time(now.ms - was.ms, now.error_ms + was.error_ms)
        if new and extra.ms > extra.error_ms:
            example = f", for example '{new[0].name}'" if new[0].name else ""
            sentence = (
                f"{_count(len(new), f'{op} node')} of {now.ms:.3f} ms{example}; before the cut {len(old)} of "
                f"{was.ms:.3f} ms. They run by themselves, not fused with a neighbour."
            )
            found.append(Finding("fusion", sentence, (), extra))
    return found


def _copies(after: ProfiledNetwork) -> Finding | None:
    nodes = after.of_kind([op for op in after.others if op.startswith("Memcpy")])
    time = after.time(nodes)
    if time.ms <= time.error_ms:
        return None
    sentence = (
        f"{_count(len(nodes), 'copy', 'copies')} between device and host, {time.ms:.3f} ms: single nodes run on the "
        "CPU, and the device waits for them."
    )
    return Finding("copies", sentence, (), time)


def _count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
