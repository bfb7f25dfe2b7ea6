"""PSAP (re-derived from the abstract): ratios follow the sparsity of weights, gradients protect what is important.

Li & Zhao, "Protective Self-Adaptive Pruning to Better Compress DNNs", 2023, https://arxiv.org/abs/2303.11881. **Only
the abstract was available to us.** It confirms: pruning and training alternate, and pruned filters may be
reconstructed; before each pruning step the ratio of every layer follows from its weight sparsity ratio; gradients are
watched so that important filters are not pruned; nothing but weights and gradients is used; networks may be pruned
from scratch. Everything else is our reading, an option each, and none of it is evidence about the paper.

One training of ``epochs`` epochs. At the end of every ``interval`` epochs, a pruning step:

1. the schedule says which share of the target is due; groups are pruned in proportion to their weight sparsity ratio
   (``scoring.weight_sparsity``), within bounds, scaled until the target in MACs, parameters or channels is met
   exactly;
2. in every group the channels with the lowest scores of the criterion are candidates, except those that were shielded
   in the last steps, and those much used in training: the running mean of the magnitude of Σ ⟨W[:, c], dL/dW[:, c]⟩
   over the weights that read a channel (a padded shortcut has none, so its part is left out);
3. the candidates are closed on trial, and a few batches run forward and backward. A candidate is protected and
   shielded, if the gradient of its gate, in front of everything that reads it, is far above those of the others and
   says that opening it lowers the loss, by more than the loss depends on the next channel in line. That one takes its
   place, so that the target stays met. Channels that were closed before stay: behind gates only newly closed ones are
   candidates of the protection;
4. the rest is closed until the next step. ``gate``: readers are deaf to the channel, and its weights get no gradient
   (momentum runs out, weight decay goes on). ``straight_through``: the weights that read it go on learning as if it
   were open (as in DPF, Lin et al., 2020, https://arxiv.org/abs/2006.07253). In both the masked network is the compact
   one at every moment, but for norms that mix channels (LayerNorm, GroupNorm), which see all of them until the removal.
   ``zeroise``: the filters are set to zero and train on, as in SFP (He et al., 2018, https://arxiv.org/abs/1808.06866).

After ``soft_share`` of the epochs the channels closed last are removed, certified; the optimizer keeps the moments of
what is left, and the compact network trains on.

Departures from our own notes on the method, where they say otherwise: the bound of a step is relative to the pace of
the schedule, and the target is met even where the bounds would not allow it; the default criterion
looks at all weights that hold a channel, because with gates the writers of closed channels get no gradient; readers of
closed channels do not learn by default, a channel closed behind a gate is not brought back by its gradient, and one is
protected only where it is worth more than what takes its place; by default two standard deviations (not one), a tenth
of the candidates (not a quarter) and no second probe of those that took the places: the page of the method says what
led to these. The place is always taken; where protection leaves too few candidates, that of used channels ends first,
then that of shielded ones, then all. Statistics of norms are not measured anew right after the removal, training goes
on there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from nni_prune_ext.allocation import Allocation
from nni_prune_ext.data.batches import EPOCH_STRIDE
from nni_prune_ext.errors import ConfigError, PluginError, TargetError
from nni_prune_ext.masked_weights import Readings, gate_consumers
from nni_prune_ext.methods.base import JsonState, MethodContext, MethodSpec, Outcome, Phase, PruningMethod
from nni_prune_ext.methods.psap_options import PsapOptions
from nni_prune_ext.methods.psap_protection import (
    check_reach,
    drawn,
    gate_probe,
    important,
    literal_probe,
    zero_writers,
)
from nni_prune_ext.methods.psap_ratios import adaptive_ratios, relative_ratios
from nni_prune_ext.plan import plan_from_channels, removed_channels
from nni_prune_ext.registry import load_plugin
from nni_prune_ext.schedules import build_schedule, informed_ratio_policy
from nni_prune_ext.scoring.gradient_statistics import gate_gradients
from nni_prune_ext.scoring.group_reduction import writer_rows
from nni_prune_ext.scoring.weight_sparsity import weight_sparsity
from nni_prune_ext.surgery import Removal

_ROUNDS = 5
"""Rounds in which a step's ratios and the share of channels that meets the target settle."""
_MEMORY = 0.9
"""What the running mean of the use of a channel keeps from step to step."""


class Psap(PruningMethod):
    """Prunes softly while it trains, removes, and trains on; see the module's docstring.

    Attributes:
        closed: group → ``(num_channels,)`` bool on the CPU, ``True`` = pruned for now.
        shields: group → ``(num_channels,)`` int64, pruning steps for which a channel stays protected.
        use: group → ``(num_channels,)``, running mean of the magnitude of the gate gradient in training.
        ever: ``protected`` and ``revived`` → group → ``(num_channels,)`` bool, what was so in any step.
        ratios: group → share of its channels that is closed.
    """

    def __init__(self, options: PsapOptions) -> None:
        self.options = options
        self.closed: dict[str, Tensor] = {}
        self.shields: dict[str, Tensor] = {}
        self.use: dict[str, Tensor] = {}
        self.ever: dict[str, dict[str, Tensor]] = {"protected": {}, "revived": {}}
        self.ratios: dict[str, float] = {}
        self._seen: dict[str, float] = {}
        self._pace = 0.0
        self._readings = Readings([], set())
        self._row: Tensor | None = None
        self._line: dict[str, Tensor] = {}
        self._facts = {"protected": 0.0, "revived": 0.0}

    def phases(self) -> Sequence[Phase]:
        """Returns one phase: one training, one optimizer."""
        return [Phase("prune and train", self.options.epochs)]

    def start(self, context: MethodContext, phase: Phase) -> None:
        """Refuses what could not work, and opens all channels."""
        if not len(context.groups):
            raise ConfigError(
                f"There is no channel of {type(context.model).__name__} that may be removed, expected one group at "
                "least. Exclude fewer layers."
            )
        build_schedule(self.options.schedule)
        if self.options.ratio_policy is not None:
            informed_ratio_policy(self.options.ratio_policy, context, self._seen)
        _criterion(self.options.criterion)
        flat = {group.name: torch.zeros(group.num_channels) for group in context.groups}
        largest = context.allocate(flat, ratios=dict.fromkeys(flat, 1.0)).largest
        if self.options.protect != "none":
            check_reach(context, {name for name, share in largest.items() if share > 0})
        for group in context.groups:
            self.closed[group.name] = torch.zeros(group.num_channels, dtype=torch.bool)
            self.shields[group.name] = torch.zeros(group.num_channels, dtype=torch.int64)
            self.use[group.name] = torch.zeros(group.num_channels)
            for own in self.ever.values():
                own[group.name] = torch.zeros(group.num_channels, dtype=torch.bool)
        self.ratios = dict.fromkeys(flat, 0.0)

    def attach(self, context: MethodContext, phase: Phase) -> None:
        """Lets readers be deaf to closed channels."""
        if self.closed and self.options.mode != "zeroise":
            self._read(context)

    def after_backward(self, context: MethodContext) -> None:
        """Notes how much the loss depends on every channel."""
        if not self.closed or self.options.protect == "none":
            return
        tensors = dict(context.model.named_parameters())
        for group in context.groups:
            now = gate_gradients(group, tensors).abs()
            self.use[group.name] = _MEMORY * self.use[group.name].to(now) + (1 - _MEMORY) * now

    def after_epoch(self, context: MethodContext, phase: Phase, epoch: int) -> None:
        """Prunes, and removes what is closed when it is time."""
        self._readings.check()
        done, last = epoch + 1, self.options.soft_epochs
        if done > last or (done % self.options.interval and done < last):
            return
        self._prune(context, -(-done // self.options.interval))
        if done == last:
            context.apply(plan_from_channels(context.groups, {n: gone.numpy() for n, gone in self.closed.items()}))

    def on_removed(self, context: MethodContext, removal: Removal) -> None:
        """Forgets what was about channels: those that are left stay."""
        self.closed, self.shields, self.use, self.ever = {}, {}, {}, {"protected": {}, "revived": {}}
        self._readings = Readings([], set())

    def finish(self, context: MethodContext) -> Outcome:
        """Hands over the facts; the channels are gone already."""
        return Outcome(plan_from_channels(context.groups, {}), facts=self._facts)

    def state_dict(self) -> tuple[dict[str, Tensor], JsonState]:
        """Returns what is closed and shielded, how much channels are used, ratios, what was seen of data, facts."""
        parts = {"closed": self.closed, "shield": self.shields, "use": self.use, **self.ever}
        tensors = {f"{part}/{name}": tensor for part, own in parts.items() for name, tensor in own.items()}
        numbers = {"ratios": dict(self.ratios), "seen": dict(self._seen), "facts": dict(self._facts)}
        return tensors, {"pace": self._pace, **numbers}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: JsonState) -> None:
        """Restores what ``state_dict`` returned."""
        own: dict[str, dict[str, Tensor]] = {"closed": {}, "shield": {}, "use": {}, "protected": {}, "revived": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            own[part][name] = tensor
        self.closed, self.shields, self.use = own["closed"], own["shield"], own["use"]
        self.ever = {"protected": own["protected"], "revived": own["revived"]}
        self._pace = float(cast("float", values["pace"]))
        self.ratios = dict(cast("dict[str, float]", values["ratios"]))
        self._seen = dict(cast("dict[str, float]", values["seen"]))
        self._facts = dict(cast("dict[str, float]", values["facts"]))

    def _prune(self, context: MethodContext, step: int) -> None:
        """Closes the channels of one pruning step, and notes what happened."""
        fraction = build_schedule(self.options.schedule)(step / self.options.steps)
        before = {name: gone.clone() for name, gone in self.closed.items()}
        sparsity = self._sparsity(context)
        scores = {name: score.cpu() for name, score in _criterion(self.options.criterion)(context).items()}
        ratios = self._ratios(context, scores, sparsity, fraction, step / self.options.steps)
        protected = {name: torch.zeros_like(gone) for name, gone in before.items()}
        held = [{name: shield > 0 for name, shield in self.shields.items()}, self._used(context)]
        allocation = self._chosen(context, scores, ratios, fraction, held)
        for _ in range(0 if self.options.protect == "none" else 1 + self.options.refills):
            found = self._protected(context, step, before, protected)
            if not any(bool(own.any()) for own in found.values()):
                break
            protected = {name: protected[name] | own for name, own in found.items()}
            allocation = self._chosen(context, scores, ratios, fraction, [protected, *held])
        protected = {name: own & ~self.closed[name] for name, own in protected.items()}
        for name, own in protected.items():
            self.shields[name] = torch.where(own, self.options.shield_steps, (self.shields[name] - 1).clamp(min=0))
        if self.options.mode == "zeroise":
            zero_writers(context, self.closed)
        self.ratios = {name: float(gone.float().mean()) for name, gone in self.closed.items()}
        events = {"protected": protected, "revived": {name: own & ~self.closed[name] for name, own in before.items()}}
        counts = {}
        for key, found in events.items():
            counts[key] = sum(int(own.sum()) for own in found.values())
            self.ever[key] = {name: own | found[name] for name, own in self.ever[key].items()}
            left = sum(int((own & ~self.closed[name]).sum()) for name, own in self.ever[key].items())
            self._facts |= {key: self._facts[key] + counts[key], f"{key}_and_left": left}
        context.log(
            {
                "share_of_target": fraction,
                "share_of_channels": allocation.predicted["ratio"],
                **counts,
                **{f"ratio/{name}": ratio for name, ratio in self.ratios.items()},
                **{f"weight_sparsity/{name}": ratio for name, ratio in sparsity.items()},
            }
        )

    def _sparsity(self, context: MethodContext) -> dict[str, float]:
        own = self.options
        return weight_sparsity(_rows(context), threshold=own.sparsity_threshold, level=own.sparsity_level)

    def _ratios(
        self,
        context: MethodContext,
        scores: Mapping[str, Tensor],
        sparsity: Mapping[str, float],
        fraction: float,
        progress: float,
    ) -> dict[str, float]:
        """Returns the ratios of a step, before they are scaled to meet the target exactly."""
        if self.options.ratio_policy is None:
            relative = relative_ratios(sparsity)
        else:
            policy = informed_ratio_policy(self.options.ratio_policy, context, self._seen)
            relative = dict(policy(_rows(context), self.ratios, progress))
        sizes, ratios, share = {group.name: group.num_channels for group in context.groups}, relative, 0.0
        for _ in range(_ROUNDS):  # bounds move ratios to channels that cost more or less, so that others are due
            allocation = context.allocate(scores, fraction=fraction, ratios=ratios)
            share = allocation.predicted["ratio"]
            ratios = adaptive_ratios(
                relative,
                self.ratios,
                sizes,
                share,
                step_bound=self.options.step_bound,
                largest={name: min(own, self.options.largest_ratio) for name, own in allocation.largest.items()},
                pace=max(share - self._pace, 0.0),
            )
            if not any(ratios.values()):
                ratios = relative
                break
        self._pace = share
        return ratios

    def _chosen(
        self,
        context: MethodContext,
        scores: Mapping[str, Tensor],
        ratios: Mapping[str, float],
        fraction: float,
        held: Sequence[Mapping[str, Tensor]],
    ) -> Allocation:
        """Closes the candidates of a step: as many as the target needs, none that is held if that is possible.

        Args:
            held: group → ``(num_channels,)`` bool, several times; the last ones are given up first.
        """
        spared = list(held)
        while True:
            open_scores = dict(scores)
            for own in spared:
                open_scores = {n: score.masked_fill(own[n].cpu(), torch.inf) for n, score in open_scores.items()}
            try:
                allocation = context.allocate(open_scores, fraction=fraction, ratios=ratios)
                break
            except TargetError:
                if not spared:
                    raise
                spared.pop()
        gone = removed_channels(allocation.plan, context.groups)
        self.closed = {name: torch.from_numpy(own) for name, own in gone.items()}
        self._line = open_scores
        self._row = None
        return allocation

    def _used(self, context: MethodContext) -> dict[str, Tensor]:
        """Returns the channels that training uses much more than others of their group."""
        if self.options.protect == "none":
            return {name: torch.zeros_like(gone) for name, gone in self.closed.items()}
        return {
            name: use > use[heard].mean() + self.options.use_deviations * use[heard].std(correction=0)
            for name, use in context.agreed(self.use).items()
            for heard in [~self.closed[name].to(use.device)]
        }

    def _protected(
        self, context: MethodContext, step: int, before: Mapping[str, Tensor], already: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Probes the channels that are closed now; returns those to protect."""
        own = self.options
        before_probe = self._readings
        try:
            if own.protect == "literal":
                self._row = self._all_open(context)
                found = literal_probe(context, own.probe_batches, self.closed)
            else:
                if own.mode != "gate":  # its readings pass no gradient to the gates, or there are none
                    self._silent(before_probe)
                    self._readings = gate_consumers(context.model, context.groups, lambda: self._gates(context))
                self._row = self._gates(context).clone().requires_grad_()
                found = gate_probe(context, own.probe_batches, self._row)
        finally:
            self._row = None
            if self._readings is not before_probe:
                self._silent(self._readings)
                self._readings = Readings([], set())
                if own.mode == "straight_through":
                    self._read(context)
        generator = torch.Generator().manual_seed(context.seed * EPOCH_STRIDE + step)
        chosen = {}
        for name, gone in self.closed.items():
            candidates = gone if own.mode == "zeroise" else gone & ~before[name]
            best = important(
                *found[name], gone, candidates, self._next(name),
                deviations=own.probe_deviations, share=own.protected_share,
            )  # fmt: skip
            best = drawn(candidates, int(best.sum()), generator) if own.protect == "random" else best
            chosen[name] = best & ~already[name]
        return chosen

    def _next(self, name: str) -> Tensor:
        """Returns the open channels of a group that may be closed, lowest scores first, ``(K,)``."""
        scores = self._line[name].masked_fill(self.closed[name], torch.inf)
        order = scores.argsort(stable=True)
        return order[scores[order] < torch.inf]

    def _read(self, context: MethodContext) -> None:
        """Lets readers be deaf to closed channels until the phase ends, or a cut."""
        learn = self.options.mode == "straight_through"
        self._readings = gate_consumers(context.model, context.groups, lambda: self._gates(context), learn_closed=learn)
        for handle in self._readings.handles:
            context.on_leave(handle.remove)

    @staticmethod
    def _silent(readings: Readings) -> None:
        for handle in readings.handles:
            handle.remove()

    def _gates(self, context: MethodContext) -> Tensor:
        """Returns one gate per channel of all groups and a 1 behind them."""
        if self._row is None:
            row = torch.cat([self.closed[group.name] for group in context.groups]).to(torch.float32)
            self._row = self._all_open(context)
            self._row[:-1] -= row.to(self._row)
        return self._row

    def _all_open(self, context: MethodContext) -> Tensor:
        return torch.ones(context.groups.num_channels + 1, device=next(context.model.parameters()).device)


def _rows(context: MethodContext) -> dict[str, list[Tensor]]:
    tensors = dict(context.model.named_parameters())
    return {group.name: writer_rows(group, tensors) for group in context.groups}


def _criterion(name: str) -> Callable[[MethodContext], Mapping[str, Tensor]]:
    """Returns the scores of a registered pruner, with its default options.

    Raises:
        UnknownPluginError: no such name.
        ConfigError: it gives no scores.
    """
    spec = load_plugin("pruners", name)
    if not isinstance(spec, MethodSpec):
        raise PluginError(f"The pruner '{name}' is a {type(spec).__name__}, expected a MethodSpec. Mend its package.")
    scores, options = spec.scores, spec.options()
    if scores is None:
        raise ConfigError(
            f"The criterion '{name}' gives no scores of channels: it decides in phases of its own. Expected a pruner "
            "that is a criterion, for example l2 or taylor. Choose one of these."
        )
    return lambda context: scores(context, options)


PSAP = MethodSpec(
    "psap",
    "PSAP (re-derived from the abstract): ratios from weight sparsity, gradients protect channels",
    "https://arxiv.org/abs/2303.11881",
    PsapOptions,
    Psap,
    needs_data=True,
    changes_structure=True,
    demo_options={"epochs": 3, "soft_share": 0.7, "probe_batches": 2},
)
