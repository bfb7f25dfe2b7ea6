"""What int8 and fp16 files have in common: they are compared with their float32 file, described, and written whole."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from torch import Tensor

from nni_prune_ext.errors import OutputError
from nni_prune_ext.export.graph_cleaning import drop_unused_domains, remove_unread, strip_traces
from nni_prune_ext.export.onnx_static import publish, temporary_folder_beside, write_graph
from nni_prune_ext.export.parent_file import Images, ParentFile, check_images
from nni_prune_ext.export.precision_check import (
    Labelled,
    PrecisionParity,
    Reduced,
    compare_precision,
    require_precision,
)
from nni_prune_ext.export.provenance import PREFIX

_PROBES = 8


@dataclass(frozen=True)
class ReducedExport:
    """A written ONNX file of lower precision.

    Attributes:
        path: the file.
        precision: ``int8`` or ``fp16``.
        properties: the metadata in the file, with prefixed names: those of the float32 file, and more.
        reduced: Conv, Gemm and MatMul nodes that compute in this precision on ONNX Runtime's CPU (int8), or that
            are stored in it (fp16).
        kept_float: those that stay in float32, each with the reason.
        parity: the comparison with the float32 file.
        size_bytes: of the file.
        advice: what the file is good for, and what not.
    """

    path: Path
    precision: Reduced
    properties: Mapping[str, str]
    reduced: tuple[str, ...]
    kept_float: Mapping[str, str]
    parity: PrecisionParity
    size_bytes: int
    advice: str

    def facts(self) -> dict[str, object]:
        """Returns what a report says about it, as JSON-ready values."""
        calibration = self.properties.get(f"{PREFIX}calibration")
        return {
            "precision": self.precision,
            "size_bytes": self.size_bytes,
            "reduced": len(self.reduced),
            "kept_float": dict(self.kept_float),
            "calibration": json.loads(calibration) if calibration else None,
            "parity": self.parity.to_dict(),
            "advice": self.advice,
        }


@dataclass(frozen=True)
class Conversion:
    """A converted graph before it is checked; the fields are those of `ReducedExport`."""

    proto: onnx.ModelProto
    precision: Reduced
    reduced: tuple[str, ...]
    kept_float: Mapping[str, str]
    advice: str
    properties: Mapping[str, str]


def check_out(parent: ParentFile, out: Path) -> None:
    """Refuses to write over the float32 file itself.

    Raises:
        OutputError: the two are one.
    """
    if out.exists() and out.samefile(parent.path):
        raise OutputError(f"'{out}' is the float32 file itself, expected another name for the new file. Choose one.")


def write_reduced(
    parent: ParentFile, out: Path, made: Conversion, batches: Iterable[Labelled], max_drop: float | None
) -> ReducedExport:
    """Writes a converted graph under its name once it is valid and near enough to its float32 file.

    Raises:
        ExportError: the graph is not valid ONNX.
        ParityError: it lost too much.
        OutputError: the file cannot be written.
    """
    properties = {
        **parent.properties,
        f"{PREFIX}precision": made.precision,
        f"{PREFIX}parent_sha256": parent.sha256,
        f"{PREFIX}float_layers": json.dumps(dict(made.kept_float)),
        f"{PREFIX}onnxruntime": importlib.import_module("onnxruntime").__version__,
        **{PREFIX + key: value for key, value in made.properties.items()},
    }
    strip_traces(made.proto)
    drop_unused_domains(made.proto)
    remove_unread(made.proto)
    onnx.helper.set_model_props(made.proto, properties)
    with temporary_folder_beside(out) as folder:
        draft = folder / out.name
        write_graph(made.proto, draft, parent.name)
        parity = compare_precision(parent, draft, batches, precision=made.precision, max_drop=max_drop)
        require_precision(parity, parent)
        size_bytes = draft.stat().st_size
        publish(folder, out)
    return ReducedExport(
        out, made.precision, properties, made.reduced, made.kept_float, parity, size_bytes, made.advice
    )


def labelled(
    parent: ParentFile, test_batches: Iterable[tuple[Tensor, Tensor]] | None, images: Images | None
) -> Iterator[Labelled]:
    """Yields what both files run on: test images with labels, else other images, else random ones.

    Raises:
        DataError: test images do not fit.
    """
    if test_batches is not None:
        for given, labels in test_batches:
            check_images(parent, given, fewest=1, what="test")
            start, numbers = 0, np.asarray(labels)
            for batch in parent.batches(given):
                yield batch, numbers[start : start + len(batch)]
                start += len(batch)
        return
    if images is None:
        size = parent.input_shape[0] or _PROBES
        images = np.random.default_rng(0).standard_normal((size, *map(int, parent.input_shape[1:])), np.float32)  # type: ignore[arg-type]
    for batch in parent.batches(images):
        yield batch, None
