"""Which shortcuts are rewritten as selections of channels, and that the rewriting is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.certificate import remove_channels
from nni_prune_ext.errors import PlanError
from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.graph.rewrites import ChannelSelect, apply_rewrites
from nni_prune_ext.models.cifar_resnet import PadShortcut, resnet20
from nni_prune_ext.plan import plan_from_channels
from nni_prune_ext.testing.toy_blocks import Apply, Residual

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(shortcut: nn.Module, *, stride: int = 2) -> nn.Module:
    body = nn.Conv2d(4, 8, 3, stride=stride, padding=1)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), Residual(body, shortcut), nn.Conv2d(8, 4, 1))


def pad(x: Tensor) -> Tensor:
    return functional.pad(x, (0, 0, 0, 0, 1, 3))


REWRITTEN: dict[str, Callable[[], nn.Module]] = {
    "both sides": lambda: PadShortcut(2, 2),
    "unequal sides": lambda: Apply(lambda x: pad(x[:, :, ::2, ::2])),
    "average": lambda: Apply(lambda x: pad(functional.avg_pool2d(x, 2))),
    "max of one pixel": lambda: Apply(lambda x: pad(functional.max_pool2d(x, 1, 2))),
    "average outside": lambda: nn.Sequential(nn.AvgPool2d(2), Apply(pad)),
}
NOT_REWRITTEN: dict[str, Callable[[], nn.Module]] = {
    "bent": lambda: Apply(lambda x: pad(torch.relu(x[:, :, ::2, ::2]))),
    "clipped": lambda: Apply(lambda x: pad(x[:, :, ::2, ::2].clamp(-6, 6))),
    "scaled": lambda: Apply(lambda x: pad(2 * x[:, :, ::2, ::2])),
    "other pixel": lambda: Apply(lambda x: pad(x[:, :, 1::2, ::2])),
    "other constant": lambda: Apply(lambda x: functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), value=1.0)),
    "random in training": lambda: Apply(lambda x, drop: pad(drop(x[:, :, ::2, ::2])), nn.Dropout(0.5)),
    "reflected": lambda: Apply(
        lambda x: functional.pad(x[:, :, ::2, ::2].transpose(1, 3), (2, 2), mode="constant").transpose(1, 3).flip(1)
    ),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_a_shortcut_that_pads_is_rewritten_exactly(name: str) -> None:
    model = network(REWRITTEN[name]())
    groups = trace_channel_groups(model, IMAGE)

    rewritten = apply_rewrites(model, groups.rewrites, IMAGE)

    assert len(groups.rewrites) == 1
    assert torch.equal(model(IMAGE), rewritten(IMAGE))
    assert {"0": 4, "2.body": 8} == {group.name: group.num_channels for group in groups}


@pytest.mark.parametrize("name", NOT_REWRITTEN)
def test_a_shortcut_that_does_more_stays_and_its_channels_are_protected(name: str) -> None:
    model = network(NOT_REWRITTEN[name]())

    groups = trace_channel_groups(model, IMAGE)

    if name == "reflected":  # a selection in another order is one all the same
        assert len(groups.rewrites) == 1
        return
    assert () == groups.rewrites
    assert any("channels are padded inside '2.shortcut'" in p.reason for p in groups.protected)


def test_the_compact_selection_is_slice_and_pad_again_at_export() -> None:
    model = resnet20().eval()
    inputs = torch.randn(1, 3, 16, 16)
    groups = trace_channel_groups(model, inputs)
    plan = plan_from_channels(groups, {g.name: range(0, g.num_channels, 3) for g in groups})

    compact = remove_channels(model, plan, inputs, groups=groups).model

    selects = [module for module in compact.modules() if isinstance(module, ChannelSelect)]
    assert 2 == len(selects)
    for select in selects:
        x = torch.randn(2, select.selection.shape[1], 8, 8)
        assert torch.equal(select(x), select.for_export()(x))
    assert compact.state_dict().keys() == model.state_dict().keys()


def test_rewriting_uses_no_running_statistics_of_a_model_in_training() -> None:
    model = resnet20().train()
    before = model.bn1.running_mean.clone()
    groups = trace_channel_groups(model, torch.randn(4, 3, 16, 16))

    apply_rewrites(model, groups.rewrites, torch.randn(4, 3, 16, 16))

    assert torch.equal(before, model.bn1.running_mean)
    assert model.training


def test_a_plan_with_rewrites_refuses_a_model_without_them() -> None:
    with pytest.raises(PlanError, match=r"rewrites '2.shortcut', expected a parameter-free shortcut.*Make a new plan"):
        apply_rewrites(network(nn.Conv2d(4, 8, 1, stride=2)), ["2.shortcut"], IMAGE)
