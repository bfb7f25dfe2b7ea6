"""Importance of channels from gradients of the loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nni_prune_ext.graph.channel_groups import ChannelGroup
from nni_prune_ext.graph.label_book import Role


def gate_gradients(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> Tensor:
    """Returns the derivative of the loss by a gate on each channel, as every reader of the channel sees it.

    A gate m on channel c scales the slices W[:, c] of all consumers, so dL/dm = Σ <W[:, c], dL/dW[:, c]>. This is the
    first-order Taylor importance of Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019,
    https://arxiv.org/abs/1906.10771, at the gate. The sum over a *producer* filter in front of a batch norm would be
    zero by scale invariance, so producers are read only where a group has no consumer with a gradient.

    Args:
        tensors: parameters by name; gradients must be present where the loss reaches.

    Returns:
        ``(num_channels,)`` float32 on the device of the gradients, signed; 0 on the CPU where none arrived.
    """
    for roles in ((Role.CONSUMER,), (Role.WRITER, Role.BIAS)):
        members = [m for m in group.by_role(*roles) if m.tensor in tensors and tensors[m.tensor].grad is not None]
        if members:
            break
    total = torch.zeros(group.num_channels, device=tensors[members[0].tensor].device if members else None)
    for member in members:
        weight = tensors[member.tensor]
        assert weight.grad is not None
        product = (weight.detach() * weight.grad).movedim(member.dim, 0).flatten(1).sum(1).float()
        index, channel = (torch.from_numpy(which).to(product.device) for which in (member.index, member.channel))
        total.index_add_(0, channel, product[index])
    return total
