"""The checks have teeth: for every promise, a plugin that breaks it is caught, with a sentence about that promise."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nni_prune_ext.errors import ConfigError, NniPruneExtError, RuntimeUnavailableError
from nni_prune_ext.methods.base import (
    Batch,
    JsonState,
    MethodContext,
    MethodSpec,
    NoOptions,
    Outcome,
    Phase,
    PruningMethod,
)
from nni_prune_ext.plan import plan_from_channels
from nni_prune_ext.runtimes.base import Array, Availability, InferenceSession, Precision, RunnableModel
from nni_prune_ext.runtimes.onnxruntime_cpu import OnnxRuntimeCpu
from nni_prune_ext.runtimes.torch_eager import TorchEager
from nni_prune_ext.schedules import PolicyContext, SchedulerSpec
from nni_prune_ext.testing import check_method, check_runtime, check_scheduler


class Honest(PruningMethod):
    """A method that keeps all promises: the gradient of the loss at one batch norm decides."""

    def __init__(self) -> None:
        self.seen = torch.zeros(1)

    def phases(self) -> Sequence[Phase]:
        return [Phase("train", 1), Phase("settle", 1)]

    def after_step(self, context: MethodContext) -> None:
        self.seen = self.seen + 1

    def scores(self, context: MethodContext) -> dict[str, Tensor]:
        return {g.name: torch.arange(g.num_channels).float() * self.seen for g in context.groups}

    def finish(self, context: MethodContext) -> Outcome:
        return Outcome(context.allocate(self.scores(context)).plan, facts={"steps": float(self.seen)})

    def state_dict(self) -> tuple[dict[str, Tensor], JsonState]:
        return {"seen": self.seen}, {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: JsonState) -> None:
        self.seen = tensors["seen"]


def spec_of(method: type[PruningMethod]) -> MethodSpec:
    return MethodSpec("honest", "one sentence", "none", NoOptions, lambda _: method(), needs_data=True)


HONEST = spec_of(Honest)


class IgnoresTheTarget(Honest):
    def finish(self, context: MethodContext) -> Outcome:
        return Outcome(plan_from_channels(context.groups, {context.groups.groups[0].name: [0]}))


class IgnoresTheLimits(Honest):
    def finish(self, context: MethodContext) -> Outcome:
        return Outcome(plan_from_channels(context.groups, {g.name: range(g.num_channels - 1) for g in context.groups}))


class ScoresTooFew(Honest):
    def scores(self, context: MethodContext) -> dict[str, Tensor]:
        return {name: score[:-1] for name, score in super().scores(context).items()}


class ScoresNaN(Honest):
    def scores(self, context: MethodContext) -> dict[str, Tensor]:
        return {name: score * torch.nan for name, score in super().scores(context).items()}


class LeavesAHook(Honest):
    def start(self, context: MethodContext, phase: Phase) -> None:
        context.model.register_forward_hook(lambda *_: None)


class LeavesAHookOnFailure(Honest):
    def start(self, context: MethodContext, phase: Phase) -> None:
        self.handle = context.model.register_forward_hook(lambda *_: None)

    def after_epoch(self, context: MethodContext, phase: Phase, epoch: int) -> None:
        self.handle.remove()


class LeavesAGlobalHook(Honest):
    def start(self, context: MethodContext, phase: Phase) -> None:
        self.handles.append(nn.modules.module.register_module_forward_hook(lambda *_: None))

    handles: ClassVar[list[RemovableHandle]] = []


class LeavesAMode(Honest):
    def finish(self, context: MethodContext) -> Outcome:
        context.model.eval()
        return super().finish(context)


class LeavesAGradient(Honest):
    def finish(self, context: MethodContext) -> Outcome:
        context.task_loss(context.batches(1)[0]).backward()
        return super().finish(context)


class FreezesForGood(Honest):
    def finish(self, context: MethodContext) -> Outcome:
        context.model.requires_grad_(False)
        return super().finish(context)


class PatchesForward(Honest):
    def start(self, context: MethodContext, phase: Phase) -> None:
        context.model.forward = context.model.forward


class RollsDice(Honest):
    def scores(self, context: MethodContext) -> dict[str, Tensor]:
        return {
            g.name: torch.tensor([random.SystemRandom().random() for _ in range(g.num_channels)])
            for g in context.groups
        }


class RollsNumpyDice(Honest):
    def scores(self, context: MethodContext) -> dict[str, Tensor]:
        return {g.name: torch.from_numpy(np.random.default_rng().random(g.num_channels)) for g in context.groups}


class DrawsWhenBuilt(Honest):
    def __init__(self) -> None:
        super().__init__()
        torch.rand(1)


class ForgetsItsState(Honest):
    def load_state_dict(self, tensors: Mapping[str, Tensor], values: JsonState) -> None:
        pass


class SavesAnObject(Honest):
    def state_dict(self) -> tuple[dict[str, Tensor], JsonState]:
        return {"seen": self.seen}, {"pairs": (1, 2)}


class SavesANumberAsTensor(Honest):
    def state_dict(self) -> tuple[dict[str, Tensor], JsonState]:
        return {"seen": self.seen, "steps": 3}, {}


class SwallowsErrors(Honest):
    def compute_loss(self, context: MethodContext, batch: Batch) -> Tensor:
        try:
            return context.task_loss(batch)
        except BaseException:  # noqa: BLE001 (the sabotage)
            return sum(p.sum() for p in context.model.parameters())


class HasNoPhase(Honest):
    def phases(self) -> Sequence[Phase]:
        return []


class HasTwinPhases(Honest):
    def phases(self) -> Sequence[Phase]:
        return [Phase("train", 1), Phase("train", 1)]


class CutsUndeclared(Honest):
    def start(self, context: MethodContext, phase: Phase) -> None:
        if phase.name == "settle":
            context.apply(plan_from_channels(context.groups, {"inside.0": [0]}))


class OptimizesUndeclared(Honest):
    def phases(self) -> Sequence[Phase]:
        return [Phase("train", 1, optimizers=lambda c: [torch.optim.Adam(c.model.parameters())])]


class HandsOverMasks(Honest):
    def finish(self, context: MethodContext) -> Outcome:
        return replace(super().finish(context), weight_masks={"stem.0.weight": torch.ones(12, 3, 3, 3) > 0})


class HandsOverWrongMasks(Honest):
    def finish(self, context: MethodContext) -> Outcome:
        return replace(super().finish(context), weight_masks={"stem.0.weight": torch.ones(3) > 0})


class StatesNaN(Honest):
    def finish(self, context: MethodContext) -> Outcome:
        return replace(super().finish(context), facts={"gain": float("nan")})


class LooseOptions(BaseModel):
    rate: float = 0.5


class DemandingOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    rate: float


METHODS: dict[str, tuple[MethodSpec, str]] = {
    "no name": (replace(HONEST, name=""), "name is lower case"),
    "no summary": (replace(HONEST, summary=" "), "has a summary"),
    "no reference": (replace(HONEST, reference=""), "has a reference"),
    "loose options": (replace(HONEST, options=LooseOptions), "Unknown options are refused"),
    "options without default": (replace(HONEST, options=DemandingOptions), "Every option has a default"),
    "invalid demo options": (replace(HONEST, demo_options={"nothing": 1}), "demo options are valid"),
    "demo options no JSON": (replace(HONEST, demo_options={"pair": (1, 2)}), "plain JSON"),
    "no product": (replace(HONEST, products=frozenset()), "products are some of"),
    "missing product": (replace(HONEST, products=frozenset({"plan", "gated_model"})), "A gated model is there"),
    "undeclared product": (spec_of(HandsOverMasks), "Weight masks are there if declared"),
    "masks of a wrong shape": (
        replace(spec_of(HandsOverWrongMasks), products=frozenset({"plan", "weight_masks"})), "shape of that parameter",
    ),
    "undeclared need for data": (replace(HONEST, needs_data=False), "declares needs_data"),
    "ignores the target": (spec_of(IgnoresTheTarget), "The target macs=0.6 is met"),
    "ignores the limits": (spec_of(IgnoresTheLimits), "is pruned within the limits"),
    "scores too few": (spec_of(ScoresTooFew), r"have shape \(11,\), expected \(12,\)"),
    "scores NaN": (spec_of(ScoresNaN), "contain 12 NaN"),
    "leaves a hook": (spec_of(LeavesAHook), "stays clean|Nothing is left"),
    "leaves a hook on failure": (spec_of(LeavesAHookOnFailure), "when the loss raises"),
    "leaves a global hook": (spec_of(LeavesAGlobalHook), "No hook stays on all modules"),
    "leaves a mode": (spec_of(LeavesAMode), "Modes and requires_grad"),
    "leaves a gradient": (spec_of(LeavesAGradient), "there is a gradient"),
    "freezes for good": (spec_of(FreezesForGood), "Modes and requires_grad"),
    "patches forward": (spec_of(PatchesForward), "replaced forward"),
    "rolls dice": (spec_of(RollsDice), "Two runs with one seed"),
    "rolls numpy's dice": (spec_of(RollsNumpyDice), "Two runs with one seed"),
    "draws when built": (spec_of(DrawsWhenBuilt), "random state is unchanged"),
    "forgets its state": (spec_of(ForgetsItsState), "fresh method that loads"),
    "saves an object": (spec_of(SavesAnObject), "plain JSON values"),
    "saves a number as tensor": (spec_of(SavesANumberAsTensor), "are tensors"),
    "swallows errors": (spec_of(SwallowsErrors), "comes through"),
    "no phase": (spec_of(HasNoPhase), "at least one phase"),
    "twin phases": (spec_of(HasTwinPhases), "names of phases are unique"),
    "cuts undeclared": (spec_of(CutsUndeclared), "declares changes_structure"),
    "optimizes undeclared": (spec_of(OptimizesUndeclared), "declares own_optimizers"),
    "states NaN": (spec_of(StatesNaN), "Facts are finite"),
}  # fmt: skip


def test_the_honest_method_passes() -> None:
    check_method(HONEST)


@pytest.mark.parametrize(("spec", "promise"), METHODS.values(), ids=METHODS)
def test_a_method_that_breaks_a_promise_is_caught(spec: MethodSpec, promise: str) -> None:
    with pytest.raises((AssertionError, NniPruneExtError), match=promise):
        check_method(spec)

    for handle in LeavesAGlobalHook.handles:
        handle.remove()
    LeavesAGlobalHook.handles.clear()


def schedule(function: Callable[[float], float]) -> SchedulerSpec:
    return SchedulerSpec("schedule", "one sentence", lambda: function)


def policy(function: Callable[..., Mapping[str, float]]) -> SchedulerSpec:
    return SchedulerSpec("ratio_policy", "one sentence", lambda: function)


def rule(function: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> SchedulerSpec:
    return SchedulerSpec("mask_update_rule", "one sentence", lambda: function)


class Looks:
    """A ratio policy that looks at data, honest unless a subclass says otherwise."""

    seen: Mapping[str, float] = {}

    def look(self, context: PolicyContext) -> Mapping[str, float]:
        return {group.name: 1 / group.num_channels for group in context.groups}

    def __call__(self, weights: Mapping[str, Sequence[Tensor]], *_: object) -> Mapping[str, float]:
        if not self.seen:
            raise ConfigError("made up")
        return {name: 1 + self.seen.get(name, 0.0) for name in weights}


class LooksAtRandom(Looks):
    def look(self, context: PolicyContext) -> Mapping[str, float]:
        return {group.name: float(torch.rand(())) for group in context.groups}


class SeesATensor(Looks):
    def look(self, context: PolicyContext) -> Mapping[str, float]:
        return {group.name: torch.ones(()) for group in context.groups}  # type: ignore[misc]


class SeesNothing(Looks):
    def look(self, context: PolicyContext) -> Mapping[str, float]:
        return {}


class TouchesStatistics(Looks):
    def look(self, context: PolicyContext) -> Mapping[str, float]:
        context.model.train()
        context.task_loss(context.batches(1)[0])
        return super().look(context)


class LeavesTheModeOfEvaluation(Looks):
    def look(self, context: PolicyContext) -> Mapping[str, float]:
        context.model.eval()
        return super().look(context)


class LeavesAHookBehind(Looks):
    def look(self, context: PolicyContext) -> Mapping[str, float]:
        context.model.register_forward_hook(lambda *_: None)
        return super().look(context)


class AnswersBlindly(Looks):
    def __call__(self, weights: Mapping[str, Sequence[Tensor]], *_: object) -> Mapping[str, float]:
        return dict.fromkeys(weights, 1.0)


class LosesWhatItHasNotSeen(Looks):
    def __call__(self, weights: Mapping[str, Sequence[Tensor]], *_: object) -> Mapping[str, float]:
        super().__call__(weights)
        return {name: own for name, own in self.seen.items() if name in weights}


def looking(policy: type[Looks]) -> SchedulerSpec:
    return SchedulerSpec("ratio_policy", "one sentence", policy, needs_data=True)


def zero_the_weights(weights: Mapping[str, Sequence[Tensor]], *_: object) -> Mapping[str, float]:
    for layers in weights.values():
        for rows in layers:
            rows.mul_(0.5)
    return dict.fromkeys(weights, 1.0)


def flip_in_place(old: Tensor, proposed: Tensor, *_: object) -> Tensor:
    old.logical_not_()
    return proposed.clone()


SCHEDULERS: dict[str, tuple[SchedulerSpec, str]] = {
    "no summary": (replace(schedule(lambda p: p), summary=""), "summary"),
    "unknown kind": (replace(schedule(lambda p: p), kind="calendar"), "kind"),
    "falls": (schedule(lambda p: p if p < 0.5 else 0.4 if p < 0.9 else 1.0), "never falls"),
    "starts late": (schedule(lambda p: 0.1 + 0.9 * p), "is 0 at progress 0"),
    "ends early": (schedule(lambda p: p * (1 - 1e-9)), "is exactly 1 at progress 1"),
    "overshoots": (schedule(lambda p: 1.1 if 0.5 < p < 1 else float(p == 1)), "between 0 and 1"),
    "is no number": (schedule(lambda p: float("nan")), "finite"),
    "schedule rolls dice": (schedule(lambda p: p if p in (0, 1) else 0.5 + 1e-9 * random.random()), "agree|falls"),
    "forgets a group": (policy(lambda w, *_: {"wide": 1.0}), "one ratio for every group"),
    "negative ratio": (policy(lambda w, *_: dict.fromkeys(w, -1.0)), "at least 0"),
    "infinite ratio": (policy(lambda w, *_: dict.fromkeys(w, float("inf"))), "finite"),
    "all zero": (policy(lambda w, *_: dict.fromkeys(w, 0.0)), "at least one ratio above 0"),
    "policy rolls dice": (policy(lambda w, *_: dict.fromkeys(w, float(torch.rand(())))), "its arguments only"),
    "has favourites": (policy(lambda w, *_: {name: len(name) - 3.0 for name in w} | {"twin": 2.0}), "equal groups"),
    "changes weights": (policy(zero_the_weights), "weights unchanged"),
    "schedule with data": (replace(schedule(lambda p: p), needs_data=True), "Only a ratio policy looks at data"),
    "looks at random": (looking(LooksAtRandom), "Two looks at the same data"),
    "sees a tensor": (looking(SeesATensor), "finite float per group"),
    "sees nothing": (looking(SeesNothing), "sees something"),
    "touches statistics": (looking(TouchesStatistics), "leaves the model unchanged"),
    "leaves the mode of evaluation": (looking(LeavesTheModeOfEvaluation), "leaves no trace"),
    "leaves a hook behind": (looking(LeavesAHookBehind), "leaves no trace on the model: a hook"),
    "answers blindly": (looking(AnswersBlindly), "refuses to answer"),
    "loses what it has not seen": (looking(LosesWhatItHasNotSeen), "one ratio for every group"),
    "mask of floats": (rule(lambda old, new, *_: new.float()), "bool"),
    "wrong shape": (rule(lambda old, new, *_: new[None]), "has the shape"),
    "wrong count": (rule(lambda old, new, *_: old & new), "as many channels as proposed"),
    "never content": (rule(lambda old, new, *_: new.roll(1)), "asks to keep|ask to keep"),
    "rule rolls dice": (rule(lambda old, new, *_: new if torch.equal(old, new) else new[torch.randperm(len(new))]),
                        "its arguments only"),
    "changes its arguments": (rule(flip_in_place), "arguments unchanged"),
}  # fmt: skip


def test_an_honest_policy_that_looks_at_data_passes() -> None:
    check_scheduler(looking(Looks))


@pytest.mark.parametrize(("spec", "promise"), SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_that_breaks_a_promise_is_caught(spec: SchedulerSpec, promise: str) -> None:
    with pytest.raises(AssertionError, match=promise):
        check_scheduler(spec)


class Session:
    """ONNX Runtime's session behind a mask; single answers are replaced by subclasses."""

    def __init__(self, inner: InferenceSession) -> None:
        self.inner = inner
        self.providers: tuple[str, ...] = inner.providers
        self.device = inner.device

    @property
    def node_placement(self) -> Mapping[str, int]:
        return self.inner.node_placement

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        return self.inner.run(inputs)

    def bind(self, inputs: Sequence[Array]) -> Callable[[], object]:
        return self.inner.bind(inputs)


class FallsBack(Session):
    def __init__(self, inner: InferenceSession) -> None:
        super().__init__(inner)
        self.providers = ("FastExecutionProvider", *inner.providers)


class HidesProviders(Session):
    def __init__(self, inner: InferenceSession) -> None:
        super().__init__(inner)
        self.providers = ()


class HidesPlacement(Session):
    node_placement: Mapping[str, int] = {}


class IsOff(Session):
    def run(self, inputs: Sequence[Array]) -> list[Array]:
        return [output * 1.01 for output in self.inner.run(inputs)]


class IsHalf(Session):
    def run(self, inputs: Sequence[Array]) -> list[Array]:
        return [output.astype(np.float16) for output in self.inner.run(inputs)]


class Wanders(Session):
    calls = 0

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        self.calls += 1
        return [output * (1 + 1e-6 * self.calls) for output in self.inner.run(inputs)]


class EatsInputs(Session):
    def bind(self, inputs: Sequence[Array]) -> Callable[[], object]:
        inputs[0].fill(0)  # type: ignore[attr-defined]
        return lambda: None


class Runtime:
    name = "masked"

    def __init__(self, mask: type[Session] = Session) -> None:
        self.mask = mask

    def availability(self) -> Availability:
        return Availability(True, "It is there.")

    @contextmanager
    def session(
        self, source: RunnableModel, *, threads: int | None = 1, precision: Precision = "fp32"
    ) -> Iterator[InferenceSession]:
        with OnnxRuntimeCpu().session(source, threads=threads, precision=precision) as inner:
            yield self.mask(inner)


class SaysNothing(Runtime):
    def availability(self) -> Availability:
        return Availability(True, "")


class RunsThoughUnusable(Runtime):
    def availability(self) -> Availability:
        return Availability(False, "There is no such device.")


class Refuses(Runtime):
    def availability(self) -> Availability:
        return Availability(False, "There is no such device.")

    def session(self, source: RunnableModel, *, threads: int | None = 1, precision: Precision = "fp32"):
        raise RuntimeUnavailableError("There is no such device.")


class Swallows(Runtime):
    @contextmanager
    def session(
        self, source: RunnableModel, *, threads: int | None = 1, precision: Precision = "fp32"
    ) -> Iterator[InferenceSession]:
        with OnnxRuntimeCpu().session(source) as inner:
            try:
                yield self.mask(inner)
            except BaseException:  # noqa: BLE001 (the sabotage)
                return


class KeepsTheMode(Runtime):
    @contextmanager
    def session(
        self, source: RunnableModel, *, threads: int | None = 1, precision: Precision = "fp32"
    ) -> Iterator[InferenceSession]:
        with TorchEager().session(source) as inner:
            yield inner
        source.module.eval()  # type: ignore[union-attr]


class KeepsThreads(Runtime):
    @contextmanager
    def session(
        self, source: RunnableModel, *, threads: int | None = 1, precision: Precision = "fp32"
    ) -> Iterator[InferenceSession]:
        with TorchEager().session(source) as inner:
            yield inner
        torch.set_num_threads(torch.get_num_threads() + 1)


class TakesNothing(Runtime):
    @contextmanager
    def session(
        self, source: RunnableModel, *, threads: int | None = 1, precision: Precision = "fp32"
    ) -> Iterator[InferenceSession]:
        if source.onnx_path is None:
            yield None
        else:
            with OnnxRuntimeCpu().session(source) as inner:
                yield inner


RUNTIMES: dict[str, tuple[Runtime, str]] = {
    "says nothing": (SaysNothing(), "explains itself in a sentence"),
    "runs though unusable": (RunsThoughUnusable(), "raises RuntimeUnavailableError"),
    "falls back": (Runtime(FallsBack), "it fell back to CPUExecutionProvider"),
    "hides providers": (Runtime(HidesProviders), "reports its providers"),
    "hides placement": (Runtime(HidesPlacement), "reports how many nodes"),
    "is off": (Runtime(IsOff), "computes what PyTorch computes"),
    "is half": (Runtime(IsHalf), "float32 arrays"),
    "wanders": (Runtime(Wanders), "second run gives the same"),
    "eats inputs": (Runtime(EatsInputs), "inputs unchanged"),
    "swallows": (Swallows(), "does not swallow errors"),
    "keeps the mode": (KeepsTheMode(), "in the mode in which it found it"),
    "keeps threads": (KeepsThreads(), "gives PyTorch's threads back"),
    "takes nothing": (TakesNothing(), "without the form that it needs"),
}


@pytest.mark.parametrize("runtime", [Runtime(), Refuses()], ids=["usable", "refusing"])
def test_an_honest_runtime_passes(runtime: Runtime, tiny: RunnableModel) -> None:
    check_runtime(runtime, tiny)


@pytest.mark.parametrize(("runtime", "promise"), RUNTIMES.values(), ids=RUNTIMES)
def test_a_runtime_that_breaks_a_promise_is_caught(runtime: Runtime, promise: str, tiny: RunnableModel) -> None:
    threads = torch.get_num_threads()

    with pytest.raises(AssertionError, match=promise):
        check_runtime(runtime, tiny)

    torch.set_num_threads(threads)


def _even(context: MethodContext, options: object) -> dict[str, Tensor]:
    return {group.name: torch.ones(group.num_channels) for group in context.groups}


def _one_group_missing(context: MethodContext, options: object) -> dict[str, Tensor]:
    return dict(list(_even(context, options).items())[1:])


def _one_score_missing(context: MethodContext, options: object) -> dict[str, Tensor]:
    return {name: scores[1:] for name, scores in _even(context, options).items()}


def _no_numbers(context: MethodContext, options: object) -> dict[str, Tensor]:
    return {name: scores * torch.nan for name, scores in _even(context, options).items()}


def _drawn_anew(context: MethodContext, options: object) -> dict[str, Tensor]:
    return {group.name: torch.rand(group.num_channels) for group in context.groups}


def _changes_weights(context: MethodContext, options: object) -> dict[str, Tensor]:
    with torch.no_grad():
        next(context.model.parameters()).mul_(2)
    return _even(context, options)


def _leaves_eval(context: MethodContext, options: object) -> dict[str, Tensor]:
    context.model.train(not context.model.training)
    next(context.model.parameters()).requires_grad_(False)
    return _even(context, options)


def _leaves_gradients(context: MethodContext, options: object) -> dict[str, Tensor]:
    context.task_loss(context.batches(1)[0]).backward()
    return _even(context, options)


@pytest.mark.parametrize(
    ("scores", "promise"),
    [
        (_one_group_missing, "every group and no other"),
        (_one_score_missing, r"a tensor of shape \(\d+,\), not"),
        (_no_numbers, "are numbers"),
        (_drawn_anew, "are the same"),
        (_changes_weights, "weights unchanged"),
        (_leaves_eval, "modes and requires_grad unchanged"),
        (_leaves_gradients, "Scoring leaves the model clean|weights unchanged"),
    ],
)
def test_broken_scores_are_caught(scores: Callable[..., dict[str, Tensor]], promise: str) -> None:
    with pytest.raises(AssertionError, match=promise):
        check_method(replace(HONEST, scores=scores))


def test_honest_scores_pass() -> None:
    check_method(replace(HONEST, scores=_even))
