"""What gradients say about channels that are about to be pruned, and which of them they protect; see ``psap``.

A probe changes nothing: weights, statistics of norms, optimizers and random states are as before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.graph.channel_groups import ChannelGroup
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.graph.state import untouched
from nni_prune_ext.masked_weights import channel_offsets
from nni_prune_ext.methods.base import MethodContext
from nni_prune_ext.scoring.weight_norms import slice_rows


@contextmanager
def trial(model: nn.Module) -> Iterator[None]:
    """Lets forward and backward passes of a block leave no trace; modes stay, gradients are taken off."""
    modes = [(module, module.training) for module in model.modules()]
    with untouched(model):
        for module, mode in modes:
            module.training = mode
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)


@contextmanager
def silenced_writers(context: MethodContext, closed: Mapping[str, Tensor]) -> Iterator[None]:
    """Sets what writes closed channels to zero for the time of a block; then it is as before, bit for bit.

    Args:
        closed: group → ``(num_channels,)`` bool.
    """
    tensors = dict(context.model.named_parameters())
    before = {
        member.tensor: tensors[member.tensor].detach().clone()
        for group in context.groups
        for member in group.by_role(Role.WRITER, Role.BIAS)
        if member.tensor in tensors
    }
    zero_writers(context, closed)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                tensors[name].copy_(value)


def zero_writers(context: MethodContext, closed: Mapping[str, Tensor]) -> None:
    """Sets the filters and biases that write closed channels to zero; norms behind them stay as they are."""
    tensors = dict(context.model.named_parameters())
    with torch.no_grad():
        for group in context.groups:
            for member in group.by_role(Role.WRITER, Role.BIAS):
                if member.tensor in tensors:
                    gone = closed[group.name].cpu()[torch.from_numpy(member.channel)]
                    positions = torch.from_numpy(member.index)[gone].to(tensors[member.tensor].device)
                    tensors[member.tensor].index_fill_(member.dim, positions, 0)


def writer_gradients(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> Tensor:
    """Returns the norm of the gradient of all filters that write a channel, ``(num_channels,)``."""
    total = torch.zeros(group.num_channels)
    for member in group.by_role(Role.WRITER):
        gradient = tensors[member.tensor].grad if member.tensor in tensors else None
        if gradient is not None:
            squares = slice_rows(gradient, member.dim).square().sum(1).cpu()
            total.index_add_(0, torch.from_numpy(member.channel), squares[torch.from_numpy(member.index)])
    return total.sqrt()


def probed(
    context: MethodContext, batches: int, statistics: Callable[[], Mapping[str, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns group → means over batches of a statistic's magnitude and of the statistic, both ``(num_channels,)``.

    The model runs as it is, hooks and modes included. All processes get the same.

    Args:
        statistics: reads the statistics off the gradients of one batch.
    """
    names = [group.name for group in context.groups]
    sizes = {group.name: torch.zeros(group.num_channels) for group in context.groups}
    signed = {name: size.clone() for name, size in sizes.items()}
    found = context.batches(batches)
    with trial(context.model), torch.enable_grad():
        for batch in found:
            context.model.zero_grad(set_to_none=True)
            context.task_loss(batch).backward()  # type: ignore[no-untyped-call]
            for name, own in statistics().items():
                value = own.float().cpu() / len(found)
                sizes[name] += value.abs()
                signed[name] += value
    sizes, signed = dict(context.agreed(sizes)), dict(context.agreed(signed))
    return {name: (sizes[name], signed[name]) for name in names}


def gate_probe(context: MethodContext, batches: int, row: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Probes what opening or closing each gate would do to the loss: the gradient of the gates themselves.

    Args:
        row: the gates that the readers multiply by now, ``(groups.num_channels + 1,)``, a leaf that takes a gradient.
    """
    offsets = channel_offsets(context.groups)

    def of_gates() -> dict[str, Tensor]:
        gradient = torch.zeros_like(row) if row.grad is None else row.grad
        row.grad = None
        return {g.name: gradient[offsets[g.name] : offsets[g.name] + g.num_channels] for g in context.groups}

    return probed(context, batches, of_gates)


def literal_probe(
    context: MethodContext, batches: int, closed: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Probes the gradient that hits zeroed filters: the pulse read literally, which behind a norm measures nothing.

    All of it counts as harm done by pruning.
    """
    tensors = dict(context.model.named_parameters())
    with silenced_writers(context, closed):
        found = probed(context, batches, lambda: {g.name: writer_gradients(g, tensors) for g in context.groups})
    return {name: (size, -size) for name, (size, _) in found.items()}


def check_reach(context: MethodContext, prunable: Collection[str]) -> None:
    """Refuses a loss that no weight that reads a group takes part in: nothing could protect its channels.

    Args:
        prunable: the groups that matter. Those whose readers are all frozen are not looked at.

    Raises:
        ConfigError: with the name of the group.
    """
    tensors = dict(context.model.named_parameters())
    dead = []
    with trial(context.model), torch.enable_grad():
        context.model.zero_grad(set_to_none=True)
        context.task_loss(context.batches(1)[0]).backward()  # type: ignore[no-untyped-call]
        for group in context.groups:
            readers = [tensors[m.tensor] for m in group.by_role(Role.CONSUMER) if m.tensor in tensors]
            learning = [weight for weight in readers if weight.requires_grad]
            if group.name in prunable and learning and all(weight.grad is None for weight in learning):
                dead.append(group.name)
    if dead:
        raise ConfigError(
            f"The loss does not depend on what reads the channels of '{dead[0]}' ({len(dead)} of "
            f"{len(context.groups)} groups), expected all groups to matter to it. Let the loss depend on them, or "
            "exclude these layers."
        )


def important(
    size: Tensor,
    signed: Tensor,
    closed: Tensor,
    candidates: Tensor,
    instead: Tensor,
    *,
    deviations: float,
    share: float,
) -> Tensor:
    """Returns the candidates that a probe protects, ``(num_channels,)`` bool.

    Those whose statistic is so many standard deviations above the mean of all closed channels of the group, and whose
    opening lowers the loss by more than the loss depends on the channel that takes the place; of these the best, at
    most a share of the candidates, rounded up.

    Args:
        size: ``(num_channels,)``, mean magnitude.
        signed: ``(num_channels,)``, mean; below 0 says that opening the channel lowers the loss.
        closed: ``(num_channels,)`` bool.
        candidates: ``(num_channels,)`` bool, those of the closed ones that may be opened.
        instead: ``(K,)`` int64, the channels that are closed in their places, first one first.
    """
    result = torch.zeros_like(candidates)
    most = min(math.ceil(share * int(candidates.sum()) - 1e-9), len(instead))
    if not most:
        return result
    bar = size[closed].mean() + deviations * size[closed].std(correction=0)
    good = (candidates & (size > bar) & (signed < 0)).nonzero()[:, 0]
    best = good[signed[good].argsort(stable=True)[:most]]
    worth = -signed[best] > size[instead[: len(best)]]
    result[best[worth.cumprod(0).bool()]] = True
    return result


def drawn(candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Returns so many candidates, drawn."""
    places = candidates.nonzero()[:, 0]
    result = torch.zeros_like(candidates)
    result[places[torch.randperm(len(places), generator=generator)[:count]]] = True
    return result
