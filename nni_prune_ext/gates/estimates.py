"""What gating would save, before any training: the rule for targets applied to the trained dense network.

*Open loop*: targets are computed and not applied; one pass serves any number of masses. *Closed loop*: they are
applied, so later layers see switched inputs: the network that perfect heads would make of untrained weights. Trained
gates differ: heads err, and the network moves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.gates.blocks import block_units, check_block
from nni_prune_ext.gates.expected_macs import ExpectedMacs
from nni_prune_ext.gates.firing import FiringCounter, LayerFiring
from nni_prune_ext.gates.firing_targets import mass_targets, uniform_targets
from nni_prune_ext.gates.gated_network import GatedNetwork, Gates, Masks, Targets
from nni_prune_ext.gates.placement import chosen_places, mac_counter, new_gates
from nni_prune_ext.graph.gate_places import GateFlow
from nni_prune_ext.graph.gate_tracing import trace_gate_flow
from nni_prune_ext.graph.state import unchanged_globals, untouched
from nni_prune_ext.inputs import ExampleInputs

Run = Callable[[Any], object]
"""Runs the network on one batch."""
MeasuredGating: TypeAlias = tuple[ExpectedMacs, Mapping[str, LayerFiring]]
"""What a gated network costs over a set of images, and layer → how its filters fire."""

_NO_BATCH = "There is no batch, expected some hundred images. Pass batches of (images, labels)."
MASSES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)


@dataclass(frozen=True)
class GatingEstimate:
    """What one mass would save.

    Attributes:
        mass: share of the heat that is kept (``r`` in the paper), or of the units that go for uniform targets.
        open_loop: MACs with targets computed on the dense network.
        closed_loop: MACs with targets applied; ``None`` if not asked for.
        accuracy: of the closed loop, by the metric given: the ceiling for perfect heads without training.
    """

    mass: float
    open_loop: ExpectedMacs
    closed_loop: ExpectedMacs | None = None
    accuracy: float | None = None


class GateProbe:
    """Runs a network with gates on it over the same batches, and counts; the network is left as it was."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        flow: GateFlow,
        gates: Gates,
        run: Run,
        batches: Iterable[object],
        *,
        data: str = "training images",
        dense: int | None = None,
    ) -> None:
        self.model, self.gates, self.run, self.batches, self.data = model, gates, run, batches, data
        self._counter = partial(mac_counter, model, example_inputs, flow, dense=dense)

    def with_gates(self, gates: Gates) -> GateProbe:
        """Returns a probe of the same network on the same batches with other gates at the same places."""
        made = copy.copy(self)
        made.gates = gates
        return made

    def measured(self, masks: Masks, targets: Targets | None = None) -> tuple[ExpectedMacs, dict[str, LayerFiring]]:
        """Returns MACs and firing with these masks."""
        counter, firing = self._counter(self.gates), FiringCounter()
        for _ in self.passes(masks, targets):
            opened = self.gates.open_channels()
            counter.add(opened)
            firing.add(opened)
        return counter.result(self.data), firing.result()

    def heats(self) -> dict[str, Tensor]:
        """Returns layer → heat of every unit for every image with all gates open, ``(images, U)`` on the CPU."""
        parts: dict[str, list[Tensor]] = {place.layer: [] for place in self.gates.places}
        for _ in self.passes("open", torch.ones_like):
            for layer, own in self.gates.heats.items():
                parts[layer].append(own.cpu())
        return {layer: torch.cat(own) for layer, own in parts.items()}

    def scale_heads(self) -> None:
        """Scales what heads without a softmax read: the mean of the pooled input of a layer becomes a quarter."""
        sums: dict[str, list[Tensor]] = {place.layer: [] for place in self.gates.places}
        handles = [
            self.model.get_submodule(place.layer).register_forward_pre_hook(
                lambda _, args, kwargs, head=head, own=sums[place.layer]: own.append(
                    head.pooled(args[0] if args else kwargs["input"]).mean()
                ),
                with_kwargs=True,
            )
            for place, head in zip(self.gates.places, self.gates.all_heads())
        ]
        try:
            for _ in self.passes("open"):
                pass
        finally:
            for handle in handles:
                handle.remove()
        for place, head in zip(self.gates.places, self.gates.all_heads()):
            head.scale.copy_(0.25 / torch.stack(sums[place.layer]).mean().clamp(min=1e-6))

    def open_loop(self, rules: Sequence[Targets]) -> list[ExpectedMacs]:
        """Returns the MACs of several rules for targets, from one pass with all gates open."""
        counters = [self._counter(self.gates) for _ in rules]
        for _ in self.passes("open", torch.ones_like):
            for rule, counter in zip(rules, counters):
                wanted = {layer: rule(own) for layer, own in self.gates.heats.items()}
                counter.add({layer: own[:, self.gates.head(layer).units] for layer, own in wanted.items()})
        return [counter.result(self.data) for counter in counters]

    def passes(self, masks: Masks, targets: Targets | None = None) -> Iterator[None]:
        """Runs all batches with these masks; after each, the gates hold what they saw."""
        with untouched(self.model), torch.no_grad(), _set(self.gates, masks, targets), self.gates.on(self.model):
            seen = False
            for batch in self.batches:
                seen = True
                self.gates.forget()
                self.run(batch)
                if len(self.gates.opened) != len(self.gates.places):
                    missing = next(p.layer for p in self.gates.places if p.layer not in self.gates.opened)
                    raise ConfigError(
                        f"The gated layer '{missing}' did not run on a batch, expected every gated layer to run once "
                        "per forward pass. Name the layers to gate without it."
                    )
                yield
            if not seen:
                raise ConfigError(_NO_BATCH)


def rule_of(mass: float, *, uniform: bool = False) -> Targets:
    """Returns the rule for targets of a mass, or of a share of units that goes."""
    return partial(uniform_targets, removed=mass) if uniform else partial(mass_targets, mass=mass)


def estimate_gating(
    model: nn.Module,
    example_inputs: ExampleInputs,
    batches: Iterable[object],
    *,
    masses: Sequence[float] = MASSES,
    layers: Sequence[str] | None = None,
    uniform: bool = False,
    block: int = 1,
    closed_loop: bool = True,
    run: Callable[[nn.Module, Any], object] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    data: str = "training images",
) -> list[GatingEstimate]:
    """Says what gates would save for a grid of masses, before any training; the model is left as it was.

    Args:
        model: a trained dense network.
        batches: a few hundred images or more; batches of ``(images, labels)`` unless ``run`` says otherwise.
        layers: names or patterns of the layers to gate; the usual places by default.
        uniform: masses are the share of the units that goes, the same in every layer and for every image.
        block: filters that are switched together, at most (1, 4, 8 or 16): FTWT's blocks, chosen anew for each mass.
        closed_loop: also run with the targets applied, once per mass.
        run: runs the model on one batch.
        evaluate: a metric of a network, for the accuracy of the closed loop.
        data: name of the images.

    Raises:
        ConfigError: no batch, no place for a gate, a mass out of range, or another block.
        ModelError, TraceError: the model cannot be followed.
    """
    check_block(block)
    probe, _ = gate_probe(model, example_inputs, batches, layers, run, data=data)
    for mass in masses:
        check_mass(mass, uniform=uniform)
    rules = [rule_of(mass, uniform=uniform) for mass in masses]
    single = probe.open_loop(rules) if block == 1 else []
    result = []
    for number, (mass, rule) in enumerate(zip(masses, rules)):
        own, _ = settled(probe, mass, block=block, uniform=uniform)
        opened = single[number] if single else own.open_loop([rule])[0]
        closed = own.measured("targets", rule)[0] if closed_loop else None
        metric = None
        if evaluate is not None and closed_loop:
            with untouched(model), _set(own.gates, "targets", rule):
                metric = evaluate(GatedNetwork(model, own.gates).eval())
        result.append(GatingEstimate(mass, opened, closed, metric))
    return result


def measure_gating(
    network: GatedNetwork,
    example_inputs: ExampleInputs,
    batches: Iterable[object],
    *,
    dense: int | None = None,
    data: str = "test images",
) -> tuple[ExpectedMacs, dict[str, LayerFiring]]:
    """Returns what a gated network costs and how its filters fire over a set of images; it is left as it was.

    Args:
        batches: of images, or of ``(images, labels)``.
        dense: MACs per image that shares refer to; those of the network without gates by default.
        data: name of the images.

    Raises:
        ConfigError: no batch, or no gate.
    """
    if not network.gates.places:
        raise ConfigError("The network has no gate left, expected one at least. Count its MACs with count_costs.")
    flow, call = trace_gate_flow(network.model, example_inputs), partial(_run_on_images, network.model)
    probe = GateProbe(network.model, example_inputs, flow, network.gates, call, batches, data=data, dense=dense)
    return probe.measured("predicted")


def solve_mass(
    model: nn.Module,
    example_inputs: ExampleInputs,
    batches: Iterable[object],
    macs: float,
    *,
    layers: Sequence[str] | None = None,
    block: int = 1,
    run: Callable[[nn.Module, Any], object] | None = None,
) -> float:
    """Returns the mass with which perfect heads would use a share ``macs`` (0–1) of the dense MACs (closed loop).

    With blocks (``block`` filters at most), it is the one that FTWT's option ``expected_macs`` leads to: a mass for
    single filters, blocks by that mass, and then the mass for these blocks.

    Raises:
        ConfigError: no batch, no place for a gate, a share that no mass reaches, or another block.
    """
    check_block(block)
    return settled(gate_probe(model, example_inputs, batches, layers, run)[0], macs=macs, block=block)[1]


def settled(
    probe: GateProbe,
    mass: float = 1.0,
    *,
    macs: float | None = None,
    block: int = 1,
    uniform: bool = False,
    fresh: Callable[[Mapping[str, Tensor]], Gates] | None = None,
    agreed: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
) -> tuple[GateProbe, float]:
    """Returns a probe whose gates switch blocks of filters, if that is asked for, and the mass.

    Args:
        probe: with gates of single filters.
        mass: has no say where ``macs`` is given.
        macs: share of the dense MACs for which the mass is solved: without blocks, and then with them.
        block: filters per block, at most.
        uniform: the mass is the share of the units that goes.
        fresh: makes gates from the units of every layer.
        agreed: the means of tensors over all processes.

    Raises:
        ConfigError: a share that no mass reaches.
    """
    if macs is not None:
        mass = solved_mass(probe, macs, uniform=uniform)
    if block == 1:
        return probe, mass
    units = block_units(agreed(probe.heats()), rule_of(mass, uniform=uniform), block)
    probe = probe.with_gates((fresh or partial(_fresh, probe))(units))
    return probe, mass if macs is None else solved_mass(probe, macs, uniform=uniform)


def _fresh(probe: GateProbe, units: Mapping[str, Tensor]) -> Gates:
    """Returns new gates in the places of a probe's."""
    with unchanged_globals():  # the heads are drawn, and play no part
        return new_gates(probe.gates.places, units=units).to(next(probe.model.parameters()).device)


def solved_mass(probe: GateProbe, macs: float, *, uniform: bool = False, steps: int = 10) -> float:
    """Returns the mass at which a probe's closed loop uses a share of the dense MACs, by bisection to 1/1024.

    With uniform targets it is the share of the units that goes.

    Raises:
        ConfigError: a share that no mass reaches.
    """

    def share(kept: float) -> float:
        rule = rule_of(1 - kept, uniform=True) if uniform else rule_of(kept)
        return probe.measured("targets", rule)[0].share

    low, high = 0.0, 1.0
    least, most = share(low), share(high)
    if not least <= macs <= most:
        raise ConfigError(
            f"Gates cannot bring the expected MACs to {macs:.3g} of the dense network, expected {least:.3g} to "
            f"{most:.3g} here: ungated layers and heads remain, and one unit per layer always runs. Ask for a share in "
            "this range, or gate other layers."
        )
    for _ in range(steps):
        middle = (low + high) / 2
        if share(middle) <= macs:
            low = middle
        else:
            high = middle
    return 1 - low if uniform else low


def check_mass(mass: float, *, uniform: bool = False) -> None:
    """Refuses masses out of range.

    Raises:
        ConfigError: it is not 0–1.
    """
    if not 0 <= mass <= 1 or (uniform and mass == 1):
        what = "share of the units that goes" if uniform else "mass"
        raise ConfigError(
            f"The {what} is {mass}, expected 0–1{' without 1' if uniform else ''}. 0.9 keeps the filters that hold "
            "nine tenths of the heat."
        )


def gate_probe(
    model: nn.Module,
    example_inputs: ExampleInputs,
    batches: Iterable[object],
    layers: Sequence[str] | None = None,
    run: Callable[[nn.Module, Any], object] | None = None,
    *,
    data: str = "training images",
) -> tuple[GateProbe, GateFlow]:
    """Returns a probe with fresh gates of single filters on a network, and the flow of its signals.

    Raises:
        ConfigError: no batch, or no place for a gate.
    """
    given = _checked(batches)
    flow = trace_gate_flow(model, example_inputs)
    with unchanged_globals():  # the heads are drawn, and play no part
        gates = new_gates(chosen_places(flow, layers, model=type(model).__name__))
    gates.to(next(model.parameters()).device)
    call = partial(run or _run_on_images, model)
    return GateProbe(model, example_inputs, flow, gates, call, given, data=data), flow


def _checked(batches: Iterable[object]) -> list[object]:
    given = list(batches)
    if not given:
        raise ConfigError(_NO_BATCH)
    return given


def _run_on_images(model: nn.Module, batch: Any) -> object:
    images = batch[0] if isinstance(batch, (tuple, list)) else batch
    return model(images.to(next(model.parameters()).device))


@contextmanager
def _set(gates: Gates, masks: Masks, targets: Targets | None) -> Iterator[None]:
    before = gates.masks, gates.targets
    gates.masks, gates.targets = masks, targets
    try:
        yield
    finally:
        gates.masks, gates.targets = before
