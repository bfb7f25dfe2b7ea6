"""A network whose filters are switched per image: heads beside a plain network, on it only while it runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.gates.firing_targets import heat, unit_heat
from nni_prune_ext.gates.heads import GateHead, open_units
from nni_prune_ext.graph.gate_places import GatePlace
from nni_prune_ext.surgery import Kept

Masks = Literal["predicted", "targets", "open"]
"""What switches filters: the heads; the targets of this very image (an oracle); or nothing does."""
Targets = Callable[[Tensor], Tensor]
"""Heat of every unit ``(N, U)`` → which of them are needed ``(N, U)`` bool."""


_NOTES = ("opened", "logits", "wanted", "heats")


class Gates(nn.Module):
    """The gates of a network, and what they saw in its last forward pass.

    Attributes:
        places: where they sit, in forward order.
        heads: one per place.
        masks: what switches filters.
        targets: the rule for targets; ``None`` computes none.
        teaching: heads predict also where something else switches filters, to learn from it.
        opened: layer → which units were open, ``(N, U)`` bool.
        logits: layer → ``(N, U)``, with gradients.
        wanted: layer → targets of the units, ``(N, U)`` bool.
        heats: layer → heat of the units in front of the gate, ``(N, U)``.
    """

    def __init__(self, places: Sequence[GatePlace], heads: Sequence[GateHead]) -> None:
        super().__init__()
        self.places = tuple(places)
        self._numbers = {place.layer: number for number, place in enumerate(self.places)}
        self.heads = nn.ModuleList(heads)
        self.masks: Masks = "predicted"
        self.targets: Targets | None = None
        self.teaching = False
        self.forget()

    def __getstate__(self) -> dict[str, object]:
        """Returns everything but what the last forward pass left, which has a history that cannot be copied."""
        return {key: {} if key in _NOTES else value for key, value in vars(self).items()}

    def forget(self) -> None:
        """Drops what the last forward pass left."""
        self.opened: dict[str, Tensor] = {}
        self.logits: dict[str, Tensor] = {}
        self.wanted: dict[str, Tensor] = {}
        self.heats: dict[str, Tensor] = {}

    def all_heads(self) -> list[GateHead]:
        """Returns the heads in the order of the places."""
        return [cast("GateHead", head) for head in self.heads]

    def head(self, layer: str) -> GateHead:
        """Returns the head of a gated layer."""
        return cast("GateHead", self.heads[self._numbers[layer]])

    def open_channels(self) -> dict[str, Tensor]:
        """Returns layer → which filters were open in the last forward pass, ``(N, C)`` bool."""
        return {layer: own[:, self.head(layer).units] for layer, own in self.opened.items()}

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Puts the gates onto a model; returns what takes them off."""
        self.forget()
        handles = []
        for place, head in zip(self.places, self.all_heads()):
            handles += self._attach_one(model, place, head)
        return handles

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Keeps the gates on a model for the length of a ``with`` block."""
        handles = self.attach(model)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def mask_loss(self) -> Tensor:
        """Returns the loss of the heads in the last forward pass: of each unit, summed, mean over images and layers.

        Binary cross entropy as in the authors' code, which divides the published sum by the number of layers.
        """
        losses = [
            functional.binary_cross_entropy_with_logits(logits, self.wanted[layer].float(), reduction="sum")
            / len(logits)
            for layer, logits in self.logits.items()
        ]
        return torch.stack(losses).mean()

    def follow(self, kept: Kept, places: Sequence[GatePlace]) -> Gates:
        """Returns the gates of the network after a cut.

        Args:
            kept: what stayed of every tensor.
            places: the gated places of the compact network.
        """
        heads = []
        for before, after in zip(self.places, places, strict=True):
            cut = kept.get(f"{before.layer}.weight", {})
            filters = cut.get(0, torch.arange(before.channels))
            heads.append(self.head(before.layer).cut(_inputs_left(before, after, cut, filters), filters))
        made = Gates(places, heads)
        made.masks, made.targets = self.masks, self.targets
        return made

    def _attach_one(self, model: nn.Module, place: GatePlace, head: GateHead) -> list[RemovableHandle]:
        layer = place.layer

        def look(module: nn.Module, args: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
            if self.masks == "predicted" or self.teaching:
                logits = head(args[0] if args else keywords["input"])
                self.logits[layer] = logits.detach() if self.targets is None else logits

        def switch(module: nn.Module, args: object, output: Tensor) -> Tensor:
            self._want(place, head, output)
            opened = self._opened(layer, output, head)
            if opened is None:
                return output
            self.opened[layer] = opened
            return output * opened[:, head.units].to(output.dtype)[..., None, None]

        return [
            model.get_submodule(layer).register_forward_pre_hook(look, with_kwargs=True),
            model.get_submodule(place.point).register_forward_hook(switch),
        ]

    def _opened(self, layer: str, output: Tensor, head: GateHead) -> Tensor | None:
        if self.masks == "predicted":
            return open_units(self.logits[layer].detach())
        if self.masks == "targets":
            if layer not in self.wanted:
                raise ConfigError(
                    "Gates are to open what the targets say, but there is no rule for targets. Expected one: set "
                    "gates.targets, for example to rule_of(0.9)."
                )
            return self.wanted[layer]
        self.opened[layer] = torch.ones(len(output), head.num_units, dtype=torch.bool, device=output.device)
        return None

    def _want(self, place: GatePlace, head: GateHead, output: Tensor) -> None:
        """Makes the targets from what the layer computed, before it is switched."""
        if self.targets is None:
            self.wanted.pop(place.layer, None)
            return
        with torch.no_grad():
            active = output.detach() if place.activation is None else place.activation(output.detach())
            heats = unit_heat(heat(active).float(), head.units, head.num_units)
            self.heats[place.layer], self.wanted[place.layer] = heats, self.targets(heats)


class GatedNetwork(nn.Module):
    """A plain network with its gates, which are on it only while it runs: one call at a time.

    Attributes:
        model: the network.
        gates: its gates.
    """

    def __init__(self, model: nn.Module, gates: Gates) -> None:
        super().__init__()
        self.model, self.gates = model, gates

    def forward(self, *args: object, **kwargs: object) -> object:
        """Runs the network with its gates on."""
        with self.gates.on(self.model):
            return self.model(*args, **kwargs)

    def without(self, layers: Sequence[str]) -> GatedNetwork:
        """Returns a copy in which some layers are not gated: all their filters always run.

        That is another function: filters that were closed for an image now take part. Measure its accuracy.
        """
        made = copy.deepcopy(self)
        left = [k for k, place in enumerate(made.gates.places) if place.layer not in layers]
        gates = Gates([made.gates.places[k] for k in left], [made.gates.all_heads()[k] for k in left])
        gates.masks, gates.targets = made.gates.masks, made.gates.targets
        return GatedNetwork(made.model, gates)


def _inputs_left(before: GatePlace, after: GatePlace, cut: Mapping[int, Tensor], filters: Tensor) -> Tensor:
    """Returns the inputs of a layer that a cut leaves, ``(after.inputs,)``."""
    if after.inputs == before.inputs:
        return torch.arange(before.inputs)
    if before.groups == 1:
        return cut[1]
    if before.groups == before.inputs:  # depthwise: each filter reads its own channel
        read = filters // (before.channels // before.inputs)
        return cast("Tensor", torch.unique_consecutive(read))
    width = before.inputs // before.groups
    return torch.cat([group * width + cut[1] for group in range(before.groups)])
