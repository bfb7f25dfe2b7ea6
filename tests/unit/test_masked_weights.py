"""Weights read through masks, and channels gated where they are read: closed is removed, open is untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import onnxruntime  # type: ignore[import-untyped, unused-ignore]
import pytest
import torch
from torch import Tensor, nn

from nni_prune_ext.certificate import remove_channels, verify_groups
from nni_prune_ext.errors import ConfigError
from nni_prune_ext.export.onnx_static import export_onnx
from nni_prune_ext.graph.channel_groups import ChannelGroups, trace_channel_groups
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.inputs import ExampleInputs, call_model, tensors_in
from nni_prune_ext.masked_weights import (
    Gates,
    Readings,
    channel_offsets,
    gate_consumers,
    gate_norms,
    read_through,
    straight_through,
)
from nni_prune_ext.models.loading import build_model
from nni_prune_ext.plan import plan_from_channels
from nni_prune_ext.testing.method_bench import traces_on
from nni_prune_ext.testing.toy_blocks import Concat, conv, network
from nni_prune_ext.testing.toy_models import ZOO, SharedConv

CHANNELS_MIXED_BY_NORMS = {"group_norm", "patch_merging"}
GATED = [name for name, toy in ZOO.items() if toy.prunable and name not in CHANNELS_MIXED_BY_NORMS]


# -- the gradient of a mask --------------------------------------------------------------------------------------


def test_scores_get_the_gradient_of_the_mask_kept_and_pruned_alike() -> None:
    weight = torch.tensor([2.0, -3.0, 5.0])
    mask, scores = torch.tensor([True, False, True]), torch.zeros(3, requires_grad=True)

    masked = straight_through(weight, mask, scores)
    (masked * torch.tensor([1.0, 10.0, 100.0])).sum().backward()

    assert [2.0, 0.0, 5.0] == masked.tolist()
    assert [2.0, -30.0, 500.0] == scores.grad.tolist()


def test_weights_get_a_gradient_only_where_they_are_kept_and_only_if_they_are_trained() -> None:
    mask, scores = torch.tensor([True, False]), torch.zeros(2)
    weight, frozen = torch.ones(2, requires_grad=True), torch.ones(2)

    straight_through(weight, mask, scores).sum().backward()

    assert [1.0, 0.0] == weight.grad.tolist()
    assert not straight_through(frozen, mask, scores).requires_grad


# -- parameters read through functions ---------------------------------------------------------------------------


class Fails(nn.Module):
    """Reads its weight, then raises if told to."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.fail = nn.Parameter(torch.ones(2)), False

    def forward(self, x: Tensor) -> Tensor:
        if self.fail:
            raise RuntimeError("in forward")
        return self.weight * x


def test_a_module_reads_another_value_while_it_runs_and_everything_else_sees_the_parameter() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    before, seen = copy.deepcopy(model.state_dict()), []
    parameter = model[0].weight

    def reading(weight: Tensor) -> Tensor:
        seen.append(weight is parameter)
        return 0 * weight

    found = read_through(model, {"0.weight": reading})
    assert {"0.weight"} == found.unread
    output = model(torch.ones(1, 3))

    assert set() == found.unread
    assert torch.equal(before["0.bias"], output[0])
    assert [True] == seen
    assert model[0].weight is parameter
    assert ["0.weight", "0.bias"] == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for handle in found.handles:
        handle.remove()
    assert [] == traces_on(model)
    assert torch.equal(nn.functional.linear(torch.ones(1, 3), parameter, before["0.bias"]), model(torch.ones(1, 3)))


def test_a_state_dict_taken_while_a_module_runs_holds_the_parameter() -> None:
    model, found = nn.Sequential(nn.Linear(2, 2)), {}
    read_through(model, {"0.weight": lambda weight: 0 * weight})
    model[0].register_forward_pre_hook(lambda module, _: found.update(module.state_dict()))

    model(torch.ones(1, 2))

    assert torch.equal(model[0].weight, found["weight"])


def test_an_error_in_forward_or_in_a_hook_before_it_leaves_the_parameter() -> None:
    model = Fails()
    read_through(model, {"weight": lambda weight: 5 * weight})
    model.fail = True

    with pytest.raises(RuntimeError, match="in forward"):
        model(torch.ones(2))
    assert [1.0, 1.0] == model.weight.tolist()

    def broken(*_: object) -> None:
        raise RuntimeError("before forward")

    model.fail, handle = False, model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="before forward"):
        model(torch.ones(2))
    assert [1.0, 1.0] == model.weight.tolist()
    handle.remove()
    assert [5.0, 5.0] == model(torch.ones(2)).tolist()


def test_modules_that_share_a_parameter_all_read_it_through_the_function() -> None:
    model, x = SharedConv(), ZOO["shared"].example_inputs()
    halved = copy.deepcopy(model)
    with torch.no_grad():
        halved.conv.weight.mul_(0.5)

    read_through(model, {"conv.weight": lambda weight: 0.5 * weight})

    assert torch.equal(halved(x), model(x))
    assert model.tied.weight is model.conv.weight


def test_a_copy_of_a_model_that_is_read_through_reads_its_own_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    read_through(model, {"0.weight": lambda weight: 2 * weight})

    again = copy.deepcopy(model)
    with torch.no_grad():
        again[0].weight.fill_(1.0)

    assert [4.0, 4.0] == again(torch.ones(1, 2))[0].tolist()
    assert torch.equal(2 * model[0].weight.sum(1), model(torch.ones(1, 2))[0])


class UsesWeightElsewhere(nn.Module):
    """Reads the weight of a layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(nn.functional.linear(x, self.inner.weight))


def test_a_parameter_that_no_module_of_its_own_reads_stays_unread() -> None:
    model = UsesWeightElsewhere()

    found = read_through(model, {"inner.weight": lambda weight: weight, "outer.weight": lambda weight: weight})
    assert {"inner.weight", "outer.weight"} == found.unread
    model(torch.ones(1, 2))

    assert {"inner.weight"} == found.unread


# -- channels gated ----------------------------------------------------------------------------------------------


def half(groups: ChannelGroups) -> Tensor:
    """Returns gates that close a random half of every group, and a 1 behind them."""
    generator = torch.Generator().manual_seed(1)
    gates = []
    for group in groups:
        own = torch.ones(group.num_channels)
        own[torch.randperm(group.num_channels, generator=generator)[: group.num_channels // 2]] = 0
        gates.append(own)
    return torch.cat([*gates, torch.ones(1)])


def gated_and_removed(
    model: nn.Module, x: ExampleInputs, groups: ChannelGroups, gates: Tensor
) -> tuple[nn.Module, nn.Module]:
    """Returns a copy whose consumers read the gates, and one from which the closed channels are removed, certified."""
    first = channel_offsets(groups)
    gone = {g.name: (gates[first[g.name] : first[g.name] + g.num_channels] == 0).numpy() for g in groups}
    removal = remove_channels(model, plan_from_channels(groups, gone), x, groups=groups)
    assert removal.certificate is not None
    assert removal.certificate.exact
    gated = copy.deepcopy(model)
    gate_consumers(gated, groups, lambda: gates)
    return gated, removal.model


def outputs(model: nn.Module, x: ExampleInputs, *, training: bool) -> list[Tensor]:
    torch.manual_seed(0)
    return list(tensors_in(call_model(model.train(training), x)))


def with_statistics(model: nn.Module) -> nn.Module:
    """Gives batch norms statistics and affine parameters as a trained network has them."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5),
                                (module.running_var, 0.5)):  # fmt: skip
                tensor.data.copy_(low + torch.rand(tensor.shape, generator=generator))
    return model


@pytest.fixture(scope="module", params=GATED)
def zoo_case(request: pytest.FixtureRequest) -> tuple[nn.Module, ExampleInputs, ChannelGroups]:
    torch.manual_seed(0)
    toy = ZOO[request.param]
    model, x = with_statistics(toy.build()), toy.example_inputs()
    return model, x, verify_groups(model, x, trace_channel_groups(model, x))


@pytest.mark.parametrize("training", [False, True])
def test_a_closed_channel_is_a_removed_one_on_every_topology(
    zoo_case: tuple[nn.Module, ExampleInputs, ChannelGroups], training: bool
) -> None:
    model, x, groups = zoo_case
    gated, removed = gated_and_removed(model, x, groups, half(groups))

    for expected, found in zip(outputs(removed, x, training=training), outputs(gated, x, training=training)):
        torch.testing.assert_close(expected, found, rtol=1e-5, atol=1e-6)


def test_open_gates_change_nothing_and_removed_handles_leave_nothing(
    zoo_case: tuple[nn.Module, ExampleInputs, ChannelGroups],
) -> None:
    model, x, groups = zoo_case
    gated = copy.deepcopy(model)

    found = gate_consumers(gated, groups, lambda: torch.ones(groups.num_channels + 1))
    assert found.unread

    expected = outputs(model, x, training=False)
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs(gated, x, training=False)))
    assert set() == found.unread
    for handle in found.handles:
        handle.remove()
    assert [] == traces_on(gated)


def test_every_gate_of_a_padded_shortcut_gets_a_gradient() -> None:
    # In evaluation mode the branch beside the shortcut is made silent: what is left passes the shortcut alone.
    toy = ZOO["option_a"]
    torch.manual_seed(0)
    model, x = with_statistics(toy.build()).eval(), toy.example_inputs()
    groups = verify_groups(model, x, trace_channel_groups(model, x))
    nn.init.zeros_(model[1][0].conv1.weight)
    gates = torch.ones(groups.num_channels + 1, requires_grad=True)
    gate_consumers(model, groups, lambda: gates)

    model(x).square().sum().backward()

    assert gates.grad is not None
    stem = groups.groups[0]
    assert "0.0" == stem.name
    assert bool((gates.grad[: stem.num_channels] != 0).any())


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "padded shortcuts": lambda: build_model("resnet20"),
    "inverted residuals, depthwise": lambda: build_model("mobilenet_v2"),
    "dense concatenation": lambda: network(
        nn.Sequential(Concat(nn.Identity(), conv(8, 6)), Concat(nn.Identity(), conv(14, 6))), outputs=20
    ),
    "no norms": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(12 * 64, 16), nn.ReLU(), nn.Linear(16, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_masked_and_removed_and_onnx_are_equal(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = with_statistics(build()).eval(), torch.randn(2, 3, 16, 16)
    images = torch.randn(64, 3, 16, 16)
    groups = verify_groups(model, x, trace_channel_groups(model, x))

    gated, removed = gated_and_removed(model, x, groups, half(groups))
    file = export_onnx(removed, x, tmp_path / "model.onnx", exporter="torchscript")
    with torch.no_grad():
        expected, dense, cut = gated.eval()(images), model(images), removed.eval()(images)
    session = onnxruntime.InferenceSession(str(file.path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})

    scale = float(expected.abs().max())
    assert float((cut - expected).abs().max()) <= 1e-5 * scale
    assert float((torch.from_numpy(found) - expected).abs().max()) <= 1e-4 * scale
    assert float((dense - expected).abs().max()) > 1e-2 * scale


def test_a_network_with_padded_shortcuts_has_one_stream_group_per_stage() -> None:
    model, x = build_model("resnet20"), torch.zeros(2, 3, 16, 16)
    groups = verify_groups(model, x, trace_channel_groups(model, x))

    writers = {group.name: {m.tensor for m in group.by_role(Role.WRITER)} for group in groups}
    streams = {name: {t.split(".")[0] for t in own} for name, own in writers.items() if len(own) > 1}

    assert {"conv1": {"conv1", "layer1"}, "layer2.0.conv2": {"layer2"}, "layer3.0.conv2": {"layer3"}} == streams
    assert [16, 32, 64] == [groups[name].num_channels for name in streams]


# -- where gates get gradients -----------------------------------------------------------------------------------


def gradients(gate: Callable[..., Readings], gates: Tensor) -> Tensor:
    """Returns the gradient of the cross entropy at gates on a chain of convolution, norm and ReLU, in training mode."""
    torch.manual_seed(0)
    model = network(conv(8, 8)).train()
    x, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 4
    groups = trace_channel_groups(model, x)
    own = gates.clone().requires_grad_()
    gate(model, groups, lambda: torch.cat([own, torch.ones(1)]))

    nn.functional.cross_entropy(model(x), labels).backward()

    assert own.grad is not None
    return own.grad


def gate_writers(model: nn.Module, groups: ChannelGroups, gates: Gates) -> Readings:
    """Scales the filters in front of batch norms: the place that is not to be chosen."""
    offsets = channel_offsets(groups)
    readings = {
        f"{g.name}.weight": lambda w, first=offsets[g.name], n=g.num_channels: (
            w * gates()[first : first + n].reshape(-1, 1, 1, 1)
        )
        for g in groups
    }
    return read_through(model, readings)


CLOSED = torch.tensor([True, False] * 12)


def test_closed_and_open_gates_at_consumers_get_gradients_in_training_mode_behind_a_relu() -> None:
    found = gradients(gate_consumers, (~CLOSED).float())

    assert bool((found != 0).all())
    assert float(found[CLOSED].abs().mean()) > 0.1 * float(found[~CLOSED].abs().mean())


def test_a_closed_gate_behind_a_norm_gets_no_gradient_through_a_relu() -> None:
    found = gradients(gate_norms, (~CLOSED).float())

    assert bool((found[CLOSED] == 0).all())
    assert bool((found[~CLOSED] != 0).all())


def test_a_gate_in_front_of_a_batch_norm_gets_next_to_no_gradient() -> None:
    ones = torch.ones(24)

    before, behind = gradients(gate_writers, ones), gradients(gate_consumers, ones)

    assert float(before.abs().max()) < 1e-3 * float(behind.abs().max())


def test_open_gates_get_the_same_gradient_behind_norms_and_at_consumers() -> None:
    ones = torch.ones(24)

    torch.testing.assert_close(gradients(gate_norms, ones), gradients(gate_consumers, ones), rtol=1e-3, atol=1e-6)


def test_gates_behind_norms_are_refused_where_a_group_has_none() -> None:
    model, x = NETWORKS["no norms"](), torch.zeros(2, 3, 16, 16)
    groups = trace_channel_groups(model, x)

    with pytest.raises(ConfigError, match=r"No norm follows the layers of group '0' \(3 such groups\)"):
        gate_norms(model, groups, lambda: torch.ones(groups.num_channels + 1))
    assert [] == traces_on(model)
