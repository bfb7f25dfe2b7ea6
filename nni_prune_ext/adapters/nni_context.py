"""What an NNI pruner offers to a method: its targets come from a config_list, its data from an evaluator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from nni.compression.base.compressor import Compressor, Pruner
from nni.compression.base.target_space import PruningTargetSpace
from torch import Tensor, nn

from nni_prune_ext.adapters.nni_evaluator import StepCall
from nni_prune_ext.adapters.nni_sparsity import counts_of_weights, make_masks
from nni_prune_ext.adapters.nni_targets import ChannelTargets, Masks, Place, active_places, masked_share
from nni_prune_ext.allocation import Allocation
from nni_prune_ext.allocation.ratio_scaling import scaled_ratios
from nni_prune_ext.errors import ConfigError
from nni_prune_ext.graph.channel_groups import ChannelGroups, Indices
from nni_prune_ext.methods.base import Batch, Unit
from nni_prune_ext.plan import plan_from_channels, removed_channels
from nni_prune_ext.training import MethodRun
from nni_prune_ext.training.processes import averaged

if TYPE_CHECKING:
    from nni_prune_ext.adapters.nni_targets import Spaces


@dataclass
class ScoringContext:
    """What a criterion looks at: a plain copy of the model, its groups, and batches that the training has seen."""

    model: nn.Module
    groups: ChannelGroups
    calls: Sequence[StepCall] = ()
    seed: int = 0
    progress: float = 0.0

    def batches(self, count: int) -> list[Batch]:
        """Returns the last ``count`` calls of the training step, fewer if there were fewer.

        Raises:
            ConfigError: there was none.
        """
        if count and not self.calls:
            raise ConfigError(
                "The method scores with training batches, but none has been seen yet. Pass an evaluator, and let the "
                "training_func make at least one step."
            )
        return list(self.calls)[-count:] if count else []

    def task_loss(self, batch: StepCall) -> Tensor:
        """Returns the user's loss of the copy on a batch."""
        return batch.loss(self.model)


@dataclass
class NniRun(MethodRun):
    """A method's run inside an NNI pruner, on a copy of the model that may be cut.

    Attributes:
        targets_of: the channels behind the pruner's targets, in the coordinates of the whole model.
        spaces: the pruner's target spaces.
        collect: makes so many batches.
        whole: the groups of the whole model that the method may prune.
        asked: what the config_list asks for, channels or single weights.
    """

    targets_of: ChannelTargets = field(default_factory=lambda: ChannelTargets(ChannelGroups((), (), {}), False))
    spaces: Spaces = field(default_factory=dict)
    collect: Callable[[int], list[StepCall]] = field(default=lambda count: [])
    whole: ChannelGroups = field(default_factory=lambda: ChannelGroups((), (), {}))
    asked: Unit = "channel"

    @property
    def unit(self) -> Unit:
        """Says whether the config_list asks for channels or single weights."""
        return self.asked

    @property
    def maskable(self) -> tuple[str, ...]:
        """Returns the tensors that the config_list names, if it asks for single weights; shared ones once."""
        return tuple(name for name, _ in self.model.named_parameters() if name in self._named)

    def masked_counts(self, magnitudes: Mapping[str, Tensor], *, fraction: float = 1.0) -> dict[str, int]:
        """Plans by the config_list: its ratio of each tensor, or one threshold for a global group."""
        return counts_of_weights(self._named, averaged(magnitudes), fraction)

    @property
    def _named(self) -> dict[str, Place]:
        """Returns tensor name → its target, where single weights were asked for."""
        if self.unit == "channel":
            return {}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {names[id(self.model.get_parameter(p.tensor))]: p for p in active_places(self.spaces)}

    def batches(self, count: int) -> list[Batch]:
        """Returns ``count`` batches of the user's training function, out of the run of training."""
        return list(self.collect(count)) if count else []

    def task_loss(self, batch: StepCall) -> Tensor:
        """Returns the user's loss of the current model on a batch."""
        return batch.loss(self.model)

    def allocate(
        self, scores: Mapping[str, Tensor], *, fraction: float = 1.0, ratios: Mapping[str, float] | None = None
    ) -> Allocation:
        """Plans by NNI's own rules: the config_list says how much of each layer goes."""
        whole_scores = self._whole(averaged(dict(scores)))
        places = [p for p in active_places(self.spaces) if self._inside(p, whole_scores)]
        spaces = {(p.module, p.target): p for p in places}
        used: dict[str, dict[str, PruningTargetSpace]] = {}
        for module, target in spaces:
            used.setdefault(module, {})[target] = self.spaces[module][target]
        with scaled_goals(places, self._goals(places, fraction, ratios)):
            masks = make_masks(self.targets_of, places, self.targets_of.metrics(places, whole_scores), used)
        gone = removed_channels(self.targets_of.plan(places, masks), self.targets_of.groups)
        left = self._survivors()
        now = {name: gone[name][numbers] for name, numbers in left.items() if gone[name][numbers].any()}
        plan = plan_from_channels(self.groups, now)
        kept = {
            name: len(numbers) - int(now[name].sum()) if name in now else len(numbers) for name, numbers in left.items()
        }
        widths = {group.name: group.num_channels for group in self.whole}
        gone_share = {name: 1 - count / widths[name] for name, count in kept.items()}
        share = 1 - sum(kept.values()) / max(sum(widths.values()), 1)
        return Allocation(plan, (), kept, gone_share, {"ratio": share}, dict.fromkeys(kept, 1.0))

    def _goals(self, places: Sequence[Place], fraction: float, ratios: Mapping[str, float] | None) -> dict[str, float]:
        """Returns tensor name → share of the goal, or goal itself where a ratio policy is in charge."""
        if ratios is None:
            return {place.tensor: fraction * (place.goal or 0.0) for place in places}
        units = {place.tensor: self.targets_of.unit_of(place) for place in places}
        relative = {unit: ratios[unit] for unit in units.values()}
        asked = {place.tensor: place.goal or 0.0 for place in places}
        return policy_goals(places, units, relative, asked, fraction)

    def _inside(self, place: Place, scores: Mapping[str, Tensor]) -> bool:
        return place.dim is not None and all(g.name in scores for g, _ in self.targets_of.holding(place))

    def _survivors(self) -> dict[str, Indices]:
        """Returns group → numbers, in the whole model, of the channels that the current one still has."""
        gone = {} if self.applied is None else removed_channels(self.applied, self.targets_of.groups)
        return {
            group.name: np.flatnonzero(~gone[group.name]) if group.name in gone else np.arange(group.num_channels)
            for group in self.whole
        }

    def _whole(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the scores of all channels of the whole model; those that are cut come first."""
        result = {}
        for name, numbers in self._survivors().items():
            full = torch.full((self.whole[name].num_channels,), -torch.inf)
            full[torch.from_numpy(numbers)] = scores[name].detach().float().cpu()
            result[name] = full
        return result


def policy_goals(
    places: Sequence[Place],
    units: Mapping[str, str],
    relative: Mapping[str, float],
    asked: Mapping[str, float],
    share: float,
) -> dict[str, float]:
    """Returns tensor name → ratio: relative ratios per unit, scaled to ``share`` of what the config_list asks for.

    Args:
        units: tensor name → what it is pruned together with.
        relative: unit → relative ratio of a ratio policy.
        asked: tensor name → ratio in the config_list.
    """
    first = {units[place.tensor]: place for place in reversed(list(places))}
    sizes = {
        unit: place.space.target.numel() if place.dim is None else place.space.shape[place.dim]
        for unit, place in first.items()
    }
    caps = {unit: min(place.space.max_sparse_ratio or 1.0, 1 - 1 / sizes[unit]) for unit, place in first.items()}
    total = sum(asked[place.tensor] * sizes[unit] for unit, place in first.items())
    scaled = scaled_ratios(relative, sizes, caps, share * total / max(sum(sizes.values()), 1))
    return {place.tensor: scaled[units[place.tensor]] for place in places}


@contextmanager
def scaled_goals(places: Sequence[Place], goals: Mapping[str, float]) -> Iterator[None]:
    """Sets the sparse ratio of targets (tensor name → ratio) for the time of a ``with`` block."""
    before = [(place.space, place.space.sparse_ratio) for place in places if place.space.sparse_ratio is not None]
    try:
        for place in places:
            if place.space.sparse_ratio is not None:
                place.space.sparse_ratio = float(goals[place.tensor])
        yield
    finally:
        for space, ratio in before:
            space.sparse_ratio = ratio


def reached_ratios(places: Sequence[Place], units: Mapping[str, str]) -> dict[str, float]:
    """Returns unit → share of its first target that is masked now."""
    return {
        units[place.tensor]: 0.0 if place.space.mask is None else masked_share(place.space.mask)
        for place in reversed(list(places))
    }


Parameters = dict[tuple[str, str], nn.Parameter]
"""Module and parameter name → the parameter."""


def parameters_of(model: nn.Module) -> Parameters:
    """Returns the parameters of a model that is not wrapped."""
    return {
        (name, target): parameter
        for name, module in model.named_modules(remove_duplicate=False)
        for target, parameter in module._parameters.items()
        if parameter is not None
    }


def share_parameters(originals: Parameters, pruner: Pruner) -> None:
    """Lets the wrappers of a pruner train the model's own parameters, where NNI has put copies into them.

    So tied weights stay tied, and an optimizer that was made before trains what is used.
    """
    for (name, target), original in _pruned(originals, pruner):
        wrapper = pruner._module_wrappers[name]
        if wrapper._parameters.get(target) is not None:
            original.data = wrapper._parameters[target].data
            wrapper._parameters[target] = original


def put_back(originals: Parameters, pruner: Pruner) -> None:
    """Gives a model that NNI has just unwrapped its own parameters back, where NNI has put copies."""
    for (name, target), original in _pruned(originals, pruner):
        module = pruner._module_wrappers[name].module
        if module._parameters.get(target) is not None:
            module._parameters[target] = original


def _pruned(originals: Parameters, pruner: Pruner) -> list[tuple[tuple[str, str], nn.Parameter]]:
    keys = [(name, target) for name, own in pruner._target_spaces.items() for target in own]
    return [(key, originals[key]) for key in keys if key in originals]


@contextmanager
def wrapped_again(compressor: Compressor) -> Iterator[None]:
    """Wraps a compressor again that was unwrapped in a ``with`` block which raised."""
    wrapped = compressor._is_wrapped
    try:
        yield
    except BaseException:
        if wrapped and not compressor._is_wrapped:
            compressor.wrap_model()
        raise


def plain_names(model: nn.Module) -> dict[str, str]:
    """Returns parameter name before wrapping → name now; equal where a model is not wrapped."""
    return {name.replace("_nni_wrapper.", ""): name for name, _ in model.named_parameters()}


def plain_copy(skeleton: nn.Module, live: nn.Module, masks: Masks | None) -> nn.Module:
    """Returns a copy of the model as it was before wrapping, with the weights that the wrapped one has now.

    Args:
        masks: multiplied onto the weights; ``None`` leaves them whole.
    """
    result, names = copy.deepcopy(skeleton), plain_names(live)
    parameters, buffers = dict(live.named_parameters()), dict(live.named_buffers())
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            current = parameters[names[name]]
            module, _, target = name.rpartition(".")
            mask = None if masks is None else masks.get(module, {}).get(target)
            parameter.data = current.detach().clone() if mask is None else current.detach() * mask
            parameter.requires_grad_(current.requires_grad)
        for name, buffer in result.named_buffers():
            buffer.data = buffers[name].detach().clone()
    modes = {name: module.training for name, module in live.named_modules()}
    for name, module in result.named_modules():
        module.training = modes[name]
    return result
