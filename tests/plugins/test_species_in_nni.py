"""Every species of method, also those that train, cut on the way, search masks or gate, works as an NNI pruner."""

from __future__ import annotations

from typing import Any

import nni
import pytest
import torch
from nni.compression import TorchEvaluator
from species import SPECIES
from torch import Tensor, nn

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.methods.base import MethodContext, MethodSpec, NoOptions, Outcome, Phase, PruningMethod
from nni_prune_ext.pruning import AGPPruner, MethodPruner, pruner_for
from nni_prune_ext.speedup import ModelSpeedup
from nni_prune_ext.testing.method_bench import Bench


def pruner_class(spec: MethodSpec, monkeypatch: pytest.MonkeyPatch) -> type[MethodPruner]:
    import species

    monkeypatch.setattr(species, "SPEC", spec, raising=False)
    return pruner_for("species:SPEC")


def evaluator(model: nn.Module, bench: Bench) -> TorchEvaluator:
    def train(
        model: nn.Module,
        optimizer: Any,
        training_step: Any,
        schedule: Any = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        done = 0
        for _ in range(max_epochs or 100):
            for batch in bench.run().batches_:
                if max_steps is not None and done == max_steps:
                    return
                optimizer.zero_grad()
                training_step(batch, model).backward()
                optimizer.step()
                done += 1

    def step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01)
    return TorchEvaluator(train, optimizer, step, dummy_input=bench.example)


def config_of(bench: Bench, ratio: float = 0.5) -> list[dict[str, Any]]:
    names = sorted({root for group in bench.groups for root in group.roots} | _coupled(bench))
    return [{"op_names": names, "sparse_ratio": ratio}]


def _coupled(bench: Bench) -> set[str]:
    return {
        member.tensor.removesuffix(".weight")
        for group in bench.groups
        for member in group.members
        if member.role.value in ("writer", "depthwise")
    }


@pytest.mark.parametrize("spec", SPECIES.values(), ids=SPECIES)
def test_every_species_prunes_through_nni_and_its_masks_can_be_removed(
    spec: MethodSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench.of(spec, spec.demo_options)
    model = bench.run().model
    given = evaluator(model, bench)
    pruner = pruner_class(spec, monkeypatch)(model, config_of(bench), given, **dict(spec.demo_options))

    returned, masks = pruner.compress()

    assert returned is model
    assert given.model is None
    assert not torch.is_inference_mode_enabled()
    if "gated_model" in spec.products:
        assert pruner.gated_model is not None
    if "plan" not in spec.products:
        return
    plan = pruner.plan()
    assert plan.num_removed > 0
    for group in pruner.channels.groups:
        kept = group.num_channels - len(plan.removed.get(group.name, ()))
        assert kept >= group.num_channels // 2, "a ratio of one half is never exceeded"
    pruner.unwrap_model()
    before = sum(p.numel() for p in model.parameters())
    ModelSpeedup(model, bench.example, masks).speedup_model()
    assert sum(p.numel() for p in model.parameters()) < before
    model(*bench.example if isinstance(bench.example, tuple) else (bench.example,))


@pytest.mark.parametrize("name", [name for name, spec in SPECIES.items() if spec.scores is None])
def test_a_method_without_scores_is_refused_under_an_outer_schedule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench.of(SPECIES[name], SPECIES[name].demo_options)
    model = bench.run().model
    given = evaluator(model, bench)
    pruner = AGPPruner(pruner_class(SPECIES[name], monkeypatch)(model, config_of(bench), given), 2, 2)

    with pytest.raises(ConfigError, match=f"'{name}' decides in phases of its own"):
        pruner.compress(4, None)
    assert given.model is None


class Trained(PruningMethod):
    """Trains two epochs, cuts in between, and counts what it was told."""

    calls: list[str]

    def phases(self) -> list[Phase]:
        self.calls = CALLS
        return [Phase("before", 1), Phase("after", 2)]

    def start(self, context: MethodContext, phase: Phase) -> None:
        if phase.name == "after":
            context.apply(context.allocate(self._scores(context), fraction=0.5).plan)

    def after_backward(self, context: MethodContext) -> None:
        self.calls.append("backward")

    def after_step(self, context: MethodContext) -> None:
        self.calls.append("step")

    def after_epoch(self, context: MethodContext, phase: Phase, epoch: int) -> None:
        self.calls.append(f"{phase.name} {epoch} {context.groups.num_channels}")

    def finish(self, context: MethodContext) -> Outcome:
        WEIGHTS.update({name: tensor.detach().clone() for name, tensor in context.model.named_parameters()})
        return Outcome(context.allocate(self._scores(context)).plan)

    def _scores(self, context: MethodContext) -> dict[str, Tensor]:
        return {group.name: torch.arange(group.num_channels).float() for group in context.groups}


CALLS: list[str] = []
WEIGHTS: dict[str, Tensor] = {}
TRAINED = MethodSpec(
    "toy_trained", "trains and cuts", "none", NoOptions, lambda _: Trained(), needs_data=True, changes_structure=True
)


def test_a_method_that_cuts_on_the_way_leaves_its_trained_weights_and_both_cuts_in_the_users_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    CALLS.clear()
    WEIGHTS.clear()
    bench = Bench.of(TRAINED, {})
    model = bench.run().model
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    channels = bench.groups.num_channels
    pruner = pruner_class(TRAINED, monkeypatch)(model, config_of(bench), evaluator(model, bench))

    _, masks = pruner.compress()
    pruner.unwrap_model()

    steps = len(list(bench.run().batches_))
    assert 3 * steps == CALLS.count("step") == CALLS.count("backward")
    assert f"before 0 {channels}" in CALLS
    cut = next(call for call in CALLS if call.startswith("after 1"))
    assert int(cut.split()[2]) == pytest.approx(0.75 * channels, abs=len(bench.groups))
    group = next(iter(pruner.channels.groups))
    kept = (masks[group.name]["weight"].flatten(1) != 0).any(1).nonzero().flatten()
    half = group.num_channels // 2
    assert list(range(half, group.num_channels)) == kept.tolist(), "the lower numbers go first, and stay gone"
    trained = WEIGHTS[f"{group.name}.weight"]
    now = model.get_submodule(group.name).weight
    assert now.shape == initial[f"{group.name}.weight"].shape
    assert torch.equal(trained[-half:], now[half:]), "the rows that survive both cuts"
    assert not torch.equal(initial[f"{group.name}.weight"][half:], now[half:])


class Masked(PruningMethod):
    """Masks every second weight of the first layer."""

    def phases(self) -> list[Phase]:
        return [Phase("only")]

    def finish(self, context: MethodContext) -> Outcome:
        name = f"{next(iter(context.groups)).name}.weight"
        mask = torch.ones_like(dict(context.model.named_parameters())[name], dtype=torch.bool)
        mask.view(-1)[::2] = False
        empty = context.allocate({g.name: torch.zeros(g.num_channels) for g in context.groups}, fraction=0.0).plan
        return Outcome(empty, {name: mask})


def test_masks_of_single_weights_become_masks_of_nni(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MethodSpec(
        "toy_masked", "masks", "none", NoOptions, lambda _: Masked(), products=frozenset({"plan", "weight_masks"})
    )
    bench = Bench.of(spec, {})
    model = bench.run().model
    pruner = pruner_class(spec, monkeypatch)(model, config_of(bench), dummy_input=bench.example)

    _, masks = pruner.compress()

    name = next(iter(pruner.channels.groups)).name
    assert 0 == int(masks[name]["weight"].flatten()[::2].sum())
    assert bool((masks[name]["weight"].flatten()[1::2] == 1).all())
