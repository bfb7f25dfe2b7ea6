"""PyTorch's two ONNX exporters behind one function that falls back from one to the other.

dynamo is slow (seconds) but keeps PyTorch's names; TorchScript is quick and takes models that `torch.export` cannot
follow, but leaves auxiliary nodes, which are removed here.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeAlias

import onnx
import torch
from torch import Tensor, nn

from nni_prune_ext.errors import ExportError
from nni_prune_ext.export.graph_cleaning import (
    constants_to_initializers,
    fold_constants,
    name_nodes_after_layers,
    remove_identities,
    strip_traces,
)
from nni_prune_ext.export.model_call import ModelCall

ExporterName: TypeAlias = Literal["dynamo", "torchscript"]

# What the exporters raise for models that they cannot follow. The model itself ran before, so it is not at fault.
_EXPORTER_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, ImportError)

_log = logging.getLogger(__name__)


def export_graph(
    model: nn.Module,
    call: ModelCall,
    *,
    outputs: list[str],
    exporter: ExporterName | Literal["auto"],
    opset: int,
    dynamic_batch: bool,
) -> tuple[onnx.ModelProto, ExporterName, str | None]:
    """Returns the graph without traces of this machine, the exporter used, and why the first one failed.

    Args:
        model: The model in eval mode; it runs for this call.
        call: Example inputs.
        outputs: Names for its output tensors.
        exporter: ``auto`` tries dynamo and falls back to TorchScript.
        opset: ONNX operator set.
        dynamic_batch: Leave the first dimension of every input open, under the name ``N``.

    Raises:
        ExportError: If no exporter can write the model.
    """
    if dynamic_batch:
        call = call.map(_batch_of_two)
    with _silence():
        proto, used, reason = _export_with(exporter, model, call, outputs, opset, dynamic_batch)
    strip_traces(proto)
    return proto, used, reason


def _export_with(
    exporter: ExporterName | Literal["auto"],
    model: nn.Module,
    call: ModelCall,
    outputs: list[str],
    opset: int,
    dynamic_batch: bool,
) -> tuple[onnx.ModelProto, ExporterName, str | None]:
    reason = None
    if exporter != "torchscript":
        try:
            return _dynamo(model, call, outputs, opset, dynamic_batch), "dynamo", None
        except _EXPORTER_FAILURES as error:
            if exporter == "dynamo":
                raise _cannot_export(model, {"dynamo": first_line(error)}) from error
            reason = first_line(error)
            _log.info("The dynamo exporter failed on %s (%s); trying TorchScript.", type(model).__name__, reason)
    try:
        return _torchscript(model, call, outputs, opset, dynamic_batch), "torchscript", reason
    except _EXPORTER_FAILURES as error:
        failures = {"dynamo": reason} if reason else {}
        raise _cannot_export(model, {**failures, "torchscript": first_line(error)}) from error


def _batch_of_two(leaf: object) -> object:
    """Doubles a batch of one: the dynamo exporter of torch 2.11 takes a one to be fixed, in ViT-B/16 for example."""
    return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.shape[:1] == (1,) else leaf


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps the exporters' progress messages and warnings away from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _dynamo(model: nn.Module, call: ModelCall, outputs: list[str], opset: int, dynamic_batch: bool) -> onnx.ModelProto:
    """Exports through `torch.export`: slow, with PyTorch's names."""

    def dynamic_sizes(leaf: object) -> dict[int, str] | None:
        return {0: "N"} if isinstance(leaf, Tensor) and leaf.dim() else None

    program = torch.onnx.export(
        model,
        call.bound.args,
        kwargs=call.bound.kwargs,
        input_names=list(call.named_tensors()),
        output_names=outputs,
        opset_version=opset,
        dynamo=True,
        external_data=False,
        dynamic_shapes=dict(call.map(dynamic_sizes).bound.arguments) if dynamic_batch else None,
        verbose=False,
    )
    assert program is not None, "the dynamo exporter returns a program"
    proto = program.model_proto
    name_nodes_after_layers(proto)
    return proto


def _torchscript(
    model: nn.Module, call: ModelCall, outputs: list[str], opset: int, dynamic_batch: bool
) -> onnx.ModelProto:
    """Exports by tracing: quick and forgiving, but with auxiliary nodes that are removed here."""
    inputs = call.named_tensors()
    names = [*(name for name, tensor in inputs.items() if tensor.dim()), *outputs]
    # The exporter turns defaults of parameters that are not given into tensors (torch 2.11), so it must not see them.
    plain = not call.bound.kwargs and len(call.bound.arguments) == len(call.bound.signature.parameters)
    traced, args = (model, call.bound.args) if plain else (_ByPosition(model, call), tuple(inputs.values()))
    with TemporaryDirectory() as folder:  # a path, not a buffer: above 2 GB the exporter writes several files
        file = Path(folder) / "model.onnx"
        torch.onnx.export(
            traced,
            args,
            str(file),
            input_names=list(inputs),
            output_names=outputs,
            opset_version=opset,
            dynamo=False,
            dynamic_axes={name: {0: "N"} for name in names} if dynamic_batch else None,
            verbose=False,
        )
        proto = onnx.load(str(file))
    remove_identities(proto)
    constants_to_initializers(proto)
    fold_constants(proto)
    return proto


class _ByPosition(nn.Module):
    """The model with the tensors of a call as its only, positional arguments."""

    def __init__(self, model: nn.Module, call: ModelCall) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, *tensors: Tensor) -> object:
        """Puts the tensors where those of the call are, and runs the model."""
        remaining = iter(tensors)
        return self.call.map(lambda leaf: next(remaining) if isinstance(leaf, Tensor) else leaf).run(self.model)


def _cannot_export(model: nn.Module, failures: Mapping[str, str]) -> ExportError:
    reasons = "; ".join(f"{exporter}: {reason}" for exporter, reason in failures.items())
    return ExportError(
        f"{type(model).__name__} cannot be exported to ONNX: {reasons}. Expected a forward without data-dependent "
        "Python control flow or shapes. Rewrite that part of the model, or try dynamic_batch=False."
    )


def first_line(error: BaseException) -> str:
    """Shortens an exporter's error, which can fill pages, to its type and first line."""
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"
