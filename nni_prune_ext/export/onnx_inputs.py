"""ONNX files and artefact folders that somebody names: which networks they are, and what these take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TypeAlias

import onnx

from nni_prune_ext.errors import ConfigError, ModelError
from nni_prune_ext.export.artefact_folder import ONNX
from nni_prune_ext.export.manifest import checked_manifest

Shape: TypeAlias = tuple[int | None, ...]
"""Sizes of an input; the first one is ``None`` where the batch is open."""
_DecodeError: type[Exception] = import_module("google.protobuf.message").DecodeError  # it has no type hints


def named_networks(paths: Sequence[Path]) -> dict[str, Path]:
    """Returns artefact folders and ONNX files by names that are as short as they can be.

    Raises:
        ConfigError: nothing is there, or a network is given twice.
    """
    names: dict[str, Path] = {}
    last = [path.name for path in paths]
    for path in paths:
        if not path.is_dir() and not path.is_file():
            raise ConfigError(f"There is nothing at '{path}'. Expected an artefact folder or an ONNX file.")
        name = path.name if path.name and last.count(path.name) == 1 else str(path)
        if name in names:
            raise ConfigError(f"'{path}' was given twice, expected different networks. Name each of them once.")
        names[name] = path
    return names


def onnx_file(path: Path) -> Path:
    """Returns the ONNX file of an artefact folder, checked against its manifest, or the file itself.

    Raises:
        ArtefactError: the folder is damaged.
    """
    if not path.is_dir():
        return path
    checked_manifest(path, needed=(ONNX,))
    return path / ONNX


def loaded_graph(path: Path) -> onnx.ModelProto:
    """Reads an ONNX file without weights that lie beside it.

    Raises:
        ModelError: it cannot be read as ONNX.
    """
    try:
        return onnx.load(str(path), format="protobuf", load_external_data=False)  # whatever the file is called
    except (OSError, ValueError, _DecodeError) as error:
        raise ModelError(
            f"'{path}' cannot be read as ONNX ({error}). Expected what `nni-prune-ext export` makes."
        ) from error


def input_shape(path: Path) -> Shape:
    """Returns the input shape of an ONNX file with one input.

    Raises:
        ModelError: it cannot be read as ONNX.
        ConfigError: it has other inputs than one of float32, or more open sizes.
    """
    graph = loaded_graph(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [port.type.tensor_type for port in graph.input if port.name not in weights]
    if len(inputs) != 1 or inputs[0].elem_type != onnx.TensorProto.FLOAT:
        raise ConfigError(
            f"'{path}' has {len(inputs)} inputs, expected one of float32: that is what this command can make up. "
            "Measure other networks with nni_prune_ext.evaluation.measure_latency."
        )
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in inputs[0].shape.dim]
    if not sizes or None in sizes[1:]:
        raise ConfigError(
            f"The input of '{path}' is {written_shape(sizes)}, expected only the first size to be open. Export the "
            "network with fixed image sizes."
        )
    return tuple(sizes)


def common_shape(shapes: Mapping[str, Shape], batches: Sequence[int]) -> Shape:
    """Returns the input shape that all networks share.

    Raises:
        ConfigError: they differ, or one cannot be run at a batch size that was asked for.
    """
    (first, expected), *others = shapes.items()
    for name, shape in others:
        if shape[1:] != expected[1:]:
            raise ConfigError(
                f"'{name}' takes inputs of {written_shape(shape)}, but '{first}' of {written_shape(expected)}. "
                "Expected one input shape for all. Compare them in separate runs."
            )
    fixed = {shape[0]: name for name, shape in shapes.items() if shape[0] is not None}
    for size, name in fixed.items():
        if set(batches) != {size}:
            raise ConfigError(
                f"'{name}' takes a batch of {size} only, but --batch is {', '.join(map(str, batches))}. Expected "
                f"--batch {size} alone. Ask for that, or export the network with an open batch."
            )
    return (next(iter(fixed), None), *expected[1:])


def written_shape(shape: Sequence[int | None]) -> str:
    """Returns a shape as text, with N for an open size."""
    return "(" + ", ".join("N" if size is None else str(size) for size in shape) + ")"
