"""Gates between 0 and 1 for a few channels per step, and what their gradients are worth; see ``lottery_jackpots``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nni_prune_ext.masked_weights import straight_through

_MEMORY = 0.99
"""What the sizes of gradients keep from step to step."""


class GateExploration:
    """Draws the gates of explored channels, and turns gradients of gates into gradients of scores.

    The gradient of a loss by a gate, averaged over gates from 0 to 1, is the difference that the channel makes, given
    what the other gates are (Sundararajan et al., "Axiomatic Attribution for Deep Networks", 2017, section 3,
    https://arxiv.org/abs/1703.01365).

    Args:
        share: of the channels, explored in each step; 0 explores none and lets all gradients count.
        scaled: divides gradients by their root mean square per group, over many steps.
    """

    def __init__(self, share: float, *, scaled: bool) -> None:
        self.share, self.scaled = share, scaled
        self.sizes = torch.zeros(0)
        self._generator = torch.Generator()
        self._explored: tuple[Tensor, Tensor] | None = None  # which channels, and a gate for each

    def begin(self, scores: Mapping[str, Tensor], seed: int) -> None:
        """Begins the draws of an epoch; the same seed gives the same ones, in every process."""
        self._generator.manual_seed(seed)
        if self.sizes.shape != (2, len(scores)):
            self.sizes = torch.zeros(2, len(scores), device=next(iter(scores.values())).device)
        self.draw(scores)

    def draw(self, scores: Mapping[str, Tensor]) -> None:
        """Draws the channels of the next step and their gates."""
        if self.share:
            count, device = sum(score.numel() for score in scores.values()), self.sizes.device
            draws = torch.rand((2, count), generator=self._generator).to(device)
            self._explored = draws[0] < self.share, draws[1]

    def end(self) -> None:
        """Explores no longer: gates are 0 and 1."""
        self._explored = None

    def row(self, masks: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> Tensor:
        """Returns the gates of all channels and a 1 behind them; drawn ones only where gradients are taken."""
        mask, score = torch.cat(list(masks.values())), torch.cat(list(scores.values()))
        gates = mask.to(score)
        if self._explored is not None and torch.is_grad_enabled():
            gates = torch.where(*self._explored, gates)
        return torch.cat([straight_through(torch.ones_like(score), gates, score), score.new_ones(1)])

    def weigh(self, scores: Mapping[str, Tensor]) -> None:
        """Leaves the gradients of explored channels, scaled; without gradients, does nothing."""
        counts = [score.numel() for score in scores.values()]
        gradients = [score.grad for score in scores.values() if score.grad is not None]
        if len(gradients) < len(counts):
            return
        gradient = torch.cat(gradients)
        explored = torch.ones_like(gradient) if self._explored is None else self._explored[0].to(gradient)
        gradient = gradient * explored
        if self.scaled:
            numbers = torch.arange(len(counts), device=gradient.device)
            group = numbers.repeat_interleave(torch.tensor(counts, device=gradient.device), output_size=sum(counts))
            seen = torch.stack([gradient.square(), explored])
            self.sizes = _MEMORY * self.sizes + torch.zeros_like(self.sizes).index_add_(1, group, seen)
            size = (self.sizes[0] / self.sizes[1].clamp(min=1e-12)).sqrt()
            gradient = gradient / torch.where(size > 0, size, 1)[group]
        for score, own in zip(scores.values(), gradient.split(counts)):  # type: ignore[no-untyped-call]
            score.grad = own.clone()
