"""New heads on a trained or pruned network: torchvision's detectors, or a classifier of other classes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import MultiScaleRoIAlign

from nni_prune_ext.errors import ConfigError, ModelError
from nni_prune_ext.graph.state import untouched
from nni_prune_ext.inputs import call_model
from nni_prune_ext.transfer.backbones import FeatureBackbone, feature_backbone

DetectorHead = Literal["retinanet", "faster_rcnn", "ssdlite"]
Head = Literal["classifier", "retinanet", "faster_rcnn", "ssdlite"]
HEADS: tuple[Head, ...] = get_args(Head)

_RATIOS = (0.5, 1.0, 2.0)


def classifier(model: nn.Module, image_size: tuple[int, int], num_classes: int) -> nn.Module:
    """Returns a copy of a classifier with a new last linear layer, which has random weights.

    Args:
        model: maps images ``(N, 3, H, W)`` to logits.
        image_size: (H, W) of the images to come.

    Raises:
        ModelError: the last layer is not linear, or the network does not run on images of this size.
    """
    copied = copy.deepcopy(model)
    name = last_linear(copied, image_size)
    last = cast("nn.Linear", copied.get_submodule(name))
    new = nn.Linear(last.in_features, num_classes, bias=last.bias is not None).to(last.weight)
    if not name:
        return new
    parent, _, own_name = name.rpartition(".")
    setattr(copied.get_submodule(parent), own_name, new)
    return copied


def last_linear(model: nn.Module, image_size: tuple[int, int]) -> str:
    """Returns the name of the linear layer whose outputs are the logits.

    Raises:
        ModelError: the last layer is not linear, or the network does not run on images of this size.
    """
    seen: list[tuple[str, nn.Linear]] = []
    handles = [
        module.register_forward_hook(lambda own, _args, _output, name=name: seen.append((name, own)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with untouched(model), torch.no_grad():
            image = torch.zeros(1, 3, *image_size, device=next(model.parameters()).device)
            output = call_model(model, (image,))
    finally:
        for handle in handles:
            handle.remove()
    logits = output if isinstance(output, Tensor) and output.dim() == 2 else None
    if not seen or logits is None or logits.shape[1] != seen[-1][1].out_features:
        raise ModelError(
            f"{type(model).__name__} does not end in a linear layer, expected one whose outputs are the logits. "
            "Replace the last layer yourself, and train with `fit`."
        )
    return seen[-1][0]


def detector(
    model: nn.Module,
    image_size: tuple[int, int],
    num_classes: int,
    *,
    head: DetectorHead = "retinanet",
    maps: int | Sequence[str] = 3,
    pyramid_channels: int = 256,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """Returns torchvision's detector with a network as its backbone; the head has random weights.

    Anchors follow the strides of the feature maps: RetinaNet's are 4 strides wide, times 1, 1.26 and 1.59 (Lin et al.,
    "Focal Loss for Dense Object Detection", 2017, section 4), those of Faster R-CNN 8 strides; SSDLite's boxes go from
    a tenth to nine tenths of the image. RetinaNet and Faster R-CNN read a feature pyramid, SSDLite the maps themselves.
    Where two networks differ in width, parts of the head that do not still get the same random numbers.

    Args:
        image_size: (H, W) of the images to come; the detector scales nothing.
        num_classes: without the background.
        maps: the coarsest feature maps, one per resolution, or names of modules; see ``feature_backbone``.
        pyramid_channels: width of the pyramid, and of RetinaNet's head.
        mean: per channel, subtracted from pixels in 0–1; that of ImageNet unless given.
        std: per channel, by which the result is divided.

    Raises:
        ModelError: the network has no such feature maps.
        ConfigError: a value is out of range.
    """
    if head not in get_args(DetectorHead) or num_classes < 1:
        raise ConfigError(
            f"head is '{head}' with num_classes {num_classes}, expected one of {', '.join(get_args(DetectorHead))} and "
            "at least 1."
        )
    width, seed = None if head == "ssdlite" else pyramid_channels, int(torch.randint(2**31, ()))
    example = torch.zeros(1, 3, *image_size, device=next(model.parameters()).device)
    backbone = feature_backbone(model, example, maps=maps, pyramid_channels=width)
    common: dict[str, Any] = {"image_mean": list(mean) if mean else None, "image_std": list(std) if std else None}
    if head == "ssdlite":
        made = _ssdlite(backbone, image_size, num_classes + 1, common)
        _draw(cast("nn.Module", made.head), seed, partial(nn.init.normal_, std=0.03))
        return made.to(example.device)
    _draw(cast("nn.Module", backbone.pyramid), seed, partial(nn.init.kaiming_uniform_, a=1))
    common |= {"min_size": min(image_size), "max_size": max(image_size)}
    strides = _strides(backbone, image_size)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = _with_pyramid(head, backbone, strides, num_classes + 1, common)
    return made.to(example.device)


def _with_pyramid(
    head: DetectorHead, backbone: FeatureBackbone, strides: list[int], num_classes: int, common: dict[str, Any]
) -> nn.Module:
    made: nn.Module
    if head == "retinanet":
        sizes = tuple(tuple(round(4 * stride * 2 ** (k / 3), 2) for k in range(3)) for stride in strides)
        made = RetinaNet(backbone, num_classes, anchor_generator=_anchors(sizes), **common)
    else:
        names = [str(number) for number in range(len(backbone.maps))]
        made = FasterRCNN(
            backbone,
            num_classes,
            rpn_anchor_generator=_anchors(tuple((8 * stride,) for stride in strides)),
            box_roi_pool=MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
            **common,
        )
    return made


def _draw(module: nn.Module, seed: int, draw: Callable[[Tensor], Tensor]) -> None:
    """Draws every convolution's weights by its place: whatever the widths of the others, the numbers are the same."""
    with torch.random.fork_rng(devices=[]):
        for number, own in enumerate(own for own in module.modules() if isinstance(own, nn.Conv2d)):
            torch.default_generator.manual_seed(seed + number)
            draw(own.weight)


def _strides(backbone: FeatureBackbone, image_size: tuple[int, int]) -> list[int]:
    strides = [round(image_size[0] / own.height) for own in backbone.maps]
    return [*strides, 2 * strides[-1]]  # the pyramid's last level is pooled


def _anchors(sizes: tuple[tuple[float, ...], ...]) -> nn.Module:
    made: nn.Module = AnchorGenerator(sizes, (_RATIOS,) * len(sizes))
    return made


def _ssdlite(
    backbone: FeatureBackbone, image_size: tuple[int, int], num_classes: int, common: dict[str, Any]
) -> nn.Module:
    boxes = DefaultBoxGenerator([[2, 3] for _ in backbone.maps], min_ratio=0.1, max_ratio=0.9)
    norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
    widths = [own.channels for own in backbone.maps]
    head = SSDLiteHead(widths, boxes.num_anchors_per_location(), num_classes, norm)
    height, width = image_size
    made: nn.Module = SSD(backbone, boxes, (width, height), num_classes, head=head, **common)
    return made
