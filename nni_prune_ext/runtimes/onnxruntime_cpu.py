"""ONNX Runtime on the CPU: the portable reference."""

from __future__ import annotations

from contextlib import AbstractContextManager

from nni_prune_ext.runtimes.base import (
    Availability,
    InferenceSession,
    Precision,
    ProfiledSession,
    RunnableModel,
)
from nni_prune_ext.runtimes.onnxruntime_availability import provider_availability
from nni_prune_ext.runtimes.onnxruntime_session import CPU, ProviderOptions, open_profiled, open_session


class OnnxRuntimeCpu:
    """Runs ONNX files with the CPU provider; fp16 works, but is slower than fp32 for lack of fp16 kernels."""

    name = "onnxruntime-cpu"

    def availability(self) -> Availability:
        """Says whether onnxruntime is installed."""
        return provider_availability(CPU)

    def session(
        self, source: RunnableModel, *, threads: int | None = 1, precision: Precision = "fp32"
    ) -> AbstractContextManager[InferenceSession]:
        """Loads an ONNX file; see `InferenceRuntime.session`."""
        providers: ProviderOptions = {CPU: {}}
        return open_session(self, source, providers, threads=threads, half_precision_file=precision == "fp16")

    def profiled(self, source: RunnableModel, *, threads: int | None = 1) -> AbstractContextManager[ProfiledSession]:
        """Loads an ONNX file whose runs are recorded node by node."""
        return open_profiled(self, source, {CPU: {}}, threads=threads)
