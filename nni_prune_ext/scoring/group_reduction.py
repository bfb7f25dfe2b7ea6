"""From slices of many tensors to one score per channel of a group."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nni_prune_ext.graph.channel_groups import ChannelGroup, GroupMember
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.scoring.weight_norms import slice_rows

WEIGHT_ROLES = (Role.WRITER, Role.DEPTHWISE, Role.CONSUMER)


def mean_over_channel(values: Tensor, member: GroupMember, num_channels: int) -> Tensor:
    """Averages the values of all positions of each channel.

    Args:
        values: ``(size of the member's dimension,)``.

    Returns:
        ``(num_channels,)``; 0 for a channel that the member does not hold.
    """
    channel = torch.from_numpy(member.channel).to(values.device)
    picked = values[torch.from_numpy(member.index).to(values.device)]
    total = torch.zeros(num_channels, dtype=values.dtype, device=values.device).index_add_(0, channel, picked)
    count = torch.bincount(channel, minlength=num_channels).clamp(min=1)
    return total / count


def group_importance(
    group: ChannelGroup,
    tensors: Mapping[str, Tensor],
    criterion: Callable[[Tensor], Tensor],
    *,
    roles: tuple[Role, ...] = WEIGHT_ROLES,
) -> Tensor:
    """Averages a per-slice criterion over all weights that hold the group's channels.

    Each weight's values are divided by their mean first, so that a layer with large weights does not outvote the others
    (as in Fang et al., "DepGraph: Towards Any Structural Pruning", 2023, https://arxiv.org/abs/2301.12900, section
    3.3). A channel is averaged over the weights that really hold it.

    Args:
        tensors: the model's parameters and buffers by name.
        criterion: ``(R, K) → (R,)``, higher = keep.

    Returns:
        ``(num_channels,)`` float32 on the device of the weights.
    """
    total: Tensor | None = None
    votes: Tensor | None = None
    for member in group.by_role(*roles):
        tensor = tensors.get(member.tensor)
        if tensor is None or not tensor.is_floating_point():
            continue  # the selection of a rewritten shortcut holds no weights
        values = criterion(slice_rows(tensor, member.dim))
        values = values / values.mean().clamp(min=torch.finfo(values.dtype).tiny)
        score = mean_over_channel(values, member, group.num_channels)
        held = torch.bincount(torch.from_numpy(member.channel), minlength=group.num_channels).clamp(max=1).to(score)
        total = score * held if total is None else total + score * held
        votes = held if votes is None else votes + held
    if total is None or votes is None:
        return torch.zeros(group.num_channels)
    return total / votes.clamp(min=1)


def writer_rows(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Returns one ``(num_channels, K)`` float32 tensor per layer that writes all channels of a group.

    Row c holds all weights that write channel c. Layers that write some channels only, or some more often, are left
    out.
    """
    rows = []
    for member in group.by_role(Role.WRITER):
        counts = torch.bincount(torch.from_numpy(member.channel), minlength=group.num_channels)
        if member.tensor in tensors and bool((counts == counts[0]).all()):
            order = torch.from_numpy(member.index)[torch.from_numpy(member.channel).argsort(stable=True)]
            picked = slice_rows(tensors[member.tensor], member.dim)
            rows.append(picked[order.to(picked.device)].reshape(group.num_channels, -1))
    return rows
