"""Training: fitting, the crank, cuts on the way, and batch-norm statistics against slow obvious ways."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from nni_prune_ext.checkpoints import Checkpoints
from nni_prune_ext.errors import ConfigError, TrainingError
from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.methods.base import Batch, JsonState, MethodContext, Outcome, Phase, PruningMethod
from nni_prune_ext.methods.baselines import L1
from nni_prune_ext.models.cifar_resnet import resnet20
from nni_prune_ext.plan import plan_from_channels
from nni_prune_ext.surgery import Removal
from nni_prune_ext.testing.method_bench import Bench, CountedRun, Interrupted, StoppingCheckpoints, modes_of, traces_on
from nni_prune_ext.testing.toy_models import ZOO
from nni_prune_ext.training import (
    EpochLog,
    MethodRun,
    TrainingSettings,
    Watcher,
    accuracy,
    checked_settings,
    cross_entropy,
    drive,
    fit,
    recalibrate_batchnorm,
    seeded,
)


def toy_task() -> tuple[nn.Module, list[Batch]]:
    """Images whose brightest channel is the label."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(4):
        images, labels = torch.randn(16, 3, 8, 8, generator=generator), torch.randint(3, (16,), generator=generator)
        images[torch.arange(16), labels] += 1
        batches.append((images, labels))
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    return model, batches


class Listener(Watcher):
    def __init__(self, hear) -> None:
        self.hear = hear

    def epoch(self, log: EpochLog) -> None:
        self.hear(log)


def bench_run() -> CountedRun:
    return Bench.of(L1, {}).run()


# -- fit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_fitting_lowers_the_loss_and_raises_the_accuracy(precision: str, channels_last: bool) -> None:
    model, batches = toy_task()
    before = accuracy(model, batches)

    settings = checked_settings(learning_rate=0.1, precision=precision, channels_last=channels_last)
    logs = fit(model, batches, epochs=6, settings=settings)

    assert logs[-1].loss < 0.6 * logs[0].loss
    assert accuracy(model, batches) > max(before, 0.8)
    assert {torch.float32} == {p.dtype for p in model.parameters()}
    assert all(p.is_contiguous() for p in model.parameters())


def test_bf16_runs_the_forward_pass_in_bf16() -> None:
    model, batches = toy_task()
    seen: set[torch.dtype] = set()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch[0])
        seen.add(logits.dtype)
        return functional.cross_entropy(logits, batch[1])

    fit(model, batches, epochs=1, loss=loss, settings=TrainingSettings(precision="bf16"))

    assert {torch.bfloat16} == seen


def test_the_learning_rate_falls_along_a_cosine_and_the_log_tells_the_last_one() -> None:
    model, batches = toy_task()

    logs = fit(model, batches, epochs=2, settings=TrainingSettings(learning_rate=1e-3))

    assert [1e-3 * 0.5 * (1 + math.cos(math.pi * done / 8)) for done in (3, 7)] == pytest.approx(
        [log.learning_rate for log in logs]
    )


def test_batches_without_a_length_never_push_progress_beyond_the_epoch() -> None:
    model, batches = toy_task()
    rates: list[float] = []

    class Endless:
        def __iter__(self) -> Iterator[Batch]:
            return iter(batches)

    fit(model, Endless(), epochs=3, watcher=Listener(lambda log: rates.append(log.learning_rate)),
        settings=TrainingSettings(learning_rate=1.0e-3))  # fmt: skip

    assert [1e-3, 0.75e-3, 0.25e-3] == pytest.approx(rates)


def test_fitting_leaves_modes_gradients_and_frozen_parameters_as_they_were() -> None:
    model, batches = toy_task()
    model[0].weight.requires_grad_(False)
    model[1].eval()
    modes, frozen = modes_of(model), model[0].weight.clone()

    fit(model, batches, epochs=1)

    assert modes == modes_of(model)
    assert [] == traces_on(model)
    assert torch.equal(frozen, model[0].weight)


def test_every_epoch_is_announced_to_data_and_caller() -> None:
    model, batches = toy_task()
    epochs: list[int] = []
    logs: list[EpochLog] = []

    class Announced(list):
        def set_epoch(self, epoch: int) -> None:
            epochs.append(epoch)

    returned = fit(model, Announced(batches), epochs=3, watcher=Listener(logs.append))

    assert [0, 1, 2] == epochs == [log.epoch for log in logs]
    assert returned == logs


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_training_with_advice(bad: float) -> None:
    model, batches = toy_task()

    with pytest.raises(TrainingError, match=r"epoch 1 of phase 'fit'.*Lower the learning rate"):
        fit(model, batches, epochs=3, loss=lambda model, batch: cross_entropy(model, batch) * bad)


def test_no_batch_and_nothing_to_train_are_mistakes() -> None:
    model, batches = toy_task()

    with pytest.raises(ConfigError, match="gave no batch"):
        fit(model, [], epochs=1)
    with pytest.raises(ConfigError, match="nothing to train"):
        fit(model.requires_grad_(False), batches, epochs=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"precision": "fp8"},
    ],
)
def test_settings_out_of_range_are_refused(wrong: Mapping[str, object]) -> None:
    with pytest.raises(ConfigError):
        checked_settings(**wrong)


# -- forward only ----------------------------------------------------------------------------------------------


def test_recalibrated_statistics_are_the_plain_average_over_batches() -> None:
    model, batches = toy_task()
    expected = copy.deepcopy(model)
    activations = [model[0](images) for images, _ in batches[:3]]
    mean = torch.stack([a.mean((0, 2, 3)) for a in activations]).mean(0)
    var = torch.stack([a.transpose(0, 1).flatten(1).var(1, unbiased=True) for a in activations]).mean(0)

    recalibrate_batchnorm(model, batches, count=3)

    assert torch.allclose(mean, model[1].running_mean, atol=1e-6)
    assert torch.allclose(var, model[1].running_var, atol=1e-6)
    assert expected[1].momentum == model[1].momentum
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), model.parameters()))


def test_recalibration_calls_the_model_as_the_users_loss_does() -> None:
    model, batches = toy_task()
    other = copy.deepcopy(model)
    records = [{"pixels": images, "label": labels} for images, labels in batches]

    recalibrate_batchnorm(model, records, forward=lambda model, record: model(record["pixels"]))
    recalibrate_batchnorm(other, batches)

    assert torch.equal(other[1].running_mean, model[1].running_mean)


def test_recalibration_without_data_is_refused_and_leaves_the_statistics() -> None:
    model, _ = toy_task()
    model[1].running_mean.fill_(3.0)

    with pytest.raises(ConfigError, match="gave no batch"):
        recalibrate_batchnorm(model, [])

    assert [3.0] * 8 == model[1].running_mean.tolist()
    assert (True, 0.1) == (model[1].training, model[1].momentum)


def test_recalibration_of_a_model_without_batch_norm_does_nothing() -> None:
    recalibrate_batchnorm(nn.Linear(2, 2), [])


def test_accuracy_counts_right_answers_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.Identity()).train()
    batches = [(torch.eye(3), torch.tensor([0, 1, 0])), (torch.eye(3)[:1], torch.tensor([0]))]

    assert 0.75 == accuracy(model, batches)
    assert model.training
    assert math.isnan(accuracy(model, []))


# -- drive -----------------------------------------------------------------------------------------------------


class Diary(PruningMethod):
    """Writes down every call."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.entries: list[str] = []
        self.progress: list[float] = []
        self._phases = phases

    def phases(self) -> Sequence[Phase]:
        return self._phases

    def start(self, context: MethodContext, phase: Phase) -> None:
        self._note(context, f"start {phase.name}")
        context.on_leave(lambda: self.entries.append(f"leave {phase.name}"))

    def compute_loss(self, context: MethodContext, batch: Batch) -> Tensor:
        self._note(context, "loss")
        return context.task_loss(batch)

    def after_backward(self, context: MethodContext) -> None:
        assert any(p.grad is not None for p in context.model.parameters())
        self._note(context, "backward")

    def after_step(self, context: MethodContext) -> None:
        self._note(context, "step")

    def after_epoch(self, context: MethodContext, phase: Phase, epoch: int) -> None:
        self._note(context, f"epoch {epoch}")

    def on_removed(self, context: MethodContext, removal: Removal) -> None:
        assert context.model is removal.model
        self._note(context, "removed")

    def finish(self, context: MethodContext) -> Outcome:
        self._note(context, "finish")
        return Outcome(plan_from_channels(context.groups, {}))

    def _note(self, context: MethodContext, entry: str) -> None:
        self.entries.append(entry)
        self.progress.append(context.progress)


def test_hooks_are_called_in_order() -> None:
    run = bench_run()
    run.batches_ = run.batches_[:2]
    method = Diary([Phase("look"), Phase("train", 2)])

    drive(method, run)

    step = ["loss", "backward", "step"]
    expected = [
        "start look",
        "leave look",
        "start train",
        *step,
        *step,
        "epoch 0",
        *step,
        *step,
        "epoch 1",
        "leave train",
        "finish",
    ]
    assert expected == method.entries


def test_progress_runs_from_0_to_1_over_all_phases() -> None:
    run = bench_run()
    method = Diary([Phase("first", 1), Phase("second", 3)])

    drive(method, run)

    assert sorted(method.progress) == method.progress
    assert (0.0, 1.0) == (method.progress[0], method.progress[-1])
    starts = [
        p
        for entry, p in zip([e for e in method.entries if not e.startswith("leave")], method.progress)
        if "start" in entry
    ]
    assert [0.0, 0.25] == starts


def test_a_phase_with_nothing_trainable_only_runs_forward() -> None:
    run = bench_run()
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    method = Diary([Phase("observe", 1, trainable=lambda _: False)])

    drive(method, run)

    assert ["start observe", *["loss", "step"] * 3, "epoch 0", "leave observe", "finish"] == method.entries
    assert all(torch.equal(before[name], p) for name, p in run.model.named_parameters())
    assert all(p.requires_grad for p in run.model.parameters())


def test_only_what_the_phase_names_is_trained() -> None:
    run = bench_run()
    before = {name: p.clone() for name, p in run.model.named_parameters()}

    drive(Diary([Phase("norms", 1, trainable=lambda name: name.startswith("stem.1"))]), run)

    changed = {name for name, p in run.model.named_parameters() if not torch.equal(before[name], p)}
    assert {"stem.1.weight", "stem.1.bias"} == changed


def test_the_loop_trains_what_no_optimizer_of_the_method_holds() -> None:
    run = bench_run()
    held: list[list[int]] = []

    class Own(Diary):
        def after_step(self, context: MethodContext) -> None:
            held.append([len(group["params"]) for optimizer in run.optimizers for group in optimizer.param_groups])

    head = lambda context: [torch.optim.Adam(context.model.head.parameters())]  # noqa: E731
    drive(Own([Phase("both", 1, optimizers=head)]), run)

    total = len(list(run.model.parameters()))
    assert [[total - 2, 2]] * 3 == held


def test_a_cut_on_the_way_takes_hooks_off_slices_momentum_and_tells_the_method() -> None:
    run = bench_run()
    momenta: dict[str, Tensor] = {}

    class Cuts(Diary):
        def start(self, context: MethodContext, phase: Phase) -> None:
            super().start(context, phase)
            context.on_leave(context.model.inside[0].register_forward_hook(lambda *_: None).remove)

        def after_epoch(self, context: MethodContext, phase: Phase, epoch: int) -> None:
            super().after_epoch(context, phase, epoch)
            if epoch == 0:
                state = run.optimizers[0].state
                momenta.update({n: state[p]["momentum_buffer"].clone() for n, p in context.model.named_parameters()})
                context.apply(plan_from_channels(context.groups, {"inside.0": [0, 3]}))
                now = run.optimizers[0].state
                kept = torch.tensor([c for c in range(16) if c not in (0, 3)])
                for name, parameter in context.model.named_parameters():
                    old = momenta[name]
                    old = old[kept] if name.startswith("inside") else old[:, kept] if name == "back.0.weight" else old
                    assert torch.equal(old, now[parameter]["momentum_buffer"])

    method = Cuts([Phase("train", 2)])
    drive(method, run)

    assert method.entries.index("leave train") < method.entries.index("removed") < method.entries.index("epoch 1")
    assert 1 == method.entries.count("leave train") == method.entries.count("removed")
    assert 14 == run.model.inside[0].out_channels
    assert [] == traces_on(run.model)


def test_a_later_cut_counts_from_the_model_that_the_first_one_left() -> None:
    run = bench_run()

    class Twice(Diary):
        def start(self, context: MethodContext, phase: Phase) -> None:
            context.apply(plan_from_channels(context.groups, {"inside.0": [0]}))
            context.apply(plan_from_channels(context.groups, {"inside.0": [0, 14]}))

    drive(Twice([Phase("cut")]), run)

    assert run.applied is not None
    assert {"inside.0": (0, 1, 15)} == run.applied.removed


@pytest.mark.parametrize("name", ["residual", "option_a", "dense", "depthwise"])
def test_rewinding_loads_the_weights_of_the_dense_model_cut_alike(name: str) -> None:
    torch.manual_seed(0)
    model, x = ZOO[name].build().eval(), ZOO[name].example_inputs()
    run = MethodRun(model=copy.deepcopy(model), example_inputs=x, groups=trace_channel_groups(model, x))
    for _ in range(2):  # two cuts, so that indices are composed
        run.apply(
            plan_from_channels(run.groups, {g.name: [0, g.num_channels - 2] for g in run.groups if g.num_channels > 3})
        )
    expected = {key: value.clone() for key, value in run.model.state_dict().items()}
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(1)

    run.rewind(model.state_dict())

    assert all(torch.equal(expected[key], value) for key, value in run.model.state_dict().items())


def test_a_network_with_option_a_shortcuts_can_be_rewound() -> None:
    model, x = resnet20().eval(), torch.zeros(1, 3, 32, 32)
    run = MethodRun(model=copy.deepcopy(model), example_inputs=x, groups=trace_channel_groups(model, x))
    run.apply(plan_from_channels(run.groups, {run.groups.groups[0].name: [1]}))

    run.rewind(model.state_dict())

    assert 15 == run.model.conv1.out_channels


class Noisy(PruningMethod):
    """Draws random numbers in every phase and keeps their sum."""

    def __init__(self) -> None:
        self.total = torch.zeros(1)

    def phases(self) -> Sequence[Phase]:
        return [Phase(f"phase {k}", 1) for k in range(3)]

    def after_step(self, context: MethodContext) -> None:
        self.total = self.total + torch.rand(1) * context.progress

    def finish(self, context: MethodContext) -> Outcome:
        return Outcome(plan_from_channels(context.groups, {}), facts={"total": float(self.total)})

    def state_dict(self) -> tuple[dict[str, Tensor], JsonState]:
        return {"total": self.total}, {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: JsonState) -> None:
        self.total = tensors["total"]


@pytest.mark.parametrize("stopped_at", [1, 2, 3, 4, 5, 6])
def test_a_run_resumed_at_a_checkpoint_ends_like_one_that_never_stopped(stopped_at: int, tmp_path: Path) -> None:
    whole, first, second = bench_run(), bench_run(), bench_run()
    expected = drive(Noisy(), whole)
    first.checkpoints = StoppingCheckpoints(tmp_path, stop_at=stopped_at)
    with pytest.raises(Interrupted):
        drive(Noisy(), first)

    second.checkpoints = Checkpoints(tmp_path, {})
    resumed = drive(Noisy(), second)

    assert expected.facts == resumed.facts
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters()))
    assert [log.phase for log in whole.logs] == [log.phase for log in second.logs]


# -- services --------------------------------------------------------------------------------------------------


def test_batches_outside_the_loop_do_not_move_its_order() -> None:
    data = TensorDataset(torch.arange(32.0), torch.arange(32))

    def orders(probe: bool, loader: DataLoader) -> list[float]:
        run = MethodRun(model=nn.Linear(1, 1), batches_=loader)
        seen: list[float] = []
        with seeded(run.model, 0):
            for _ in range(2):
                if probe:
                    run.batches(2)
                seen += [float(x) for images, _ in run.batches_ for x in images]
        return seen

    plain = DataLoader(data, batch_size=4, shuffle=True)
    assert orders(False, plain) == orders(True, plain)
    loaders = [
        DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    ]
    assert orders(False, loaders[0]) == orders(True, loaders[1])


def test_asking_for_batches_where_there_are_none_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="gave no batch"):
        MethodRun(model=nn.Linear(1, 1)).batches(2)


def test_notes_carry_the_progress_at_which_they_arose() -> None:
    run = MethodRun(model=nn.Linear(1, 1), progress=0.25)

    run.log({"sparsity": 0.5})

    assert [{"progress": 0.25, "sparsity": 0.5}] == run.notes


def test_allocation_during_a_phase_does_not_run_the_methods_hooks() -> None:
    run = bench_run()
    calls = []

    class Allocates(Diary):
        def start(self, context: MethodContext, phase: Phase) -> None:
            context.on_leave(context.model.register_forward_hook(lambda *_: calls.append(1)).remove)
            context.allocate({g.name: torch.rand(g.num_channels) for g in context.groups}, fraction=0.5)

    drive(Allocates([Phase("plan")]), run)

    assert [] == calls


def test_seeding_gives_the_random_state_back() -> None:
    model = nn.Linear(1, 1)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)

    with seeded(model, 5):
        first = torch.rand(2)
    with seeded(model, 5):
        second = torch.rand(2)

    assert torch.equal(expected, torch.rand(2))
    assert torch.equal(first, second)
