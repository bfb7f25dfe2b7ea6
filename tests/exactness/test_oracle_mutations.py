"""The oracle is itself tested: every kind of wrong index, put into the compact model only, must be found.

"Runs", "the shapes fit" and "parameters fell" find none of these errors.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from plans import largest_difference, outputs_of

from nni_prune_ext import surgery
from nni_prune_ext.certificate import certify_plan
from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.plan import PruningPlan, plan_from_channels
from nni_prune_ext.surgery import cut_channels, kept_indices, silence_channels
from nni_prune_ext.testing.toy_models import ZOO

Mutation = Callable[[torch.Tensor, int], torch.Tensor]


def shifted(kept: torch.Tensor, size: int) -> torch.Tensor:
    """The wrong neighbours: every index moved by one."""
    return ((kept + 1) % size).sort().values


def reversed_order(kept: torch.Tensor, size: int) -> torch.Tensor:
    """The right ones in a wrong order."""
    return kept.flip(0)


def as_nchw(kept: torch.Tensor, size: int) -> torch.Tensor:
    """The features that would stay if channels came first, for 6 channels of 4 pixels each."""
    channels = kept[: len(kept) // 4]
    return (channels[:, None] * 4 + torch.arange(4)).reshape(-1)


MUTATIONS: dict[str, tuple[str, str, int, Mutation]] = {
    "producer rows": ("chain", "0.0.weight", 0, shifted),
    "consumer columns": ("chain", "1.0.weight", 1, shifted),
    "permuted consumer": ("chain", "1.0.weight", 1, reversed_order),
    "permuted producer": ("residual", "1.1.body.0.weight", 0, reversed_order),
    "concat offset": ("dense", "2.0.weight", 1, shifted),
    "flatten order": ("nhwc_flatten", "3.weight", 1, as_nchw),
    "linear rows": ("nhwc_flatten", "3.weight", 0, shifted),
    "conv bias rows": ("bias_without_norm", "0.bias", 0, shifted),
    "batch norm gamma": ("chain", "0.1.weight", 0, shifted),
    "batch norm beta": ("chain", "0.1.bias", 0, shifted),
    "batch norm mean": ("chain", "0.1.running_mean", 0, shifted),
    "batch norm variance": ("chain", "0.1.running_var", 0, shifted),
    "layer norm gamma permuted": ("layer_norm", "1.norm.weight", 0, reversed_order),
    "layer norm beta": ("layer_norm", "1.norm.bias", 0, shifted),
    "layer scale": ("layer_norm", "1.scale", 0, shifted),
    "group norm gamma": ("group_norm", "1.1.weight", 0, reversed_order),
    "instance norm beta": ("instance_norm", "1.1.bias", 0, shifted),
    "depthwise rows": ("depthwise", "1.0.0.weight", 0, shifted),
    "grouped columns": ("grouped", "1.0.0.weight", 1, shifted),
    "grouped rows": ("grouped", "1.0.0.weight", 0, shifted),
    "transposed rows": ("transposed", "1.0.weight", 0, shifted),
    "transposed columns": ("transposed", "1.0.weight", 1, shifted),
    "slopes": ("prelu", "1.1.weight", 0, shifted),
    "buffers": ("channel_buffers", "1.scale", 0, shifted),
    "embedding columns": ("embedding", "table.weight", 1, shifted),
    "gate": ("squeeze_excite", "1.expand.weight", 0, shifted),
    "gate partner": ("glu", "1.0.weight", 0, reversed_order),
    "shuffled": ("view_shuffle", "1.2.0.weight", 1, reversed_order),
    "shortcut": ("option_a", "1.0.shortcut.selection", 0, shifted),
}


def plan_and_model(topology: str) -> tuple[torch.nn.Module, PruningPlan, object, object]:
    torch.manual_seed(0)
    model, inputs = ZOO[topology].build().eval(), ZOO[topology].example_inputs()
    groups = trace_channel_groups(model, inputs)
    plan = plan_from_channels(groups, {g.name: [0, *range(2, g.num_channels, 3)] for g in groups if len(g.roots)})
    return model, plan, inputs, groups


def mutate(monkeypatch: pytest.MonkeyPatch, tensor: str, dim: int, mutation: Mutation) -> None:
    def wrong(plan, groups):
        kept = kept_indices(plan, groups)
        size = groups.shapes[tensor][dim]
        right = kept[tensor][dim]
        kept[tensor][dim] = mutation(right, size)
        assert len(kept[tensor][dim]) == len(right)
        assert not torch.equal(kept[tensor][dim], right)
        return kept

    monkeypatch.setattr(surgery, "kept_indices", wrong)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_index_in_one_tensor_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    topology, tensor, dim, mutation = MUTATIONS[name]
    model, plan, inputs, groups = plan_and_model(topology)
    assert certify_plan(model, plan, inputs, groups=groups).exact

    mutate(monkeypatch, tensor, dim, mutation)
    certificate = certify_plan(model, plan, inputs, groups=groups)

    assert not certificate.exact
    assert certificate.max_relative_error > 1e-4


@pytest.mark.parametrize("name", [name for name in MUTATIONS if name.startswith("batch norm")])
def test_a_check_with_initial_weights_would_miss_wrong_batch_norm_rows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology, tensor, dim, mutation = MUTATIONS[name]
    model, plan, inputs, groups = plan_and_model(topology)

    mutate(monkeypatch, tensor, dim, mutation)
    compact = cut_channels(model, plan, inputs, groups=groups).model
    silenced = silence_channels(model, plan, inputs, groups=groups)

    assert largest_difference(outputs_of(silenced, inputs), outputs_of(compact, inputs)) < 1e-4


def test_a_vacuous_comparison_is_not_taken_for_a_proof() -> None:
    class Deaf(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)).clamp(0.0, 0.0)

    model, inputs = Deaf(), torch.randn(1, 3, 4, 4)
    groups = trace_channel_groups(model, inputs)

    certificate = certify_plan(model, plan_from_channels(groups, {"first": [0]}), inputs, groups=groups)

    assert certificate.max_relative_error == 0
    assert not certificate.exact
    assert "nothing was shown" in certificate.flaw()
