"""The latency of a cut network on a runtime, as a multiple of the dense one's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from torch import nn

from nni_prune_ext.deployment import runtime
from nni_prune_ext.evaluation import measure_latency
from nni_prune_ext.export.onnx_static import export_onnx
from nni_prune_ext.inputs import ExampleInputs, tensors_in
from nni_prune_ext.runtimes.base import RunnableModel
from nni_prune_ext.sensitivity.measuring import Latency


@contextmanager
def latency_on(
    name: str, dense: nn.Module, example_inputs: ExampleInputs, *, threads: int = 1, rounds: int = 20
) -> Iterator[Latency]:
    """Yields the ``latency`` of ``measure_sensitivity``: each network is exported and timed beside the dense one.

    Args:
        name: registered runtime.
        dense: the network that others are compared with.
        threads: CPU threads of one run.
        rounds: in which both take turns.

    Raises:
        RuntimeUnavailableError: the runtime cannot be used here.
        ExportError, ParityError: a network cannot be written as ONNX.
    """
    chosen = runtime(name)
    inputs = [np.ascontiguousarray(tensor.detach().cpu().numpy()) for tensor in tensors_in(example_inputs)]
    with TemporaryDirectory() as folder:
        reference = Path(folder) / "dense.onnx"
        export_onnx(dense, example_inputs, reference)

        def ratio(model: nn.Module) -> float:
            path = Path(folder) / "cut.onnx"
            export_onnx(model, example_inputs, path)
            entries = {
                "dense": (chosen, RunnableModel(onnx_path=reference)),
                "cut": (chosen, RunnableModel(onnx_path=path)),
            }
            return measure_latency(entries, [inputs], rounds=rounds, min_seconds=0.0, threads=threads).rows[1].ratio

        yield Latency(f"{name}, {threads} threads", ratio)
