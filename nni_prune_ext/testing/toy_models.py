"""The zoo: one tiny network per topology, for tests of tracing, surgery, methods and exporters.

``ZOO`` holds them by name. Every model builds in milliseconds and takes inputs of a batch of 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.models.cifar_resnet import BasicBlock, PadShortcut
from nni_prune_ext.testing import toy_blocks as blocks
from nni_prune_ext.testing.toy_blocks import Apply, Concat, Residual, conv, network


@dataclass(frozen=True)
class ToyModel:
    """A tiny network.

    Attributes:
        build: makes the model, with weights from the global random state.
        example_inputs: makes what the model is called with.
        note: what is special about it.
        prunable: whether some channels can be removed.
    """

    build: Callable[[], nn.Module]
    example_inputs: Callable[[], ExampleInputs]
    note: str
    prunable: bool = True


def image() -> Tensor:
    """Returns two random images (2, 3, 8, 8) float32, the same each time."""
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class SharedConv(nn.Module):
    """Calls one convolution twice, and ties the weight of another one to it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.tied = conv(3, 8), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.tied.weight = self.conv.weight
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images to logits."""
        y = self.conv(torch.relu(self.conv(self.stem(x))))
        result: Tensor = self.head(torch.relu(self.tied(y)).mean((2, 3)))
        return result


class TiedAutoencoder(nn.Module):
    """Decodes with the transposed weight of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.code, self.head = conv(3, 6), nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images to a map (N, 2, H, W)."""
        code = torch.relu(self.code(self.stem(x)))
        result: Tensor = self.head(torch.relu(functional.conv_transpose2d(code, self.code.weight, padding=1)))
        return result


class Tokens(nn.Module):
    """Embeds tokens; the last layer may use the table of the embedding."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps (N, T) tokens to (N, 11) scores."""
        x = self.table(tokens)
        result: Tensor = self.head((x + torch.tanh(self.hidden(x))).mean(1))
        return result


class TwoInputs(nn.Module):
    """Adds what two convolutions make of two images."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = conv(3, 8), conv(3, 8), nn.Conv2d(8, 2, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Maps two images to a map (N, 2, H, W)."""
        result: Tensor = self.head(self.left(left) + self.right(right))
        return result


class TwoOutputs(nn.Module):
    """Returns features, which keep all channels, and logits; the branch in between can be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.features, self.head = conv(3, 8), conv(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """Maps images to features and logits."""
        features = self.features(self.stem(x))
        return {"logits": self.head(features.mean((2, 3))), "features": (features,)}


class Pyramid(nn.Module):
    """A feature pyramid with a shared detection head."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = conv(3, 6), conv(6, 8, stride=2)
        self.lateral_fine, self.lateral_coarse = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 1)
        self.tower = conv(8, 8)
        self.boxes, self.scores = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        """Maps images to boxes and scores at two scales."""
        fine = self.fine(x)
        top = self.lateral_coarse(self.coarse(fine))
        bottom = self.lateral_fine(fine) + functional.interpolate(top, scale_factor=2.0, mode="nearest")
        towers = [self.tower(level) for level in (bottom, top)]
        return [{"boxes": self.boxes(t).flatten(2), "scores": self.scores(t).flatten(2)} for t in towers]


class Segmenter(nn.Module):
    """An encoder and a decoder joined by a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner, self.merge = conv(3, 6), conv(6, 8, stride=2), conv(14, 8)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images to class scores of every pixel."""
        outer = self.outer(x)
        inner = functional.interpolate(self.inner(outer), size=outer.shape[2:], mode="bilinear", align_corners=False)
        result: Tensor = self.head(self.merge(torch.cat([outer, inner], 1)))
        return result


class Masked(nn.Module):
    """Multiplies all channels by one mask."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mask, self.head = conv(3, 8), nn.Conv2d(3, 1, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images to a map (N, 2, H, W)."""
        result: Tensor = self.head(self.body(x) * torch.sigmoid(self.mask(x)))
        return result


def _frozen() -> nn.Module:
    return network(Residual(conv(8, 8))).requires_grad_(False)


def _bias_without_norm() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 64, 4))


def _live_zero() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 6, 3), nn.Softplus()]
    return nn.Sequential(*layers, nn.Conv2d(6, 4, 1))


def _sequence() -> nn.Module:
    layers = [nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 6, 3)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 2, 4))


def _volume() -> nn.Module:
    layers = [nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.AvgPool3d(2), nn.Conv3d(8, 6, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 4))


def _option_a(shortcut: Callable[[], nn.Module]) -> nn.Module:
    first, second = BasicBlock(4, 8, stride=2), BasicBlock(8, 8)
    first.set_submodule("shortcut", shortcut())
    return network(nn.Sequential(first, second), inputs=4)


def _nchw_flatten() -> nn.Module:
    return nn.Sequential(
        conv(3, 6), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 4)
    )


def _nhwc_flatten() -> nn.Module:
    flatten = Apply(lambda x: x.permute(0, 2, 3, 1).flatten(1))
    return nn.Sequential(conv(3, 6), nn.AdaptiveAvgPool2d(2), flatten, nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 4))


def _norms(make: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: network(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), make(8), nn.GELU()))


def _around(make: Callable[[], nn.Module], **widths: int) -> Callable[[], nn.Module]:
    return lambda: network(make(), **widths)


def _toy(build: Callable[[], nn.Module], note: str, *, prunable: bool = True) -> ToyModel:
    return ToyModel(build, image, note, prunable)


def _left_and_right() -> dict[str, object]:
    return {"left": image(), "right": image().flip(0)}


ZOO: dict[str, ToyModel] = {
    "chain": _toy(_around(lambda: conv(8, 8)), "convolutions one after the other"),
    "residual": _toy(
        _around(lambda: nn.Sequential(Residual(conv(8, 8)), Residual(conv(8, 8)))), "two writers, one stream"
    ),
    "option_a": _toy(lambda: _option_a(lambda: PadShortcut(2, 2)), "shortcut that pads channels: rewritten"),
    "option_a_average": _toy(
        lambda: _option_a(lambda: nn.Sequential(nn.AvgPool2d(2), PadShortcut(1, 2))), "padded after average pooling"
    ),
    "projection": _toy(
        _around(lambda: Residual(conv(8, 12, stride=2), conv(8, 12, 1, stride=2)), outputs=12),
        "1×1 convolution as shortcut",
    ),
    "dense": _toy(
        _around(
            lambda: nn.Sequential(Concat(nn.Identity(), conv(8, 4)), Concat(nn.Identity(), conv(12, 4))), outputs=16
        ),
        "concatenation of concatenations",
    ),
    "concat_twice": _toy(
        _around(lambda: Concat(nn.Identity(), nn.Identity()), outputs=16), "a tensor joined with itself"
    ),
    "depthwise": _toy(
        _around(lambda: nn.Sequential(conv(8, 8, groups=8), conv(8, 12, 1), conv(12, 24, groups=12)), outputs=24),
        "separable convolutions, one with a multiplier",
    ),
    "grouped": _toy(
        _around(lambda: nn.Sequential(conv(8, 8, groups=2), conv(8, 12, groups=4)), outputs=12), "2 and 4 groups"
    ),
    "grouped_residual": _toy(
        _around(lambda: Residual(conv(12, 12, groups=2), conv(12, 12, groups=3)), inputs=12, outputs=12),
        "groups that tie all channels of a stream",
    ),
    "squeeze_excite": _toy(_around(lambda: blocks.SqueezeExcite(8, 4)), "channels scaled by themselves"),
    "view_shuffle": _toy(
        _around(lambda: nn.Sequential(conv(8, 8, groups=2), Apply(blocks.view_shuffle), conv(8, 8, groups=2))),
        "by views",
    ),
    "module_shuffle": _toy(
        _around(lambda: nn.Sequential(nn.ChannelShuffle(2), conv(8, 8, groups=2))), "nn.ChannelShuffle"
    ),
    "chunk": _toy(
        _around(lambda: Apply(lambda x, f: torch.cat([x.chunk(2, 1)[0], f(x.chunk(2, 1)[1])], 1), conv(4, 4))),
        "two halves",
    ),
    "glu": _toy(_around(lambda: nn.Sequential(nn.Conv2d(8, 12, 1), nn.GLU(dim=1)), outputs=6), "gated linear unit"),
    "swiglu": _toy(
        lambda: nn.Sequential(nn.Flatten(2), nn.Linear(64, 8), blocks.SwiGLU(8, 6), nn.Linear(8, 4)),
        "gated hidden layer",
    ),
    "nchw_flatten": _toy(_nchw_flatten, "one channel is several features in a row"),
    "nhwc_flatten": _toy(_nhwc_flatten, "one channel is every C-th feature"),
    "shared": _toy(SharedConv, "one layer called twice, one weight tied"),
    "tied_autoencoder": _toy(TiedAutoencoder, "one weight used in both directions"),
    "group_norm": _toy(_norms(lambda c: nn.GroupNorm(2, c)), "statistics over groups of channels"),
    "layer_norm": _toy(_around(lambda: blocks.ConvNeXtBlock(8)), "statistics over channels last, layer scale"),
    "instance_norm": _toy(_norms(lambda c: nn.InstanceNorm2d(c, affine=True)), "statistics per channel and image"),
    "instance_norm_tracked": _toy(
        _norms(lambda c: nn.InstanceNorm2d(c, track_running_stats=True)), "running statistics"
    ),
    "transposed": _toy(
        _around(lambda: nn.Sequential(nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ReLU()), outputs=6),
        "input rows, output columns",
    ),
    "transposed_depthwise": _toy(
        _around(lambda: nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8)), "channel by channel"
    ),
    "multihead_attention": _toy(
        _around(lambda: blocks.TransformerBlock(8, fused=False)), "only the hidden layer is free"
    ),
    "fused_attention": _toy(_around(lambda: blocks.TransformerBlock(8, fused=True)), "queries, keys and values stay"),
    "embedding": ToyModel(lambda: Tokens(tied=False), lambda: torch.arange(10).view(2, 5), "a table of tokens"),
    "tied_embedding": ToyModel(
        lambda: Tokens(tied=True), lambda: torch.arange(10).view(2, 5), "a table read at both ends"
    ),
    "prelu": _toy(_around(lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.PReLU(8))), "one slope per channel"),
    "pixel_shuffle": _toy(
        _around(lambda: nn.Sequential(nn.Conv2d(8, 24, 1), nn.PixelShuffle(2)), outputs=6), "to space"
    ),
    "conv1d": ToyModel(_sequence, lambda: image()[:, :, 0], "one dimension"),
    "conv3d": ToyModel(_volume, lambda: image().view(2, 3, 4, 4, 4), "three dimensions"),
    "patch_merging": _toy(_around(lambda: blocks.PatchMerging(8), outputs=16), "strided slices joined"),
    "two_inputs": ToyModel(TwoInputs, lambda: (image(), image().flip(0)), "a tuple of inputs"),
    "dict_input": ToyModel(TwoInputs, _left_and_right, "inputs by name"),
    "two_outputs": _toy(TwoOutputs, "features leave the model"),
    "pyramid": _toy(Pyramid, "detection head shared by two scales"),
    "segmenter": _toy(Segmenter, "resize and concatenation"),
    "frozen": _toy(_frozen, "no parameter needs a gradient"),
    "channel_buffers": _toy(_around(lambda: blocks.ChannelBuffers(8)), "buffers with one value per channel"),
    "bias_without_norm": _toy(_bias_without_norm, "biases and no norm"),
    "live_zero": _toy(_live_zero, "activations that do not map 0 to 0"),
    "mask": _toy(Masked, "one map for all channels"),
    "spatial_attention": _toy(_around(blocks.SpatialAttention), "statistics over channels protect them"),
    "lstm": _toy(_around(lambda: nn.Sequential(conv(8, 6), conv(6, 8), blocks.SumOverTime(8))), "protected by name"),
    "computed_weight": _toy(
        _around(lambda: nn.Sequential(conv(8, 6), conv(6, 8), blocks.StandardisedConv(8, 8, 3))), "protected around it"
    ),
    "in_place_write": _toy(
        _around(lambda: nn.Sequential(conv(8, 8), Apply(blocks.write_in_place))), "protected where it is written"
    ),
    "inline_pad": _toy(
        _around(lambda: blocks.PaddedBlock(8, 12), outputs=12), "padded in a block's own forward: protected"
    ),
}
