"""Small gated networks as ONNX graphs with markers, written by hand, with random weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[np.float32]
SIZE = 7
PAIRS = (0, 0, 1, 1, 2, 2, 3, 3)
SCATTERED = (1, 0, 1, 2, 0, 2, 1, 0, 2, 0, 1, 2)  # three blocks of four
UNEQUAL = (0, 1, 1, 2, 2, 2, 0, 2)
SIXTEENS = tuple(int(unit) for unit in np.random.default_rng(0).permutation(np.arange(192) // 16))
FOURS_AND_TWO = (0, 1, 0, 0, 2, 1, 0, 1, 2, 1)  # 4, 4 and 2 channels: blocks of two


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
        """Writes the shape of one column, as PyTorch's exporter does for ``ones_like(value[:, :1])``."""
        begin, end = self.constant([0], np.int64), self.constant([1], np.int64)
        return self.op("Shape", self.op("Slice", value, begin, end, end))

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


def flattened_picture(net: Net) -> str:
    x = net.op("Relu", gated_conv(net, "input", 3, SCATTERED))
    x = net.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2])
    weight = net.constant(net.random.normal(0, 1, (5, 12 * 9)))
    return net.op("Gemm", net.op("Flatten", x), weight, transB=1)


def vector_that_grows_axes(net: Net) -> str:
    x = net.op("Flatten", net.op("GlobalAveragePool", gated_conv(net, "input", 3, SCATTERED)))
    x = net.op("Mul", x, net.constant([[[[2.0]]]]))  # (1, 1, N, 12)
    weight = net.constant(net.random.normal(0, 1, (12, 5)))
    return net.op("MatMul", net.op("Reshape", x, net.constant([-1, 12], np.int64)), weight)


def channel_factors(net: Net) -> str:
    x = gated_conv(net, "input", 3, SCATTERED)
    x = net.op("PRelu", x, net.constant(net.random.normal(0, 1, (12, 1, 1))))
    x = net.op("Mul", net.op("Add", x, net.constant(net.random.normal(0, 1, (1, 12, 1, 1)))), x)
    return net.classify(net.conv(x, 12, 4), 4)


def large(net: Net, units: tuple[int, ...] = one_each(192), second: tuple[int, ...] = one_each(192)) -> str:
    x = net.op("MaxPool", "input", kernel_shape=[3, 3], strides=[3, 3])
    x = net.op("Relu", gated_conv(net, x, 3, units))
    return net.classify(net.op("Relu", gated_conv(net, x, len(units), second)), len(second))


def logits_from_a_gated_value(net: Net) -> str:
    first = gated_conv(net, "input", 3, one_each(8))
    logits = net.op("Sub", net.op("Flatten", net.op("GlobalMaxPool", first)), net.constant(1.5))
    return net.classify(net.marker(net.conv(first, 8, 16), logits, (*range(8), *range(8))), 16)


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
    "flattened picture": flattened_picture,
    "vector that grows axes": vector_that_grows_axes,
    "channel factors": channel_factors,
    "large kernels in one pass": large,
    "large kernels of blocks in one pass": lambda net: large(net, SIXTEENS, SIXTEENS),
    "large kernels with blocks of rows": lambda net: large(net, one_each(192), SIXTEENS),
    "large kernels with blocks of columns": lambda net: large(net, SIXTEENS, one_each(192)),
    "logits from a gated value": logits_from_a_gated_value,
    "shared weight": shared_weight,
    "gated output": lambda net: gated_conv(net, "input", 3, SCATTERED),
}
