"""Which channels the targets of an NNI pruner hold: from scores of channel groups to NNI's metrics, masks and ratios.

The groups are traced once, on the model before it is wrapped. Layers of one group get one metric per channel, so that
NNI's own rules give them one mask. A target without a traced group (the model's output layer, or everything where no
example input is known) stands for itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from nni.compression.utils import Scaling
from torch import Tensor, nn

from nni_prune_ext.errors import ConfigError, ModelError, TraceError
from nni_prune_ext.graph.channel_groups import ChannelGroup, ChannelGroups, GroupMember, trace_channel_groups
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.graph.model_copy import named_tensors
from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.plan import Channels, PruningPlan, plan_from_channels, removed_channels

_logger = logging.getLogger(__name__)

Spaces = Mapping[str, Mapping[str, PruningTargetSpace]]
"""Module name → target name → NNI's target space."""
Masks = dict[str, dict[str, Tensor]]
_NAMED_DIMS = {"out_channel": 0, "in_channel": 1}
_UNTRACED = "0" * 64
"""Stands for a fingerprint in plans that remove nothing; no traced model has it."""
_GUESSED_SIZES = (32, 64, 96, 224, 28, 299)


@dataclass(frozen=True)
class Place:
    """One pruned target with its channel dimension; ``dim`` is ``None`` where its pattern is finer than channels."""

    module: str
    target: str
    space: PruningTargetSpace
    dim: int | None

    @property
    def tensor(self) -> str:
        """The name of the parameter in the model before it was wrapped."""
        return f"{self.module}.{self.target}".lstrip(".")

    @property
    def goal(self) -> float | None:
        """The share that is to go, within its limits; ``None`` where a threshold decides."""
        if self.space.sparse_ratio is None:
            return None
        least, most = self.space.min_sparse_ratio or 0.0, self.space.max_sparse_ratio or 1.0
        return float(min(most, max(least, self.space.sparse_ratio)))

    def metric_shape(self) -> list[int]:
        """Returns the shape in which NNI expects one metric per channel."""
        return [size if dim == self.dim else 1 for dim, size in enumerate(self.space.shape)]


def active_places(spaces: Spaces) -> Iterator[Place]:
    """Yields every parameter that NNI is to prune by itself, sorted by name."""
    for module, own in sorted(spaces.items()):
        for target, space in sorted(own.items()):
            scored = space.sparse_ratio is not None or space.sparse_threshold is not None
            if scored and space.type is TargetType.PARAMETER and space.target is not None:
                yield Place(module, target, space, _channel_dim(space))


def _channel_dim(space: PruningTargetSpace) -> int | None:
    """Returns the dimension that NNI's granularity keeps, ``None`` where it is a block or a single element."""
    dim = _NAMED_DIMS.get(str(space.granularity))
    if dim is None and not is_finer_than_channels(space.granularity):
        dim = list(space.granularity).index(1)
    return dim if dim is not None and dim < len(space.shape) else None


def is_finer_than_channels(granularity: object) -> bool:
    """Says whether a granularity masks blocks or elements; a list with a single 1 among -1 is one dimension."""
    if isinstance(granularity, (list, tuple)):
        return list(granularity).count(1) != 1 or any(step not in (1, -1) for step in granularity)
    return granularity not in ("default", *_NAMED_DIMS)


@dataclass(frozen=True)
class ChannelTargets:
    """The channel groups behind the targets of a pruner.

    Attributes:
        groups: the traced groups; empty where no example input is known.
        traced: whether there was an example input.
        example_inputs: what the model was traced with.
        parameters: names of all parameters of the model.
    """

    groups: ChannelGroups
    traced: bool
    example_inputs: ExampleInputs = ()
    parameters: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: nn.Module, example_inputs: ExampleInputs | None) -> ChannelTargets:
        """Traces a model that is not wrapped; without an example input it tries common ones.

        Raises:
            ModelError: the model does not run on the example inputs.
            TraceError: its channels cannot be followed.
        """
        parameters = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
        if example_inputs is not None:
            return cls(trace_channel_groups(model, example_inputs), True, example_inputs, parameters)
        for guess in _guessed_inputs(model):
            try:
                groups = trace_channel_groups(model, guess)
            except (ModelError, TraceError):
                continue
            _logger.info("No dummy_input was given; the channels were traced with shape %s.", tuple(guess.shape))
            return cls(groups, True, guess, parameters)
        _logger.warning(
            "No dummy_input was given to the pruner or its evaluator, and %s runs on none of the common shapes that "
            "were tried. Layers that are coupled (residual connections, depthwise convolutions) get masks of their "
            "own and keep more channels in a speedup. Pass dummy_input=.",
            type(model).__name__,
        )
        return cls.untraced(model)

    @classmethod
    def untraced(cls, model: nn.Module) -> ChannelTargets:
        """Returns targets that stand for themselves: every layer alone, or single weights."""
        parameters = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
        shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}
        return cls(ChannelGroups((), (), shapes, fingerprint=_UNTRACED), False, (), parameters)

    def scored_groups(self, places: Sequence[Place]) -> ChannelGroups:
        """Returns the groups that must be scored for these targets: traced ones, and one per target alone."""
        wanted: dict[str, ChannelGroup] = {}
        for place in places:
            if place.dim is not None:
                for group, _ in self.holding(place):
                    wanted.setdefault(group.name, group)
        return replace(self.groups, groups=tuple(wanted.values()))

    def holding(self, place: Place) -> tuple[tuple[ChannelGroup, GroupMember], ...]:
        """Returns the groups that hold a target's channels; a group of its own where none was traced."""
        assert place.dim is not None
        found = self.groups.holding(place.tensor, place.dim)
        return found or ((alone := _lonely_group(place), alone.members[0]),)

    def metrics(self, places: Sequence[Place], scores: Mapping[str, Tensor]) -> Masks:
        """Returns NNI's metrics: per target one number per channel, equal for channels that are one.

        Channels that are protected within a target that is otherwise prunable are infinite.
        """
        result: Masks = {}
        for place in places:
            if place.dim is None:
                continue
            values = torch.full((place.space.shape[place.dim],), torch.inf)
            for group, member in self.holding(place):
                own = scores[group.name].detach().float().cpu()
                values[torch.from_numpy(member.index)] = own[torch.from_numpy(member.channel)]
            device = place.space.target.device
            result.setdefault(place.module, {})[place.target] = values.reshape(place.metric_shape()).to(device)
        return result

    def closed(self, places: Sequence[Place], masks: Mapping[str, Mapping[str, Tensor]]) -> Masks:
        """Returns the masks with every channel that stands for several positions of a target kept or masked as one."""
        result = {module: dict(own) for module, own in masks.items()}
        for place in places:
            if place.dim is None:
                continue
            mask = result[place.module][place.target]
            kept = channel_mask(mask, place.dim)
            for group, member in self.holding(place):
                if len(np.unique(member.channel)) < len(member.channel):
                    gone = np.ones(group.num_channels, dtype=np.bool_)
                    np.logical_and.at(gone, member.channel, ~kept[member.index])
                    kept[member.index] = ~gone[member.channel]
            shape = [size if dim == place.dim else 1 for dim, size in enumerate(mask.shape)]
            result[place.module][place.target] = torch.from_numpy(kept).to(mask).reshape(shape).expand_as(mask).clone()
        return result

    def unit_of(self, place: Place) -> str:
        """Returns what a target is pruned together with: NNI's dependency group, its traced group, or itself."""
        if place.space.dependency_group_id is not None:
            return f"dependency group {place.space.dependency_group_id}"
        if place.dim is None:
            return place.tensor
        return self.holding(place)[0][0].name

    def plan(self, places: Sequence[Place], masks: Mapping[str, Mapping[str, Tensor]]) -> PruningPlan:
        """Returns the channels that the masks of all layers of their group agree to remove."""
        removed: dict[str, Channels] = {}
        kept = {(p.tensor, p.dim): channel_mask(masks[p.module][p.target], p.dim) for p in places if p.dim is not None}
        for group in self.groups:
            votes = np.zeros(group.num_channels, dtype=np.int64)
            vetoes = np.zeros(group.num_channels, dtype=np.int64)
            for member in self._writers(group):
                own = kept.get((member.tensor, member.dim), np.ones(0, dtype=np.bool_))
                if own.size:
                    np.add.at(votes, member.channel, ~own[member.index])
                    np.add.at(vetoes, member.channel, own[member.index])
                else:
                    vetoes[member.channel] += 1
            gone = (votes > 0) & (vetoes == 0)
            if gone.any() and not gone.all():
                removed[group.name] = gone
        return plan_from_channels(self.groups, removed)

    def masks_of(self, plan: PruningPlan, spaces: Spaces) -> Masks:
        """Returns masks for all targets of the layers that write, scale or shift the channels that a plan removes."""
        gone = removed_channels(plan, self.groups)
        dims = {(place.module, place.target): place.dim for place in active_places(spaces)}
        result: Masks = {}
        for module, own in spaces.items():
            for target, space in own.items():
                if space.type is not TargetType.PARAMETER or space.target is None:
                    continue
                mask = torch.ones_like(space.target)
                dim = dims.get((module, target)) or 0
                for group, member in self.groups.holding(f"{module}.{target}".lstrip("."), dim):
                    lost = member.index[gone[group.name][member.channel]] if group.name in gone else member.index[:0]
                    mask.index_fill_(dim, torch.from_numpy(lost).to(mask.device), 0)
                result.setdefault(module, {})[target] = mask
        return result

    def shortcut_masks_of(self, plan: PruningPlan) -> Masks:
        """Returns masks ``(1, C, 1, 1)`` for the outputs of shortcuts without weights that a plan takes channels of."""
        gone = removed_channels(plan, self.groups)
        result: Masks = {}
        for group in self.groups:
            for member in group.by_role(Role.WRITER):
                if member.tensor not in self.parameters and group.name in gone and gone[group.name].any():
                    width = self.groups.shapes[member.tensor][member.dim]
                    mask = torch.ones(1, width, 1, 1)
                    mask[:, torch.from_numpy(member.index[gone[group.name][member.channel]])] = 0
                    result.setdefault(member.tensor.rpartition(".")[0], {})["_output_0"] = mask
        return result

    def _writers(self, group: ChannelGroup) -> list[GroupMember]:
        """Returns the layers that write a group; shortcuts without weights cannot be masked and have no say."""
        return [m for m in group.by_role(Role.WRITER, Role.DEPTHWISE) if m.tensor in self.parameters]

    def torn(self, places: Sequence[Place], masks: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
        """Describes the groups whose layers are masked differently: a speedup keeps those channels."""
        kept = {(p.tensor, p.dim): channel_mask(masks[p.module][p.target], p.dim) for p in places if p.dim is not None}
        found = []
        for group in self.groups:
            writers = self._writers(group)
            masked = [m for m in writers if (m.tensor, m.dim) in kept]
            lost = np.zeros((len(masked), group.num_channels), dtype=np.bool_)
            for row, member in enumerate(masked):
                np.logical_or.at(lost[row], member.channel, ~kept[member.tensor, member.dim][member.index])
            if not lost.any():
                continue
            others = [member.tensor.removesuffix(".weight") for member in writers if member not in masked]
            differing = int((lost.any(0) & ~lost.all(0)).sum())
            if others:
                found.append(
                    f"'{group.name}': {int(lost.any(0).sum())} channels masked, but {_some(others)} not pruned"
                )
            elif differing and all(len(np.unique(m.channel)) == group.num_channels for m in masked):
                found.append(f"'{group.name}': its {len(masked)} layers disagree on {differing} channels")
        return found


def channel_mask(mask: Tensor, dim: int) -> Channels:
    """Returns ``(size of dim,)`` bool, ``True`` for the channels of which anything is kept."""
    others = [d for d in range(mask.dim()) if d != dim]
    kept = (mask != 0).any(dim=others) if others else mask != 0
    result: Channels = kept.cpu().numpy().astype(np.bool_)
    return result


def masked_share(mask: Tensor) -> float:
    """Returns the share of a mask that is 0."""
    return float((mask == 0).double().mean())


def short_of_goal(places: Sequence[Place], masks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Describes the targets that miss their ratio by a channel (or element) or more, and those too small for one.

    The ratio of a global group is that of all its elements together.
    """
    found, groups = [], dict[str, list[Place]]()
    for place in places:
        mask, goal = masks.get(place.module, {}).get(place.target), place.goal
        if not goal or mask is None:
            continue
        if place.space.global_group_id is not None:
            groups.setdefault(str(place.space.global_group_id), []).append(place)
            continue
        units = mask.numel() if place.dim is None else mask.shape[place.dim]
        share = masked_share(mask)
        if share < goal - 1 / units - 1e-9 or share == 0:
            found.append(f"'{place.module}' {share:.3f} of {goal:.3f} ({round(share * units)} of {units})")
    for name, own in groups.items():
        sizes = [place.space.target.numel() for place in own]
        share = sum(masked_share(masks[p.module][p.target]) * size for p, size in zip(own, sizes)) / sum(sizes)
        coarsest = sum(size / (1 if p.dim is None else p.space.shape[p.dim]) for p, size in zip(own, sizes)) / sum(
            sizes
        )
        asked = float(own[0].space.sparse_ratio)
        if share < asked - coarsest or share == 0:
            found.append(f"global group {name} {share:.3f} of {asked:.3f} ({len(own)} layers)")
    return found


def turn_transposed(spaces: Spaces) -> None:
    """Makes the granularities of transposed convolutions mean what they say: their weights hold outputs in dimension 1.

    NNI takes dimension 0 of every weight for the outputs, so that it would mask inputs, and misalign the bias.
    """
    for own in spaces.values():
        for target, space in own.items():
            module = space._wrapper.module
            if not isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
                continue
            if module.groups == module.in_channels:
                continue  # depthwise: dimension 0 holds the channels on both sides
            align = space._setting.get("align")
            if target == "bias" and align is not None and align["module_name"] is None:
                space._setting["align"] = {**align, "dims": [1]}
            kernel = {"out_channel": [-1, 1], "in_channel": [1]}.get(str(space.granularity))
            if target == "weight" and kernel is not None:
                space._setting["granularity"] = kernel
                space._scaler = Scaling(kernel, kernel_padding_mode="back", kernel_padding_val=-1)


def inputs_of(dummy_input: object) -> ExampleInputs:
    """Returns an example input as this package takes it; NNI also takes a list.

    Raises:
        ConfigError: it is neither a tensor nor a tuple, list or dict.
    """
    if isinstance(dummy_input, list):
        return tuple(dummy_input)
    if isinstance(dummy_input, (Tensor, tuple, dict)):
        return dummy_input
    raise ConfigError(
        f"The dummy_input is a {type(dummy_input).__name__}, expected a tensor, a tuple or list of positional "
        "arguments, or a dict of keyword arguments. Pass for example torch.rand(1, 3, 224, 224)."
    )


def _lonely_group(place: Place) -> ChannelGroup:
    index = np.arange(place.space.shape[place.dim])
    role = {0: Role.WRITER, 1: Role.CONSUMER}[place.dim or 0]
    member = GroupMember(place.tensor, place.dim or 0, role, index, index)
    return ChannelGroup(f"{place.module} alone", len(index), (member,), {})


def _guessed_inputs(model: nn.Module) -> Iterator[Tensor]:
    """Yields inputs that may fit the first layer: pictures of common sizes, or features."""
    first = next((p for p in model.parameters() if p.dim() > 1), None)
    if first is None:
        return
    if first.dim() == 2:
        yield torch.zeros(2, first.shape[1], device=first.device, dtype=first.dtype)
        return
    for size in _GUESSED_SIZES if first.dim() == 4 else ():
        yield torch.zeros(2, first.shape[1], size, size, device=first.device, dtype=first.dtype)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
