"""The mass rule as a ratio policy, and the firing signature of a network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.gates import firing_signature
from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.methods.ftwt_ratios import ftwt_ratio
from nni_prune_ext.schedules import build_ratio_policy


def test_a_group_loses_what_lies_beyond_nine_tenths_of_its_mass() -> None:
    few = torch.tensor([[5.0], [3.5], [0.5], [0.5], [0.5]])  # 0.5, 0.85, then 0.9, 0.95, 1.0: three stay
    alike = torch.ones(4, 2)  # 0.25, 0.5, 0.75: three of four stay

    ratios = ftwt_ratio({"few": [few], "alike": [alike]}, {}, 0.0)

    assert {"few": pytest.approx(2 / 5), "alike": pytest.approx(1 / 4)} == ratios


def test_the_mass_of_a_channel_is_that_of_all_its_writers() -> None:
    one, other = torch.tensor([[1.0], [0.0], [0.0]]), torch.tensor([[0.0], [-1.0], [0.0]])

    ratios = ftwt_ratio({"joined": [one, other]}, {}, 0.0)

    assert 2 / 3 == pytest.approx(ratios["joined"]), "0.5, then the second would make 1: one stays"


def test_where_nothing_can_go_all_groups_are_alike() -> None:
    assert {"empty": 1.0, "zero": 1.0} == ftwt_ratio({"empty": [], "zero": [torch.zeros(3, 2)]}, {}, 0.0)


def test_it_is_registered() -> None:
    assert build_ratio_policy("ftwt_ratio") is ftwt_ratio


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(4, 2, 1), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).amax((2, 3)))


def test_the_signature_is_the_share_of_channels_that_images_do_not_need() -> None:
    model = Chain()
    with torch.no_grad():
        model.first.weight.copy_(torch.tensor([6.0, 3.0, 1.0, 0.0]).reshape(4, 1, 1, 1))
    images = torch.ones(8, 1, 2, 2)

    signature = firing_signature(model, images[:1], [images], mass=0.95)

    assert 0.5 == pytest.approx(signature["first"]), "0.6 and 0.9 stay; 1.0 crosses, and the last has no heat"
    assert {group.name for group in trace_channel_groups(model, images[:1])} == set(signature)


def test_the_signature_refuses_no_images_and_impossible_masses() -> None:
    model = Chain()

    with pytest.raises(ConfigError, match="There is no batch"):
        firing_signature(model, torch.ones(1, 1, 2, 2), [])
    with pytest.raises(ConfigError, match=r"The mass is 1.5, expected 0–1"):
        firing_signature(model, torch.ones(1, 1, 2, 2), [torch.ones(1, 1, 2, 2)], mass=1.5)
