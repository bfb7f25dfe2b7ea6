"""Removed equals silenced on random networks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plans import random_plan
from random_networks import networks
from torch import nn

from nni_prune_ext.certificate import certify_plan, verify_groups
from nni_prune_ext.graph.channel_groups import trace_channel_groups

CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
EXPECTED_REASONS = ("has a single channel", "every channel is the last one of some layer", "reaches the model's output")


def check_random_plan(model: nn.Module, seed: int) -> None:
    inputs = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    groups = verify_groups(model, inputs, trace_channel_groups(model, inputs), seed=seed)

    unexpected = [protected for protected in groups.protected if protected.reason not in EXPECTED_REASONS]
    assert unexpected == []
    plan = random_plan(groups, seed) if len(groups) else None
    if plan is not None and plan.num_removed:
        assert certify_plan(model, plan, inputs, groups=groups, seed=seed).flaw() is None


@settings(max_examples=25, deadline=None, suppress_health_check=CHECKS, derandomize=True)
@given(model=networks(max_depth=1, max_blocks=3), seed=st.integers(0, 10_000))
def test_a_random_plan_on_a_random_network_is_exact(model: nn.Module, seed: int) -> None:
    check_random_plan(model, seed)


@pytest.mark.slow
@settings(max_examples=600, deadline=None, suppress_health_check=CHECKS)
@given(model=networks(max_depth=2, max_blocks=4), seed=st.integers(0, 10_000))
def test_random_plans_on_many_larger_random_networks_are_exact(model: nn.Module, seed: int) -> None:
    check_random_plan(model, seed)
