"""FTWT from end to end on tiny networks: what learns when, what is removed, what is handed over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import nni_prune_ext as npe
from nni_prune_ext.allocation import LayerLimit, Limits, Target
from nni_prune_ext.costs import count_costs
from nni_prune_ext.deployment import load_gated, write_artefacts
from nni_prune_ext.errors import CertificateError, ConfigError
from nni_prune_ext.export.manifest import MethodUse
from nni_prune_ext.gates import GatedNetwork
from nni_prune_ext.gates.blocks import BLOCKS
from nni_prune_ext.gates.estimates import estimate_gating, solve_mass
from nni_prune_ext.gates.heads import GateHead
from nni_prune_ext.methods.base import Batch, MethodContext, Outcome, Phase
from nni_prune_ext.methods.ftwt import FTWT, Ftwt
from nni_prune_ext.methods.ftwt_options import FtwtOptions
from nni_prune_ext.pipeline import method_options
from nni_prune_ext.surgery import Removal
from nni_prune_ext.testing.method_bench import Bench, BenchNet, CountedRun, traces_on
from nni_prune_ext.testing.method_checks import check_method
from nni_prune_ext.training import TrainingSettings, drive

SHORT: dict[str, object] = {"epochs": 2, "core_epochs": 0, "calibration_batches": 2}
FREE = (Target("macs", 1.0),)
"""Asks for no more than the exact cut."""


class Spy(Ftwt):
    """The method, watched."""

    def __init__(self, options: FtwtOptions) -> None:
        super().__init__(options)
        self.heads: list[dict[str, Tensor]] = []
        self.losses: list[tuple[float, float]] = []
        self.began: Callable[[MethodContext], object] = lambda context: None
        self.before_cut: Callable[[MethodContext], object] = lambda context: None
        self.after_cut: Callable[[MethodContext, Removal], object] = lambda context, removal: None

    def start(self, context: MethodContext, phase: Phase) -> None:
        if phase.name == "core":
            self.before_cut(context)
        super().start(context, phase)
        if phase.name == "gates":
            self.heads.append(tensors(self.gates))
            self.began(context)

    def compute_loss(self, context: MethodContext, batch: Batch) -> Tensor:
        loss = super().compute_loss(context, batch)
        mask = float(self.gates.mask_loss().detach()) if self.gates.targets is not None else 0.0
        self.losses.append((float(loss.detach()), mask))
        return loss

    def after_epoch(self, context: MethodContext, phase: Phase, epoch: int) -> None:
        super().after_epoch(context, phase, epoch)
        if phase.name == "gates":
            self.heads.append(tensors(self.gates))

    def on_removed(self, context: MethodContext, removal: Removal) -> None:
        super().on_removed(context, removal)
        self.after_cut(context, removal)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def spied(**options: object) -> Spy:
    return Spy(FtwtOptions.model_validate({**SHORT, **options}))


def bench_run(**changes: object) -> CountedRun:
    """Returns a run over images with structure: classes differ in the channel that is bright."""
    run = Bench.of(FTWT, {}).run()
    generator = torch.Generator().manual_seed(4)
    batches = []
    for _ in range(6):
        labels = torch.randint(4, (16,), generator=generator)
        bright = 2 * torch.eye(4)[labels][:, :3, None, None]
        batches.append((torch.randn(16, 3, 8, 8, generator=generator) + bright, labels))
    given = {"batches_": batches, "limits": Limits(), "targets": FREE, **changes}
    return replace(run, **given)


def gated_of(outcome: Outcome) -> GatedNetwork:
    assert isinstance(outcome.gated_model, GatedNetwork)
    return outcome.gated_model.eval()


# -- contract ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"block": 4, "expected_macs": 0.8},
        {"selection": "static"},
        {"mode": "joint", "mass": 0.6, "targets": "uniform", "pool": "avg", "softmax": False, "safe_start": False},
    ],
    ids=lambda own: next(iter(own)),
)
def test_the_promises_of_a_method_are_kept_with(options: dict[str, object]) -> None:
    check_method(FTWT, options={**FTWT.demo_options, "epochs": 2, "calibration_batches": 1, **options})


# -- who learns when ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "learning"),
    [
        ({"epochs": 4}, 2),
        ({"epochs": 5}, 2),
        ({"epochs": 1}, 1),
        ({"epochs": 4, "cooldown": 1.0}, 4),
        ({"epochs": 4, "cooldown": 0.25}, 1),
        ({"epochs": 4, "mode": "joint"}, 2),
        ({"epochs": 4, "core_epochs": 2}, 2),
    ],
)
def test_heads_move_in_the_first_half_and_stand_bit_for_bit_afterwards(
    options: dict[str, object], learning: int
) -> None:
    method = spied(remove_never=False, **options)

    outcome = drive(method, bench_run())

    moved = [not same(before, after) for before, after in zip(method.heads, method.heads[1:])]
    assert [True] * learning + [False] * (method.options.epochs - learning) == moved
    if "core_epochs" in options:
        assert same(method.heads[-1], tensors(gated_of(outcome).gates))


def test_the_mask_loss_is_part_of_the_loss_while_heads_learn_and_not_afterwards() -> None:
    method, run = spied(epochs=4), bench_run()

    drive(method, run)

    with_masks, without = method.losses[:12], method.losses[12:]
    assert 12 == len(without)
    assert all(mask > 0 for _, mask in with_masks)
    assert {0.0} == {mask for _, mask in without}
    assert all(0 < loss - mask < 10 for loss, mask in with_masks)


def test_decoupled_heads_do_not_move_the_network_and_joint_ones_do() -> None:
    grads: dict[str, dict[str, float]] = {}
    for mode in ("decoupled", "joint"):
        method = spied(mode=mode)

        def began(context: MethodContext, method: Spy = method, mode: str = mode) -> None:
            context.model.zero_grad()
            method.gates.targets = method._rule()
            with method.gates.on(context.model):
                context.task_loss(context.batches(1)[0])
                method.gates.mask_loss().backward()
            grads[mode] = {
                name: 0.0 if own.grad is None else float(own.grad.abs().sum())
                for name, own in context.model.named_parameters()
            }
            context.model.zero_grad(set_to_none=True)

        method.began = began
        drive(method, bench_run())

    assert {0.0} == set(grads["decoupled"].values())
    assert grads["joint"]["stem.0.weight"] > 0
    assert 0.0 == grads["joint"]["head.weight"]


def test_precision_and_recall_of_the_heads_are_logged_while_they_learn() -> None:
    method, run = spied(epochs=4), bench_run()

    outcome = drive(method, run)

    logged = [note for note in run.notes if "head_precision" in note]
    assert 2 == len(logged)
    assert all(0 < note[key] <= 1 for note in logged for key in ("head_precision", "head_recall"))
    assert logged[-1]["head_precision"] == outcome.facts["last_learning_head_precision"]
    assert logged[-1]["head_recall"] == outcome.facts["last_learning_head_recall"]
    assert logged[1] != logged[0]


def test_heads_learn_what_is_asked_of_them() -> None:
    method = spied(epochs=24, cooldown=1.0, mass=0.5, remove_never=False)
    run = bench_run(settings=TrainingSettings(learning_rate=1e-4))

    outcome = drive(method, run)

    first = next(note["head_precision"] for note in run.notes if "head_precision" in note)
    assert outcome.facts["last_learning_head_precision"] > max(1.3 * first, 0.6)
    assert outcome.facts["filters_varying"] > 0
    assert pytest.approx(outcome.facts["macs_share_realised_minus_predicted"]) == (
        outcome.facts["expected_macs_share"] - outcome.facts["predicted_macs_share"]
    )


# -- the static control ------------------------------------------------------------------------------------------------


def test_a_static_selection_is_the_same_for_all_images_and_its_heads_never_move() -> None:
    method = spied(epochs=3, core_epochs=1, selection="static", mass=0.5)

    outcome = drive(method, bench_run())

    assert all(same(method.heads[0], later) for later in method.heads)
    gated = gated_of(outcome)
    with torch.no_grad():
        gated(5 * torch.randn(20, 3, 8, 8))
    for own in gated.gates.open_channels().values():
        assert torch.equal(own[:1].expand_as(own), own)
    assert 0.0 == outcome.facts["filters_varying"]
    assert "last_learning_head_recall" not in outcome.facts


def test_a_static_selection_takes_as_many_filters_per_layer_as_the_targets_do_on_average() -> None:
    method, found = spied(selection="static", mass=0.5), {}

    def began(context: MethodContext) -> None:
        for _ in method._probe_again(context):
            rates = {layer: own.float().mean() for layer, own in method.gates.wanted.items()}
            found.setdefault("wanted", []).append(rates)
            found["open"] = {layer: own[0].float().sum() for layer, own in method.gates.opened.items()}

    def probe_again(context: MethodContext) -> object:
        from nni_prune_ext.graph.gate_tracing import trace_gate_flow

        flow = trace_gate_flow(context.model, context.example_inputs)
        return method._probe(context, flow, method._batches(context)[0]).passes("predicted", method._rule())

    method._probe_again = probe_again  # type: ignore[attr-defined]
    method.began = began
    drive(method, bench_run())

    opened = {layer: float(count) for layer, count in found["open"].items()}
    stem = sum(float(own["stem.0"]) for own in found["wanted"]) / len(found["wanted"])
    assert 2 == len(found["wanted"])
    assert round(stem * 12) == opened["stem.0"], "the stem reads the same images in any network"
    assert all(count >= 1 for count in opened.values())


def test_a_static_selection_takes_the_hottest_filters_on_average() -> None:
    method, run, heat = spied(selection="static", mass=0.5), bench_run(), []

    def began(context: MethodContext) -> None:
        context.model.eval()
        with torch.no_grad():
            heat.append(
                torch.cat([context.model.stem(images) for images, _ in context.batches(2)]).amax((2, 3)).mean(0)
            )
        heat.append(method.gates.head("stem.0").bias.detach().clone())
        context.model.train()

    method.began = began
    drive(method, run)

    opened = heat[1] > 0
    assert 0 < int(opened.sum()) < 12
    assert float(heat[0][opened].min()) > float(heat[0][~opened].max())


# -- expected MACs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 4])
def test_expected_macs_are_solved_for_before_training(block: int) -> None:
    method, run = spied(expected_macs=0.5, block=block), bench_run()

    outcome = drive(method, run)

    fresh = bench_run()
    mass = solve_mass(fresh.model, fresh.example_inputs, fresh.batches(2), 0.5, block=block)
    assert mass == method.mass == outcome.facts["mass"]
    assert 0.4 < outcome.facts["predicted_macs_share"] <= 0.5


@pytest.mark.parametrize("options", [{}, {"block": 4}, {"block": 4, "targets": "uniform", "mass": 0.4}])
def test_what_gates_save_is_foreseen_as_the_estimate_says(options: dict[str, object]) -> None:
    method, run = spied(**{"mass": 0.7, **options}), bench_run()

    outcome = drive(method, run)

    own, fresh = method.options, bench_run()
    (estimate,) = estimate_gating(
        fresh.model,
        fresh.example_inputs,
        fresh.batches(2),
        masses=[own.mass],
        uniform=own.targets == "uniform",
        block=own.block,
    )
    assert estimate.closed_loop.share == outcome.facts["predicted_macs_share"]
    assert estimate.closed_loop.official_share == outcome.facts["predicted_official_macs_share"]


def test_expected_macs_out_of_reach_are_refused_with_what_is_possible() -> None:
    with pytest.raises(ConfigError, match="Gates cannot bring the expected MACs to 0.01 of the dense"):
        drive(spied(expected_macs=0.01), bench_run())


# -- the static core ---------------------------------------------------------------------------------------------------


def planted(method: Spy, channels: Mapping[str, list[int]]) -> None:
    """Lets some heads close filters for every image, just before the cut."""

    def close(context: MethodContext) -> None:
        for layer, gone in channels.items():
            head = method.gates.head(layer)
            with torch.no_grad():
                head.weight[gone] = 0
                head.bias[gone] = -50.0

    method.before_cut = close


def logits_of(method: Spy, context: MethodContext) -> list[Tensor]:
    network = GatedNetwork(context.model, method.gates)
    was = network.model.training
    network.model.eval()
    with torch.no_grad():
        found = [network(images) for images, _ in context.batches(2)]
    network.model.train(was)
    return found


PLANTED = {"inside.0": [0, 5, 15], "stem.0": [3], "back.0": [3], "depthwise.0": [3]}


@pytest.mark.parametrize("block", [1, 4])
def test_filters_that_never_fire_are_removed_and_the_gated_network_says_the_same(block: int) -> None:
    method, seen = spied(block=block), {}
    plant = {"inside.0": [0, 2]} if block > 1 else PLANTED
    planted(method, plant)
    close = method.before_cut

    def before(context: MethodContext) -> None:
        close(context)
        seen["before"] = logits_of(method, context)
        seen["flow"] = context.model.inside[0].out_channels

    method.before_cut = before
    method.after_cut = lambda context, removal: seen.setdefault("after", logits_of(method, context))

    outcome = drive(method, run := bench_run())

    assert run.applied is not None
    if block == 1:
        assert {0, 5, 15} <= set(run.applied.removed["inside.0"])
        assert 3 in run.applied.removed["stem.0"], "all its writers are silent"
    assert (
        outcome.facts["never_firing_channels"]
        == run.applied.num_removed
        - (len(run.applied.removed.get("back.0", ())) + len(run.applied.removed.get("depthwise.0", ())))
        or outcome.facts["never_firing_channels"] == run.applied.num_removed
    )
    for expected, found in zip(seen["before"], seen["after"], strict=True):
        assert torch.allclose(expected, found, atol=1e-5)


def test_filters_that_fire_seldom_stay_and_calibration_images_see_no_difference() -> None:
    method, seen, run = spied(layers="inside.0,back.0,whole.0"), {}, bench_run()

    def before(context: MethodContext) -> None:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for head in method.gates.all_heads():
                head.weight[:, :-1].normal_(0, 6, generator=generator)
                head.bias.normal_(-0.5, 1, generator=generator)
        seen["before"] = logits_of(method, context)
        network = GatedNetwork(context.model.eval(), method.gates)
        fired = []
        for images, _ in context.batches(2):
            network(images)
            fired.append(network.gates.open_channels()["inside.0"])
        context.model.train()
        seen["rate"] = torch.cat(fired).float().mean(0)

    method.before_cut = before
    method.after_cut = lambda context, removal: seen.setdefault("after", logits_of(method, context))
    drive(method, run)

    rate = seen["rate"]
    assert run.applied is not None
    assert bool(((rate > 0) & (rate < 0.5)).any()), "some fire seldom"
    assert torch.nonzero(rate == 0).flatten().tolist() == list(run.applied.removed["inside.0"])
    for expected, found in zip(seen["before"], seen["after"], strict=True):
        assert torch.allclose(expected, found, atol=1e-5)


def test_one_writer_that_fires_keeps_a_channel_of_the_stream() -> None:
    method = spied()
    planted(method, {"stem.0": [3, 4, 5], "back.0": [3, 5], "depthwise.0": [5]})
    run = bench_run()

    drive(method, run)

    assert run.applied is not None
    gone = set(run.applied.removed["stem.0"])
    assert 5 in gone, "nobody writes it"
    assert 3 not in gone, "what nobody writes is not zero behind the norm of the depthwise layer"
    assert 4 not in gone, "the branch writes it"


def test_nothing_is_cut_that_nobody_asked_for() -> None:
    method, run = spied(remove_never=False), bench_run()
    planted(method, PLANTED)

    outcome = drive(method, run)

    assert run.applied is None or not run.applied.num_removed
    assert 0.0 == outcome.facts["never_firing_channels"] == outcome.facts["never_firing_params_share"]


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        (Limits(exclude=("inside.*",)), 16),
        (Limits(min_channels=9), 9),
        (Limits(max_ratio=0.25), 12),
        (Limits(multiple=4), 8),
        (Limits(), 6),
        (Limits(multiple=8, max_ratio=0.4), 16),
        (Limits(layers={"inside.*": LayerLimit(multiple=4)}), 8),
    ],
    ids=["exclude", "min_channels", "max_ratio", "multiple", "none", "both", "multiple of the layer"],
)
def test_limits_hold_for_the_cut_of_what_never_fires(limits: Limits, kept: int) -> None:
    method = spied()
    planted(method, {"inside.0": list(range(10))})
    wide = bench_run(limits=limits)

    def close_and_open(context: MethodContext, close: Callable[[MethodContext], object] = method.before_cut) -> None:
        close(context)
        with torch.no_grad():
            for layer in ("stem.0", "back.0", "depthwise.0", "whole.0"):
                method.gates.head(layer).bias.fill_(50.0)
            method.gates.head("inside.0").bias[10:] = 50.0

    method.before_cut = close_and_open

    drive(method, wide)

    assert kept == wide.model.inside[0].out_channels


def test_the_leak_is_measured_on_other_images_than_those_that_decide() -> None:
    method, run = spied(), bench_run()
    seen: list[tuple[list[int], list[int]]] = []

    def before(context: MethodContext) -> None:
        with torch.no_grad():
            for head in method.gates.all_heads():
                head.weight.zero_()
                head.bias.fill_(5.0)
            head = method.gates.head("inside.0")
            head.bias[7] = -50.0
        decided, others = method._batches(context)
        seen.append(([id(own) for own in decided], [id(own) for own in others]))
        bias = head.bias
        reached = method._reached

        def counted(context: MethodContext, batches: list[Batch]) -> dict[str, Tensor]:
            with torch.no_grad():
                first = torch.equal(batches[0][0], decided[0][0])
                bias[7] = -50.0 if first else 50.0
                found = reached(context, batches)
                bias[7] = -50.0
            return found

        method._reached = counted  # type: ignore[method-assign]

    method.before_cut = before

    outcome = drive(method, run)

    assert (2, 2) == (len(seen[0][0]), len(seen[0][1]))
    assert not set(seen[0][0]) & set(seen[0][1])
    assert 1.0 == outcome.facts["never_firing_channels"]
    assert 1.0 == outcome.facts["never_firing_leak"], "on the other batches the removed filter always fires"


def test_one_batch_alone_tells_no_leak() -> None:
    run = bench_run()

    outcome = drive(spied(), replace(run, batches_=run.batches_[:1]))

    assert "never_firing_leak" not in outcome.facts


@pytest.mark.parametrize("options", [{}, {"selection": "static"}, {"block": 4}, {"remove_never": False}])
def test_targets_bound_the_static_network(options: dict[str, object]) -> None:
    bench = Bench.of(FTWT, {**SHORT, "core_epochs": 1, **options})

    result = bench.prune()

    assert all(goal.met for goal in result.achieved)
    dense, compact = (count_costs(model, bench.example).macs for model in (bench.model, result.model))
    assert compact <= 0.6 * dense
    gated = gated_of(result.outcome)
    assert result.outcome.facts["expected_macs_share"] <= compact / dense + result.outcome.facts["head_macs_share"]
    assert {name: own.shape for name, own in result.model.state_dict().items()} == {
        name: own.shape for name, own in gated.model.state_dict().items()
    }
    weights = dict(gated.model.named_parameters())
    assert all(torch.equal(own, weights[name]) for name, own in result.removed_only.named_parameters())
    assert [] == traces_on(gated.model)


# -- hand-over ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"block": 4}, {"pool": "avg", "mode": "joint"}, {"layers": "inside.0, back.0"}, {"softmax": False}]
)
def test_a_gated_network_is_read_back_from_its_artefact(options: dict[str, object], tmp_path: Path) -> None:
    bench = Bench.of(FTWT, {**SHORT, **options})
    result = bench.prune()
    gated = gated_of(result.outcome)
    write_artefacts(
        result.model, tmp_path / "made", bench.example, plan=result.plan, gated_model=gated,
        method=MethodUse(name="ftwt", options=dict(bench.configured().model_dump())),
    )  # fmt: skip

    again = load_gated(BenchNet, tmp_path / "made").eval()

    x = torch.randn(9, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(gated(x), again(x))
    assert {name: own.tolist() for name, own in gated.gates.opened.items()} == {
        name: own.tolist() for name, own in again.gates.opened.items()
    }


def test_the_facts_are_those_of_the_network_that_is_handed_over() -> None:
    method, run = spied(epochs=4, core_epochs=1, mass=0.6), bench_run()

    outcome = drive(method, run)

    gated = gated_of(outcome)
    opened = []
    with torch.no_grad():
        for images, _ in run.batches(2):
            gated(images)
            opened.append(torch.cat(list(gated.gates.open_channels().values()), 1))
    rates = torch.cat(opened).double().mean(0)
    facts = outcome.facts
    assert len(rates) == facts["filters_gated"]
    assert int((rates == 0).sum()) == facts["filters_never"]
    assert int((rates == 1).sum()) == facts["filters_always"]
    assert len(rates) == facts["filters_never"] + facts["filters_always"] + facts["filters_varying"]
    assert pytest.approx(float(rates.mean())) == facts["firing_rate"]
    assert count_costs(BenchNet(), torch.zeros(1, 3, 8, 8)).macs == facts["dense_macs"]
    assert pytest.approx(facts["expected_macs"] / facts["dense_macs"]) == facts["expected_macs_share"]
    assert [1] == [len(outcome.pictures)]
    expected, firing = outcome.gating
    assert facts["expected_macs"] == expected.mean
    assert torch.equal(rates, torch.cat([own.rate for own in firing.values()]))
    assert not any(parameter.requires_grad for parameter in gated.gates.parameters())


def test_a_residual_network_with_padded_shortcuts_runs_through() -> None:
    torch.manual_seed(0)
    model = npe.build_model("resnet20", num_classes=4, in_channels=3)
    images = torch.randn(8, 3, 16, 16)
    data = [(images, torch.arange(8) % 4)]

    result = npe.prune(model, images[:1], method=FTWT, target="macs=0.6", options={**SHORT, "epochs": 1},
                       train_batches=data)  # fmt: skip

    gated = gated_of(result.outcome)
    assert 19 == len(gated.gates.places)
    assert result.certificate is not None
    assert result.certificate.exact
    assert bool(gated(images).isfinite().all())


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mass": 1.1}, "less than or equal to 1"),
        ({"mass": -0.1}, "greater than or equal to 0"),
        ({"expected_macs": 1.0}, "less than 1"),
        ({"expected_macs": 0.0}, "greater than 0"),
        ({"mass": 1.0, "targets": "uniform"}, "share of units to drop"),
        ({"block": 3}, "Input should be 1, 4, 8 or 16"),
        ({"epochs": 0}, "greater than or equal to 1"),
        ({"head_learning_rate": float("inf")}, "finite"),
        ({"masss": 1.0}, "Extra inputs"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        FtwtOptions.model_validate(options)


def test_a_mass_of_one_is_fine_where_it_is_a_mass() -> None:
    outcome = drive(spied(mass=1.0, epochs=1), bench_run())

    assert 1.0 == outcome.facts["mass"]
    assert outcome.facts["predicted_macs_share"] > 0.9


def test_an_unknown_layer_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'insde\.0'.*stem\.0, inside\.0, back\.0, depthwise\.0, whole\.0"):
        drive(spied(layers="stem.0,insde.0"), bench_run())


def test_named_layers_alone_get_heads() -> None:
    outcome = drive(spied(layers="inside.0, dep*"), bench_run())

    assert ["inside.0", "depthwise.0"] == [place.layer for place in gated_of(outcome).gates.places]


def test_defaults_are_those_of_the_paper() -> None:
    own = FtwtOptions()

    assert ("max", "decoupled", "mass", "input", 1, 0.5, 0.1) == (
        own.pool, own.mode, own.targets, own.selection, own.block, own.cooldown, own.head_learning_rate
    )  # fmt: skip
    assert [25, 1, 1, 2] == [FtwtOptions(epochs=epochs).learning_epochs for epochs in (50, 1, 3, 4)]


@pytest.mark.parametrize("left", [1, 2])
def test_a_network_in_which_almost_nothing_fires_is_cut_to_that(left: int) -> None:
    method, run = spied(), bench_run(limits=Limits(max_ratio=1.0))

    def close(context: MethodContext) -> None:
        with torch.no_grad():
            for head in method.gates.all_heads():
                head.weight.zero_()
                head.bias.fill_(-50.0)
                head.bias[:left] = 50.0

    method.before_cut = close

    outcome = drive(method, run)

    assert left == run.model.inside[0].out_channels == run.model.depthwise[0].out_channels
    assert outcome.facts["never_firing_share"] <= 1.0, "a share"
    assert bool(gated_of(outcome)(torch.randn(2, 3, 8, 8)).isfinite().all())


def test_heads_that_could_never_learn_are_refused() -> None:
    with pytest.raises(ConfigError, match="heads never learn"):
        method_options(FTWT, {"cooldown": 0.0})


def test_the_static_control_has_no_epochs_for_heads() -> None:
    names = [phase.name for phase in Ftwt(FtwtOptions(selection="static", head_epochs=3)).phases()]

    assert ["gates", "core"] == names


def test_expected_macs_are_solved_for_uniform_targets_too() -> None:
    facts = drive(Ftwt(FtwtOptions(expected_macs=0.6, targets="uniform", epochs=1)), bench_run()).facts

    assert 0.5 < facts["predicted_macs_share"] <= 0.6


def test_while_heads_learn_alone_the_network_stands_still_even_if_somebody_sets_it_to_training() -> None:
    method, run = Ftwt(FtwtOptions(head_epochs=1, epochs=1, remove_never=False)), bench_run()
    phase = method.phases()[0]
    method.start(run, phase)
    method.attach(run, phase)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}

    run.model.train()
    loss = method.compute_loss(run, run.batches(1)[0])

    run.leave()
    assert loss.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())


def test_the_cut_of_what_never_fires_is_compared_before_and_after() -> None:
    facts = drive(Ftwt(FtwtOptions(epochs=2, calibration_batches=1, mass=0.5)), bench_run()).facts

    if facts["never_firing_channels"]:
        assert 0 < facts["gated_cut_images"]
        assert facts["gated_cut_error"] < 1e-5


def test_a_head_that_does_not_follow_the_cut_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = GateHead.cut

    def wrong(head: GateHead, inputs: torch.Tensor, filters: torch.Tensor) -> GateHead:
        made = real(head, inputs, filters)
        made.reset(safe_start=False)
        return made

    monkeypatch.setattr(GateHead, "cut", wrong)
    own = FtwtOptions(selection="static", mass=0.5, epochs=1, calibration_batches=1)

    with pytest.raises(CertificateError, match="computes something else"):
        drive(Ftwt(own), bench_run())


@pytest.mark.parametrize("most", [0.05, 0.5])
def test_clipping_gradients_does_not_let_the_heads_shrink_the_steps_of_the_network(most: float) -> None:
    ends = []
    for mass in (0.3, 0.9):  # everything is open in the first step, so only the heads' own loss differs
        run = bench_run(settings=TrainingSettings(max_gradient_norm=most, warmup_epochs=0))
        run.batches_ = list(run.batches_)[:1]
        drive(Ftwt(FtwtOptions(mass=mass, epochs=1, remove_never=False, calibration_batches=1)), run)
        ends.append({name: own.detach().clone() for name, own in run.model.named_parameters()})

    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-7) for name in ends[0])
    assert any(not torch.equal(own, ends[0][name]) for name, own in bench_run().model.named_parameters())


def test_heads_learn_in_the_epochs_that_they_have_alone() -> None:
    own = FtwtOptions(head_epochs=2, epochs=1, cooldown=0.0, remove_never=False, calibration_batches=1)
    method, run = Ftwt(own), bench_run()
    method.start(run, method.phases()[0])
    before = {name: tensor.clone() for name, tensor in method.gates.state_dict().items()}

    outcome = drive(method, bench_run())

    learnt = outcome.gated_model.gates.state_dict()
    assert before.keys() == learnt.keys()
    moved = [name for name in before if not torch.equal(before[name], learnt[name])]
    assert {f"heads.{k}.bias" for k in range(len(method.gates.places))} <= set(moved)


def test_the_static_control_is_not_charged_for_heads_that_do_nothing_also_when_it_is_read_back() -> None:
    own = FtwtOptions(selection="static", mass=0.5, epochs=1, calibration_batches=1)
    run = bench_run()
    network = drive(Ftwt(own), run).gated_model
    again = FTWT.build_gated(network.model, own, Bench.of(FTWT, {}).example, network.state_dict())
    again.load_state_dict(network.state_dict())

    found = [npe.measure_gating(own, Bench.of(FTWT, {}).example, run.batches_)[0].heads for own in (network, again)]

    assert [0, 0] == found


@pytest.mark.parametrize("softmax", [True, False])
def test_heads_that_have_not_learnt_yet_are_foreseen_with_their_costs(softmax: bool) -> None:
    shares = {
        own: drive(Ftwt(FtwtOptions(softmax=own, epochs=1, remove_never=False)), bench_run()).facts[
            "predicted_macs_share"
        ]
        for own in (True, softmax)
    }

    assert shares[True] == pytest.approx(shares[softmax])


def test_the_choices_of_blocks_are_those_of_an_estimate() -> None:
    assert BLOCKS == get_args(FtwtOptions.model_fields["block"].annotation)
