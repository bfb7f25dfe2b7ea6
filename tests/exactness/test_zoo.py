"""Removed equals silenced on every topology of the zoo, for random plans."""

from __future__ import annotations

import pytest
import torch
from plans import largest_difference, outputs_of, random_plan

from nni_prune_ext.certificate import certify_plan, remove_channels, verify_groups
from nni_prune_ext.graph.channel_groups import ChannelGroups, trace_channel_groups
from nni_prune_ext.inputs import cast_floats
from nni_prune_ext.surgery import cut_channels, silence_channels
from nni_prune_ext.testing.toy_models import ZOO

PLANS = 50


def verified(name: str) -> tuple[torch.nn.Module, object, ChannelGroups]:
    torch.manual_seed(0)
    model, inputs = ZOO[name].build(), ZOO[name].example_inputs()
    return model, inputs, verify_groups(model, inputs, trace_channel_groups(model, inputs))


@pytest.mark.parametrize("name", ZOO)
def test_random_plans_are_certified_exact(name: str) -> None:
    model, inputs, groups = verified(name)

    for seed in range(PLANS):
        plan = random_plan(groups, seed)
        certificate = certify_plan(model, plan, inputs, groups=groups, probes=1, seed=seed)

        assert certificate.flaw() is None, (seed, plan.removed)
        assert plan.num_removed > 0


@pytest.mark.parametrize("name", ZOO)
def test_with_its_own_weights_and_inputs_the_compact_model_computes_what_the_silenced_one_does(name: str) -> None:
    model, inputs, groups = verified(name)
    model, inputs = model.double().eval(), cast_floats(inputs, torch.float64)
    plan = random_plan(groups, 1, all_groups=True)

    compact = cut_channels(model, plan, inputs, groups=groups).model
    silenced = silence_channels(model, plan, inputs, groups=groups)

    expected = outputs_of(silenced, inputs)
    assert largest_difference(expected, outputs_of(compact, inputs)) < 1e-12
    assert sum(p.numel() for p in compact.parameters()) < sum(p.numel() for p in model.parameters())
    assert [p.shape for p in model.parameters()] == [p.shape for p in silenced.parameters()]


@pytest.mark.parametrize("name", ZOO)
def test_three_steps_equal_one_composed_plan(name: str) -> None:
    model, inputs, groups = verified(name)
    dense = model
    composed = random_plan(groups, 0)
    model = cut_channels(model, composed, inputs, groups=groups).model

    for step in (1, 2):
        groups = verify_groups(model, inputs, trace_channel_groups(model, inputs))
        if len(groups):
            plan = random_plan(groups, step)
            model = cut_channels(model, plan, inputs, groups=groups).model
            composed = composed.then(plan)

    at_once = remove_channels(dense, composed, inputs)
    expected = model.state_dict()
    assert expected.keys() == at_once.model.state_dict().keys()
    assert all(torch.equal(expected[key], value) for key, value in at_once.model.state_dict().items())
    assert at_once.certificate is not None


EXPECTED_REASONS = {
    "spatial_attention": ("0.0", "reduces over channels"),
    "lstm": ("1.1.0", "'lstm'"),
    "computed_weight": ("1.1.0", "computed in its forward"),
    "in_place_write": ("1.0.0", "writes into a part"),
    "inline_pad": ("0.0", "channels are padded inside '1'"),
    "fused_attention": ("1.attention.qkv", "attention"),
    "multihead_attention": ("0.0", "attention"),
    "two_outputs": ("features.0", "reaches the model's output"),
    "tied_autoencoder": ("code", "two directions"),
    "mask": ("mask", "spread over all channels"),
}


@pytest.mark.parametrize("name", EXPECTED_REASONS)
def test_what_is_not_understood_is_protected_with_its_reason(name: str) -> None:
    _, _, groups = verified(name)
    root, words = EXPECTED_REASONS[name]

    reasons = {p.root: p.reason for p in groups.protected}

    assert words in reasons[root]


def test_only_the_channels_that_meet_the_output_or_the_unknown_are_protected() -> None:
    for name in ZOO.keys() - EXPECTED_REASONS.keys():
        _, _, groups = verified(name)

        others = [p for p in groups.protected if p.reason not in ("reaches the model's output", "has a single channel")]

        assert others == [], name
