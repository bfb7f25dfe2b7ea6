"""Where the two gating species put their gates: behind every norm of a group."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nni_prune_ext.graph.channel_groups import ChannelGroup
from nni_prune_ext.graph.label_book import Role


def gate_norms(model: nn.Module, group: ChannelGroup, gate: Callable[[Tensor], Tensor]) -> list[RemovableHandle]:
    """Multiplies the output of every norm of a group by ``gate(output)``, ``([N,] num_channels)``."""
    handles = []
    for member in group.by_role(Role.NORM):
        if member.tensor.endswith(".weight"):
            channel = torch.from_numpy(member.channel)

            def hook(module: nn.Module, args: object, output: Tensor, channel: Tensor = channel) -> Tensor:
                values = gate(output)[..., channel]
                return output * values.reshape(*([1] if values.dim() == 1 else [len(output)]), -1, 1, 1)

            handles.append(model.get_submodule(member.tensor.removesuffix(".weight")).register_forward_hook(hook))
    return handles
