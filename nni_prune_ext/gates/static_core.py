"""The static core of a gated network: channels that never reach anybody can be removed, exactly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nni_prune_ext.graph.channel_groups import ChannelGroup, ChannelGroups
from nni_prune_ext.graph.gate_places import GateFlow, LayerFlow
from nni_prune_ext.graph.label_book import Role


class ReachCounter:
    """Counts, image by image, which channels of each group reach a layer that reads them.

    A channel of a residual stream reaches its readers as long as any of its writers is open. A depthwise filter passes
    on what its own gate lets through, but its head sees what it reads, so both gates count.
    """

    def __init__(self, groups: ChannelGroups, flow: GateFlow) -> None:
        self.images = 0
        self._flow = flow
        self._reads = {group.name: _reading_signals(group, flow) for group in groups}
        self._counts = {group.name: torch.zeros(group.num_channels) for group in groups}

    def add(self, open_channels: Mapping[str, Tensor]) -> None:
        """Counts one batch: layer → which filters are open, ``(N, C)`` bool."""
        signals = self._flow.open_signals(open_channels).cpu()
        for name, (channel, signal) in self._reads.items():
            reached = torch.zeros(len(signals), len(self._counts[name]))
            reached.index_add_(1, channel, signals[:, signal].float())
            self._counts[name] += (reached > 0).sum(0)
        self.images += len(signals)

    def rates(self) -> dict[str, Tensor]:
        """Returns group → share of the images for which each channel reached a reader, ``(num_channels,)``."""
        return {name: count / max(self.images, 1) for name, count in self._counts.items()}


def leak(rates: Mapping[str, Tensor], removed: Mapping[str, Tensor]) -> float:
    """Returns the mean rate at which removed channels would have reached a reader, 0–1, 0 if nothing was removed.

    Args:
        rates: group → rates on images that took no part in the decision.
        removed: group → bool, which channels were removed.
    """
    values = torch.cat([rates[name][gone] for name, gone in removed.items()] or [torch.zeros(0)])
    return float(values.mean()) if len(values) else 0.0


def _reading_signals(group: ChannelGroup, flow: GateFlow) -> tuple[Tensor, Tensor]:
    """Returns which channel of a group is read with which signal, ``(R,)`` each; 0 where a reader is not followed."""
    layers: dict[str, list[LayerFlow]] = {}
    for call in flow.layers:
        layers.setdefault(f"{call.layer}.weight", []).append(call)
    channels, signals = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    for member in group.members:
        index, channel = torch.from_numpy(member.index), torch.from_numpy(member.channel)
        if member.role is Role.DEPTHWISE:  # its head reads what it reads
            for own in layers.get(member.tensor, ()):
                channels.append(channel)
                signals.append(torch.from_numpy(own.reads)[index * len(own.reads) // len(own.writes)])
        if not member.reads:
            continue
        calls = layers.get(member.tensor, []) if member.role is Role.CONSUMER and member.dim == 1 else []
        for own in calls:
            reads = torch.from_numpy(own.reads)
            width = len(reads) // own.groups
            for part in range(own.groups):  # a row of a grouped convolution's weight reads in every group
                channels.append(channel)
                signals.append(reads[part * width + index])
        if not calls:
            channels.append(channel)
            signals.append(torch.zeros_like(index))
    return torch.cat(channels), torch.cat(signals)
