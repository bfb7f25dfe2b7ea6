"""Stopping and going on: after every checkpoint, with every kind of data, bit-equal to a run that never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_task import (
    LOADERS,
    another_process,
    dataset,
    everything,
    metrics,
    same,
    small_arrays,
    small_batches,
    small_net,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nni_prune_ext.allocation import Limits
from nni_prune_ext.checkpoints import Checkpoints, Json
from nni_prune_ext.data.batches import BatchLoader
from nni_prune_ext.errors import CheckpointError
from nni_prune_ext.methods.base import Batch, MethodContext, MethodSpec, NoOptions, Outcome, Phase, PruningMethod
from nni_prune_ext.methods.baselines import L1
from nni_prune_ext.pipeline import PruneResult, prune
from nni_prune_ext.plan import plan_from_channels
from nni_prune_ext.testing.method_bench import Bench, BenchNet, Interrupted, StoppingCheckpoints
from nni_prune_ext.training import (
    Distillation,
    EpochLog,
    MethodRun,
    TrainingSettings,
    Watcher,
    checked_settings,
    cross_entropy,
    fit,
)
from nni_prune_ext.training.loop import run_phases

EPOCHS = 3
SETTINGS = checked_settings(optimizer="adamw", learning_rate=0.01, warmup_epochs=1)


class Told(Watcher):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done: list[tuple[int, int]] = []

    def phase(self, name: str, epochs: int, *, done: int, total: int) -> None:
        self.done.append((done, total))

    def note(self, text: str) -> None:
        self.notes.append(text)


def trained(model: nn.Module, loader: str, checkpoints: Checkpoints | None = None, **options: object) -> list[EpochLog]:
    return fit(model, LOADERS[loader](), epochs=EPOCHS, settings=SETTINGS, checkpoints=checkpoints, **options)


def facts(logs: list[EpochLog]) -> list[EpochLog]:
    """Returns logs without what differs from run to run."""
    return [replace(log, seconds=0.0) for log in logs]


# -- fit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("stop", range(1, EPOCHS + 2))
def test_a_fit_stopped_after_any_epoch_ends_like_one_that_never_stopped(stop: int, loader: str, tmp_path: Path) -> None:
    whole, first, second = (small_net(dropout=0.4) for _ in range(3))
    another_process(1)
    expected = trained(whole, loader)
    another_process(2)
    with pytest.raises(Interrupted):
        trained(first, loader, StoppingCheckpoints(tmp_path, stop_at=stop))

    another_process(3)
    logs = trained(second, loader, Checkpoints(tmp_path, {}))

    assert same(everything(whole), everything(second))
    assert facts(expected) == facts(logs)


def test_a_fit_stopped_after_every_single_epoch_ends_the_same(tmp_path: Path) -> None:
    loader = "torch with a generator"
    whole = small_net(dropout=0.4)
    expected = trained(whole, loader)

    for _ in range(EPOCHS + 2):
        model = small_net(dropout=0.4, seed=9)  # its weights come from the checkpoint
        if not any(tmp_path.iterdir()):
            model = small_net(dropout=0.4)
        try:
            logs = trained(model, loader, StoppingCheckpoints(tmp_path, stop_at=1))
        except Interrupted:
            continue

    assert same(everything(whole), everything(model))
    assert facts(expected) == facts(logs)


@pytest.mark.parametrize("stop", [2, 3, 4, 5])
def test_the_best_epoch_before_the_interruption_is_still_the_best(stop: int, tmp_path: Path) -> None:
    values = [0.1, 0.9, 0.2, 0.3]
    whole, first, second = (small_net() for _ in range(3))
    fit(whole, small_batches(), epochs=4, evaluate=metrics(values))
    with pytest.raises(Interrupted):
        fit(first, small_batches(), epochs=4, evaluate=metrics(values),
            checkpoints=StoppingCheckpoints(tmp_path, stop_at=stop))  # fmt: skip

    logs = fit(second, small_batches(), epochs=4, evaluate=metrics(values[stop - 1 :]),
               checkpoints=Checkpoints(tmp_path, {}))  # fmt: skip

    assert values == [log.metric for log in logs]
    assert same(everything(whole), everything(second))


@pytest.mark.parametrize("values", [[0.9, 0.5, 0.4], [0.1, 0.2, 0.3]])
def test_a_fit_that_has_ended_trains_nothing_more(values: list[float], tmp_path: Path) -> None:
    settings = TrainingSettings(patience=2)
    first, second, watcher = small_net(), small_net(), Told()
    expected = fit(first, small_batches(), epochs=len(values), evaluate=metrics(values), settings=settings,
                   checkpoints=Checkpoints(tmp_path, {}))  # fmt: skip

    def never(model: nn.Module, batch: Batch | None = None) -> Tensor:
        raise AssertionError("trained")

    logs = fit(second, small_batches(), epochs=len(values), evaluate=never, loss=never, settings=settings,
               checkpoints=Checkpoints(tmp_path, {}), watcher=watcher)  # fmt: skip

    assert expected == logs
    assert same(everything(first), everything(second))
    assert [] == watcher.done


def test_a_fit_that_stopped_early_stays_stopped(tmp_path: Path) -> None:
    settings, values = TrainingSettings(patience=1), [0.9, 0.5]
    first, second = small_net(), small_net()
    fit(first, small_batches(), epochs=9, evaluate=metrics(values), settings=settings,
        checkpoints=Checkpoints(tmp_path, {}))  # fmt: skip

    logs = fit(second, small_batches(), epochs=9, evaluate=metrics([]), settings=settings,
               checkpoints=Checkpoints(tmp_path, {}))  # fmt: skip

    assert values == [log.metric for log in logs]
    assert same(everything(first), everything(second))


def test_masks_groups_channels_last_accumulation_and_clipping_are_resumed_too(tmp_path: Path) -> None:
    settings = checked_settings(
        nesterov=True, channels_last=True, accumulation_steps=2, max_gradient_norm=0.5,
        parameter_groups=[{"pattern": "*.bias", "weight_decay": 0.0}, {"pattern": "6.*", "learning_rate_scale": 0.1}],
    )  # fmt: skip
    whole, first, second = (small_net(dropout=0.2) for _ in range(3))
    mask = torch.rand(whole[0].weight.shape) < 0.5

    def run(model: nn.Module, checkpoints: Checkpoints | None) -> None:
        fit(model, small_batches(), epochs=EPOCHS, settings=settings, weight_masks={"0.weight": mask},
            checkpoints=checkpoints)  # fmt: skip

    run(whole, None)
    with pytest.raises(Interrupted):
        run(first, StoppingCheckpoints(tmp_path, stop_at=3))
    run(second, Checkpoints(tmp_path, {}))

    assert same(everything(whole), everything(second))


def test_a_damaged_checkpoint_costs_an_epoch_and_not_the_result(tmp_path: Path) -> None:
    whole, first, second = (small_net(dropout=0.4) for _ in range(3))
    trained(whole, "torch")
    with pytest.raises(Interrupted):
        trained(first, "torch", StoppingCheckpoints(tmp_path, stop_at=3))
    newest = max(path for path in tmp_path.iterdir() if path.is_dir())
    (newest / "tensors.safetensors").write_bytes(b"")
    told, watcher = list[str](), Told()

    trained(second, "torch", Checkpoints(tmp_path, {}, tell=told.append), watcher=watcher)

    assert ["checkpoint 3"] == [text[:12] for text in told]
    assert ["continued from checkpoint 2, after epoch 1 of 3 of phase 'fit'"] == watcher.notes
    assert [(1, 3)] == watcher.done
    assert same(everything(whole), everything(second))


def test_a_resumed_fit_leaves_the_global_generators_as_they_were(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        trained(small_net(), "numpy and python", StoppingCheckpoints(tmp_path, stop_at=2))

    another_process(4)
    expected = torch.rand(1), torch.get_rng_state()
    another_process(4)
    trained(small_net(), "numpy and python", Checkpoints(tmp_path, {}))

    assert torch.equal(expected[0], torch.rand(1))
    assert torch.equal(expected[1], torch.get_rng_state())


def test_checkpoints_of_another_network_are_refused_and_leave_it_as_it_is(tmp_path: Path) -> None:
    fit(small_net(), small_batches(), epochs=1, checkpoints=Checkpoints(tmp_path, {}))
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    before = everything(other)

    with pytest.raises(CheckpointError, match="does not fit the model"):
        fit(other, small_batches(), epochs=2, checkpoints=Checkpoints(tmp_path, {}))
    with pytest.raises(CheckpointError, match=r"phase 1, 'fit', but the method has the phases 'other'"):
        fit(small_net(), small_batches(), epochs=2, checkpoints=Checkpoints(tmp_path, {}), name="other")

    assert same(before, everything(other))


# -- phases of a method ----------------------------------------------------------------------------------------


class Sums(PruningMethod):
    """Adds up what it sees in every phase, and in batches that it asks for between them."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def start(self, context: MethodContext, phase: Phase) -> None:
        self.seen += [float(images.sum()) for images, _ in context.batches(2)]

    def compute_loss(self, context: MethodContext, batch: Batch) -> Tensor:
        self.seen.append(float(batch[0].sum()))
        return context.task_loss(batch)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
        return {}, {"seen": self.seen}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, list[float]]) -> None:
        self.seen = list(values["seen"])


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("stop", range(1, 7))
def test_later_phases_see_the_data_that_they_would_have_seen(stop: int, loader: str, tmp_path: Path) -> None:
    def run(method: Sums, checkpoints: Checkpoints | None, elsewhere: int) -> None:
        another_process(elsewhere)
        run = MethodRun(model=small_net(), batches_=LOADERS[loader](), checkpoints=checkpoints)
        run_phases(method, run, [Phase("a", 1), Phase("b", 1), Phase("look"), Phase("c", 1)])

    whole, first, second = Sums(), Sums(), Sums()
    run(whole, None, 1)
    with pytest.raises(Interrupted):
        run(first, StoppingCheckpoints(tmp_path, stop_at=stop), 2)
    run(second, Checkpoints(tmp_path, {}), 3)

    assert whole.seen == second.seen


# -- prune -----------------------------------------------------------------------------------------------------


class StoppingStages(StoppingCheckpoints):
    """Checkpoints that count the saves of all their stages together and stop the run after one of them."""

    def __init__(self, folder: Path, *, stop_at: int, root: StoppingStages | None = None) -> None:
        super().__init__(folder, stop_at=stop_at)
        self.root = root or self

    def stage(self, name: str, identity: Mapping[str, Json] | None = None) -> StoppingStages:
        stage = StoppingStages(self.folder / name, stop_at=self.stop_at, root=self.root)
        stage.identity = {**self.identity, **(identity or {})}
        return stage

    def save(self, values: Mapping[str, Json], tensors: Mapping[str, Tensor]) -> None:
        Checkpoints.save(self, values, tensors)
        self.root.saves += 1
        if self.root.saves == self.stop_at:
            raise Interrupted


BENCH_LOADERS = {
    "package": lambda: BatchLoader(small_arrays(12), 4, shuffle=True, augment="shift", seed=5),
    "torch": lambda: DataLoader(dataset(12), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(6)),
    "torch without a generator": lambda: DataLoader(dataset(12), batch_size=4, shuffle=True),
}


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench.of(L1, {})


VALUES = [0.3, 0.4, 0.2, 0.1]
"""What validation says after each epoch: two of the method, two of the recovery."""


def pruned(bench: Bench, loader: str, checkpoints: Checkpoints | None = None, **changes: object) -> PruneResult:
    model = BenchNet()
    model.load_state_dict(bench.model.state_dict())
    arguments: dict[str, object] = {
        "method": "taylor", "target": "macs=0.6", "options": {"steps": 3, "epochs_per_step": 1, "batches": 2},
        "recover_epochs": 2, "settings": SETTINGS, "evaluate": metrics(VALUES), "groups": bench.groups,
    }  # fmt: skip
    arguments |= {"train_batches": BENCH_LOADERS[loader](), "checkpoints": checkpoints, **changes}
    return prune(model, bench.example, **arguments)


def agree(first: PruneResult, second: PruneResult) -> bool:
    return (
        first.plan == second.plan
        and same(everything(first.model), everything(second.model))
        and same(everything(first.removed_only), everything(second.removed_only))
        and facts(list(first.logs)) == facts(list(second.logs))
        and first.notes == second.notes
        and first.costs == second.costs
    )


@pytest.mark.parametrize("loader", BENCH_LOADERS)
def test_a_pruning_stopped_anywhere_ends_like_one_that_never_stopped(bench: Bench, loader: str, tmp_path: Path) -> None:
    another_process(1)
    expected = pruned(bench, loader)
    counting = StoppingStages(tmp_path / "all", stop_at=0)
    assert agree(expected, pruned(bench, loader, counting))  # saving changes nothing

    assert 8 == counting.saves  # two in each of two cuts with training, one in the last, three in the recovery
    for stop in range(1, counting.saves + 1):
        folder = tmp_path / str(stop)
        remaining = metrics(VALUES[sum(save <= stop for save in (2, 4, 7, 8)) :])  # these saves end an epoch
        another_process(2 * stop)
        with pytest.raises(Interrupted):
            pruned(bench, loader, StoppingStages(folder, stop_at=stop))
        another_process(2 * stop + 1)
        assert agree(expected, pruned(bench, loader, Checkpoints(folder, {}), evaluate=remaining)), stop


def test_recalibrated_statistics_without_recovery_are_resumed_too(bench: Bench, tmp_path: Path) -> None:
    for loader in BENCH_LOADERS:
        another_process(1)
        expected = pruned(bench, loader, recover_epochs=0)
        with pytest.raises(Interrupted):
            pruned(bench, loader, StoppingStages(tmp_path / loader, stop_at=5), recover_epochs=0)
        another_process(2)
        assert agree(expected, pruned(bench, loader, Checkpoints(tmp_path / loader, {}), recover_epochs=0)), loader


def test_weight_masks_and_facts_survive_an_interruption_in_the_recovery(bench: Bench, tmp_path: Path) -> None:
    class Masks(PruningMethod):
        def __init__(self) -> None:
            self.mask = torch.zeros(0)

        def phases(self) -> list[Phase]:
            return [Phase("score", 1)]

        def after_epoch(self, context: MethodContext, phase: Phase, epoch: int) -> None:
            self.mask = torch.rand(16, 12, 3, 3) < 0.5
            context.log({"kept": float(self.mask.sum())})

        def finish(self, context: MethodContext) -> Outcome:
            plan = plan_from_channels(context.groups, {"inside.0": [0, 9]})
            return Outcome(plan, weight_masks={"inside.0.weight": self.mask}, facts={"kept": float(self.mask.sum())})

        def state_dict(self) -> tuple[dict[str, Tensor], dict[str, float]]:
            return {"mask": self.mask}, {}

        def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, float]) -> None:
            self.mask = tensors["mask"]

    spec = MethodSpec(
        "masks", "one sentence", "none", NoOptions, lambda _: Masks(), products=frozenset({"weight_masks"})
    )
    changes = {"method": spec, "options": {}, "target": "macs=1"}
    expected = pruned(bench, "torch", **changes)
    with pytest.raises(Interrupted):
        pruned(bench, "torch", StoppingStages(tmp_path, stop_at=4), **changes)

    found = pruned(bench, "torch", Checkpoints(tmp_path, {}), **{**changes, "evaluate": metrics(VALUES[2:])})

    assert agree(expected, found)
    assert expected.outcome.facts == found.outcome.facts
    mask = found.outcome.weight_masks["inside.0.weight"]
    assert torch.equal(expected.outcome.weight_masks["inside.0.weight"], mask)
    assert 0.0 == float(found.model.inside[0].weight[~mask].detach().abs().max())


def other_loss(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model, batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recover_epochs": 3}, "recovery_epochs was 2, is 3"),
        ({"settings": checked_settings(optimizer="adamw", learning_rate=0.02, warmup_epochs=1)},
         "training.learning_rate was 0.01, is 0.02"),
        ({"method": "l1", "options": {}}, "method was 'taylor', is 'l1'"),
        ({"options": {"steps": 4, "epochs_per_step": 1, "batches": 2}}, "options.steps was 3, is 4"),
        ({"target": "macs=0.7"}, "targets was ['macs=0.6'], is ['macs=0.7']"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"scope": "local"}, "scope was 'global', is 'local'"),
        ({"limits": Limits(max_ratio=0.8)}, "limits.max_ratio was"),
        ({"distillation": Distillation()}, "distillation was None, is"),
        ({"loss": other_loss}, "loss was 'cross_entropy', is 'other_loss'"),
    ],
)  # fmt: skip
def test_resuming_with_other_arguments_is_refused_and_says_which(
    bench: Bench, stopped: Path, changes: Mapping[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        pruned(bench, "torch", Checkpoints(stopped, {}), **changes)

    assert message in str(caught.value)


def test_resuming_with_other_weights_is_refused(bench: Bench, stopped: Path) -> None:
    with torch.no_grad():
        other = replace(bench, model=BenchNet())

    with pytest.raises(CheckpointError, match="model was '[0-9a-f]+"):
        pruned(other, "torch", Checkpoints(stopped, {}))


@pytest.fixture(scope="module")
def stopped(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Interrupted):
        pruned(bench, "torch", StoppingStages(folder, stop_at=2))
    return folder
