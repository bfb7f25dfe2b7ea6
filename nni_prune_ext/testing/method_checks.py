"""What every method promises, as one check for authors of plugins and for the built-in ones."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from nni_prune_ext.checkpoints import Checkpoints
from nni_prune_ext.errors import ConfigError
from nni_prune_ext.inputs import call_model, tensors_in
from nni_prune_ext.methods.base import Batch, MethodSpec, Outcome
from nni_prune_ext.pipeline import PruneResult, method_options
from nni_prune_ext.plan import removed_channels
from nni_prune_ext.testing.method_bench import (
    LIMITS,
    SPARSITY,
    Bench,
    CountedRun,
    Interrupted,
    StoppingCheckpoints,
    Watched,
    global_hooks,
    modes_of,
    targets_for,
    traces_on,
)
from nni_prune_ext.training import cross_entropy, drive


def check_method(spec: MethodSpec, *, options: Mapping[str, object] | None = None) -> None:
    """Checks every promise of a method on a tiny network; takes about ten short runs.

    A method that declares plans and weight masks is asked for channels and for single weights in turn.

    Args:
        spec: what is registered.
        options: configuration to check with; the specification's ``demo_options`` unless given.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    check_declaration(spec)
    bench = Bench.of(spec, spec.demo_options if options is None else options)
    _check_phases(bench)
    _check_scores(bench)
    for targets in targets_for(spec.products):
        _check_runs(replace(bench, targets=targets))


def check_declaration(spec: MethodSpec) -> None:
    """Checks what a method says about itself; nothing is run.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    _require(isinstance(spec, MethodSpec), f"What is registered is a MethodSpec, not a {type(spec).__name__}.")
    _require(
        bool(re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", spec.name)),
        f"A name is lower case without spaces, not '{spec.name}'.",
    )
    for field in ("summary", "reference"):
        _require(bool(getattr(spec, field).strip()), f"A method has a {field} for listings.")
    _require(isinstance(spec.options, type) and issubclass(spec.options, BaseModel), "Options are a pydantic model.")
    required = [name for name, field in spec.options.model_fields.items() if field.is_required()]
    _require(not required, f"Every option has a default; {required} have none.")
    _require(_refused(spec, {"an_option_that_nobody_has": 1}), 'Unknown options are refused (extra="forbid").')
    defaults = spec.options()
    again = spec.options.model_validate_json(defaults.model_dump_json())
    _require(again == defaults, "Options survive a round trip through JSON.")
    _require(
        json.loads(json.dumps(spec.demo_options)) == dict(spec.demo_options), "The demo options are plain JSON values."
    )
    _require(not _refused(spec, spec.demo_options), "The demo options are valid.")
    _require(spec.score_options <= set(spec.options.model_fields), "Score options are among the options.")
    known = {"plan", "weight_masks", "gated_model"}
    _require(bool(spec.products) and spec.products <= known, f"The products are some of {sorted(known)}.")


def _check_runs(bench: Bench) -> None:
    """Checks what a method does when it is asked for the targets of the bench."""
    _check_need_for_data(bench)
    result = _check_user_model_is_unchanged(bench)
    _check_result(bench, result)
    _check_same_seed_same_result(bench, result)
    _check_result(bench, bench.prune(seed=1))
    calls = _check_run_leaves_no_trace(bench)
    _check_failure_leaves_no_trace(bench, calls)
    _check_saved_state_continues(bench)


def _check_phases(bench: Bench) -> None:
    phases = bench.spec.build(bench.configured()).phases()
    _require(bool(phases), "A method has at least one phase.")
    _require(len({phase.name for phase in phases}) == len(phases), "The names of phases are unique.")
    _require(all(phase.epochs >= 0 for phase in phases), "No phase has a negative number of epochs.")
    makes = any(phase.optimizers is not None for phase in phases)
    _require(bench.spec.own_optimizers or not makes, "A method that makes optimizers declares own_optimizers.")
    trains = any(phase.epochs for phase in bench.spec.build(bench.spec.options()).phases())
    _require(bench.spec.needs_data or not trains, "A method that trains with its default options declares needs_data.")


def _check_need_for_data(bench: Bench) -> None:
    if not bench.spec.needs_data:
        replace(bench, options={}).prune(with_data=False)
        return
    try:
        bench.prune(with_data=False)
    except ConfigError:
        return
    raise AssertionError("A method that needs data is refused without it.")


def _check_scores(bench: Bench) -> None:
    """Checks the scores that hosts with a schedule of their own ask for."""
    scores = bench.spec.scores
    if scores is None:
        return
    run = bench.run()
    weights = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    modes, random_state = modes_of(run.model), torch.get_rng_state()
    first, second = (scores(run, bench.configured()) for _ in range(2))
    _require(set(first) == {g.name for g in run.groups}, "Scores are given for every group and no other.")
    for group in run.groups:
        own = first[group.name]
        _require(
            isinstance(own, Tensor) and tuple(own.shape) == (group.num_channels,),
            f"The scores of '{group.name}' are a tensor of shape ({group.num_channels},), not {_shape(own)}.",
        )
        _require(bool((~own.isnan()).all()), f"The scores of '{group.name}' are numbers.")
        _require(torch.equal(own, second[group.name]), "Scores of the same weights are the same.")
    now = run.model.state_dict()
    _require(all(torch.equal(weights[name], now[name]) for name in weights), "Scoring leaves the weights unchanged.")
    _require(modes == modes_of(run.model), "Scoring leaves modes and requires_grad unchanged.")
    _require(not traces_on(run.model), f"Scoring leaves the model clean, but there is {_first(traces_on(run.model))}.")
    _require(torch.equal(random_state, torch.get_rng_state()), "Scoring leaves the random state unchanged.")


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _check_user_model_is_unchanged(bench: Bench) -> PruneResult:
    weights = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
    modes, random_state, hooks = modes_of(bench.model), torch.get_rng_state(), global_hooks()
    result = bench.prune()
    now = bench.model.state_dict()
    _require(all(torch.equal(weights[name], now[name]) for name in weights), "The user's weights are unchanged.")
    _require(modes == modes_of(bench.model), "Modes and requires_grad of the user's model are unchanged.")
    _require(
        not traces_on(bench.model), f"The user's model stays clean, but there is {_first(traces_on(bench.model))}."
    )
    _require(torch.equal(random_state, torch.get_rng_state()), "The random state is unchanged.")
    _require(hooks == global_hooks(), "No hook stays on all modules of the process.")
    return result


def _check_result(bench: Bench, result: PruneResult) -> None:
    outcome, products = result.outcome, bench.spec.products
    _require("weight_masks" in products or outcome.weight_masks is None, "Weight masks are there if declared.")
    _require(("gated_model" in products) == (outcome.gated_model is not None), "A gated model is there if declared.")
    _require(all(math.isfinite(value) for value in outcome.facts.values()), "Facts are finite numbers.")
    for when, model in (("compact", result.model), ("unrecovered", result.removed_only)):
        _require(not traces_on(model), f"The {when} model stays clean, but there is {_first(traces_on(model))}.")
    if outcome.gated_model is not None:
        _require(bench.spec.build_gated is not None, "A method with a gated model says how to build it again.")
        assert bench.spec.build_gated is not None
        own = outcome.gated_model.state_dict()
        again = bench.spec.build_gated(copy.deepcopy(result.model), bench.configured(), bench.example, own)
        shapes = [{n: t.shape for n, t in net.state_dict().items()} for net in (again, outcome.gated_model)]
        _require(shapes[0] == shapes[1], "build_gated makes the gated network around the compact model again.")
        output = call_model(copy.deepcopy(outcome.gated_model), bench.example)
        _require(any(True for _ in tensors_in(output)), "The gated model returns tensors.")
    if bench.targets == SPARSITY:
        _check_masked(bench, result)
    elif "plan" in products:
        _check_planned(bench, result)


def _check_planned(bench: Bench, result: PruneResult) -> None:
    _check_targets(result)
    _require(result.certificate is not None and result.certificate.exact, "The plan is certified.")
    for name, gone in removed_channels(result.plan, bench.groups).items():
        kept, most = int((~gone).sum()), LIMITS.of_group(bench.groups[name]).max_ratio
        _require(gone.mean() <= most and kept >= LIMITS.min_channels, f"Group '{name}' is pruned within the limits.")


def _check_masked(bench: Bench, result: PruneResult) -> None:
    masks = result.outcome.weight_masks
    _require(masks is not None, "Weight masks are handed over where single weights are asked for.")
    assert masks is not None
    _require(not result.plan.num_removed, "No channel is removed where single weights are asked for.")
    _check_targets(result)
    open_to_masks = bench.run().maskable
    for name, mask in masks.items():
        _require(name in open_to_masks, f"Only what may be masked is masked; '{name}' may not, or is excluded.")
        _require(bool(mask.any()), f"At least one weight of '{name}' stays.")
        for model in (result.model, result.removed_only):
            gone = model.get_parameter(name)[~mask]
            _require(not bool(gone.any()), f"The masked weights of '{name}' are zero in the result.")


def _check_targets(result: PruneResult) -> None:
    for goal in result.achieved:
        _require(goal.met, f"The target {goal.target} is met: {goal.asked:g} asked, {goal.achieved:g} reached.")


def _check_same_seed_same_result(bench: Bench, first: PruneResult) -> None:
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        np.random.seed(99)
        second = bench.prune()
    np.random.set_state(numpy_state)
    _require(first.plan == second.plan, "Two runs with one seed plan the same.")
    _require(_equal_weights(first.model, second.model), "Two runs with one seed end with the same weights.")
    _require(_equal_outcomes(first.outcome, second.outcome), "Two runs with one seed hand over the same.")


def _check_run_leaves_no_trace(bench: Bench) -> int:
    """Returns how often the method asked for the user's loss."""
    calls = 0

    def counted(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        return cross_entropy(model, batch)

    run, method = bench.run(counted), Watched(bench.built())
    modes = modes_of(run.model)
    outcome = drive(method, run)
    _require(modes == modes_of(run.model), "Modes and requires_grad are as before at the end.")
    _require(not traces_on(run.model), f"Nothing is left on the model, but there is {_first(traces_on(run.model))}.")
    _require(method.removals == run.cuts, "The method is told about every cut.")
    _require(bench.spec.changes_structure or not run.cuts, "A method that cuts on the way declares changes_structure.")
    _check_masks(run, outcome)
    return calls


def _check_masks(run: CountedRun, outcome: Outcome) -> None:
    tensors = dict(run.model.named_parameters())
    for name, mask in (outcome.weight_masks or {}).items():
        _require(name in tensors, f"Weight masks are named like parameters; there is no '{name}'.")
        _require(
            mask.dtype is torch.bool and mask.shape == tensors[name].shape,
            f"The mask of '{name}' is bool, shaped alike.",
        )


def _check_failure_leaves_no_trace(bench: Bench, calls: int) -> None:
    for fatal in sorted({min(calls, 1), calls // 2, calls} - {0}):
        remaining = fatal

        def fails(model: nn.Module, batch: Batch) -> Tensor:
            nonlocal remaining
            remaining -= 1
            loss = cross_entropy(model, batch)
            if not remaining:
                raise _UserError
            return loss

        run, hooks = bench.run(fails), global_hooks()
        modes = modes_of(run.model)
        try:
            drive(bench.built(), run)
        except _UserError:
            pass
        else:
            raise AssertionError("An error in the user's loss comes through.")
        found = traces_on(run.model)
        _require(not found, f"Nothing is left on the model when the loss raises, but there is {_first(found)}.")
        _require(modes == modes_of(run.model), "Modes and requires_grad are as before when the loss raises.")
        _require(hooks == global_hooks(), "No hook stays on all modules when the loss raises.")


def _check_saved_state_continues(bench: Bench) -> None:
    """Stops a run at every one of its checkpoints (at up to eight) and lets a fresh method go on from there."""
    method, run = bench.built(), bench.run()
    outcome = drive(method, run)
    tensors, values = method.state_dict()
    _require(
        all(isinstance(tensor, Tensor) for tensor in tensors.values()), "The tensors of a saved state are tensors."
    )
    _require(json.loads(json.dumps(values)) == values, "The values of a saved state are plain JSON values.")
    with TemporaryDirectory() as folder:
        counting = StoppingCheckpoints(Path(folder), stop_at=0)
        drive(bench.built(), bench.run(checkpoints=counting))
    places = {1 + round(k * (counting.saves - 1) / 7) for k in range(8)}
    for place in sorted(places):
        with TemporaryDirectory() as folder:
            with suppress(Interrupted):
                drive(bench.built(), bench.run(checkpoints=StoppingCheckpoints(Path(folder), stop_at=place)))
            again = bench.run(checkpoints=Checkpoints(Path(folder), {}))
            same = _equal_outcomes(outcome, drive(bench.built(), again)) and run.applied == again.applied
        _require(
            same and _equal_weights(run.model, again.model),
            f"A fresh method that loads the saved state continues as the old one would have done; stopped at "
            f"checkpoint {place} of {counting.saves}, it does not.",
        )


def _refused(spec: MethodSpec, options: Mapping[str, object]) -> bool:
    try:
        method_options(spec, options)
    except ConfigError:
        return True
    return False


def _equal_weights(first: nn.Module, second: nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _equal_outcomes(first: Outcome, second: Outcome) -> bool:
    if first.plan != second.plan or dict(first.facts) != dict(second.facts):
        return False
    masks, others = first.weight_masks or {}, second.weight_masks or {}
    if masks.keys() != others.keys() or not all(torch.equal(masks[name], others[name]) for name in masks):
        return False
    if first.gated_model is None or second.gated_model is None:
        return first.gated_model is second.gated_model
    return _equal_weights(first.gated_model, second.gated_model)


def _first(found: list[str]) -> str:
    return found[0] if found else "nothing"


def _require(condition: bool, promise: str) -> None:
    if not condition:
        raise AssertionError(promise)


class _UserError(Exception):
    """An error that only the user's loss raises."""
