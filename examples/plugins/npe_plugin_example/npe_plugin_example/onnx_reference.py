"""A runtime: ONNX's own evaluator in NumPy, slow and exact, for checking others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import onnx
from onnx.reference import ReferenceEvaluator

from nni_prune_ext.errors import ModelError
from nni_prune_ext.runtimes.base import Array, Availability, InferenceSession, Precision, RunnableModel


class OnnxReference:
    """Runs ONNX files with ``onnx.reference``, in float32 whatever precision is asked for."""

    name = "onnx-reference"

    def availability(self) -> Availability:
        """Says that it works wherever ONNX is installed."""
        return Availability(True, f"ONNX {onnx.__version__} brings its reference evaluator.")

    @contextmanager
    def session(
        self, source: RunnableModel, *, threads: int | None = 1, precision: Precision = "fp32"
    ) -> Iterator[InferenceSession]:
        """Loads an ONNX file."""
        if source.onnx_path is None:
            raise ModelError("The runtime onnx-reference needs an ONNX file, got none. Export the model first.")
        yield _Session(ReferenceEvaluator(str(source.onnx_path)))


class _Session:
    """What is loaded; the properties say where it runs."""

    providers = ("NumPy",)
    device = "cpu"

    def __init__(self, evaluator: ReferenceEvaluator) -> None:
        self.evaluator = evaluator
        self.node_placement: Mapping[str, int] = {"NumPy": len(evaluator.rt_nodes_)}

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        outputs: list[Array] = self.evaluator.run(None, dict(zip(self.evaluator.input_names, inputs)))
        return outputs

    def bind(self, inputs: Sequence[Array]) -> Callable[[], object]:
        return lambda: self.run(inputs)
