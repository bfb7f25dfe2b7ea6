"""Helpers for NNI's config lists that need to know how layers hang together: dependency ids, aligned batch norms."""

from __future__ import annotations

import copy
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.fx
from nni.compression.base.config import select_modules_by_config, trans_legacy_config_list
from nni.compression.utils import (
    Scaling,
    check_ddp_model,
    get_nested_attr,
    has_nested_attr,
    reset_ddp_model,
    set_nested_attr,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from nni_prune_ext.adapters.nni_config import selected_modules
from nni_prune_ext.adapters.nni_targets import inputs_of
from nni_prune_ext.errors import ConfigError, ConfigListError
from nni_prune_ext.graph.channel_groups import (
    ChannelGroup,
    ChannelGroups,
    GroupMember,
    root_name,
    trace_channel_groups,
)
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.graph.model_copy import copy_model, named_tensors
from nni_prune_ext.graph.state import untouched
from nni_prune_ext.graph.tracing import READERS, argument
from nni_prune_ext.inputs import ExampleInputs, call_model, tensors_in

__all__ = [
    "ConfigList",
    "Scaling",
    "align_batchnorm",
    "auto_set_dependency_group_ids",
    "auto_set_dependency_group_ids_of_graph",
    "check_ddp_model",
    "get_nested_attr",
    "has_nested_attr",
    "reset_ddp_model",
    "set_nested_attr",
]
_logger = logging.getLogger(__name__)

ConfigList = list[dict[str, Any]]
"""NNI's config_list: plain dicts whose values are of many kinds."""

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
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
        ConfigListError: the config_list is wrong, or layers that hang together have different goals, which NNI cannot
            express.
    """
    selected_modules(model, config_list)  # refuses what selects nothing
    groups = trace_channel_groups(model, inputs_of(dummy_input))
    modules = dict(model.named_modules())
    ids, blocks = _coupled_layers(model, groups), _blocks(model, groups)
    result: ConfigList = []
    first: dict[str, tuple[str, str]] = {}
    loose: dict[str, list[str]] = {}
    for name, settings in _layers(model, config_list):
        entry = {"op_names": [name], **settings}
        block, goal = blocks.get(name, 1), _goal(settings)
        by_threshold = goal.startswith("sparse_threshold")
        if name in ids:
            leader, expected = first.setdefault(ids[name], (name, goal))
            if goal != expected and not (by_threshold and expected.startswith("sparse_threshold")):
                raise ConfigListError(
                    f"'{leader}' and '{name}' can only lose channels together, but have {expected} and {goal}, "
                    "expected one value. Give them the same, or leave one set out."
                )
            if by_threshold:
                loose.setdefault(ids[name], []).append(name)
            elif modules[leader].weight.dim() != modules[name].weight.dim():
                entry = _aligned(name, modules[name], leader)
                block = 1
            else:
                entry["dependency_group_id"] = ids[name]
        elif block > 1 and not by_threshold:
            entry["dependency_group_id"] = uuid.uuid4().hex  # NNI heeds blocks under an id only
        if block > 1 and not by_threshold:
            entry["internal_metric_block"] = block
        result.append(entry)
    for names in loose.values():
        if len(names) > 1:
            _logger.warning(
                "%s can only lose channels together, but NNI ranks layers together by ratios only, not by thresholds: "
                "they get no id, and channels on which their masks do not agree will stay. Set a sparse_ratio.",
                ", ".join(names),
            )
    return result


def auto_set_dependency_group_ids_of_graph(
    graph_module: nn.Module, config_list: Sequence[Mapping[str, Any]], prune_type: Any = "Filter", prune_axis: int = 0
) -> ConfigList:
    """Does the same from a ``torch.fx`` graph with shapes, as the function of this name in NNI's speedup does.

    Args:
        graph_module: a ``GraphModule`` that ``ShapeProp`` has been run on; its example inputs are made from the shapes.
        prune_type: ignored; or the example input, which the function in NNI's ``utils`` takes in this place.
        prune_axis: ignored.

    Raises:
        ConfigError: there are neither shapes nor an example input.
    """
    if not isinstance(prune_type, str):
        return auto_set_dependency_group_ids(graph_module, config_list, prune_type)
    nodes = graph_module.graph.nodes if isinstance(graph_module, torch.fx.GraphModule) else ()
    known = [node.meta.get("tensor_meta") for node in nodes if node.op == "placeholder"]
    if not known or any(meta is None for meta in known):
        raise ConfigError(
            f"The {type(graph_module).__name__} knows no shapes of its inputs, expected a GraphModule after "
            "torch.fx.passes.shape_prop.ShapeProp(graph).propagate(example). Or pass the example input as third "
            "argument."
        )
    inputs = tuple(torch.zeros(meta.shape, dtype=meta.dtype) for meta in known)
    return auto_set_dependency_group_ids(graph_module, config_list, inputs)


def _goal(settings: Mapping[str, Any]) -> str:
    """Says what decides how many channels of a layer go."""
    own = {**settings, **settings.get("target_settings", {}).get("weight", {})}
    given = [f"{key} {own[key]}" for key in ("sparse_threshold", "sparse_ratio") if own.get(key) is not None]
    return given[0] if given else "no goal"


def align_batchnorm(model: nn.Module, config_list: Sequence[Mapping[str, Any]], dummy_input: Any) -> ConfigList:
    """Returns the config_list with an entry for every batch norm behind a selected convolution, masked like it.

    Without it the simulation keeps the shift of a batch norm where its convolution is masked, and the model changes
    when the channels are removed. With it the masked and the compact model compute the same. What a batch norm takes is
    followed through one forward pass. Where it comes from several layers that do not share one ``dependency_group_id``
    (behind a concatenation or a sum), or in another order, NNI cannot express it; these norms are named in a warning.

    Args:
        dummy_input: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
    """
    example_inputs = inputs_of(dummy_input)
    groups = trace_channel_groups(model, example_inputs)
    selected = {name: settings.get("dependency_group_id") for name, settings in _layers(model, config_list)}
    sources = _sources_of_norms(model, example_inputs, groups, selected.keys())
    modules = dict(model.named_modules())
    entries: ConfigList = []
    left: list[str] = []
    for name in modules:
        found = sources.get(name, frozenset())
        if name in selected or not found & selected.keys():
            continue
        ids = {selected.get(source) for source in found}
        source = min(found, key=list(modules).index) if found <= selected.keys() else None
        if source and (len(found) == 1 or ids == {selected[source]} - {None}) and _same_channels(groups, name, source):
            entries.append(_aligned(name, modules[name], source))
        else:
            left.append(name)
    if left:
        _logger.warning(
            "%d batch norms cannot be aligned to one mask: %s. They take channels of several layers, in another order "
            "or that stay, or have no weight. Where these are masked, the simulation keeps their shifts.",
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


def _same_channels(groups: ChannelGroups, norm: str, source: str) -> bool:
    """Says whether a norm holds just the channels that a layer writes, in the same order."""
    scaled, written = groups.holding(f"{norm}.weight", 0), groups.holding(f"{source}.weight", 0)
    if not len(scaled) == len(written) == 1:
        return False
    (group, scale), (home, writer) = scaled[0], written[0]
    writes = writer.role in (Role.WRITER, Role.DEPTHWISE)
    return writes and group is home and np.array_equal(scale.channel, writer.channel)


def _sources_of_norms(
    model: nn.Module, example_inputs: ExampleInputs, groups: ChannelGroups, selected: AbstractSet[str]
) -> Mapping[str, frozenset[str]]:
    """Returns batch norm → the layers that wrote what it takes, from one forward pass.

    A depthwise layer that is not selected hands on what it takes.
    """
    depthwise = {root_name(member.tensor) for group in groups for member in group.by_role(Role.DEPTHWISE)}
    with untouched(model), torch.no_grad():
        sources = _Sources(copy_model(model, share_others=True), depthwise - selected)
        with sources:
            call_model(sources.model, example_inputs)
    return sources.norms


class _Sources(TorchFunctionMode):
    """Follows which layers wrote the values of a tensor, through one forward pass of a copy.

    Attributes:
        norms: batch norm → the layers that wrote what it takes.
    """

    def __init__(self, model: nn.Module, passing: AbstractSet[str]) -> None:
        super().__init__()
        self.model = model
        self.norms: dict[str, frozenset[str]] = {}
        self._passing = passing
        self._layers: dict[int, str] = {}
        self._written: MutableMapping[Tensor, frozenset[str]] = WeakTensorKeyDictionary()
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)

    def _enter(self, name: str, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            self._layers[id(weight)] = name  # of several layers with one weight, the one that is running
        if isinstance(module, _BATCH_NORMS):
            self.norms[name] = self.norms.get(name, frozenset()) | self._of((args, kwargs))

    def _of(self, value: object) -> frozenset[str]:
        return frozenset().union(*(self._written.get(tensor, frozenset()) for tensor in tensors_in(value)))

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        sources = self._of((args, kwargs))
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in READERS:
            layer = self._layers.get(id(argument(args, kwargs, 1, "weight")), "a computed weight")
            sources = sources if layer in self._passing else frozenset({layer})
        for tensor in tensors_in(args[0] if name == "__setitem__" else result):
            self._written[tensor] = sources
        return result
