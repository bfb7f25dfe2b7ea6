"""The profiles of two networks joined with their layers: what each layer cost before and after the cut.

The time of a node is its median over runs; that of several nodes the sum of their medians. The error bar of a time is
how far that of the even and that of the odd runs are apart, and at least the A/A error of the whole measurement.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nni_prune_ext.doctor.network import Layer, Network, is_blocked
from nni_prune_ext.errors import ModelError
from nni_prune_ext.runtimes.onnxruntime_profile import NodeTimes

CLOCK_MS = 0.001
"""The profile's clock counts whole microseconds."""


@dataclass(frozen=True)
class Time:
    """Milliseconds of one run, and how much of it means nothing."""

    ms: float
    error_ms: float


@dataclass(frozen=True)
class Side:
    """One layer in one of the two networks.

    Attributes:
        layer: widths and MACs.
        time: of all its nodes.
        blocked: all its nodes work in ONNX Runtime's blocked layout.
        computed_channels: what its last node really wrote, padding included; 0 where the profile does not say.
    """

    layer: Layer
    time: Time
    blocked: bool
    computed_channels: int


@dataclass(frozen=True)
class LayerRow:
    """One layer before and after the cut; ``share`` is its part (0–1) of the time in all nodes after the cut."""

    name: str
    before: Side
    after: Side
    share: float

    @property
    def macs_ratio(self) -> float:
        """MACs after by MACs before."""
        return self.after.layer.macs / max(self.before.layer.macs, 1)

    @property
    def excess_ms(self) -> float:
        """What the layer takes beyond its share of MACs of the time before."""
        return self.after.time.ms - self.macs_ratio * self.before.time.ms

    @property
    def error_ms(self) -> float:
        """The error bar of the excess."""
        return self.after.time.error_ms + self.before.time.error_ms

    def to_dict(self) -> dict[str, Any]:  # JSON values
        """Returns the row as JSON-ready values."""
        return {
            "layer": self.name,
            "kind": self.after.layer.kind,
            "share": self.share,
            **{
                name: {
                    "in_channels": side.layer.in_channels,
                    "out_channels": side.layer.out_channels,
                    "macs": side.layer.macs,
                    "ms": side.time.ms,
                    "error_ms": side.time.error_ms,
                    "blocked_layout": side.blocked,
                }
                for name, side in (("before", self.before), ("after", self.after))
            },
        }


@dataclass(frozen=True)
class KindRow:
    """All nodes of one operator that belong to no layer, before and after the cut."""

    op: str
    count_before: int
    count_after: int
    before: Time
    after: Time


class ProfiledNetwork:
    """A network with the times of its nodes."""

    def __init__(self, network: Network, nodes: Sequence[NodeTimes], relative_error: float = 0.0) -> None:
        """Joins nodes and layers.

        Args:
            network: the file.
            nodes: a profile of it, see `read_profile`.
            relative_error: the A/A error of the measurement, as a share.

        Raises:
            ModelError: the profile is of another model.
        """
        self.network, self.nodes, self._relative = network, tuple(nodes), relative_error
        owners = network.owners([(node.name, node.op) for node in nodes])
        self._of_layer: dict[str, list[NodeTimes]] = {}
        self.others: dict[str, list[NodeTimes]] = {}
        for node, owner in zip(nodes, owners):
            if owner is None:
                self.others.setdefault(network.operator(node.name, node.op), []).append(node)
            else:
                self._of_layer.setdefault(owner, []).append(node)
        missing = [name for name in network.layers if name not in self._of_layer]
        if 2 * len(missing) > len(network.layers) or not network.layers:
            raise ModelError(
                f"The profile does not belong to '{network.path}': it has no node for {len(missing)} of "
                f"{len(network.layers)} layers ({', '.join(missing[:3])}). Expected the profile of a session of this "
                "file. Record it again with this file."
            )

    @property
    def on_cpu(self) -> bool:
        """Says whether every node ran on the CPU, so that its time is that of the kernel."""
        return all(node.provider == "CPUExecutionProvider" for node in self.nodes)

    def time(self, nodes: Iterable[NodeTimes]) -> Time:
        """Returns the sum of the medians of nodes; another program interrupts single nodes, but nearly every run."""
        ms: NDArray[np.float64] = np.array([node.ms for node in nodes] or [np.zeros(1)])
        halves = [float(np.median(ms[:, start::2], axis=1).sum()) for start in (0, 1) if ms.shape[1] > start]
        middle = float(np.median(ms, axis=1).sum())
        return Time(middle, max(abs(halves[0] - halves[-1]), self._relative * middle, CLOCK_MS))

    def total(self) -> Time:
        """Returns the time in all nodes."""
        return self.time(self.nodes)

    def of_kind(self, ops: Iterable[str]) -> list[NodeTimes]:
        """Returns the nodes of some operators that belong to no layer."""
        return [node for op in ops for node in self.others.get(op, ())]

    def sides(self) -> dict[str, Side]:
        """Returns every layer that the profile holds."""
        return {
            name: Side(
                layer,
                self.time(self._of_layer[name]),
                all(is_blocked(node.name) for node in self._of_layer[name]),
                (*self._of_layer[name][-1].output_shape[1:2], 0)[0],
            )
            for name, layer in self.network.layers.items()
            if name in self._of_layer
        }


def layer_rows(before: ProfiledNetwork, after: ProfiledNetwork) -> tuple[LayerRow, ...]:
    """Returns the layers that both networks have, in the order of the graph.

    Raises:
        ModelError: the files are not one network before and after a cut.
    """
    old, new = before.sides(), after.sides()
    common = [name for name in new if name in old]
    _check_pair(before.network, after.network, [(old[name].layer, new[name].layer) for name in common])
    total = after.total().ms
    return tuple(LayerRow(name, old[name], new[name], new[name].time.ms / total if total else 0.0) for name in common)


def kind_rows(before: ProfiledNetwork, after: ProfiledNetwork) -> tuple[KindRow, ...]:
    """Returns the nodes without weights by operator, the most expensive after the cut first."""
    rows = [
        KindRow(op, len(old), len(new), before.time(old), after.time(new))
        for op in dict.fromkeys([*after.others, *before.others])
        for old, new in [(before.others.get(op, []), after.others.get(op, []))]
    ]
    return tuple(sorted(rows, key=lambda row: -row.after.ms))


def _check_pair(before: Network, after: Network, pairs: Sequence[tuple[Layer, Layer]]) -> None:
    both = f"'{before.path}' and '{after.path}'"
    if not pairs:
        raise ModelError(
            f"{both} have no layer in common ({_some(before.layers)} … and {_some(after.layers)} …). Expected one "
            "network before and after a cut. Choose the files of one run."
        )
    for old, new in pairs:
        if old.kind != new.kind and "depthwise" not in (old.kind, new.kind):  # one channel left is a plain conv
            raise ModelError(
                f"The layer '{new.name}' is {old.kind} in '{before.path}', but {new.kind} in '{after.path}'. Expected "
                "one network before and after a cut. Choose the files of one run."
            )
        if new.out_channels > old.out_channels or new.in_channels > old.in_channels:
            raise ModelError(
                f"The layer '{new.name}' reads {new.in_channels} and writes {new.out_channels} channels in "
                f"'{after.path}', but {old.in_channels} and {old.out_channels} in '{before.path}'. Expected the dense "
                "network first and the pruned one second. Swap them, or choose the files of one run."
            )


def _some(layers: Mapping[str, Layer]) -> str:
    return ", ".join(list(layers)[:2])
