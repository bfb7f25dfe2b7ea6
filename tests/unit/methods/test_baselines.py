"""The baselines on networks where the right answer is known."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from nni_prune_ext.allocation import Limits, Target
from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.methods import baselines
from nni_prune_ext.methods.baselines import L1, BaselineOptions, CriterionPruning, TaylorOptions, taylor_criterion
from nni_prune_ext.pipeline import prune
from nni_prune_ext.plan import PruningPlan, removed_channels
from nni_prune_ext.schedules import LINEAR, SchedulerSpec
from nni_prune_ext.surgery import Removal
from nni_prune_ext.testing import check_method
from nni_prune_ext.testing.method_bench import Bench, modes_of, traces_on
from nni_prune_ext.training import drive

X = torch.zeros(1, 1, 4, 4)


def two_convolutions(first: list[float], columns: list[float]) -> nn.Module:
    """A group of as many channels as numbers: the writer's filters and the consumer's columns are these constants."""
    model = nn.Sequential(nn.Conv2d(1, len(first), 1, bias=False), nn.ReLU(), nn.Conv2d(len(first), 2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(first).reshape(-1, 1, 1, 1))
        model[2].weight.copy_(torch.tensor(columns).reshape(1, -1, 1, 1).expand(2, -1, 1, 1))
    return model


@pytest.mark.parametrize("method", ["l1", "l2"])
def test_norms_remove_what_is_small_in_writer_and_consumer(method: str) -> None:
    model = two_convolutions([3.0, 0.1, -2.0, 0.2], [1.0, 1.0, 1.0, 0.1])

    result = prune(model, X, method=method, target="ratio=0.5")

    assert {"0": (1, 3)} == result.plan.removed


def test_fpgm_removes_the_filter_in_the_middle_and_not_the_smallest() -> None:
    model = two_convolutions([0.0, 5.0, 5.1, 10.0], [0.0, 5.0, 5.1, 10.0])

    result = prune(model, X, method="fpgm", target="ratio=0.5")

    assert {"0": (1, 2)} == result.plan.removed


def test_random_depends_on_the_seed_alone() -> None:
    model = two_convolutions([1.0] * 16, [1.0] * 16)

    plans = [prune(model, X, method="random", target="ratio=0.5", seed=seed).plan.removed for seed in (0, 0, 1)]

    assert plans[0] == plans[1] != plans[2]


def test_taylor_removes_the_channel_that_the_loss_does_not_depend_on() -> None:
    model = two_convolutions([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    model.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten())
    batches = [(torch.rand(8, 1, 4, 4), torch.zeros(8, 2)) for _ in range(2)]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model[2].weight[:, [0, 2]] * batch[0].mean()).sum() + 0 * model(batch[0]).sum()

    result = prune(model, X, method="taylor", target="ratio=0.34", train_batches=batches, loss=loss,
                   limits=Limits(max_ratio=0.9))  # fmt: skip

    assert 1 in result.plan.removed["0"]


def test_taylor_leaves_the_model_as_it_was_also_when_the_loss_raises() -> None:
    run = Bench.of(baselines.TAYLOR, {}).run()
    run.model.stem[0].weight.requires_grad_(False)
    run.model.inside.eval()
    modes, before = modes_of(run.model), copy.deepcopy(run.model.state_dict())

    taylor_criterion(TaylorOptions(batches=2), run)
    run.loss = lambda model, batch: model(batch[0]).sum() / 0 if model.training else 1 / 0
    with pytest.raises(ZeroDivisionError):
        taylor_criterion(TaylorOptions(batches=2), run)

    assert modes == modes_of(run.model)
    assert [] == traces_on(run.model)
    assert all(torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())


@pytest.mark.parametrize("schedule", ["linear", "agp", "one_shot"])
def test_steps_follow_the_schedule(schedule: str) -> None:
    bench = Bench.of(baselines.L1, {})
    run = bench.run()
    run.targets, run.limits = (Target("ratio", 0.4),), Limits(multiple=1)
    shares: list[float] = []
    method = CriterionPruning(
        BaselineOptions(steps=4, schedule=schedule), bench.spec.build(bench.configured()).criterion
    )

    total = run.groups.num_channels
    apply = run.apply

    def noted(plan: PruningPlan) -> Removal:
        removal = apply(plan)
        shares.append(1 - run.groups.num_channels / total)
        return removal

    run.apply = noted
    outcome = drive(method, run)

    fractions = [baselines.build_schedule(schedule)(k / 4) for k in (1, 2, 3)]
    assert [0.4 * f for f in fractions] == pytest.approx(shares, abs=1 / total)
    final = sum(int(gone.sum()) for gone in removed_channels(outcome.plan, run.groups).values())
    assert 0.4 <= 1 - (run.groups.num_channels - final) / total <= 0.4 + 1 / total


def test_a_ratio_policy_sees_weights_and_the_ratios_of_the_last_step_counted_from_the_dense_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[float, dict[str, float], dict[str, tuple[int, ...]]]] = []

    def policy(weights, previous, progress):
        seen.append((progress, dict(previous), {name: tuple(rows[0].shape) for name, rows in weights.items()}))
        return dict.fromkeys(weights, 1.0)

    spec = SchedulerSpec("ratio_policy", "spy", lambda: policy)
    monkeypatch.setattr("nni_prune_ext.schedules.load_plugin", lambda kind, name: spec if name == "spy" else LINEAR)
    model = nn.Sequential(nn.Conv2d(1, 10, 1), nn.ReLU(), nn.Conv2d(10, 10, 1), nn.ReLU(), nn.Conv2d(10, 2, 1))

    prune(model, X, target="ratio=0.4", options={"steps": 2, "schedule": "linear", "ratio_policy": "spy"})

    assert [0.5, 1.0] == [progress for progress, _, _ in seen]
    assert [{"0": 0.0, "2": 0.0}, {"0": 0.2, "2": 0.2}] == [pytest.approx(previous) for _, previous, _ in seen]
    assert [{"0": (10, 1), "2": (10, 10)}, {"0": (8, 1), "2": (8, 8)}] == [shapes for _, _, shapes in seen]


def test_after_every_step_of_a_rewinding_schedule_the_first_weights_are_back() -> None:
    bench = Bench.of(L1, {"steps": 3, "epochs_per_step": 1, "schedule": "rewinding"})
    run = bench.run()
    first, seen = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}, []
    apply = run.apply

    def watched(plan: PruningPlan) -> Removal:
        before = run.model.state_dict()["head.bias"].clone()
        removal = apply(plan)
        seen.append(torch.equal(before, first["head.bias"]))
        return removal

    run.apply = watched  # type: ignore[method-assign]
    outcome = drive(bench.built(), run)

    assert [True, False, False] == seen, "the first cut comes before training, the others after an epoch"
    assert 0 == outcome.plan.num_removed
    for name, tensor in run.model.state_dict().items():
        expected = first[name]
        for dim, index in run.kept.get(name, {}).items():
            expected = expected.index_select(dim, index)
        assert torch.equal(expected, tensor), name
    check_method(L1, options={"steps": 2, "epochs_per_step": 1, "schedule": "rewinding"})


def test_every_group_gets_a_score_per_channel() -> None:
    bench = Bench.of(baselines.L1, {})
    run = bench.run()
    for spec in (baselines.L1, baselines.L2, baselines.FPGM, baselines.RANDOM, baselines.TAYLOR):
        scores = spec.build(spec.options()).criterion(run)

        assert {g.name: (g.num_channels,) for g in trace_channel_groups(run.model, bench.example)} == {
            name: tuple(score.shape) for name, score in scores.items()
        }
