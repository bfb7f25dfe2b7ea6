"""Every registered plugin keeps the promises of its kind; the registry says which there are."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nni_prune_ext.mask_updates import best
from nni_prune_ext.methods.base import MethodContext, MethodSpec, NoOptions, Outcome, Phase, PruningMethod
from nni_prune_ext.plan import plan_from_channels
from nni_prune_ext.registry import load_plugin, plugins
from nni_prune_ext.runtimes.base import InferenceRuntime, RunnableModel
from nni_prune_ext.schedules import SchedulerSpec
from nni_prune_ext.testing import check_method, check_runtime, check_scheduler


@pytest.mark.parametrize("name", plugins("pruners"))
def test_every_registered_method_keeps_its_promises(name: str) -> None:
    spec = load_plugin("pruners", name)

    assert isinstance(spec, MethodSpec)
    assert name == spec.name
    check_method(spec)


class Twofold(PruningMethod):
    """Hands over masks where single weights are asked for, and a plan otherwise."""

    def phases(self) -> list[Phase]:
        return [Phase("mask")]

    def finish(self, context: MethodContext) -> Outcome:
        if context.unit == "channel":
            return Outcome(
                context.allocate({g.name: torch.arange(g.num_channels).float() for g in context.groups}).plan
            )
        return Outcome(plan_from_channels(context.groups, {}), weight_masks=self.masks(context))

    def masks(self, context: MethodContext) -> dict[str, Tensor]:
        weights = {name: context.model.get_parameter(name).detach().abs() for name in context.maskable}
        counts = context.masked_counts(weights)
        return {name: best(weight, weight.numel() - counts[name]) for name, weight in weights.items()}


class ForgetsTheMasks(Twofold):
    def finish(self, context: MethodContext) -> Outcome:
        return replace(super().finish(context), weight_masks=None)


class MasksTooLittle(Twofold):
    def masks(self, context: MethodContext) -> dict[str, Tensor]:
        weights = {name: context.model.get_parameter(name).detach() for name in context.maskable}
        return {name: torch.arange(w.numel()).reshape(w.shape) % 2 == 0 for name, w in weights.items()}


class MasksWhatIsExcluded(Twofold):
    def masks(self, context: MethodContext) -> dict[str, Tensor]:
        return {**super().masks(context), "whole.0.weight": torch.zeros(8, 12, 3, 3, dtype=torch.bool)}


class CutsBesides(Twofold):
    def finish(self, context: MethodContext) -> Outcome:
        if context.unit == "channel":
            return super().finish(context)
        return replace(super().finish(context), plan=plan_from_channels(context.groups, {"inside.0": [0]}))


class MasksAtRandom(Twofold):
    def masks(self, context: MethodContext) -> dict[str, Tensor]:
        weights = {name: context.model.get_parameter(name).detach() for name in context.maskable}
        dice = random.SystemRandom()
        return {name: best(torch.tensor([dice.random() for _ in w.flatten()]), w.numel() // 3).reshape(w.shape)
                for name, w in weights.items()}  # fmt: skip


class LeavesAHookOnWeights(Twofold):
    def start(self, context: MethodContext, phase: Phase) -> None:
        if context.unit == "weight":
            context.model.register_forward_hook(lambda *_: None)


def twofold(method: type[Twofold]) -> MethodSpec:
    return MethodSpec("twofold", "one sentence", "none", NoOptions, lambda _: method(),
                      products=frozenset({"plan", "weight_masks"}))  # fmt: skip


def test_a_method_with_plans_and_masks_that_hands_over_what_is_asked_for_passes() -> None:
    check_method(twofold(Twofold))


@pytest.mark.parametrize(
    ("method", "promise"),
    [
        (ForgetsTheMasks, "Weight masks are handed over where single weights are asked for"),
        (MasksTooLittle, "The target sparsity=0.6 is met"),
        (MasksWhatIsExcluded, "'whole.0.weight' may not, or is excluded"),
        (CutsBesides, "No channel is removed where single weights are asked for"),
        (MasksAtRandom, "Two runs with one seed"),
        (LeavesAHookOnWeights, "stays clean|Nothing is left"),
    ],
)
def test_a_broken_promise_about_single_weights_is_caught(method: type[Twofold], promise: str) -> None:
    with pytest.raises(AssertionError, match=promise):
        check_method(twofold(method))


@pytest.mark.parametrize("name", plugins("schedulers"))
def test_every_registered_scheduler_keeps_its_promises(name: str) -> None:
    spec = load_plugin("schedulers", name)

    assert isinstance(spec, SchedulerSpec)
    check_scheduler(spec)


@pytest.mark.parametrize("name", plugins("runtimes"))
def test_every_registered_runtime_keeps_its_promises(name: str, tiny: RunnableModel) -> None:
    runtime: InferenceRuntime = load_plugin("runtimes", name)()

    assert name == runtime.name
    check_runtime(runtime, tiny)


@pytest.mark.parametrize(
    "name", [n for n in plugins("pruners") if "steps" in load_plugin("pruners", n).options.model_fields]
)
def test_methods_that_work_in_steps_keep_their_promises_with_training_between(name: str) -> None:
    spec = load_plugin("pruners", name)

    check_method(spec, options={"steps": 2, "schedule": "agp", "epochs_per_step": 1, "ratio_policy": "uniform_ratio"})
