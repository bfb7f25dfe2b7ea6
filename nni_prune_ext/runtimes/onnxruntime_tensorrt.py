"""ONNX Runtime with TensorRT: engines built on this GPU; what TensorRT does not take runs on CUDA."""

from __future__ import annotations

from contextlib import AbstractContextManager

from nni_prune_ext.runtimes.base import Availability, InferenceSession, Precision, RunnableModel
from nni_prune_ext.runtimes.onnxruntime_availability import provider_availability
from nni_prune_ext.runtimes.onnxruntime_session import CUDA, CUDA_OPTIONS, TENSORRT, ProviderOptions, open_session


class OnnxRuntimeTensorRT:
    """Runs ONNX files with the TensorRT provider, which builds an engine for every new range of input shapes."""

    name = "onnxruntime-tensorrt"

    def availability(self) -> Availability:
        """Says whether the build, the driver, the CUDA libraries and TensorRT are there."""
        return provider_availability(TENSORRT)

    def session(
        self, source: RunnableModel, *, threads: int | None = 1, precision: Precision = "fp32"
    ) -> AbstractContextManager[InferenceSession]:
        """Loads an ONNX file; see `InferenceRuntime.session`. TensorRT converts to fp16 itself."""
        tensorrt_options = {"trt_fp16_enable": "1"} if precision == "fp16" else {}
        providers: ProviderOptions = {TENSORRT: tensorrt_options, CUDA: CUDA_OPTIONS}
        return open_session(self, source, providers, threads=threads, half_precision_file=False)
