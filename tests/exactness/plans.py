"""Random plans and the comparison of two models, for the tests of exactness."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from nni_prune_ext.graph.channel_groups import ChannelGroups
from nni_prune_ext.inputs import ExampleInputs, call_model, tensors_in
from nni_prune_ext.plan import PruningPlan, plan_from_channels, spared


def random_plan(groups: ChannelGroups, seed: int, *, all_groups: bool = False) -> PruningPlan:
    """Removes a random number of random channels from each of a random selection of groups, at least one in all."""
    random = np.random.default_rng(seed)
    names = [group.name for group in groups if group.num_channels > 1]
    chosen = names if all_groups else random.permutation(names)[: random.integers(1, len(names) + 1)]
    removed = {}
    for name in chosen:
        group = groups[str(name)]
        gone = np.zeros(group.num_channels, dtype=np.bool_)
        gone[random.permutation(group.num_channels)[: random.integers(1, group.num_channels)]] = True
        removed[group.name] = spared(group, gone)
    return plan_from_channels(groups, removed)


def outputs_of(model: nn.Module, inputs: ExampleInputs) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(tensors_in(call_model(model, inputs)))


def largest_difference(first: Iterable[torch.Tensor], second: Iterable[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
