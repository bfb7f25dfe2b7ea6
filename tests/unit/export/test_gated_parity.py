"""The comparison of gated files with PyTorch, on a graph that is written by hand and wrong on purpose."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from nni_prune_ext.errors import ConfigError, ExportError
from nni_prune_ext.export.gate_graphs import compact_form, mask_form
from nni_prune_ext.export.gated_parity import AGREEMENT, GatedParity, check_gated_parity
from nni_prune_ext.gates.gated_network import GatedNetwork
from nni_prune_ext.gates.placement import chosen_places, new_gates
from nni_prune_ext.graph.gate_tracing import trace_gate_flow

UNITS = 16
Damage = Callable[[dict[str, np.ndarray]], None]


class Net(nn.Module):
    """Two outputs behind the sum of gated convolutions."""

    def __init__(self, units: int, layers: Sequence[str]) -> None:
        super().__init__()
        self.convs = nn.ModuleDict({layer: nn.Conv2d(3, units, 1) for layer in layers})
        self.head = nn.Linear(units, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = sum(torch.relu(conv(x)).mean((2, 3)) for conv in self.convs.values())
        return self.head(pooled), pooled


def gated(units: int = UNITS, layers: Sequence[str] = ("a",)) -> GatedNetwork:
    torch.manual_seed(0)
    model = Net(units, layers)
    places = chosen_places(trace_gate_flow(model, torch.zeros(1, 3, 2, 2)), ["convs.*"])
    network = GatedNetwork(model, new_gates(places, softmax=False))
    for head in network.gates.all_heads():
        nn.init.normal_(head.weight)
        nn.init.normal_(head.bias)
    return network


def images(count: int = 64) -> Tensor:
    return torch.randn(count, 3, 2, 2, generator=torch.Generator().manual_seed(1))


def graph_of(network: GatedNetwork, damage: Damage = lambda weights: None) -> onnx.ModelProto:
    """Writes the marked graph of the network, with other weights if they are damaged."""
    weights = {f"head.{name}": own.detach().numpy().copy() for name, own in network.model.head.named_parameters()}
    for place, head in zip(network.gates.places, network.gates.all_heads()):
        conv, own = network.model.get_submodule(place.layer), place.layer[-1]
        tensors = {"conv.weight": conv.weight, "conv.bias": conv.bias, "gate.weight": head.weight[:, :-1]}
        for name, tensor in {**tensors, "gate.bias": head.bias}.items():
            weights[f"{own}.{name}"] = tensor.detach().numpy().copy()
    damage(weights)
    units, classes = weights["head.weight"].shape[1], weights["head.bias"].size
    layers = [place.layer[-1] for place in network.gates.places]
    nodes = [node for layer in layers for node in gated_nodes(layer, units)]
    nodes += [
        helper.make_node("Sum", [f"{layer}.pooled" for layer in layers], ["pooled"]),
        helper.make_node("Gemm", ["pooled", "head.weight", "head.bias"], ["output"], transB=1),
    ]
    outputs = [
        helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", classes]),
        helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["N", units]),
    ]
    port = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 2, 2])
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("nni_prune_ext", 1)]
    made = helper.make_graph(nodes, "net", [port], outputs, constants)
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


def gated_nodes(layer: str, units: int) -> list[onnx.NodeProto]:
    """Returns a convolution with its gate, up to the mean of every channel."""

    def own(*names: str) -> list[str]:
        return [f"{layer}.{name}" for name in names]

    marker = helper.make_node("Gate", own("full", "logits"), own("gated"), domain="nni_prune_ext")
    named = helper.make_attribute("name", f"convs.{layer}")
    marker.attribute.extend([named, helper.make_attribute("units", list(range(units)))])
    return [
        helper.make_node("Conv", ["x", *own("conv.weight", "conv.bias")], own("full"), name=layer),
        helper.make_node("GlobalMaxPool", ["x"], own("largest")),
        helper.make_node("Flatten", own("largest"), own("flat")),
        helper.make_node("Gemm", own("flat", "gate.weight", "gate.bias"), own("logits"), transB=1),
        marker,
        helper.make_node("Relu", own("gated"), own("active")),
        helper.make_node("GlobalAveragePool", own("active"), own("mean")),
        helper.make_node("Flatten", own("mean"), own("pooled")),
    ]


def parity(
    network: GatedNetwork, damage: Damage = lambda weights: None, given: Tensor | None = None, fail: float = 1e-4
) -> GatedParity:
    graph = mask_form(graph_of(network, damage))
    return check_gated_parity(network, graph, images() if given is None else given, batch_size=None, fail=fail)


def logits_of(network: GatedNetwork, given: Tensor) -> Tensor:
    """Returns the logits, by hand."""
    head = network.gates.all_heads()[0]
    return (given.amax((2, 3)) @ head.weight[:, :-1].T + head.bias).detach()


def flipping(network: GatedNetwork, count: int) -> tuple[Damage, Tensor]:
    """Returns what opens unit 0 for the ``count`` images that are nearest to opening it, and these images."""
    logits = logits_of(network, images())[:, 0]
    closed = torch.nonzero(logits <= 0).flatten()
    nearest = closed[logits[closed].argsort(descending=True)][: count + 1]
    shift = -float(logits[nearest[count - 1 :]].mean())

    def damage(weights: dict[str, np.ndarray]) -> None:
        weights["a.gate.bias"][0] += shift

    return damage, nearest[:count]


def test_equal_networks_agree_in_every_bit() -> None:
    network = gated()
    opened = logits_of(network, images()) > 0
    assert opened.any(1).all()  # so that no unit is open only because it is the largest

    found = parity(network)

    assert (64, 64 * UNITS, 1.0, 64) == (found.images, found.bits, found.agreement, found.compared)
    assert float(opened.float().mean()) == found.firing_rate
    assert found.max_rel <= 1e-6
    assert found.passed


@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_bit_that_differs_is_counted_and_its_image_is_left_out(count: int) -> None:
    network = gated()
    damage, flipped = flipping(network, count)

    found = parity(network, damage)

    assert 1 - count / (64 * UNITS) == found.agreement
    assert 64 - len(set(flipped.tolist())) == found.compared
    assert found.max_rel <= 1e-6  # the outputs of the flipped images differ by far more
    assert (found.agreement >= AGREEMENT) == found.passed
    assert (count == 1) == found.passed


def test_an_image_is_compared_only_if_the_masks_of_all_layers_agree() -> None:
    network = gated(layers=("a", "b"))
    damage, flipped = flipping(network, 1)

    found = parity(network, damage)

    assert (2 * 64 * UNITS, 63) == (found.bits, found.compared)
    assert 1 - 1 / (2 * 64 * UNITS) == found.agreement
    assert found.max_rel <= 1e-6
    assert 1 == len(flipped)


def test_the_outputs_of_images_with_a_flipped_mask_do_differ() -> None:
    network = gated()
    damage, flipped = flipping(network, 1)
    other = copy.deepcopy(network)
    head = other.gates.all_heads()[0]
    weights = {"a.gate.bias": head.bias.detach().numpy()}
    damage(weights)

    with torch.no_grad():
        one, two = network(images())[0], other(images())[0]

    assert flipped.tolist() == torch.nonzero((one != two).any(1)).flatten().tolist()


def test_nothing_passes_if_no_image_can_be_compared() -> None:
    network = gated(1024)
    with torch.no_grad():
        network.gates.all_heads()[0].bias[0] = -1e4

    def open_one_unit(weights: dict[str, np.ndarray]) -> None:
        weights["a.gate.bias"][0] = 1e4

    found = parity(network, open_one_unit, images(8), fail=float("inf"))

    assert 1 - 1 / 1024 == found.agreement
    assert found.agreement >= AGREEMENT
    assert (0, 0.0) == (found.compared, found.max_rel)
    assert not found.passed


def shift_classes(weights: dict[str, np.ndarray]) -> None:
    weights["head.bias"] += np.float32(0.5)


def test_a_logit_of_zero_is_closed_on_both_sides() -> None:
    network = gated()
    head = network.gates.all_heads()[0]
    with torch.no_grad():
        head.weight[:8] = 0
        head.bias[:8] = 0

    found = parity(network)

    assert 1.0 == found.agreement
    assert (logits_of(network, images()) > 0).float().mean() == pytest.approx(found.firing_rate, abs=0.01)


def into(name: str, value: float) -> Damage:
    def damage(weights: dict[str, np.ndarray]) -> None:
        weights[name].flat[0] = value

    return damage


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["head.bias", "head.weight"])
def test_outputs_that_are_not_finite_fail_whatever_is_allowed(name: str, value: float) -> None:
    found = parity(gated(), into(name, value), fail=1e30)

    assert float("inf") == found.max_rel
    assert not found.passed


def test_outputs_that_are_nan_in_pytorch_too_fail() -> None:
    network = gated()
    with torch.no_grad():
        network.model.head.bias[0] = float("nan")

    found = parity(network)

    assert float("inf") == found.max_rel
    assert not found.passed


def test_an_output_of_another_shape_fails() -> None:
    def keep_one_class(weights: dict[str, np.ndarray]) -> None:
        weights["head.weight"], weights["head.bias"] = weights["head.weight"][:1], weights["head.bias"][:1]

    found = parity(gated(), keep_one_class)

    assert float("inf") == found.max_rel
    assert not found.passed


def test_the_difference_is_relative_to_the_largest_output_and_the_worst_of_all_outputs() -> None:
    network = gated()
    with torch.no_grad():
        output, _ = network(images())
    largest = float(output.abs().max())

    found = parity(network, shift_classes)

    assert 0.5 / largest == pytest.approx(found.max_rel, rel=1e-4)
    assert not found.passed


def test_the_largest_difference_that_is_allowed_passes() -> None:
    worst = parity(gated(), shift_classes).max_rel

    assert parity(gated(), shift_classes, fail=worst).passed
    assert not parity(gated(), shift_classes, fail=worst * 0.999).passed


@pytest.mark.parametrize("size", [None, 1, 5, 64, 100])
def test_the_size_of_the_batches_changes_nothing(size: int | None) -> None:
    network = gated()
    damage, _ = flipping(network, 1)

    found = check_gated_parity(network, mask_form(graph_of(network, damage)), images(), batch_size=size, fail=1e-4)

    assert (64, 63, 1 - 1 / (64 * UNITS)) == (found.images, found.compared, found.agreement)
    assert found.passed


def test_a_compact_form_is_compared_alike() -> None:
    network = gated()
    damage, _ = flipping(network, 1)

    found = check_gated_parity(network, compact_form(graph_of(network, damage)), images(), batch_size=1, fail=1e-4)

    assert (63, 1 - 1 / (64 * UNITS)) == (found.compared, found.agreement)
    assert found.passed


def test_the_report_is_ready_for_json() -> None:
    found = parity(gated())

    assert found.to_dict() == json.loads(json.dumps(found.to_dict()))


def test_the_network_and_the_graph_are_left_as_they_were() -> None:
    network = gated().train()
    network.model.convs["a"].eval()
    graph = mask_form(graph_of(network))
    modes, weights = [module.training for module in network.modules()], copy.deepcopy(network.state_dict())
    content = graph.SerializeToString(deterministic=True)

    check_gated_parity(network, graph, images(), batch_size=None, fail=1e-4)

    assert modes == [module.training for module in network.modules()]
    assert all(torch.equal(weights[name], own) for name, own in network.state_dict().items())
    assert content == graph.SerializeToString(deterministic=True)


def test_a_graph_that_does_not_run_is_an_error_of_ours() -> None:
    with pytest.raises(ExportError, match="does not run"):
        parity(gated(), given=torch.zeros(4, 3, 3, 3))


def test_a_network_that_has_no_gates_left_is_refused() -> None:
    graph, plain = mask_form(graph_of(gated())), gated().without(["convs.a"])

    with pytest.raises(ConfigError, match="no gate left"):
        check_gated_parity(plain, graph, images(), batch_size=None, fail=1e-4)
