"""A scorer that needs no data: channels whose norms have a small scale go (as in network slimming)."""

from __future__ import annotations

import torch
from torch import Tensor

from nni_prune_ext.graph.channel_groups import ChannelGroup
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.methods.base import MethodContext, MethodSpec, NoOptions, Outcome, Phase, PruningMethod
from nni_prune_ext.scoring.group_reduction import mean_over_channel


class NormScale(PruningMethod):
    """Decides everything at the end."""

    def phases(self) -> list[Phase]:
        return [Phase("score")]

    def finish(self, context: MethodContext) -> Outcome:
        tensors = dict(context.model.named_parameters())
        return Outcome(context.allocate({group.name: scale(group, tensors) for group in context.groups}).plan)


def scale(group: ChannelGroup, tensors: dict[str, Tensor]) -> Tensor:
    """Returns the mean magnitude of all scales of a channel, ``(num_channels,)``."""
    found = [
        mean_over_channel(tensors[member.tensor].detach().abs(), member, group.num_channels)
        for member in group.by_role(Role.NORM)
        if member.tensor in tensors and member.tensor.endswith("weight")
    ]
    return torch.stack(found).mean(0) if found else torch.zeros(group.num_channels)


DATA_FREE = MethodSpec("toy_data_free", "small norms go", "none", NoOptions, lambda _: NormScale())
