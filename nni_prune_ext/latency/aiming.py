"""From a latency that was asked for to widths that have it: measure, predict, cut, measure again, correct.

Latency depends on widths only. So before a method runs, networks are cut by the magnitude of their weights and
measured, until the predictor leads to the latency that was asked for. A method that needs no training is then run
again, if its own network misses; one that trains is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import Tensor, nn

from nni_prune_ext.allocation import (
    LATENCY_TOLERANCE,
    CostModel,
    Limits,
    PredictedLatency,
    Scope,
    Target,
    allocate,
    check_feasible,
    counted_only,
    latency_of,
)
from nni_prune_ext.checkpoints import Checkpoints, Json
from nni_prune_ext.errors import TargetError
from nni_prune_ext.evaluation import environment
from nni_prune_ext.graph.model_copy import named_tensors
from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.latency.alignment import Alignment, probe_alignment
from nni_prune_ext.latency.evidence import LatencyEvidence, MeasuredNetwork
from nni_prune_ext.latency.layers import find_layers
from nni_prune_ext.latency.predictor import LatencyPredictor, measured_tables
from nni_prune_ext.latency.stopwatch import Stopwatch
from nni_prune_ext.plan import PruningPlan
from nni_prune_ext.scoring.group_reduction import group_importance
from nni_prune_ext.scoring.weight_norms import l1_norm
from nni_prune_ext.surgery import cut_channels
from nni_prune_ext.training.processes import from_main, is_main

GOOD = 0.015
"""How near to the latency asked for a correction stops, as a share of it: half of what is tolerated at the end."""
MOST_TRIES = 5
_HALFWAY, _LOWEST = "cut halfway to the limits", "cut to the limits"
_BY_MAGNITUDE = "cut by weight magnitude"


@dataclass(frozen=True)
class Try:
    """A network that was cut towards the target.

    Attributes:
        removed: root → number of channels that went.
        predictor: the one that led to it.
        uncorrected: its share of the dense latency, predicted without a correction.
        measured: its share.
    """

    removed: Mapping[str, int]
    predictor: LatencyPredictor
    uncorrected: float
    measured: float


def next_correction(tries: Sequence[Try], asked: float) -> float | None:
    """Returns the correction under which the last network is predicted as measured; ``None`` where none helps.

    Args:
        asked: share of the dense latency.
    """
    last = tries[-1]
    enough = near(last, asked) or len(tries) >= MOST_TRIES
    return None if enough else last.measured / max(last.uncorrected, 1e-9)


def near(one: Try, asked: float) -> bool:
    """Says whether a network is so near to the target that no correction is worth its measurement."""
    return abs(one.measured / asked - 1) <= GOOD


def best_try(tries: Sequence[Try], asked: float) -> Try:
    """Returns the network nearest to the target among those that meet it; the fastest one where none does."""
    met = [one for one in tries if one.measured <= asked * (1 + LATENCY_TOLERANCE)]
    return min(met, key=lambda one: abs(one.measured - asked)) if met else min(tries, key=lambda one: one.measured)


@dataclass
class LatencyAim:
    """A job with a latency target; ``prepare`` comes first.

    Attributes:
        model: the dense network.
        cost_model: its costs; ``prepare`` puts in the latency.
        targets: all of them; one is about latency.
        limits: as the user gave them; ``prepare`` puts in the multiple of the probe where there is none.
        tell: is told what is being done.
        alignment: what the probe found.
        networks: all whole networks that were measured.
    """

    model: nn.Module
    example_inputs: ExampleInputs
    cost_model: CostModel
    targets: Sequence[Target]
    limits: Limits
    scope: Scope
    stopwatch: Stopwatch
    tell: Callable[[str], None]
    alignment: Alignment | None = None
    networks: list[MeasuredNetwork] = field(default_factory=list)
    _tries: list[Try] = field(default_factory=list)
    _by_magnitude: list[Try] = field(default_factory=list)
    _settled: bool = False
    _restored: bool = False
    _probe_decides: bool = True

    @property
    def target(self) -> Target:
        """The target about latency."""
        found = latency_of(self.targets)
        assert found is not None  # there is no aim without one
        return found

    @property
    def predictor(self) -> LatencyPredictor:
        """What predicts the latency."""
        found = self.cost_model.latency
        assert isinstance(found, LatencyPredictor)  # ``prepare`` has put it in
        return found

    def prepare(self, saved: Checkpoints | None = None) -> None:
        """Probes the runtime, measures layers and networks, and corrects the prediction at the target.

        Args:
            saved: where an interrupted run of the same job may have left what it had measured.

        Raises:
            TargetError: the targets cannot be met; the nearest latency is named.
        """
        before = from_main(saved.latest() if saved is not None and is_main() else None)
        if before is not None:
            self._restore(before.values)
            return
        self.alignment = probe_alignment(self.stopwatch)
        self._probe_decides = self.limits.multiple is None
        if self._probe_decides:
            self.limits = self.limits.model_copy(update={"multiple": self.alignment.multiple})
            self.tell(str(self.alignment))
        self.tell(f"measuring layers: {self.stopwatch.conditions}")
        layers = find_layers(self.model, self.stopwatch.inputs)
        first = measured_tables(layers, self.cost_model.groups, self.stopwatch, self.alignment.multiple)
        scores = self._magnitudes()
        self._predict_with(self._through_networks(first, scores))
        self._refuse_unreachable()
        if self.predictor.dense_ms <= self.target.bound(self.predictor.dense_ms):
            self.tell(f"warning: target {self.target}: {self._nothing_asked(self.predictor.dense_ms)}")
        while True:
            plan = self._plan(scores, self.targets)
            if not self._again(self._by_magnitude, _BY_MAGNITUDE, plan, None):
                break
        self._settled = False

    def missed_by(self, method: str, plan: PruningPlan, network: nn.Module) -> bool:
        """Says whether a method should run again, because what it made misses the target.

        It is measured, unless a network of the same widths was. The correction that the next run needs is in place.

        Args:
            plan: all channels that the method removed.
        """
        known = [one for one in self._by_magnitude if one.removed == _counts(plan)]
        if known and not self._tries:
            return False
        return self._again(self._tries, method, plan, network)

    def final(self, network: nn.Module, *, trained: bool) -> LatencyEvidence:
        """Measures the compact network afresh, exported as it ships, and says how it came to be.

        Args:
            trained: the method trained, so it was run only once.
        """
        assert self.alignment is not None  # ``prepare`` has put it in
        self.tell("measuring the latency of the compact network")
        predicted = self.predictor(_shapes(network))
        times = self.stopwatch.networks({"compact": network}, as_shipped=True)
        achieved, asked = times.shares["compact"] * times.dense_ms, self.target.bound(times.dense_ms)
        p95_ms, p99_ms = times.tails_ms.get("compact", (None, None))
        return LatencyEvidence(
            conditions=self.stopwatch.conditions,
            asked_ms=asked,
            achieved_ms=achieved,
            dense_ms=times.dense_ms,
            predicted_ms=predicted,
            error_bar=times.error_bar,
            clock=times.clock,
            rounds=times.rounds,
            networks=tuple(self.networks),
            multiple=self.limits.multiple or self.alignment.multiple,
            layers_measured=self.stopwatch.measured,
            layers_known=self.stopwatch.from_cache,
            probe=self.alignment.penalties if self._probe_decides else {},
            remark=self._remark(achieved / asked - 1, times.dense_ms, trained=trained),
            environment=from_main(environment()),
            p95_ms=p95_ms,
            p99_ms=p99_ms,
        )

    def should_correct(self, evidence: LatencyEvidence, network: nn.Module) -> bool:
        """Says whether a method that needs no training should run once more, since its network missed at the end.

        The correction that follows from this measurement is then in place.
        """
        asked, near_enough = evidence.asked_ms, 1 - LATENCY_TOLERANCE
        expected = evidence.achieved_ms < asked and evidence.predicted_ms < asked * near_enough  # nothing nearer
        if self._restored or (evidence.met and (expected or evidence.achieved_ms >= asked * near_enough)):
            return False
        correction = evidence.achieved_ms / evidence.dense_ms / self.predictor.uncorrected_share(_shapes(network))
        if not self._reachable(correction):
            return False
        self._predict_with(self.predictor.corrected(correction))
        self._settled = True
        return True

    def use(self, predictor: PredictedLatency | None) -> None:
        """Goes back to the predictor that led to the network that is kept."""
        assert isinstance(predictor, LatencyPredictor)
        self._predict_with(predictor)

    def save(self, saved: Checkpoints | None) -> None:
        """Keeps what was measured, once, so that a run that is continued makes the same plan."""
        assert self.alignment is not None  # ``prepare`` has put it in
        if saved is None or not is_main() or saved.latest() is not None:
            return
        values = {
            "predictor": self.predictor.model_dump(mode="json"),
            "networks": [vars(network) for network in self.networks],
            "multiple": self.limits.multiple,
            "liked": self.alignment.multiple,
            "probe": {str(offset): penalty for offset, penalty in self.alignment.penalties.items()},
        }
        saved.save(cast("Mapping[str, Json]", values), {})

    def _refuse_unreachable(self) -> None:
        try:
            check_feasible(self.cost_model, self.targets, self.limits)
        except TargetError as error:
            probed = self.alignment is not None and self.limits.multiple == self.alignment.multiple > 1
            smaller = f" A smaller multiple than {self.limits.multiple} (--multiple) may help narrow networks."
            raise TargetError(
                f"{error} Latencies: {self.stopwatch.conditions}; {self._reached()}.{smaller if probed else ''}"
            ) from error

    def _reached(self) -> str:
        """Says what the networks took that were measured so far."""
        known = [f"{one.network}: {one.measured_ms:.4g} of {one.dense_ms:.4g} ms" for one in self.networks]
        return "; ".join(known) or "no channel can go, so no other network was measured"

    def _restore(self, values: Mapping[str, Json]) -> None:
        self._predict_with(LatencyPredictor.model_validate(values["predictor"]))
        self.networks = [MeasuredNetwork(**one) for one in cast("list[dict[str, Any]]", values["networks"])]
        self._probe_decides = self.limits.multiple is None
        self.limits = self.limits.model_copy(update={"multiple": values["multiple"]})
        penalties = cast("dict[str, float]", values["probe"])
        self.alignment = Alignment(cast("int", values["liked"]), {int(o): penalty for o, penalty in penalties.items()})
        self._settled = self._restored = True

    def _predict_with(self, predictor: LatencyPredictor) -> None:
        self.cost_model = replace(self.cost_model, latency=predictor)

    def _magnitudes(self) -> dict[str, Tensor]:
        tensors = dict(named_tensors(self.model))
        return {group.name: group_importance(group, tensors, l1_norm) for group in self.cost_model.groups}

    def _plan(self, scores: Mapping[str, Tensor], targets: Sequence[Target]) -> PruningPlan:
        return allocate(scores, self.cost_model, targets=targets, limits=self.limits, scope=self.scope).plan

    def _cut(self, plan: PruningPlan) -> nn.Module:
        return cut_channels(self.model, plan, self.example_inputs, groups=self.cost_model.groups).model

    def _through_networks(self, first: LatencyPredictor, scores: Mapping[str, Tensor]) -> LatencyPredictor:
        """Measures the network that the limits allow at most, and one halfway there, for the curve."""
        dense, lowest = self.cost_model.costs.macs, check_feasible(self.cost_model, (), self.limits)["macs"]
        macs = {_HALFWAY: (dense + lowest) / 2, _LOWEST: lowest}
        plans = {name: self._plan(scores, [Target("macs", max(value, 2.0))]) for name, value in macs.items()}
        networks = {name: self._cut(plan) for name, plan in plans.items() if plan.num_removed}
        self.tell("measuring whole networks: " + ", ".join(["dense", *networks]))
        times = self.stopwatch.networks(networks)
        for name in networks:
            measured = times.shares[name] * times.dense_ms
            self.networks.append(MeasuredNetwork(name, None, measured, times.dense_ms, times.error_bar))
        points = [(first.layers_ms(_shapes(network)), times.shares[name]) for name, network in networks.items()]
        return first.through(points, times.dense_ms)

    def _again(self, tries: list[Try], name: str, plan: PruningPlan, network: nn.Module | None) -> bool:
        """Measures a network that was not measured yet, and says whether another one should be made."""
        if self._settled:
            return False
        same = [one for one in tries if one.removed == _counts(plan)]
        if not same:
            tries.append(self._tried(name, plan, self._cut(plan) if network is None else network))
            asked = self._asked_share()
            correction = next_correction(tries, asked)
            if correction is not None and self._reachable(correction):
                self._predict_with(self.predictor.corrected(correction))
                return True
            if near(tries[-1], asked):
                return False
        best = best_try(tries, self._asked_share())
        self._predict_with(best.predictor)
        self._settled = True
        return best.removed != _counts(plan)

    def _tried(self, name: str, plan: PruningPlan, network: nn.Module) -> Try:
        before, shapes = self.predictor, _shapes(network)
        times = self.stopwatch.networks({name: network})
        share = times.shares[name]
        self.networks.append(
            MeasuredNetwork(name, before(shapes), share * times.dense_ms, times.dense_ms, times.error_bar)
        )
        self.tell(f"{name}: predicted {before(shapes):.4g} ms, measured {share * times.dense_ms:.4g} ms")
        self._predict_with(before.model_copy(update={"dense_ms": times.dense_ms}))
        return Try(_counts(plan), before, before.uncorrected_share(shapes), share)

    def _reachable(self, correction: float) -> bool:
        """Says whether the limits leave room for the targets with another correction."""
        corrected = replace(self.cost_model, latency=self.predictor.corrected(correction))
        try:
            check_feasible(corrected, self.targets, self.limits)
        except TargetError:
            return False
        return True

    def _asked_share(self) -> float:
        return self.target.bound(self.predictor.dense_ms) / self.predictor.dense_ms

    def _nothing_asked(self, dense_ms: float) -> str:
        return (
            f"the dense network already meets it with {dense_ms:.4g} ms, so that nothing has to go for it. To make the "
            "network faster, ask for less, such as latency=0.7"
        )

    def _remark(self, distance: float, dense_ms: float, *, trained: bool) -> str:
        """Says why the latency is not the one asked for, if it is not, or that the dense one is."""
        if distance <= LATENCY_TOLERANCE and dense_ms <= self.target.bound(dense_ms):
            return self._nothing_asked(dense_ms)
        if abs(distance) <= LATENCY_TOLERANCE:
            return ""
        text = f"the latency is {100 * abs(distance):.1f} % {'above' if distance > 0 else 'below'} what was asked for"
        if trained:
            return (
                f"{text}: the method trains, so it was run once, with what networks cut by weight magnitude had shown"
            )
        if distance < 0 and counted_only(self.targets):
            return f"{text}: the other targets ask for more"
        measured = ", ".join(f"{one.measured_ms:.4g} ms" for one in self.networks[2:])
        return f"{text}: widths go in steps of {self.limits.multiple}; measured on the way: {measured}"


def _counts(plan: PruningPlan) -> dict[str, int]:
    return {root: len(channels) for root, channels in plan.removed.items()}


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(network)}
