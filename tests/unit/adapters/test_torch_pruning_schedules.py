"""Our schedules as the callables that torch-pruning takes."""

from __future__ import annotations

import pytest

from nni_prune_ext import torch_pruning
from nni_prune_ext.errors import ConfigError, PluginError, UnknownPluginError
from nni_prune_ext.registry import load_plugin, plugins
from nni_prune_ext.schedules import SchedulerSpec
from nni_prune_ext.torch_pruning import schedule_for


def kind(name: str) -> str:
    spec = load_plugin("schedulers", name)
    assert isinstance(spec, SchedulerSpec)
    return spec.kind


SCHEDULES = [name for name in plugins("schedulers") if kind(name) == "schedule"]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_ratios_rise_from_nothing_to_exactly_the_whole(name: str, steps: int) -> None:
    ratios = schedule_for(name)(0.6, steps)

    assert steps + 1 == len(ratios)
    assert 0.0 == ratios[0]
    assert 0.6 == ratios[-1]
    assert sorted(ratios) == ratios


def test_known_values() -> None:
    assert [0.0, 0.25, 0.5] == torch_pruning.linear(0.5, 2)
    assert [0.0, 0.5 * 7 / 8, 0.5] == torch_pruning.agp(0.5, 2)
    assert [0.0, pytest.approx(0.25), 0.5] == torch_pruning.cosine(0.5, 2)
    assert [0.0, 0.5, 0.5] == torch_pruning.one_shot(0.5, 2)
    assert 0.4 * 0.75 == pytest.approx(torch_pruning.asfp(0.4, 8)[1])


@pytest.mark.parametrize("name", ["agp", "linear", "cosine", "asfp", "one_shot"])
def test_named_function_is_the_registered_schedule(name: str) -> None:
    assert schedule_for(name)(0.7, 5) == getattr(torch_pruning, name)(0.7, 5)
    assert name == schedule_for(name).__name__


def test_schedulers_of_another_kind_unknown_names_and_no_steps_are_refused() -> None:
    with pytest.raises(PluginError, match="'uniform_ratio' is a ratio policy, expected a schedule"):
        schedule_for("uniform_ratio")
    with pytest.raises(PluginError, match="'short_restriction' is a mask update rule, expected a schedule"):
        schedule_for("short_restriction")
    with pytest.raises(UnknownPluginError, match="Did you mean 'linear'"):
        schedule_for("lineer")
    with pytest.raises(ConfigError, match="over 0 steps was asked for, expected 1 or more"):
        schedule_for("agp")(0.5, 0)
