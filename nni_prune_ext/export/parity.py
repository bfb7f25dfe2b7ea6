"""Compares an ONNX file with the PyTorch model it was made from, on random and on real inputs.

Measured on pruned networks, float32 outputs agree to about 1e-6 of the largest output; 1e-5 is worth a warning and
1e-4 is a failure. ONNX Runtime's CPU provider is the reference runtime: it is there wherever ONNX Runtime is.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nni_prune_ext.errors import ParityError, RuntimeUnavailableError
from nni_prune_ext.export.frozen_model import evaluation_mode
from nni_prune_ext.export.model_call import ModelCall, as_call, named_leaves
from nni_prune_ext.inputs import ExampleInputs

WARN = 1e-5
FAIL = 1e-4
_PROVIDER = "CPUExecutionProvider"

Array: TypeAlias = npt.NDArray[np.float64]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputParity:
    """The worst difference of one output over all inputs; infinite if shapes differ or values are not finite."""

    name: str
    max_abs: float
    max_rel: float


@dataclass(frozen=True)
class ParityReport:
    """How far an ONNX file is from PyTorch.

    Attributes:
        max_abs: Largest absolute difference of any output.
        max_rel: Largest ``max|difference| / max|output|`` of any output and input.
        top1_agreement: Share of samples with the same largest class, for the first two-dimensional output.
        num_inputs: Number of inputs compared, each of them a batch.
        outputs: One row per output.
        provider: The provider that ran the file.
        warn: Relative difference above which a warning is logged.
        fail: Relative difference above which the file has failed.
        varied: Whether PyTorch's outputs changed with the inputs; if not, their agreement proves little.
        not_finite: Number of inputs for which PyTorch itself computes NaN or infinity: no file can agree with that.
        passed: Whether `max_rel` is finite and at most `fail`.
    """

    max_abs: float
    max_rel: float
    top1_agreement: float | None
    num_inputs: int
    outputs: tuple[OutputParity, ...]
    provider: str
    warn: float
    fail: float
    varied: bool
    not_finite: int
    passed: bool

    def to_dict(self) -> dict[str, object]:
        """Returns the report as JSON-ready values."""
        return asdict(self)


def check_parity(
    model: nn.Module,
    onnx_path: Path,
    example_inputs: ExampleInputs,
    *,
    batches: Sequence[int] = (1, 3),
    probes: int = 4,
    seed: int = 0,
    given_inputs: Sequence[ExampleInputs] | None = None,
    warn: float = WARN,
    fail: float = FAIL,
) -> ParityReport:
    """Runs the model and the file on the same inputs and compares their outputs; the model is left as it was.

    Args:
        model: The PyTorch model.
        onnx_path: The file.
        example_inputs: Inputs whose shapes, types and device the random inputs take. Floating-point tensors are
            filled from a normal distribution, others from the values of the example (so that class numbers and
            token numbers stay valid).
        batches: Batch sizes to try where the file's batch dimension is open.
        probes: Number of random inputs per batch size.
        seed: Seed of the random inputs.
        given_inputs: Real inputs, compared as they are.
        warn: Relative difference above which a warning is logged.
        fail: Relative difference above which the report says that the file failed.

    Raises:
        ParityError: If the file does not load or run on these inputs at all; a difference is reported, not raised.
        RuntimeUnavailableError: If onnxruntime is not installed.
    """
    session = _open(onnx_path)
    open_batch = {port.name for port in session.get_inputs() if port.shape and isinstance(port.shape[0], str)}
    calls = list(_random_calls(model, example_inputs, open_batch, batches if open_batch else (1,), probes, seed))
    calls += [as_call(model, inputs) for inputs in given_inputs or ()]
    with evaluation_mode(model):
        pairs = [(_reference(model, call), _run(session, call)) for call in calls]
    report = _summarise(pairs, [port.name for port in session.get_outputs()], warn, fail)
    if not report.varied:
        _log.warning("The model's outputs are the same for all %d inputs; parity proves little.", report.num_inputs)
    if report.passed and report.max_rel > warn:
        _log.warning("ONNX and PyTorch differ by %.3g of the largest output (warning above %g).", report.max_rel, warn)
    return report


class _Port(Protocol):
    name: str
    shape: list[int | str]


class _Session(Protocol):
    def get_inputs(self) -> list[_Port]: ...
    def get_outputs(self) -> list[_Port]: ...
    def run(self, names: None, feed: dict[str, npt.NDArray[np.generic]]) -> list[npt.NDArray[np.generic]]: ...


def _open(onnx_path: Path) -> _Session:
    try:
        onnxruntime = importlib.import_module("onnxruntime")  # only checking needs it, writing does not
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"The ONNX file cannot be compared with PyTorch: onnxruntime cannot be imported ({error}). Expected "
            "onnxruntime or onnxruntime-gpu. Install one of them, or export with check=False."
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised as well
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # PyTorch runs in turn with it
    try:
        session: _Session = onnxruntime.InferenceSession(str(onnx_path), options, providers=[_PROVIDER])
    except onnxruntime_errors() as error:
        raise _not_runnable(f"ONNX Runtime cannot load it: {error}") from error
    return session


def onnxruntime_errors() -> tuple[type[Exception], ...]:
    """Returns what ONNX Runtime raises; its exceptions have no common base (1.31)."""
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    own = (value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception))
    return (*own, ValueError)  # ValueError: its Python layer found an input missing


def _not_runnable(reason: str) -> ParityError:
    return ParityError(
        f"The ONNX file cannot be compared with PyTorch. {reason}. Expected a file that takes the model's inputs, with "
        "any batch size if its batch dimension is open. Export again, with dynamic_batch=False if only that fails."
    )


def _random_calls(
    model: nn.Module,
    example_inputs: ExampleInputs,
    open_batch: set[str],
    batches: Sequence[int],
    probes: int,
    seed: int,
) -> Iterator[ModelCall]:
    """Yields calls with random tensors; tensors with an open batch dimension take every batch size."""
    example = as_call(model, example_inputs)
    batched = {id(tensor) for name, tensor in example.named_tensors().items() if name in open_batch}
    generator = torch.Generator().manual_seed(seed)

    for batch in batches:

        def randomised(leaf: object, batch: int = batch) -> object:
            if not isinstance(leaf, Tensor):
                return leaf
            shape = [batch, *leaf.shape[1:]] if id(leaf) in batched else list(leaf.shape)
            return _random_like(leaf, shape, generator)

        for _ in range(probes):
            yield example.map(randomised)


def _random_like(example: Tensor, shape: list[int], generator: torch.Generator) -> Tensor:
    """Returns a random tensor of the given shape with the type and device of the example."""
    if example.is_floating_point():
        return torch.randn(shape, generator=generator).to(example)
    values = example.flatten().cpu()
    return values[torch.randint(len(values), shape, generator=generator)].to(example.device)


def _reference(model: nn.Module, call: ModelCall) -> list[Array]:
    return [tensor.detach().cpu().double().numpy() for _, tensor in named_leaves(call.run(model), "output")]


def _run(session: _Session, call: ModelCall) -> list[Array]:
    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in call.named_tensors().items()}
    names = [port.name for port in session.get_inputs()]
    if not set(names) <= tensors.keys():  # files of other origin name their inputs differently, but keep their order
        tensors = dict(zip(names, tensors.values(), strict=False))
    try:
        outputs = session.run(None, {name: tensors[name] for name in names if name in tensors})
    except onnxruntime_errors() as error:
        shapes = {name: array.shape for name, array in tensors.items()}
        raise _not_runnable(f"It does not run on inputs of shape {shapes}: {error}") from error
    return [np.asarray(output, np.float64) for output in outputs]


def _summarise(
    pairs: list[tuple[list[Array], list[Array]]], names: list[str], warn: float, fail: float
) -> ParityReport:
    expected_count = len(pairs[0][0])
    if expected_count != len(names):
        raise _not_runnable(f"It has {len(names)} outputs where the model has {expected_count}")
    rows = []
    for index, name in enumerate(names):
        differences = [_difference(expected[index], actual[index]) for expected, actual in pairs]
        rows.append(OutputParity(name, max(a for a, _ in differences), max(r for _, r in differences)))
    max_abs, max_rel = max(row.max_abs for row in rows), max(row.max_rel for row in rows)
    passed = math.isfinite(max_rel) and max_rel <= fail
    return ParityReport(
        max_abs=max_abs,
        max_rel=max_rel,
        top1_agreement=_top1_agreement(pairs),
        num_inputs=len(pairs),
        outputs=tuple(rows),
        provider=_PROVIDER,
        warn=warn,
        fail=fail,
        varied=_varied([expected for expected, _ in pairs]),
        not_finite=sum(not all(np.isfinite(output).all() for output in expected) for expected, _ in pairs),
        passed=passed,
    )


def _difference(expected: Array, actual: Array) -> tuple[float, float]:
    """Returns ``max|difference|`` and the same relative to ``max|expected|``."""
    if expected.shape != actual.shape or not (np.isfinite(expected).all() and np.isfinite(actual).all()):
        return math.inf, math.inf
    if not expected.size:
        return 0.0, 0.0
    absolute = float(np.abs(expected - actual).max())
    scale = float(np.abs(expected).max())
    return absolute, absolute / scale if scale else absolute


def _varied(calls: list[list[Array]]) -> bool:
    """Says whether outputs of the same name and shape differ between calls; true if there are none to compare."""
    first: dict[tuple[int, tuple[int, ...]], Array] = {}
    same = [
        np.array_equal(output, first[index, output.shape])
        for outputs in calls
        for index, output in enumerate(outputs)
        if first.setdefault((index, output.shape), output) is not output
    ]
    return not same or not all(same)


def _top1_agreement(pairs: list[tuple[list[Array], list[Array]]]) -> float | None:
    """Returns the share of rows with the same largest column in the first two-dimensional output, if there is one."""
    columns = [index for index, output in enumerate(pairs[0][0]) if output.ndim == 2 and output.shape[1] > 1]
    if not columns or any(expected[columns[0]].shape != actual[columns[0]].shape for expected, actual in pairs):
        return None
    expected_top1 = np.concatenate([expected[columns[0]].argmax(1) for expected, _ in pairs])
    actual_top1 = np.concatenate([actual[columns[0]].argmax(1) for _, actual in pairs])
    return float((expected_top1 == actual_top1).mean())
