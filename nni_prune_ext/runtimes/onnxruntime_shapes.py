"""Shapes of all values of an ONNX graph, seen in a run: where they depend on values, inference cannot tell them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import numpy as np
import onnx

from nni_prune_ext.errors import ModelError
from nni_prune_ext.runtimes.onnxruntime_session import load_failures


def seen_shapes(model: onnx.ModelProto, input_shapes: Sequence[Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Runs a graph once on the CPU, on seeded normal numbers; returns value → shape.

    Args:
        model: what is run, as it is, without fusing anything.
        input_shapes: one per input.

    Raises:
        ModelError: it does not run.
    """
    onnxruntime = import_module("onnxruntime")  # not at the top: it is optional
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    known = {port.name for port in shown.graph.output}
    names = [name for node in shown.graph.node for name in node.output if name and name not in known]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    draws = np.random.default_rng(0)
    failures: tuple[type[Exception], ...] = (*load_failures(), ValueError)  # protobuf refuses 2 GB with the last one
    try:
        content = shown.SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        weights = {tensor.name for tensor in model.graph.initializer}
        ports = [port for port in model.graph.input if port.name not in weights]
        feed = {
            port.name: draws.standard_normal(shape).astype(_numpy_type(port))
            for port, shape in zip(ports, input_shapes)
        }
        found = session.run([*known, *names], feed)
    except failures as error:
        raise ModelError(
            f"The ONNX graph does not run on inputs of shapes {[list(shape) for shape in input_shapes]}: {error}. "
            "Expected one that runs on ONNX Runtime's CPU. Export the network again."
        ) from error
    return {name: tuple(np.shape(value)) for name, value in zip([*known, *names], found)}


def _numpy_type(port: onnx.ValueInfoProto) -> np.dtype[np.generic]:
    return onnx.helper.tensor_dtype_to_np_dtype(port.type.tensor_type.elem_type)
