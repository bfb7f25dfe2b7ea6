"""The smallest change that makes a pruned network faster: widths to round, each gain measured on the whole network.

A group of channels whose width is no multiple is made wider (and, for comparison, narrower) in the ONNX graph itself,
and the network is timed against the one that was pruned. Layers influence each other through their layout, so
the best changes are then timed together, and the shortest list that gains as much as the longest one is proposed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from glob import escape
from math import gcd
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import onnx

from nni_prune_ext.allocation import LayerLimit, Limits
from nni_prune_ext.doctor.layer_times import LayerRow, Time
from nni_prune_ext.doctor.network import Network
from nni_prune_ext.doctor.widths import WidthGroup, Widths
from nni_prune_ext.evaluation import measure_latency
from nni_prune_ext.runtimes.base import Array, InferenceRuntime, RunnableModel

MAX_GROUPS = 32
"""Groups that are tried, those whose layers take longest first."""
_AT_ONCE = 8
"""Networks that are timed in turns at a time; each is loaded."""
SMALLEST_USEFUL = 4
"""Multiples of channels below this keep no layout of ONNX Runtime."""


@dataclass(frozen=True)
class Advice:
    """One width to round up.

    Attributes:
        layer: the first layer that writes the channels.
        layers: all layers that write or read them.
        width: what it is.
        to: what it should be.
        gain: milliseconds saved by this change alone; negative if it costs.
        narrower: the next multiple below, and what it saves; ``None`` where there is none.
        together: milliseconds saved by this change and all before it in the list.
    """

    layer: str
    layers: tuple[str, ...]
    width: int
    to: int
    gain: Time
    narrower: tuple[int, Time] | None
    together: Time

    @property
    def sentence(self) -> str:
        """The advice in words."""
        other = "" if self.narrower is None else f", down to {self.narrower[0]} {_saved(self.narrower[1])}"
        return (
            f"Round '{self.layer}' up from {self.width} to {self.to} channels: {_saved(self.gain)} alone{other}; "
            f"{_saved(self.together)} with those above."
        )

    def to_dict(self) -> dict[str, Any]:  # JSON values
        """Returns the advice as JSON-ready values."""
        values = asdict(self)
        if self.narrower is not None:
            values["narrower"] = {"to": self.narrower[0], "gain": asdict(self.narrower[1])}
        return values


Advised: TypeAlias = tuple[tuple[Advice, ...], Limits | None, str]
"""What is advised, the same as limits, and why there is nothing, where there is nothing."""


def _saved(gain: Time) -> str:
    if abs(gain.ms) <= gain.error_ms:
        return f"no difference above the error bar of {gain.error_ms:.3f} ms"
    return f"{-gain.ms:+.3f} ms".replace("-", "−")


@dataclass(frozen=True)
class Trials:
    """How candidates are timed: see ``measure_latency``."""

    runtime: InferenceRuntime
    inputs: Sequence[Sequence[Array]]
    rounds: int
    min_seconds: float
    threads: int | None
    seed: int

    def gains(self, pruned: Path, candidates: Mapping[str, onnx.ModelProto]) -> dict[str, Time]:
        """Returns the milliseconds that each network saves against the pruned one, in the order given."""
        names, measured, errors = list(candidates), {}, [0.0]
        for start in range(0, len(names), _AT_ONCE):
            with TemporaryDirectory() as folder:
                paths = {"": pruned}
                for index, name in enumerate(names[start : start + _AT_ONCE]):
                    paths[name] = Path(folder) / f"{index}.onnx"
                    onnx.save(candidates[name], str(paths[name]))
                report = measure_latency(
                    {name: (self.runtime, RunnableModel(onnx_path=path)) for name, path in paths.items()},
                    self.inputs, rounds=self.rounds, min_seconds=self.min_seconds, threads=self.threads,
                    seed=self.seed,
                )  # fmt: skip
            base_ms = report.rows[0].p50_ms
            measured.update({row.name: (1 - row.ratio) * base_ms for row in report.rows[1:]})
            errors.append(report.error_bar * base_ms)
        return {name: Time(gain, max(errors)) for name, gain in measured.items()}


def advise(network: Network, rows: Sequence[LayerRow], trials: Trials, *, multiple: int) -> Advised:
    """Returns the widths to round up, best first, limits for the next plan, and why there is nothing, if so.

    Args:
        network: the pruned network.
        rows: its layers and their times.
        trials: how candidates are timed.
        multiple: what widths are rounded to.
    """
    widths = Widths(network)
    groups = widths.groups()
    ms = {row.name: row.after.time.ms for row in rows}
    wrong = [group for group in groups if group.width % multiple]
    tried = sorted(wrong, key=lambda group: -sum(ms.get(layer, 0.0) for layer in group.layers))[:MAX_GROUPS]
    if not tried:
        return (), None, f"every width that can be rounded is a multiple of {multiple} already"
    up = {group.root: -(-group.width // multiple) * multiple for group in tried}
    down = {group.root: group.width // multiple * multiple for group in tried if group.width > multiple}
    alone = trials.gains(network.path, {root: widths.resized({root: width}) for root, width in up.items()})
    fewer = trials.gains(network.path, {root: widths.resized({root: width}) for root, width in down.items()})
    ordered = sorted(tried, key=lambda group: -alone[group.root].ms)
    prefixes = {group.root: ordered[: index + 1] for index, group in enumerate(ordered)}
    together = trials.gains(
        network.path, {root: widths.resized({g.root: up[g.root] for g in prefix}) for root, prefix in prefixes.items()}
    )
    best = max(together.values(), key=lambda gain: gain.ms)
    if best.ms <= best.error_ms:
        return (), None, f"no rounding gained more than the error bar of {best.error_ms:.3f} ms"
    last = next(index for index, gain in enumerate(together.values()) if gain.ms >= best.ms - best.error_ms)
    chosen = ordered[: last + 1]
    advice = tuple(
        Advice(
            group.root, group.layers, group.width, up[group.root], alone[group.root],
            (down[group.root], fewer[group.root]) if group.root in down else None, together[group.root],
        )
        for group in chosen
    )  # fmt: skip
    return advice, limits_for(chosen, groups, multiple), ""


def limits_for(chosen: Sequence[WidthGroup], groups: Sequence[WidthGroup], multiple: int) -> Limits:
    """Returns limits for the next plan: the multiple for the groups chosen; the others keep what they have by chance.

    Without the second half the next plan, whose widths are all new, would lose the layout elsewhere. Multiples below 4
    are left out: they keep no layout.
    """
    multiples = {g.root: multiple if g in chosen else gcd(g.width, multiple) for g in groups}
    if set(multiples.values()) == {multiple}:
        return Limits(multiple=multiple)
    most = Limits().max_ratio
    return Limits(
        layers={
            escape(root): LayerLimit(max_ratio=most, multiple=own)
            for root, own in multiples.items()
            if own >= SMALLEST_USEFUL
        }
    )
