"""Which channels hang together and which are protected, one operation at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.certificate import certify_plan, verify_groups
from nni_prune_ext.errors import ModelError, TraceError
from nni_prune_ext.graph.channel_groups import ChannelGroups, trace_channel_groups
from nni_prune_ext.graph.label_book import LabelBook, Role
from nni_prune_ext.plan import plan_from_channels
from nni_prune_ext.testing.toy_blocks import Apply

IMAGE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """A convolution with 8 channels, a function, and a layer that takes what the function returns."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.function = function
        with torch.no_grad():
            found = function(self.first(IMAGE))
        self.last = nn.Conv2d(found.shape[1], 4, 1) if found.dim() == 4 else nn.Linear(found.shape[-1], 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


class Doubling(torch.autograd.Function):
    """An operation with a backward pass of its own."""

    @staticmethod
    def forward(context: object, x: Tensor) -> Tensor:
        return 2 * x


FOLLOWED: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "flip": (8, lambda x: x.flip(1)),
    "repeat": (8, lambda x: x.repeat(1, 2, 1, 1)),
    "repeat_interleave": (8, lambda x: x.repeat_interleave(2, 1)),
    "spatial roll": (8, lambda x: x.roll(1, 3)),
    "spatial slice": (8, lambda x: x[:, :, 1:3, ::2]),
    "unfold to windows": (8, lambda x: x.unfold(2, 2, 2).flatten(2)[:, :, :, None]),
    "functional unfold": (8, lambda x: functional.unfold(x, 2)[:, :, :, None]),
    "pixel_unshuffle": (8, lambda x: functional.pixel_unshuffle(x, 2)),
    "halves multiplied": (4, lambda x: x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :]),
    "stack and flatten": (8, lambda x: torch.stack([x, 2 * x], 2).flatten(1, 2)),
    "maxout": (4, lambda x: x.unflatten(1, (-1, 2)).amax(2)),
    "tokens": (8, lambda x: x.flatten(2).transpose(1, 2)),
    "class token": (8, lambda x: torch.cat([x.flatten(2).transpose(1, 2), x.mean((2, 3))[:, None]], 1)),
    "spatial softmax": (8, lambda x: x.flatten(2).softmax(2).view(x.shape)),
    "spatial variance": (8, lambda x: x.var((2, 3), keepdim=True)),
    "where": (8, lambda x: torch.where(x > 0, x, -x)),
    "out argument": (8, lambda x: torch.add(x, x, out=torch.empty_like(x))),
    "in place": (8, lambda x: x.mul_(2).add_(1).relu_()),
    "reflection": (8, lambda x: functional.pad(x, (1, 1, 1, 1), mode="reflect")),
    "blur": (8, lambda x: x - functional.avg_pool2d(x, 3, 1, 1)),
    "custom function": (8, Doubling.apply),
    "constant of the same shape": (8, lambda x: torch.cat([x, torch.zeros_like(x)], 1)),
    "empty join": (8, lambda x: torch.cat([torch.empty(0), x], 1)),
}

PROTECTED: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "roll": ("picks or shifts", lambda x: x.roll(1, 1)),
    "roll all": ("picks or shifts", lambda x: x.roll(1)),
    "variance of everything": ("reduces over channels", lambda x: x / x.var(False)),
    "softmax": ("runs over channels", lambda x: x.softmax(1)),
    "unequal parts": ("unequal parts", lambda x: torch.cat(x.split([3, 5], 1)[::-1], 1)),
    "uneven part": ("uneven part", lambda x: x[:, 1:]),
    "first channels": ("uneven part", lambda x: x.narrow(1, 0, 3)),
    "every second": ("stride", lambda x: x[:, ::2]),
    "picked": ("by index", lambda x: x[:, [0, 3, 5]]),
    "index_select": ("picks or shifts", lambda x: x.index_select(1, torch.tensor([1, 0]))),
    "triangle": ("'tril'", lambda x: x.permute(0, 2, 3, 1).tril().permute(0, 3, 1, 2)),
    "positions": ("become indices", lambda x: torch.zeros_like(x[:, :1, :1, :1]) + torch.where(x > 0)[1].sum()),
    "renorm": ("'renorm'", lambda x: x.renorm(2, 0, 1.0)),
    "zeros joined": ("without channels", lambda x: torch.cat([x, torch.zeros(2, 8, 4, 4)], 1) + torch.cat([x, x], 1)),
    "constant": ("channels are not followed", lambda x: x + torch.arange(8.0).view(-1, 1, 1)),
    "similarity": ("matrix product", lambda x: x.flatten(2) @ x.flatten(2).transpose(1, 2)),
    "unknown": ("'cdist'", lambda x: torch.cdist(x.flatten(2), x.flatten(2))),
    "cumulative": ("runs over channels", lambda x: x.cumsum(1)),
    "mixed reshape": ("mixes channels", lambda x: x.transpose(1, 2).reshape(2, 8, 4, 4)),
    "norm without scale": ("without its own scale", lambda x: functional.layer_norm(x, x.shape[1:])),
    "written into": ("writes into", lambda x: torch.zeros(2, 8, 4, 4).index_copy_(1, torch.arange(8), x)),
    "neighbours": ("neighbouring", lambda x: functional.local_response_norm(x, 2)),
}


def test_every_position_of_a_chain_has_its_role() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))

    (group,) = trace_channel_groups(model, IMAGE)

    roles = {(m.tensor, m.dim): m.role for m in group.members}
    assert {
        ("0.weight", 0): Role.WRITER,
        ("0.bias", 0): Role.BIAS,
        ("1.weight", 0): Role.NORM,
        ("1.bias", 0): Role.NORM,
        ("1.running_mean", 0): Role.NORM,
        ("1.running_var", 0): Role.NORM,
        ("2.weight", 0): Role.DEPTHWISE,
        ("2.bias", 0): Role.BIAS,
        ("3.weight", 1): Role.CONSUMER,
    } == roles
    assert all(m.index.tolist() == m.channel.tolist() == list(range(8)) for m in group.members)


@pytest.mark.parametrize("name", FOLLOWED)
def test_an_operation_is_followed_and_exact(name: str) -> None:
    channels, function = FOLLOWED[name]
    model = Between(function)

    groups = verify_groups(model, IMAGE, trace_channel_groups(model, IMAGE))

    assert {"first": channels} == {group.name: group.num_channels for group in groups}
    plan = plan_from_channels(groups, {"first": [0, 3]})
    assert certify_plan(model, plan, IMAGE, groups=groups).exact


@pytest.mark.parametrize("name", PROTECTED)
def test_an_operation_that_mixes_channels_protects_them(name: str) -> None:
    words, function = PROTECTED[name]

    groups = trace_channel_groups(Between(function), IMAGE)

    assert 0 == len(groups)
    assert words in {p.root: p.reason for p in groups.protected}["first"]


def test_what_is_hidden_from_the_trace_is_protected_by_verification() -> None:
    hidden = torch.jit.script(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8)))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), hidden, nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))

    groups = verify_groups(model, IMAGE, trace_channel_groups(model, IMAGE))

    assert ["2"] == [group.name for group in groups]


def test_a_norm_over_a_later_dimension_is_silenced_along_it() -> None:
    model = Between(nn.Identity())
    norm = nn.LayerNorm((4, 8))
    model.function = Apply(lambda x, n: n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm)
    groups = trace_channel_groups(model, IMAGE)

    proof = certify_plan(model, plan_from_channels(groups, {"first": [1, 4]}), IMAGE, groups=groups)

    assert [1] == [m.dim for m in groups["first"].members if m.tensor.endswith("parts.0.weight")]
    assert proof.flaw() is None


def test_inputs_without_a_batch_are_followed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1))

    groups = verify_groups(model, IMAGE[0], trace_channel_groups(model, IMAGE[0]))

    assert ["0"] == [group.name for group in groups]


def test_parameters_that_the_forward_pass_never_uses_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    model.register_parameter("spare", nn.Parameter(torch.zeros(3)))

    assert ("spare",) == trace_channel_groups(model, IMAGE).unreached


def test_a_norm_behind_attention_counts_as_used() -> None:
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    groups = trace_channel_groups(nn.Sequential(nn.Linear(3, 8), attention, nn.Linear(8, 2)), torch.randn(2, 5, 3))

    assert () == groups.unreached
    assert ["1.linear1"] == [group.name for group in groups]


def fingerprints(groups: ChannelGroups) -> tuple[str, tuple[str, ...]]:
    return groups.fingerprint, tuple(group.name for group in groups)


def test_batch_size_and_values_do_not_change_the_groups() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))

    one, many = trace_channel_groups(model, IMAGE[:1]), trace_channel_groups(model, torch.zeros(5, 3, 4, 4))

    assert fingerprints(one) == fingerprints(many)


def test_another_width_or_coupling_changes_the_fingerprint() -> None:
    models = [
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)),
        nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)),
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ChannelShuffle(2), nn.Conv2d(8, 4, 1)),
    ]

    assert 3 == len({trace_channel_groups(model, IMAGE).fingerprint for model in models})


def test_errors_say_what_to_do() -> None:
    with pytest.raises(TraceError, match=r"returned dict without a tensor.*Wrap it"):
        trace_channel_groups(Apply(lambda x: {}), IMAGE)
    with pytest.raises(TraceError, match=r"No layer of Apply was seen.*expected.*Pass the plain"):
        trace_channel_groups(Apply(torch.relu), IMAGE)
    with pytest.raises(ModelError, match=r"does not run on the example inputs \(\(2, 5, 4, 4\) float32\).*Expected"):
        trace_channel_groups(nn.Conv2d(3, 4, 1), torch.zeros(2, 5, 4, 4))


def test_merged_labels_have_one_representative_whatever_the_order() -> None:
    book = LabelBook()
    a, b, c = book.new(4), book.new(4), book.new(4)

    book.merge(b, c, "")
    book.merge(a, c[::-1], "")
    book.freeze(b[:1], "first")
    book.freeze(c[:1], "second")

    assert book.find(a).tolist() == book.find(b[::-1]).tolist() == book.find(c[::-1]).tolist()
    assert {int(a[3]): "first"} == book.frozen()
