"""The mask search on the bench, watched: for all tests of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from nni_prune_ext.allocation import Target
from nni_prune_ext.methods.base import MethodContext, Outcome, Phase
from nni_prune_ext.methods.lottery_jackpots import LOTTERY_JACKPOTS, LotteryJackpots
from nni_prune_ext.methods.lottery_jackpots_options import JackpotOptions
from nni_prune_ext.testing.method_bench import Bench, CountedRun
from nni_prune_ext.training import drive

CHANNELS, WEIGHTS = (Target("macs", 0.6),), (Target("sparsity", 0.8),)
LIVELY = {"search_epochs": 3, "tune_epochs": 0, "learning_rate": 0.3, "gap": 0.001}
"""So few steps, and yet many swaps."""


class Spy(LotteryJackpots):
    """The method, watched: ``seen`` is called with the phase after every step; ``before`` is the mask of that step."""

    def __init__(self, options: JackpotOptions, seen: Callable[[Spy, MethodContext, str], object]) -> None:
        super().__init__(options)
        self.seen, self.phase = seen, ""
        self.before: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    def attach(self, context: MethodContext, phase: Phase) -> None:
        self.phase = phase.name
        super().attach(context, phase)

    def after_backward(self, context: MethodContext) -> None:
        self.before = {name: mask.clone() for name, mask in self.masks.items()}
        super().after_backward(context)
        self.gradients = {name: score.grad.clone() for name, score in self.scores.items() if score.grad is not None}

    def after_step(self, context: MethodContext) -> None:
        super().after_step(context)
        self.seen(self, context, self.phase)


def nothing(*_: object) -> None:
    """Sees nothing."""


def searched(
    targets: tuple[Target, ...],
    options: Mapping[str, object],
    seen: Callable[[Spy, MethodContext, str], object] = nothing,
) -> tuple[Spy, CountedRun, Outcome]:
    """Drives the method over the bench and returns it with its run and outcome."""
    run = replace(Bench.of(LOTTERY_JACKPOTS, {}), targets=targets).run()
    spy = Spy(JackpotOptions(**options), seen)
    return spy, run, drive(spy, run)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def counts(masks: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}
