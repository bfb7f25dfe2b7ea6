"""Between torch-pruning's groups and ours: which of our channels stand behind the indices of one of its groups.

Both sides name the same things, the output channels of layers; the meeting point is the position along one dimension of
one weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from nni_prune_ext.certificate import verify_groups
from nni_prune_ext.errors import ConfigError
from nni_prune_ext.graph.channel_groups import ChannelGroups, Indices, trace_channel_groups
from nni_prune_ext.graph.model_copy import named_tensors
from nni_prune_ext.graph.state import untouched
from nni_prune_ext.inputs import ExampleInputs

HostGroup = Any
"""A ``torch_pruning`` group: items with ``dep``, ``idxs`` and ``root_idxs``. The host has no types."""
HostDependency = Any
"""A ``torch_pruning`` dependency: the layer that is cut (``target``) and the function that cuts it (``handler``)."""

NO_CHANNEL = -1
_WRITING: tuple[Callable[..., object], ...] = (
    tp.prune_conv_out_channels,
    tp.prune_depthwise_conv_out_channels,
    tp.prune_linear_out_channels,
    tp.prune_embedding_out_channels,
)
_SUPPORTED = ((1, 6), (1, 7))


def check_host() -> None:
    """Refuses versions of torch-pruning that this adapter was not tried with.

    Raises:
        ConfigError: it is older than 1.6, or 1.7 or newer.
    """
    found = metadata.version("torch-pruning")
    parts = tuple(int(part) for part in found.split(".")[:2])
    if not _SUPPORTED[0] <= parts < _SUPPORTED[1]:
        raise ConfigError(
            f"torch-pruning {found} is installed, expected 1.6: its groups, history and pruner state may mean "
            "something else. Run pip install 'torch-pruning>=1.6,<1.7'."
        )


class FollowedGroups:
    """The channel groups of a model that others cut: traced again whenever its shapes have changed.

    The first trace is followed by a trial of every group; what was protected once stays protected.
    """

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs, *, seed: int = 0) -> None:
        self.model = model
        self.example_inputs = example_inputs
        self.seed = seed
        self._groups: ChannelGroups | None = None
        self._shapes: dict[str, torch.Size] = {}

    def current(self) -> ChannelGroups:
        """Returns the groups of the model as it is now.

        Raises:
            TraceError: the channels cannot be followed.
            ModelError: the model does not run on the example inputs.
        """
        shapes = {name: tensor.shape for name, tensor in named_tensors(self.model)}
        if self._groups is None or shapes != self._shapes:
            traced = trace_channel_groups(self.model, self.example_inputs)
            if self._groups is None:
                self._groups = verify_groups(self.model, self.example_inputs, traced, seed=self.seed)
            else:
                known = {protected.root: protected.reason for protected in self._groups.protected}
                self._groups = traced.protecting({g.name: known[g.name] for g in traced if g.name in known})
            self._shapes = shapes
        return self._groups


@dataclass(frozen=True)
class ChannelNumbers:
    """One number per prunable channel of a model, over all groups, and where these channels stand.

    Attributes:
        first: group → number of its first channel.
        places: (tensor, dimension) → ``(size,)`` number of the channel at each position, ``NO_CHANNEL`` where the
            position is protected or holds none.
    """

    first: Mapping[str, int]
    places: Mapping[tuple[str, int], Indices]

    @classmethod
    def of(cls, groups: ChannelGroups) -> ChannelNumbers:
        """Numbers all channels of the groups."""
        first: dict[str, int] = {}
        places: dict[tuple[str, int], Indices] = {}
        total = 0
        for group in groups:
            first[group.name] = total
            for member in group.members:
                size = groups.shapes[member.tensor][member.dim]
                place = places.setdefault((member.tensor, member.dim), np.full(size, NO_CHANNEL, dtype=np.int64))
                place[member.index] = total + member.channel
            total += group.num_channels
        return cls(first, places)

    def behind(self, group: HostGroup, names: Mapping[int, str]) -> list[Indices] | None:
        """Returns, for every index of the group's first item, the channels that go with it.

        Args:
            names: ``id`` of a tensor → its name.

        Returns:
            one ascending array per index; ``None`` if some index stands for a channel that is protected or that its
            layer does not have, or if no layer of the group is one whose output channels we know.
        """
        roots: list[Indices] = []
        numbers: list[Indices] = []
        for item, place, positions in writing_items(group, names):
            given = item.root_idxs
            known = [i for i, root in enumerate(given) if root is not None]
            channels = self.places.get(place)
            if channels is None or not len(known) or positions.max() >= len(channels):
                return None
            numbers.append(channels[positions[known]])
            roots.append(np.asarray([given[i] for i in known], dtype=np.int64))
        if not roots or any((found == NO_CHANNEL).any() for found in numbers):
            return None
        pairs = np.unique(np.stack([np.concatenate(roots), np.concatenate(numbers)]), axis=1)
        asked = np.asarray(group[0].root_idxs, dtype=np.int64)
        low, high = np.searchsorted(pairs[0], asked), np.searchsorted(pairs[0], asked, side="right")
        found = [pairs[1, start:stop] for start, stop in zip(low, high)]
        return found if all(len(channels) for channels in found) else None


def writing_items(group: HostGroup, names: Mapping[int, str]) -> Iterator[tuple[Any, tuple[str, int], Indices]]:
    """Yields every item of a group that cuts output channels of a layer: the item, (tensor, dimension), positions."""
    for item in group:
        place = written_place(item.dep, names)
        if place is not None:
            yield item, place, np.asarray(item.idxs, dtype=np.int64)


def written_place(dep: HostDependency, names: Mapping[int, str]) -> tuple[str, int] | None:
    """Returns the weight, and its dimension, whose output channels a dependency cuts; ``None`` if it cuts others."""
    module = dep.target.module
    name = names.get(id(getattr(module, "weight", None)))
    if name is None or dep.handler not in _WRITING:
        return None
    if isinstance(module, nn.Embedding):
        return name, 1
    if getattr(module, "transposed", False) and dep.handler != tp.prune_depthwise_conv_out_channels:
        return (name, 1) if module.groups == 1 else None
    return name, 0


def tensor_names(model: nn.Module) -> dict[int, str]:
    """Returns ``id`` → name of every parameter and buffer."""
    return {id(tensor): name for name, tensor in named_tensors(model)}


def positional(example_inputs: ExampleInputs) -> tuple[object, ...] | dict[str, object]:
    """Returns example inputs as torch-pruning takes them without guessing: a tuple of arguments, or keyword arguments.

    A bare tensor would be unpacked along its batch: one image would then be traced without its batch dimension.
    """
    return example_inputs if isinstance(example_inputs, (tuple, dict)) else (example_inputs,)


@contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Lets gradients be computed in evaluation mode; modes, gradients, ``requires_grad`` and buffers come back."""
    kept: Sequence[tuple[nn.Parameter, Tensor | None, bool]] = [
        (parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()
    ]
    for parameter, _, _ in kept:
        parameter.grad = None
    try:
        with untouched(model), torch.enable_grad():
            yield
    finally:
        for parameter, gradient, required in kept:
            parameter.requires_grad_(required)
            parameter.grad = gradient
