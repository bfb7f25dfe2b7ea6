"""A toy method that acts during training: channels are zeroed and may come back, part of the cut happens on the way.

It exists to try what plugins rely on: cuts between epochs, optimizers and masks that follow them, resuming in between.
Run it by its place: ``--method nni_prune_ext.testing.toy_controller:CONTROLLER``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.methods.base import JsonState, MethodContext, MethodSpec, Outcome, Phase, PruningMethod
from nni_prune_ext.plan import plan_from_channels, removed_channels
from nni_prune_ext.schedules import build_mask_update_rule, build_schedule, informed_ratio_policy
from nni_prune_ext.scoring.group_reduction import group_importance, writer_rows
from nni_prune_ext.scoring.weight_norms import l2_norm
from nni_prune_ext.surgery import Removal


class ControllerOptions(BaseModel):
    """Epochs in all, the epoch after which a first part is cut, and three schedulers by name."""

    model_config = ConfigDict(extra="forbid")

    epochs: int = Field(default=3, ge=1, le=1000)
    cut_after: int = Field(default=2, ge=0, le=1000)
    ratio_policy: str = "uniform_ratio"
    rule: str = "replace"
    schedule: str = "agp"


class Controller(PruningMethod):
    """After every epoch: new scores, new ratios, a new mask; zeroed filters keep their momentum and may revive."""

    def __init__(self, options: ControllerOptions) -> None:
        self.options = options
        self.masks: dict[str, Tensor] = {}
        self.ratios: dict[str, float] = {}
        self.seen: dict[str, float] = {}
        self.revived = 0

    def phases(self) -> Sequence[Phase]:
        """Returns the epochs before and after the first cut."""
        early = min(self.options.cut_after, self.options.epochs)
        return [Phase("soft", early), Phase("hard", self.options.epochs - early)]

    def start(self, context: MethodContext, phase: Phase) -> None:
        """Opens all masks."""
        for group in context.groups:
            self.masks.setdefault(group.name, torch.ones(group.num_channels, dtype=torch.bool))
            self.ratios.setdefault(group.name, 0.0)

    def after_epoch(self, context: MethodContext, phase: Phase, epoch: int) -> None:
        """Renews scores, ratios and masks; cuts what is masked at the end of the first phase."""
        scores = self._scores(context)
        tensors = dict(context.model.named_parameters())
        weights = {group.name: writer_rows(group, tensors) for group in context.groups}
        policy = informed_ratio_policy(self.options.ratio_policy, context, self.seen)
        ratios = policy(weights, self.ratios, context.progress)
        fraction = build_schedule(self.options.schedule)(context.progress)
        allocation = context.allocate(scores, fraction=fraction, ratios=ratios)
        gone = removed_channels(allocation.plan, context.groups)
        rule = build_mask_update_rule(self.options.rule)
        for name, old in self.masks.items():
            mask = rule(old, torch.from_numpy(~gone[name]), scores[name], context.progress)
            self.revived += int((mask & ~old).sum())
            self.masks[name] = mask
        self.ratios = dict(allocation.ratios)
        if phase.name == "soft" and epoch == phase.epochs - 1:
            context.apply(
                plan_from_channels(context.groups, {name: (~mask).numpy() for name, mask in self.masks.items()})
            )
        self._zero(context)

    def on_removed(self, context: MethodContext, removal: Removal) -> None:
        """Cuts the masks."""
        for name, gone in removed_channels(removal.plan, removal.groups).items():
            self.masks[name] = self.masks[name][torch.from_numpy(~gone)]

    def finish(self, context: MethodContext) -> Outcome:
        """Plans the rest of the way to the target."""
        return Outcome(context.allocate(self._scores(context)).plan, facts={"revived": float(self.revived)})

    def state_dict(self) -> tuple[dict[str, Tensor], JsonState]:
        """Returns masks, ratios, what was seen of data, and the count of revived channels."""
        return dict(self.masks), {"ratios": self.ratios, "seen": self.seen, "revived": self.revived}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: JsonState) -> None:
        """Restores them."""
        self.masks = dict(tensors)
        self.ratios, self.revived = cast("dict[str, float]", values["ratios"]), cast("int", values["revived"])
        self.seen = cast("dict[str, float]", values["seen"])

    def _scores(self, context: MethodContext) -> dict[str, Tensor]:
        tensors = dict(context.model.named_parameters())
        return {group.name: group_importance(group, tensors, l2_norm) for group in context.groups}

    def _zero(self, context: MethodContext) -> None:
        tensors = dict(context.model.named_parameters())
        with torch.no_grad():
            for group in context.groups:
                for member in group.by_role(Role.WRITER, Role.BIAS):
                    if member.tensor in tensors:
                        dead = member.index[(~self.masks[group.name]).numpy()[member.channel]]
                        own = tensors[member.tensor]
                        own.index_fill_(member.dim, torch.from_numpy(dead).to(own.device), 0)


CONTROLLER = MethodSpec(
    "toy_controller",
    "zeroed channels may come back",
    "none",
    ControllerOptions,
    Controller,
    needs_data=True,
    changes_structure=True,
)
