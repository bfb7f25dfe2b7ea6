"""Mask forms and compact forms of small gated networks, against a slow reference that runs the markers themselves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor, nn

from nni_prune_ext.errors import ExportError
from nni_prune_ext.export.gate_graphs import compact_form, gated_layers, mask_form, with_masks
from nni_prune_ext.export.graph_cleaning import strip_traces

Array = npt.NDArray[np.float32]
SIZE = 7
PAIRS = (0, 0, 1, 1, 2, 2, 3, 3)
SCATTERED = (1, 0, 1, 2, 0, 2, 1, 0, 2, 0, 1, 2)  # three blocks of four
UNEQUAL = (0, 1, 1, 2, 2, 2, 0, 2)
SIXTEENS = tuple(int(unit) for unit in np.random.default_rng(0).permutation(np.arange(192) // 16))
FOURS_AND_TWO = (0, 1, 0, 0, 2, 1, 0, 1, 2, 1)  # 4, 4 and 2 channels: blocks of two


class Gate(OpRun):
    """The marker as its definition says it, channel by channel."""

    op_domain = "nni_prune_ext"

    def _run(self, x, logits, name=None, units=None):
        y = np.zeros_like(x)
        for n in range(len(x)):
            largest = next((u for u in range(logits.shape[1]) if logits[n, u] == logits[n].max()), 0)
            for c, unit in enumerate(units):
                if logits[n, unit] > 0 or unit == largest:
                    y[n, c] = x[n, c]
        return (y,)


class Net:
    """A graph under construction, with random weights."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}

    def op(self, op_type: str, *inputs: str, **attributes: object) -> str:
        name = f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: object, dtype: type = np.float32) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = np.asarray(value, dtype)
        return name

    def conv(self, x: str, inputs: int, outputs: int, kernel: int = 3, group: int = 1, **attributes: object) -> str:
        fan_in = inputs // group * kernel * kernel
        weight = self.constant(self.random.normal(0, fan_in**-0.5, (outputs, inputs // group, kernel, kernel)))
        bias = self.constant(self.random.normal(0, 0.5, outputs))
        return self.op("Conv", x, weight, bias, pads=[kernel // 2] * 4, group=group, **attributes)

    def gate(self, conv: str, source: str, inputs: int, units: tuple[int, ...], shift: float = 0.0) -> str:
        """Gates a convolution by the largest values of its input, one virtual input appended."""
        num_units = max(units) + 1
        pooled = self.op("Flatten", self.op("GlobalMaxPool", source), axis=1)
        with_one = self.op("Concat", pooled, self.op("Expand", self.constant(1.0), self._batch_by_one(pooled)), axis=1)
        weight = self.constant(self.random.normal(0, 6, (num_units, inputs + 1)))
        bias = self.constant(np.full(num_units, shift))
        logits = self.op("Gemm", self.op("Softmax", with_one, axis=1), weight, bias, transB=1)
        return self.marker(conv, logits, units)

    def marker(self, features: str, logits: str, units: tuple[int, ...]) -> str:
        number = sum(node.op_type == "Gate" for node in self.nodes)
        node = helper.make_node("Gate", [features, logits], [f"gated_{number}"], domain="nni_prune_ext")
        node.attribute.append(helper.make_attribute("name", f"gate{number}"))
        node.attribute.append(helper.make_attribute("units", units))
        self.nodes.append(node)
        return node.output[0]

    def _batch_by_one(self, value: str) -> str:
        batch = self.op("Shape", value, start=0, end=1)
        return self.op("Concat", batch, self.constant([1], np.int64), axis=0)

    def classify(self, x: str, channels: int) -> str:
        weight = self.constant(self.random.normal(0, channels**-0.5, (5, channels)))
        pooled = self.op("Flatten", self.op("GlobalAveragePool", x))
        return self.op("Gemm", pooled, weight, self.constant(self.random.normal(0, 1, 5)), transB=1)

    def model(self, output: str) -> onnx.ModelProto:
        port = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])
        sizes = ["N", 12, SIZE, SIZE] if output.startswith("gated") else ["N", 5]
        results = [helper.make_tensor_value_info(output, TensorProto.FLOAT, sizes)]
        constants = [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        graph = helper.make_graph(self.nodes, "net", [port], results, constants)
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("nni_prune_ext", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def one_each(channels: int) -> tuple[int, ...]:
    return tuple(range(channels))


def gated_conv(
    net: Net, x: str, inputs: int, units: tuple[int, ...], kernel: int = 3, shift: float = 0.0, **attributes: object
) -> str:
    return net.gate(net.conv(x, inputs, len(units), kernel, **attributes), x, inputs, units, shift)


def chain(net: Net, units: tuple[int, ...] = one_each(12), second: tuple[int, ...] = one_each(10), shift: float = 0.0):
    x = net.op("Relu", gated_conv(net, "input", 3, units, shift=shift))
    x = net.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    x = net.op("Relu", gated_conv(net, x, len(units), second, shift=shift))
    return net.classify(x, len(second))


def residual_before_add(net: Net, units: tuple[int, ...] = one_each(8)) -> str:
    stem = net.op("Relu", net.conv("input", 3, 8))
    inner = net.op("Relu", gated_conv(net, stem, 8, units))
    x = net.op("Relu", net.op("Add", gated_conv(net, inner, 8, units), stem))
    return net.classify(net.op("Relu", gated_conv(net, x, 8, units, kernel=1)), 8)


def both_branches(net: Net) -> str:
    left, right = gated_conv(net, "input", 3, one_each(8)), gated_conv(net, "input", 3, PAIRS)
    return net.classify(net.conv(net.op("Relu", net.op("Add", left, right)), 8, 6), 6)


def silu(net: Net) -> str:
    x = gated_conv(net, "input", 3, one_each(8))
    x = net.op("Mul", x, net.op("Sigmoid", x))
    return net.classify(gated_conv(net, x, 8, PAIRS), 8)


def gelu_in_parts(net: Net) -> str:
    x = gated_conv(net, "input", 3, one_each(8))
    bell = net.op("Add", net.op("Erf", net.op("Div", x, net.constant(2**0.5))), net.constant(1.0))
    x = net.op("Mul", x, net.op("Mul", net.constant(0.5), bell))
    return net.classify(gated_conv(net, x, 8, PAIRS), 8)


def sigmoid_alone(net: Net) -> str:
    x = net.op("Sigmoid", gated_conv(net, "input", 3, one_each(8)))
    return net.classify(gated_conv(net, x, 8, PAIRS), 8)


def depthwise(net: Net) -> str:
    x = net.op("Relu", gated_conv(net, "input", 3, one_each(8), kernel=1))
    x = net.op("Relu", net.gate(net.conv(x, 8, 8, group=8), x, 8, one_each(8)))
    return net.classify(gated_conv(net, x, 8, PAIRS, kernel=1), 8)


def squeeze_excite(net: Net) -> str:
    x = net.op("HardSwish", gated_conv(net, "input", 3, one_each(8)))
    squeezed = net.op("Relu", net.conv(net.op("GlobalAveragePool", x), 8, 4, kernel=1))
    x = net.op("Mul", x, net.op("HardSigmoid", net.conv(squeezed, 4, 8, kernel=1)))
    return net.classify(gated_conv(net, x, 8, PAIRS, kernel=1), 8)


def dense_block(net: Net) -> str:
    first = net.op("Relu", gated_conv(net, "input", 3, one_each(6)))
    second = net.op("Relu", gated_conv(net, net.op("Concat", "input", first, axis=1), 9, PAIRS))
    return net.classify(net.op("Concat", "input", first, second, axis=1), 17)


def read_twice(net: Net) -> str:
    x = net.op("Relu", gated_conv(net, "input", 3, SCATTERED))
    left, right = gated_conv(net, x, 12, PAIRS), net.conv(x, 12, 8, kernel=1)
    return net.classify(net.op("Mul", net.op("Add", left, right), net.op("Sigmoid", right)), 8)


def average_pools(net: Net) -> str:
    x = net.op("LeakyRelu", gated_conv(net, "input", 3, SCATTERED, strides=[2, 2]), alpha=0.1)
    x = net.op("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    x = net.op("Clip", gated_conv(net, x, 12, PAIRS), net.constant(-1.0), net.constant(6.0))
    return net.classify(x, 8)


def reductions(net: Net) -> str:
    x = net.op("Relu", gated_conv(net, "input", 3, SCATTERED))
    axes, weight = net.constant([2, 3], np.int64), net.constant(net.random.normal(0, 1, (5, 12)))
    mean, largest = net.op("ReduceMean", x, axes, keepdims=0), net.op("ReduceMax", x, axes, keepdims=1)
    largest = net.op("Reshape", largest, net.constant([-1, 12], np.int64))
    rows = net.op(
        "ReduceMean", net.op("ReduceMax", x, net.constant([-1], np.int64), keepdims=0), net.constant([2], np.int64)
    )
    across = net.op("ReduceMean", x, net.constant([1], np.int64), keepdims=1)
    mean = net.op("Add", mean, net.op("Flatten", net.op("GlobalMaxPool", across)))
    total = net.op("Add", net.op("Add", mean, largest), net.op("Squeeze", rows, net.constant([2], np.int64)))
    return net.op("Gemm", total, weight, transB=1)


def background(net: Net) -> str:
    """Closed channels hold numbers other than zero."""
    x = net.op("Sigmoid", gated_conv(net, "input", 3, SCATTERED))
    full = net.conv("input", 3, 12)
    total = net.op("Add", net.op("Mul", x, full), net.op("Add", full, x))
    pooled = net.op("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)
    largest = net.op("MaxPool", net.op("Sub", x, net.constant(2.0)), kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    scores = [net.classify(value, 12) for value in (x, pooled, largest, net.op("Mul", total, total))]
    return net.op("Sum", *scores)


def channel_factors(net: Net) -> str:
    x = gated_conv(net, "input", 3, SCATTERED)
    x = net.op("PRelu", x, net.constant(net.random.normal(0, 1, (12, 1, 1))))
    x = net.op("Mul", net.op("Add", x, net.constant(net.random.normal(0, 1, (1, 12, 1, 1)))), x)
    return net.classify(net.conv(x, 12, 4), 4)


def large(net: Net, units: tuple[int, ...] = one_each(192), second: tuple[int, ...] = one_each(192)) -> str:
    x = net.op("MaxPool", "input", kernel_shape=[3, 3], strides=[3, 3])
    x = net.op("Relu", gated_conv(net, x, 3, units))
    return net.classify(net.op("Relu", gated_conv(net, x, len(units), second)), len(second))


def shared_weight(net: Net) -> str:
    stem = net.conv("input", 3, 8)
    conv = net.conv(stem, 8, 8)
    again = net.op("Conv", stem, *net.nodes[-1].input[1:], pads=[1] * 4)
    return net.classify(net.op("Add", net.gate(conv, stem, 8, PAIRS), again), 8)


NETS: dict[str, Callable[[Net], str]] = {
    "chain": chain,
    "blocks of four, not in order": lambda net: chain(net, SCATTERED, SCATTERED),
    "blocks and single channels": lambda net: chain(net, SCATTERED),
    "single channels and blocks": lambda net: chain(net, one_each(12), SCATTERED),
    "units of unequal sizes": lambda net: chain(net, UNEQUAL, UNEQUAL),
    "units of unequal sizes with a common divisor": lambda net: chain(net, FOURS_AND_TWO, FOURS_AND_TWO),
    "units in another order": lambda net: chain(net, (3, 1, 0, 2, 5, 4), (1, 0)),
    "all open": lambda net: chain(net, SCATTERED, shift=50.0),
    "all but one closed": lambda net: chain(net, SCATTERED, shift=-50.0),
    "residual": residual_before_add,
    "residual in blocks": lambda net: residual_before_add(net, PAIRS),
    "both branches": both_branches,
    "silu": silu,
    "gelu in parts": gelu_in_parts,
    "sigmoid alone": sigmoid_alone,
    "depthwise": depthwise,
    "squeeze and excite": squeeze_excite,
    "dense block": dense_block,
    "read twice": read_twice,
    "average pools": average_pools,
    "reductions": reductions,
    "background": background,
    "channel factors": channel_factors,
    "large kernels in one pass": large,
    "large kernels of blocks in one pass": lambda net: large(net, SIXTEENS, SIXTEENS),
    "large kernels with blocks of rows": lambda net: large(net, one_each(192), SIXTEENS),
    "large kernels with blocks of columns": lambda net: large(net, SIXTEENS, one_each(192)),
    "shared weight": shared_weight,
    "gated output": lambda net: gated_conv(net, "input", 3, SCATTERED),
}


@pytest.fixture(params=NETS)
def model(request: pytest.FixtureRequest) -> onnx.ModelProto:
    net = Net()
    return net.model(NETS[request.param](net))


def inputs_of(batch: int, count: int = 1, seed: int = 1) -> list[Array]:
    """Pictures of different brightness, so that heads decide differently."""
    random = np.random.default_rng(seed)
    scales = random.uniform(0.2, 2.5, (count, batch, 3, 1, 1))
    return list((scales * random.normal(0, 1, (count, batch, 3, SIZE, SIZE))).astype(np.float32))


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, pictures: list[Array]) -> list[list[Array]]:
    opened = session(model)
    return [opened.run(None, {"input": picture}) for picture in pictures]


def by_definition(model: onnx.ModelProto, pictures: list[Array]) -> list[Array]:
    reference = ReferenceEvaluator(model, new_ops=[Gate])
    return [reference.run(None, {"input": picture})[0] for picture in pictures]


def assert_close(expected: Array, actual: Array) -> None:
    assert expected.shape == actual.shape
    assert np.abs(expected - actual).max() <= 1e-5 * np.abs(expected).max()


def test_the_mask_form_computes_what_the_markers_say(model: onnx.ModelProto) -> None:
    pictures = inputs_of(batch=3, count=4)

    actual = run(mask_form(model), pictures)

    for expected, (output,) in zip(by_definition(model, pictures), actual):
        assert_close(expected, output)


def test_the_compact_form_computes_what_the_mask_form_computes(model: onnx.ModelProto) -> None:
    pictures = inputs_of(batch=1, count=32)

    actual = run(compact_form(model), pictures)

    for (expected,), (output,) in zip(run(mask_form(model), pictures), actual):
        assert_close(expected, output)


def test_gates_that_are_not_gathered_become_masks(model: onnx.ModelProto) -> None:
    names = [layer.name for layer in gated_layers(model) if layer.can_gather]
    pictures = inputs_of(batch=1, count=4)
    expected = run(mask_form(model), pictures)

    for gathered in ([], names[:1], names[1:]):
        compact = compact_form(model, gathered)

        assert len(gathered) == sum(node.op_type == "NonZero" for node in compact.graph.node)
        for (before,), (after,) in zip(expected, run(compact, pictures)):
            assert_close(before, after)


def test_both_forms_open_the_same_units_and_the_units_change_with_the_input() -> None:
    net = Net()
    model = net.model(chain(net, SCATTERED))
    pictures = inputs_of(batch=1, count=32)

    masked, compact = (run(with_masks(form), pictures) for form in (mask_form(model), compact_form(model)))

    for first, second in zip(masked, compact):
        assert [(1, 3), (1, 10)] == [mask.shape for mask in first[1:]]
        assert all(np.array_equal(*masks) for masks in zip(first[1:], second[1:]))
    for masks in zip(*[outputs[1:] for outputs in masked]):
        assert 0.1 < np.mean(masks) < 0.9
        assert len({mask.tobytes() for mask in masks}) > 2


def test_every_index_of_open_filters_comes_from_a_guarded_mask(model: onnx.ModelProto) -> None:
    compact = compact_form(model)

    writers = {node.output[0]: node for node in compact.graph.node}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in compact.graph.initializer}
    for node in compact.graph.node:
        if node.op_type == "NonZero":
            mask = writers[node.input[0]]
            if mask.op_type == "Gather":  # from units to blocks, of which every unit has one
                units = constants[mask.input[1]]
                mask = writers[mask.input[0]]
                assert set(range(constants[writers[mask.input[1]].input[0]].size)) == set(units.tolist())
            assert "Or" == mask.op_type
            positive, guard = (writers[name] for name in mask.input)
            numbers, largest = guard.input
            assert ("Equal", "ArgMax") == (guard.op_type, writers[largest].op_type)
            assert positive.input[0] == writers[largest].input[0]
            assert np.array_equal(np.arange(constants[numbers].size)[None], constants[numbers])


RUN_WITH_NUMBERS_THAT_ARE_NONE = """
import sys, numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
for value in (0.0, -1e30, np.inf, np.nan):
    outputs = session.run(None, {"input": np.full((1, 3, 7, 7), value, np.float32)})
    print(*[int(mask.sum()) for mask in outputs[1:]])
"""


@pytest.mark.parametrize("units", [one_each(12), one_each(70), SCATTERED, UNEQUAL])
def test_one_unit_stays_open_whatever_the_logits_are(units: tuple[int, ...], tmp_path: Path) -> None:
    net = Net()
    model = net.model(chain(net, units, units, shift=-1.0))
    for tensor in model.graph.initializer:
        if list(tensor.dims[:1]) == [max(units) + 1] and len(tensor.dims) == 2:  # heads that say -1 to everything
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(tuple(tensor.dims), np.float32), tensor.name))
    onnx.save(with_masks(compact_form(model)), tmp_path / "compact.onnx")

    # In a process of its own: ONNX Runtime never returns from a convolution without input channels.
    script = [sys.executable, "-c", RUN_WITH_NUMBERS_THAT_ARE_NONE, str(tmp_path / "compact.onnx")]
    result = subprocess.run(script, capture_output=True, text=True, timeout=60, check=True)

    assert ["1 1"] * 4 == result.stdout.splitlines()


def test_blocks_are_gathered_as_blocks() -> None:
    net = Net()

    compact = compact_form(net.model(chain(net, SCATTERED, SCATTERED)))

    shapes = {tuple(tensor.dims) for tensor in compact.graph.initializer}
    assert (3, 4, 3, 3, 3) in shapes
    assert (3, 4, 12, 3, 3) in shapes


def test_weights_are_stored_once_and_keep_their_names() -> None:
    net = Net()
    model = net.model(chain(net))

    compact = compact_form(model)

    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer if len(tensor.dims) == 4}
    assert weights == {tensor.name: tuple(tensor.dims) for tensor in compact.graph.initializer if len(tensor.dims) == 4}
    assert compact.ByteSize() < model.ByteSize() + 8000


def test_the_given_model_stays_as_it_was(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()

    for form in (mask_form(model), compact_form(model)):
        with_masks(form)

    assert before == model.SerializeToString()


def test_results_import_no_domain_of_their_own(model: onnx.ModelProto) -> None:
    for form in (mask_form(model), compact_form(model)):
        assert [("", 18)] == [(entry.domain, entry.version) for entry in form.opset_import]
        assert model.ir_version == form.ir_version


def test_layers_are_described() -> None:
    net = Net()

    first, second, third = gated_layers(net.model(depthwise(net)))

    assert (8, 8, 1, SIZE, SIZE, (1, 1), 3, True) == (
        first.channels,
        first.units,
        first.block,
        first.height,
        first.width,
        first.kernel,
        first.in_channels,
        first.can_gather,
    )
    assert (False, "the convolution has 8 groups, a number that ONNX fixes") == (second.can_gather, second.reason)
    assert (4, 2) == (third.units, third.block)


def test_a_layer_whose_output_others_read_is_masked_and_says_so() -> None:
    net = Net()
    conv = net.conv("input", 3, 8)
    model = net.model(net.classify(net.op("Add", net.gate(conv, "input", 3, PAIRS), conv), 8))

    (layer,) = gated_layers(model)

    assert (False, "the output of the convolution is read by others than the gate") == (layer.can_gather, layer.reason)
    with pytest.raises(ExportError, match="'gate0' cannot be gathered: the output of the convolution is read"):
        compact_form(model, ["gate0"])


def test_an_unknown_gate_cannot_be_gathered() -> None:
    net = Net()

    with pytest.raises(ExportError, match="'nowhere' cannot be gathered: there is no such gate"):
        compact_form(net.model(chain(net)), ["nowhere"])


def test_units_without_channels_are_refused() -> None:
    net = Net()
    model = net.model(gated_conv(net, "input", 3, (0, 0, 2, 2)))

    with pytest.raises(ExportError, match=r"units of gate 'gate0' are \[0, 2\]"):
        mask_form(model)


def test_logits_for_units_without_channels_are_refused() -> None:
    net = Net()
    pooled = net.op("Flatten", net.op("GlobalMaxPool", "input"))
    model = net.model(net.marker(net.conv("input", 3, 4), pooled, (0, 0, 1, 1)))

    with pytest.raises(ExportError, match=r"'gate0' has 2 units for logits of shape \(None, 3\)"):
        mask_form(model)


def test_a_fixed_batch_of_two_has_no_compact_form() -> None:
    net = Net()
    model = net.model(chain(net))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2

    with pytest.raises(ExportError, match="fixed batch size 2"):
        compact_form(model)


class TorchNet(nn.Module):
    """A gated residual block in PyTorch, which leaves markers when it is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)])
        self.heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(13, 3)])
        self.shortcut = nn.Conv2d(3, 12, 1)
        self.classifier = nn.Linear(12, 5)
        for head in self.heads:
            nn.init.normal_(head.weight, std=6)

    def gated(self, index: int, x: Tensor) -> Tensor:
        pooled = x.amax((2, 3))
        logits = self.heads[index](torch.cat([pooled, torch.ones_like(pooled[:, :1])], 1).softmax(1))
        features = self.convs[index](x)
        if torch.onnx.is_in_onnx_export():
            return torch.onnx.ops.symbolic(
                "nni_prune_ext::Gate",
                (features, logits),
                {"name": f"convs.{index}", "units": list(SCATTERED)},
                dtype=features.dtype,
                shape=features.shape,
                version=1,
            )
        opened = (logits > 0) | nn.functional.one_hot(logits.argmax(1), 3).bool()
        return features * opened[:, list(SCATTERED)][:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.silu(self.gated(0, x))
        return self.classifier(nn.functional.gelu(self.gated(1, inner) + self.shortcut(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def torch_net() -> TorchNet:
    torch.manual_seed(3)
    return TorchNet().eval()


@pytest.fixture(scope="module")
def exported(torch_net: TorchNet) -> onnx.ModelProto:
    program = torch.onnx.export(
        torch_net,
        (torch.randn(2, 3, SIZE, SIZE),),
        input_names=["input"],
        opset_version=18,
        dynamo=True,
        external_data=False,
        dynamic_shapes=({0: "N"},),
        verbose=False,
    )
    strip_traces(program.model_proto)
    return program.model_proto


def test_markers_of_pytorch_survive_the_exporter(exported: onnx.ModelProto) -> None:
    layers = gated_layers(exported)

    assert [("convs.0", 3, 4), ("convs.1", 3, 4)] == [(layer.name, layer.units, layer.block) for layer in layers]
    assert all(layer.can_gather for layer in layers)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_mask_form_agrees_with_pytorch(torch_net: TorchNet, exported: onnx.ModelProto, batch: int) -> None:
    pictures = inputs_of(batch, count=8)

    for picture, (output,) in zip(pictures, run(mask_form(exported), pictures)):
        assert_close(torch_net(torch.from_numpy(picture)).detach().numpy(), output)


def test_a_compact_form_agrees_with_pytorch(torch_net: TorchNet, exported: onnx.ModelProto) -> None:
    pictures = inputs_of(1, count=32)

    compact = compact_form(exported)

    assert 2 == sum(node.op_type == "NonZero" for node in compact.graph.node)
    for picture, (output,) in zip(pictures, run(compact, pictures)):
        assert_close(torch_net(torch.from_numpy(picture)).detach().numpy(), output)
