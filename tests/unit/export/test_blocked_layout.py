"""Graphs in the blocked layout of this machine's ONNX Runtime, against the portable graphs that they come from."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from blocked_nets import BLOCK, NETS, ORDERS, basic, chain, in_order, inner_only
from gated_nets import SIZE, Net, one_each
from gated_nets import chain as chain_of_single_filters
from onnx import TensorProto, numpy_helper

from nni_prune_ext.errors import ExportError
from nni_prune_ext.export.blocked_layout import DOMAIN, BlockedForm, blocked_form
from nni_prune_ext.export.gate_graphs import compact_form, gated_layers
from nni_prune_ext.export.gated_parity import GatedParity, compare_gated_graphs
from nni_prune_ext.runtimes.onnxruntime_blocks import host_block_size

pytestmark = pytest.mark.skipif(host_block_size() is None, reason="this machine has no blocked layout")


def pictures(count: int = 8) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return list(
        (random.uniform(0.2, 2.5, (count, 1, 3, 1, 1)) * random.normal(0, 1, (count, 1, 3, SIZE, SIZE))).astype("f4")
    )


def portable(network: object = chain, units: object = in_order, gathered: list[str] | None = None) -> onnx.ModelProto:
    net = Net()
    return compact_form(net.model(network(net, units)), gathered)


def assert_equal(expected: onnx.ModelProto, form: BlockedForm) -> GatedParity:
    parity = compare_gated_graphs(expected, form.model, pictures(), fail=1e-5)
    assert parity.passed, parity
    assert parity.compared == parity.images
    return parity


def blocked_operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node if node.domain == DOMAIN]


@pytest.mark.parametrize(
    ("name", "order"),
    [*((name, order) for name in NETS for order in ("in order", "filters mixed")), ("basic", "blocks swapped")],
)
def test_the_blocked_form_computes_what_the_portable_one_computes(name: str, order: str) -> None:
    network, expected = NETS[name]
    model = portable(network, ORDERS[order])

    form = blocked_form(model, BLOCK)

    parity = assert_equal(model, form)
    assert 0.1 < parity.firing_rate < 0.95
    assert (expected, len(set(form.blocked))) == (len(form.blocked), len(form.blocked))


def test_masks_run_in_the_blocked_layout_too() -> None:
    for network in (basic, inner_only):
        net = Net()
        names = [layer.name for layer in gated_layers(net.model(network(net, in_order)))]

        for gathered in (names[:1], names[1:2]):
            model = portable(network, gathered=gathered)
            form = blocked_form(model, BLOCK)

            assert_equal(model, form)
            depthwise = [node for node in form.model.graph.node if node.domain == DOMAIN and _group(node) > 1]
            assert len(names) - 1 == len(depthwise)


def _group(node: onnx.NodeProto) -> int:
    return next((own.i for own in node.attribute if own.name == "group"), 1)


def test_a_chain_is_reordered_nowhere() -> None:
    operators = blocked_operators(blocked_form(portable(), BLOCK).model)

    assert ["Conv", "Conv", "Conv", "GlobalAveragePool", "GlobalMaxPool", "GlobalMaxPool", "MaxPool"] == sorted(
        operators
    )


def test_a_residual_stream_is_reordered_nowhere_if_blocks_are_whole() -> None:
    for units in (ORDERS["in order"], ORDERS["blocks swapped"]):
        operators = blocked_operators(blocked_form(portable(basic, units), BLOCK).model)

        assert {"ReorderInput", "ReorderOutput"}.isdisjoint(operators)


def test_activations_and_additions_go_into_convolutions() -> None:
    nodes = blocked_form(portable(inner_only), BLOCK).model.graph.node

    convolutions = [node for node in nodes if node.op_type == "Conv"]
    assert [b"Relu"] * 5 == [own.s for node in convolutions for own in node.attribute if own.name == "activation"]
    assert 2 == sum(len(node.input) == 4 for node in convolutions)
    assert {"Relu", "Add"} & {node.op_type for node in nodes} <= {"Add"}  # places of picked pieces are sums


def test_no_index_of_open_blocks_can_be_empty() -> None:
    model = blocked_form(portable(basic), BLOCK).model

    writers = {node.output[0]: node for node in model.graph.node}
    indices = [node for node in model.graph.node if node.op_type == "NonZero"]
    assert 5 == len(indices)
    for node in indices:
        guarded = writers[node.input[0]]
        assert "Or" == guarded.op_type
        assert {"ArgMax"} == {
            writers[name].op_type
            for equal in (writers[own] for own in guarded.input)
            if equal.op_type == "Equal"
            for name in equal.input
            if name in writers
        }


@pytest.mark.parametrize("shift", [-50.0, 50.0])
def test_one_open_block_and_all_of_them_are_no_special_cases(shift: float) -> None:
    net = Net()
    units = in_order(4)
    model = compact_form(net.model(chain_of_single_filters(net, units, units, shift)))

    parity = assert_equal(model, blocked_form(model, BLOCK))

    assert (0.25 if shift < 0 else 1.0) == parity.firing_rate


def test_the_given_model_is_left_as_it_is() -> None:
    model = portable()
    before = model.SerializeToString(deterministic=True)

    blocked_form(model, BLOCK)

    assert before == model.SerializeToString(deterministic=True)


def test_what_stays_in_the_standard_layout_is_told() -> None:
    form = blocked_form(portable(NETS["two block sizes"][0]), BLOCK)

    assert {f"its filters open in blocks of {BLOCK // 2}", f"its input channels open in blocks of {BLOCK // 2}"} == set(
        form.left.values()
    )


def test_other_blocks_than_the_machines_are_refused() -> None:
    net = Net()
    model = compact_form(net.model(chain_of_single_filters(net, one_each(12), one_each(12))))

    with pytest.raises(ExportError, match=f"blocks of {BLOCK} channels: its filters open in blocks of 1"):
        blocked_form(model, BLOCK)
    with pytest.raises(ExportError, match=f"its filters open in blocks of {BLOCK}"):
        blocked_form(portable(), BLOCK * 2)


def test_a_network_without_computed_weights_is_refused() -> None:
    with pytest.raises(ExportError, match="there is none"):
        blocked_form(portable(gathered=[]), BLOCK)


def test_weights_in_a_second_file_are_refused() -> None:
    model = portable()
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL

    with pytest.raises(ExportError, match="second file"):
        blocked_form(model, BLOCK)


@pytest.mark.parametrize("source", ["Gemm", "NonZero"])
def test_a_weight_that_is_not_only_picked_from_is_left(source: str) -> None:
    """Open filters are multiplied with a number that depends on the image, or on which filters are open."""
    model = portable()
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    place = next(index for index, node in enumerate(nodes) if node.op_type == "Conv")
    numbers = next(node.output[0] for node in nodes if node.op_type == source)
    if source == "NonZero":
        numbers = next(node.output[0] for node in nodes if node.op_type == "Gather" and node.input[0] == numbers)
    inserted = [
        onnx.helper.make_node("Cast", [numbers], ["numbers"], name="numbers", to=TensorProto.FLOAT),
        onnx.helper.make_node("ReduceMean", ["numbers"], ["mean"], name="mean", keepdims=0),
        onnx.helper.make_node("Mul", [nodes[place].input[1], "mean"], ["scaled"], name="scaled"),
    ]
    nodes[place].input[1] = "scaled"
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], *inserted, *nodes[place:]])

    form = blocked_form(model, BLOCK)

    reason = "its weight is computed in another way than by picking filters and input channels"
    assert {nodes[place].name: reason} == form.left
    assert_equal(model, form)


def test_the_probe_says_what_onnx_runtime_writes(tmp_path: object) -> None:
    net = Net()
    dense = net.model(net.classify(net.conv("input", 3, 1), 1))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = f"{tmp_path}/dense.onnx"
    onnxruntime.InferenceSession(dense.SerializeToString(), options, providers=["CPUExecutionProvider"])

    saved = onnx.load(options.optimized_model_filepath).graph

    (conv,) = (node for node in saved.node if node.op_type == "Conv")
    sizes = {tensor.name: numpy_helper.to_array(tensor).shape for tensor in saved.initializer}
    assert host_block_size() == sizes[conv.input[1]][0]


def test_a_computed_bias_of_all_filters_keeps_a_convolution_in_the_standard_layout() -> None:
    model = portable(inner_only)
    constants = {tensor.name for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    second = next(own for own in convolutions if own.input[1] not in constants and own.input[2] in constants)
    nodes = [
        onnx.helper.make_node("ReduceSum", ["input"], ["sum"], name="sum", keepdims=0),
        onnx.helper.make_node("Add", [second.input[2], "sum"], ["bias"], name="bias"),
    ]
    second.input[2] = "bias"
    nodes += [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    name = second.name
    del model.graph.node[:]
    model.graph.node.extend(nodes)

    form = blocked_form(model, BLOCK)

    assert {name: "its bias is computed"} == form.left
    assert_equal(model, form)
