"""Why a provider of ONNX Runtime works on this machine or not, in one sentence.

ONNX Runtime itself does not say: it lists providers that cannot be loaded and then runs on the CPU with a line on
stderr. So the provider is tried on a one-node model.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType

from onnx import TensorProto, helper

from nni_prune_ext.runtimes.base import Availability

_CPU = "CPUExecutionProvider"


@cache
def provider_availability(provider: str) -> Availability:
    """Says whether ONNX Runtime can run a model with the provider here; the answer is kept for the process."""
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError as error:
        return Availability(False, f"onnxruntime cannot be imported ({error}); install onnxruntime or onnxruntime-gpu.")
    if provider not in onnxruntime.get_available_providers():
        return Availability(
            False, f"onnxruntime {onnxruntime.__version__} was built without {provider}; install onnxruntime-gpu."
        )
    if provider == _CPU:
        return Availability(True, f"onnxruntime {onnxruntime.__version__} is installed.")
    no_driver = _why_no_driver()
    if no_driver:
        return Availability(False, f"There is no usable NVIDIA driver: {no_driver}.")
    preload_libraries(onnxruntime)
    failure = _why_not_loadable(onnxruntime, provider)
    if failure:
        return Availability(False, f"{provider} cannot be loaded: {failure}.")
    return Availability(True, f"onnxruntime {onnxruntime.__version__} runs {provider} on this machine's GPU.")


def preload_libraries(onnxruntime: ModuleType) -> None:
    """Loads the CUDA, cuDNN and TensorRT libraries that pip installed, where the linker would not look."""
    if hasattr(onnxruntime, "preload_dlls"):  # from 1.21
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            onnxruntime.preload_dlls()
    if importlib.util.find_spec("tensorrt_libs"):
        importlib.import_module("tensorrt_libs")


def _why_no_driver() -> str | None:
    """Asks the driver for its devices; returns why it has none."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError as error:
        return str(error)
    code = int(driver.cuInit(0))
    if code:
        return f"cuInit failed with code {code}"
    count = ctypes.c_int(0)
    driver.cuDeviceGetCount(ctypes.byref(count))
    return None if count.value else "it lists no GPU"


def _why_not_loadable(onnxruntime: ModuleType, provider: str) -> str | None:
    """Opens a session on a one-node model; returns what ONNX Runtime says if the provider is not in it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    message = ""
    with _native_stderr() as read:
        try:
            session = onnxruntime.InferenceSession(_one_node(), options, providers=[provider], enable_fallback=0)
            if provider in session.get_providers():
                return None
        except RuntimeError as error:  # TensorRT raises where CUDA falls back
            message = str(error)
        text = read()
    missing = re.search(r"with error: ([^\n]+)", text)
    lines = (message or text).strip().splitlines() or ["ONNX Runtime fell back to the CPU without saying why"]
    return (missing.group(1) if missing else lines[-1]).rstrip(". ")


def _one_node() -> bytes:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "one_node", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    serialized: bytes = model.SerializeToString()
    return serialized


@contextlib.contextmanager
def _native_stderr() -> Iterator[Callable[[], str]]:
    """Catches what native code writes to file descriptor 2, which Python's redirect_stderr does not see."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:

        def read() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        os.dup2(file.fileno(), 2)
        try:
            yield read
        finally:
            os.dup2(saved, 2)
            os.close(saved)
