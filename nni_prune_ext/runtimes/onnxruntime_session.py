"""Sessions of ONNX Runtime that prove where they run: a fallback to the CPU is an error, never a measurement.

Which provider is *listed* says little: single nodes can still run on the CPU. So the first run of every session is
profiled, and the provider of each node is read from the profile.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Protocol, TypeAlias

import numpy as np
import onnx

from nni_prune_ext.errors import ConfigError, ModelError, RuntimeUnavailableError
from nni_prune_ext.runtimes.base import (
    Array,
    InferenceRuntime,
    InferenceSession,
    ProfiledSession,
    ProfileEvent,
    RunnableModel,
)
from nni_prune_ext.runtimes.onnxruntime_availability import preload_libraries

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

ProviderOptions: TypeAlias = Mapping[str, Mapping[str, str]]
"""Providers in order of preference, each with its options."""

# EXHAUSTIVE search costs seconds per new shape. TF32 is on by default and is not what "fp32" promises.
CUDA_OPTIONS: Mapping[str, str] = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}

_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


_GRAPH_ID = "gpu_graph_id"
_NO_GRAPH = "-1"


def require_type(option: str, value: object, kind: type | tuple[type, ...]) -> None:
    """Refuses an option of a runtime whose value is of another type.

    Raises:
        ConfigError: If it is.
    """
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise ConfigError(
            f"The option {option} of a runtime is {value!r}, expected {' or '.join(own.__name__ for own in kinds)}. "
            "Give another value, or leave it out."
        )


@contextmanager
def open_session(
    runtime: InferenceRuntime,
    source: RunnableModel,
    providers: ProviderOptions,
    *,
    threads: int | None,
    half_precision_file: bool,
    cuda_graph: bool = False,
) -> Iterator[InferenceSession]:
    """Loads an ONNX file and checks that the first provider is in charge of it.

    Where all dimensions but the batch are fixed, the model is run once, so that node placement is known and checked
    from the start; otherwise that happens at the first run.

    Args:
        runtime: The runtime that opens the session.
        source: A model with an ONNX file.
        providers: Providers and options; the first one must run the model, the CPU only arithmetic on shapes.
        threads: CPU threads of one run; None leaves the choice to ONNX Runtime.
        half_precision_file: Convert the file to fp16, with float32 inputs and outputs.
        cuda_graph: Whether the provider was told to capture CUDA graphs; what is bound then has one graph each.

    Raises:
        RuntimeUnavailableError: If the runtime is not usable here or fell back.
        ModelError: If there is no ONNX file, or one that cannot be loaded.
    """
    with _loaded(runtime, source, providers, threads=threads, half_precision_file=half_precision_file) as loaded:
        yield _OnnxRuntimeSession(*loaded, tuple(providers), runtime.name, cuda_graph=cuda_graph)


@contextmanager
def open_profiled(
    runtime: InferenceRuntime, source: RunnableModel, providers: ProviderOptions, *, threads: int | None
) -> Iterator[ProfiledSession]:
    """Loads an ONNX file whose runs are all profiled; arguments and errors are those of ``open_session``."""
    with _loaded(runtime, source, providers, threads=threads, half_precision_file=False) as (_, raw):
        yield _Profiled(raw)


@contextmanager
def _loaded(
    runtime: InferenceRuntime,
    source: RunnableModel,
    providers: ProviderOptions,
    *,
    threads: int | None,
    half_precision_file: bool,
) -> Iterator[tuple[ModuleType, _OrtSession]]:
    availability = runtime.availability()
    if not availability.usable:
        raise RuntimeUnavailableError(
            f"The runtime {runtime.name} cannot be used here. {availability.reason} Expected a working "
            f"{next(iter(providers))}. Install what is missing or choose another runtime."
        )
    path = _existing_file(source, runtime.name)
    onnxruntime = importlib.import_module("onnxruntime")  # not at the top: it is optional
    if CPU not in providers:
        preload_libraries(onnxruntime)
    with TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.enable_profiling = True  # until the session ends it, usually after the first run
        options.profile_file_prefix = str(Path(folder) / "profile")
        content = _half_precision(path) if half_precision_file else str(path)
        try:
            raw: _OrtSession = onnxruntime.InferenceSession(
                content,
                options,
                providers=[(name, dict(settings)) for name, settings in providers.items()],
                enable_fallback=0,
            )
        except load_failures() as error:
            raise ModelError(
                f"The runtime {runtime.name} cannot load '{path}': {error}. Expected an ONNX file whose operators it "
                "implements. Export the model again, with another opset if an operator is missing."
            ) from error
        yield onnxruntime, raw


def _existing_file(source: RunnableModel, runtime_name: str) -> Path:
    if source.onnx_path is None or not source.onnx_path.is_file():
        raise ModelError(
            f"The runtime {runtime_name} needs an ONNX file, but got {source.onnx_path}. Expected "
            "RunnableModel(onnx_path=...) with the path of an existing file. Export the model first with export_onnx."
        )
    return source.onnx_path


def _half_precision(path: Path) -> bytes:
    """Converts a file to fp16 with the converter that comes with ONNX Runtime; inputs and outputs stay float32."""
    converter = importlib.import_module("onnxruntime.transformers.float16")
    model: onnx.ModelProto = converter.convert_float_to_float16(onnx.load(str(path)), keep_io_types=True)
    serialized: bytes = model.SerializeToString()
    return serialized


def load_failures() -> tuple[type[Exception], ...]:
    """Returns ONNX Runtime's exceptions, which have no common base (1.31), and RuntimeError, which TensorRT raises."""
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    own = (value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception))
    return (*own, RuntimeError)


class _Port(Protocol):
    name: str
    type: str
    shape: list[int | str | None]


class _IOBinding(Protocol):
    def bind_ortvalue_input(self, name: str, value: object) -> None: ...
    def bind_output(self, name: str, device_type: str) -> None: ...
    def bind_ortvalue_output(self, name: str, value: object) -> None: ...
    def get_outputs(self) -> Sequence[object]: ...
    def synchronize_outputs(self) -> None: ...


class _OrtSession(Protocol):
    """The part of ``onnxruntime.InferenceSession`` that is used here; the package has no type hints."""

    def get_providers(self) -> list[str]: ...
    def get_inputs(self) -> list[_Port]: ...
    def get_outputs(self) -> list[_Port]: ...
    def run(self, names: None, feed: Mapping[str, Array], options: object = None) -> list[Array]: ...
    def io_binding(self) -> _IOBinding: ...
    def run_with_iobinding(self, binding: _IOBinding, options: object = None) -> None: ...
    def end_profiling(self) -> str: ...


class _Profiled:
    """A loaded ONNX file that profiles until it is told to end."""

    def __init__(self, session: _OrtSession) -> None:
        self._session = session
        self._inputs = [port.name for port in session.get_inputs()]

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        return self._session.run(None, dict(zip(self._inputs, inputs, strict=True)))

    def end(self) -> list[ProfileEvent]:
        events: list[ProfileEvent] = json.loads(Path(self._session.end_profiling()).read_text())
        return events


class _OnnxRuntimeSession:
    """A loaded ONNX file whose placement on providers is checked at the first run."""

    def __init__(
        self,
        onnxruntime: ModuleType,
        session: _OrtSession,
        wanted: tuple[str, ...],
        runtime_name: str,
        *,
        cuda_graph: bool,
    ) -> None:
        self._onnxruntime = onnxruntime
        self._session = session
        self._wanted = wanted
        self._runtime_name = runtime_name
        self._cuda_graph = cuda_graph
        self._num_graphs = 0
        self._placement: Mapping[str, int] | None = None  # unknown before the first run
        self._inputs = [port.name for port in session.get_inputs()]
        self._require(wanted[0] in self.providers, f"it uses {', '.join(self.providers)} only")
        probe = _probe_inputs(session.get_inputs())
        if probe is not None:
            self.run(probe)

    @property
    def device(self) -> str:
        return "cpu" if self._wanted[0] == CPU else "cuda"

    @property
    def providers(self) -> tuple[str, ...]:
        return tuple(self._session.get_providers())

    @property
    def node_placement(self) -> Mapping[str, int]:
        return self._placement or {}

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        outputs = self._session.run(None, self._feed(inputs), self._run_options(_NO_GRAPH))
        if self._placement is None:
            self._check_placement()
        return outputs

    def bind(self, inputs: Sequence[Array]) -> Callable[[], object]:
        feed = self._feed(inputs)
        if self._placement is None:
            self.run(inputs)
        binding = self._session.io_binding()
        for name, array in feed.items():
            binding.bind_ortvalue_input(name, self._onnxruntime.OrtValue.ortvalue_from_numpy(array, self.device, 0))
        for port in self._session.get_outputs():
            binding.bind_output(port.name, self.device)
        options = self._captured(binding) if self._cuda_graph else None

        def run_once() -> None:
            self._session.run_with_iobinding(binding, options)
            binding.synchronize_outputs()

        return run_once

    def _captured(self, binding: _IOBinding) -> object:
        """Gives a binding outputs that stay where they are, and a graph of its own; returns the options that name it.

        A graph replays addresses and shapes, so every binding needs its own number; 0 is reserved.
        """
        self._session.run_with_iobinding(binding, self._run_options(_NO_GRAPH))
        for port, value in zip(self._session.get_outputs(), binding.get_outputs(), strict=True):
            binding.bind_ortvalue_output(port.name, value)
        self._num_graphs += 1
        options = self._run_options(str(self._num_graphs))
        self._session.run_with_iobinding(binding, options)
        return options

    def _run_options(self, graph: str) -> object:
        """Returns the options of a run with a graph, or ``None`` where there are no graphs."""
        if not self._cuda_graph:
            return None
        options = self._onnxruntime.RunOptions()
        options.add_run_config_entry(_GRAPH_ID, graph)
        return options

    def _feed(self, inputs: Sequence[Array]) -> dict[str, Array]:
        if len(inputs) != len(self._inputs):
            raise ModelError(
                f"The ONNX model got {len(inputs)} arrays, expected {len(self._inputs)}: {', '.join(self._inputs)}. "
                "Pass one array per input, in this order."
            )
        # Binding needs contiguous memory; ascontiguousarray would give scalars a dimension.
        return {name: np.asarray(array, order="C") for name, array in zip(self._inputs, inputs, strict=True)}

    def _check_placement(self) -> None:
        """Ends the profile of the first run and refuses nodes that compute on the CPU instead of the device."""
        self._placement, fallen_back = _read_profile(Path(self._session.end_profiling()))
        if self._wanted[0] == CPU:
            return
        some = ", ".join(fallen_back[:5])
        self._require(not fallen_back, f"{len(fallen_back)} nodes ran on the CPU ({some})")
        self._require(self._wanted[0] in self._placement, f"no node ran on {self._wanted[0]}")

    def _require(self, condition: bool, seen: str) -> None:
        if not condition:
            raise RuntimeUnavailableError(
                f"The runtime {self._runtime_name} silently fell back: {seen}. Expected the model to run on "
                f"{self._wanted[0]}. Measure it with another runtime, or replace these operations in the model."
            )


def _probe_inputs(ports: Sequence[_Port]) -> list[Array] | None:
    """Returns zeros of batch size one for every input, or None if other sizes are open or types are unusual."""
    shapes = [[1 if index == 0 and not isinstance(n, int) else n for index, n in enumerate(p.shape)] for p in ports]
    fixed = [[n for n in shape if isinstance(n, int)] for shape in shapes]
    if fixed != shapes or any(port.type not in _NUMPY_TYPES for port in ports):
        return None
    return [np.zeros(shape, _NUMPY_TYPES[port.type]) for shape, port in zip(fixed, ports, strict=True)]


def _read_profile(path: Path) -> tuple[Mapping[str, int], list[str]]:
    """Counts the nodes of each provider in a profile, and names those that computed on the CPU.

    Integers and booleans on the CPU are arithmetic on shapes, which ONNX Runtime keeps there on purpose.
    """
    events = [e for e in json.loads(path.read_text()) if e.get("cat") == "Node" and "provider" in e["args"]]
    # A node in a loop occurs several times.
    nodes = {(e["name"], e["args"].get("node_index")): e["args"] for e in events}.values()
    placement = Counter(node["provider"] for node in nodes)
    on_cpu = [node for node in nodes if node["provider"] == CPU]
    return dict(placement), [node["op_name"] for node in on_cpu if not _works_on_shapes(node)]


def _works_on_shapes(node: Mapping[str, object]) -> bool:
    """Says whether a profiled node only reads shapes, or reads and writes nothing but integers and booleans."""
    if node["op_name"] in {"Shape", "Size"}:
        return True
    types = json.dumps([node.get("input_type_shape", []), node.get("output_type_shape", [])])
    return "float" not in types and "double" not in types
