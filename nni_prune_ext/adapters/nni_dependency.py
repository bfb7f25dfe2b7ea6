"""Helpers for NNI's config lists that need to know how layers hang together: dependency ids, aligned batch norms."""

from __future__ import annotations

import copy
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from nni.compression.base.config import select_modules_by_config, trans_legacy_config_list
from nni.compression.utils import (
    Scaling,
    check_ddp_model,
    get_nested_attr,
    has_nested_attr,
    reset_ddp_model,
    set_nested_attr,
)
from torch import nn

from nni_prune_ext.errors import ConfigListError
from nni_prune_ext.graph.channel_groups import ChannelGroup, ChannelGroups, GroupMember, trace_channel_groups
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.graph.model_copy import named_tensors
from nni_prune_ext.inputs import ExampleInputs

__all__ = [
    "ConfigList",
    "Scaling",
    "align_batchnorm",
    "auto_set_dependency_group_ids",
    "check_ddp_model",
    "get_nested_attr",
    "has_nested_attr",
    "reset_ddp_model",
    "set_nested_attr",
]
_logger = logging.getLogger(__name__)

ConfigList = list[dict[str, Any]]
"""NNI's config_list: plain dicts whose values are of many kinds."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def auto_set_dependency_group_ids(
    model: nn.Module, config_list: Sequence[Mapping[str, Any]], dummy_input: Any
) -> ConfigList:
    """Returns the config_list with one entry per layer, layers that can only lose channels together sharing an id.

    NNI's pruners then give such layers one mask. Ids come from the traced channel groups, so concatenations, splits and
    channel shuffles count; layers that may lose channels alone get none, and keep their ``global_group_id``. NNI cannot
    rank a convolution and a linear layer together: of these, the later ones are aligned to the first.

    Args:
        dummy_input: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.

    Raises:
        ConfigListError: layers that hang together have different goals, which NNI cannot express.
    """
    groups = trace_channel_groups(model, _inputs(dummy_input))
    modules = dict(model.named_modules())
    ids, blocks = _coupled_layers(model, groups), _blocks(model, groups)
    result: ConfigList = []
    first: dict[str, tuple[str, object]] = {}
    for name, settings in _layers(model, config_list):
        entry = {"op_names": [name], **settings}
        block = blocks.get(name, 1)
        if name in ids:
            leader, goal = first.setdefault(ids[name], (name, settings.get("sparse_ratio")))
            if goal != settings.get("sparse_ratio"):
                raise ConfigListError(
                    f"'{leader}' and '{name}' can only lose channels together, but have sparse_ratio {goal} and "
                    f"{settings.get('sparse_ratio')}, expected one value. Give them the same, or leave one set out."
                )
            if modules[leader].weight.dim() != modules[name].weight.dim():
                result.append(_aligned(name, modules[name], leader))
                continue
            entry["dependency_group_id"] = ids[name]
        elif block > 1:
            entry["dependency_group_id"] = uuid.uuid4().hex  # NNI heeds blocks under an id only
        if block > 1:
            entry["internal_metric_block"] = block
        result.append(entry)
    return result


def align_batchnorm(model: nn.Module, config_list: Sequence[Mapping[str, Any]], dummy_input: Any) -> ConfigList:
    """Returns the config_list with an entry for every batch norm behind a selected convolution, masked like it.

    Without it the simulation keeps the shift of a batch norm where its convolution is masked, and the model changes
    when the channels are removed. With it the masked and the compact model compute the same. A batch norm over the
    channels of several layers (behind a concatenation) cannot be aligned by NNI; it is named in a warning.

    Args:
        dummy_input: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
    """
    groups = trace_channel_groups(model, _inputs(dummy_input))
    selected = {name for name, _ in _layers(model, config_list)}
    entries: ConfigList = []
    left: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) or name in selected:
            continue
        source, masked = _source(groups, f"{name}.weight", selected)
        if source is not None:
            entries.append(_aligned(name, module, source))
        elif masked:
            left.append(name)
    if left:
        _logger.warning(
            "%d batch norms hold channels of several layers, to which NNI cannot align one mask: %s. Where these are "
            "masked, the simulation keeps their shifts.",
            len(left),
            ", ".join(left[:5]),
        )
    return [*(dict(entry) for entry in config_list), *entries]


def _aligned(name: str, module: nn.Module, source: str) -> dict[str, Any]:
    """Returns an entry that masks the weight and bias of one layer where another layer's output channels are masked."""
    targets = [target for target in ("weight", "bias") if isinstance(getattr(module, target, None), nn.Parameter)]
    align = {"module_name": source, "target_name": "weight", "dims": [0]}
    return {
        "op_names": [name],
        "target_names": targets,
        "target_settings": {target: {"align": dict(align)} for target in targets},
    }


def _inputs(dummy_input: Any) -> ExampleInputs:
    return tuple(dummy_input) if isinstance(dummy_input, list) else cast("ExampleInputs", dummy_input)


def _layers(model: nn.Module, config_list: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every selected layer with its settings, entry by entry, in the order of the model (NNI's is a set's)."""
    order = {name: number for number, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    for config in trans_legacy_config_list([dict(entry) for entry in config_list]):
        modules, settings, _ = select_modules_by_config(model, config)
        for name in sorted(modules, key=order.__getitem__):
            yield name, copy.deepcopy(settings)


def _writers(group: ChannelGroup) -> list[GroupMember]:
    return [m for m in group.by_role(Role.WRITER, Role.DEPTHWISE) if m.tensor.endswith(".weight")]


def _coupled_layers(model: nn.Module, groups: ChannelGroups) -> dict[str, str]:
    """Returns layer → id for layers that write the same channels in the same order, where there are several."""
    names = _module_names(model)
    ids: dict[str, str] = {}
    for group in groups:
        sharing: dict[bytes, list[str]] = {}
        for member in _writers(group):
            whole = len(member.index) == groups.shapes[member.tensor][member.dim]
            if whole and member.dim == 0 and member.tensor in names:
                sharing.setdefault(member.channel.tobytes(), []).append(names[member.tensor])
        for layers in sharing.values():
            if len(layers) > 1:
                ids |= dict.fromkeys(layers, uuid.uuid4().hex)
    return ids


def _module_names(model: nn.Module) -> dict[str, str]:
    """Returns parameter → name of the module whose weight it is."""
    known = {id(tensor): name for name, tensor in named_tensors(model)}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if id(weight) in known:
            found.setdefault(known[id(weight)], name)
    return found


def _blocks(model: nn.Module, groups: ChannelGroups) -> dict[str, int]:
    """Returns layer → into how many equal blocks its output channels fall, because of grouped convolutions."""
    modules = dict(model.named_modules())
    names = _module_names(model)
    blocks: dict[str, int] = {}
    for group in groups:
        readers = [m for m in group.by_role(Role.CONSUMER, Role.WRITER) if m.tensor in names]
        for member in readers:
            module = modules[names[member.tensor]]
            count = module.groups if isinstance(module, _CONVOLUTIONS) else 1
            if count == 1:
                continue
            touched = [names[member.tensor]] if member.role is Role.WRITER else []
            if member.role is Role.CONSUMER:
                touched = [names[w.tensor] for w in _writers(group) if w.tensor in names]
            for name in touched:
                blocks[name] = int(np.lcm(blocks.get(name, 1), count))
    return blocks


def _source(groups: ChannelGroups, norm: str, selected: set[str]) -> tuple[str | None, bool]:
    """Returns the selected layer right before a norm that writes just its channels, and whether any does."""
    holding = groups.holding(norm, 0)
    found, masked = None, False
    for group, norm_member in holding:
        for member in group.members:
            if member is norm_member:
                break
            if member.role in (Role.WRITER, Role.DEPTHWISE) and member.tensor.removesuffix(".weight") in selected:
                masked = True
                if member.dim == 0 and np.array_equal(member.channel, norm_member.channel):
                    found = member.tensor.removesuffix(".weight")
    return (found if len(holding) == 1 else None), masked
