"""Compares a file of lower precision with the float32 file that it was made from, and judges it.

Rounding is an error by design, so the bounds are not those of an export:

* ``fp16`` keeps 11 significant bits: one rounding is off by up to 4.9e-4. ``FP16_LIMIT`` allows for some forty of them
  in a row; more means that something overflowed or vanished.
* ``int8`` has 256 steps per tensor, and errors of 2e-2 to 5e-1 of the largest output are usual. No bound on outputs
  tells good from bad: ``INT8_LIMIT``, as much as the largest output itself, only finds what is broken; accuracy decides
  where labels are known.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from nni_prune_ext.errors import DataError, ParityError
from nni_prune_ext.export.parent_file import ParentFile

Reduced: TypeAlias = Literal["int8", "fp16"]
FP16_LIMIT = 2e-2
INT8_LIMIT = 1.0
LIMITS: dict[Reduced, float] = {"fp16": FP16_LIMIT, "int8": INT8_LIMIT}
"""Largest difference to the float32 file that passes, relative to the largest output."""
DROPS: dict[Reduced, float] = {"fp16": 0.005, "int8": 0.02}
"""Largest loss of accuracy against the float32 file that passes, where labels are known; 0.02 is two points of 100."""

Array: TypeAlias = npt.NDArray[np.generic]
Labelled: TypeAlias = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64] | None]


@dataclass(frozen=True)
class PrecisionParity:
    """How far a file of lower precision is from its float32 file, on ONNX Runtime's CPU.

    Attributes:
        precision: ``int8`` or ``fp16``.
        max_rel: largest ``max|difference| / max|output|`` of any output and batch; infinite if values are not finite.
        top1_agreement: share (0–1) of images with the same largest class; ``None`` without an output (N, classes).
        images: number of images compared.
        limit: largest `max_rel` that passes.
        float_top1: accuracy (0–1) of the float32 file; ``None`` without labels.
        top1: accuracy of the file on the same images; ``None`` without labels.
        max_drop: largest loss of accuracy that passes; ``None`` if outputs are judged.
        passed: with labels and `max_drop`, whether the loss is small enough; else whether `max_rel` is.
    """

    precision: Reduced
    max_rel: float
    top1_agreement: float | None
    images: int
    limit: float
    float_top1: float | None
    top1: float | None
    max_drop: float | None
    passed: bool

    @property
    def drop(self) -> float | None:
        """The accuracy lost by lower precision alone; negative if it rose, ``None`` without labels."""
        return None if self.top1 is None or self.float_top1 is None else self.float_top1 - self.top1

    def to_dict(self) -> dict[str, object]:
        """Returns it as JSON-ready values."""
        return {**asdict(self), "drop": self.drop}


def compare_precision(
    parent: ParentFile,
    path: Path,
    batches: Iterable[Labelled],
    *,
    precision: Reduced,
    max_drop: float | None,
) -> PrecisionParity:
    """Runs both files on the same images.

    Args:
        batches: images ``(N, C, H, W)``, with labels ``(N,)`` or ``None``.
        max_drop: largest loss of accuracy that passes; without it, or without labels, outputs are judged.

    Raises:
        DataError: there are no images.
    """
    float_session, session = open_cpu_session(parent.path), open_cpu_session(path)
    differences: list[float] = []
    same: list[npt.NDArray[np.bool_]] = []
    right: list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]] = []
    images = 0
    for arrays, labels in batches:
        expected = float_session.run(None, {parent.input_name: arrays})
        actual = session.run(None, {parent.input_name: arrays})
        images += len(arrays)
        differences += [_difference(*pair) for pair in zip(expected, actual, strict=True)]
        if expected[0].ndim == 2 and expected[0].shape[1] > 1:
            before, after = expected[0].argmax(axis=1), actual[0].argmax(axis=1)
            same.append(before == after)
            if labels is not None:
                right.append((before == labels, after == labels))
    if not images:
        raise DataError(f"{parent.name} was to be compared on 0 images, expected at least one. Pass test images.")
    max_rel = max(differences)
    float_top1, top1 = (_share([pair[side] for pair in right]) for side in (0, 1))
    passed = max_rel <= LIMITS[precision]
    if max_drop is not None and float_top1 is not None and top1 is not None:
        passed = math.isfinite(max_rel) and float_top1 - top1 <= max_drop
    return PrecisionParity(
        precision, max_rel, _share(same), images, LIMITS[precision], float_top1, top1, max_drop, passed
    )


def require_precision(parity: PrecisionParity, parent: ParentFile) -> None:
    """Refuses a file that lost too much.

    Raises:
        ParityError: it did not pass.
    """
    if parity.passed:
        return
    if not math.isfinite(parity.max_rel):
        seen, limit = "computes NaN or infinity", "finite outputs"
    elif parity.drop is not None and parity.max_drop is not None:
        seen = f"loses {100 * parity.drop:.1f} points of accuracy ({parity.float_top1:.4f} → {parity.top1:.4f})"
        limit = f"at most {100 * parity.max_drop:.1f} on the {parity.images} images"
    else:
        seen, limit = f"differs by {parity.max_rel:.3g} of the largest output", f"at most {parity.limit:g}"
    calibrate = "Calibrate on more images or in another way, or leave" if parity.precision == "int8" else "Leave"
    raise ParityError(
        f"{parent.name} {seen} in {parity.precision}, expected {limit}. The file was not kept. {calibrate} sensitive "
        "layers in float32 with keep_float= (--keep-float); a larger loss passes with max_drop= (--max-drop)."
    )


class Session(Protocol):
    """The part of ONNX Runtime's session that is used here."""

    def run(self, names: None, feed: dict[str, npt.NDArray[np.float32]]) -> list[Array]:
        """Runs the network."""
        ...


def open_cpu_session(source: Path | bytes) -> Session:
    """Opens a file, or its bytes, on ONNX Runtime's CPU."""
    onnxruntime = importlib.import_module("onnxruntime")  # only checking needs it
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised as well
    options.intra_op_num_threads = torch.get_num_threads()
    content = source if isinstance(source, bytes) else str(source)
    session: Session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session


def _difference(expected: Array, actual: Array) -> float:
    before, after = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    if before.shape != after.shape or not (np.isfinite(before).all() and np.isfinite(after).all()):
        return math.inf
    scale = float(np.abs(before).max(initial=0.0))
    return float(np.abs(before - after).max(initial=0.0)) / (scale or 1.0)


def _share(parts: Sequence[npt.NDArray[np.bool_]]) -> float | None:
    return float(np.concatenate(parts).mean()) if parts else None
