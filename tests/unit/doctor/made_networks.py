"""ONNX files and profiles made by hand, so that names, widths and times are known exactly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CPU = "CPUExecutionProvider"
SIZE = 8


def chain(
    path: Path,
    widths: Sequence[int],
    *,
    depthwise: Sequence[int] = (),
    ours: bool = True,
    mean_and_reshape: bool = False,
    identity: bool = False,
    norm_after_relu: bool = False,
    classes: int = 10,
) -> Path:
    """Writes 1×1 convolutions ``conv0``, ``conv1``, …, each with a ReLU, and a linear layer ``fc``.

    Args:
        widths: output channels of each.
        depthwise: numbers of the layers that are depthwise.
        ours: with the metadata of this package.
        mean_and_reshape: pool and flatten as the dynamo exporter writes them.
        identity: an identity on the bias of ``conv1``, as TorchScript leaves on shared ones.
        norm_after_relu: a batch norm that no convolution can take in.
    """
    draws = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: dict[str, np.ndarray] = {}
    value, last = "x", 3
    for index, width in enumerate(widths):
        name = f"conv{index}"
        groups = last if index in depthwise else 1
        weights[f"{name}.weight"] = draws.standard_normal((width, last // groups, 1, 1)).astype(np.float32)
        weights[f"{name}.bias"] = draws.standard_normal(width).astype(np.float32)
        bias = f"{name}.bias"
        if identity and index == 1:
            nodes.append(helper.make_node("Identity", [bias], [f"{bias}.same"], name=f"{name}/Identity"))
            bias += ".same"
        inputs = [value, f"{name}.weight", bias]
        nodes.append(helper.make_node("Conv", inputs, [f"{name}_out"], name=f"{name}/Conv", group=groups))
        nodes.append(helper.make_node("Relu", [f"{name}_out"], [f"{name}_relu"], name=f"{name}/Relu"))
        value, last = f"{name}_relu", width
    if norm_after_relu:
        for kind in ("scale", "bias", "mean", "var"):
            weights[f"bn.{kind}"] = draws.uniform(0.5, 1, last).astype(np.float32)
        inputs = [value, "bn.scale", "bn.bias", "bn.mean", "bn.var"]
        nodes.append(helper.make_node("BatchNormalization", inputs, ["normed"], name="bn/BatchNormalization"))
        value = "normed"
    if mean_and_reshape:
        weights["axes"], weights["shape"] = np.array([2, 3]), np.array([-1, last])
        nodes.append(helper.make_node("ReduceMean", [value, "axes"], ["pooled"], name="pool", keepdims=1))
        nodes.append(helper.make_node("Reshape", ["pooled", "shape"], ["flat"], name="flatten"))
    else:
        nodes.append(helper.make_node("GlobalAveragePool", [value], ["pooled"], name="pool"))
        nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"))
    weights["fc.weight"] = draws.standard_normal((classes, last)).astype(np.float32)
    nodes.append(helper.make_node("Gemm", ["flat", "fc.weight"], ["output"], name="fc/Gemm", transB=1))
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", classes])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    if ours:
        helper.set_model_props(model, {"nni_prune_ext.version": "0"})
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def conv(index: int, ms: float, *, blocked: bool = True, channels: int = 0) -> tuple[str, str, float, int]:
    """Returns the node of a profile for ``conv<index>`` fused with its ReLU."""
    return (
        (f"conv{index}_relu_nchwc", "Conv", ms, channels)
        if blocked
        else (f"conv{index}/Conv", "FusedConv", ms, channels)
    )


def profile(nodes: Sequence[tuple[str, str, float, int]], *, runs: int = 5, provider: str = CPU, noise: float = 0.0):
    """Returns the events of a session: nodes as (name, operator, ms, channels written), the same in every run.

    Args:
        noise: ms that every other run takes longer in each node.
    """
    events: list[dict[str, object]] = [{"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 5}]
    now = 100
    for run in range(runs):
        start = now
        for index, (name, op, ms, channels) in enumerate(nodes):
            duration = round(1000 * (ms + noise * (run % 2)))
            shapes = [{"float": [1, channels, SIZE, SIZE]}] if channels else []
            arguments = {"op_name": op, "provider": provider, "node_index": str(index), "output_type_shape": shapes}
            events.append({"cat": "Node", "name": f"{name}_kernel_time", "ts": now, "dur": duration, "args": arguments})
            now += duration + 1
        events.append({"cat": "Session", "name": "model_run", "ts": start - 1, "dur": now - start + 2})
        now += 50
    return events


def saved(path: Path, events: Sequence[object]) -> Path:
    path.write_text(json.dumps(events))
    return path
