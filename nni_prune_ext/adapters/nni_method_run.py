"""A method's own phases inside an NNI pruner: run on a copy that may be cut, then brought into the wrapped model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any

import torch
from nni.compression import TorchEvaluator
from torch import nn

from nni_prune_ext.adapters.nni_context import NniRun, plain_names
from nni_prune_ext.adapters.nni_evaluator import EvaluatorTraining, StepCall, collected_calls
from nni_prune_ext.adapters.nni_targets import ChannelTargets, Place, Spaces, active_places
from nni_prune_ext.certificate import verify_groups
from nni_prune_ext.errors import ConfigError, ConfigListError
from nni_prune_ext.graph.channel_groups import ChannelGroups
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.graph.model_copy import named_tensors
from nni_prune_ext.methods.base import Outcome, PruningMethod
from nni_prune_ext.training import drive

_logger = logging.getLogger(__name__)
Masks = dict[str, dict[str, Any]]  # a mask, or None where a layer has no such parameter


def run_method(method: PruningMethod, run: NniRun, evaluator: TorchEvaluator | None) -> Outcome:
    """Runs all phases of a method; what it hands over is cut from the run's model."""
    training = None if evaluator is None else EvaluatorTraining(evaluator)
    if training is not None:

        def collect(count: int) -> list[StepCall]:
            training.close()
            return collected_calls(training.evaluator, copy.deepcopy(run.model).requires_grad_(True), count)

        run.collect = collect
        run.host_epoch = lambda method: training.epoch(run, method)
    try:
        outcome = drive(method, run)
        if outcome.plan.num_removed:
            run.apply(outcome.plan)
        run.leave()
    finally:
        if training is not None:
            training.close()
    return outcome


def channel_run(model: nn.Module, channels: ChannelTargets, spaces: Spaces, seed: int) -> NniRun:
    """Returns a run that removes channels of the groups that a config_list names in full.

    Args:
        model: a copy of the user's model, to be cut.

    Raises:
        ConfigListError: there are such groups, but it names none in full.
    """
    verified = verify_groups(model, channels.example_inputs, channels.groups)
    reasons = not_configured(verified, channels.parameters, list(active_places(spaces)))
    whole = verified.protecting(reasons)
    if len(verified) and not len(whole):
        known = "; ".join(f"'{name}': {reason}" for name, reason in list(reasons.items())[:3])
        raise ConfigListError(
            f"The config_list names none of the {len(verified)} channel groups of {type(model).__name__} in full "
            f"({known}), expected one at least: coupled layers lose channels together. Add the layers that are missing."
        )
    return NniRun(
        model=model,
        groups=whole,
        example_inputs=channels.example_inputs,
        seed=seed,
        targets_of=channels,
        spaces=spaces,
        whole=whole,
    )


def weight_run(model: nn.Module, channels: ChannelTargets, spaces: Spaces, seed: int) -> NniRun:
    """Returns a run that masks single weights of the tensors that a config_list names, and leaves all channels.

    Args:
        model: a copy of the user's model.
    """
    closed = replace(channels.groups, groups=())
    return NniRun(model=model, groups=closed, seed=seed, targets_of=channels, spaces=spaces, asked="weight")


def refuse_unplannable(own: str, channels: ChannelTargets, places: Sequence[Place]) -> None:
    """Refuses targets that a method with phases of its own cannot follow: it cuts whole channels by their share.

    Raises:
        ConfigError: a threshold, or a granularity other than output channels.
    """
    for place in places:
        written = place.dim is not None and all(m.role is not Role.CONSUMER for _, m in channels.holding(place))
        if place.goal is None or not written:
            key = "sparse_threshold" if place.goal is None else "granularity"
            raise ConfigError(
                f"'{place.target}' of '{place.module}' has the {key} {getattr(place.space, key)!r}, but {own} decides "
                "over channels in several steps. Expected a sparse_ratio of output channels. Prune in one step, or "
                "set that."
            )


def not_configured(groups: ChannelGroups, parameters: Container[str], places: Sequence[Place]) -> dict[str, str]:
    """Returns group → reason for the groups that a config_list does not name in full.

    Args:
        parameters: names of the model's parameters; shortcuts that have none need not be named.
    """
    named = {(place.tensor, place.dim) for place in places}
    reasons = {}
    for group in groups:
        writers = [member for member in group.by_role(Role.WRITER) if member.tensor in parameters]
        missing = [m.tensor.removesuffix(".weight") for m in writers if (m.tensor, m.dim) not in named]
        if missing:
            reasons[group.name] = f"'{missing[0]}' is not in the config_list"
        if missing and len(missing) < len(writers):
            _logger.warning(
                "'%s' keeps all its channels: '%s' is coupled with it, but not in the config_list.",
                group.name,
                missing[0],
            )
    return reasons


def load_weights(live: nn.Module, run: NniRun) -> None:
    """Puts trained weights to where they were before channels were cut; what was cut keeps its old weights."""
    tensors, names = dict(live.named_parameters()) | dict(live.named_buffers()), plain_names(live)
    found = [(names.get(name, name), name, value) for name, value in named_tensors(run.model)]
    with torch.no_grad():
        for place, name, value in found:
            if place not in tensors:
                continue  # what a rewritten shortcut selects is no weight
            target = tensors[place]
            if target.dim():
                target[_grid(run, name, target.shape)] = value.to(target)
            else:
                target.copy_(value)


def with_weight_masks(masks: Masks, outcome: Outcome, run: NniRun) -> Masks:
    """Multiplies the masks of single weights, made for the model that was cut, onto the masks of their targets.

    Where nothing was cut they replace the masks of an earlier call. Layers that share a weight share its mask.
    """
    shared: dict[int, list[str]] = {}
    for name, parameter in run.model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    missing = []
    for first, mask in (outcome.weight_masks or {}).items():
        for name in shared[id(run.model.get_parameter(first))]:
            module, _, target = name.rpartition(".")
            current = masks.get(module, {}).get(target)
            if current is None:
                missing.append(name)
                continue
            whole = torch.ones_like(current) if run.applied is None else current.clone()
            whole[_grid(run, first, whole.shape)] *= mask.to(whole)
            masks[module][target] = whole
    if missing:
        _logger.warning(
            "%d tensors have weight masks but are no targets of the config_list, among them '%s'; they stay whole.",
            len(missing),
            missing[0],
        )
    return masks


def _grid(run: NniRun, name: str, shape: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Returns the positions in a tensor of the whole model that the cut one still has."""
    kept = run.kept.get(name, {})
    return torch.meshgrid(*(kept.get(dim, torch.arange(size)) for dim, size in enumerate(shape)), indexing="ij")
