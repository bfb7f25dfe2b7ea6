"""What a probe finds: the planted filter, not the decoy; and what it leaves behind: nothing."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import nni_prune_ext as npe
from nni_prune_ext.allocation import Limits, Target
from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.masked_weights import gate_consumers
from nni_prune_ext.methods.base import MethodContext
from nni_prune_ext.methods.psap import PSAP, Psap
from nni_prune_ext.methods.psap_options import PsapOptions
from nni_prune_ext.methods.psap_protection import (
    gate_probe,
    important,
    literal_probe,
    probed,
    trial,
    zero_writers,
)
from nni_prune_ext.testing.method_bench import Bench
from nni_prune_ext.training import MethodRun, TrainingSettings, cross_entropy, drive, fit

PLANTED = 3


class Planted(nn.Module):
    """Twelve filters behind a norm; the classes hang on one, whose weights are made small."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(functional.relu(self.norm(self.conv(images)))).mean((2, 3))
        return logits


def planted_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 32, 3, 8, 8, generator=generator)
    return [(own, (own[:, 0].mean((1, 2)) > 0).long() + 2 * (own[:, 1].mean((1, 2)) > 0).long()) for own in images]


def trained(batches: list[tuple[Tensor, Tensor]]) -> Planted:
    torch.manual_seed(0)
    model = Planted()
    fit(model, batches, epochs=40, settings=TrainingSettings(learning_rate=0.1, weight_decay=0.0, select_best=False))
    return model


def most_needed(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> int:
    """Returns the channel whose closing raises the loss most: by closing each in turn."""
    losses = []
    for channel in range(12):
        own = copy.deepcopy(model).eval()
        with torch.no_grad():
            own.head.weight[:, channel] = 0  # type: ignore[operator,union-attr,index]
            losses.append(sum(float(functional.cross_entropy(own(x), y)) for x, y in batches))
    return max(range(12), key=losses.__getitem__)


def closed_by(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], *, seed: int = 0, **options: object
) -> tuple[Tensor, Psap]:
    """Returns what one pruning step closes of twelve channels, six asked for."""
    run = MethodRun(
        model=copy.deepcopy(model), batches_=batches, example_inputs=batches[0][0][:1],
        settings=TrainingSettings(learning_rate=1e-6, weight_decay=0.0),
        groups=trace_channel_groups(model, batches[0][0][:1]), targets=(Target("ratio", 0.5),),
        limits=Limits(max_ratio=0.9), seed=seed,
    )  # fmt: skip
    seen: list[Tensor] = []

    class Watched(Psap):
        def on_removed(self, context: object, removal: object) -> None:
            seen.append(self.closed["conv"].clone())

    given = {"epochs": 1, "schedule": "one_shot", "probe_batches": 6, "use_deviations": 100.0, **options}
    method = Watched(PsapOptions.model_validate(given))
    drive(method, run)
    return seen[0], method


@pytest.fixture(scope="module")
def small_but_needed() -> tuple[nn.Module, list[tuple[Tensor, Tensor]], int]:
    batches = planted_batches()
    model = trained(batches)
    needed = most_needed(model, batches)
    with torch.no_grad():
        model.conv.weight[needed] *= 1e-2  # the norm takes it back: the function stays, the magnitude goes
    return model, batches, needed


class TestPlantedFilter:
    @pytest.mark.parametrize("mode", ["gate", "zeroise"])
    def test_falls_to_its_small_weights_without_protection_and_is_kept_with_it(
        self, small_but_needed: tuple[nn.Module, list[tuple[Tensor, Tensor]], int], mode: str
    ) -> None:
        model, batches, needed = small_but_needed

        bare, _ = closed_by(model, batches, protect="none", mode=mode)
        kept, method = closed_by(model, batches, protect="gate", mode=mode)

        assert bool(bare[needed])
        assert not bool(kept[needed])
        assert 6 == int(bare.sum()) == int(kept.sum()), "another one takes its place"
        assert method._facts["protected"] >= 1

    def test_protection_drawn_at_random_follows_the_seed(
        self, small_but_needed: tuple[nn.Module, list[tuple[Tensor, Tensor]], int]
    ) -> None:
        model, batches, _ = small_but_needed

        found = [closed_by(model, batches, protect="random", refills=0)[0] for _ in range(2)]

        assert torch.equal(*found), "drawn from the seed"
        assert 6 == int(found[0].sum())

    def test_protection_drawn_at_random_is_no_help(
        self, small_but_needed: tuple[nn.Module, list[tuple[Tensor, Tensor]], int]
    ) -> None:
        model, batches, needed = small_but_needed

        found = [closed_by(model, batches, protect="random", refills=0, seed=seed) for seed in range(12)]

        assert all(method._facts["protected"] == 1 for _, method in found), "one of six, as by gradients"
        assert sum(bool(closed[needed]) for closed, _ in found) >= 6

    def test_a_decoy_that_nobody_reads_is_not_protected(
        self, small_but_needed: tuple[nn.Module, list[tuple[Tensor, Tensor]], int]
    ) -> None:
        model, batches, needed = copy.deepcopy(small_but_needed)
        decoy = (needed + 1) % 12
        with torch.no_grad():
            model.conv.weight[decoy] *= 1e-3  # type: ignore[operator,union-attr,index]
            model.norm.bias[decoy] = 0.5  # type: ignore[operator,union-attr,index]
            model.head.weight[:, decoy] *= 1e-4  # type: ignore[operator,union-attr,index]

        kept, _ = closed_by(model, batches, protect="gate")

        assert bool(kept[decoy])
        assert not bool(kept[needed])


class TestPulse:
    """Why zeroed filters are not asked themselves."""

    @pytest.mark.parametrize(("bias", "least", "most"), [(0.5, 100.0, 1e5), (0.0, 0.0, 0.0), (-0.5, 0.0, 0.0)])
    def test_behind_a_norm_and_a_relu_it_says_what_the_bias_is_not_what_the_filter_is_worth(
        self, bias: float, least: float, most: float
    ) -> None:
        torch.manual_seed(0)
        model = Planted().train()
        with torch.no_grad():
            model.norm.bias[:] = bias
            model.conv.weight[:4] = 0
        x, labels = torch.randn(32, 3, 8, 8), torch.randint(4, (32,))

        functional.cross_entropy(model(x), labels).backward()

        assert model.conv.weight.grad is not None
        sizes = model.conv.weight.grad.flatten(1).norm(dim=1)
        assert least <= float(sizes[:4].mean() / sizes[4:].mean()) <= most

    def test_a_dead_but_needed_filter_is_seen_at_its_readers_only(self) -> None:
        batches = planted_batches()
        model = trained(batches)
        needed = most_needed(model, batches)
        with torch.no_grad():
            model.norm.bias[needed] = -abs(model.norm.bias[needed]) - 0.1
        run = replace(bench_of(model, batches))
        closed = {"conv": torch.arange(12) == needed}

        literal, _ = literal_probe(run, 6, closed)["conv"]
        kept, _ = closed_by(model, batches, protect="gate")

        assert 0.0 == float(literal[needed])
        assert not bool(kept[needed])


def bench_of(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> MethodRun:
    return MethodRun(
        model=copy.deepcopy(model), batches_=batches, example_inputs=batches[0][0][:1],
        groups=trace_channel_groups(model, batches[0][0][:1]), targets=(Target("ratio", 0.5),),
    )  # fmt: skip


class TestProbe:
    @pytest.mark.parametrize("literal", [False, True])
    def test_leaves_weights_statistics_modes_and_random_state_as_they_were(self, literal: bool) -> None:
        run = Bench.of(PSAP, {}).run()
        run.model.train()
        run.model.get_submodule("whole").eval()
        before = copy.deepcopy(run.model.state_dict())
        modes = [module.training for module in run.model.modules()]
        random_state = torch.get_rng_state()

        if literal:
            literal_probe(run, 3, {group.name: torch.ones(group.num_channels).bool() for group in run.groups})
        else:
            probed(run, 3, lambda: {})

        now = run.model.state_dict()
        assert all(torch.equal(before[name], now[name]) for name in before)
        assert modes == [module.training for module in run.model.modules()]
        assert torch.equal(random_state, torch.get_rng_state())
        assert all(parameter.grad is None for parameter in run.model.parameters())

    def test_of_gates_is_the_derivative_of_the_loss_also_where_a_padded_shortcut_reads(self) -> None:
        torch.manual_seed(0)
        model = npe.build_model("resnet20", num_classes=4, in_channels=3).double()
        images, labels = torch.randn(8, 3, 8, 8).double(), torch.tensor([0, 1, 2, 3] * 2)
        groups = trace_channel_groups(model, images[:1])
        run = MethodRun(model=model, batches_=[(images, labels)], groups=groups)
        row = torch.ones(groups.num_channels + 1, dtype=torch.float64)
        stem, place = groups.groups[0], 3  # conv1: read by convolutions, and by the first padded shortcut
        row[place] = 0

        def loss(gate: float) -> float:
            gates = row.clone()
            gates[place] = gate
            handles = gate_consumers(model, groups, lambda: gates).handles
            with trial(model), torch.no_grad():
                result = float(run.task_loss((images, labels)))
            for handle in handles:
                handle.remove()
            return result

        row.requires_grad_()
        handles = gate_consumers(model, groups, lambda: row).handles
        size, signed = gate_probe(run, 1, row)[stem.name]
        for handle in handles:
            handle.remove()

        assert "conv1" == stem.name
        expected = (loss(1e-5) - loss(-1e-5)) / 2e-5
        assert expected == pytest.approx(float(signed[place]), rel=1e-4)
        assert abs(expected) == pytest.approx(float(size[place]), rel=1e-4)

    def test_is_averaged_over_so_many_batches(self) -> None:
        run = Bench.of(PSAP, {}).run()
        seen: list[int] = []
        run.loss = lambda model, batch: seen.append(1) or cross_entropy(model, batch)  # type: ignore[func-returns-value]
        values = iter([3.0, -1.0, 4.0])
        name = run.groups.groups[0].name

        found = probed(run, 3, lambda: {name: torch.full((run.groups.groups[0].num_channels,), next(values))})

        assert 3 == len(seen)
        assert 8 / 3 == pytest.approx(float(found[name][0][0]))
        assert 2.0 == pytest.approx(float(found[name][1][0]))

    def test_of_zeroed_filters_lets_their_readers_hear(self) -> None:
        seen: list[float] = []

        class Heard(Psap):
            def _gates(self, context: MethodContext) -> Tensor:
                row = super()._gates(context)
                if context.model.get_submodule("inside.0").weight[self.closed["inside.0"]].abs().sum() == 0:
                    seen.append(float(row.min()))
                return row

        run = Bench.of(PSAP, {}).run()
        drive(Heard(PsapOptions(epochs=1, schedule="one_shot", protect="literal", probe_batches=1)), run)

        assert seen
        assert {1.0} == set(seen), "all gates are open while filters are zero"

    def test_zeroes_what_writes_closed_channels_and_nothing_else(self) -> None:
        run = Bench.of(PSAP, {}).run()
        before = copy.deepcopy(run.model.state_dict())
        closed = {group.name: torch.zeros(group.num_channels).bool() for group in run.groups}
        closed["inside.0"][:3] = True

        zero_writers(run, closed)

        now = run.model.state_dict()
        changed = {name for name in before if not torch.equal(before[name], now[name])}
        assert {"inside.0.weight"} == {name for name in changed if name.endswith("weight")}
        assert changed <= {"inside.0.weight", "inside.0.bias"}, "norms and readers stay"
        assert 0.0 == float(now["inside.0.weight"][:3].abs().max())
        assert torch.equal(before["inside.0.weight"][3:], now["inside.0.weight"][3:])


class TestImportant:
    def test_is_what_stands_out_among_the_candidates_and_would_lower_the_loss(self) -> None:
        size = torch.tensor([9.0, 0.1, 0.1, 0.1, 3.0, 0.1, 0.1, 0.1, 0.1, 1.0])
        signed = torch.where(torch.arange(10) == 4, -size, size)
        candidates = (torch.arange(10) > 0) & (torch.arange(10) < 9)  # the first and the last one are no candidates

        assert [4] == protected(size, signed, candidates, [9])
        assert [] == protected(size, size, candidates, [9]), "opening it would harm"

    def test_is_at_most_a_share_of_them_the_best_first(self) -> None:
        size = torch.tensor([8.0, 7.0, 6.0, 5.0, 0.1, 0.1, 0.1, 0.1, 0.0, 0.0, 0.0])
        signed = -torch.tensor([6.0, 7.0, 5.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.0, 0.0, 0.0])

        assert [0, 1] == protected(size, signed, torch.arange(11) < 8, [8, 9, 10], deviations=0.0)

    def test_is_worth_more_than_what_takes_its_place(self) -> None:
        size = torch.tensor([8.0, 7.0, 0.1, 0.1, 7.5, 7.5, 0.0, 0.0])
        candidates = torch.arange(8) < 4
        settings = {"deviations": 0.0, "share": 0.5}

        assert [0] == protected(size, -size, candidates, [4, 5], **settings), "8 > 7.5, 7 < 7.5"
        assert [0, 1] == protected(size, -size, candidates, [4, 6], **settings)
        assert [0] == protected(size, -size, candidates, [6], **settings), "there is one place only"
        assert [] == protected(size, -size, candidates, [], **settings)

    def test_stands_out_among_all_that_are_closed_also_where_it_is_the_only_candidate(self) -> None:
        size = torch.tensor([4.0, 1.0, 1.0, 1.0, 0.0])
        closed, places = torch.arange(5) < 4, torch.tensor([4])

        for channel, expected in ((0, [0]), (1, [])):
            found = important(size, -size, closed, torch.arange(5) == channel, places, deviations=1.0, share=0.25)
            assert expected == found.nonzero()[:, 0].tolist()

    def test_is_one_where_candidates_are_few_and_none_where_all_are_alike(self) -> None:
        same, few = torch.cat([torch.ones(8), torch.zeros(8)]), torch.tensor([5.0, 1.0, 1.0, 0.0])

        assert [] == protected(same, -same, torch.arange(16) < 8, [8, 9], deviations=0.0, share=0.5)
        assert [0] == protected(few, -few, torch.arange(4) < 3, [3], deviations=0.0), "a quarter of three, rounded up"
        assert [] == protected(few, -few, torch.arange(4) < 3, [3], deviations=0.0, share=0.0)


def protected(size: Tensor, signed: Tensor, candidates: Tensor, instead: list[int], **settings: float) -> list[int]:
    places, chosen = torch.tensor(instead, dtype=torch.int64), {"deviations": 1.0, "share": 0.25, **settings}
    return important(size, signed, candidates, candidates, places, **chosen).nonzero()[:, 0].tolist()
