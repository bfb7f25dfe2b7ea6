"""What a cut keeps of the model, and what follows a cut: optimizers and state dicts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.models.loading import build_model
from nni_prune_ext.plan import plan_from_channels
from nni_prune_ext.surgery import Removal, cut_channels, remap_optimizer, silence_channels, slice_state, take_over
from nni_prune_ext.testing.toy_models import ZOO


def cut(model: nn.Module, inputs: object) -> Removal:
    groups = trace_channel_groups(model, inputs)
    plan = plan_from_channels(groups, {g.name: range(0, g.num_channels - 1, 2) for g in groups if g.num_channels > 1})
    return cut_channels(model, plan, inputs, groups=groups)


def residual() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return ZOO["residual"].build(), ZOO["residual"].example_inputs()


def test_a_chain_is_cut_as_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    inputs = torch.randn(1, 3, 5, 5)
    groups = trace_channel_groups(model, inputs)

    compact = cut_channels(model, plan_from_channels(groups, {"0": [1]}), inputs, groups=groups).model

    keep = [0, 2, 3]
    assert torch.equal(model[0].weight[keep], compact[0].weight)
    assert torch.equal(model[0].bias[keep], compact[0].bias)
    assert torch.equal(model[3].weight[:, keep], compact[3].weight)
    assert torch.equal(model[3].bias, compact[3].bias)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(model[1], name)[keep], getattr(compact[1], name))
    assert (3, 3, 3) == (compact[0].out_channels, compact[1].num_features, compact[3].in_channels)


def test_requires_grad_dtype_layout_and_modes_stay() -> None:
    model, inputs = residual()
    model = model.to(torch.bfloat16).to(memory_format=torch.channels_last).train()
    model[0].eval()
    model[0][0].weight.requires_grad_(False)

    compact = cut(model, inputs.bfloat16()).model

    assert [m.training for m in model.modules()] == [m.training for m in compact.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in compact.parameters()]
    assert {torch.bfloat16} == {p.dtype for p in compact.parameters()}
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in compact.parameters() if p.dim() == 4)
    assert not compact[1][0].body[0].weight.is_contiguous()


def test_the_model_given_and_the_compact_one_share_no_memory() -> None:
    model, inputs = residual()
    before = copy.deepcopy(model.state_dict())

    removal = cut(model, inputs)
    with torch.no_grad():
        for tensor in [*removal.model.parameters(), *removal.model.buffers()]:
            tensor.fill_(7)

    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_tied_weights_stay_tied_and_all_their_layers_know_their_size() -> None:
    torch.manual_seed(0)
    model, inputs = ZOO["shared"].build(), ZOO["shared"].example_inputs()

    compact = cut(model, inputs).model

    assert compact.tied.weight is compact.conv.weight
    assert (4, 4) == (compact.tied.out_channels, compact.tied.in_channels)


@pytest.mark.parametrize("name", sorted(ZOO.keys() - {"fused_attention"}))  # its stream is free only in the trace
def test_size_attributes_agree_with_the_tensors(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = ZOO[name].build(), ZOO[name].example_inputs()

    compact = cut(model, inputs).model

    for module in compact.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            expected = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
            assert expected == tuple(module.weight.shape)
        elif isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
            assert (module.in_channels, module.out_channels // module.groups) == tuple(module.weight.shape[:2])
        elif isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)
        elif isinstance(module, nn.LayerNorm):
            assert module.normalized_shape == tuple(module.weight.shape)
        elif isinstance(module, nn.GroupNorm):
            assert (module.num_channels,) == tuple(module.weight.shape)


@pytest.mark.parametrize("kind", ["momentum", "adam", "amsgrad"])
def test_a_step_after_the_remap_equals_the_step_of_a_hand_sliced_optimizer(kind: str) -> None:
    model, inputs = residual()
    make = {
        "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
        "adam": lambda ps: torch.optim.AdamW(ps, lr=0.1),
        "amsgrad": lambda ps: torch.optim.Adam(ps, lr=0.1, amsgrad=True),
    }[kind]
    optimizer = make(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
    removal = cut(model, inputs)
    by_hand_model = copy.deepcopy(removal.model)
    by_hand = make(by_hand_model.parameters())
    for (name, new), old in zip(by_hand_model.named_parameters(), model.parameters(), strict=True):
        for key, value in optimizer.state[old].items():
            for dim, index in removal.kept.get(name, {}).items():
                value = value.index_select(dim, index) if value.dim() else value
            by_hand.state[new][key] = value.clone()

    remap_optimizer(optimizer, model, removal)
    for target, stepper in ((removal.model, optimizer), (by_hand_model, by_hand)):
        stepper.zero_grad()
        target(inputs).square().sum().backward()
        stepper.step()

    assert all(map(torch.equal, by_hand_model.state_dict().values(), removal.model.state_dict().values()))
    assert {id(p) for p in removal.model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    assert len(optimizer.state) == len(list(removal.model.parameters()))


def test_parameters_of_other_models_stay_in_the_optimizer() -> None:
    model, inputs = residual()
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)

    remap_optimizer(optimizer, model, cut(model, inputs))

    assert list(other.parameters()) == optimizer.param_groups[0]["params"][-2:]


def test_a_state_dict_of_the_original_is_cut_like_the_model() -> None:
    model, inputs = residual()
    removal = cut(model, inputs)

    average = slice_state(model.state_dict(), removal.kept)

    expected = removal.model.state_dict()
    assert expected.keys() == average.keys()
    assert all(torch.equal(expected[key], average[key]) for key in expected)


def test_a_copy_of_a_silenced_model_uses_its_own_weights() -> None:
    torch.manual_seed(0)
    model, inputs = ZOO["layer_norm"].build().eval(), ZOO["layer_norm"].example_inputs()
    groups = trace_channel_groups(model, inputs)
    plan = plan_from_channels(groups, {"0.0": [1, 2]})
    silenced = silence_channels(model, plan, inputs, groups=groups)
    expected = silenced(inputs)

    duplicate = copy.deepcopy(silenced)
    with torch.no_grad():
        for parameter in silenced.parameters():
            parameter.zero_()

    assert torch.equal(expected, duplicate(inputs))
    assert not torch.equal(expected, silenced(inputs))


def test_a_model_that_takes_over_the_compact_one_keeps_the_objects_of_its_modules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 4, 1)))
    x = torch.randn(2, 3, 8, 8)
    groups = trace_channel_groups(model, x)
    plan = plan_from_channels(groups, {"0": [1, 5]})
    compact = cut_channels(model, plan, x, groups=groups).model
    expected, modules = compact.eval()(x), dict(model.named_modules())

    take_over(model, compact)

    assert all(module is modules[name] for name, module in model.named_modules())
    assert torch.equal(expected, model(x))
    assert (6, 6, False) == (model[0].out_channels, model[1].num_features, model.training)


def test_a_layer_that_a_rewrite_has_put_in_is_taken_over_with_its_parent() -> None:
    torch.manual_seed(0)
    model = build_model("resnet20").eval()
    x = torch.randn(2, 3, 32, 32)
    groups = trace_channel_groups(model, x)
    assert groups.rewrites
    plan = plan_from_channels(groups, {next(iter(groups)).name: [0, 3]})
    compact = cut_channels(model, plan, x, groups=groups).model
    stem = model.conv1

    take_over(model, compact)

    assert model.conv1 is stem
    assert torch.equal(compact(x), model(x))


class WithAttributes(nn.Module):
    """A module that refers to its layers and parameters in more ways than one, and to what is none of its own."""

    def __init__(self, config: dict[str, object]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.config, self.calls = config, [0]
        self.layers, self.weights = [self.first, self.last], {"first": self.first.weight}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls[0] += 1
        return self.layers[1](self.layers[0](x).relu())

    def count(self, *_: object) -> None:
        self.calls[0] += 10


def cut_in_place(model: nn.Module, x: torch.Tensor) -> None:
    groups = trace_channel_groups(model, x)
    take_over(model, cut_channels(model, plan_from_channels(groups, {"first": [1, 5]}), x, groups=groups).model)


def test_hooks_on_a_model_that_takes_over_a_compact_one_go_on_counting_and_can_be_removed() -> None:
    model, x, seen = WithAttributes({}), torch.randn(2, 3, 4, 4), []

    class Recorder:
        def record(self, *_: object) -> None:
            seen.append(self)

    recorder = Recorder()
    handles = [
        model.first.register_forward_hook(recorder.record),
        model.first.register_forward_pre_hook(recorder.record),
        model.last.register_full_backward_hook(recorder.record),
        model.register_state_dict_pre_hook(recorder.record),
    ]
    cut_in_place(model, x)

    seen.clear()
    model(x).sum().backward()
    model.state_dict()
    assert [recorder] * 4 == seen
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    model.state_dict()
    assert 4 == len(seen)


def test_attributes_of_a_model_that_takes_over_a_compact_one_stay_the_same_objects() -> None:
    config, x = {"lr": 0.1}, torch.randn(2, 3, 4, 4)
    model = WithAttributes(config)
    model.cached = model.first(x)
    layers, calls, cached = model.layers, model.calls, model.cached

    cut_in_place(model, x)

    assert model.config is config
    assert model.calls is calls
    assert model.layers is layers
    assert model.cached is cached
    assert model.layers[0] is model.first


def test_attributes_that_hold_parameters_hold_those_of_the_compact_model_after_a_takeover() -> None:
    model, x = WithAttributes({}), torch.randn(2, 3, 4, 4)
    vars(model)["direct"] = model.first.weight
    model.last.of_another = model.weights

    cut_in_place(model, x)

    assert model.weights["first"] is model.first.weight
    assert model.direct is model.first.weight
    assert model.last.of_another is model.weights
    assert (6, 3, 1, 1) == model.weights["first"].shape
    assert (2, 2, 4, 4) == model(x).shape


def test_a_bound_forward_runs_the_module_itself_after_a_takeover() -> None:
    model, x = WithAttributes({}), torch.randn(2, 3, 4, 4)
    model.first.forward = model.first.forward
    forward = model.first.forward

    cut_in_place(model, x)

    assert model.first.forward is forward
    assert 6 == model(x).shape[1] + 4


def test_a_list_of_layers_follows_a_layer_that_a_rewrite_has_put_in() -> None:
    torch.manual_seed(0)
    model, x = build_model("resnet20").eval(), torch.randn(2, 3, 32, 32)
    block = next(m for m in model.modules() if type(getattr(m, "shortcut", None)).__name__ == "PadShortcut")
    block.parts = [block.shortcut]
    groups = trace_channel_groups(model, x)
    plan = plan_from_channels(groups, {next(iter(groups)).name: [0, 3]})

    take_over(model, cut_channels(model, plan, x, groups=groups).model)

    assert type(block.shortcut).__name__ != "PadShortcut"
    assert block.parts[0] is block.shortcut
