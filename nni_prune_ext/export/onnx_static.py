"""Writes a model as one ONNX file that a bare ONNX Runtime can run, and proves it equal to PyTorch.

The file keeps PyTorch's names of layers and weights, tells where it comes from, and holds nothing of the machine
that wrote it. It appears under its name only when it is complete and checked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import onnx
from torch import nn

from nni_prune_ext.errors import ExportError, ModelError, OutputError, ParityError
from nni_prune_ext.export.artefact_folder import disk_full
from nni_prune_ext.export.exporters import ExporterName, export_graph, first_line
from nni_prune_ext.export.frozen_model import evaluation_mode, exportable_form
from nni_prune_ext.export.model_call import ModelCall, as_call, named_leaves
from nni_prune_ext.export.parity import FAIL, ParityReport, check_parity
from nni_prune_ext.export.provenance import provenance
from nni_prune_ext.export.unaligned_widths import unaligned_convolutions, unaligned_sentence
from nni_prune_ext.export.weight_masks import not_finite
from nni_prune_ext.inputs import ExampleInputs

_log = logging.getLogger(__name__)

ONE_FILE_LIMIT_BYTES = 1_500_000_000
"""Weights above this go to a second file, ``<name>.data``: a protobuf message cannot exceed 2 GB."""


@dataclass(frozen=True)
class ExportResult:
    """A written ONNX file.

    Attributes:
        path: The file.
        data_path: The file beside it with the weights, if they did not fit into one.
        exporter: The exporter that wrote it.
        fallback_reason: Why the first exporter failed, if the second one had to step in.
        properties: The metadata in the file, with prefixed names.
        parity: The comparison with PyTorch, or None if `check` was off.
        size_bytes: Size of the file, with the weights beside it.
        unaligned: Convolutions that miss ONNX Runtime's fast layout on the CPU, with their input channels; a warning
            is logged if there are any.
    """

    path: Path
    data_path: Path | None
    exporter: ExporterName
    fallback_reason: str | None
    properties: Mapping[str, str]
    parity: ParityReport | None
    size_bytes: int
    unaligned: Mapping[str, int]


def export_onnx(
    model: nn.Module,
    example_inputs: ExampleInputs,
    path: Path,
    *,
    opset: int = 18,
    dynamic_batch: bool = True,
    exporter: ExporterName | Literal["auto"] = "auto",
    properties: Mapping[str, str] | None = None,
    check: bool = True,
    given_inputs: Sequence[ExampleInputs] | None = None,
    fail: float = FAIL,
) -> ExportResult:
    """Writes the model in eval mode as ONNX; the model is left as it was.

    Args:
        model: The model. Submodules that offer ``for_export()`` are written as what that method returns.
        example_inputs: Inputs on the device of the model.
        path: Where the file goes; an older file there is replaced only by a complete and checked one.
        opset: ONNX operator set.
        dynamic_batch: Leave the first dimension of every input open, under the name ``N``.
        exporter: ``auto`` tries dynamo and falls back to TorchScript.
        properties: Further metadata for the file (``plan``, ``method``, …), without prefix.
        check: Compare the file with PyTorch on ONNX Runtime's CPU.
        given_inputs: Real inputs for that comparison, beside random ones.
        fail: Largest relative difference that the comparison lets pass.

    Raises:
        ModelError: If the model does not run on the example inputs.
        ExportError: If no exporter can write the model.
        ParityError: If the file's outputs differ from PyTorch's.
        OutputError: If the file cannot be written.

    Example:
        >>> from tempfile import mkdtemp
        >>> import torch
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        >>> path = Path(mkdtemp()) / "model.onnx"
        >>> export_onnx(model, torch.zeros(1, 3, 2, 2), path, exporter="torchscript").parity.passed
        True
    """
    path = Path(path)
    call = as_call(model, example_inputs)
    with evaluation_mode(model), temporary_folder_beside(path) as folder:
        outputs = _output_names(model, call)
        with exportable_form(model) as exportable:
            proto, used, reason = export_graph(
                exportable, call, outputs=outputs, exporter=exporter, opset=opset, dynamic_batch=dynamic_batch
            )
        written = provenance(
            model, call.named_tensors(), opset=opset, exporter=used, extra={} if properties is None else properties
        )
        onnx.helper.set_model_props(proto, written)
        draft = folder / path.name
        write_graph(proto, draft, type(model).__name__)
        parity = None
        if check:
            parity = check_parity(model, draft, example_inputs, given_inputs=given_inputs, fail=fail)
            _require_parity(parity, model, fail)
        size_bytes = sum(part.stat().st_size for part in folder.iterdir())
        data_path = publish(folder, path)
    unaligned = unaligned_convolutions(model)
    if unaligned:
        _log.warning("%s", unaligned_sentence(unaligned))
    return ExportResult(path, data_path, used, reason, written, parity, size_bytes, unaligned)


def published(proto: onnx.ModelProto, path: Path, model: nn.Module) -> int:
    """Writes a checked graph under its name, complete or not at all; returns its size in bytes.

    Raises:
        ExportError: the graph is not valid ONNX.
        OutputError: the file cannot be written.
    """
    with temporary_folder_beside(path) as folder:
        write_graph(proto, folder / path.name, type(model).__name__)
        size_bytes = sum(part.stat().st_size for part in folder.iterdir())
        publish(folder, path)
    return size_bytes


@contextmanager
def temporary_folder_beside(path: Path) -> Iterator[Path]:
    """Yields a folder on the file system of the target, so that moving a file out of it is atomic."""
    try:
        folder = TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        if disk_full(error):
            raise _no_space(path, error) from error
        raise OutputError(
            f"The ONNX file cannot be written to '{path}': {error.strerror}. Expected an existing folder with "
            "permission to write. Create the folder or choose another path."
        ) from error
    with folder as name:
        yield Path(name)


def _output_names(model: nn.Module, call: ModelCall) -> list[str]:
    """Runs the model once and names its output tensors after their place."""
    try:
        result = call.run(model)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        shapes = {name: tuple(tensor.shape) for name, tensor in call.named_tensors().items()}
        raise ModelError(
            f"{type(model).__name__} does not run on the example inputs {shapes}: {error}. Expected inputs that the "
            "model accepts, on its device. Pass inputs with which model(...) works."
        ) from error
    names = [name for name, _ in named_leaves(result, "output")]
    # Values of a graph share one name space: an output must not be called like an input.
    return [f"{name}_" if name in call.named_tensors() else name for name in names]


def write_graph(proto: onnx.ModelProto, draft: Path, name: str) -> None:
    """Writes a graph into a temporary folder, with large weights in a second file, and lets onnx check the result.

    Args:
        name: what messages call the network.

    Raises:
        ExportError: the graph is not valid ONNX.
        OutputError: the file cannot be written.
    """
    weights_bytes = sum(tensor.ByteSize() for tensor in proto.graph.initializer)
    external = weights_bytes > ONE_FILE_LIMIT_BYTES
    try:
        onnx.save_model(proto, str(draft), save_as_external_data=external, location=_data_path(draft).name)
        onnx.checker.check_model(str(draft))
    except onnx.checker.ValidationError as error:
        raise ExportError(
            f"The exported graph of {name} is not valid ONNX: {first_line(error)}. Expected a graph "
            'that onnx.checker accepts. Try the other exporter with exporter="torchscript" or exporter="dynamo".'
        ) from error
    except OSError as error:
        if disk_full(error):
            raise _no_space(draft.parent.parent / draft.name, error) from error
        raise OutputError(
            f"Writing the ONNX file to '{draft.parent.parent}' failed: {error.strerror}. Expected a folder that takes "
            f"{weights_bytes:,} bytes. Choose another path."
        ) from error


def _no_space(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"The ONNX file cannot be written to '{path}': no space left ({error.strerror}). Expected room for the "
        "weights; an older file there is as it was. Make space on that disk and export again, or choose another path."
    )


def _require_parity(parity: ParityReport, model: nn.Module, fail: float) -> None:
    if parity.not_finite:
        raise ParityError(
            f"{type(model).__name__} itself computes NaN or infinity in PyTorch, for {parity.not_finite} of "
            f"{parity.num_inputs} inputs; {_not_finite_weights(model)}. Expected finite outputs: an ONNX file cannot "
            "be compared with anything else, and was not kept. Train again with a smaller learning rate, or go back to "
            "weights from before training diverged."
        )
    if not parity.passed:
        raise ParityError(
            f"The ONNX file of {type(model).__name__} does not compute what PyTorch computes: relative difference "
            f"{parity.max_rel:.3g} over {parity.num_inputs} inputs, expected at most {fail:g}. The file was not kept. "
            "Try another exporter or opset; if the model before pruning differs as much, pass a larger fail=."
        )


def _not_finite_weights(model: nn.Module) -> str:
    found = not_finite(dict(model.named_parameters()))
    if not found:
        return "its weights are finite, so they are too large, or a layer divides by zero"
    return "its weights hold such values: " + ", ".join(f"{count:,} in '{name}'" for name, count in found.items())


def publish(folder: Path, path: Path) -> Path | None:
    """Moves the finished files to their place, the one that refers to the other last."""
    data_path = _data_path(path)
    has_data = (folder / data_path.name).exists()
    try:
        if has_data:
            (folder / data_path.name).replace(data_path)
        (folder / path.name).replace(path)
    except OSError as error:
        raise OutputError(
            f"The ONNX file cannot be written to '{path}': {error.strerror}. Expected the name of a new file, or of "
            "one to replace. Choose another path."
        ) from error
    return data_path if has_data else None


def _data_path(path: Path) -> Path:
    return path.with_name(path.name + ".data")
