"""A Hypothesis strategy that draws networks of nested blocks."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from nni_prune_ext.testing import toy_blocks as blocks
from nni_prune_ext.testing.toy_blocks import Apply, Concat, Residual, conv

WIDTHS = st.sampled_from([2, 4, 6, 8, 12])
ACTIVATIONS = st.sampled_from([nn.ReLU, nn.SiLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardswish, nn.Identity])
LEAVES = ("plain", "norm", "depthwise", "grouped", "squeeze", "pool", "chunk", "gate", "shuffle", "layer_norm")


@st.composite
def networks(draw: st.DrawFn, max_depth: int, max_blocks: int) -> nn.Module:
    """Draws a classifier for images (N, 3, 8, 8)."""
    width = draw(WIDTHS)
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    body, width = draw(chains(width, max_depth, max_blocks))
    head = draw(st.sampled_from(["pool", "flatten", "conv", "channels_last"]))
    if head == "conv":
        return nn.Sequential(*layers, body, nn.Conv2d(width, 3, 1))
    if head == "channels_last":
        tail = [nn.AdaptiveAvgPool2d(2), Apply(lambda x: x.permute(0, 2, 3, 1).flatten(1)), nn.Linear(4 * width, 4)]
    else:
        size = 1 if head == "pool" else 2
        tail = [nn.AdaptiveAvgPool2d(size), nn.Flatten(), nn.Linear(size * size * width, 4)]
    return nn.Sequential(*layers, body, *tail)


@st.composite
def chains(draw: st.DrawFn, width: int, depth: int, max_blocks: int) -> tuple[nn.Module, int]:
    """Draws blocks one after the other; returns them and the number of channels that they end with."""
    layers = []
    for _ in range(draw(st.integers(1, max_blocks))):
        layer, width = draw(one_block(width, depth, max_blocks))
        layers.append(layer)
    return nn.Sequential(*layers), width


@st.composite
def one_block(draw: st.DrawFn, width: int, depth: int, max_blocks: int) -> tuple[nn.Module, int]:
    """Draws one block."""
    kind = draw(st.sampled_from(LEAVES + (("residual", "concat", "residual", "concat") if depth else ())))
    if kind == "residual":
        body, end = draw(chains(width, depth - 1, max_blocks))
        same = end == width and draw(st.booleans())
        return Residual(body, None if same else nn.Conv2d(width, end, 1)), end
    if kind == "concat":
        parts = [draw(chains(width, depth - 1, max_blocks)) for _ in range(draw(st.integers(1, 2)))]
        branches, ends = [part for part, _ in parts], [end for _, end in parts]
        if draw(st.booleans()):
            branches, ends = [nn.Identity(), *branches], [width, *ends]
        return Concat(*branches), sum(ends)
    return draw(leaves(kind, width))


@st.composite
def leaves(draw: st.DrawFn, kind: str, width: int) -> tuple[nn.Module, int]:
    """Draws a block without blocks inside."""
    end, activation = draw(WIDTHS), draw(ACTIVATIONS)()
    groups = 2 if width % 2 == 0 else 1
    if kind == "norm":
        end = draw(st.sampled_from([4, 8, 12]))
        norm = draw(st.sampled_from([nn.GroupNorm(2, end), nn.GroupNorm(1, end), nn.InstanceNorm2d(end, affine=True)]))
        bent = nn.Tanh() if isinstance(activation, nn.Identity) else activation  # pooled instance norms are constant
        return nn.Sequential(nn.Conv2d(width, end, 1), norm, bent), end
    if kind == "depthwise":
        factor = draw(st.integers(1, 2))
        return nn.Sequential(nn.Conv2d(width, factor * width, 3, padding=1, groups=width), activation), factor * width
    if kind == "grouped":
        return conv(width, end, groups=groups), end
    if kind == "squeeze":
        return blocks.SqueezeExcite(width, draw(st.integers(2, 4))), width
    if kind == "pool":
        return draw(st.sampled_from([nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.ReLU()])), width
    if kind == "gate":
        return nn.Sequential(nn.Conv2d(width, 2 * end, 1), nn.GLU(dim=1)), end
    if kind == "chunk" and groups == 2:
        return Apply(swap_halves, nn.Conv2d(width // 2, width // 2, 3, padding=1), activation), width
    if kind == "shuffle" and groups == 2 and width > 2:  # 2 of 2 channels: as good as no groups
        return Apply(blocks.view_shuffle), width
    if kind == "layer_norm":
        return blocks.ConvNeXtBlock(width), width
    return nn.Sequential(nn.Conv2d(width, end, 3, padding=1, bias=draw(st.booleans())), activation), end


def swap_halves(x: Tensor, convolution: nn.Module, activation: nn.Module) -> Tensor:
    """Works on one half of the channels and puts the halves together the other way round."""
    first, second = x.chunk(2, 1)
    return torch.cat([activation(convolution(second)), first], 1)
