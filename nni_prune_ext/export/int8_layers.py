"""Which layers of a graph compute in INT8 once ONNX Runtime has optimised it, and which are left in float32."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Literal

import onnx

from nni_prune_ext.errors import ConfigError, ExportError
from nni_prune_ext.specs import did_you_mean

HEAVY: Final = frozenset({"Conv", "Gemm", "MatMul"})
"""Operators that hold the arithmetic of a network."""
_INTEGER: Final = frozenset({"QLinearConv", "QGemm", "QLinearMatMul", "MatMulInteger", "DynamicQuantizeMatMul",
                             "MatMulIntegerToFloat"})  # fmt: skip
_FLOAT: Final = HEAVY | {"ConvTranspose", "FusedConv", "FusedGemm", "FusedMatMul"}
NAMED = "named in keep_float"
NOT_FUSED = "ONNX Runtime does not compute it in int8"


def optimised(source: Path | bytes, level: Literal["BASIC", "EXTENDED"]) -> onnx.ModelProto:
    """Returns a graph as ONNX Runtime's CPU optimises it.

    Args:
        level: ``BASIC`` folds BatchNorms and constants and stays within ONNX; ``EXTENDED`` also forms INT8 operators.

    Raises:
        ExportError: ONNX Runtime cannot load it.
    """
    onnxruntime = importlib.import_module("onnxruntime")  # not at the top: only this needs it
    failures = importlib.import_module("nni_prune_ext.export.parity").onnxruntime_errors()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(file)
        content = source if isinstance(source, bytes) else str(source)
        try:
            onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except failures as error:
            raise ExportError(
                f"ONNX Runtime cannot load the network: {error}. Expected operators that its CPU implements. Export "
                "the model again, with another opset if an operator is missing."
            ) from error
        return onnx.load(str(file))


def heavy_nodes(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Returns the convolutions and matrix products of a graph."""
    return [node for node in graph.graph.node if node.op_type in HEAVY]


def kept_nodes(graph: onnx.ModelProto, patterns: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of the Conv, Gemm and MatMul nodes that patterns match, by node or by layer.

    A layer is called as its weight in the file without ``.weight``, or as its node without the operator.

    Raises:
        ConfigError: a pattern matches none.
    """
    names = {node.name: _names_of(node) for node in heavy_nodes(graph)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for own in names.values() for name in own):
            known = sorted(names)
            raise ConfigError(
                f"The pattern '{pattern}' matches no convolution or matrix product of the file, expected one of "
                f"{', '.join(known[:8])}{', …' if len(known) > 8 else ''}.{did_you_mean(pattern, known)} Correct it."
            )
    return tuple(
        node for node, own in names.items() if any(fnmatchcase(name, pattern) for pattern in patterns for name in own)
    )


def int8_layers(proto: onnx.ModelProto, kept: Sequence[str]) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """Returns the layers that compute in INT8, and those that do not, each with the reason.

    Args:
        proto: a quantised graph.
        kept: nodes that were left out on purpose.
    """
    order = {node.name: number for number, node in enumerate(proto.graph.node)}
    nodes = optimised(proto.SerializeToString(), "EXTENDED").graph.node
    nodes = sorted(nodes, key=lambda node: order.get(node.name, len(order)))
    integer = tuple(node.name for node in nodes if node.op_type in _INTEGER)
    left = {node.name: NAMED if node.name in kept else NOT_FUSED for node in nodes if node.op_type in _FLOAT}
    return integer, left


def _names_of(node: onnx.NodeProto) -> tuple[str, ...]:
    weight = node.input[1].removesuffix(".weight") if len(node.input) > 1 else node.name
    return node.name, _layer_of(node.name), weight


def _layer_of(name: str) -> str:
    """Returns PyTorch's name of the layer behind a node.

    dynamo: ``layer1.0.conv1/Conv``. TorchScript repeats the name of a list in those of its items:
    ``/layer1/layer1.0/conv1/Conv``.
    """
    parts: list[str] = []
    for scope in name.strip("/").split("/")[:-1]:
        if parts and scope.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(scope)
    return ".".join(parts)
