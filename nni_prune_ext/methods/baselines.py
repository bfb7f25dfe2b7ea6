"""Baseline criteria: L1, L2, FPGM, Taylor and random, in one shot or in steps along a schedule.

* L1: Li et al., "Pruning Filters for Efficient ConvNets", 2017, https://arxiv.org/abs/1608.08710
* L2: the same with the Euclidean norm
* FPGM: He et al., "Filter Pruning via Geometric Median", 2019, https://arxiv.org/abs/1811.00250
* Taylor: Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019, https://arxiv.org/abs/1906.10771
* random: a seeded uniform score, the baseline that every criterion must beat

Departures from the papers: scores are averaged over all weights that hold a channel (its writers, depthwise filters and
consumers), each normalised by its own mean, because coupled layers must agree; ratios per layer come from one global
ranking (or one uniform ratio) under a cost target instead of being set by hand; Taylor is read at a gate seen by the
consumers, which is valid in front of batch norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from nni_prune_ext.methods.base import JsonState, MethodContext, MethodSpec, Outcome, Phase, PruningMethod
from nni_prune_ext.plan import PruningPlan, plan_from_channels
from nni_prune_ext.schedules import build_schedule, informed_ratio_policy, rewinds
from nni_prune_ext.scoring.gradient_statistics import gate_gradients
from nni_prune_ext.scoring.group_reduction import group_importance, writer_rows
from nni_prune_ext.scoring.weight_norms import geometric_median_distance, l1_norm, l2_norm

Scores = Mapping[str, Tensor]


class BaselineOptions(BaseModel):
    """Options of every baseline.

    Attributes:
        steps: number of cuts on the way to the target.
        schedule: registered schedule that says how far each cut goes.
        epochs_per_step: training epochs after every cut but the last (recovery follows the last one).
        ratio_policy: registered ratio policy; ``None`` ranks the scores of all groups together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(
        default=1,
        ge=1,
        description="number of cuts on the way to the target",
        json_schema_extra={"source": "one shot, as in arXiv:1608.08710, section 3.4", "search": [1, 10]},
    )
    schedule: str = Field(
        default="linear",
        description="how far each cut goes; plays no part in one step",
        json_schema_extra={"source": "ours", "registered": "schedule"},
    )
    epochs_per_step: int = Field(
        default=0,
        ge=0,
        description="training epochs after every cut but the last",
        json_schema_extra={"source": "ours; recovery follows the last cut", "search": [0, 5]},
    )
    ratio_policy: str | None = Field(
        default=None,
        description="how ratios differ from group to group; none ranks the scores of all groups together",
        json_schema_extra={"source": "ours; the papers set ratios by hand", "registered": "ratio_policy"},
    )


class TaylorOptions(BaselineOptions):
    """Options of the Taylor baseline: ``batches`` training batches are averaged per score."""

    batches: int = Field(
        default=8,
        ge=1,
        description="training batches that are averaged for one score",
        json_schema_extra={"source": "ours; the paper averages over the batches between two cuts", "search": [1, 32]},
    )


class CriterionPruning(PruningMethod):
    """Cuts the channels with the lowest scores, in one step or several."""

    def __init__(self, options: BaselineOptions, criterion: Callable[[MethodContext], Scores]) -> None:
        self.options = options
        self.criterion = criterion
        self._ratios: dict[str, float] = {}
        self._seen: dict[str, float] = {}
        self._first: dict[str, Tensor] = {}

    def phases(self) -> Sequence[Phase]:
        """Returns one phase per cut; training follows every cut but the last."""
        steps = self.options.steps
        return [Phase(f"cut {k}", self.options.epochs_per_step if k < steps else 0) for k in range(1, steps + 1)]

    def start(self, context: MethodContext, phase: Phase) -> None:
        """Cuts up to the schedule's fraction of the target; the last cut is left to ``finish``."""
        step = int(phase.name.split()[1])
        if step == 1 and rewinds(self.options.schedule):
            self._first = {name: tensor.detach().clone() for name, tensor in context.model.state_dict().items()}
        if step < self.options.steps:
            self._cut(context, self._plan(context, step))

    def finish(self, context: MethodContext) -> Outcome:
        """Plans the last cut."""
        plan = self._plan(context, self.options.steps)
        if not self._first:
            return Outcome(plan)
        self._cut(context, plan)
        return Outcome(plan_from_channels(context.groups, {}))

    def state_dict(self) -> tuple[dict[str, Tensor], JsonState]:
        """Returns the ratios so far and what was seen of data, for the ratio policy, and weights to rewind to."""
        return dict(self._first), {"ratios": dict(self._ratios), "seen": dict(self._seen)}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: JsonState) -> None:
        """Restores them."""
        self._first = dict(tensors)
        self._ratios = dict(cast("dict[str, float]", values["ratios"]))
        self._seen = dict(cast("dict[str, float]", values["seen"]))

    def _cut(self, context: MethodContext, plan: PruningPlan) -> None:
        context.apply(plan)
        if self._first:
            context.rewind(self._first)

    def _plan(self, context: MethodContext, step: int) -> PruningPlan:
        fraction = build_schedule(self.options.schedule)(step / self.options.steps)
        if fraction <= 0:
            return plan_from_channels(context.groups, {})
        ratios = self._policy(context, step) if self.options.ratio_policy else None
        allocation = context.allocate(self.criterion(context), fraction=fraction, ratios=ratios)
        self._ratios = dict(allocation.ratios)
        return allocation.plan

    def _policy(self, context: MethodContext, step: int) -> Mapping[str, float]:
        policy = informed_ratio_policy(cast("str", self.options.ratio_policy), context, self._seen)
        tensors = dict(context.model.named_parameters())
        weights = {group.name: writer_rows(group, tensors) for group in context.groups}
        previous = {group.name: self._ratios.get(group.name, 0.0) for group in context.groups}
        return policy(weights, previous, step / self.options.steps)


def weight_criterion(rule: Callable[[Tensor], Tensor], context: MethodContext) -> Scores:
    """Scores every group from its weights alone."""
    tensors = dict(context.model.named_parameters())
    tensors |= dict(context.model.named_buffers())  # type: ignore[arg-type]
    return {group.name: group_importance(group, tensors, rule) for group in context.groups}


def random_criterion(context: MethodContext) -> Scores:
    """Scores every channel with a number drawn from the context's seed."""
    generator = torch.Generator().manual_seed(context.seed)
    return {group.name: torch.rand(group.num_channels, generator=generator) for group in context.groups}


def taylor_criterion(options: TaylorOptions, context: MethodContext) -> Scores:
    """Scores every channel with the mean magnitude of its gate gradient over a few training batches."""
    tensors: dict[str, Tensor] = dict(context.model.named_parameters())
    training = {name: module.training for name, module in context.model.named_modules()}
    required = {name: p.requires_grad for name, p in context.model.named_parameters()}
    totals = {group.name: torch.zeros(group.num_channels) for group in context.groups}
    context.model.eval().requires_grad_(True)
    try:
        for batch in context.batches(options.batches):
            context.model.zero_grad(set_to_none=True)
            context.task_loss(batch).backward()  # type: ignore[no-untyped-call]
            for group in context.groups:
                totals[group.name] += gate_gradients(group, tensors).abs().cpu() / options.batches
    finally:
        context.model.zero_grad(set_to_none=True)
        for name, module in context.model.named_modules():
            module.training = training[name]
        for name, parameter in context.model.named_parameters():
            parameter.requires_grad_(required[name])
    return totals


def _baseline(name: str, summary: str, reference: str, rule: Callable[[MethodContext], Scores]) -> MethodSpec:
    return MethodSpec(
        name,
        summary,
        reference,
        BaselineOptions,
        lambda options: CriterionPruning(options, rule),
        changes_structure=True,
        scores=lambda context, options: rule(context),
    )


L1 = _baseline(
    "l1", "smallest mean magnitude goes first", "https://arxiv.org/abs/1608.08710", partial(weight_criterion, l1_norm)
)
L2 = _baseline(
    "l2", "smallest root mean square goes first", "https://arxiv.org/abs/1608.08710", partial(weight_criterion, l2_norm)
)
FPGM = _baseline(
    "fpgm",
    "filters nearest to the geometric median go first",
    "https://arxiv.org/abs/1811.00250",
    partial(weight_criterion, geometric_median_distance),
)
RANDOM = _baseline("random", "a seeded draw: the baseline to beat", "none", random_criterion)
TAYLOR = MethodSpec(
    "taylor",
    "smallest first-order effect on the loss goes first",
    "https://arxiv.org/abs/1906.10771",
    TaylorOptions,
    lambda options: CriterionPruning(options, partial(taylor_criterion, options)),
    needs_data=True,
    changes_structure=True,
    scores=lambda context, options: taylor_criterion(options, context),
    score_options=frozenset({"batches"}),
)
