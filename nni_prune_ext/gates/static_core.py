"""The static core of a gated network: channels that never reach anybody can be removed, exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.gates.gated_network import Gates
from nni_prune_ext.graph.channel_groups import ChannelGroup, ChannelGroups
from nni_prune_ext.graph.gate_places import GateFlow, LayerFlow
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.graph.state import untouched
from nni_prune_ext.inputs import tensors_in


class ReachCounter:
    """Counts, image by image, which channels of each group reach a layer that reads them.

    A channel of a residual stream reaches its readers as long as any of its writers is open. A depthwise filter passes
    on what its own gate lets through, but its head sees what it reads, so both gates count; without heads, only the
    first.
    """

    def __init__(self, groups: ChannelGroups, flow: GateFlow, *, heads: bool = True) -> None:
        self.images = 0
        self._flow = flow
        self._reads = {group.name: _reading_signals(group, flow, heads=heads) for group in groups}
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


CUT_LIMIT = 1e-4
"""Largest relative difference of a gated network before and after what never reached anybody was removed."""


@dataclass(frozen=True)
class GatedOutputs:
    """What a gated network made of some images: its first output, and which units of which layer were open."""

    output: Tensor
    opened: Mapping[str, Tensor]


def captured_call(model: nn.Module, run: Callable[[], object]) -> tuple[tuple[object, ...], dict[str, object]]:
    """Returns the arguments with which ``run`` calls a model; the model is left as it was."""
    seen: list[tuple[tuple[object, ...], dict[str, object]]] = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        with untouched(model), torch.no_grad():
            run()
    finally:
        handle.remove()
    if not seen:
        raise ConfigError("The loss did not call the model on a batch, expected model(images). Let it call the model.")
    return seen[0]


def gated_outputs(model: nn.Module, gates: Gates, call: tuple[tuple[object, ...], dict[str, object]]) -> GatedOutputs:
    """Runs a network with its gates on, in evaluation mode and float32; the network is left as it was."""
    with untouched(model), torch.no_grad(), gates.on(model):
        output = next(tensors_in(model(*call[0], **call[1])))
        found = GatedOutputs(output.detach().clone(), dict(gates.opened))
    gates.forget()
    return found


def cut_error(before: GatedOutputs, after: GatedOutputs) -> tuple[float, int]:
    """Returns the largest relative difference, and on how many images: those on which all gates that are left agree."""
    same = torch.ones(len(before.output), dtype=torch.bool, device=before.output.device)
    for layer, own in before.opened.items():
        # a unit that was cut was open for nobody, so as many are open as before
        same &= own.sum(1) == after.opened[layer].sum(1)
    if not bool(same.any()):
        return float("inf"), 0
    difference = (before.output[same] - after.output[same]).abs().max()
    return float(difference / before.output[same].abs().max().clamp(min=1e-30)), int(same.sum())


def leak(rates: Mapping[str, Tensor], removed: Mapping[str, Tensor]) -> float:
    """Returns the mean rate at which removed channels would have reached a reader, 0–1, 0 if nothing was removed.

    Args:
        rates: group → rates on images that took no part in the decision.
        removed: group → bool, which channels were removed.
    """
    values = torch.cat([rates[name][gone] for name, gone in removed.items()] or [torch.zeros(0)])
    return float(values.mean()) if len(values) else 0.0


def _reading_signals(group: ChannelGroup, flow: GateFlow, *, heads: bool) -> tuple[Tensor, Tensor]:
    """Returns which channel of a group is read with which signal, ``(R,)`` each; 0 where a reader is not followed."""
    layers: dict[str, list[LayerFlow]] = {}
    for call in flow.layers:
        layers.setdefault(f"{call.layer}.weight", []).append(call)
    channels, signals = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    for member in group.members:
        index, channel = torch.from_numpy(member.index), torch.from_numpy(member.channel)
        if heads and member.role is Role.DEPTHWISE:  # its head reads what it reads
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
