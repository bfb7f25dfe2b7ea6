"""ONNX files and artefact folders as arguments of a command: which files, and what they can be run on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path


def named_files(networks: Sequence[Path]) -> dict[str, Path]:
    """Returns the ONNX file of every network by a name that is as short as it can be."""
    from nni_prune_ext.errors import ConfigError  # imported here to keep --help instant
    from nni_prune_ext.export.artefact_folder import ONNX
    from nni_prune_ext.export.manifest import checked_manifest

    files: dict[str, Path] = {}
    last = [path.name for path in networks]
    for path in networks:
        if path.is_dir():
            checked_manifest(path, needed=(ONNX,))
        elif not path.is_file():
            raise ConfigError(f"There is nothing at '{path}'. Expected an artefact folder or an ONNX file.")
        name = path.name if path.name and last.count(path.name) == 1 else str(path)
        if name in files:
            raise ConfigError(f"'{path}' was given twice, expected different networks. Name each of them once.")
        files[name] = path / ONNX if path.is_dir() else path
    return files


def common_shape(files: Mapping[str, Path], batches: Sequence[int]) -> tuple[int | None, ...]:
    """Returns the input shape that all files share.

    Raises:
        ConfigError: they differ, or one cannot be run at a batch size that was asked for.
    """
    from nni_prune_ext.errors import ConfigError  # imported here to keep --help instant

    shapes = {name: _input_shape(path) for name, path in files.items()}
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
    """Returns a shape as text, with N for the open batch."""
    return "(" + ", ".join("N" if size is None else str(size) for size in shape) + ")"


def _input_shape(path: Path) -> tuple[int | None, ...]:
    import onnx  # imported here to keep --help instant

    from nni_prune_ext.errors import ConfigError, ModelError

    try:
        graph = onnx.load(str(path), format="protobuf", load_external_data=False).graph
    except (OSError, ValueError, _decode_error()) as error:
        raise ModelError(
            f"'{path}' cannot be read as ONNX ({error}). Expected what `nni-prune-ext export` makes."
        ) from error
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


def _decode_error() -> type[Exception]:
    """Returns what protobuf, which has no type hints, raises on a file of another kind."""
    error: type[Exception] = import_module("google.protobuf.message").DecodeError
    return error
