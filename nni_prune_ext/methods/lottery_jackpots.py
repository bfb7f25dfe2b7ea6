"""Lottery Jackpots: a mask is searched in a network whose pretrained weights stay as they are.

Zhang et al., "Lottery Jackpots Exist in Pre-trained Models", https://arxiv.org/abs/2104.08700 (TPAMI 2023). Every
weight gets a score; the forward pass uses the best-scored weights of each layer, the gradient of the mask is handed
straight to the scores of kept and pruned weights alike, and only the scores are trained. We follow the authors' code of
2023; the paper's body, its theorem and its published schedule of the restriction were not available to us.

Single weights (a ``sparsity`` target), as in that code: weights, biases and the affine parameters of norms are frozen,
statistics of norms follow the masked network; scores begin at 1 for kept and 0.99 for pruned weights, by magnitude;
rates of layers come from one global magnitude threshold (scope ``global``) or are equal (``local``), counts are exact
at every step; SGD with momentum 0.9, 0.1, weight decay 5e-4, cosine per epoch; then optional tuning at 0.01 without
weight decay.

Departures from that code:

* the short restriction is on: the code rounds its fourth power up to 1, and so never restricts;
* ties are broken (the kept weight stays, then the later one stays) where the code skips a layer; the sparsity asked for
  is rounded up, not down;
* statistics of norms are measured anew for the final mask (``freeze_epochs``) before anything is evaluated;
* linear layers stay whole, as the classifier does in the code; hosts that name layers (NNI) may name them, too;
* N:M patterns and channels are ours, the paper says nothing about them.

Channels (``macs``, ``params``, ``memory``, ``ratio`` targets): one score per channel of every channel group. The counts
per group come from the magnitude of all weights that hold a channel and the target; the search swaps channels of one
group that cost the same, so the target stays met exactly. The gate of a channel sits where the channel is *read*, not
behind the norms that write it: behind a ReLU a closed gate at the norm gets no gradient, so a pruned channel could not
come back by its own merit (``gate="norms"`` without exploration). A gradient at an open gate says little about removal,
because a trained network is nearly stationary there; so in every step a tenth of the channels (``exploration``) takes a
gate drawn from 0–1, and only these are learnt from (``gate_exploration``). Gradients are divided by their root mean
square per group over many steps, because groups differ by orders of magnitude. The share of the restriction is kept on
average over steps: rounding up would let a swap through in every small group and every step. Norms that mix channels
(LayerNorm, GroupNorm) see all of them until the removal. After the search the channels are removed, certified, and the
compact network is tuned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from nni_prune_ext.data.batches import EPOCH_STRIDE
from nni_prune_ext.errors import ConfigError, TrainingError
from nni_prune_ext.graph.channel_groups import ChannelGroup
from nni_prune_ext.mask_updates import (
    SWAP_SHARES,
    Credit,
    Pattern,
    Swaps,
    best,
    best_of_rows,
    rounded_up,
    swapped,
    swapped_groups,
)
from nni_prune_ext.masked_weights import Readings, gate_consumers, gate_norms, read_through, straight_through
from nni_prune_ext.methods.base import JsonState, MethodContext, MethodSpec, Outcome, Phase, PruningMethod
from nni_prune_ext.methods.gate_exploration import GateExploration
from nni_prune_ext.methods.lottery_jackpots_options import JackpotOptions
from nni_prune_ext.methods.norm_statistics import NormMeasurement
from nni_prune_ext.plan import PruningPlan, plan_from_channels, removed_channels
from nni_prune_ext.scoring.group_reduction import group_importance
from nni_prune_ext.scoring.weight_norms import l1_norm
from nni_prune_ext.surgery import Removal

_SCORE_RATES = {"weight": 0.1, "channel": 0.001}


class LotteryJackpots(PruningMethod):
    """Searches a mask in frozen weights, measures statistics for it, tunes what is left; see the module's docstring.

    Attributes:
        scores: group, or name of a weight → one score per channel or weight, higher = keep.
        masks: the same names → bool, ``True`` = kept.
    """

    def __init__(self, options: JackpotOptions) -> None:
        self.options = options.controlled()
        self.scores: dict[str, nn.Parameter] = {}
        self.masks: dict[str, Tensor] = {}
        self._first_masks: dict[str, Tensor] = {}
        self._pools: dict[str, list[Tensor]] = {}
        self._pattern = None if options.pattern is None else Pattern.parse(options.pattern)
        self._optimizer: Optimizer | None = None
        self._searching = False
        self._exploration = GateExploration(options.exploration, scaled=options.normalise_gradients)
        self._row: Tensor | None = None
        self._credits: dict[str, Credit] = {}
        self._readings = Readings([], set())
        self._norms = NormMeasurement()
        self._epoch = 0
        self._swaps = Swaps(0, 0)
        self._facts: dict[str, float] = {"swaps_requested": 0, "swaps_made": 0}

    def phases(self) -> Sequence[Phase]:
        """Returns search, freeze and tune; those without epochs only pass the mask on."""
        own = self.options
        return [
            Phase("search", own.search_epochs, trainable=lambda _: False, optimizers=self._score_optimizer),
            Phase("freeze", own.freeze_epochs, trainable=lambda _: False),
            Phase("tune", own.tune_epochs, optimizers=self._weight_optimizer),
        ]

    def start(self, context: MethodContext, phase: Phase) -> None:
        """Makes the first mask; cuts before tuning."""
        self._epoch = 0
        if phase.name == "search":
            self._begin(context)
        elif phase.name == "freeze":
            self._facts["share_of_first_mask_kept"] = _share_kept(self._first_masks, self.masks)
        elif phase.epochs and context.unit == "channel":
            plan = self._plan(context)
            if plan.num_removed:
                context.apply(plan)

    def attach(self, context: MethodContext, phase: Phase) -> None:
        """Puts the masks onto the model; in the freeze phase, lets norms average over all batches."""
        self._searching = phase.name == "search"
        if not phase.epochs or not self.masks:
            return
        if phase.name == "freeze":
            self._norms.attach(context)
        if context.unit == "weight":
            readings = read_through(context.model, {name: partial(self._masked, name) for name in self.masks})
        else:
            self._attach_channels(context)
            gate = gate_consumers if self.options.gate == "consumers" else gate_norms
            readings = gate(context.model, context.groups, self._gates)
        self._readings = readings
        for handle in readings.handles:
            context.on_leave(handle.remove)

    def after_backward(self, context: MethodContext) -> None:
        """Leaves what the gradients of channel scores say."""
        if self._searching and context.unit == "channel":
            self._exploration.weigh(self.scores)

    def after_step(self, context: MethodContext) -> None:
        """Moves the masks after the scores, as far as the restriction lets them."""
        if self._searching:
            for name in self.masks:
                swaps = self._update(name, self._share())
                self._swaps = Swaps(*(a + b for a, b in zip(self._swaps, swaps)))
            self._row = None
            if context.unit == "channel":
                self._exploration.draw(self.scores)

    def after_epoch(self, context: MethodContext, phase: Phase, epoch: int) -> None:
        """Notes the swaps of the epoch and sets the rate of the next one."""
        self._check_scores()
        if phase.name == "search":
            context.log(
                {
                    "swaps_requested": self._swaps.requested,
                    "swaps_made": self._swaps.executed,
                    "swap_share": self._share(),
                    "share_of_first_mask_kept": _share_kept(self._first_masks, self.masks),
                }
            )
            self._facts["swaps_requested"] += self._swaps.requested
            self._facts["swaps_made"] += self._swaps.executed
            self._swaps = Swaps(0, 0)
        self._epoch = epoch + 1
        if self._searching and context.unit == "channel":
            self._exploration.begin(self.scores, context.seed * EPOCH_STRIDE + self._epoch)
        if self._optimizer is not None and phase.name != "freeze":
            for group in self._optimizer.param_groups:
                group["lr"] = group["initial_lr"] * 0.5 * (1 + math.cos(math.pi * self._epoch / phase.epochs))

    def on_removed(self, context: MethodContext, removal: Removal) -> None:
        """Forgets the masks: their channels are gone."""
        self.masks, self.scores, self._first_masks = {}, {}, {}

    def finish(self, context: MethodContext) -> Outcome:
        """Hands over the plan, or the masks of weights."""
        if context.unit == "weight":
            return Outcome(plan_from_channels(context.groups, {}), weight_masks=dict(self.masks), facts=self._facts)
        return Outcome(self._plan(context), facts=self._facts)

    def state_dict(self) -> tuple[dict[str, Tensor], JsonState]:
        """Returns scores, masks, the first masks and the facts."""
        scores = {name: score.detach() for name, score in self.scores.items()}
        parts = {"score": scores, "mask": self.masks, "first": self._first_masks}
        tensors = {f"{part}/{name}": tensor for part, own in parts.items() for name, tensor in own.items()}
        credits = {name: credit.saved for name, credit in self._credits.items()}
        measured = dict.fromkeys(sorted(self._norms.measured), 1.0)
        values: JsonState = {"epoch": self._epoch, "credits": credits, "measured": measured}
        return {**tensors, "sizes": self._exploration.sizes}, {**values, "facts": dict(self._facts)}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: JsonState) -> None:
        """Restores what ``state_dict`` returned."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        self.scores = {name: nn.Parameter(tensor) for name, tensor in part("score/").items()}
        self.masks, self._first_masks = part("mask/"), part("first/")
        self._exploration.sizes = tensors["sizes"]
        self._epoch = int(cast("int", values["epoch"]))
        self._credits = {name: Credit(saved) for name, saved in cast("dict[str, float]", values["credits"]).items()}
        self._norms.measured = set(cast("dict[str, float]", values["measured"]))
        self._facts = dict(cast("dict[str, float]", values["facts"]))

    def _begin(self, context: MethodContext) -> None:
        """Makes the first masks, and scores that agree with them."""
        self.masks = self._weight_masks(context) if context.unit == "weight" else self._channel_masks(context)
        self._first_masks = {name: mask.clone() for name, mask in self.masks.items()}
        self.scores = {
            name: nn.Parameter(torch.where(mask, 1.0, 1.0 - self.options.gap)) for name, mask in self.masks.items()
        }

    def _weight_masks(self, context: MethodContext) -> dict[str, Tensor]:
        parameters = dict(context.model.named_parameters())
        weights = {name: parameters[name].detach() for name in context.maskable}
        if self._pattern is not None:
            weights = _patterned(weights, self._pattern, context.model)
        if not weights:
            raise ConfigError(
                f"There is no weight to mask in {type(context.model).__name__} (pattern: {self.options.pattern}), "
                "expected convolutions. Exclude fewer layers, or choose another pattern."
            )
        counts = context.masked_counts({name: weight.abs() for name, weight in weights.items()})
        ranks = self._ranks({name: weight.abs() for name, weight in weights.items()}, context.seed)
        if self._pattern is None:
            return {name: best(ranks[name], weight.numel() - counts[name]) for name, weight in weights.items()}
        asked = sum(counts.values()) / sum(weight.numel() for weight in weights.values())
        if abs(asked - self._pattern.sparsity) > 0.01:
            raise ConfigError(
                f"The pattern {self.options.pattern} masks {self._pattern.sparsity:.1%} of the weights, but "
                f"{asked:.1%} were asked for. Expected the same. Ask for sparsity={self._pattern.sparsity:g}."
            )
        return {name: _best_of_pattern(values, self._pattern) for name, values in ranks.items()}

    def _channel_masks(self, context: MethodContext) -> dict[str, Tensor]:
        if self._pattern is not None:
            raise ConfigError(
                f"The pattern {self.options.pattern} is about single weights, but channels were asked for. Expected a "
                f"sparsity target. Ask for sparsity={self._pattern.sparsity:g}, or leave the pattern out."
            )
        if not len(context.groups):
            raise ConfigError(
                f"There is no channel of {type(context.model).__name__} that may be removed, expected one group at "
                "least. Exclude fewer layers, or mask single weights (sparsity=0.9)."
            )
        tensors: dict[str, Tensor] = dict(context.model.named_parameters())
        importance = {group.name: group_importance(group, tensors, l1_norm) for group in context.groups}
        gone = removed_channels(context.allocate(importance).plan, context.groups)
        device = next(context.model.parameters()).device
        ranks = self._ranks(
            {group.name: -torch.from_numpy(gone[group.name]).float() for group in context.groups}, context.seed
        )
        masks = {}
        for group in context.groups:
            kept = torch.from_numpy(~gone[group.name])
            for pool in _pools(group):
                kept[pool] = best(ranks[group.name][pool], int(kept[pool].sum()))
            masks[group.name] = kept.to(device)
        return masks

    def _ranks(self, magnitudes: Mapping[str, Tensor], seed: int) -> Mapping[str, Tensor]:
        """Returns what the first mask keeps the highest of: magnitudes, or a draw."""
        if self.options.initialisation == "magnitude":
            return magnitudes
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.rand(m.shape, generator=generator).to(m.device) for name, m in magnitudes.items()}

    def _share(self) -> float:
        return SWAP_SHARES[self.options.restriction](self._epoch / max(self.options.search_epochs, 1))

    def _update(self, name: str, share: float) -> Swaps:
        """Makes a share of the swaps that the scores of one mask ask for."""
        mask, scores = self.masks[name], self.scores[name].detach()
        if name not in self._pools:
            rule = swapped if self._pattern is None else partial(swapped_groups, pattern=self._pattern)
            self.masks[name], swaps = rule(mask, scores, rounded_up(share))
            return swaps
        requested = executed = 0
        for number, pool in enumerate(self._pools[name]):
            credit = self._credits.setdefault(f"{name}/{number}", Credit())
            mask[pool], swaps = swapped(mask[pool], scores[pool], credit.rule(share))
            requested, executed = requested + swaps.requested, executed + swaps.executed
        return Swaps(requested, executed)

    def _masked(self, name: str, weight: Tensor) -> Tensor:
        scores = self.scores[name]
        return straight_through(weight, self.masks[name], scores if self._searching else scores.detach())

    def _attach_channels(self, context: MethodContext) -> None:
        """Prepares the gates: one row of all channels per forward of the model."""
        device = next(context.model.parameters()).device
        self._pools, self._row = {}, None
        self._exploration.end()
        if self._searching:
            self._pools = {group.name: [pool.to(device) for pool in _pools(group)] for group in context.groups}
            self._exploration.begin(self.scores, context.seed * EPOCH_STRIDE + self._epoch)
        context.on_leave(context.model.register_forward_pre_hook(self._forget_row).remove)

    def _gates(self) -> Tensor:
        if self._row is None or self._row.requires_grad != (self._searching and torch.is_grad_enabled()):
            scores = self.scores if self._searching else {name: score.detach() for name, score in self.scores.items()}
            self._row = self._exploration.row(self.masks, scores)
            if self._row.requires_grad:
                self._row.register_hook(self._forget_row)  # type: ignore[no-untyped-call]  # its graph is used up
        return self._row

    def _forget_row(self, *_: object) -> None:
        self._row = None

    def _check_scores(self) -> None:
        """Refuses masks that were never read in an epoch, and scores that are no numbers."""
        self._readings.check()
        for name, score in self.scores.items():
            if not bool(score.isfinite().all()):
                raise TrainingError(
                    f"The scores of '{name}' are not finite, expected finite ones. Lower learning_rate "
                    f"({self.options.learning_rate}), or check loss and data."
                )

    def _plan(self, context: MethodContext) -> PruningPlan:
        return plan_from_channels(context.groups, {name: ~mask.cpu().numpy() for name, mask in self.masks.items()})

    def _score_optimizer(self, context: MethodContext) -> Sequence[Optimizer]:
        rate = self.options.learning_rate or _SCORE_RATES[context.unit]
        return [self._made(SGD(self.scores.values(), rate, momentum=0.9, weight_decay=self.options.score_decay))]

    def _weight_optimizer(self, context: MethodContext) -> Sequence[Optimizer]:
        weights = [parameter for parameter in context.model.parameters() if parameter.requires_grad]
        return [self._made(SGD(weights, self.options.tune_learning_rate, momentum=0.9))]

    def _made(self, optimizer: Optimizer) -> Optimizer:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self._optimizer = optimizer
        return optimizer


def _pools(group: ChannelGroup) -> list[Tensor]:
    """Returns the channels of a group in pools of equal cost: each is held by the same tensors, as often.

    Swapping within a pool leaves the cost of a plan and the width of every layer as they are.
    """
    held = [np.bincount(member.channel, minlength=group.num_channels) for member in group.members]
    _, pool = np.unique(np.stack(held), axis=1, return_inverse=True)
    return [torch.from_numpy(np.flatnonzero(pool == k)) for k in range(int(pool.max()) + 1)]


def _patterned(weights: Mapping[str, Tensor], pattern: Pattern, model: nn.Module) -> dict[str, Tensor]:
    """Returns the weights that a pattern along input channels fits: not the first layer, depthwise or transposed."""
    found, first = {}, next(name for name, parameter in model.named_parameters() if parameter.dim() > 1)
    for name, weight in weights.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        if (
            name != first
            and weight.dim() > 1
            and weight.shape[1] >= pattern.of
            and not getattr(layer, "transposed", False)
        ):
            found[name] = weight
    return found


def _best_of_pattern(values: Tensor, pattern: Pattern) -> Tensor:
    return pattern.tensor(best_of_rows(pattern.rows(values, -torch.inf), pattern.keep), values.shape)


def _share_kept(first: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> float:
    """Returns the share (0–1) of what the first masks keep that the masks of now keep, too."""
    kept = sum(int(mask.sum()) for mask in first.values())
    return sum(int((first[name] & now[name]).sum()) for name in first) / kept if kept else 1.0


LOTTERY_JACKPOTS = MethodSpec(
    "lottery_jackpots",
    "searches a mask in frozen pretrained weights: channels, single weights or N:M",
    "https://arxiv.org/abs/2104.08700",
    JackpotOptions,
    LotteryJackpots,
    needs_data=True,
    own_optimizers=True,
    changes_structure=True,
    products=frozenset({"plan", "weight_masks"}),
    demo_options={"search_epochs": 2, "tune_epochs": 1},
)
