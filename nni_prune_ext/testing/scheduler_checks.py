"""What every scheduler promises, one check per kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TypeVar, cast

import torch
from torch import Tensor

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.methods.baselines import L1
from nni_prune_ext.schedules import DataRatioPolicy, MaskUpdateRule, RatioPolicy, Schedule, SchedulerSpec
from nni_prune_ext.scoring.group_reduction import writer_rows
from nni_prune_ext.testing.method_bench import Bench, global_hooks, modes_of, traces_on

_Result = TypeVar("_Result")
_PROGRESS = [step / 64 for step in range(65)]


def check_scheduler(spec: SchedulerSpec) -> None:
    """Checks every promise of a scheduler of any kind.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    _require(isinstance(spec, SchedulerSpec), f"What is registered is a SchedulerSpec, not a {type(spec).__name__}.")
    _require(spec.kind in _CHECKS, f"The kind of a scheduler is one of {', '.join(_CHECKS)}, not '{spec.kind}'.")
    _require(bool(spec.summary.strip()), "A scheduler has a summary for listings.")
    _require(spec.kind == "ratio_policy" or not spec.needs_data, "Only a ratio policy looks at data.")
    _CHECKS[spec.kind](spec)


def check_schedule(spec: SchedulerSpec) -> None:
    """Checks that a schedule goes from 0 to exactly 1 without ever falling.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    schedule = cast("Schedule", spec.build())
    values = [float(schedule(progress)) for progress in _PROGRESS]
    _require(all(math.isfinite(v) for v in values), "A schedule gives finite numbers.")
    _require(values[0] == 0, f"A schedule is 0 at progress 0, not {values[0]}.")
    _require(values[-1] == 1, f"A schedule is exactly 1 at progress 1, not {values[-1]!r}.")
    _require(all(0 <= v <= 1 for v in values), "A schedule stays between 0 and 1.")
    _require(all(a <= b for a, b in pairwise(values)), "A schedule never falls.")
    again = cast("Schedule", spec.build())
    _require(values == [float(again(progress)) for progress in _PROGRESS], "Two fresh schedules agree.")


def check_ratio_policy(spec: SchedulerSpec) -> None:
    """Checks that a ratio policy gives one usable ratio per group, from its arguments and what it saw of data alone.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    weights, seen = _toy_weights(), {"wide": 0.3, "twin": 0.3, "double": 0.1, "dead": 0.0}
    if spec.needs_data:
        _check_look(spec)
    for previous in (dict.fromkeys(weights, 0.0), {name: 0.1 * i for i, name in enumerate(sorted(weights))}):
        previous["twin"] = previous["wide"]
        policy, again = _policy(spec, seen), _policy(spec, seen)
        for progress in (0.0, 0.5, 1.0):
            before = {name: [rows.clone() for rows in layers] for name, layers in weights.items()}
            ratios = _in_random_state(1, partial(policy, weights, dict(previous), progress))
            repeated = _in_random_state(2, partial(again, weights, dict(previous), progress))
            _require(set(ratios) == set(weights), "A ratio policy gives one ratio for every group and no other.")
            values = [float(ratio) for ratio in ratios.values()]
            _require(
                all(math.isfinite(v) and v >= 0 for v in values), "A ratio policy gives finite ratios of at least 0."
            )
            _require(any(v > 0 for v in values), "A ratio policy gives at least one ratio above 0.")
            _require(dict(ratios) == dict(repeated), "A ratio policy depends on its arguments only.")
            _require(ratios["wide"] == ratios["twin"], "A ratio policy treats equal groups equally.")
            _require(_same(before, weights), "A ratio policy leaves the weights unchanged.")


def _check_look(spec: SchedulerSpec) -> None:
    """Checks a ratio policy that looks at data, on the bench of methods."""
    run = Bench.of(L1, {}).run()
    tensors = dict(run.model.named_parameters())
    weights = {group.name: writer_rows(group, tensors) for group in run.groups}
    before, modes = {name: own.clone() for name, own in run.model.state_dict().items()}, modes_of(run.model)
    hooks = global_hooks()
    first, second = (
        _in_random_state(seed, lambda: dict(cast("DataRatioPolicy", spec.build()).look(run))) for seed in (1, 2)
    )
    _require(first == second, "Two looks at the same data see the same.")
    _require(bool(first), "A ratio policy that looks at data sees something.")
    plain = all(type(name) is str and type(value) is float and math.isfinite(value) for name, value in first.items())
    _require(plain, "What a ratio policy saw is a finite float per group, so that hosts can save it.")
    after = run.model.state_dict()
    _require(all(torch.equal(own, after[name]) for name, own in before.items()), "A look leaves the model unchanged.")
    left = [*traces_on(run.model), *(["a global hook"] if global_hooks() != hooks else [])]
    _require(modes == modes_of(run.model) and not left, f"A look leaves no trace on the model: {', '.join(left)}.")
    ratios = _policy(spec, first)(weights, dict.fromkeys(weights, 0.0), 1.0)
    _require(set(ratios) == set(weights), "A ratio policy gives one ratio for every group and no other.")
    try:
        _policy(spec, {})(weights, dict.fromkeys(weights, 0.0), 1.0)
    except ConfigError:
        return
    raise AssertionError("A ratio policy that has not looked at the data it needs refuses to answer.")


def _policy(spec: SchedulerSpec, seen: Mapping[str, float]) -> RatioPolicy:
    """Returns a fresh policy, which has seen something if it looks at data: as a host makes it in a run continued."""
    policy = spec.build()
    if spec.needs_data:
        cast("DataRatioPolicy", policy).seen = seen
    return cast("RatioPolicy", policy)


def check_mask_update_rule(spec: SchedulerSpec) -> None:
    """Checks that a mask update rule keeps the number of channels and touches nothing that agrees.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    generator = torch.Generator().manual_seed(0)
    for width in (1, 8, 33):
        for kept_before in {width, max(width // 2, 1)}:
            for progress in (0.0, 0.4, 1.0):
                scores = torch.rand(width, generator=generator)
                old = _top(torch.rand(width, generator=generator), kept_before)
                for kept in {kept_before, max(width // 4, 1)}:
                    _check_mask_update(spec, old, _top(scores, kept), scores, progress)
                _require(
                    torch.equal(old, cast("MaskUpdateRule", spec.build())(old.clone(), old.clone(), scores, progress)),
                    "A mask update rule keeps a mask that the scores ask to keep.",
                )


def _check_mask_update(spec: SchedulerSpec, old: Tensor, proposed: Tensor, scores: Tensor, progress: float) -> None:
    given = [old.clone(), proposed.clone(), scores.clone()]

    def update() -> Tensor:
        return cast("MaskUpdateRule", spec.build())(old, proposed, scores, progress)

    returned = _in_random_state(1, update)
    unchanged = all(torch.equal(a, b) for a, b in zip(given, (old, proposed, scores)))
    _require(unchanged, "A mask update rule leaves its arguments unchanged.")
    mask = returned.clone() if isinstance(returned, Tensor) else torch.empty(0)
    _require(mask.dtype is torch.bool, "A mask update rule returns a bool tensor.")
    _require(mask.shape == proposed.shape, f"A mask has the shape {tuple(proposed.shape)}, not {tuple(mask.shape)}.")
    _require(
        int(mask.sum()) == int(proposed.sum()),
        f"A mask update rule keeps as many channels as proposed: {int(proposed.sum())}, not {int(mask.sum())}.",
    )
    _require(torch.equal(mask, _in_random_state(2, update)), "A mask update rule depends on its arguments only.")


def _toy_weights() -> Mapping[str, Sequence[Tensor]]:
    """Returns groups with one layer, two layers, equal layers, dead layers, and none that writes all channels."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(16, 9, generator=generator)
    double = [torch.randn(8, 9, generator=generator), torch.randn(8, 27, generator=generator)]
    return {"wide": [wide], "twin": [wide.clone()], "double": double, "dead": [torch.zeros(8, 9)], "none": []}


def _in_random_state(seed: int, call: Callable[[], _Result]) -> _Result:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return call()


def _top(scores: Tensor, count: int) -> Tensor:
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    mask[scores.topk(count).indices] = True
    return mask


def _same(first: Mapping[str, Sequence[Tensor]], second: Mapping[str, Sequence[Tensor]]) -> bool:
    return all(torch.equal(a, b) for name in first for a, b in zip(first[name], second[name]))


def _require(condition: bool, promise: str) -> None:
    if not condition:
        raise AssertionError(promise)


_CHECKS: Mapping[str, Callable[[SchedulerSpec], None]] = {
    "schedule": check_schedule,
    "ratio_policy": check_ratio_policy,
    "mask_update_rule": check_mask_update_rule,
}
