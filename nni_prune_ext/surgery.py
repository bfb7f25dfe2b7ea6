"""Physical removal of channels, and its reference: the same model with these channels silenced.

``cut_channels`` slices every parameter and buffer that holds removed channels, once, by name, in original coordinates.
``silence_channels`` keeps all shapes and makes the consumers deaf to the removed channels; norms over channels take
their statistics over the survivors. In evaluation mode both are the same function; ``certificate`` proves it per plan.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nni_prune_ext.errors import PlanError
from nni_prune_ext.graph.channel_groups import ChannelGroup, ChannelGroups, trace_channel_groups
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.graph.model_copy import copy_model, named_tensors
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
    model: nn.Module,
    plan: PruningPlan,
    example_inputs: ExampleInputs,
    *,
    groups: ChannelGroups | None = None,
    share_others: bool = False,
) -> Removal:
    """Carries out a plan without proving it; prefer ``remove_channels``, which certifies.

    Args:
        groups: the traced groups, to save a second trace.
        share_others: tensors that the plan does not cut are the given model's own: for copies that are only read.

    Returns:
        the removal; the given model is not changed.

    Raises:
        PlanError: the plan was made for another model.
    """
    groups = groups or trace_channel_groups(model, example_inputs)
    kept = kept_indices(plan, groups)
    rewritten = _rewritten(model, plan, example_inputs)
    cut = {name: _sliced(tensor, kept[name]) for name, tensor in named_tensors(rewritten) if name in kept}
    compact = copy_model(rewritten, cut, share_others=share_others)
    _update_modules(compact, groups, kept)
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
    model: nn.Module,
    plan: PruningPlan,
    example_inputs: ExampleInputs,
    *,
    groups: ChannelGroups | None = None,
    share_others: bool = False,
) -> nn.Module:
    """Returns a copy of the full-size model to whose consumers the planned channels are silent.

    All shapes stay. The columns that read a removed channel are zero, and norms over channels use the surviving ones
    only. In evaluation mode it computes what the compact model computes.

    Args:
        groups: the traced groups, to save a second trace.
        share_others: tensors that are not changed are the given model's own: for copies that are only read.

    Raises:
        PlanError: the plan was made for another model.
    """
    groups = groups or trace_channel_groups(model, example_inputs)
    rewritten = _rewritten(model, plan, example_inputs)
    tensors = dict(named_tensors(rewritten))
    silent: dict[str, Tensor] = {}
    survivors: dict[str, tuple[int, Tensor]] = {}
    for group, gone in _pruned_groups(plan, groups):
        for member in group.members:
            tensor = tensors[member.tensor]
            positions = torch.from_numpy(member.index[gone[member.channel]]).to(tensor.device)
            if member.reads:
                if member.tensor not in silent:
                    silent[member.tensor] = tensor.detach().clone()
                silent[member.tensor].index_fill_(member.dim, positions, 0)
            elif member.role is Role.NORM:
                everyone = torch.ones(tensor.shape[member.dim], dtype=torch.bool, device=tensor.device)
                _, alive = survivors.setdefault(member.tensor, (member.dim, everyone))
                alive[positions] = False
    result = copy_model(rewritten, silent, share_others=share_others)
    if survivors:
        result.forward = _SurvivorForward(result, result.__dict__.get("forward"), survivors)
    return result


def take_over(model: nn.Module, compact: nn.Module) -> None:
    """Makes a model the compact one, in place: its modules, their hooks and attributes stay the same objects.

    For hosts that hold on to modules or change models in place. Parameters are those of ``compact``, new objects; an
    optimizer over the old ones follows with :func:`remap_optimizer`, called before. Sizes are those of ``compact``.
    Attributes that hold parameters, or layers that a rewrite has replaced, are copied with the new ones in their place.
    """
    theirs = dict(compact.named_modules(remove_duplicate=False))
    tensors = dict(_all_tensors(compact))
    moved: dict[int, object] = {}
    for module in model.modules():  # cached activations stay: deepcopy refuses tensors with a history
        moved |= {id(value): value for value in vars(module).values() if isinstance(value, Tensor)}
    moved |= {id(own): tensors.get(name, own) for name, own in _all_tensors(model)}
    places: dict[int, object] = {id(tensor): tensor for tensor in tensors.values()}
    taken: dict[int, tuple[nn.Module, nn.Module]] = {}
    for name, own in model.named_modules(remove_duplicate=False):
        source = theirs.get(name, own)
        replaced = type(source) is not type(own)  # a layer that a rewrite has put in
        moved.setdefault(id(own), source if replaced else own)
        if source is not own and not replaced:
            places[id(source)] = own
            taken[id(own)] = (own, source)
    contents = [(own, _contents(own, source, moved, places)) for own, source in taken.values()]
    for own, content in contents:
        own.__dict__ = content


_REGISTRIES = ("_parameters", "_buffers", "_modules")
_HOOKS = frozenset(key for key in vars(nn.Module()) if "hook" in key)


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _contents(
    own: nn.Module, source: nn.Module, moved: dict[int, object], places: Mapping[int, object]
) -> dict[str, object]:
    """Returns the attributes of a module after it has taken over another one."""
    content = dict(vars(own))
    for key, value in vars(source).items():
        if key in _REGISTRIES:
            content[key] = {name: places.get(id(part), part) for name, part in value.items()}
        elif _plain(value):
            content[key] = value
        elif key not in content:
            content[key] = copy.deepcopy(value, dict(places))
        elif key not in _HOOKS:
            memo = _Memo(moved)
            changed = copy.deepcopy(content[key], memo)
            if memo.used:
                moved[id(content[key])] = changed
                content[key] = changed
    return content


def _plain(value: object) -> bool:
    """Says whether a value is a size or setting, which nobody can tell from its copy."""
    if isinstance(value, tuple):
        return type(value) in (tuple, torch.Size) and all(_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


class _Memo(dict[int, object]):
    """A memo of ``deepcopy`` that notes whether an object was met in whose place another one is."""

    def __init__(self, moved: Mapping[int, object]) -> None:
        super().__init__(moved)
        self.used = False
        self._changed = {key for key, value in moved.items() if id(value) != key}

    def get(self, key: int, default: object = None) -> object:
        """Returns what is in the place of the object with this id."""
        self.used = self.used or key in self._changed
        return super().get(key, default)


def remap_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, removal: Removal) -> None:
    """Moves an optimizer from the original model's parameters to the compact one's, state sliced alike.

    State tensors (momentum, moments) are cut like their parameter in every dimension in which they have its size.

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
            if old in optimizer.state:
                state = optimizer.state.pop(old)
                optimizer.state[new] = {
                    key: _sliced_like(value, old, removal.kept.get(name, {})) for key, value in state.items()
                }


def slice_state(state: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """Returns a state dict cut like the model: for averaged weights, scores, and weights of the original."""
    return {name: _sliced(value, kept.get(name, {})) for name, value in state.items()}


def _rewritten(model: nn.Module, plan: PruningPlan, example_inputs: ExampleInputs) -> nn.Module:
    return apply_rewrites(model, plan.rewrites, example_inputs, share_tensors=True) if plan.rewrites else model


def _pruned_groups(plan: PruningPlan, groups: ChannelGroups) -> Sequence[tuple[ChannelGroup, Channels]]:
    gone = removed_channels(plan, groups)
    return [(group, gone[group.name]) for group in groups if gone[group.name].any()]


def _sliced(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    result = tensor.detach()
    for dim, index in kept.items():
        result = result.index_select(dim, index.to(tensor.device))
    layout = _memory_format(tensor)
    return result.contiguous(memory_format=layout) if kept else result.clone(memory_format=layout)


def _memory_format(tensor: Tensor) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(tensor.dim())
    if last is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def _sliced_like(value: object, parameter: Tensor, kept: Mapping[int, Tensor]) -> object:
    """Cuts one entry of an optimizer's state; numbers and tensors of another kind stay."""
    if not isinstance(value, Tensor) or value.dim() != parameter.dim():
        return value
    return _sliced(value, {dim: index for dim, index in kept.items() if value.shape[dim] == parameter.shape[dim]})


def _update_modules(model: nn.Module, groups: ChannelGroups, kept: Kept) -> None:
    """Makes the size attributes of all layers that hold a cut tensor (also a tied one) agree with it."""
    depthwise = {m.tensor for group in groups for m in group.by_role(Role.DEPTHWISE)}
    names = {id(tensor): name for name, tensor in named_tensors(model)}
    for module in model.modules():
        own = {names[id(t)] for t in [*module._parameters.values(), *module._buffers.values()] if t is not None}
        if own & kept.keys():
            _update_attributes(module, depthwise=bool(own & depthwise))


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


@dataclass
class _SurvivorForward:
    """The forward of a silenced model: norms over channels see the survivors only. Copies along with its model."""

    model: nn.Module
    inner: Callable[..., object] | None
    survivors: Mapping[str, tuple[int, Tensor]]

    def __call__(self, *args: object, **kwargs: object) -> object:
        tensors = dict(named_tensors(self.model))
        with _SurvivorStatistics({id(tensors[name]): entry for name, entry in self.survivors.items()}):
            return self.inner(*args, **kwargs) if self.inner else type(self.model).forward(self.model, *args, **kwargs)


class _SurvivorStatistics(TorchFunctionMode):
    """Computes layer, RMS and group norms over the surviving channels; removed positions come out as zero."""

    def __init__(self, survivors: Mapping[int, tuple[int, Tensor]]) -> None:
        super().__init__()
        self.survivors = survivors

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        keys = _NORMS.get(getattr(func, "__name__", ""))
        if keys is None:
            return func(*args, **kwargs)
        given = {**dict(zip(keys, args)), **kwargs}
        x, weight = cast("Tensor", given["input"]), given.get("weight")
        dim, survivors = self.survivors.get(id(weight), (0, None))
        if survivors is None or given.get("num_groups") == x.shape[1]:
            return func(*args, **kwargs)
        alive = survivors.nonzero().squeeze(1)
        for key in ("weight", "bias"):
            parameter = given.get(key)
            if isinstance(parameter, Tensor):
                given[key] = parameter.index_select(dim, alive)
        place = 1 if "num_groups" in given else x.dim() - cast("Tensor", weight).dim() + dim
        short = x.index_select(place, alive)
        given["input"] = short
        if "normalized_shape" in given:
            given["normalized_shape"] = cast("Tensor", given["weight"]).shape
        return torch.zeros_like(x).index_copy_(place, alive, cast("Tensor", func(**given)))


_NORMS = {
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
}
