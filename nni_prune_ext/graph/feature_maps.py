"""Where a network's feature maps are, one per resolution, and which weights write their channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.errors import ConfigError, ModelError
from nni_prune_ext.graph.channel_groups import ChannelGroups, Indices, trace_channel_groups
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.graph.model_copy import copy_model
from nni_prune_ext.graph.state import untouched
from nni_prune_ext.inputs import ExampleInputs, call_model, tensors_in
from nni_prune_ext.specs import did_you_mean


@dataclass(frozen=True)
class FeatureMap:
    """The output ``(N, channels, height, width)`` of a module; the empty name is the network's input."""

    module: str
    channels: int
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        """Returns height and width."""
        return self.height, self.width


@dataclass(frozen=True)
class ChannelSources:
    """The weights that write the channels of a feature map.

    Attributes:
        pieces: (tensor, dimension) → positions in the feature map, and the index in that dimension of each. Positions
            that no piece holds are never cut.
        sizes: (tensor, dimension) → its size.
    """

    pieces: Mapping[tuple[str, int], tuple[Indices, Indices]]
    sizes: Mapping[tuple[str, int], int]


def feature_maps(
    model: nn.Module, forward: Callable[[], object], names: Sequence[str] | None = None
) -> tuple[FeatureMap, ...]:
    """Returns the image that a network reads and its feature maps, from the first to the last, one per resolution.

    Of the modules with an output of one resolution the outermost ones count, of these the last: the stages of a ResNet,
    the blocks or layers of a sequence in front of a change of resolution. What is pooled to one pixel is no map, nor is
    what comes after a map with fewer pixels.

    Args:
        forward: runs the model on an image; it is in evaluation mode, and left as it was.
        names: modules to take instead.

    Raises:
        ModelError: the model reads no image, or has no feature map.
        ConfigError: a name is not that of a module whose output is a feature map.
    """
    seen: dict[str, FeatureMap] = {}
    images: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: _note(seen, name, output))
        for name, module in model.named_modules()
        if name
    ]
    handles.append(model.register_forward_pre_hook(lambda _, *given: images.extend(images_in(given)), with_kwargs=True))
    try:
        with untouched(model), torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    if not images:
        raise ModelError(
            f"{type(model).__name__} was run on no image, expected a float tensor (N, C, H, W): one is to be rebuilt. "
            "Let the loss call model(images), or use another method."
        )
    if names is not None:
        chosen = [_named(seen, name, model) for name in names]
    else:
        found: dict[tuple[int, int], FeatureMap] = {}
        for own in seen.values():  # in the order in which they are finished
            before = found.get(own.size)
            if own.size != (1, 1) and (before is None or _depth(own) <= _depth(before)):
                found[own.size] = own
        chosen = _falling([own for own in seen.values() if own in found.values()])
    if not chosen:
        raise ModelError(
            f"{type(model).__name__} has no feature map, expected a layer with an output (N, C, H, W) of more than one "
            "pixel."
        )
    return FeatureMap("", *images[0].shape[1:]), *chosen


def images_in(inputs: object) -> list[Tensor]:
    """Returns all float tensors ``(N, C, H, W)`` among the inputs of a model."""
    return [tensor for tensor in tensors_in(inputs) if tensor.dim() == 4 and tensor.is_floating_point()]


def channel_sources(
    model: nn.Module, example_inputs: ExampleInputs, maps: Sequence[FeatureMap]
) -> dict[str, ChannelSources]:
    """Returns module → the weights that write the channels of its output, from one trace of the model."""
    copy = copy_model(model, share_others=True)
    modules = [copy.get_submodule(own.module) for own in maps if own.module]
    with untouched(copy), torch.no_grad():
        handles = [module.register_forward_hook(_make_probe) for module in modules]
        call_model(copy, example_inputs)
    for handle, module in zip(handles, modules):
        handle.remove()
        module.register_forward_hook(_through_probe)
    groups = trace_channel_groups(copy, example_inputs)
    return {own.module: _sources(groups, f"{own.module}.{_PROBE}") for own in maps if own.module}


_PROBE = "feature_probe"
"""A depthwise filter behind a module: its channels are those of the module's output."""


def _make_probe(module: nn.Module, args: object, output: Tensor) -> None:
    module.register_parameter(_PROBE, nn.Parameter(output.new_ones(output.shape[1], 1, 1, 1)))


def _through_probe(module: nn.Module, args: object, output: Tensor) -> Tensor:
    probe = module.get_parameter(_PROBE)
    return functional.conv2d(output, probe, groups=len(probe))


def _sources(groups: ChannelGroups, probe: str) -> ChannelSources:
    pieces: dict[tuple[str, int], list[tuple[Indices, Indices]]] = {}
    for group in groups:
        for own in (member for member in group.members if member.tensor == probe):
            writers = [m for m in group.by_role(Role.WRITER) if not m.tensor.endswith(_PROBE)]
            left = np.ones(len(own.channel), dtype=bool)
            for writer in writers:
                first = np.full(group.num_channels, -1, dtype=np.int64)
                first[writer.channel[::-1]] = writer.index[::-1]
                index = first[own.channel]
                held = left & (index >= 0)
                if held.any():
                    pieces.setdefault((writer.tensor, writer.dim), []).append((own.index[held], index[held]))
                left &= ~held
    joined = {
        place: (np.concatenate([a for a, _ in parts]), np.concatenate([b for _, b in parts]))
        for place, parts in pieces.items()
    }
    return ChannelSources(joined, {(tensor, dim): groups.shapes[tensor][dim] for tensor, dim in joined})


def _note(seen: dict[str, FeatureMap], name: str, output: object) -> None:
    seen.pop(name, None)
    if isinstance(output, Tensor) and output.dim() == 4 and output.is_floating_point():
        seen[name] = FeatureMap(name, *output.shape[1:])


def _named(seen: Mapping[str, FeatureMap], name: str, model: nn.Module) -> FeatureMap:
    if name not in seen:
        raise ConfigError(
            f"'{name}' is no module of {type(model).__name__} whose output is a feature map (N, C, H, W)."
            f"{did_you_mean(name, list(seen))} Expected one of its stages, for example {', '.join(list(seen)[-3:])}."
        )
    return seen[name]


def _falling(maps: Sequence[FeatureMap]) -> list[FeatureMap]:
    """Returns those of the maps that have fewer pixels than all before."""
    result: list[FeatureMap] = []
    for own in maps:
        if not result or own.height * own.width < result[-1].height * result[-1].width:
            result.append(own)
    return result


def _depth(own: FeatureMap) -> int:
    return own.module.count(".")
