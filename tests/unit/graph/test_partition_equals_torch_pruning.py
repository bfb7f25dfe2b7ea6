"""An independent answer: our partition of channels against the groups of torch-pruning's dependency graph."""

from __future__ import annotations

import pytest
import torch
import torch_pruning
import torchvision
from torch import nn

from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.graph.label_book import Role

Channel = frozenset[tuple[str, str, int]]
"""All (layer, side, index) of convolutions and linear layers that are one channel."""


def our_channels(model: nn.Module, inputs: torch.Tensor) -> set[Channel]:
    layers = {f"{n}.weight": n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    found: set[Channel] = set()
    for group in trace_channel_groups(model, inputs):
        places: list[set[tuple[str, str, int]]] = [set() for _ in range(group.num_channels)]
        for member in group.by_role(Role.WRITER, Role.DEPTHWISE, Role.CONSUMER):
            side = "in" if member.role is Role.CONSUMER else "out"
            for index, channel in zip(member.index.tolist(), member.channel.tolist()):
                places[channel].add((layers[member.tensor], side, index))
        found |= {frozenset(place) for place in places}
    return found


def their_channels(model: nn.Module, inputs: torch.Tensor, output_layers: set[str]) -> set[Channel]:
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=(inputs,))
    names = {module: name for name, module in model.named_modules()}
    found: set[Channel] = set()
    for group in graph.get_all_groups():
        root = group[0].dep.target.module
        if names[root] in output_layers:
            continue
        places: dict[int, set[tuple[str, str, int]]] = {}
        for dependency, indices in group:
            module = dependency.target.module
            if not isinstance(module, (nn.Conv2d, nn.Linear)):
                continue
            depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
            out = depthwise or graph.is_out_channel_pruning_fn(dependency.handler)
            for index, origin in zip(indices, _root_indices(group, dependency, indices)):
                places.setdefault(origin, set()).add((names[module], "out" if out else "in", index))
        found |= {frozenset(place) for place in places.values()}
    return found


def _root_indices(group, dependency, indices):
    for item in group:
        if item.dep is dependency:
            return item.root_idxs
    raise AssertionError


@pytest.mark.parametrize(
    ("name", "output_layer"),
    [("resnet18", "fc"), ("mobilenet_v2", "classifier.1"), ("vgg11_bn", "classifier.6"), ("densenet121", "classifier")],
)
def test_the_same_channels_are_coupled(name: str, output_layer: str) -> None:
    model = getattr(torchvision.models, name)(weights=None).eval()
    inputs = torch.randn(1, 3, 64, 64)

    assert their_channels(model, inputs, {output_layer}) == our_channels(model, inputs)
