"""What the GPU runtimes tell ONNX Runtime, seen by a stand-in for it: no GPU is needed, and nothing is timed."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from nni_prune_ext.deployment import runtime
from nni_prune_ext.errors import ConfigError, OutputError, RuntimeUnavailableError
from nni_prune_ext.runtimes import onnxruntime_cuda, onnxruntime_tensorrt
from nni_prune_ext.runtimes.base import Array, Availability, RunnableModel

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
X = np.ones((2, 3), np.float32)


class RunOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


class Binding:
    def __init__(self) -> None:
        self.fixed: dict[str, object] = {}

    def bind_ortvalue_input(self, name: str, value: object) -> None:
        self.fixed[name] = value

    def bind_output(self, name: str, device_type: str) -> None:
        self.floating = (name, device_type)

    def bind_ortvalue_output(self, name: str, value: object) -> None:
        self.fixed[name] = value

    def get_outputs(self) -> list[object]:
        return ["where the output lies"]

    def synchronize_outputs(self) -> None: ...


class Session:
    """Remembers how it was opened and run; every node runs on the first provider."""

    opened: ClassVar[Sequence[tuple[str, Mapping[str, str]]]] = ()
    runs: ClassVar[list[tuple[str, str | None, tuple[str, ...]]]] = []

    def __init__(self, content: object, options: SimpleNamespace, *, providers: list, enable_fallback: int) -> None:
        Session.opened, Session.runs = providers, []
        self.options = options

    def get_providers(self) -> list[str]:
        return [name for name, _ in self.opened]

    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="x", type="tensor(float)", shape=["N", 3])]

    def get_outputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="y", type="tensor(float)", shape=["N", 3])]

    def run(self, names: None, feed: Mapping[str, Array], options: RunOptions | None = None) -> list[Array]:
        Session.runs.append(("run", options and options.entries["gpu_graph_id"], ()))
        return [feed["x"]]

    def io_binding(self) -> Binding:
        return Binding()

    def run_with_iobinding(self, binding: Binding, options: RunOptions | None = None) -> None:
        Session.runs.append(("bound", options and options.entries["gpu_graph_id"], tuple(binding.fixed)))

    def end_profiling(self) -> str:
        node = {"provider": self.opened[0][0], "op_name": "Conv", "node_index": "0"}
        path = Path(self.options.profile_file_prefix + ".json")
        path.write_text(json.dumps([{"cat": "Node", "name": "conv", "args": node}]))
        return str(path)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (onnxruntime_cuda, onnxruntime_tensorrt):
        monkeypatch.setattr(module, "provider_availability", lambda _: Availability(True, "It seems so."))
    fake = SimpleNamespace(
        InferenceSession=Session,
        SessionOptions=SimpleNamespace,
        RunOptions=RunOptions,
        OrtValue=SimpleNamespace(ortvalue_from_numpy=lambda array, device, number: device),
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)


@pytest.fixture
def model(tmp_path: Path) -> RunnableModel:
    (tmp_path / "net.onnx").write_bytes(b"not read by the stand-in")
    return RunnableModel(tmp_path / "net.onnx")


def test_without_options_nothing_is_cached_or_captured(model: RunnableModel) -> None:
    plain = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}

    with runtime("onnxruntime-cuda").session(model) as session:
        session.bind([X])()
        cuda = Session.opened
    with runtime("onnxruntime-tensorrt").session(model, precision="fp16"):
        tensorrt = Session.opened

    assert [(CUDA, plain)] == cuda
    assert [(TENSORRT, {"trt_fp16_enable": "1"}), (CUDA, plain)] == tensorrt
    assert {None} == {graph for _, graph, _ in Session.runs}


def test_engines_and_timings_are_kept_in_the_folder_that_was_named(model: RunnableModel, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "engines"

    with runtime("onnxruntime-tensorrt", {"engine_cache": str(folder)}).session(model):
        (name, options), _ = Session.opened

    assert TENSORRT == name
    assert {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    } == options
    assert folder.is_dir()


def test_every_binding_replays_a_graph_of_its_own_on_outputs_that_stay_in_place(model: RunnableModel) -> None:
    with runtime("onnxruntime-cuda", {"cuda_graph": True}).session(model) as session:
        assert "1" == dict(Session.opened)[CUDA]["enable_cuda_graph"]
        first, second = session.bind([X]), session.bind([X])
        Session.runs.clear()
        first()
        second()
        session.run([X])
        timed = list(Session.runs)

    assert [("bound", "1", ("x", "y")), ("bound", "2", ("x", "y")), ("run", "-1", ())] == timed


def test_a_graph_is_captured_before_anything_is_timed(model: RunnableModel) -> None:
    with runtime("onnxruntime-cuda", {"cuda_graph": True}).session(model) as session:
        Session.runs.clear()
        session.bind([X])

    bound = [entry for entry in Session.runs if entry[0] == "bound"]
    assert [("bound", "-1", ("x",)), ("bound", "1", ("x", "y"))] == bound


def test_nodes_on_the_cpu_are_a_fallback_with_graphs_as_well(
    model: RunnableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "get_providers", lambda _: ["CPUExecutionProvider"])

    with (
        pytest.raises(RuntimeUnavailableError, match="silently fell back: it uses CPUExecutionProvider only"),
        runtime("onnxruntime-cuda", {"cuda_graph": True}).session(model),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("onnxruntime-cuda", {"cuda_graph": "yes"}, "cuda_graph of a runtime is 'yes', expected bool"),
        ("onnxruntime-tensorrt", {"engine_cache": 3}, "engine_cache of a runtime is 3, expected str or Path"),
        ("onnxruntime-cuda", {"graph": True}, "no option 'graph', expected one of: cuda_graph"),
        ("onnxruntime-cpu", {"graph": True}, "no option 'graph', expected one of: none"),
    ],
)
def test_a_mistake_in_an_option_is_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        runtime(name, options)


def test_a_folder_for_engines_that_cannot_be_made_is_named(model: RunnableModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(OutputError, match=r"folder for engines '.*file/engines' cannot be made"):
        runtime("onnxruntime-tensorrt", {"engine_cache": str(tmp_path / "file" / "engines")}).session(model)
