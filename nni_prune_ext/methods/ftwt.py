"""FTWT: small heads predict, image by image, which filters will matter; the others are switched off.

Elkerdawy et al., "Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised Mask Prediction", CVPR
2022, https://arxiv.org/abs/2110.08232; details from the authors' code (https://github.com/selkerdawy/FTWT). The body of
the paper was not available to us; its figure, losses and tables were.

Every gated convolution gets a head: global max pooling of its input, softmax over channels, one 1×1 convolution
(``gates.heads``). Its targets are made from the layer's own activations before they are switched: the filters that hold
the ``mass`` of the heat, for this image (``gates.firing_targets``). Task loss and mask loss are decoupled: no gradient
of the task reaches the heads, because masks are rounded; no gradient of the heads reaches the network, because their
input is detached (``mode="joint"`` lets it). The heads learn in the first half of the epochs and stand still in the
second. Gates sit behind the norm of a convolution and in front of its activation, which is the same as behind it for
activations that keep zeros; in residual branches behind the last norm, before the addition; shortcuts are not gated
(``graph.gate_places``).

Departures from the paper and its code:

* one unit per layer is always open: the published rule can switch a whole layer off;
* heads may learn alone first (``head_epochs``), with targets as masks, while the network stands still;
* heads begin with everything open (``safe_start``), and stop at the cool-down, where the code's coast on for a while;
* the learning rate of the network and its course are those of the training settings, anew in every phase;
* layers that work on one pixel (squeeze-and-excitation) and grouped convolutions are not gated unless named;
* expected MACs are counted honestly (``gates.expected_macs``); the code's count is beside it;
* blocks of filters (``block``), chosen by their firing together on the dense network, are ours;
* the static core is ours. Nothing is removed in the paper. Here channels that reached no reader on the calibration
  batches are removed, which changes nothing for images on which they would not have fired, and the heads follow with an
  exact substitute for the softmax terms of what was removed. Then the channels that fire least go until the targets of
  ``prune`` are met: targets bound the *static* network (``macs=1`` asks for no more than the exact cut), gates save
  more within it (``expected_macs``). What remains is still gated, and trained for ``core_epochs``.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from nni_prune_ext.costs import count_costs
from nni_prune_ext.errors import CertificateError
from nni_prune_ext.gates.estimates import GateProbe, rule_of, settled
from nni_prune_ext.gates.firing import firing_facts, firing_picture
from nni_prune_ext.gates.gated_network import GatedNetwork, Gates, Targets
from nni_prune_ext.gates.heads import GateHead
from nni_prune_ext.gates.placement import chosen_places, new_gates
from nni_prune_ext.gates.prediction import PredictionCounter
from nni_prune_ext.gates.static_core import CUT_LIMIT, ReachCounter, captured_call, cut_error, gated_outputs, leak
from nni_prune_ext.graph.gate_places import Activation, GateFlow, GatePlace
from nni_prune_ext.graph.gate_tracing import trace_gate_flow
from nni_prune_ext.inputs import ExampleInputs, tensors_in
from nni_prune_ext.methods.base import Batch, JsonState, MethodContext, MethodSpec, Outcome, Phase, PruningMethod
from nni_prune_ext.methods.ftwt_options import FtwtOptions
from nni_prune_ext.plan import PruningPlan, plan_from_channels, removed_channels
from nni_prune_ext.scoring.group_reduction import group_importance
from nni_prune_ext.scoring.weight_norms import l1_norm
from nni_prune_ext.surgery import Removal

_HEADS, _GATES, _CORE = "heads", "gates", "core"
_TIE = 1e-4
"""Of channels that fire alike, the one with smaller weights goes first; a firing rate is coarser than that."""


class Ftwt(PruningMethod):
    """Trains gates and network, cuts the static core, hands over the gated network; see the module's docstring.

    Attributes:
        gates: the gates of the network as it is now.
        mass: in use; solved for if ``expected_macs`` was asked for.
    """

    def __init__(self, options: FtwtOptions) -> None:
        self.options = options
        self.mass = options.mass
        self.gates = Gates((), ())
        self._learning = False
        self._epoch = 0
        self._rates: dict[str, Tensor] = {}
        self._prediction = PredictionCounter()
        self._facts: dict[str, float] = {}

    def phases(self) -> Sequence[Phase]:
        """Returns the training of heads alone, that with gates, and that after the static cut."""
        own = self.options
        alone = Phase(_HEADS, own.head_epochs, trainable=lambda _: False, optimizers=self._optimizers)
        return [
            *([alone] if own.head_epochs and own.selection == "input" else []),
            Phase(_GATES, own.epochs, optimizers=self._optimizers),
            Phase(_CORE, own.core_epochs),
        ]

    def start(self, context: MethodContext, phase: Phase) -> None:
        """Places the gates; cuts the static core before the last phase."""
        if phase.name == self.phases()[0].name:
            self._begin(context)
        elif phase.name == _CORE:
            self._cut(context)

    def attach(self, context: MethodContext, phase: Phase) -> None:
        """Puts the gates onto the network; while heads learn, targets are made, too."""
        self._learning = phase.name == _HEADS or (phase.name == _GATES and self._heads_learn())
        if not phase.epochs:
            return
        self.gates.targets = self._rule() if self._learning else None
        self.gates.teaching = phase.name == _HEADS
        self.gates.masks = "targets" if self.gates.teaching else "predicted"
        if self.gates.teaching:  # the network stands still, its statistics included, whatever a host sets
            context.on_leave(context.model.register_forward_pre_hook(lambda model, _: model.eval() and None).remove)
        for handle in self.gates.attach(context.model):
            context.on_leave(handle.remove)
        context.on_leave(self.gates.forget)

    def compute_loss(self, context: MethodContext, batch: Batch) -> Tensor:
        """Returns the task loss of the gated network, and the loss of the heads while they learn."""
        loss = context.task_loss(batch)
        if self.gates.teaching:
            return self.gates.mask_loss()
        if not self._learning:
            return loss
        self._prediction.add(self.gates)
        return loss + self.gates.mask_loss()

    def after_epoch(self, context: MethodContext, phase: Phase, epoch: int) -> None:
        """Notes how well the heads predict; stops them when their time is over."""
        if self._learning and phase.name == _GATES:
            found = self._prediction.result()
            context.log(found)
            self._facts |= {f"last_learning_{name}": value for name, value in found.items()}
            self._prediction = PredictionCounter()
        if phase.name != _GATES:
            return
        self._epoch = epoch + 1
        if self._learning and not self._heads_learn():
            self._learning, self.gates.targets = False, None

    def on_removed(self, context: MethodContext, removal: Removal) -> None:
        """Lets heads and firing rates follow a cut."""
        gone = removed_channels(removal.plan, removal.groups)
        self._rates = {name: rate[torch.from_numpy(~gone[name])] for name, rate in self._rates.items() if name in gone}
        flow = trace_gate_flow(context.model, context.example_inputs)
        device = next(context.model.parameters()).device
        self.gates = self.gates.follow(removal.kept, _same(self.gates.places, flow)).to(device)

    def finish(self, context: MethodContext) -> Outcome:
        """Measures the gated network and hands it over."""
        flow = trace_gate_flow(context.model, context.example_inputs)
        probe = self._probe(context, flow, self._batches(context)[0])
        expected, firing = probe.measured("predicted")
        facts = {**self._facts, **expected.facts(), **firing_facts(firing), "mass": self.mass}
        if self.options.expected_macs is not None:
            facts["expected_macs_asked"] = self.options.expected_macs
        if "predicted_macs_share" in facts:
            facts["macs_share_realised_minus_predicted"] = facts["expected_macs_share"] - facts["predicted_macs_share"]
        self.gates.forget()
        gated = GatedNetwork(copy.deepcopy(context.model), copy.deepcopy(self.gates).requires_grad_(False))
        caption = (
            "Firing rates, one band per gated layer, filters by falling rate: dark never, blue seldom, white often, "
            "orange always"
        )
        return Outcome(
            plan_from_channels(context.groups, {}),
            gated_model=gated,
            facts=facts,
            pictures={caption: firing_picture(firing)},
            gating=(expected, firing),
        )

    def state_dict(self) -> tuple[dict[str, Tensor], JsonState]:
        """Returns the heads, their places, the firing rates and the facts."""
        tensors = {f"gates/{name}": tensor for name, tensor in self.gates.state_dict().items()}
        tensors |= {f"rate/{name}": rate for name, rate in self._rates.items()}
        places = json.dumps([asdict(place) for place in self.gates.places])
        return tensors, {"mass": self.mass, "epoch": self._epoch, "places": places, "facts": dict(self._facts)}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: JsonState) -> None:
        """Restores what ``state_dict`` returned."""
        self.mass, self._epoch = cast("float", values["mass"]), int(cast("int", values["epoch"]))
        self._facts = dict(cast("dict[str, float]", values["facts"]))
        self._rates = {n.removeprefix("rate/"): t for n, t in tensors.items() if n.startswith("rate/")}
        places = [_place(own) for own in json.loads(cast("str", values["places"]))]
        own = {name.removeprefix("gates/"): tensor for name, tensor in tensors.items() if name.startswith("gates/")}
        units = {place.layer: own[f"heads.{k}.units"] for k, place in enumerate(places)}
        self.gates = self._fresh(places, units).to(next(iter(own.values())).device)
        self.gates.load_state_dict(own)

    def _heads_learn(self) -> bool:
        return self.options.selection == "input" and self._epoch < self.options.learning_epochs

    def _rule(self) -> Targets:
        return rule_of(self.mass, uniform=self.options.targets == "uniform")

    def _fresh(self, places: Sequence[GatePlace], units: Mapping[str, Tensor]) -> Gates:
        own = self.options
        gates = new_gates(places, pool=own.pool, detached=own.mode == "decoupled", softmax=own.softmax, units=units)
        return gates.requires_grad_(own.selection == "input")

    def _begin(self, context: MethodContext) -> None:
        """Places gates on the dense network and foresees what they will save."""
        flow = trace_gate_flow(context.model, context.example_inputs)
        places = chosen_places(flow, self.options.patterns, model=type(context.model).__name__)
        device = next(context.model.parameters()).device
        self.gates = self._fresh(places, {}).to(device)
        probe = self._probe(context, flow, self._batches(context)[0])
        probe, self.mass = settled(
            probe,
            self.mass,
            macs=self.options.expected_macs,
            block=self.options.block,
            uniform=self.options.targets == "uniform",
            fresh=lambda units: self._fresh(places, units).to(device),
            agreed=context.agreed,
        )
        self.gates = probe.gates
        if not self.options.softmax:
            probe.scale_heads()
        if not self.options.safe_start:
            for head in self.gates.all_heads():
                head.reset(safe_start=False)
        foreseen, firing = probe.measured("targets", self._rule())
        self._facts = {"predicted_macs_share": foreseen.share, "predicted_official_macs_share": foreseen.official_share}
        if self.options.selection == "static":
            hottest = probe.heats()
            for place, head in zip(self.gates.places, self.gates.all_heads()):
                _fix(head, hottest[place.layer], float(firing[place.layer].rate.mean()))

    def _batches(self, context: MethodContext) -> tuple[list[Batch], list[Batch]]:
        """Returns the batches to calibrate on, and others (none if the data are few)."""
        count = self.options.calibration_batches
        found = context.batches(2 * count)
        half = count if len(found) > count else max(1, (len(found) + 1) // 2)
        return found[:half], found[half:]

    def _probe(self, context: MethodContext, flow: GateFlow, batches: Sequence[Batch]) -> GateProbe:
        return GateProbe(
            context.model,
            context.example_inputs,
            flow,
            self.gates,
            context.task_loss,
            batches,
            dense=self._dense_macs(context),
        )

    def _dense_macs(self, context: MethodContext) -> int:
        """Returns the MACs per image of the network before any cut, counted at the first call."""
        if "dense_macs" not in self._facts:
            self._facts["dense_macs"] = _macs_per_image(context)
        return int(self._facts["dense_macs"])

    def _cut(self, context: MethodContext) -> None:
        """Removes what reaches nobody, exactly; then what fires least, to the targets."""
        calibration, others = self._batches(context)
        self._rates = self._reached(context, calibration)
        never = self._never(context) if self.options.remove_never else plan_from_channels(context.groups, {})
        gone = removed_channels(never, context.groups)
        dense, prunable = _macs_per_image(context), max(context.groups.num_channels, 1)
        params = sum(p.numel() for p in context.model.parameters())
        self._facts |= {"never_firing_channels": never.num_removed, "never_firing_share": never.num_removed / prunable}
        if others:
            unseen = self._reached(context, others)
            self._facts["never_firing_leak"] = leak(unseen, {n: torch.from_numpy(mask) for n, mask in gone.items()})
        if never.num_removed:
            self._apply_exactly(context, never, calibration[0])
        left = sum(p.numel() for p in context.model.parameters())
        self._facts["never_firing_params_share"] = 1 - left / params
        self._facts["never_firing_macs_share"] = 1 - _macs_per_image(context) / dense
        if {name: len(rate) for name, rate in self._rates.items()} != {
            group.name: group.num_channels for group in context.groups
        }:  # a depthwise layer that is left with one channel is a group of its own
            self._rates = self._reached(context, calibration)
        plan = context.allocate(self._scores(context)).plan
        if plan.num_removed:
            context.apply(plan)

    def _apply_exactly(self, context: MethodContext, plan: PruningPlan, batch: Batch) -> None:
        """Removes what reached nobody on a batch, and makes sure that the gated network is the same function there.

        Raises:
            CertificateError: it is not.
        """
        call = captured_call(context.model, lambda: context.task_loss(batch))
        before = gated_outputs(context.model, self.gates, call)
        context.apply(plan)
        error, images = cut_error(before, gated_outputs(context.model, self.gates, call))
        self._facts |= {"gated_cut_error": error, "gated_cut_images": images}
        if not error <= CUT_LIMIT:
            raise CertificateError(
                f"The gated network computes something else after channels that never fired were removed: relative "
                f"difference {error:.3g} on {images} images, expected at most {CUT_LIMIT:g}. Nothing was written. "
                "Report this network; remove_never=False leaves these channels in."
            )

    def _reached(self, context: MethodContext, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Returns group → how often each channel reaches a layer that reads it."""
        flow = trace_gate_flow(context.model, context.example_inputs)
        counter = ReachCounter(context.groups, flow)
        for _ in self._probe(context, flow, batches).passes("predicted"):
            counter.add(self.gates.open_channels())
        return dict(context.agreed(counter.rates()))

    def _never(self, context: MethodContext) -> PruningPlan:
        """Returns the plan for all channels that reach nobody, as far as the limits allow."""
        removed = {}
        for group in context.groups:
            limit = context.limits.of_group(group)
            most = min(int(limit.max_ratio * group.num_channels), group.num_channels - context.limits.min_channels)
            silent = torch.nonzero(self._rates[group.name].cpu() == 0).flatten()
            kept = group.num_channels - min(len(silent), max(most, 0))
            multiple = context.limits.multiple_of(group) or 1
            kept = math.ceil(kept / multiple) * multiple
            gone = torch.zeros(group.num_channels, dtype=torch.bool)
            gone[silent[: max(group.num_channels - kept, 0)]] = True
            removed[group.name] = gone.numpy()
        return plan_from_channels(context.groups, removed)

    def _scores(self, context: MethodContext) -> dict[str, Tensor]:
        """Returns firing rates, with the size of the weights to break ties."""
        tensors = dict(context.model.named_parameters())
        scores = {}
        for group in context.groups:
            size = group_importance(group, tensors, l1_norm).cpu()
            scores[group.name] = self._rates[group.name].cpu() + _TIE * size / (1 + size)
        return scores

    def _optimizers(self, context: MethodContext) -> Sequence[Optimizer]:
        heads = [parameter for parameter in self.gates.parameters() if parameter.requires_grad]
        return [SGD(heads, self.options.head_learning_rate, momentum=0.9)] if heads else []


def _macs_per_image(context: MethodContext) -> int:
    images = next((tensor.shape[0] for tensor in tensors_in(context.example_inputs) if tensor.dim()), 1)
    return count_costs(context.model, context.example_inputs).macs // images


def _fix(head: GateHead, heats: Tensor, rate: float) -> None:
    """Opens the same units for all images: the hottest on average, as many as a mean rate says."""
    count = max(1, round(rate * head.num_units))
    order = heats.mean(0).argsort(descending=True, stable=True)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-1.0)
        head.bias[order[:count].to(head.bias.device)] = 1.0


def _same(places: Sequence[GatePlace], flow: GateFlow) -> list[GatePlace]:
    """Returns the places of the same layers in the network of a flow."""
    known = {place.layer: place for place in flow.places}
    return [known[place.layer] for place in places]


def _place(values: Mapping[str, Any]) -> GatePlace:
    """Returns the place that was saved as JSON."""
    own = values["activation"]
    activation = None if own is None else Activation(own["name"], tuple((k, v) for k, v in own["settings"]))
    return GatePlace(**{**values, "activation": activation})


def build_gated(
    compact: nn.Module, options: FtwtOptions, example_inputs: ExampleInputs, tensors: Mapping[str, Tensor]
) -> GatedNetwork:
    """Builds the gated network around a compact model; the tensors say which filters share a unit."""
    flow = trace_gate_flow(compact, example_inputs)
    places = chosen_places(flow, options.patterns, model=type(compact).__name__)
    units = {place.layer: tensors[f"gates.heads.{k}.units"] for k, place in enumerate(places)}
    detached = options.mode == "decoupled"
    gates = new_gates(places, pool=options.pool, detached=detached, softmax=options.softmax, units=units)
    return GatedNetwork(compact, gates.requires_grad_(options.selection == "input"))


FTWT = MethodSpec(
    "ftwt",
    "heads predict per image which filters run; what never fires, and what fires least, is removed",
    "https://arxiv.org/abs/2110.08232",
    FtwtOptions,
    Ftwt,
    needs_data=True,
    own_optimizers=True,
    changes_structure=True,
    products=frozenset({"plan", "gated_model"}),
    build_gated=build_gated,
    demo_options={"epochs": 4, "core_epochs": 1, "calibration_batches": 2},
)
