"""fp16 files for GPUs: weights and arithmetic in half precision, inputs and outputs and what overflows in float32.

Measured: on ONNX Runtime's CPU, which has no half-precision kernels, such a file is 1.3 (ResNet-50) to 2.4 times
(MobileNetV2) slower than float32. It is meant for CUDA and TensorRT.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from torch import Tensor

from nni_prune_ext.errors import ExportError
from nni_prune_ext.export.int8_layers import NAMED, heavy_nodes, kept_nodes
from nni_prune_ext.export.parent_file import Images, ParentFile, check_images, open_parent
from nni_prune_ext.export.precision_check import DROPS, open_cpu_session
from nni_prune_ext.export.reduced_export import Conversion, ReducedExport, check_out, labelled, write_reduced

LARGEST_FP16: Final = 65504.0
_HEADROOM: Final = 4
"""Other images may give larger activations than those that were looked at."""
_OVERFLOW_PRONE: Final = (
    "Exp", "Pow", "Softmax", "LogSoftmax", "ReduceSum", "ReduceMean", "ReduceSumSquare", "ReduceL2", "ReduceLogSumExp",
    "GlobalAveragePool", "BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization",
)  # fmt: skip
"""They sum or square many values, or divide by small ones."""
ADVICE: Final = (
    "fp16 for CUDA and TensorRT; on the CPU it is slower than float32 (measured 1.3 times on ResNet-50, 2.4 on "
    "MobileNetV2)"
)


def convert_to_fp16(
    path: Path,
    out: Path,
    images: Images | None = None,
    *,
    keep_float: Sequence[str] = (),
    test_batches: Iterable[tuple[Tensor, Tensor]] | None = None,
    max_drop: float | None = DROPS["fp16"],
) -> ReducedExport:
    """Writes the half-precision form of a float32 file, and compares the two on the CPU.

    Inputs and outputs stay float32. So do sums over many values, exponentials and normalisations, and every layer
    whose values come within a factor of 4 of the largest half-precision number, 65504.

    Args:
        path: a file that ``export_onnx`` wrote, of a dense or a pruned network.
        out: where the fp16 file goes; an older file there is replaced only by a complete and checked one.
        images: ``(N, C, H, W)`` float32, normalised, on which values are looked at and the files are compared;
            random ones by default.
        keep_float: name patterns of further layers that stay in float32.
        test_batches: images and labels on which both files are compared instead.
        max_drop: largest loss of accuracy on them that passes, 0–1; ``None`` judges outputs instead.

    Raises:
        ModelError, ExportError: the file is damaged, of another origin, or not float32.
        DataError: images do not fit or are not finite.
        ConfigError: a pattern matches nothing.
        ParityError: the fp16 file loses too much. No file is left.
        OutputError: the file cannot be written.

    Example:
        >>> from tempfile import mkdtemp
        >>> import torch
        >>> from nni_prune_ext.export.onnx_static import export_onnx
        >>> folder, model = Path(mkdtemp()), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
        >>> float_file = export_onnx(model, torch.zeros(1, 3, 2, 2), folder / "m.onnx", exporter="torchscript").path
        >>> convert_to_fp16(float_file, folder / "m.fp16.onnx").parity.passed
        True
    """
    path, out = Path(path), Path(out)
    parent = open_parent(path)
    check_out(parent, out)
    if images is not None:
        check_images(parent, images, fewest=1, what="given")
    named = dict.fromkeys(kept_nodes(parent.proto, keep_float), NAMED)
    kept = {**_too_large(parent, images), **named}
    proto = _converted(parent.proto, list(kept))
    heavy = [node.name for node in heavy_nodes(parent.proto)]
    reduced = tuple(name for name in heavy if name not in kept)
    made = Conversion(proto, "fp16", reduced, {name: kept[name] for name in heavy if name in kept}, ADVICE, {})
    return write_reduced(parent, out, made, labelled(parent, test_batches, images), max_drop)


def _too_large(parent: ParentFile, images: Images | None) -> Mapping[str, str]:
    """Returns the nodes that read, hold or write values near what half precision cannot say, with the largest one."""
    watched = copy.deepcopy(parent.proto)
    outputs = {output.name for output in watched.graph.output}
    inferred = onnx.shape_inference.infer_shapes(watched).graph
    floats = [
        info.name
        for info in inferred.value_info
        if info.type.tensor_type.elem_type == onnx.TensorProto.FLOAT and info.name not in outputs
    ]
    del watched.graph.value_info[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in floats)
    largest: dict[str, float] = {
        tensor.name: float(np.abs(onnx.numpy_helper.to_array(tensor)).max(initial=0))
        for tensor in watched.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    }
    session, names = open_cpu_session(watched.SerializeToString()), [own.name for own in watched.graph.output]
    for batch, _ in labelled(parent, None, images):
        for name, value in zip(names, session.run(None, {parent.input_name: batch}), strict=True):
            largest[name] = max(largest.get(name, 0.0), float(np.abs(np.asarray(value, np.float64)).max(initial=0)))
    found = {}
    for node in parent.proto.graph.node:
        peak = max((largest.get(name, 0.0) for name in (*node.input, *node.output)), default=0.0)
        if peak * _HEADROOM > LARGEST_FP16:
            found[node.name] = f"its values reach {peak:.3g}, and half precision ends at {LARGEST_FP16:g}"
    return found


def _converted(proto: onnx.ModelProto, kept: list[str]) -> onnx.ModelProto:
    """Converts a copy with the converter that comes with ONNX Runtime.

    Raises:
        ExportError: it fails on this graph.
    """
    converter = importlib.import_module("onnxruntime.transformers.float16")  # not at the top: only this needs it
    blocked = [*converter.DEFAULT_OP_BLOCK_LIST, *_OVERFLOW_PRONE]
    try:
        made: onnx.ModelProto = converter.convert_float_to_float16(
            copy.deepcopy(proto), keep_io_types=True, op_block_list=blocked, node_block_list=kept
        )
    except (ValueError, AssertionError, RuntimeError) as error:
        raise ExportError(
            f"The network cannot be converted to fp16: {error}. Expected a graph that ONNX Runtime's converter takes. "
            "Leave layers in float32 with keep_float, or use the float32 file."
        ) from error
    _sort(made.graph)
    _drop_round_trips(made.graph)
    return made


def _sort(graph: onnx.GraphProto) -> None:
    """Puts nodes after those that they read from: the converter adds its casts at the end."""
    waiting, placed = list(graph.node), []
    ready = {"", *(own.name for own in graph.input), *(own.name for own in graph.initializer)}
    while waiting:
        now = [node for node in waiting if ready.issuperset(node.input)]
        assert now, "a graph without cycles"
        placed += now
        ready.update(name for node in now for name in node.output)
        waiting = [node for node in waiting if not any(node is own for own in now)]
    del graph.node[:]
    graph.node.extend(placed)


def _drop_round_trips(graph: onnx.GraphProto) -> None:
    """Lets neighbours in float32 read each other's values: the converter passes them through half precision."""
    halves = {node.output[0]: node.input[0] for node in graph.node if _casts_to(node, onnx.TensorProto.FLOAT16)}
    sources = {
        node.output[0]: halves[node.input[0]]
        for node in graph.node
        if node.input and node.input[0] in halves and _casts_to(node, onnx.TensorProto.FLOAT)
    }
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = sources.get(name, name)
    outputs = {output.name for output in graph.output}
    for node in graph.node:
        if node.output[0] in outputs & sources.keys():  # its name must stay: it now casts nothing
            node.input[0] = sources[node.output[0]]
    read = {name for node in graph.node for name in node.input}
    for index in reversed(range(len(graph.node))):
        name = graph.node[index].output[0]
        if name not in read | outputs and (name in sources or name in halves):
            del graph.node[index]


def _casts_to(node: onnx.NodeProto, kind: int) -> bool:
    return node.op_type == "Cast" and node.attribute[0].i == kind
