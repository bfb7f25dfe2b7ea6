"""Rows and files of lower precision beside the networks of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nni_prune_ext.errors import ConfigError, DataError, ExportError, ModelError
from nni_prune_ext.export.artefact_folder import REDUCED_ONNX
from nni_prune_ext.export.fp16 import convert_to_fp16
from nni_prune_ext.export.int8 import Calibration, quantize_onnx
from nni_prune_ext.export.manifest import replacing_part
from nni_prune_ext.export.precision_check import Reduced
from nni_prune_ext.export.reduced_export import ReducedExport
from nni_prune_ext.report import Row

_NOT_JUDGED = 1.0
"""A report shows how much accuracy was lost; whether that is too much is for its reader to say."""


@dataclass(frozen=True)
class LowerPrecision:
    """Which files of lower precision a comparison makes of every network, and how.

    Attributes:
        precisions: ``int8``, ``fp16`` or both.
        images: ``(N, C, H, W)`` float32, normalised, that int8 is calibrated on; none of them is a test image.
        calibration: see ``quantize_onnx``.
        keep_float: name patterns of layers that stay in float32.
    """

    precisions: tuple[Reduced, ...]
    images: Tensor | None = None
    calibration: Calibration = "minmax"
    keep_float: tuple[str, ...] = ()


def lower_rows(
    row: Row,
    file: Path,
    lower: LowerPrecision,
    test_batches: Iterable[tuple[Tensor, Tensor]] | None,
    tell: Callable[[str], None],
) -> list[Row]:
    """Writes files of lower precision beside the float32 file of an artefact folder, and returns a row for each.

    Args:
        row: of the float32 network.
        test_batches: images and labels for accuracy.
        tell: is told what is being done, and why a file has no row.
    """
    rows = []
    for precision in lower.precisions:
        name = f"{row.name}-{precision}"
        tell(f"converting {row.name} to {precision}")
        try:
            with replacing_part(file.parent, REDUCED_ONNX[precision]) as out:
                made = convert(file, out, precision, lower, test_batches, max_drop=_NOT_JUDGED)
        except (ConfigError, DataError, ExportError, ModelError) as error:
            tell(f"no row {name}: {error}")  # the float32 network is worth having all the same
            continue
        rows.append(
            Row(
                name=name,
                macs=row.macs,
                params=row.params,
                top1_onnx=made.parity.top1,
                onnx_bytes=made.size_bytes,
                kind=row.kind,
                precision=precision,
                of=row.name,
                conversion=made.facts(),
            )
        )
    return rows


def convert(
    file: Path,
    out: Path,
    precision: Reduced,
    lower: LowerPrecision,
    test_batches: Iterable[tuple[Tensor, Tensor]] | None,
    *,
    max_drop: float | None,
) -> ReducedExport:
    """Writes one file of lower precision; see ``quantize_onnx`` and ``convert_to_fp16``."""
    if precision == "fp16":
        return convert_to_fp16(
            file, out, lower.images, keep_float=lower.keep_float, test_batches=test_batches, max_drop=max_drop
        )
    return quantize_onnx(
        file,
        out,
        lower.images,
        calibration=lower.calibration,
        keep_float=lower.keep_float,
        test_batches=test_batches,
        max_drop=max_drop,
    )


def drop_sentences(rows: Sequence[Row]) -> list[str]:
    """Returns, for every file of lower precision with a known accuracy, what pruning and what precision cost."""
    by_name = {row.name: row for row in rows}
    dense = rows[0].top1_onnx
    sentences = []
    for row in rows:
        before = by_name[row.of].top1_onnx if row.of else None
        if row.top1_onnx is None or before is None or dense is None:
            continue
        cut = f"pruning {_points(before - dense)}, " if row.kind == "pruned" else ""
        sentences.append(f"{row.name}: {cut}{row.precision} {_points(row.top1_onnx - before)} of accuracy")
    return sentences


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f} points"
