"""Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017, https://arxiv.org/abs/1708.06519.

Departures from the paper: scales are taken as they are, without a sparsity penalty in training; coupled layers vote.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.methods.base import MethodContext, MethodSpec, NoOptions, Outcome, Phase, PruningMethod
from nni_prune_ext.scoring.group_reduction import mean_over_channel


class BatchNormScale(PruningMethod):
    """Removes the channels with the smallest mean |scale| over all norms of their group."""

    def phases(self) -> Sequence[Phase]:
        """Needs no training: one phase without epochs."""
        return [Phase("score")]

    def finish(self, context: MethodContext) -> Outcome:
        """Scores every group; the allocation turns scores into a plan that meets the user's targets and limits."""
        weights = {name: p.detach().abs() for name, p in context.model.named_parameters() if name.endswith(".weight")}
        scores: dict[str, Tensor] = {}
        for group in context.groups:
            norms = [member for member in group.by_role(Role.NORM) if member.tensor in weights]
            found = [mean_over_channel(weights[m.tensor], m, group.num_channels) for m in norms]
            # A group without norms stays whole: inf protects.
            scores[group.name] = torch.stack(found).mean(0) if found else torch.full((group.num_channels,), torch.inf)
        return Outcome(context.allocate(scores).plan)


BN_SCALE = MethodSpec(
    "bn_scale",
    "small scales of batch norm go",
    "https://arxiv.org/abs/1708.06519",
    NoOptions,
    lambda _: BatchNormScale(),
)
