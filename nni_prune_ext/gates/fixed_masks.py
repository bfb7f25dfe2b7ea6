"""A gated network with its masks fixed: an ordinary network without gates, which computes exactly the same.

Filters that are closed for good write zeros: their rows in the norm behind them, or in the convolution, become zero.
Channels that then reach no reader are removed as in every plan. A closed filter stays, as a row of zeros, where others
write into the same channel (a residual stream), where a depthwise norm makes something of its zeros, and where a norm
over channels counts it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from nni_prune_ext.certificate import verify_groups
from nni_prune_ext.errors import CertificateError, ConfigError
from nni_prune_ext.gates.gated_network import GatedNetwork
from nni_prune_ext.gates.static_core import CUT_LIMIT, ReachCounter
from nni_prune_ext.graph.channel_groups import ChannelGroup, ChannelGroups, trace_channel_groups
from nni_prune_ext.graph.gate_places import GateFlow, GatePlace
from nni_prune_ext.graph.gate_tracing import trace_gate_flow
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.graph.model_copy import copy_model
from nni_prune_ext.graph.state import untouched
from nni_prune_ext.inputs import ExampleInputs, tensors_in
from nni_prune_ext.plan import Channels, plan_from_channels, spared
from nni_prune_ext.surgery import cut_channels

_PER_CHANNEL = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
"""Norms of which a channel knows nothing of the others."""


class SubNetworks:
    """Makes sub-networks of one gated network, which is left as it was; channels are traced and proved once for all.

    Args:
        multiple: groups of channels that are cut keep a multiple of this many, with channels that write zeros.
    """

    def __init__(self, network: GatedNetwork, example_inputs: ExampleInputs, *, multiple: int = 1) -> None:
        if multiple < 1:
            raise ConfigError(f"The multiple is {multiple}, expected 1 or more. Leave it out, or pass 4 or 16.")
        self.network, self._example, self._multiple = network, example_inputs, multiple
        everything = {own.layer: torch.ones(own.channels, dtype=torch.bool) for own in network.gates.places}
        model = closed_rows(network, everything)
        self._flow: GateFlow = trace_gate_flow(model, example_inputs)
        groups = verify_groups(model, example_inputs, trace_channel_groups(model, example_inputs))
        over_channels = _norms_over_channels(model)
        self._groups: ChannelGroups = groups.protecting(
            {
                group.name: "a norm over channels counts them"
                for group in groups
                if any(member.tensor in over_channels for member in group.by_role(Role.NORM))
            }
        )

    def of(self, opened: Mapping[str, Tensor], images: Tensor | None = None) -> nn.Module:
        """Returns the network without gates that computes what the gated one does with these masks, in eval mode.

        Args:
            opened: layer → which filters are open, ``(C,)`` bool; one per gated layer, with one open at least.
            images: ``(N, C, H, W)`` on which both are compared; the example inputs by default.

        Raises:
            ConfigError: the masks are not those of the gated layers.
            CertificateError: the two differ on the images.
        """
        _check(self.network, opened)
        counter = ReachCounter(self._groups, self._flow, heads=False)
        counter.add({own.layer: opened[own.layer].cpu()[None] for own in self.network.gates.places})
        rates = counter.rates()
        gone = {group.name: _silent(group, rates[group.name], self._multiple) for group in self._groups}
        plan = plan_from_channels(self._groups, gone)
        model = closed_rows(self.network, opened)
        made = cut_channels(model, plan, self._example, groups=self._groups).model.eval()
        self._require(made, opened, self._example if images is None else images)
        return made

    def _require(self, made: nn.Module, opened: Mapping[str, Tensor], inputs: ExampleInputs) -> None:
        given = next(tensors_in(inputs)).to(next(self.network.parameters()).device)
        with fixed_masks(self.network, opened), torch.no_grad():
            expected = next(tensors_in(self.network.model(given)))
            found = next(tensors_in(made(given)))
        error = float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-30))
        if not error <= CUT_LIMIT:
            raise CertificateError(
                f"The sub-network computes something else than the gated network with its masks fixed: relative "
                f"difference {error:.3g} on {len(given)} images, expected at most {CUT_LIMIT:g}. Nothing was written. "
                "Export the flavour mask, and report this network."
            )


@contextmanager
def fixed_masks(network: GatedNetwork, opened: Mapping[str, Tensor]) -> Iterator[None]:
    """Puts masks in the place of the heads: while open, ``network.model`` computes with them, in evaluation mode."""
    handles = []
    with untouched(network.model):
        try:
            for place in network.gates.places:
                own = opened[place.layer][:, None, None]
                handles.append(
                    network.model.get_submodule(place.point).register_forward_hook(
                        lambda _, args, output, own=own: output * own.to(output)
                    )
                )
            yield
        finally:
            for handle in handles:
                handle.remove()


def closed_rows(network: GatedNetwork, opened: Mapping[str, Tensor]) -> nn.Module:
    """Returns a copy of the network under the gates, all sizes as they were, whose closed filters write zeros.

    Modules whose rows cannot be made zero (norms without weights, tied ones) are followed by a constant mask.
    """
    model = network.model
    names = Counter(id(own) for _, own in model.named_parameters(remove_duplicate=False))
    zeroed: dict[str, Tensor] = {}
    masked: list[GatePlace] = []
    for place in network.gates.places:
        point = model.get_submodule(place.point)
        own = {name: value for name, value in point.named_parameters(recurse=False) if name in ("weight", "bias")}
        if not _has_rows(point) or any(names[id(value)] > 1 for value in own.values()):
            masked.append(place)
            continue
        for name, value in own.items():
            keep = opened[place.layer].to(value.device).reshape(-1, *[1] * (value.dim() - 1))
            zeroed[f"{place.point}.{name}"] = torch.where(keep, value.detach(), torch.zeros_like(value))
    made = copy_model(model, zeroed)
    for place in masked:
        parent, _, name = place.point.rpartition(".")
        point = made.get_submodule(place.point)
        mask = opened[place.layer].to(next(model.parameters()))
        setattr(made.get_submodule(parent), name, _Masked(point, mask))
    return made.eval()


class _Masked(nn.Module):
    """A module behind which closed channels are zero."""

    def __init__(self, point: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.point = point
        self.mask: Tensor
        self.register_buffer("mask", mask.reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns what the module does, closed channels as zeros."""
        made: Tensor = self.point(x) * self.mask
        return made


def _has_rows(point: nn.Module) -> bool:
    """Says whether an output channel of a module is zero once its rows in weight and bias are."""
    if isinstance(point, (*_PER_CHANNEL, nn.GroupNorm)):
        return point.weight is not None
    return isinstance(point, nn.Conv2d)


def _norms_over_channels(model: nn.Module) -> set[str]:
    """Returns the names of all tensors that do not belong to layers which treat every channel by itself."""
    alone = {
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        if isinstance(module, _PER_CHANNEL)
        for own in (*module._parameters, *module._buffers)
    }
    return {name for name, _ in (*model.named_parameters(), *model.named_buffers())} - alone


def _silent(group: ChannelGroup, rate: Tensor, multiple: int) -> Channels:
    gone = spared(group, (rate == 0).numpy())
    kept = group.num_channels - int(gone.sum())
    gone[np.flatnonzero(gone)[: -kept % multiple]] = False
    return gone


def _check(network: GatedNetwork, opened: Mapping[str, Tensor]) -> None:
    for place in network.gates.places:
        own = opened.get(place.layer)
        if own is None or own.shape != (place.channels,) or own.dtype != torch.bool or not bool(own.any()):
            seen = "missing" if own is None else f"{own.dtype} of shape {tuple(own.shape)}, {int(own.sum())} open"
            raise ConfigError(
                f"The mask of the gated layer '{place.layer}' is {seen}, expected {place.channels} bools with one "
                "True at least. Pass a mask for every gated layer."
            )
