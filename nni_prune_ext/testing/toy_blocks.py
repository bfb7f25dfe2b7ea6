"""Building blocks of the toy models: one small module per way in which channels can hang together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv(inputs: int, outputs: int, size: int = 3, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Returns convolution, batch norm and ReLU."""
    convolution = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def network(body: nn.Module, *, inputs: int = 8, outputs: int = 8) -> nn.Sequential:
    """Returns a classifier of 4 classes for 3-channel images around ``body``, which maps ``inputs`` to ``outputs``."""
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(conv(3, inputs), body, conv(outputs, 8), pool, nn.Linear(8, 4))


class Apply(nn.Module):
    """Calls a function of a tensor; holds the modules that the function uses."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``function(x, *parts)``."""
        return self.function(x, *self.parts)


class Residual(nn.Module):
    """Adds a body to a shortcut."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``relu(body(x) + shortcut(x))``."""
        return functional.relu(self.body(x) + self.shortcut(x))


class Concat(nn.Module):
    """Joins the outputs of several branches along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, sum of the branches, H, W)."""
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class SqueezeExcite(nn.Module):
    """Scales every channel by a gate computed from all channels (Hu et al., 2018)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        pooled = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(functional.relu(self.reduce(pooled))))


def view_shuffle(x: Tensor) -> Tensor:
    """Shuffles channels between 2 groups by views (Zhang et al., ShuffleNet, 2018)."""
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class SwiGLU(nn.Module):
    """A gated hidden layer over one projection that is cut in halves (Shazeer, 2020)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., width) to (..., width)."""
        gate, value = self.up(x).chunk(2, dim=-1)
        result: Tensor = self.down(functional.silu(gate) * value)
        return result


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, layer norm and two linear layers over channels last, layer scale (Liu et al., 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(functional.gelu(self.up(y)))
        result: Tensor = x + y.permute(0, 3, 1, 2)
        return result


class PatchMerging(nn.Module):
    """Joins the four pixels of every 2 × 2 window, then norms and reduces (Liu et al., Swin, 2021); channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, 2 C, H / 2, W / 2)."""
        x = x.permute(0, 2, 3, 1)
        corners = [x[:, row::2, column::2, :] for column in (0, 1) for row in (0, 1)]
        result: Tensor = self.reduction(self.norm(torch.cat(corners, -1))).permute(0, 3, 1, 2)
        return result


class FusedAttention(nn.Module):
    """Self-attention over pixels with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, T, C) to the same shape."""
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.project(mixed.transpose(1, 2).reshape(n, tokens, width))
        return result


class TransformerBlock(nn.Module):
    """Attention and a hidden layer around a residual stream."""

    def __init__(self, width: int, *, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = FusedAttention(width, 2) if fused else nn.MultiheadAttention(width, 2, batch_first=True)
        self.hidden = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        tokens = x.flatten(2).transpose(1, 2)
        y = self.norm1(tokens)
        mixed = self.attention(y, y, y)[0] if isinstance(self.attention, nn.MultiheadAttention) else self.attention(y)
        tokens = tokens + mixed
        tokens = tokens + self.hidden(self.norm2(tokens))
        result: Tensor = tokens.transpose(1, 2).reshape(x.shape)
        return result


class ChannelBuffers(nn.Module):
    """Shifts and scales every channel by buffers, as a frozen batch norm does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.linspace(-1, 1, channels).view(1, -1, 1, 1))
        self.register_buffer("scale", torch.linspace(1, 2, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        return (x - self.shift) * self.scale.reshape(1, -1, 1, 1)  # type: ignore[operator]


class SpatialAttention(nn.Module):
    """Weighs pixels by a map computed from mean and maximum over channels (Woo et al., CBAM, 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        statistics = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.conv(statistics))


class StandardisedConv(nn.Conv2d):
    """A convolution whose weight is computed in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, I, H, W) to (N, O, H, W)."""
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)


def write_in_place(x: Tensor) -> Tensor:
    """Writes one half of the channels into a copy of the other."""
    y = x.clone()
    y[:, : x.shape[1] // 2] = torch.tanh(x[:, x.shape[1] // 2 :])
    return y


class PaddedBlock(nn.Module):
    """A residual block that pads channels in its own forward, where no submodule can be rewritten."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = conv(inputs, outputs)
        self.extra = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H, W)."""
        result: Tensor = self.conv(x) + functional.pad(x, (0, 0, 0, 0, 0, self.extra))
        return result


class SumOverTime(nn.Module):
    """An LSTM over the rows of an image, summed up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C, 1, 1)."""
        rows = self.lstm(x.mean(3).transpose(1, 2))[0]
        result: Tensor = rows.sum(1)[:, :, None, None]
        return result
