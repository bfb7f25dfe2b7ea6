"""What the trace refuses, protects or reports where a model hides something from it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.certificate import verify_groups
from nni_prune_ext.errors import TraceError
from nni_prune_ext.graph import tracing
from nni_prune_ext.graph.channel_groups import ChannelGroups, trace_channel_groups
from nni_prune_ext.testing.toy_blocks import Apply

IMAGE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    """Two convolutions whose forward is given."""

    def __init__(self, forward: Callable[[Pair, Tensor], object]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.calls, self.kept = 0, [0]
        self.compute = forward

    def forward(self, x: Tensor) -> object:
        return self.compute(self, x)


def reasons(groups: ChannelGroups) -> dict[str, str]:
    return {protected.root: protected.reason for protected in groups.protected}


@pytest.mark.parametrize("wrap", [lambda h: SimpleNamespace(h=h), lambda h: {h}, lambda h: h.numpy()])
def test_an_output_that_may_hide_tensors_is_refused(wrap: Callable[[Tensor], object]) -> None:
    def forward(m: Pair, x: Tensor) -> object:
        h = m.first(x)
        return m.last(h), {"hidden": wrap(h)}

    with pytest.raises(TraceError, match=r"returned a (SimpleNamespace|set|ndarray).*expected.*Wrap"):
        trace_channel_groups(Pair(forward), IMAGE)


def test_plain_values_beside_the_outputs_are_fine() -> None:
    model = Pair(lambda m, x: (m.last(m.first(x)), None, 1, 2.0, "a", True, torch.float32, x.shape))

    assert ["first"] == [group.name for group in trace_channel_groups(model, IMAGE)]


@pytest.mark.parametrize("before", [True, False])
def test_a_reading_weight_that_is_used_elsewhere_protects_what_it_reads(before: bool) -> None:
    def forward(m: Pair, x: Tensor) -> Tensor:
        scale = m.last.weight.norm(dim=1).view(-1, 1, 1) if before else None
        y = m.last(m.first(x))
        return y / (m.last.weight.norm(dim=1).view(-1, 1, 1) if scale is None else scale)

    groups = trace_channel_groups(Pair(forward), IMAGE)

    assert 0 == len(groups)
    assert "'last.weight' is also used by 'norm' in" in reasons(groups)["first"]


KEYWORDS: dict[str, Callable[[Tensor], Tensor]] = {
    "pixel_shuffle": lambda x: functional.pixel_shuffle(input=x, upscale_factor=2),
    "channel_shuffle": lambda x: functional.channel_shuffle(input=x, groups=2),
    "glu": lambda x: functional.glu(input=x, dim=1),
    "cat": lambda x: torch.cat(tensors=[x, x], dim=1),
    "stack": lambda x: torch.stack(tensors=[x, x], dim=2).flatten(1, 2),
    "roll": lambda x: torch.roll(input=x, shifts=1, dims=2),
    "relu": lambda x: functional.relu(input=x),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_operands_may_be_given_by_keyword(name: str) -> None:
    width = KEYWORDS[name](torch.zeros(1, 8, 4, 4)).shape[1]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Apply(KEYWORDS[name]), nn.Conv2d(width, 4, 1))

    assert ["0"] == [group.name for group in verify_groups(model, IMAGE, trace_channel_groups(model, IMAGE))]


def test_a_rule_that_fails_is_not_blamed_on_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("input")

    monkeypatch.setitem(tracing.RULES, "glu", broken)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GLU(1), nn.Conv2d(4, 4, 1))

    with pytest.raises(TraceError, match=r"'glu' in '1'.*KeyError.*[Rr]eport"):
        trace_channel_groups(model, IMAGE)


def test_plain_attributes_that_the_forward_pass_changes_stay_as_they_were() -> None:
    def forward(m: Pair, x: Tensor) -> object:
        m.calls += 1
        m.kept.append(m.calls)
        return m.last(m.first(x))

    model = Pair(forward)
    groups = trace_channel_groups(model, IMAGE)
    verify_groups(model, IMAGE, groups)

    assert (0, [0]) == (model.calls, model.kept)


BRANCHES: dict[str, Callable[[Pair, Tensor], object]] = {
    "__bool__": lambda m, h: bool(h.mean() > 0),
    "item": lambda m, h: h.sum().item(),
    "__float__": lambda m, h: float(h.amax()),
    "__int__": lambda m, h: int(h.amax()),
    "__index__": lambda m, h: range(3)[h.argmax().clamp(max=1)],
    "tolist": lambda m, h: h[0, 0].tolist(),
    "numpy": lambda m, h: h.detach().numpy(),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_values_that_leave_the_tensors_are_reported(name: str) -> None:
    def forward(m: Pair, x: Tensor) -> object:
        h = m.first(x)
        BRANCHES[name](m, h)
        return m.last(h)

    groups = trace_channel_groups(Pair(forward), IMAGE)

    assert (f"'{name}' in the model's own forward",) == groups.value_dependent


def test_values_of_constants_are_not_reported() -> None:
    def forward(m: Pair, x: Tensor) -> object:
        rate = torch.linspace(0, 1, 3)[1].item()
        return m.last(m.first(x) * rate)

    assert () == trace_channel_groups(Pair(forward), IMAGE).value_dependent


def test_compiled_modules_are_refused_before_they_run() -> None:
    inner = nn.Sequential(nn.Conv2d(3, 8, 1), torch.compile(nn.Conv2d(8, 4, 1)))

    with pytest.raises(TraceError, match=r"'1' is compiled.*expected.*original"):
        trace_channel_groups(inner, IMAGE)
    with pytest.raises(TraceError, match=r"The model is compiled"):
        trace_channel_groups(torch.compile(nn.Conv2d(3, 8, 1)), IMAGE)


def test_parameters_without_data_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, device="meta"))

    with pytest.raises(TraceError, match=r"'1.weight' is on the meta device.*expected.*to_empty"):
        trace_channel_groups(model, IMAGE)
