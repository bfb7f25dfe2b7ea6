"""The short restriction around plain L1: masks follow moving weights less and less, and settle."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import nni
import nni.compression.pruning as nni_pruning
import pytest
import torch
from nni.compression import TorchEvaluator
from nni_bench import IMAGE, LAYERS, batches, channels, config, network, shares, step
from torch import Tensor, nn

from nni_prune_ext.mask_updates import fourth_power, half_cosine
from nni_prune_ext.pruning import (
    CosineShortRestrictionPruner,
    L1NormPruner,
    LevelPruner,
    ReplacePruner,
    ShortRestrictionPruner,
    scheduled_pruner_for,
)

UPDATES = 8


@dataclass
class History:
    """What a rule was asked at every update, and the masks that were in use afterwards."""

    asked: list[tuple[float, int]] = field(default_factory=list)
    kept: list[dict[str, set[int]]] = field(default_factory=list)

    def requested(self, update: int) -> int:
        """Counts the swaps that the scores asked for, over all layers."""
        return sum(swaps for progress, swaps in self.asked if progress == (update + 1) / UPDATES)

    def made(self, update: int) -> int:
        """Counts the swaps that were made from one update to the next."""
        before, now = self.kept[update - 1], self.kept[update]
        return sum(len(now[layer] - before[layer]) for layer in now)


def run(outer: Any, monkeypatch: pytest.MonkeyPatch, inner: Any = L1NormPruner, **arguments: Any) -> History:
    """Prunes the bench, whose weights wander from step to step, in one leap and then by swaps."""
    history, spec = History(), outer.scheduler

    def noting() -> Any:
        rule = spec.build()

        def noted(old: Tensor, proposed: Tensor, scores: Tensor, progress: float) -> Tensor:
            swaps = min(int((~old & proposed).sum()), int((old & ~proposed).sum()))
            history.asked.append((progress, swaps))
            return rule(old, proposed, scores, progress)

        return noted

    monkeypatch.setattr(outer, "scheduler", replace(spec, build=noting))
    model = network()
    pruner = outer(inner(model, config(0.5), wandering(model)), 2, UPDATES, schedule="one_shot", **arguments)
    update = pruner.bound_pruner.update_masks

    def spied(masks: Any) -> None:
        update(masks)
        history.kept.append({layer: kept_units(own["weight"], inner) for layer, own in pruner.get_masks().items()})

    pruner.bound_pruner.update_masks = spied
    _, masks = pruner.compress(2 * UPDATES + 1, None)
    assert dict.fromkeys(LAYERS, 0.5) == shares(masks)
    return history


@pytest.mark.parametrize(
    ("outer", "share"), [(ShortRestrictionPruner, fourth_power), (CosineShortRestrictionPruner, half_cosine)]
)
@pytest.mark.parametrize("inner", [L1NormPruner, nni_pruning.L1NormPruner, LevelPruner])
def test_every_update_makes_a_falling_share_of_the_swaps_and_the_last_none(
    outer: Any, share: Any, inner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = run(outer, monkeypatch, inner)

    assert UPDATES == len(history.kept)
    for update in range(1, UPDATES):
        progress = (update + 1) / UPDATES
        own = [swaps for seen, swaps in history.asked if seen == progress]
        assert sum(math.ceil(share(progress) * swaps) for swaps in own) == history.made(update)
    assert history.requested(UPDATES - 1) > 0, "the weights have not settled"
    assert 0 == history.made(UPDATES - 1), "the masks have"


def test_without_the_restriction_the_masks_change_more_and_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    limited, free = run(ShortRestrictionPruner, monkeypatch), run(ReplacePruner, monkeypatch)

    assert all(free.requested(update) == free.made(update) for update in range(1, UPDATES))
    assert free.made(UPDATES - 1) > 0
    assert sum(map(limited.made, range(1, UPDATES))) < sum(map(free.made, range(1, UPDATES)))


def test_coupled_layers_stay_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    history = run(ShortRestrictionPruner, monkeypatch)

    assert all(kept["conv2"] == kept["conv3"] for kept in history.kept)


def test_the_classes_are_those_of_the_registered_rules() -> None:
    assert ShortRestrictionPruner is scheduled_pruner_for("short_restriction")
    assert CosineShortRestrictionPruner is scheduled_pruner_for("short_restriction_cosine")
    assert "CosineShortRestrictionPruner" == CosineShortRestrictionPruner.__name__


def kept_units(mask: Tensor, inner: Any) -> set[int]:
    return set(mask.flatten().nonzero().flatten().tolist()) if inner is LevelPruner else set(channels(mask))


def wandering(model: nn.Module) -> TorchEvaluator:
    """Returns an evaluator whose training also scales every filter at random after every step."""

    def train(
        model: nn.Module, optimizer: Any, training_step: Any, schedule: Any, max_steps: int, epochs: Any = None
    ) -> None:
        generator = torch.Generator().manual_seed(2)
        for batch in (batches() * 9)[:max_steps]:
            optimizer.zero_grad()
            training_step(batch, model).backward()
            with torch.no_grad():
                for parameter in (p for p in model.parameters() if p.dim() > 1):
                    parameter *= torch.rand(len(parameter), *[1] * (parameter.dim() - 1), generator=generator) + 0.5
            optimizer.step()

    return TorchEvaluator(train, nni.trace(torch.optim.SGD)(model.parameters(), lr=0.05), step, dummy_input=IMAGE)
