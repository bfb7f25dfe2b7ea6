"""A gated network: small gates look at each input; the product is the gated network beside a plan."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from nni_prune_ext.graph.channel_groups import ChannelGroups, trace_channel_groups
from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.methods.base import Batch, JsonState, MethodContext, MethodSpec, Outcome, Phase, PruningMethod
from nni_prune_ext.plan import plan_from_channels, removed_channels
from nni_prune_ext.surgery import Removal
from species.gate_places import gate_norms


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    epochs: int = 2
    sparsity: float = 0.1


class GatedModel(nn.Module):
    """A network with one gate per group; the gates are on the network only while it runs."""

    def __init__(self, model: nn.Module, gates: nn.ModuleList, groups: ChannelGroups) -> None:
        super().__init__()
        self.model, self.gates, self.groups = model, gates, groups

    def forward(self, *args: Tensor) -> Tensor:
        handles = place(self.model, self.gates, self.groups)
        try:
            return self.model(*args)
        finally:
            for handle in handles:
                handle.remove()


class Gating(PruningMethod):
    """Trains network and gates together; a gate that is open on average belongs to an important channel."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.gates = nn.ModuleList()

    def phases(self) -> list[Phase]:
        return [Phase("gates", self.options.epochs, optimizers=self._optimizers)]

    def start(self, context: MethodContext, phase: Phase) -> None:
        self.gates = nn.ModuleList(nn.Linear(g.num_channels, g.num_channels) for g in context.groups)

    def attach(self, context: MethodContext, phase: Phase) -> None:
        for handle in place(context.model, self.gates, context.groups):
            context.on_leave(handle.remove)

    def compute_loss(self, context: MethodContext, batch: Batch) -> Tensor:
        penalty = torch.stack([gate.bias.sigmoid().mean() for gate in self.gates]).mean()
        return context.task_loss(batch) + self.options.sparsity * penalty

    def finish(self, context: MethodContext) -> Outcome:
        scores = {group.name: gate.bias.detach() for group, gate in zip(context.groups, self.gates)}
        context.apply(context.allocate(scores).plan)
        gated = GatedModel(copy.deepcopy(context.model), copy.deepcopy(self.gates), context.groups)
        return Outcome(plan_from_channels(context.groups, {}), gated_model=gated)

    def on_removed(self, context: MethodContext, removal: Removal) -> None:
        gone = removed_channels(removal.plan, removal.groups)
        for position, group in enumerate(removal.groups):
            kept, old = torch.from_numpy(~gone[group.name]), self.gates[position]
            new = nn.Linear(int(kept.sum()), int(kept.sum()))
            new.load_state_dict({"weight": old.weight.detach()[kept][:, kept], "bias": old.bias.detach()[kept]})
            self.gates[position] = new

    def state_dict(self) -> tuple[dict[str, Tensor], JsonState]:
        return dict(self.gates.state_dict()), {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: JsonState) -> None:
        widths = [len(tensor) for name, tensor in tensors.items() if name.endswith("bias")]
        self.gates = nn.ModuleList(nn.Linear(width, width) for width in widths)
        self.gates.load_state_dict(dict(tensors))

    def _optimizers(self, context: MethodContext) -> Sequence[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.gates.parameters(), lr=1e-2)]


def place(model: nn.Module, gates: nn.ModuleList, groups: ChannelGroups) -> list:
    """Puts every gate behind the norms of its group; a norm that holds all channels in order feeds it."""
    return [
        handle
        for group, gate in zip(groups, gates)
        for handle in gate_norms(model, group, lambda x, gate=gate: gate(x.mean((2, 3))).sigmoid())
    ]


def build_gated(
    compact: nn.Module, options: Options, example_inputs: ExampleInputs, tensors: Mapping[str, Tensor]
) -> GatedModel:
    groups = trace_channel_groups(compact, example_inputs)
    return GatedModel(compact, nn.ModuleList(nn.Linear(g.num_channels, g.num_channels) for g in groups), groups)


GATED = MethodSpec(
    "toy_gated", "each input opens its own channels", "none", Options, Gating, needs_data=True, own_optimizers=True,
    products=frozenset({"plan", "gated_model"}), changes_structure=True, build_gated=build_gated,
)  # fmt: skip
