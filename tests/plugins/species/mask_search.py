"""A search: weights stay, scores behind a straight-through mask are trained, then statistics follow the mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from nni_prune_ext.methods.base import JsonState, MethodContext, MethodSpec, Outcome, Phase, PruningMethod
from species.gate_places import gate_norms


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    search_epochs: int = 2
    freeze_epochs: int = 1
    learning_rate: float = 0.1


class MaskSearch(PruningMethod):
    """Trains one score per channel; the better half of a group is open in the search."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.scores: dict[str, Tensor] = {}

    def phases(self) -> list[Phase]:
        search = Phase("search", self.options.search_epochs, trainable=lambda _: False, optimizers=self._optimizers)
        return [search, Phase("freeze", self.options.freeze_epochs, trainable=lambda _: False)]

    def start(self, context: MethodContext, phase: Phase) -> None:
        if phase.name == "search":
            self.scores = {g.name: nn.Parameter(torch.rand(g.num_channels)) for g in context.groups}

    def attach(self, context: MethodContext, phase: Phase) -> None:
        if phase.name == "search":
            context.model.eval()  # the statistics are those of the weights; they follow the mask in the second phase
        for group in context.groups:
            for handle in gate_norms(context.model, group, lambda _, name=group.name: self._gate(name)):
                context.on_leave(handle.remove)

    def finish(self, context: MethodContext) -> Outcome:
        return Outcome(context.allocate(self.scores).plan)

    def state_dict(self) -> tuple[dict[str, Tensor], JsonState]:
        return dict(self.scores), {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: JsonState) -> None:
        self.scores = {name: nn.Parameter(tensor) for name, tensor in tensors.items()}

    def _gate(self, name: str) -> Tensor:
        score = self.scores[name]
        return (score >= score.median()).float() + score - score.detach()

    def _optimizers(self, context: MethodContext) -> Sequence[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.scores.values(), lr=self.options.learning_rate, momentum=0.9)]


MASK_SEARCH = MethodSpec(
    "toy_mask_search",
    "scores are trained, weights are not",
    "none",
    Options,
    MaskSearch,
    needs_data=True,
    own_optimizers=True,
)
