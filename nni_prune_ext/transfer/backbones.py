"""A pruned network as the backbone of another task: its feature maps, without its head, with a pyramid if asked.

torchvision's detectors and segmenters take what :func:`feature_backbone` returns: ``forward`` gives an ordered dict of
feature maps, ``out_channels`` says how wide they are.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from nni_prune_ext.errors import ConfigError, ModelError
from nni_prune_ext.graph.feature_maps import FeatureMap, feature_maps
from nni_prune_ext.inputs import ExampleInputs, call_model


class FeatureBackbone(nn.Module):
    """Maps images ``(N, C, H, W)`` to an ordered dict of feature maps, from the finest to the coarsest.

    Attributes:
        maps: the network's feature maps that are read, widths as they are after pruning.
        out_channels: width of every map with a pyramid; without one, that of the coarsest map.
    """

    def __init__(self, body: nn.Module, maps: Sequence[FeatureMap], pyramid_channels: int | None) -> None:
        """Takes a module that returns the maps by number, and builds the pyramid."""
        super().__init__()
        self.body, self.maps = body, tuple(maps)
        self.out_channels = pyramid_channels or maps[-1].channels
        self.pyramid = (
            None
            if pyramid_channels is None
            else FeaturePyramidNetwork([own.channels for own in maps], pyramid_channels, LastLevelMaxPool())
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Returns the maps by number, as text."""
        found: Mapping[str, Tensor] = self.body(images)
        features = OrderedDict((str(number), found[str(number)]) for number in range(len(self.maps)))
        return features if self.pyramid is None else self.pyramid(features)


def feature_backbone(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    maps: int | Sequence[str] = 3,
    pyramid_channels: int | None = None,
) -> FeatureBackbone:
    """Returns a copy of a network without its head, as the backbone of a detector or segmenter.

    Weights, also those of frozen norms, are the network's; nothing behind the last feature map is kept.

    Args:
        maps: so many of the coarsest feature maps, one per resolution, or names of modules from the finest to the
            coarsest.
        pyramid_channels: width of a feature pyramid (Lin et al., "Feature Pyramid Networks for Object Detection",
            2017, https://arxiv.org/abs/1612.03144) that is put on top, with one more map by pooling; none unless given.

    Raises:
        ModelError: the network reads no image, has fewer feature maps, or cannot be cut there.
        ConfigError: a name is not that of a module with a feature map, or a number is out of range.

    Example:
        >>> import torch, torchvision
        >>> from nni_prune_ext import feature_backbone
        >>> network = torchvision.models.mobilenet_v2(weights=None).eval()
        >>> backbone = feature_backbone(network, torch.randn(1, 3, 64, 64), pyramid_channels=64)
        >>> [tuple(own.shape) for own in backbone(torch.randn(1, 3, 64, 64)).values()]
        [(1, 64, 8, 8), (1, 64, 4, 4), (1, 64, 2, 2), (1, 64, 1, 1)]
    """
    if pyramid_channels is not None and pyramid_channels < 1:
        raise ConfigError(f"pyramid_channels is {pyramid_channels}, expected 1 or more. Leave it out for no pyramid.")
    names = None if isinstance(maps, int) else list(maps)
    found = feature_maps(model, lambda: call_model(model, example_inputs), names)[1:]
    if isinstance(maps, int):
        if not 1 <= maps <= len(found):
            raise ConfigError(
                f"{maps} feature maps were asked for, expected 1 to {len(found)}: {type(model).__name__} has "
                f"{', '.join(own.module for own in found)} on these example inputs. Ask for fewer, or name them."
            )
        found = found[-maps:]
    try:
        body = create_feature_extractor(copy.deepcopy(model), {own.module: str(n) for n, own in enumerate(found)})
    except (TypeError, ValueError, RuntimeError, torch.fx.proxy.TraceError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be cut at {', '.join(own.module for own in found)}: {error}. Expected a "
            "network that torch.fx can trace. Name other modules, or write a module that returns the maps."
        ) from error
    return FeatureBackbone(body.train(model.training), found, pyramid_channels).train(model.training)
