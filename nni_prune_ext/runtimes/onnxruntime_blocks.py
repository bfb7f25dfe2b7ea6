"""How many channels ONNX Runtime's CPU provider puts into one block of its own layout on this machine."""

from __future__ import annotations

import importlib
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_DOMAIN = "com.microsoft.nchwc"


@cache
def host_block_size() -> int | None:
    """Returns the size of a block, or None if this machine has no blocked layout; the answer is kept for the process.

    16 with AVX-512, 8 or none elsewhere. Nothing says so directly: a convolution with one filter is optimised, saved
    and read back, and its filters have been filled up to one block.
    """
    onnxruntime = importlib.import_module("onnxruntime")  # not at the top: it is heavy
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # a warning that the file fits this machine only, which is the point
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(_one_filter(), options, providers=["CPUExecutionProvider"])
        return _filters_of_blocked_convolution(onnx.load(str(path)).graph)


def _one_filter() -> bytes:
    """Returns a model with one convolution of one filter."""
    weight = numpy_helper.from_array(np.ones((1, 64, 1, 1), np.float32), "weight")
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, 4, 4])
        for name, channels in (("x", 64), ("y", 1))
    ]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "weight"], ["y"])], "probe", ports[:1], ports[1:], [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def _filters_of_blocked_convolution(graph: onnx.GraphProto) -> int | None:
    sizes = {tensor.name: tensor.dims for tensor in graph.initializer}
    blocked = [node for node in graph.node if node.domain == _DOMAIN and node.op_type == "Conv"]
    return int(sizes[blocked[0].input[1]][0]) if blocked else None
