"""Methods that decide by training or search, not by scores, as torch-pruning importances.

Such a method runs once, on a copy of the model, and is asked for as many channels as torch-pruning will take: it rounds
in every layer (``local``) or once (``global``). What the method would remove then scores below all that it keeps, so
that torch-pruning, asked for the same share, selects that. Where it cannot, a warning is logged: behind a padded
shortcut, one index of torch-pruning stands for channels of several groups, and others are never asked for.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from nni_prune_ext.adapters.torch_pruning_groups import HostGroup, written_place
from nni_prune_ext.adapters.torch_pruning_importance import MethodImportance
from nni_prune_ext.allocation import LayerLimit, Limits, Scope, Target
from nni_prune_ext.allocation.goals import checked_scope
from nni_prune_ext.errors import ConfigError, PluginError
from nni_prune_ext.graph.channel_groups import ChannelGroups
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.methods.base import MethodSpec
from nni_prune_ext.pipeline import method_options, method_spec
from nni_prune_ext.plan import removed_channels
from nni_prune_ext.scoring.group_reduction import group_importance
from nni_prune_ext.scoring.weight_norms import l1_norm
from nni_prune_ext.training import Batches, LossFunction, TrainingSettings, cross_entropy, drive
from nni_prune_ext.training.method_run import MethodRun

_logger = logging.getLogger(__name__)


class DecisionImportance(MethodImportance):
    """Scores torch-pruning's groups by the decision of a method that gives no scores itself.

    The method runs all its phases when the first score is asked for, on a copy: the model that is pruned keeps its
    weights. So nothing is tuned (``tune_epochs``, where a method has it, is 0); tune after the cut.

    The decision is made once, for one share of every group as it was then. A group that was cut has no scores any more:
    ``iterative_steps`` must be 1. For a further step make a new importance and a new pruner.

    Attributes:
        decision: group → score per channel, ``None`` before the method ran. What the method removes lies in 0–1, what
            it keeps above 1, each ordered by the mean magnitude of the weights that hold a channel.
        facts: the numbers that the method hands over.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        *,
        pruning_ratio: float,
        scope: Scope = "local",
        ignored_layers: Sequence[nn.Module] = (),
        batches: Batches | None = None,
        loss: LossFunction = cross_entropy,
        seed: int = 0,
        options: dict[str, object] | None = None,
        settings: TrainingSettings | None = None,
    ) -> None:
        """Takes the model that the pruner will cut; nothing is traced or trained yet.

        Args:
            pruning_ratio: what the pruner is asked for, above 0 and below 1.
            scope: ``global`` where the pruner has ``global_pruning=True``.
            ignored_layers: those of the pruner; their channels stay in the method's run, too.
            batches: training data, needed by data-driven methods.
            loss: the user's loss of the model on a batch.
            seed: of everything random.
            options: configuration of the method.
            settings: how the method's phases train, where the method leaves that open.

        Raises:
            ConfigError: the ratio, scope or options are out of range, data is missing, or another version of
                torch-pruning.
            PluginError: the method removes no channels.
        """
        if isinstance(pruning_ratio, bool) or not isinstance(pruning_ratio, (int, float)) or not 0 < pruning_ratio < 1:
            raise ConfigError(
                f"The pruning_ratio of {type(self).__name__} is {pruning_ratio!r}, expected a number above 0 and below "
                "1: the share of channels to remove. Pass the one that the pruner gets."
            )
        super().__init__(model, example_inputs, batches=batches, loss=loss, seed=seed, options=options)
        self.options = _without_tuning(self.spec, options)
        self.pruning_ratio = float(pruning_ratio)
        self.scope = checked_scope(scope)
        self.settings = settings or TrainingSettings()
        self.decision: dict[str, Tensor] | None = None
        self.facts: dict[str, float] = {}
        self._warned: set[str] = set()
        self._ignored = [part for layer in ignored_layers for part in layer.modules()]

    def __call__(self, group: HostGroup) -> Tensor | None:
        """Returns one score per index of the group's first item, higher = keep.

        Returns:
            ``(len(group[0].idxs),)`` float32 on the CPU, or ``None`` where the channels must stay.

        Raises:
            ModelError: the group is of another model.
            ConfigError: the group was cut since the method decided.
            TargetError: so many channels cannot be removed.
        """
        scores = super().__call__(group)
        if scores is not None and bool(torch.isnan(scores).any()):
            raise ConfigError(
                f"The group of '{self._root(group)}' was cut since the method '{self.spec.name}' decided over it, "
                "expected the channels of then: a decision holds for one step. Set iterative_steps=1; for a further "
                f"step make a new {type(self).__name__} and a new pruner."
            )
        if scores is not None:
            self._compare(group, scores)
        return scores

    @staticmethod
    def _usable(name: str) -> MethodSpec:
        return deciding_method(name)

    def _score(self, groups: ChannelGroups) -> Tensor:
        """Returns the scores of all channels of all groups in a row, NaN for groups that were cut since."""
        if self.decision is None:
            self.decision = self._decided(groups)
        found = []
        for group in groups:
            scores = self.decision.get(group.name, torch.zeros(0))
            known = len(scores) == group.num_channels
            found.append(scores if known else torch.full((group.num_channels,), torch.nan))
        return torch.cat(found) if found else torch.zeros(0)

    def _decided(self, groups: ChannelGroups) -> dict[str, Tensor]:
        """Runs the method on a copy; returns group → scores."""
        open_groups = groups.protecting(self._held(groups))
        tensors = dict(self.model.named_parameters())
        sizes = {g.name: group_importance(g, tensors, l1_norm).detach().float().cpu() for g in groups}
        scores = {name: 1 + size / (1 + size) for name, size in sizes.items()}
        if not len(open_groups):
            return scores
        target, limits = _as_host_counts(open_groups, self.pruning_ratio, self.scope)
        run = MethodRun(
            model=copy.deepcopy(self.model),
            batches_=() if self.batches is None else self.batches,
            loss=self.loss,
            settings=self.settings,
            example_inputs=self.example_inputs,
            groups=open_groups,
            targets=(target,),
            limits=limits,
            scope=self.scope,
            seed=self.seed,
        )
        with torch.enable_grad():  # torch-pruning asks for scores without
            outcome = drive(self.spec.build(self.options), run)
        self.facts = dict(outcome.facts)
        plan = outcome.plan if run.applied is None else run.applied.then(outcome.plan)
        for name, gone in removed_channels(plan, open_groups).items():
            scores[name] -= torch.from_numpy(gone).float()
        return scores

    def _compare(self, group: HostGroup, scores: Tensor) -> None:
        """Warns, once per group, where torch-pruning will take other channels than the method decided."""
        root, place = self._root(group), written_place(group[0].dep, self._names)
        behind = self._numbers.behind(group, self._names)
        if behind is None or place is None or root in self._warned or len(behind) != len(self._numbers.places[place]):
            return  # asked for a part of a layer
        self._warned.add(root)
        values = scores.numpy()
        if self.scope == "local":
            distinct = len({tuple(channels) for channels in behind})
            taken = np.argsort(values, kind="stable")[
                : _host_count(distinct, self.pruning_ratio) * len(values) // distinct
            ]
        else:
            taken = np.flatnonzero(values < 1)
        known, first = np.unique(np.concatenate(behind)), self._numbers.first
        decision = self.decision or {}
        touched = [
            name for name, start in first.items() if np.isin(start + np.arange(len(decision[name])), known).any()
        ]
        decided = {first[name] + int(k) for name in touched for k in (decision[name] < 1).nonzero()[:, 0]}
        takes = {int(number) for index in taken for number in behind[index]}
        if takes != decided:
            _logger.warning(
                "The method '%s' removes %d of %d channels of %s, but of group '%s' torch-pruning will take%s %d of %d "
                "indices, which stand for %d channels, %d of them decided otherwise. Prune with nni_prune_ext.prune to "
                "carry out the decision.",
                self.spec.name, len(decided), sum(len(decision[name]) for name in touched), ", ".join(touched), root,
                "" if self.scope == "local" else " about", len(taken), len(values), len(takes), len(takes - decided),
            )  # fmt: skip

    def _held(self, groups: ChannelGroups) -> dict[str, str]:
        """Returns group → reason for the groups that torch-pruning leaves alone because a layer of them is ignored."""
        ignored = {name for name, module in self.model.named_modules() if any(module is own for own in self._ignored)}
        return {
            group.name: f"'{member.tensor}' is in ignored_layers"
            for group in groups
            for member in group.members
            if member.role is not Role.CONSUMER and member.tensor.rpartition(".")[0] in ignored
        }


def deciding_method(name: str) -> MethodSpec:
    """Returns a registered method that removes channels.

    Raises:
        UnknownPluginError: no such method.
        PluginError: what it hands over is something else.
    """
    spec = method_spec(name)
    if "plan" not in spec.products:
        raise PluginError(
            f"The method '{name}' hands over {', '.join(sorted(spec.products)) or 'nothing'}, expected a plan: "
            "torch-pruning removes channels. Use it through nni_prune_ext.prune."
        )
    return spec


def _as_host_counts(groups: ChannelGroups, ratio: float, scope: Scope) -> tuple[Target, Limits]:
    """Returns what makes a plan remove as many channels as torch-pruning: of every group, or of all together."""
    total = groups.num_channels
    if scope == "global":
        asked = min(_host_count(total, ratio), total - len(groups))
        return Target("ratio", asked / total), Limits(max_ratio=1.0, multiple=1)
    counts = {g.name: min(_host_count(g.num_channels, ratio), g.num_channels - 1) for g in groups}
    shares = {g.name: counts[g.name] / g.num_channels for g in groups}
    layers = {name: LayerLimit(min_ratio=share, max_ratio=share) for name, share in shares.items()}
    return Target("ratio", sum(counts.values()) / total), Limits(max_ratio=1.0, multiple=1, layers=layers)


def _host_count(channels: int, ratio: float) -> int:
    """Returns how many of so many channels torch-pruning takes; in floats, as it counts."""
    return channels - int(channels * (1 - ratio))


def _without_tuning(spec: MethodSpec, options: dict[str, object] | None) -> BaseModel:
    """Returns the options of a method that trains no weights which are thrown away.

    Raises:
        ConfigError: epochs of tuning were asked for.
    """
    if "tune_epochs" not in spec.options.model_fields:
        return method_options(spec, options)
    asked = method_options(spec, {"tune_epochs": 0, **(options or {})})
    epochs = getattr(asked, "tune_epochs", 0)
    if epochs:
        raise ConfigError(
            f"tune_epochs={epochs} was asked for, expected 0: what the method '{spec.name}' trains in its copy does "
            "not come into the model that torch-pruning cuts. Leave it out, and train after the cut."
        )
    return asked
