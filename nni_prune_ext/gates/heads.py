"""The head of a gated layer: from the layer's input to one logit per unit of filters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Pool = Literal["max", "avg"]


class GateHead(nn.Module):
    """Predicts which units of a layer an image needs: pooling, softmax over channels, one 1×1 convolution.

    Elkerdawy et al., "Fire Together Wire Together", CVPR 2022, figure 3; the released code pools the average.
    A unit with a logit above 0 is open; so that no layer is ever switched off as a whole, the largest one is, too.

    Softmax sees closed channels: each adds exp(0) to its denominator. When channels are removed that were never open,
    one virtual input of value ``log(count)``, whose weights are the mean of theirs, stands for them, exactly.

    Without softmax (an option of the released code, too) the pooled values, scaled by a constant, are read as they are.

    Attributes:
        weight: ``(U, C_in + 1)``, the last column being that of the virtual input.
        bias: ``(U,)``.
        removed: how many inputs the virtual one stands for, ``()`` float32; 0 takes it out of the softmax.
        units: unit of every filter, ``(C_out,)`` int64.
        scale: what pooled values are multiplied by where there is no softmax, ``()`` float32.
    """

    def __init__(
        self,
        inputs: int,
        units: Tensor | Sequence[int],
        *,
        pool: Pool = "max",
        detached: bool = True,
        softmax: bool = True,
    ) -> None:
        super().__init__()
        members = torch.as_tensor(units, dtype=torch.int64)
        count = int(members.max()) + 1
        self.pool, self.detached, self.softmax = pool, detached, softmax
        self.weight = nn.Parameter(torch.empty(count, inputs + 1))
        self.bias = nn.Parameter(torch.empty(count))
        self.removed: Tensor
        self.units: Tensor
        self.scale: Tensor
        self.register_buffer("removed", torch.zeros(()))
        self.register_buffer("units", members)
        self.register_buffer("scale", torch.ones(()))
        self.reset(safe_start=True)

    @property
    def num_units(self) -> int:
        """Counts the units."""
        return len(self.bias)

    @property
    def macs(self) -> int:
        """Counts multiply–accumulates per image; a head that is frozen at zero opens the same for all and has none."""
        if not self.weight.requires_grad and not bool(self.weight.any()):
            return 0
        return self.num_units * (self.weight.shape[1] - 1 + bool(self.removed))

    def reset(self, *, safe_start: bool) -> None:
        """Draws weights as PyTorch does for a convolution; with a safe start every unit begins open for every image."""
        bound = 1 / math.sqrt(self.weight.shape[1] - 1)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        with torch.no_grad():
            self.weight[:, -1] = 0
            if safe_start and self.softmax:  # shares of the inputs sum to 1, so a logit is at least bias - bound
                self.bias.fill_(2 * bound)
            elif safe_start:
                self.weight.zero_()
                self.bias.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits ``(N, U)`` in float32 for the input ``(N, C_in, H, W)`` of the layer."""
        pooled = self.pooled(x.detach() if self.detached else x)
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.float(), self.bias.float()
            if not self.softmax:
                return functional.linear(pooled * self.scale.float(), weight[:, :-1], bias)
            virtual = self.removed.float().log().expand(len(pooled), 1)
            return functional.linear(torch.cat([pooled, virtual], 1).softmax(1), weight, bias)

    def pooled(self, x: Tensor) -> Tensor:
        """Returns the largest or the mean value of every input channel, ``(N, C_in)`` float32."""
        return (x.amax((2, 3)) if self.pool == "max" else x.mean((2, 3))).float()

    def cut(self, inputs: Tensor, filters: Tensor) -> GateHead:
        """Returns the head of the layer after a cut.

        Args:
            inputs: the inputs that stay, ``(K_in,)``; the others were never open.
            filters: the filters that stay, ``(K_out,)``.
        """
        units, members = torch.unique(self.units.cpu()[filters], return_inverse=True)
        gone = torch.ones(self.weight.shape[1] - 1, dtype=torch.bool)
        gone[inputs] = False
        made = GateHead(len(inputs), members, pool=self.pool, detached=self.detached, softmax=self.softmax)
        made.to(self.weight.device)
        with torch.no_grad():
            rows = self.weight.detach()[units.to(self.weight.device)]
            total = self.removed + gone.sum().to(self.removed)
            lost = rows[:, :-1][:, gone.to(rows.device)].sum(1) + self.removed * rows[:, -1]
            made.weight.copy_(torch.cat([rows[:, inputs.to(rows.device)], (lost / total.clamp(min=1))[:, None]], 1))
            made.bias.copy_(self.bias.detach()[units.to(rows.device)])
            made.removed.copy_(total)
            made.scale.copy_(self.scale)
        made.requires_grad_(self.weight.requires_grad)
        return made


def open_units(logits: Tensor) -> Tensor:
    """Returns which units are open, ``(N, U)`` bool: those with a logit above 0, and the largest one."""
    largest = torch.zeros_like(logits, dtype=torch.bool)
    largest.scatter_(1, logits.argmax(1, keepdim=True), True)
    return (logits > 0) | largest
