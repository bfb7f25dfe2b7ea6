"""Physical removal of channels, and its reference: the same model with these channels silenced.

``remove_channels`` slices every parameter and buffer that holds removed channels, once, by name, in original coordinates.
``silence_channels`` keeps all shapes and makes the consumers deaf to the removed channels; norms over channels take their
statistics over the survivors. In evaluation mode both are the same function; ``certificate`` proves it per plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nni_prune_ext.errors import PlanError
from nni_prune_ext.graph.channel_groups import ChannelGroup, ChannelGroups, trace_channel_groups
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.graph.rewrites import apply_rewrites
from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.plan import Channels, PruningPlan, removed_channels

if TYPE_CHECKING:
    from nni_prune_ext.certificate import Certificate

Kept = Mapping[str, Mapping[int, Tensor]]
"""Tensor name → dimension → ``(K,)`` int64 original indices that stay, ascending. Untouched tensors are absent."""


@dataclass(frozen=True)
class Removal:
    """A compact model and what was cut to get it.

    Attributes:
        model: the compact model; mode, devices, dtypes, ``requires_grad`` and memory format as in the original.
        plan: the plan that was carried out.
        kept: surviving original indices of every cut tensor: what optimizers, averages and heads need to follow.
        groups: the channel groups that the plan was made on.
        certificate: the proof that removing equals silencing, ``None`` only where it was asked not to be made.
    """

    model: nn.Module
    plan: PruningPlan
    kept: Kept
    groups: ChannelGroups
    certificate: Certificate | None = None

    def certified(self, certificate: Certificate) -> Removal:
        """Returns the same removal with its certificate."""
        return replace(self, certificate=certificate)


def cut_channels(
    model: nn.Module, plan: PruningPlan, example_inputs: ExampleInputs, *, groups: ChannelGroups | None = None
) -> Removal:
    """Carries out a plan without proving it; prefer ``remove_channels``, which certifies.

    Args:
        groups: the traced groups, to save a second trace.

    Returns:
        the removal; the given model is not changed.

    Raises:
        PlanError: the plan was made for another model.
    """
    groups = groups or trace_channel_groups(model, example_inputs)
    kept = kept_indices(plan, groups)
    compact = apply_rewrites(model, plan.rewrites, example_inputs)
    _slice_tensors(compact, kept)
    depthwise = {m.tensor for group in groups for m in group.by_role(Role.DEPTHWISE)}
    for name, module in compact.named_modules():
        own = {f"{name}.{key}" if name else key for key, _ in module.named_parameters(recurse=False)}
        own |= {f"{name}.{key}" if name else key for key, _ in module.named_buffers(recurse=False)}
        if own & kept.keys():
            _update_attributes(module, depthwise=bool(own & depthwise))
    return Removal(compact, plan, kept, groups)


def kept_indices(plan: PruningPlan, groups: ChannelGroups) -> dict[str, dict[int, Tensor]]:
    """Returns, for every tensor that the plan cuts, the original indices that stay per dimension."""
    lost: dict[tuple[str, int], list[np.ndarray]] = {}
    for group, gone in _pruned_groups(plan, groups):
        for member in group.members:
            positions = member.index[gone[member.channel]]
            if positions.size:
                lost.setdefault((member.tensor, member.dim), []).append(positions)
    kept: dict[str, dict[int, Tensor]] = {}
    for (tensor, dim), pieces in lost.items():
        stay = np.setdiff1d(np.arange(groups.shapes[tensor][dim]), np.concatenate(pieces))
        if not stay.size:
            raise PlanError(f"The plan leaves no channel in dimension {dim} of '{tensor}'. Keep at least one.")
        kept.setdefault(tensor, {})[dim] = torch.from_numpy(stay)
    return kept


def silence_channels(
    model: nn.Module, plan: PruningPlan, example_inputs: ExampleInputs, *, groups: ChannelGroups | None = None
) -> nn.Module:
    """Returns a copy of the full-size model to whose consumers the planned channels are silent.

    All shapes stay. The columns that read a removed channel are zero, and modules that normalise over channels use the
    surviving ones only. In evaluation mode it computes what the compact model computes.

    Raises:
        PlanError: the plan was made for another model.
    """
    groups = groups or trace_channel_groups(model, example_inputs)
    silent = apply_rewrites(model, plan.rewrites, example_inputs)
    tensors: dict[str, Tensor] = {**dict(silent.named_parameters()), **dict(silent.named_buffers())}
    survivors: dict[int, Tensor] = {}
    with torch.no_grad():
        for group, gone in _pruned_groups(plan, groups):
            for member in group.members:
                tensor = tensors[member.tensor]
                if member.role is Role.CONSUMER:
                    positions = torch.from_numpy(member.index[gone[member.channel]]).to(tensor.device)
                    tensor.index_fill_(member.dim, positions, 0)
                elif member.role is Role.NORM:
                    mask = torch.ones(tensor.shape[member.dim], dtype=torch.bool, device=tensor.device)
                    mask[torch.from_numpy(member.index[gone[member.channel]]).to(tensor.device)] = False
                    survivors[id(tensor)] = survivors.get(id(tensor), mask) & mask
    for name in groups.statistics_over_channels:
        module = silent.get_submodule(name)
        masks = [survivors[id(p)] for p in module.parameters(recurse=False) if id(p) in survivors]
        if masks and not bool(masks[0].all()):
            _normalise_over_survivors(module, masks[0])
    return silent


def remap_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, removal: Removal) -> None:
    """Moves an optimizer from the original model's parameters to the compact one's, state sliced alike.

    Every state tensor with the shape of its parameter (momentum, moments) is cut like the parameter; scalars stay.

    Args:
        optimizer: an optimizer over parameters of ``model``; changed in place.
        model: the model before the cut.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    compact = dict(removal.model.named_parameters())
    for group in optimizer.param_groups:
        for position, old in enumerate(group["params"]):
            name = names.get(id(old))
            if name is None:
                continue
            new = compact[name]
            group["params"][position] = new
            state = optimizer.state.pop(old, None)
            if state is not None:
                optimizer.state[new] = {
                    key: _sliced(value, removal.kept.get(name, {}))
                    if isinstance(value, Tensor) and value.shape == old.shape
                    else value
                    for key, value in state.items()
                }


def slice_state(state: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """Returns a state dict cut like the model: for averaged weights, scores, and weights of the original."""
    return {name: _sliced(value, kept.get(name, {})) for name, value in state.items()}


def _pruned_groups(plan: PruningPlan, groups: ChannelGroups) -> Sequence[tuple[ChannelGroup, Channels]]:
    gone = removed_channels(plan, groups)
    return [(group, gone[group.name]) for group in groups if gone[group.name].any()]


def _sliced(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    result = tensor.detach()
    for dim, index in kept.items():
        result = result.index_select(dim, index.to(tensor.device))
    channels_last = tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    return result.clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _slice_tensors(model: nn.Module, kept: Kept) -> None:
    done: dict[int, Tensor] = {}
    names = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and names[id(parameter)] in kept:
                if id(parameter) not in done:
                    data = _sliced(parameter, kept[names[id(parameter)]])
                    done[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
                module._parameters[key] = cast("nn.Parameter", done[id(parameter)])
        for key, buffer in list(module._buffers.items()):
            if buffer is not None and names.get(id(buffer)) in kept:
                if id(buffer) not in done:
                    done[id(buffer)] = _sliced(buffer, kept[names[id(buffer)]])
                module._buffers[key] = done[id(buffer)]


def _update_attributes(module: nn.Module, *, depthwise: bool) -> None:
    """Makes the size attributes of PyTorch's own layers agree with their cut tensors."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if depthwise:
            module.groups = module.weight.shape[0] * module.in_channels // module.out_channels
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        module.groups = module.weight.shape[0] if depthwise else module.groups
        module.in_channels, module.out_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        width = next(t.shape[0] for t in (module.weight, module.running_mean) if t is not None)
        module.num_features = width
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = module.weight.shape[0] if module.num_groups == module.num_channels else module.num_groups
        module.num_channels = module.weight.shape[0]
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(cast("Tensor", module.weight).shape)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.shape[0]


def _normalise_over_survivors(module: nn.Module, survivors: Tensor) -> None:
    """Wraps the forward of one module so that its norm calls use the surviving channels only."""
    forward = module.forward

    def silenced(*args: object) -> object:
        with _SurvivorStatistics(survivors):
            return forward(*args)

    module.forward = silenced


class _SurvivorStatistics(TorchFunctionMode):
    """Computes layer, RMS and group norms over the surviving channels; removed positions come out as zero."""

    def __init__(self, survivors: Tensor) -> None:
        super().__init__()
        self.survivors = survivors

    def __torch_function__(
        self, func: Callable[..., object], types: Sequence[type], args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name not in ("layer_norm", "rms_norm", "group_norm"):
            return func(*args, **kwargs)
        keys = {"group_norm": ("input", "num_groups", "weight", "bias", "eps"),
                "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
                "rms_norm": ("input", "normalized_shape", "weight", "eps")}[name]
        given = {**dict(zip(keys, args)), **kwargs}
        x = cast("Tensor", given["input"])
        dim = 1 if name == "group_norm" else x.dim() - len(cast("tuple[int, ...]", given["normalized_shape"]))
        alive = self.survivors.nonzero().squeeze(1).to(x.device)
        short = {key: None if given.get(key) is None else cast("Tensor", given[key])[alive] for key in keys if key in ("weight", "bias")}
        given |= short
        given["input"] = x.index_select(dim, alive)
        if name != "group_norm":
            given["normalized_shape"] = given["input"].shape[dim:]
        out = cast("Tensor", func(**given))
        return torch.zeros_like(x).index_copy_(dim, alive, out)


