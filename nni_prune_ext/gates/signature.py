"""The firing signature of a network: how many channels of each group its images need, for static methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from nni_prune_ext.gates.estimates import check_mass, gate_probe, rule_of
from nni_prune_ext.gates.static_core import ReachCounter
from nni_prune_ext.graph.channel_groups import ChannelGroups, trace_channel_groups
from nni_prune_ext.inputs import ExampleInputs


def firing_signature(
    model: nn.Module,
    example_inputs: ExampleInputs,
    batches: Iterable[object],
    *,
    mass: float = 0.9,
    groups: ChannelGroups | None = None,
    layers: Sequence[str] | None = None,
    run: Callable[[nn.Module, Any], object] | None = None,
) -> dict[str, float]:
    """Returns group → share of its channels that an image does not need, mean over the images, 0–1.

    These are relative ratios for ``allocate(..., ratios=...)``: what FTWT would close per image, as a ratio per layer
    for a method that removes channels for good. The model is left as it was.

    Args:
        batches: of images, or of ``(images, labels)``.
        mass: share of the heat that is kept for an image.
        groups: traced groups, to save a trace.
        layers: names or patterns of the convolutions that are looked at; the usual places by default.
        run: runs the model on one batch.

    Raises:
        ConfigError: no batch, no place for a gate, or a mass out of range.
    """
    check_mass(mass)
    probe, flow = gate_probe(model, example_inputs, batches, layers, run)
    counter = ReachCounter(groups or trace_channel_groups(model, example_inputs), flow)
    for _ in probe.passes("targets", rule_of(mass)):
        counter.add(probe.gates.open_channels())
    return {name: 1 - float(rate.mean()) for name, rate in counter.rates().items()}
