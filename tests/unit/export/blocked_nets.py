"""Small networks whose gates open blocks of the size that this machine's blocked layout has."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gated_nets import Net, gated_conv

from nni_prune_ext.runtimes.onnxruntime_blocks import host_block_size

BLOCK = host_block_size() or 16  # tests that run blocked graphs are skipped where there are no blocks


def in_order(blocks: int, size: int = BLOCK) -> tuple[int, ...]:
    return tuple(np.repeat(np.arange(blocks), size).tolist())


def swapped(blocks: int) -> tuple[int, ...]:
    """Whole blocks in another order."""
    return tuple(np.repeat(np.roll(np.arange(blocks), 1), BLOCK).tolist())


def mixed(blocks: int) -> tuple[int, ...]:
    """Filters of one block are apart, as training leaves them."""
    return tuple(np.random.default_rng(blocks).permutation(in_order(blocks)).tolist())


Units = Callable[[int], tuple[int, ...]]


def chain(net: Net, units: Units) -> str:
    x = net.op("Relu", gated_conv(net, "input", 3, units(4)))
    x = net.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    x = net.op("Relu", gated_conv(net, x, 4 * BLOCK, units(5)))
    return net.classify(net.op("Relu", gated_conv(net, x, 5 * BLOCK, units(3), kernel=1)), 3 * BLOCK)


def basic(net: Net, units: Units, stem: int = 0) -> str:
    """Two blocks of a ResNet; the stem is gated, or has channels that fill no block."""
    width = stem or 4 * BLOCK
    x = net.op("Relu", net.conv("input", 3, width) if stem else gated_conv(net, "input", 3, units(4)))
    for inputs, stride in ((width, 1), (4 * BLOCK, 2)):
        inner = net.op("Relu", gated_conv(net, x, inputs, units(5), strides=[stride] * 2))
        outer = gated_conv(net, inner, 5 * BLOCK, units(4))
        shortcut = x
        if stride == 2 or inputs != 4 * BLOCK:
            shortcut = net.op("Conv", x, _filters(net, 4 * BLOCK, inputs), strides=[stride] * 2)
        x = net.op("Relu", net.op("Add", outer, shortcut))
    return net.classify(x, 4 * BLOCK)


def _filters(net: Net, outputs: int, inputs: int) -> str:
    return net.constant(net.random.normal(0, inputs**-0.5, (outputs, inputs, 1, 1)))


def inner_only(net: Net, units: Units) -> str:
    """What most ResNets gate: the second convolution has all of its filters, and the addition goes into it."""
    x = net.op("Relu", net.conv("input", 3, 2 * BLOCK))
    for _ in range(2):
        inner = net.op("Relu", gated_conv(net, x, 2 * BLOCK, units(4)))
        x = net.op("Relu", net.op("Add", x, net.conv(inner, 4 * BLOCK, 2 * BLOCK)))
    return net.classify(x, 2 * BLOCK)


def bottleneck(net: Net, units: Units) -> str:
    x = net.op("MaxPool", net.op("Relu", net.conv("input", 3, 2 * BLOCK)), kernel_shape=[2, 2], strides=[2, 2])
    inner = net.op("Relu", gated_conv(net, x, 2 * BLOCK, units(3), kernel=1))
    inner = net.op("Relu", gated_conv(net, inner, 3 * BLOCK, units(3)))
    outer = gated_conv(net, inner, 3 * BLOCK, units(8), kernel=1)
    x = net.op("Relu", net.op("Add", net.conv(x, 2 * BLOCK, 8 * BLOCK, kernel=1), outer))
    return net.classify(net.op("Relu", gated_conv(net, x, 8 * BLOCK, units(2))), 2 * BLOCK)


def odd_widths(net: Net, units: Units) -> str:
    """Whole convolutions whose widths fill no block, before, between and behind gated ones."""
    x = net.op("Relu", net.conv("input", 3, BLOCK + 4))
    x = net.op("Relu", gated_conv(net, x, BLOCK + 4, units(4)))
    x = net.op("Relu", net.conv(x, 4 * BLOCK, BLOCK + 3))
    x = net.op("Relu", gated_conv(net, x, BLOCK + 3, units(3)))
    x = net.op("Sigmoid", net.conv(x, 3 * BLOCK, 6))
    return net.classify(net.conv(net.op("LeakyRelu", x, alpha=0.1), 6, 5), 5)


def standard_input_of_odd_width(net: Net, units: Units) -> str:
    x = net.op("Transpose", net.conv("input", 3, BLOCK + 1), perm=[0, 1, 3, 2])
    return net.classify(gated_conv(net, gated_conv(net, x, BLOCK + 1, units(3)), 3 * BLOCK, units(2)), 2 * BLOCK)


def standard_shortcut(net: Net, units: Units) -> str:
    shortcut = net.op("Transpose", net.conv("input", 3, 4 * BLOCK), perm=[0, 1, 3, 2])
    return net.classify(net.op("Add", gated_conv(net, "input", 3, units(4)), shortcut), 4 * BLOCK)


def read_twice(net: Net, units: Units) -> str:
    x = net.op("Relu", gated_conv(net, "input", 3, units(4)))
    left, right = gated_conv(net, x, 4 * BLOCK, units(3)), net.conv(x, 4 * BLOCK, 3 * BLOCK, kernel=1)
    total = net.op("Mul", net.op("Add", net.op("Relu", right), left), net.op("Sigmoid", right))
    return net.op("Sum", net.classify(total, 3 * BLOCK), net.classify(x, 4 * BLOCK))


def average_pools(net: Net, units: Units) -> str:
    x = net.op("LeakyRelu", gated_conv(net, "input", 3, units(4), strides=[2, 2]), alpha=0.1)
    x = net.op("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    x = net.op("Clip", gated_conv(net, x, 4 * BLOCK, units(2)), net.constant(-1.0), net.constant(6.0))
    return net.classify(x, 2 * BLOCK)


def background(net: Net, units: Units) -> str:
    """Closed channels hold numbers other than zero."""
    x = net.op("Sigmoid", gated_conv(net, "input", 3, units(4)))
    full = net.conv("input", 3, 4 * BLOCK)
    total = net.op("Sub", net.op("Max", x, full), net.op("Mul", full, full))
    return net.op("Sum", net.classify(total, 4 * BLOCK), net.classify(x, 4 * BLOCK))


def dense_block(net: Net, units: Units) -> str:
    first = net.op("Relu", gated_conv(net, "input", 3, units(2)))
    second = net.op("Concat", "input", first, axis=1)
    second = net.op("Relu", gated_conv(net, second, 3 + 2 * BLOCK, units(3)))
    return net.classify(net.op("Concat", first, second, axis=1), 5 * BLOCK)


def additions(net: Net, units: Units) -> str:
    """A convolution can add to one tensor only."""
    x = net.op("Relu", gated_conv(net, "input", 3, units(3)))
    first, second, third = (net.conv(x, 3 * BLOCK, 2 * BLOCK) for _ in range(3))
    total = net.op("Add", net.op("Add", net.op("Add", first, second), third), first)
    return net.classify(net.op("Add", total, total), 2 * BLOCK)


def squeeze_excite(net: Net, units: Units) -> str:
    x = net.op("HardSwish", gated_conv(net, "input", 3, units(4)))
    squeezed = net.op("Relu", net.conv(net.op("GlobalAveragePool", x), 4 * BLOCK, BLOCK, kernel=1))
    x = net.op("Mul", x, net.op("HardSigmoid", net.conv(squeezed, BLOCK, 4 * BLOCK, kernel=1)))
    x = net.op("Relu", gated_conv(net, x, 4 * BLOCK, units(2), kernel=1))
    for inputs, outputs in ((2 * BLOCK, 2 * BLOCK), (2 * BLOCK, BLOCK + 4)):
        x = net.conv(x, inputs, outputs)
        x = net.op("Mul", net.op("Sigmoid", net.op("GlobalAveragePool", x)), x)
    return net.classify(x, BLOCK + 4)


def flattened_picture(net: Net, units: Units) -> str:
    x = net.op("MaxPool", gated_conv(net, "input", 3, units(3)), kernel_shape=[3, 3], strides=[2, 2])
    x = net.op("MaxPool", gated_conv(net, x, 3 * BLOCK, units(2)), kernel_shape=[2, 2], strides=[2, 2])
    weight = net.constant(net.random.normal(0, 1, (5, 2 * BLOCK)))
    return net.op("Gemm", net.op("Flatten", x), weight, transB=1)


def single_pixel(net: Net, units: Units) -> str:
    x = net.op("MaxPool", gated_conv(net, "input", 3, units(3)), kernel_shape=[7, 7])
    x = net.op("Relu", gated_conv(net, x, 3 * BLOCK, units(2), kernel=1))
    return net.classify(net.conv(x, 2 * BLOCK, BLOCK, kernel=1), BLOCK)


def two_block_sizes(net: Net, units: Units) -> str:
    x = net.op("Relu", gated_conv(net, "input", 3, units(4)))
    x = net.op("Relu", gated_conv(net, x, 4 * BLOCK, in_order(6, BLOCK // 2)))
    return net.classify(net.op("Relu", gated_conv(net, x, 3 * BLOCK, units(3))), 3 * BLOCK)


NETS: dict[str, tuple[Callable[[Net, Units], str], int]] = {
    "chain": (chain, 3),
    "basic": (basic, 5),
    "basic, a stem that fills no block": (lambda net, units: basic(net, units, BLOCK + 8), 4),
    "inner only": (inner_only, 4),
    "bottleneck": (bottleneck, 4),
    "odd widths": (odd_widths, 4),
    "standard input of odd width": (standard_input_of_odd_width, 1),
    "standard shortcut": (standard_shortcut, 1),
    "read twice": (read_twice, 3),
    "average pools": (average_pools, 2),
    "background": (background, 1),
    "dense block": (dense_block, 1),
    "additions": (additions, 4),
    "squeeze and excite": (squeeze_excite, 3),
    "flattened picture": (flattened_picture, 2),
    "single pixel": (single_pixel, 2),
    "two block sizes": (two_block_sizes, 1),
}
"""Name → network, and how many of its convolutions with computed weights run in the blocked layout."""
ORDERS: dict[str, Units] = {"in order": in_order, "blocks swapped": swapped, "filters mixed": mixed}
