"""Channel groups: the channels of a network that can only be removed together, with one role map each.

``trace_channel_groups`` runs the model once on example inputs and follows its channels (see ``tracing``). The result is
pure data: names and indices of the original model, no live objects.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from nni_prune_ext.errors import TraceError
from nni_prune_ext.graph import rules_elementwise, rules_layers, rules_movement  # noqa: F401 (they register rules)
from nni_prune_ext.graph.label_book import LabelBook, Role
from nni_prune_ext.graph.model_copy import copy_model
from nni_prune_ext.graph.rewrites import apply_rewrites, find_rewrites
from nni_prune_ext.graph.state import untouched
from nni_prune_ext.graph.tracing import Trace, refuse_untraceable, trace_channels
from nni_prune_ext.inputs import ExampleInputs

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class GroupMember:
    """One dimension of one tensor that holds channels of a group.

    Attributes:
        tensor: name of a parameter or buffer of the model.
        dim: the dimension that holds the channels.
        role: what the tensor does with them.
        index: positions along ``dim``, ``(M,)``, ascending.
        channel: the channel of the group at each of these positions, ``(M,)``.
        also_reads: the tensor is a consumer of the channels besides (an embedding tied to the last linear layer).
    """

    tensor: str
    dim: int
    role: Role
    index: Indices
    channel: Indices
    also_reads: bool = False

    @property
    def reads(self) -> bool:
        """Says whether a removed channel is silent once these positions of the tensor are zero."""
        return self.role is Role.CONSUMER or self.also_reads


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that live and die together, numbered ``0 … num_channels - 1``.

    One channel may stand for several positions of one tensor (the partners in the groups of a grouped convolution, the
    pixels behind a flatten).

    Attributes:
        name: the root, that is the first layer that writes these channels.
        num_channels: how many channels can be removed independently.
        members: the role map.
        roots: for every layer that writes channels first, ``(positions, channels)``: how plans name channels.
    """

    name: str
    num_channels: int
    members: tuple[GroupMember, ...]
    roots: Mapping[str, tuple[Indices, Indices]]

    def by_role(self, *roles: Role) -> tuple[GroupMember, ...]:
        """Returns the members with one of the given roles, in forward order."""
        return tuple(member for member in self.members if member.role in roles)


@dataclass(frozen=True)
class Protected:
    """A layer whose output channels must all stay, and why."""

    root: str
    width: int
    reason: str


@dataclass(frozen=True)
class ChannelGroups:
    """All channel groups of one model: pure data in the coordinates of the traced model.

    Attributes:
        groups: the groups that may be pruned, in forward order.
        protected: the layers that may not, with reasons.
        shapes: original shape of every parameter and buffer.
        fingerprint: SHA-256 over shapes, rewrites and the traced role map, whatever is protected later: two models with
            the same one take the same plans.
        rewrites: names of modules that are exactly rewritten before channels are removed.
        unreached: parameters that the forward pass never used; they stay as they are.
        value_dependent: calls that turn values of tensors into Python values. If the forward pass branches on them,
            only the branch taken is covered.
    """

    groups: tuple[ChannelGroup, ...]
    protected: tuple[Protected, ...]
    shapes: Mapping[str, tuple[int, ...]]
    fingerprint: str = ""
    rewrites: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    value_dependent: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[ChannelGroup]:
        """Iterates over the prunable groups."""
        return iter(self.groups)

    def __len__(self) -> int:
        """Counts the prunable groups."""
        return len(self.groups)

    def __getitem__(self, name: str) -> ChannelGroup:
        """Returns the group with this root.

        Raises:
            TraceError: there is no such group.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise TraceError(
            f"There is no prunable channel group '{name}'; there are {len(self.groups)}, the first being "
            f"{[g.name for g in self.groups[:3]]}. Run `nni-prune-ext plan` to list all groups and protected layers."
        )

    def holding(self, tensor: str, dim: int) -> tuple[tuple[ChannelGroup, GroupMember], ...]:
        """Returns the prunable groups with channels along one dimension of a tensor, each with its member there.

        Positions of the dimension that no member covers are protected, or hold no channels.
        """
        return tuple(
            (group, member)
            for group in self.groups
            for member in group.members
            if (member.tensor, member.dim) == (tensor, dim)
        )

    @property
    def num_channels(self) -> int:
        """Counts the prunable channels of all groups."""
        return sum(group.num_channels for group in self.groups)

    def protecting(self, reasons: Mapping[str, str]) -> ChannelGroups:
        """Returns the same groups with those in ``reasons`` (name → why) moved to the protected ones."""
        moved = tuple(Protected(g.name, g.num_channels, reasons[g.name]) for g in self.groups if g.name in reasons)
        kept = tuple(group for group in self.groups if group.name not in reasons)
        return replace(self, groups=kept, protected=self.protected + moved)


def trace_channel_groups(model: nn.Module, example_inputs: ExampleInputs) -> ChannelGroups:
    """Finds the channel groups of a model from one forward pass in evaluation mode.

    The model is left as it was: mode, hooks, attributes, gradients, buffers, random state, ``requires_grad`` and memory
    format; a copy that shares its tensors is run.
    Frozen models trace like others. Channels that reach the model's output, that meet something not understood, or that
    a known mixing operation reduces over, are protected, with the reason.

    Args:
        model: any module that runs on the example inputs.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments; a batch of 1 will do.

    Raises:
        ModelError: the model does not run on the example inputs, or cannot be copied.
        TraceError: the model returns no tensor or something opaque, writes no channels, is compiled or has no data.
    """
    refuse_untraceable(model)
    with untouched(model):
        model = copy_model(model, share_others=True)
        trace = trace_channels(model, example_inputs)
        rewrites = find_rewrites(model, tuple(trace.channel_pads), example_inputs)
        if not rewrites:
            return _collect(model, trace, ())
        rewritten = apply_rewrites(model, rewrites, example_inputs)
        return _collect(rewritten, trace_channels(rewritten, example_inputs), rewrites)


def _collect(model: nn.Module, trace: Trace, rewrites: tuple[str, ...]) -> ChannelGroups:
    book = trace.book
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    writers = [key for key, entry in book.entries.items() if entry.role is Role.WRITER]
    if not writers:
        raise TraceError(
            f"No layer of {type(model).__name__} was seen to write channels, expected a convolution, linear layer or "
            "embedding that PyTorch can intercept (is the model scripted or compiled?). Pass the plain nn.Module."
        )
    _freeze_second_directions(book, writers)
    frozen = book.frozen()
    groups = _build_groups(book, writers, _group_channels(book, writers, frozen))
    unreached = tuple(name for name, _ in model.named_parameters() if name not in trace.visited)
    return ChannelGroups(
        groups=groups,
        protected=_protected(book, writers, frozen),
        shapes=shapes,
        fingerprint=_fingerprint(shapes, rewrites, groups),
        rewrites=rewrites,
        unreached=unreached,
        value_dependent=tuple(trace.value_dependent),
    )


def _freeze_second_directions(book: LabelBook, writers: list[tuple[str, int]]) -> None:
    """Protects what a tied weight writes in a second direction: plans name channels by layer, without the direction."""
    calls = Counter(tensor for tensor, _ in writers)
    first: dict[str, int] = {}
    for tensor, dim in [(tensor, dim) for tensor, dim in writers if calls[tensor] > 1]:
        frozen = book.frozen()
        free = [label for label in book.find(book.entries[tensor, dim].labels).tolist() if label not in frozen]
        if free and first.setdefault(tensor, dim) != dim:
            book.freeze(np.array(free), f"'{tensor}' is tied and writes channels in two directions")


def _fingerprint(
    shapes: Mapping[str, tuple[int, ...]], rewrites: tuple[str, ...], groups: tuple[ChannelGroup, ...]
) -> str:
    digest = hashlib.sha256(json.dumps([sorted(shapes.items()), rewrites]).encode())
    for group in groups:
        digest.update(group.name.encode())
        for member in group.members:
            digest.update(f"{member.tensor}/{member.dim}/{member.role.value}".encode())
            digest.update(member.index.tobytes())
            digest.update(member.channel.tobytes())
    return digest.hexdigest()


def root_name(tensor: str) -> str:
    """Returns how a writing tensor is called in plans: its layer's name where it is that layer's weight."""
    return tensor.removesuffix(".weight").removesuffix(".selection")


def _group_channels(book: LabelBook, writers: list[tuple[str, int]], frozen: Mapping[int, str]) -> list[list[int]]:
    """Returns, per group, its channels (representative labels) in forward order.

    Channels belong to one group if some layer writes both.
    """
    owner: dict[int, int] = {}
    members: dict[int, list[int]] = {}
    for number, key in enumerate(writers):
        free = [int(x) for x in dict.fromkeys(book.find(book.entries[key].labels).tolist()) if x and x not in frozen]
        met = sorted({owner[x] for x in free if x in owner})
        home = met[0] if met else number
        for other in met[1:]:
            for label in members.pop(other):
                owner[label] = home
                members[home].append(label)
        room = members.setdefault(home, [])
        for label in free:
            if label not in owner:
                owner[label] = home
                room.append(label)
    return [members[number] for number in sorted(members) if members[number]]


def _build_groups(
    book: LabelBook, writers: list[tuple[str, int]], grouped: list[list[int]]
) -> tuple[ChannelGroup, ...]:
    size = max((max(channels) for channels in grouped), default=0)
    home = np.full(size + 1, -1, dtype=np.int64)
    number = np.zeros(size + 1, dtype=np.int64)
    for group, channels in enumerate(grouped):
        home[channels] = group
        number[channels] = np.arange(len(channels))
    members: list[list[GroupMember]] = [[] for _ in grouped]
    roots: list[dict[str, tuple[Indices, Indices]]] = [{} for _ in grouped]
    named: set[int] = set()
    for (tensor, dim), entry in book.entries.items():
        labels = book.find(entry.labels)
        inside = labels < len(home)
        homes = np.where(inside, home[np.where(inside, labels, 0)], -1)
        for group in np.unique(homes[homes >= 0]):
            index = np.flatnonzero(homes == group)
            members[group].append(GroupMember(tensor, dim, entry.role, index, number[labels[index]], entry.also_reads))
            if entry.role is Role.WRITER:
                fresh = np.array([int(x) not in named for x in labels[index]], dtype=bool)
                named.update(int(x) for x in labels[index])
                if fresh.any():
                    roots[group][root_name(tensor)] = (index[fresh], number[labels[index[fresh]]])
    return tuple(
        ChannelGroup(next(iter(roots[g])), len(channels), tuple(members[g]), roots[g])
        for g, channels in enumerate(grouped)
    )


def _protected(book: LabelBook, writers: list[tuple[str, int]], frozen: Mapping[int, str]) -> tuple[Protected, ...]:
    result = []
    for tensor, dim in writers:
        labels = book.find(book.entries[tensor, dim].labels)
        reasons = [frozen[int(label)] for label in labels if int(label) in frozen]
        if len(reasons) == len(labels):
            result.append(Protected(root_name(tensor), len(labels), reasons[0]))
    return tuple(result)
