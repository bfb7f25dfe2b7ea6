"""INT8 files for ONNX Runtime's CPU: a clean float32 file is quantised, calibrated on real images, and compared.

Activations are U8, weights S8 with one scale per output channel, as QuantizeLinear/DequantizeLinear pairs. Measured on
ONNX Runtime 1.31 with AVX-512 VNNI this is the combination with fast kernels: others were half as fast. What ONNX
Runtime makes of the pairs is counted, because it decides about speed: with an ``Identity`` before the bias of every
convolution, 47 of 53 stayed in float32, four times slower.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import onnx
from torch import Tensor

from nni_prune_ext.errors import ConfigError, DataError
from nni_prune_ext.export.graph_cleaning import remove_identities
from nni_prune_ext.export.int8_layers import heavy_nodes, int8_layers, kept_nodes, optimised
from nni_prune_ext.export.parent_file import Images, ParentFile, check_images, open_parent
from nni_prune_ext.export.precision_check import DROPS
from nni_prune_ext.export.reduced_export import Conversion, ReducedExport, check_out, labelled, write_reduced
from nni_prune_ext.specs import did_you_mean

Calibration: TypeAlias = Literal["minmax", "entropy", "percentile", "dynamic"]
CALIBRATIONS: Final[tuple[Calibration, ...]] = get_args(Calibration)
FEWEST_IMAGES: Final = 8
"""Fewer images do not show the range of an activation; a hundred or more are usual."""
_METHODS: Final = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
_STATIC: Final = (
    "Conv", "Gemm", "MatMul", "Add", "Mul", "Relu", "LeakyRelu", "Clip", "Sigmoid", "Concat", "MaxPool",
    "AveragePool", "GlobalAveragePool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Resize", "Split",
)  # fmt: skip
"""Operators with INT8 kernels, and those that only move values. What normalises and is not folded stays in float32."""
_ADVICE: Final = (
    "int8 for ONNX Runtime on the CPU, fast where the processor has 8-bit dot products (VNNI); TensorRT wants other, "
    "symmetric ranges"
)


def quantize_onnx(
    path: Path,
    out: Path,
    images: Images | None,
    *,
    calibration: Calibration = "minmax",
    keep_float: Sequence[str] = (),
    test_batches: Iterable[tuple[Tensor, Tensor]] | None = None,
    max_drop: float | None = DROPS["int8"],
) -> ReducedExport:
    """Writes the INT8 form of a float32 file, and compares the two.

    Args:
        path: a file that ``export_onnx`` wrote, of a dense or a pruned network.
        out: where the INT8 file goes; an older file there is replaced only by a complete and checked one.
        images: ``(N, C, H, W)`` float32, normalised, from which the ranges of activations are taken: a hundred or more,
            and none that accuracy is measured on. ``dynamic`` needs none.
        calibration: ``minmax`` takes the whole range, ``entropy`` the one that distorts least, ``percentile`` leaves
            out the outermost 0.001 %. ``dynamic`` takes the range of every input as it comes, and quantises matrix
            products only: where convolutions hold more weights, it is refused, because it makes them slower.
        keep_float: name patterns of layers that stay in float32.
        test_batches: images and labels on which both files are compared; disjoint from ``images``. Without them the
            outputs are compared on ``images``.
        max_drop: largest loss of accuracy on them that passes, 0–1; ``None`` judges outputs instead.

    Raises:
        ModelError, ExportError: the file is damaged, of another origin, or not float32.
        DataError: images do not fit, are too few or not finite.
        ConfigError: the calibration is unknown or does not suit the network, or a pattern matches nothing.
        ParityError: the INT8 file loses too much; without labels, if its outputs are nowhere near. No file is left.
        OutputError: the file cannot be written.

    Example:
        >>> from tempfile import mkdtemp
        >>> import torch
        >>> from nni_prune_ext.export.onnx_static import export_onnx
        >>> folder, images = Path(mkdtemp()), torch.rand(32, 3, 8, 8)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 4))
        >>> float_file = export_onnx(model, images[:1], folder / "model.onnx", exporter="torchscript").path
        >>> len(quantize_onnx(float_file, folder / "model.int8.onnx", images).reduced)
        2
    """
    path, out = Path(path), Path(out)
    known_calibration(calibration)
    parent = open_parent(path)
    check_out(parent, out)
    dynamic = calibration == "dynamic"
    if images is not None:
        check_images(parent, images, fewest=1 if dynamic else FEWEST_IMAGES, what="calibration")
    elif not dynamic:
        raise DataError(
            f"The calibration {calibration} needs images and got none, expected {FEWEST_IMAGES} or more from the "
            "training data. Pass images (on the command line --data)."
        )
    graph = _prepared(path)
    kept = kept_nodes(graph, keep_float)
    used = [] if dynamic or images is None else list(parent.batches(images))
    proto = _dynamic(graph, kept) if dynamic else _static(graph, parent, used, calibration, kept)
    reduced, kept_float = int8_layers(proto, kept)
    made = Conversion(proto, "int8", reduced, kept_float, _ADVICE, {"calibration": _facts(calibration, used)})
    return write_reduced(parent, out, made, labelled(parent, test_batches, images), max_drop)


def known_calibration(name: str) -> Calibration:
    """Returns the name of a calibration as it is.

    Raises:
        ConfigError: there is none of this name.
    """
    for known in CALIBRATIONS:
        if name == known:
            return known
    raise ConfigError(
        f"The calibration is '{name}', expected {', '.join(CALIBRATIONS)}.{did_you_mean(name, CALIBRATIONS)} Choose "
        "one of them."
    )


def _prepared(path: Path) -> onnx.ModelProto:
    """Returns the graph with BatchNorms and constants folded and nothing between a weight and its reader."""
    graph = optimised(path, "BASIC")
    remove_identities(graph)
    # What ONNX Runtime's own preparation leaves; without it the quantiser asks for one in the log.
    onnx.helper.set_model_props(graph, {"onnx.quant.pre_process": "onnxruntime.quant"})
    return graph


def _static(
    graph: onnx.ModelProto,
    parent: ParentFile,
    batches: Sequence[npt.NDArray[np.float32]],
    calibration: Calibration,
    kept: Sequence[str],
) -> onnx.ModelProto:
    ort = _quantisation()
    with TemporaryDirectory() as folder, _quiet():
        file = Path(folder) / "int8.onnx"
        ort.quantize_static(
            graph,
            str(file),
            _Reader(parent.input_name, batches),
            quant_format=ort.QuantFormat.QDQ,
            op_types_to_quantize=list(_STATIC),
            per_channel=True,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            nodes_to_exclude=list(kept),
            calibrate_method=getattr(ort.CalibrationMethod, _METHODS[calibration]),
            extra_options={
                # Batch after batch: histograms would otherwise hold all activations of all images at once.
                "CalibStridedMinMax": 1,
                # A layer in float32 reads values before they are rounded, which must be those after ReLU and Clip. It
                # costs a pass after every addition (ResNets), so only where there is such a layer.
                "QDQKeepRemovableActivations": bool(kept),
            },
        )
        made = onnx.load(str(file))
    _read_unrounded(made, kept)
    return made


def _read_unrounded(model: onnx.ModelProto, kept: Sequence[str]) -> None:
    """Lets layers that stay in float32 read their input before it is rounded.

    Between a DequantizeLinear and a QuantizeLinear, ONNX Runtime would round their weights by itself and run them in
    int8 (WeightBiasQuantization, 1.31).
    """
    writers = {node.output[0]: node for node in model.graph.node}
    for node in model.graph.node:
        back = writers.get(node.input[0]) if node.name in kept else None
        if back is not None and back.op_type == "DequantizeLinear" and back.input[0] in writers:
            node.input[0] = writers[back.input[0]].input[0]


def _dynamic(graph: onnx.ModelProto, kept: Sequence[str]) -> onnx.ModelProto:
    """Quantises matrix products whose inputs get their ranges when they come.

    Raises:
        ConfigError: convolutions hold more weights than matrix products.
    """
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in graph.graph.initializer}
    weights = {"Conv": 0, "MatMul": 0}
    for node in heavy_nodes(graph):
        weights["Conv" if node.op_type == "Conv" else "MatMul"] += sum(sizes.get(name, 0) for name in node.input)
    if weights["Conv"] >= weights["MatMul"]:
        raise ConfigError(
            f"The calibration is dynamic, but convolutions hold {weights['Conv']:,} weights and matrix products "
            f"{weights['MatMul']:,}, expected more in the latter: dynamic quantisation made ResNet-50 1.07 and "
            "MobileNetV2 2.9 times slower than float32. Choose minmax and pass images."
        )
    ort = _quantisation()
    with TemporaryDirectory() as folder, _quiet():
        source, file = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save_model(graph, str(source))
        ort.quantize_dynamic(
            str(source),
            str(file),
            op_types_to_quantize=["MatMul"],  # the quantiser writes every Gemm as one
            per_channel=True,
            weight_type=ort.QuantType.QInt8,
            nodes_to_exclude=list(kept),
        )
        return onnx.load(str(file))


@dataclass
class _Reader:
    """Hands batches to ONNX Runtime, one range of them after the other."""

    input_name: str
    batches: Sequence[npt.NDArray[np.float32]]
    waiting: list[npt.NDArray[np.float32]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Says which batches come next."""
        self.waiting = list(self.batches[start_index:end_index])

    def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
        """Returns the next batch by the input's name, or ``None`` at the end of the range."""
        return {self.input_name: self.waiting.pop(0)} if self.waiting else None


def _facts(calibration: Calibration, batches: Sequence[npt.NDArray[np.float32]]) -> str:
    """Returns method, number and SHA-256 of the images (their bytes, one after the other) as JSON."""
    digest = sha256()
    for batch in batches:
        digest.update(batch.data)
    sha = digest.hexdigest() if batches else None
    return json.dumps({"method": calibration, "images": sum(map(len, batches)), "sha256": sha})


def _quantisation() -> ModuleType:
    return importlib.import_module("onnxruntime.quantization")  # not at the top: slow, and only this needs it


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the quantiser's remarks, which it makes on the root logger and prints, away from the user."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(level)
