"""What the command line reads from ONNX files that it is given."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path


def input_shape(path: Path) -> tuple[int | None, ...]:
    """Returns the input shape of an ONNX file with one input, ``None`` for an open batch size.

    Raises:
        ModelError: it cannot be read as ONNX.
        ConfigError: it has other inputs than one of float32, or more open sizes.
    """
    import onnx  # imported here to keep --help instant

    from nni_prune_ext.errors import ConfigError, ModelError

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
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
            f"The input of '{path}' is {written(sizes)}, expected only the first size to be open. Export the network "
            "with fixed image sizes."
        )
    return tuple(sizes)


def written(shape: Sequence[int | None]) -> str:
    """Returns a shape as text, with N for an open size."""
    return "(" + ", ".join("N" if size is None else str(size) for size in shape) + ")"


def _decode_error() -> type[Exception]:
    """Returns what protobuf, which has no type hints, raises on a file of another kind."""
    error: type[Exception] = import_module("google.protobuf.message").DecodeError
    return error
