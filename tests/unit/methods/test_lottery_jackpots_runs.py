"""Runs of the mask search: its controls, and that a stopped run ends as one that was not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jackpot_bench import CHANNELS, LIVELY, WEIGHTS, Spy, counts, equal, nothing, parameters, searched, statistics
from torch import nn

from nni_prune_ext.allocation import Target
from nni_prune_ext.checkpoints import Checkpoints
from nni_prune_ext.methods.base import Outcome
from nni_prune_ext.methods.lottery_jackpots import LOTTERY_JACKPOTS, LotteryJackpots
from nni_prune_ext.methods.lottery_jackpots_options import JackpotOptions
from nni_prune_ext.pipeline import prune
from nni_prune_ext.testing import check_method
from nni_prune_ext.testing.method_bench import Bench, CountedRun, Interrupted, StoppingCheckpoints
from nni_prune_ext.training import drive

UNITS = pytest.mark.parametrize("targets", [CHANNELS, WEIGHTS], ids=["channels", "weights"])


# -- controls ----------------------------------------------------------------------------------------------------


def phases(run: CountedRun) -> dict[str, int]:
    return {name: sum(log.phase == name for log in run.logs) for name in dict.fromkeys(log.phase for log in run.logs)}


def test_the_recalibrated_control_is_the_plan_of_l1_with_statistics_measured_anew_and_nothing_trained() -> None:
    bench = Bench.of(LOTTERY_JACKPOTS, {})

    _, run, outcome = searched(CHANNELS, {"control": "recalibrated", "search_epochs": 5, "tune_epochs": 3})

    assert {"freeze": 1} == phases(run)
    assert prune(bench.model, bench.example, method="l1", target="macs=0.6", limits=run.limits).plan == outcome.plan
    assert equal(parameters(bench.model), parameters(run.model))
    assert not equal(statistics(bench.model), statistics(run.model))


@UNITS
def test_the_tuned_control_tunes_as_long_as_search_and_tuning_last(targets: tuple[Target, ...]) -> None:
    _, run, outcome = searched(targets, {"control": "tuned", "search_epochs": 3, "tune_epochs": 2})

    assert {"freeze": 1, "tune": 5} == phases(run)
    assert 0 == outcome.facts["swaps_made"]


@UNITS
def test_a_random_start_keeps_the_counts_and_no_magnitudes(targets: tuple[Target, ...]) -> None:
    first = {}
    for control in ("none", "random_start"):
        spy, _, _ = searched(targets, {**LIVELY, "search_epochs": 1, "control": control})
        first[control] = spy._first_masks

    assert counts(first["none"]) == counts(first["random_start"])
    assert not equal(first["none"], first["random_start"])


@UNITS
def test_the_unrestricted_control_makes_every_swap(targets: tuple[Target, ...]) -> None:
    free, _, outcome = searched(targets, {**LIVELY, "search_epochs": 4, "control": "unrestricted"})

    assert "one" == free.options.restriction
    assert 0 < outcome.facts["swaps_made"] == outcome.facts["swaps_requested"]


# -- stopping and going on ---------------------------------------------------------------------------------------

LONG = {**LIVELY, "search_epochs": 2, "freeze_epochs": 2, "tune_epochs": 2}


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (CHANNELS, LONG),
        (WEIGHTS, LONG),
        ((Target("sparsity", 0.5),), {**LONG, "pattern": "2:4"}),
        (WEIGHTS, {**LONG, "control": "tuned"}),
        (CHANNELS, {**LONG, "control": "random_start", "gate": "norms"}),
    ],
    ids=["channels", "weights", "2:4", "tuned", "gates behind norms"],
)
def test_a_run_stopped_at_any_epoch_of_any_phase_ends_bit_for_bit_the_same(
    targets: tuple[Target, ...], options: Mapping[str, object], tmp_path: Path
) -> None:
    def run_with(checkpoints: Checkpoints | None) -> tuple[Spy, CountedRun, Outcome]:
        run = replace(Bench.of(LOTTERY_JACKPOTS, {}), targets=targets).run(checkpoints=checkpoints)
        spy = Spy(JackpotOptions(**options), nothing)
        return spy, run, drive(spy, run)

    method, expected, outcome = run_with(None)
    run_with(counting := StoppingCheckpoints(tmp_path / "all", stop_at=0))
    for place in range(1, counting.saves + 1):
        folder = tmp_path / str(place)
        with pytest.raises(Interrupted):
            run_with(StoppingCheckpoints(folder, stop_at=place))
        resumed, found, again = run_with(Checkpoints(folder, {}))

        assert (outcome.plan, outcome.facts, expected.notes) == (again.plan, again.facts, found.notes), place
        assert expected.applied == found.applied
        assert equal(expected.model.state_dict(), found.model.state_dict()), place
        assert equal(outcome.weight_masks or {}, again.weight_masks or {}), place
        assert equal(method.state_dict()[0], resumed.state_dict()[0]), place
        assert method.state_dict()[1] == resumed.state_dict()[1], place
    assert counting.saves >= 7


@UNITS
def test_the_saved_state_holds_scores_and_masks_by_group_or_weight_and_a_fresh_method_takes_them(
    targets: tuple[Target, ...],
) -> None:
    spy, run, outcome = searched(targets, LIVELY)
    tensors, values = spy.state_dict()

    names = [group.name for group in run.groups] if targets == CHANNELS else list(outcome.weight_masks or {})
    assert {f"{part}/{name}" for part in ("score", "mask", "first") for name in names} | {"sizes"} == set(tensors)
    for name in names:
        assert torch.equal(spy.scores[name], tensors[f"score/{name}"])
        assert tensors[f"score/{name}"].shape == tensors[f"mask/{name}"].shape
        assert not tensors[f"score/{name}"].requires_grad
    norms = {name for name, module in run.model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert norms == spy._norms.measured == set(values["measured"])
    if targets == CHANNELS:
        assert bool((tensors["sizes"] > 0).all())
        assert (2, len(names)) == tensors["sizes"].shape
        assert any(0 < credit.saved < 1 for credit in spy._credits.values())
    fresh = LotteryJackpots(spy.options)
    fresh.load_state_dict(tensors, values)
    assert equal(spy.masks, fresh.masks)
    assert equal(dict(spy.scores), dict(fresh.scores))
    assert spy.state_dict()[1] == fresh.state_dict()[1]
    assert torch.equal(spy._exploration.sizes, fresh._exploration.sizes)
    again = fresh.finish(run)
    assert (outcome.plan, outcome.facts) == (again.plan, again.facts)


def test_the_promises_hold_with_gates_behind_norms_and_a_random_start() -> None:
    check_method(
        LOTTERY_JACKPOTS,
        options={**LONG, "tune_epochs": 1, "gate": "norms", "initialisation": "random", "restriction": "cosine"},
    )
