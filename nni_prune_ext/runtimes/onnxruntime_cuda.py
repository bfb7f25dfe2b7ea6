"""ONNX Runtime with CUDA: NVIDIA GPUs, kernels of cuDNN."""

from __future__ import annotations

from contextlib import AbstractContextManager

from nni_prune_ext.runtimes.base import Availability, InferenceSession, Precision, RunnableModel
from nni_prune_ext.runtimes.onnxruntime_availability import provider_availability
from nni_prune_ext.runtimes.onnxruntime_session import CUDA, CUDA_OPTIONS, ProviderOptions, open_session, require_type


class OnnxRuntimeCuda:
    """Runs ONNX files with the CUDA provider, in true float32 (no TF32) or in fp16.

    Args:
        cuda_graph: Capture the kernels of one run per set of bound inputs as a CUDA graph, and replay it. All nodes
            must run on CUDA, none of them with control flow. NOT MEASURED.
    """

    name = "onnxruntime-cuda"

    def __init__(self, *, cuda_graph: bool = False) -> None:
        require_type("cuda_graph", cuda_graph, bool)
        self._cuda_graph = cuda_graph

    def availability(self) -> Availability:
        """Says whether the build, the driver and the CUDA libraries are there."""
        return provider_availability(CUDA)

    def session(
        self, source: RunnableModel, *, threads: int | None = 1, precision: Precision = "fp32"
    ) -> AbstractContextManager[InferenceSession]:
        """Loads an ONNX file; see `InferenceRuntime.session`."""
        graph = {"enable_cuda_graph": "1"} if self._cuda_graph else {}
        providers: ProviderOptions = {CUDA: {**CUDA_OPTIONS, **graph}}
        return open_session(
            self,
            source,
            providers,
            threads=threads,
            half_precision_file=precision == "fp16",
            cuda_graph=self._cuda_graph,
        )
