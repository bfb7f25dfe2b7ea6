"""The compact form of a gated network in the blocked layout of ONNX Runtime's CPU provider, for one kind of machine.

ONNX Runtime runs convolutions with constant weights in its own layout, blocks of channels ``(C/b, H, W, b)``. A weight
that is computed keeps a convolution out of it; the kernel takes one all the same if the graph already names it. So
this pass writes ``com.microsoft.nchwc`` operators itself: weights are stored in blocks of b × b channels, and open
blocks pick from them. What has no blocked form reads reordered tensors.

The operators are no public contract, and nothing in the graph says how large a block is: read with another size, the
numbers are wrong without an error. Never ship such a graph; see ``ort_specialisation`` for what guards it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from nni_prune_ext.errors import ExportError
from nni_prune_ext.export.blocked_weights import BlockedWeights
from nni_prune_ext.export.graph_index import (
    GraphIndex,
    Shape,
    attribute,
    inferred_shapes,
    names_read,
    opset_of,
    remove_unused,
)
from nni_prune_ext.export.graph_writer import GraphWriter
from nni_prune_ext.export.picked_values import PickedValues

DOMAIN = "com.microsoft.nchwc"
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"})
# What these do to the zeros that fill up the last block harms nobody: it is a finite number that meets a zero weight.
_ELEMENTWISE = frozenset({"Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Selu"})
_OF_TWO = frozenset({"Add", "Mul", "Sub", "Max", "Min"})


@dataclass(frozen=True)
class BlockedForm:
    """A graph with blocked operators.

    Attributes:
        model: for ONNX Runtime's CPU provider on machines with blocks of this size, and nothing else.
        blocked: names of the convolutions with computed weights that run in the blocked layout.
        left: names of those that do not → why.
    """

    model: onnx.ModelProto
    blocked: tuple[str, ...]
    left: Mapping[str, str]


def blocked_form(portable: onnx.ModelProto, block: int) -> BlockedForm:
    """Returns a compact form in blocked layout; the given model is left as it is.

    Args:
        portable: what ``compact_form`` returned, for one image at a time.
        block: channels per block on the machine at hand.

    Raises:
        ExportError: If no convolution with a computed weight can run in this layout, or weights are in a second file.
    """
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in portable.graph.initializer):
        raise ExportError(
            "The weights of the graph are in a second file, expected them in the graph, where they are put in another "
            "order. Use the portable file."
        )
    model = onnx.ModelProto()
    model.CopyFrom(portable)
    rewriter = _BlockedRewriter(model.graph, inferred_shapes(model), opset_of(model), block)
    rewriter.rewrite()
    if not rewriter.blocked:
        reasons = "; ".join(sorted(set(rewriter.left.values()))) or "there is none"
        raise ExportError(
            f"No convolution with a computed weight can run in blocks of {block} channels: {reasons}. Expected the "
            f"compact form of a network whose gates open blocks of {block} filters. Train with block={block}, or use "
            "the portable file."
        )
    del model.graph.value_info[:]
    remove_unused(model.graph)
    model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    onnx.checker.check_model(model)
    return BlockedForm(model, tuple(rewriter.blocked), rewriter.left)


@dataclass(frozen=True)
class _Blocked:
    """A tensor in blocked layout, ``(1, C, H, W)`` by its shape, C a multiple of the block.

    Attributes:
        value: name of the tensor.
        channels: how many channels are real, or None if these are the open ones, all of them real.
        rank: 4, or 3 if the graph's own value has no batch axis.
    """

    value: str
    channels: int | None
    rank: int = 4


class _BlockedRewriter:
    """Rewrites a compact graph in place; values keep their names for the tensor in the standard layout."""

    def __init__(self, graph: onnx.GraphProto, shapes: Mapping[str, Shape], opset: int, block: int) -> None:
        self.blocked: list[str] = []
        self.left: dict[str, str] = {}
        self._graph, self._shapes, self._block = graph, shapes, block
        self._index = GraphIndex(graph)
        self._writer = GraphWriter(graph)
        self._picked = PickedValues(graph, shapes, opset)
        self._weights = BlockedWeights(self._writer, self._picked, block)
        self._tensors: dict[str, _Blocked] = {}
        self._standard: set[str] = {value.name for value in graph.input} | self._index.constants.keys()
        self._fusable: dict[str, onnx.NodeProto] = {}

    def rewrite(self) -> None:
        """Rewrites the graph in place."""
        rules: dict[str, Callable[[onnx.NodeProto], bool]] = {
            "Conv": self._convolution,
            "Relu": self._relu,
            "Add": self._adding,
            "Mul": self._masking,
            "Squeeze": self._batch_axis,
            "Unsqueeze": self._batch_axis,
            "ScatterND": self._scattering,
        }
        for node in self._graph.node:
            rule = rules.get(node.op_type)
            done = not node.domain and (
                (rule is not None and rule(node))
                or (node.op_type in _POOLS and self._pool(node))
                or (node.op_type in _ELEMENTWISE and self._elementwise(node))
                or (node.op_type in _OF_TWO and self._of_two(node))
            )
            if not done:
                for name in names_read(node):
                    self._in_standard_layout(name)
                self._writer.copy(node)
                self._standard.update(node.output)
        for output in self._graph.output:
            self._in_standard_layout(output.name)
        self._writer.finish(self._graph)

    def _convolution(self, node: onnx.NodeProto) -> bool:
        computed = node.input[1] not in self._index.constants
        reason = self._cannot(node)
        if computed and reason:
            self.left[node.name] = reason
        if reason:
            return False
        weight = self._picked.find(node.input[1])
        assert weight is not None, "a convolution without reason against it has a known weight"
        inputs = weight.value.shape[1]
        first = inputs < self._block and node.input[0] not in self._tensors
        columns = None if 1 in weight.indices else inputs
        source = self._in_standard_layout(node.input[0]) if first else self._in_blocks(node.input[0], columns)
        bias = list(node.input[2:3])
        if bias and bias[0] and 0 not in weight.indices:
            bias = [self._weights.bias(bias[0])]
        stored = self._weights.first_weight(node.input[1]) if first else self._weights.weight(node.input[1])
        channels = None if 0 in weight.indices else weight.value.shape[0]
        output = self._output(node.output[0], channels)
        made = onnx.helper.make_node("Conv", [source, stored, *bias], [output], name=node.name, domain=DOMAIN)
        made.attribute.extend(own for own in node.attribute if own.name != "kernel_shape")
        made.attribute.append(onnx.helper.make_attribute("kernel_shape", list(weight.value.shape[2:])))
        self._writer.copy(made)
        self._fusable[node.output[0]] = made
        if computed:
            self.blocked.append(node.name)
        return True

    def _cannot(self, node: onnx.NodeProto) -> str | None:
        """Says why a convolution stays in the standard layout, or None if it does not have to."""
        if attribute(node, "group") not in (None, 1):
            return "the convolution has groups"
        sizes = self._shapes.get(node.output[0], ())
        if len(sizes) != 4 or sizes[2] is None or sizes[3] is None:
            return f"the size of its output is {sizes}, not known"
        weight = self._picked.find(node.input[1])
        if weight is None or weight.value.dtype != np.float32 or not weight.indices.keys() <= {0, 1}:
            return "its weight is computed in another way than by picking filters and input channels"
        for axis, what in enumerate(("filters", "input channels")):
            size = weight.value.shape[axis]
            if axis in weight.indices and size != self._picked.blocks[weight.indices[axis]] * self._block:
                opened = size // self._picked.blocks[weight.indices[axis]]
                return f"its {what} open in blocks of {opened}"
        if any(node.input[2:]) and 0 not in weight.indices and node.input[2] not in self._index.constants:
            return "its bias is computed"
        inputs = weight.value.shape[1]
        if inputs % 4 and inputs >= self._block and node.input[0] not in self._tensors:
            return f"it has {inputs} input channels, and ONNX Runtime reorders multiples of 4 only"
        return None

    def _relu(self, node: onnx.NodeProto) -> bool:
        """Lets the convolution in front of it do the work, where nothing else reads what that gives."""
        conv = self._only_reader(node.input[0])
        if conv is None:
            return False
        conv.attribute.append(onnx.helper.make_attribute("activation", "Relu"))
        conv.output[0] = self._output(node.output[0], self._tensors[node.input[0]].channels)
        return True

    def _adding(self, node: onnx.NodeProto) -> bool:
        """Lets a convolution add to another tensor; it moves behind the calculation of that."""
        if not self._same_tensors(node):
            return False
        for own, other in (tuple(node.input), tuple(reversed(node.input))):
            conv = self._only_reader(own)
            if conv is None or own == other or len(conv.input) > 3:  # it adds to something already
                continue
            self._writer.nodes.remove(conv)
            conv.input.extend([""] * (3 - len(conv.input)))
            conv.input.append(self._tensors[other].value)
            conv.output[0] = self._output(node.output[0], self._tensors[own].channels)
            self._writer.copy(conv)
            self._fusable[node.output[0]] = conv
            return True
        return False

    def _only_reader(self, name: str) -> onnx.NodeProto | None:
        """Returns the convolution, without activation, that writes a value which one node alone reads."""
        conv = self._fusable.get(name)
        return conv if conv is not None and self._index.readers[name] == 1 else None

    def _masking(self, node: onnx.NodeProto) -> bool:
        """Multiplies channels with one number each: a depthwise convolution of one pixel, which is quick."""
        for features, factor in (tuple(node.input), tuple(reversed(node.input))):
            tensor = self._tensors.get(features)
            channels = tensor.channels if tensor is not None and tensor.rank == 4 else None
            if not channels or channels % self._block or self._shapes.get(factor) != (1, channels, 1, 1):
                continue
            shape = self._writer.constant(np.array([channels, 1, 1, 1]), f"blocked/factors_{channels}")
            weight = self._writer.node(
                "Reshape", [self._in_standard_layout(factor), shape], f"{node.output[0]}/factors"
            )
            output = self._output(node.output[0], channels)
            made = onnx.helper.make_node(
                "Conv",
                [self._tensors[features].value, weight],
                [output],
                name=node.name,
                domain=DOMAIN,
                group=channels,
                kernel_shape=[1, 1],
            )
            self._writer.copy(made)
            self._fusable[node.output[0]] = made
            return True
        return False

    def _pool(self, node: onnx.NodeProto) -> bool:
        tensor = self._tensors.get(node.input[0])
        if tensor is None or any(node.output[1:]):
            return False
        self._like(node, [tensor.value], tensor.channels, DOMAIN)
        return True

    def _elementwise(self, node: onnx.NodeProto) -> bool:
        tensor = self._tensors.get(node.input[0])
        if tensor is None or tensor.rank != 4:
            return False
        self._like(node, [tensor.value], tensor.channels, "")
        return True

    def _of_two(self, node: onnx.NodeProto) -> bool:
        if not self._same_tensors(node):
            return False
        self._like(node, [self._tensors[name].value for name in node.input], self._tensors[node.input[0]].channels, "")
        return True

    def _same_tensors(self, node: onnx.NodeProto) -> bool:
        """Says whether a node reads two blocked tensors of one size."""
        if len(node.input) != 2 or not all(name in self._tensors for name in node.input):
            return False
        first, second = (self._shapes.get(name, ()) for name in node.input)
        return len(first) == 4 and first == second

    def _like(self, node: onnx.NodeProto, inputs: list[str], channels: int | None, domain: str) -> None:
        """Writes a node with blocked tensors in place of standard ones."""
        made = onnx.NodeProto()
        made.CopyFrom(node)
        made.domain = domain
        made.input[:] = inputs
        made.output[0] = self._output(node.output[0], channels)
        self._writer.copy(made)

    def _batch_axis(self, node: onnx.NodeProto) -> bool:
        """Takes the batch axis off, or puts it back: the blocked tensor keeps it."""
        tensor, axes = self._tensors.get(node.input[0]), self._index.constant(node.input[1]) if node.input[1:] else None
        if tensor is None or axes is None or axes.tolist() != [0]:
            return False
        self._tensors[node.output[0]] = _Blocked(tensor.value, tensor.channels, 3 if node.op_type == "Squeeze" else 4)
        return True

    def _scattering(self, node: onnx.NodeProto) -> bool:
        """Writes or adds open blocks to a full tensor, block by block, if blocks are where the channels belong."""
        data, index, updates = node.input
        target, source = self._tensors.get(data), self._tensors.get(updates)
        sizes, places = self._shapes.get(data, ()), self._picked.find(index)
        ground = self._index.writers.get(data)
        if target is None and (ground is None or ground.op_type != "ConstantOfShape"):
            return False
        if (
            source is None
            or source.rank != 3
            or len(sizes) != 3
            or None in sizes
            or places is None
            or not sizes[0]
            or sizes[0] % self._block
        ):
            return False
        blocks = self._weights.blocks(index)
        if blocks is None:
            return False
        channels, length = sizes[0], self._block * math.prod(size for size in sizes[1:] if size)
        rows = self._reshape(
            target.value if target else self._in_standard_layout(data), (channels // self._block, length)
        )
        new = self._reshape(source.value, (-1, length))
        reduction = attribute(node, "reduction")
        settings = {"reduction": reduction.decode()} if isinstance(reduction, bytes) else {}
        scattered = self._writer.node("ScatterND", [rows, blocks, new], f"{node.output[0]}/blocks", **settings)
        self._tensors[node.output[0]] = _Blocked(self._reshape(scattered, (1, *sizes)), channels, 3)
        return True

    def _reshape(self, source: str, shape: tuple[int | None, ...]) -> str:
        return self._weights.reshape(source, tuple(int(size or 0) for size in shape), f"{source}/reshaped")

    def _output(self, name: str, channels: int | None) -> str:
        """Returns the name of the blocked tensor of a value; a single pixel is the same in both layouts."""
        same = self._shapes.get(name, ())[2:] == (1, 1) and (channels is None or channels % self._block == 0)
        if same:
            self._standard.add(name)
        output = name if same else self._writer.fresh(f"{name}/blocked")
        self._tensors[name] = _Blocked(output, channels)
        return output

    def _in_blocks(self, name: str, channels: int | None) -> str:
        """Returns the blocked tensor of a ``(1, C, H, W)`` value, and writes it if it is not there."""
        if name not in self._tensors:
            source = self._in_standard_layout(name)
            value = self._writer.node("ReorderInput", [source], f"{name}/blocked", domain=DOMAIN)
            self._tensors[name] = _Blocked(value, channels)
        return self._tensors[name].value

    def _in_standard_layout(self, name: str) -> str:
        """Makes sure that the standard tensor of a value is written, and returns its name, which is the value's."""
        tensor = self._tensors.get(name)
        if tensor is None or name in self._standard:
            return name
        self._standard.add(name)
        whole = name if tensor.rank == 4 else f"{name}/batch"
        if tensor.channels is None:
            height, width = (size or 0 for size in self._shapes[name][-2:])  # they are known, or it had no blocks
            blocks = self._reshape(tensor.value, (-1, height, width, self._block))
            rows = self._writer.node("Transpose", [blocks], f"{name}/rows", perm=[0, 3, 1, 2])
            whole = self._weights.reshape(rows, (1, -1, height, width), whole)
        else:
            whole = self._writer.node("ReorderOutput", [tensor.value], whole, domain=DOMAIN, channels=tensor.channels)
        if tensor.rank == 3:
            axis = self._writer.constant(np.array([0]), "blocked/batch_axis")
            self._writer.node("Squeeze", [whole, axis], name)
        return name
