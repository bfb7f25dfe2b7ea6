"""ONNX Runtime with TensorRT: engines built on this GPU; what TensorRT does not take runs on CUDA."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from nni_prune_ext.errors import OutputError
from nni_prune_ext.runtimes.base import Availability, InferenceSession, Precision, RunnableModel
from nni_prune_ext.runtimes.onnxruntime_availability import provider_availability
from nni_prune_ext.runtimes.onnxruntime_session import (
    CUDA,
    CUDA_OPTIONS,
    TENSORRT,
    ProviderOptions,
    open_session,
    require_type,
)


class OnnxRuntimeTensorRT:
    """Runs ONNX files with the TensorRT provider, which builds an engine for every new range of input shapes.

    Args:
        engine_cache: A folder for built engines and for the timings of kernels, so that a later session of the same
            file on the same GPU builds nothing. NOT MEASURED.
    """

    name = "onnxruntime-tensorrt"

    def __init__(self, *, engine_cache: str | Path | None = None) -> None:
        if engine_cache is not None:
            require_type("engine_cache", engine_cache, (str, Path))
        self._engine_cache = engine_cache

    def availability(self) -> Availability:
        """Says whether the build, the driver, the CUDA libraries and TensorRT are there."""
        return provider_availability(TENSORRT)

    def session(
        self, source: RunnableModel, *, threads: int | None = 1, precision: Precision = "fp32"
    ) -> AbstractContextManager[InferenceSession]:
        """Loads an ONNX file; see `InferenceRuntime.session`. TensorRT converts to fp16 itself.

        Raises:
            OutputError: If the folder for engines cannot be made.
        """
        half = {"trt_fp16_enable": "1"} if precision == "fp16" else {}
        providers: ProviderOptions = {TENSORRT: {**half, **self._cache_options()}, CUDA: CUDA_OPTIONS}
        return open_session(self, source, providers, threads=threads, half_precision_file=False)

    def _cache_options(self) -> dict[str, str]:
        if self._engine_cache is None:
            return {}
        folder = str(self._engine_cache)
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"The folder for engines '{folder}' cannot be made: {error.strerror or error}. Expected a place that "
                "you may write to. Choose another engine_cache."
            ) from error
        return {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": folder,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": folder,
        }
