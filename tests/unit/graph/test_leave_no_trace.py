"""Tracing, verifying and certifying leave the model, the process and the inputs as they were, also on failure."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.modules import module as module_state
from torch.overrides import _get_current_function_mode_stack

from nni_prune_ext.certificate import certify_plan, remove_channels, verify_groups
from nni_prune_ext.costs import count_costs
from nni_prune_ext.errors import ModelError
from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.plan import plan_from_channels
from nni_prune_ext.surgery import silence_channels
from nni_prune_ext.testing.toy_models import ZOO


class Counting(nn.Module):
    """Changes a buffer and draws random numbers even in evaluation mode; may fail half-way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.head = nn.Conv2d(8, 4, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.fail = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        torch.rand(3)
        y = self.stem(x)
        if self.fail:
            raise ValueError("half-way")
        return self.head(y)


def snapshot(model: nn.Module, inputs: torch.Tensor) -> dict[str, object]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "training": [module.training for module in model.modules()],
        "values": {name: tensor.detach().clone().tolist() for name, tensor in tensors.items()},
        "identity": {name: id(tensor) for name, tensor in tensors.items()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "strides": [tensor.stride() for tensor in tensors.values()],
        "devices": [tensor.device for tensor in tensors.values()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "tensor attributes": [sorted(vars(tensor)) for tensor in [*tensors.values(), inputs]],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "global hooks": (len(module_state._global_forward_hooks), len(module_state._global_forward_pre_hooks)),
        "modes": len(_get_current_function_mode_stack()),
        "random state": torch.get_rng_state().tolist(),
        "inputs": inputs.tolist(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
    }


def half(model: nn.Module, inputs: torch.Tensor):
    groups = trace_channel_groups(model, inputs)
    return plan_from_channels(groups, {g.name: range(g.num_channels // 2) for g in groups}), groups


ACTIONS: dict[str, Callable[[nn.Module, torch.Tensor], object]] = {
    "trace": trace_channel_groups,
    "verify": lambda model, x: verify_groups(model, x, trace_channel_groups(model, x)),
    "certify": lambda model, x: certify_plan(model, half(model, x)[0], x, groups=half(model, x)[1]),
    "remove": lambda model, x: remove_channels(model, half(model, x)[0], x),
    "silence": lambda model, x: silence_channels(model, half(model, x)[0], x)(x),
    "count": count_costs,
}


def model_with_marks(topology: str | None) -> tuple[Counting | nn.Module, torch.Tensor]:
    model = (Counting() if topology is None else ZOO[topology].build()).to(memory_format=torch.channels_last).train()
    inputs = torch.randn(2, 3, 8, 8)
    first, second = list(model.modules())[1:3]
    second.eval()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    first.register_forward_hook(lambda *_: None)
    return model, inputs


@pytest.mark.parametrize("topology", [None, "option_a", "layer_norm", "multihead_attention"])
@pytest.mark.parametrize("action", ACTIONS)
def test_nothing_is_left_behind(action: str, topology: str | None) -> None:
    model, inputs = model_with_marks(topology)
    before = snapshot(model, inputs)

    ACTIONS[action](model, inputs)

    after = snapshot(model, inputs)
    if action in ("silence", "count"):  # the caller's own call draws; counting is one forward pass
        for key in ("random state", "values"):
            before.pop(key), after.pop(key)
    assert before == after


@pytest.mark.parametrize("action", ACTIONS)
def test_nothing_is_left_behind_when_the_forward_pass_fails(action: str) -> None:
    model, inputs = model_with_marks(None)
    model.fail = True
    before = snapshot(model, inputs)

    with pytest.raises(ModelError, match=r"half-way.*Expected inputs"):
        ACTIONS[action](model, inputs)

    after = snapshot(model, inputs)
    if action == "count":
        for key in ("random state", "values"):
            before.pop(key), after.pop(key)
    assert before == after


def test_verifying_a_model_that_fails_after_the_trace_leaves_nothing_behind() -> None:
    model, inputs = model_with_marks(None)
    groups = trace_channel_groups(model, inputs)
    model.fail = True
    before = snapshot(model, inputs)

    with pytest.raises(ModelError, match="half-way"):
        verify_groups(model, inputs, groups)

    assert before == snapshot(model, inputs)


def test_a_second_trace_gives_the_same_groups_although_the_model_keeps_its_features() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            self.last: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = self.first(x)
            return self.second(self.last)

    model, inputs = Keeping(), torch.randn(1, 3, 4, 4)

    fingerprints = {trace_channel_groups(model, inputs).fingerprint for _ in range(3)}

    assert 1 == len(fingerprints)
