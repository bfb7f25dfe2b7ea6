"""What a speedup did: what went, what was asked for but stayed and why, and the proof."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from nni_prune_ext.adapters.nni_masks import OUTPUT, LayerMasks, silent_positions
from nni_prune_ext.adapters.nni_speedup_channels import holds, silent_channels
from nni_prune_ext.certificate import Certificate
from nni_prune_ext.graph.channel_groups import ChannelGroup, ChannelGroups, root_name
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.graph.model_copy import named_tensors
from nni_prune_ext.plan import Channels
from nni_prune_ext.surgery import Removal

_SHOWN = 5


@dataclass(frozen=True)
class KeptMask:
    """Channels of one tensor that the masks silence and that stay.

    Attributes:
        tensor: what is masked: the layer and its parameter, input or output.
        channels: positions that stay although they are masked.
        width: number of channels of the tensor in this dimension.
        reason: why they stay.
    """

    tensor: str
    channels: tuple[int, ...]
    width: int
    reason: str

    def __str__(self) -> str:
        """Says it in one line."""
        return f"{self.tensor}: {len(self.channels)} of {self.width} channels ({self.reason})"


@dataclass(frozen=True)
class SpeedupReport:
    """What a speedup did.

    Attributes:
        removed: layer → original output channels that went.
        kept: what was masked and stays, with reasons.
        fine_grained: parameters whose masks silence single weights, which stay as they are.
        params: number of parameters before and after.
        constants: what became of constants that removed channels carried: ``drop`` or ``absorb``.
        absorbed: layers whose bias took constants over.
        certificate: the proof that removing equals silencing; ``None`` where nothing was removed.
        unreached: parameters that the dummy input does not reach in evaluation mode, such as those of auxiliary heads:
            they are as they were, and may not fit the compact layers before them.
    """

    removed: Mapping[str, tuple[int, ...]]
    kept: tuple[KeptMask, ...]
    fine_grained: tuple[str, ...]
    params: tuple[int, int]
    constants: str
    absorbed: tuple[str, ...]
    certificate: Certificate | None
    unreached: tuple[str, ...] = ()

    def text(self) -> str:
        """Returns a few lines for people."""
        before, after = self.params
        channels = sum(len(gone) for gone in self.removed.values())
        lines = [
            f"ModelSpeedup: {before:,} → {after:,} parameters, {channels:,} output channels removed from "
            f"{len(self.removed)} layers."
        ]
        if self.certificate is None:
            lines.append("No channel could be removed; the model is unchanged.")
        else:
            proof = self.certificate
            lines.append(
                f"Certificate: removed equals silenced, largest relative error {proof.max_relative_error:.1e} "
                f"(bound {proof.bound:.0e}, {proof.probes} probes, {proof.dtype})."
            )
        if self.constants == "absorb":
            lines.append(f"Constants of removed channels went into the bias of {len(self.absorbed)} layers.")
        lines += [f"Masked but kept: {kept}" for kept in self.kept[:_SHOWN]]
        if len(self.kept) > _SHOWN:
            lines.append(f"… and {len(self.kept) - _SHOWN} more layers, see .report.kept")
        if self.fine_grained:
            lines.append(f"Fine-grained masks, not removed: {', '.join(self.fine_grained[:_SHOWN])}")
        if self.unreached:
            lines.append(
                f"Not reached by the dummy input and left as it was: {', '.join(self.unreached[:_SHOWN])} "
                f"({len(self.unreached)} parameters). Remove what is not used, it may no longer fit."
            )
        return "\n".join(lines)


def kept_masks(
    model: nn.Module, masks: LayerMasks, groups: ChannelGroups, gone: Mapping[str, Channels]
) -> list[KeptMask]:
    """Returns what is masked and stays, tensor by tensor; biases go with their weights.

    Masks of the inputs and outputs of layers without a weight are not followed here.

    Args:
        model: the model that the masks are for.
        gone: group → the channels that go.
    """
    result = []
    for (module, target), (tensor, mask) in masks.given.items():
        if target == "bias" and (module, "weight") in masks.given:
            continue
        for dim in range(min(mask.dim(), 2)):
            silent = silent_positions(mask, dim)
            if silent.any() and not (dim and silent.all()):
                asked = _Asked(module, target, tensor, dim, silent)
                result.append(_kept(asked, masks, groups, gone))
    names = {id(tensor): name for name, tensor in named_tensors(model)}
    modules = dict(model.named_modules(remove_duplicate=False))
    for (module, target), mask in masks.activations.items():
        tensor = names.get(id(getattr(modules[module], "weight", None)), "")
        silent = silent_positions(mask, _channels_of(modules[module], mask)) if mask.dim() else ~mask.view(1).numpy()
        if tensor and len(silent) > 1 and silent.any():
            dim = _dimension(groups, tensor, len(silent), written=target.startswith(OUTPUT))
            result.append(_kept(_Asked(module, target, tensor, dim, silent), masks, groups, gone))
    return [kept for kept in result if kept.channels]


@dataclass(frozen=True)
class _Asked:
    """Channels that one module masks, in one dimension of one tensor."""

    module: str
    target: str
    tensor: str
    dim: int
    silent: Channels


def _kept(asked: _Asked, masks: LayerMasks, groups: ChannelGroups, gone: Mapping[str, Channels]) -> KeptMask:
    tensor, dim, silent = asked.tensor, asked.dim, asked.silent
    covered = np.zeros(len(silent), dtype=np.bool_)
    reasons: dict[str, None] = {}
    for group, member in groups.holding(tensor, dim):
        stays = ~gone[group.name][member.channel]
        covered[member.index[~stays]] = True
        if (silent[member.index] & stays).any():
            reasons[_why(group, masks, gone[group.name], tensor)] = None
    left = silent & ~covered
    agreed = masks.silent(tensor, dim)
    others = ", ".join(f"'{name}'" for name in masks.disputed.get(tensor, ()) if name != asked.module)
    if others and agreed is not None and (left & ~agreed).any():
        reasons = {f"it is the weight of {others} too, where they are not all masked": None}
    return KeptMask(
        f"{asked.module}.{asked.target}".lstrip("."),
        tuple(int(c) for c in np.flatnonzero(left)),
        len(silent),
        "; ".join(reasons) or _protection(groups, tensor, dim),
    )


def _channels_of(module: nn.Module, mask: Tensor) -> int:
    """Returns the dimension of an input or output of a layer that holds channels."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return max(mask.dim() - module.weight.dim() + 1, 0)  # a batch dimension may be missing
    images = isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU))
    return 1 if images and mask.dim() > 1 else mask.dim() - 1


def _dimension(groups: ChannelGroups, tensor: str, width: int, *, written: bool) -> int:
    """Returns the dimension of a weight that holds the channels of its layer's output or input."""
    for dim in range(min(len(groups.shapes[tensor]), 2)):
        for _, member in groups.holding(tensor, dim):
            if groups.shapes[tensor][dim] == width and (member.role is not Role.CONSUMER) is written:
                return dim
    return 0 if written else 1


def lost_outputs(removal: Removal) -> dict[str, tuple[int, ...]]:
    """Returns layer → the output channels that it lost, for every layer that writes channels, coupled or not."""
    result = {}
    for group in removal.groups:
        for member in group.by_role(Role.WRITER, Role.DEPTHWISE):
            kept = removal.kept.get(member.tensor, {}).get(member.dim)
            if kept is not None:
                lost = np.setdiff1d(np.arange(removal.groups.shapes[member.tensor][member.dim]), kept.numpy())
                result[root_name(member.tensor)] = tuple(int(c) for c in lost)
    return result


def _why(group: ChannelGroup, masks: LayerMasks, gone: Channels, asking: str) -> str:
    size = group.num_channels
    asked = np.zeros(size, dtype=np.bool_)
    for member in group.members:
        if member.tensor == asking:
            asked |= holds(member, size)
    keepers = [
        root_name(member.tensor)
        for member in group.by_role(Role.WRITER)
        if (holds(member, size) & asked & ~gone & ~silent_channels(member, masks, size)).any()
    ]
    others = [name for name in dict.fromkeys(keepers) if name != root_name(asking)]
    if others:
        return f"tied to {', '.join(others[:3])}, where they are not all masked"
    return "the channels still carry a signal" if not keepers else "partners in a grouped layer are not masked"


def _protection(groups: ChannelGroups, tensor: str, dim: int) -> str:
    reasons = {protected.root: protected.reason for protected in groups.protected}
    if root_name(tensor) in reasons and dim == 0:
        return reasons[root_name(tensor)]
    return (
        "these are no channels that can be removed, such as those of the input" if dim else "tied to protected channels"
    )
