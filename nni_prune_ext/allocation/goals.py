"""What was asked for and what came of it: targets read, checked against a method, and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor

from nni_prune_ext.allocation.cost_model import CostModel, Reference
from nni_prune_ext.allocation.targets import Achieved, Scope, Target
from nni_prune_ext.costs import Costs
from nni_prune_ext.errors import ConfigError, TargetError
from nni_prune_ext.plan import PruningPlan, removed_channels


def parse_targets(target: str | Target | Sequence[str | Target]) -> tuple[Target, ...]:
    """Returns the targets as a tuple, checked.

    Raises:
        TargetError: there is none, one is unreadable or out of range, or a sparsity comes with others.
    """
    given = [target] if isinstance(target, (str, Target)) else list(target)
    if not given:
        raise TargetError("No target was given, expected at least one. Ask for example for macs=0.5.")
    targets = tuple(Target.parse(t) if isinstance(t, str) else t for t in given)
    for one in targets:
        one.check()
    if len(targets) > 1 and sparsity_of(targets) is not None:
        raise TargetError(
            f"The targets {', '.join(map(str, targets))} cannot be met together: a sparsity masks single weights and "
            "removes nothing. Expected one of the two. Ask for sparsity alone, or for channels (macs, params, ratio)."
        )
    if sum(target.metric == "latency" for target in targets) > 1:
        raise TargetError(
            f"There are several latencies among the targets {', '.join(map(str, targets))}, expected at most one: all "
            "would be measured under the same conditions. Keep the smallest."
        )
    return targets


def latency_of(targets: Sequence[Target]) -> Target | None:
    """Returns the target about latency; ``None`` where there is none."""
    return next((target for target in targets if target.metric == "latency"), None)


def counted_only(targets: Sequence[Target]) -> tuple[Target, ...]:
    """Returns the targets that follow from shapes alone: neither a sparsity nor a latency."""
    return tuple(target for target in targets if target.metric not in ("sparsity", "latency"))


def sparsity_of(targets: Sequence[Target]) -> float | None:
    """Returns the share of single weights to mask; ``None`` where channels are to be removed."""
    return next((target.value for target in targets if target.metric == "sparsity"), None)


def achieved_targets(
    targets: Sequence[Target],
    cost_model: CostModel,
    plan: PruningPlan,
    costs: Costs,
    weight_masks: Mapping[str, Tensor] | None = None,
    latency_ms: tuple[float, float] | None = None,
) -> tuple[Achieved, ...]:
    """States asked and achieved per target from the counted costs of the compact model.

    Args:
        latency_ms: measured side by side, of the dense and of the compact model; for a target about latency.

    Sparsity is the share of zeros in the masks, so it is about the tensors that a method masks.
    """
    reference = Reference.of(cost_model)
    counted: dict[str, float] = {key: float(value) for key, value in costs.as_dict().items()}
    gone = sum(int(mask.sum()) for mask in removed_channels(plan, cost_model.groups).values())
    counted["ratio"] = gone / max(sum(reference.widths.values()), 1)
    masks = list((weight_masks or {}).values())
    counted["sparsity"] = 1 - sum(int(m.sum()) for m in masks) / max(sum(m.numel() for m in masks), 1) if masks else 0.0
    dense = dict(reference.costs)
    if latency_ms is not None:
        dense["latency"], counted["latency"] = latency_ms
    return tuple(
        Achieved(t, dense.get(t.metric, 0.0), t.bound(dense.get(t.metric, 0.0)), counted[t.metric]) for t in targets
    )


def checked_scope(scope: str) -> Scope:
    """Returns the scope.

    Raises:
        ConfigError: it is neither ``global`` nor ``local``.
    """
    if scope not in ("global", "local"):
        raise ConfigError(
            f"The scope is '{scope}', expected 'global' (one ranking) or 'local' (one ratio). Choose one."
        )
    return cast("Scope", scope)
