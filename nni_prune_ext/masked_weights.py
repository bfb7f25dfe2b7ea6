"""Weights that are read through a mask: the forward pass sees them masked, the parameters themselves stay as they are.

While a module runs forward, its parameter reads as a function of it. The parameter keeps its name, its value and its
place in ``state_dict``, whatever runs or fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.graph.channel_groups import ChannelGroups, GroupMember
from nni_prune_ext.graph.label_book import Role

Reading = Callable[[Tensor], Tensor]
"""A parameter → what its module reads in its place, of the same shape."""
Gates = Callable[[], Tensor]
"""Returns one value per channel of all groups in a row, and a 1 behind them, ``(groups.num_channels + 1,)``."""


class _StraightThrough(torch.autograd.Function):
    """``weight × mask``, with the gradient of the mask handed to the scores behind it, kept and pruned alike."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, scores: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        weight, mask = ctx.saved_tensors
        own, _, scores = ctx.needs_input_grad
        return gradient * mask if own else None, None, gradient * weight if scores else None


def straight_through(weight: Tensor, mask: Tensor, scores: Tensor) -> Tensor:
    """Returns ``weight × mask`` whose gradient by ``scores`` is that by the mask (Bengio et al., 2013).

    https://arxiv.org/abs/1308.3432.

    Args:
        weight: any shape.
        mask: of the same shape, 0 and 1 (or bool).
        scores: of the same shape; their values play no part.
    """
    return cast("Tensor", _StraightThrough.apply(weight, mask, scores))  # type: ignore[no-untyped-call]


class _AsIfOpen(torch.autograd.Function):
    """``tensor × factor``, whose gradient by the tensor is that of the tensor itself."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: Tensor) -> Tensor:
        return tensor * factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@dataclass(frozen=True)
class Readings:
    """What was put onto a model.

    Attributes:
        handles: remove them to end it.
        unread: the parameters and shortcuts that no forward has read through yet.
    """

    handles: list[RemovableHandle]
    unread: set[str]

    def check(self) -> None:
        """Refuses, after a forward pass, parameters that nobody has read through their function.

        Raises:
            ConfigError: with the name of one.
        """
        if self.unread:
            name = min(self.unread)
            raise ConfigError(
                f"'{name}' was never read through its mask ({len(self.unread)} such parameters), expected its layer "
                "to use it in its own forward. Exclude layers that the loss does not use, and those whose weight "
                "another module uses directly."
            )


def read_through(model: nn.Module, readings: Mapping[str, Reading]) -> Readings:
    """Lets modules read parameters through functions while they run.

    Modules that share a parameter all read it so. A module whose ``forward`` is never called, because its parent uses
    the parameter itself, reads it plain: its name stays in ``unread``.

    Args:
        readings: name of a parameter → function of it.
    """
    parameters, found = dict(model.named_parameters()), Readings([], set(readings))
    for name, reading in readings.items():
        for module in model.modules():
            for key, own in module._parameters.items():
                if own is parameters[name]:
                    _read_through(module, key, name, reading, found)
    return found


def _read_through(module: nn.Module, key: str, name: str, reading: Reading, found: Readings) -> None:
    def before(module: nn.Module, args: object) -> None:
        module.__dict__[key] = reading(module._parameters[key])  # type: ignore[arg-type]  # found before the parameter
        found.unread.discard(name)

    def after(module: nn.Module, args: object, output: object) -> None:
        module.__dict__.pop(key, None)

    found.handles.append(module.register_forward_pre_hook(before))
    found.handles.append(module.register_forward_hook(after, always_call=True))


def channel_offsets(groups: ChannelGroups) -> dict[str, int]:
    """Returns group → position of its first channel in a row of the channels of all groups."""
    offsets, start = {}, 0
    for group in groups:
        offsets[group.name] = start
        start += group.num_channels
    return offsets


def gate_consumers(model: nn.Module, groups: ChannelGroups, gates: Gates, *, learn_closed: bool = False) -> Readings:
    """Scales every channel by its gate in whatever reads it.

    Where a gate is 0, nothing behind it can tell its channel from a removed one, in training and evaluation mode and
    behind any activation; a gradient reaches the gate all the same. (Norms that mix channels, such as LayerNorm, still
    take their statistics over all of them.)

    Args:
        learn_closed: hands weights that read a closed channel the gradient that they would get at this point if it were
            open, so that they go on learning (as in Lin et al., "Dynamic Model Pruning with Feedback", 2020,
            https://arxiv.org/abs/2006.07253). Gates get no gradient then.
    """
    parameters = dict(model.named_parameters())
    weights: dict[str, dict[int, Tensor]] = {}
    shortcuts: dict[str, Tensor] = {}
    for member, channels in _members(groups, lambda member: member.reads):
        if member.tensor in parameters:
            place = weights.setdefault(member.tensor, {}).setdefault(member.dim, _all_open(groups, member))
        else:
            place = shortcuts.setdefault(member.tensor.rpartition(".")[0], _all_open(groups, member))
        place[torch.from_numpy(member.index)] = channels
    device = next(model.parameters()).device
    found = read_through(model, {name: _gated(gates, places, device, learn_closed) for name, places in weights.items()})
    for name, place in shortcuts.items():
        reading = _gated(gates, {1: place}, device)
        found.handles.append(
            model.get_submodule(name).register_forward_pre_hook(lambda _, args, reading=reading: (reading(args[0]),))
        )
    return found


def gate_norms(model: nn.Module, groups: ChannelGroups, gates: Gates) -> Readings:
    """Scales the output of every norm by the gates of its channels.

    A channel is gone only where every layer that writes it is followed by a norm and the activation keeps zero; and
    behind a ReLU a gate of 0 gets no gradient, because the derivative of ReLU at 0 is 0.

    Raises:
        ConfigError: a group has no norm.
    """
    device = next(model.parameters()).device
    places: dict[str, Tensor] = {}
    for member, channels in _members(groups, lambda member: member.role is Role.NORM):
        place = places.setdefault(member.tensor.rpartition(".")[0], _all_open(groups, member))
        place[torch.from_numpy(member.index)] = channels
    bare = [group.name for group in groups if not group.by_role(Role.NORM)]
    if bare:
        raise ConfigError(
            f"No norm follows the layers of group '{bare[0]}' ({len(bare)} such groups), expected one to put gates "
            "behind. Put the gates at the consumers."
        )
    found = Readings([], set())
    for name, place in places.items():
        reading = _gated(gates, {1: place}, device)
        found.handles.append(
            model.get_submodule(name).register_forward_hook(lambda _, args, output, reading=reading: reading(output))
        )
    return found


def _members(groups: ChannelGroups, wanted: Callable[[GroupMember], bool]) -> Iterator[tuple[GroupMember, Tensor]]:
    """Yields members, each with the row of gates for its positions."""
    first = channel_offsets(groups)
    for group in groups:
        for member in group.members:
            if wanted(member):
                yield member, torch.from_numpy(member.channel) + first[group.name]


def _all_open(groups: ChannelGroups, member: GroupMember) -> Tensor:
    """Returns, per position along a member's dimension, the number of the last gate, which is open."""
    return torch.full((groups.shapes[member.tensor][member.dim],), groups.num_channels)


def _gated(gates: Gates, places: Mapping[int, Tensor], device: torch.device, learn_closed: bool = False) -> Reading:
    there = {dim: place.to(device) for dim, place in places.items()}

    def reading(tensor: Tensor) -> Tensor:
        values = gates().to(tensor.dtype)
        for dim, place in there.items():
            factor = values[place].reshape([-1 if d == dim else 1 for d in range(tensor.dim())])
            tensor = (
                cast("Tensor", _AsIfOpen.apply(tensor, factor))  # type: ignore[no-untyped-call]
                if learn_closed
                else tensor * factor
            )
        return tensor

    return reading
