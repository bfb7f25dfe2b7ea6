"""Networks of one layer, to be timed: as ONNX for the runtimes that read it, and as a module for PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from nni_prune_ext.latency.layers import Layer
from nni_prune_ext.runtimes.base import Array, RunnableModel

_OPSET, _IR = 13, 8
"""Old enough for every ONNX Runtime that is supported; the operators have not changed since."""


def micro_model(
    layer: Layer, read: int, written: int, batch: int, path: Path, device: torch.device
) -> tuple[RunnableModel, list[Array]]:
    """Builds a network of this layer alone at two widths, with random weights.

    Args:
        read: channels that it reads.
        written: channels that it writes.
        path: where the ONNX file goes.
        device: where the module goes.

    Returns:
        the network in both forms, and one set of inputs.
    """
    generator = np.random.default_rng(0)
    shape = (batch, read, *layer.size) if layer.kernel else (batch, *layer.size, read)
    x = generator.standard_normal(shape, np.float32)
    weight = 0.1 * generator.standard_normal(_weight_shape(layer, read, written), np.float32)
    onnx.save_model(_graph(layer, weight, written, shape), str(path))
    return RunnableModel(path, _module(layer, weight, read, written).to(device)), [x]


def _weight_shape(layer: Layer, read: int, written: int) -> tuple[int, ...]:
    groups = layer.groups_at(read)
    if layer.transposed:
        return (read, written // groups, *layer.kernel)
    return (written, read // groups, *layer.kernel)


def _graph(layer: Layer, weight: npt.NDArray[np.float32], written: int, shape: tuple[int, ...]) -> onnx.ModelProto:
    stored = {"w": weight if layer.kernel else np.ascontiguousarray(weight.T), "b": np.zeros(written, np.float32)}
    if layer.kernel:
        read = shape[1]
        attributes: dict[str, Any] = {  # as onnx has it
            "kernel_shape": layer.kernel,
            "strides": layer.stride,
            "dilations": layer.dilation,
            "pads": layer.padding,
            "group": layer.groups_at(read),
        }
        if layer.transposed:
            attributes["output_padding"] = layer.extra
        name = "ConvTranspose" if layer.transposed else "Conv"
        nodes = [helper.make_node(name, ["x", "w", "b"], ["y"], **attributes)]
    elif len(shape) == 2:
        nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"])]
    else:
        nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(shape))],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)


def _module(layer: Layer, weight: npt.NDArray[np.float32], read: int, written: int) -> nn.Module:
    """Returns the same layer in PyTorch."""
    with torch.random.fork_rng(devices=[]):  # a new layer draws its weights
        made = _new_layer(layer, read, written)
    with torch.no_grad():
        made.weight.copy_(torch.from_numpy(weight))
    return made


def _new_layer(layer: Layer, read: int, written: int) -> nn.Linear | nn.modules.conv._ConvNd:
    if not layer.kernel:
        return nn.Linear(read, written)
    dims = len(layer.kernel)
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    turned = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    common = {"stride": layer.stride, "groups": layer.groups_at(read), "dilation": layer.dilation}
    if layer.transposed:
        return turned(read, written, layer.kernel, padding=layer.padding[:dims], output_padding=layer.extra, **common)  # type: ignore[arg-type]
    uneven = layer.padding[:dims] != layer.padding[dims:]
    padding = "same" if uneven else layer.padding[:dims]
    return plain(read, written, layer.kernel, padding=padding, **common)  # type: ignore[arg-type]
