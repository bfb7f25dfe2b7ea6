"""The aim of a job, or why it cannot have one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from nni_prune_ext.allocation import CostModel, Limits, Scope, Target, latency_of
from nni_prune_ext.errors import ConfigError, TargetError
from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.latency.aiming import LatencyAim
from nni_prune_ext.latency.conditions import LatencyConditions
from nni_prune_ext.latency.stopwatch import Stopwatch
from nni_prune_ext.methods.base import MethodSpec


def aim_at(
    spec: MethodSpec,
    model: nn.Module,
    example_inputs: ExampleInputs,
    cost_model: CostModel,
    targets: Sequence[Target],
    *,
    limits: Limits,
    scope: Scope,
    conditions: LatencyConditions | None,
    tell: Callable[[str], None],
) -> LatencyAim | None:
    """Returns what aims at the latency among the targets; ``None`` where no target is about latency.

    Raises:
        TargetError: the method hands over gates, so that there is no one latency.
        ConfigError: conditions are given, but no target is about latency.
        RuntimeUnavailableError: the runtime cannot be used here.
    """
    target = latency_of(targets)
    if target is None:
        if conditions is not None:
            raise ConfigError(
                f"Conditions of a latency are given ({conditions}), but no target is about latency. Expected one such "
                "as latency=0.7 or latency=2.0ms. Add it, or leave the conditions out."
            )
        return None
    refusal = latency_refusal(spec)
    if refusal is not None:
        raise TargetError(f"The target {target} cannot be aimed at: {refusal}")
    limits.check(cost_model.groups)
    stopwatch = Stopwatch(model, example_inputs, conditions or LatencyConditions())
    return LatencyAim(model, example_inputs, cost_model, targets, limits, scope, stopwatch, tell)


def latency_refusal(spec: MethodSpec) -> str | None:
    """Says why a method cannot take a latency target; ``None`` if it can."""
    if "gated_model" not in spec.products:
        return None
    return (
        f"the method '{spec.name}' hands over a network whose channels are switched per image, so that there is no one "
        "latency. Expected a method that only removes channels. Ask for macs or params, or choose another method "
        "(`nni-prune-ext list`)."
    )
