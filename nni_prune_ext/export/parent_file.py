"""The float32 file that a file of lower precision is made from: opened, and refused where it is not one of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from torch import Tensor

from nni_prune_ext.errors import DataError, ExportError, ModelError
from nni_prune_ext.export.manifest import Part
from nni_prune_ext.export.provenance import PREFIX

Images: TypeAlias = Tensor | npt.NDArray[np.float32]
"""``(N, C, H, W)`` float32, as the network takes them: normalised."""

BATCH: Final = 16
"""Images that run together: all intermediate values of a batch are in memory."""


@dataclass(frozen=True)
class ParentFile:
    """A float32 ONNX file of this package.

    Attributes:
        path: the file.
        proto: its content.
        properties: its metadata, with prefixed names.
        sha256: of the file.
        input_name: name of its only input.
        input_shape: sizes of that input, ``None`` where the batch is open.
    """

    path: Path
    proto: onnx.ModelProto
    properties: Mapping[str, str]
    sha256: str
    input_name: str
    input_shape: tuple[int | None, ...]

    @property
    def name(self) -> str:
        """What messages call the network."""
        return f"'{self.path}'"

    def batches(self, images: Images) -> Iterator[npt.NDArray[np.float32]]:
        """Yields images in batches that the file takes; where it takes one size only, an odd rest is left out."""
        array = np.asarray(images)
        size = self.input_shape[0] or BATCH
        end = len(array) if self.input_shape[0] is None else len(array) // size * size
        for start in range(0, end, size):
            yield np.ascontiguousarray(array[start : start + size])


def open_parent(path: Path) -> ParentFile:
    """Reads an ONNX file that ``export_onnx`` wrote.

    Raises:
        ModelError: there is none, it is damaged, or it has not one float32 input.
        ExportError: it is of another origin, of lower precision already, gated, or has its weights in a second file.
    """
    proto = _read(path)
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    if f"{PREFIX}version" not in properties:
        raise ExportError(
            f"'{path}' does not say that nni_prune_ext wrote it: it has no metadata '{PREFIX}version'. Expected a file "
            "of export_onnx or `nni-prune-ext export`, whose graph is known to be clean and whose origin is known. "
            "Export the model, and convert that file."
        )
    kinds = sorted({node.op_type for node in proto.graph.node} & {"QuantizeLinear", "DynamicQuantizeLinear"})
    precision = properties.get(f"{PREFIX}precision", "int8" if kinds else "fp32")
    if precision != "fp32" or kinds:
        raise ExportError(
            f"'{path}' is of precision {precision} already, expected a float32 file: rounding twice only loses. "
            "Convert the file that it was made from."
        )
    if f"{PREFIX}flavour" in properties:
        raise ExportError(
            f"'{path}' is gated (flavour {properties[f'{PREFIX}flavour']}), expected a static network: a rounded gate "
            "opens other filters. Convert the static network, model.onnx in the folder of the method."
        )
    if path.with_name(f"{path.name}.data").exists():
        raise ExportError(
            f"'{path}' has its weights in a second file, expected all in one (1.5 GB at most). Convert a smaller "
            "network."
        )
    name, shape = _only_input(path, proto)
    return ParentFile(path, proto, properties, Part.of(path).sha256, name, shape)


def check_images(parent: ParentFile, images: Images, *, fewest: int, what: str) -> None:
    """Makes sure that images are what a file takes.

    Args:
        fewest: that many at least.
        what: what messages call them.

    Raises:
        DataError: they have another shape or type, are too few, or hold NaN or infinity.
    """
    array = np.asarray(images)
    expected = f"(N, {', '.join(map(str, parent.input_shape[1:]))})"
    if array.dtype != np.float32 or array.shape[1:] != parent.input_shape[1:] or array.ndim != len(parent.input_shape):
        raise DataError(
            f"The {what} images are {array.dtype} {array.shape}, expected float32 {expected} as {parent.name} takes "
            "them, normalised as for training. Convert or resize them."
        )
    fewest = max(fewest, parent.input_shape[0] or 1)
    if len(array) < fewest:
        raise DataError(
            f"There are {len(array)} {what} images, expected at least {fewest}: fewer do not show the range of values. "
            "Pass more images."
        )
    bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if bad.any():
        raise DataError(
            f"{bad.sum()} of {len(array)} {what} images hold NaN or infinity, the first is number {bad.argmax()}. "
            "Expected finite numbers. Leave these images out, or mend how they are read."
        )


def _read(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise ModelError(f"There is no file '{path}', expected an ONNX file. Export the model first.")
    decode_error: type[Exception] = import_module("google.protobuf.message").DecodeError  # it has no type hints
    try:
        proto = onnx.load(str(path), format="protobuf")  # whatever the file is called
        onnx.checker.check_model(proto)
    except (OSError, ValueError, decode_error, onnx.checker.ValidationError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"'{path}' is damaged or no ONNX file ({reason}). Expected what export_onnx writes. Export the model again."
        ) from error
    return proto


def _only_input(path: Path, proto: onnx.ModelProto) -> tuple[str, tuple[int | None, ...]]:
    weights = {tensor.name for tensor in proto.graph.initializer}
    ports = [port for port in proto.graph.input if port.name not in weights]
    types = [port.type.tensor_type for port in ports]
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for own in types[:1] for dim in own.shape.dim]
    if len(ports) != 1 or types[0].elem_type != onnx.TensorProto.FLOAT or not sizes or None in sizes[1:]:
        raise ModelError(
            f"'{path}' has {len(ports)} inputs, the first of sizes {sizes}; expected one of float32 whose sizes are "
            "fixed but for the batch. Convert other networks with onnxruntime.quantization itself."
        )
    return ports[0].name, tuple(sizes)
