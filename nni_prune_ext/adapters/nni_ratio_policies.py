"""What a ratio policy is told inside NNI: the weights of what is pruned together, and what it sees of data."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from nni.compression.utils.evaluator import Evaluator
from torch import Tensor, nn

from nni_prune_ext.adapters.nni_context import NniRun, plain_names
from nni_prune_ext.adapters.nni_evaluator import collected_calls, torch_evaluator
from nni_prune_ext.adapters.nni_targets import ChannelTargets, Place
from nni_prune_ext.errors import ConfigError
from nni_prune_ext.schedules import DataRatioPolicy
from nni_prune_ext.scoring.group_reduction import writer_rows
from nni_prune_ext.scoring.weight_norms import slice_rows


def policy_weights(
    model: nn.Module, channels: ChannelTargets, places: Sequence[Place], units: Mapping[str, str]
) -> dict[str, list[Tensor]]:
    """Returns unit → the weights that write it, one ``(num_channels, K)`` tensor per layer.

    Args:
        model: the wrapped model.
        units: tensor name → what it is pruned together with.
    """
    live, names = dict(model.named_parameters()), plain_names(model)
    tensors = {plain: live[name] for plain, name in names.items()}
    groups = {group.name: group for group in channels.groups}
    weights: dict[str, list[Tensor]] = {}
    for place in places:
        unit = units[place.tensor]
        if unit in groups:
            weights.setdefault(unit, writer_rows(groups[unit], tensors))
        else:
            weights.setdefault(unit, []).append(slice_rows(place.space.target, place.dim or 0))
    return weights


def refuse_single_weights(own: str, places: Sequence[Place]) -> None:
    """Refuses targets without channels, which a policy that looks at the channels of a network says nothing about.

    Raises:
        ConfigError: with the first of them.
    """
    single = [place.module for place in places if place.dim is None]
    if single:
        raise ConfigError(
            f"{own} looks at the channels of the network, but single weights of '{single[0]}' are to be masked. "
            "Expected a pruner of whole channels, such as L1NormPruner. Use a ratio policy that needs no data for it."
        )


def check_look(own: str, evaluator: Evaluator, channels: ChannelTargets) -> None:
    """Refuses where a policy could not look at data.

    Raises:
        ConfigError: the steps of the evaluator cannot be repeated, or there is no example input.
    """
    torch_evaluator(evaluator, own)
    if not channels.traced:
        raise ConfigError(
            f"{own} runs the model, but its channels could not be traced without an example input. Expected one. Pass "
            "dummy_input= to the evaluator."
        )


def looked(
    policy: DataRatioPolicy, model: nn.Module, channels: ChannelTargets, places: Sequence[Place], evaluator: Evaluator
) -> dict[str, float]:
    """Returns what a policy sees of data, by unit.

    Args:
        model: a plain copy of the model; its batches are the first ones of a training that is thrown away.
    """
    own = torch_evaluator(evaluator, "A ratio policy")
    run = NniRun(
        model,
        groups=channels.groups,
        example_inputs=channels.example_inputs,
        collect=lambda count: collected_calls(own, copy.deepcopy(model), count),
    )
    seen = dict(policy.look(run))
    for place in places:
        seen.setdefault(channels.unit_of(place), seen.get(channels.holding(place)[0][0].name, 0.0))
    return seen
