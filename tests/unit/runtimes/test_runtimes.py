"""Every runtime either runs the model where it says, or says in a sentence why it cannot."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime  # type: ignore[import-untyped, unused-ignore]
import pytest
import torch
from onnx import TensorProto, helper, save_model
from torch import nn

from nni_prune_ext.errors import ModelError, RuntimeUnavailableError
from nni_prune_ext.runtimes import onnxruntime_availability, onnxruntime_cuda
from nni_prune_ext.runtimes.base import Availability, InferenceRuntime, Precision, RunnableModel
from nni_prune_ext.runtimes.onnxruntime_availability import provider_availability
from nni_prune_ext.runtimes.onnxruntime_cpu import OnnxRuntimeCpu
from nni_prune_ext.runtimes.onnxruntime_cuda import OnnxRuntimeCuda
from nni_prune_ext.runtimes.onnxruntime_session import _read_profile
from nni_prune_ext.runtimes.onnxruntime_tensorrt import OnnxRuntimeTensorRT
from nni_prune_ext.runtimes.torch_eager import TorchEager

X = np.asarray([[1.0, -2.0, 3.0]], np.float32)
without_gpu = pytest.mark.skipif(OnnxRuntimeCuda().availability().usable, reason="this machine has a GPU")


@pytest.fixture
def doubler(tmp_path: Path) -> RunnableModel:
    """The same function, 2 * relu(x), in both forms."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3]) for name in ("x", "y"))
    two = helper.make_tensor("two", TensorProto.FLOAT, [], [2.0])
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Mul", ["r", "two"], ["y"])]
    model = helper.make_model(
        helper.make_graph(nodes, "doubler", [x], [y], [two]), opset_imports=[helper.make_opsetid("", 18)], ir_version=8
    )
    save_model(model, str(tmp_path / "doubler.onnx"))
    module = nn.Sequential(nn.ReLU(), nn.Linear(3, 3, bias=False))
    module[1].weight.data = 2 * torch.eye(3)
    return RunnableModel(tmp_path / "doubler.onnx", module)


@pytest.mark.parametrize("runtime", [TorchEager(), OnnxRuntimeCpu()], ids=lambda runtime: runtime.name)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_cpu_runtimes_compute_the_function_at_any_batch_size(
    runtime: InferenceRuntime, precision: Precision, doubler: RunnableModel
) -> None:
    with runtime.session(doubler, precision=precision) as session:
        (single,) = session.run([X])
        (several,) = session.run([np.repeat(X, 4, axis=0)])
        session.bind([X])()

        assert np.float32 == single.dtype
        assert [[2.0, 0.0, 6.0]] == single.tolist()
        assert (4, 3) == several.shape
        assert "cpu" == session.device


def test_nodes_are_counted_by_the_provider_that_ran_them(doubler: RunnableModel) -> None:
    with OnnxRuntimeCpu().session(doubler) as session:
        assert {"CPUExecutionProvider": 2} == session.node_placement
        assert ("CPUExecutionProvider",) == session.providers


def test_a_session_leaves_no_profile_behind(
    doubler: RunnableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with OnnxRuntimeCpu().session(doubler) as session:
        session.run([X])

    assert ["doubler.onnx"] == [file.name for file in tmp_path.iterdir()]


@without_gpu
@pytest.mark.parametrize("runtime", [OnnxRuntimeCuda(), OnnxRuntimeTensorRT()], ids=lambda runtime: runtime.name)
def test_gpu_runtimes_say_why_they_cannot_run_and_refuse_to(runtime: InferenceRuntime, doubler: RunnableModel) -> None:
    availability = runtime.availability()

    assert not availability.usable
    assert availability.reason.endswith(".")
    with pytest.raises(RuntimeUnavailableError, match="cannot be used here"), runtime.session(doubler):
        pass


@without_gpu
def test_a_listed_provider_that_falls_back_is_refused(doubler: RunnableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_cuda, "provider_availability", lambda _: Availability(True, "It seems so."))

    with (
        pytest.raises(RuntimeUnavailableError, match="silently fell back: it uses CPUExecutionProvider only"),
        OnnxRuntimeCuda().session(doubler),
    ):
        pass


@without_gpu
def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_availability, "_why_no_driver", lambda: None)

    availability = provider_availability.__wrapped__("CUDAExecutionProvider")

    assert not availability.usable
    assert "cannot open shared object file" in availability.reason or "built without" in availability.reason


def test_a_provider_that_is_not_in_the_build_is_named() -> None:
    availability = provider_availability("MadeUpExecutionProvider")

    expected = f"onnxruntime {onnxruntime.__version__} was built without MadeUpExecutionProvider"
    assert availability.reason.startswith(expected)


def test_a_missing_onnxruntime_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    availability = provider_availability.__wrapped__("CPUExecutionProvider")

    assert not availability.usable
    assert availability.reason.startswith("onnxruntime cannot be imported")


def profile_of(path: Path, *nodes: tuple[str, str, str, str]) -> Path:
    """Writes a profile with nodes of (operator, provider, input type, output type)."""
    events = [
        {
            "cat": "Node",
            "name": f"{op}_{index}_kernel_time",
            "args": {
                "op_name": op,
                "provider": provider,
                "node_index": str(index),
                "input_type_shape": [{read: [1]}],
                "output_type_shape": [{written: [1]}],
            },
        }
        for index, (op, provider, read, written) in enumerate(nodes)
    ]
    path.write_text(json.dumps([{"cat": "Session", "name": "model_run", "args": {}}, *events, *events]))
    return path


def test_arithmetic_on_shapes_may_stay_on_the_cpu_and_nothing_else(tmp_path: Path) -> None:
    path = profile_of(
        tmp_path / "profile.json",
        ("Conv", "CUDAExecutionProvider", "float", "float"),
        ("Shape", "CPUExecutionProvider", "float", "int64"),
        ("Gather", "CPUExecutionProvider", "int64", "int64"),
        ("NonMaxSuppression", "CPUExecutionProvider", "float", "int64"),
        ("Resize", "CPUExecutionProvider", "float16", "float16"),
    )

    placement, fallen_back = _read_profile(path)

    assert {"CUDAExecutionProvider": 1, "CPUExecutionProvider": 4} == placement
    assert ["NonMaxSuppression", "Resize"] == fallen_back


def test_torch_gets_its_threads_and_modes_back(doubler: RunnableModel) -> None:
    module, threads = doubler.module, torch.get_num_threads()
    assert module is not None
    module.train()
    seen: list[tuple[int, bool]] = []

    def fail_in_a_session() -> None:
        with TorchEager().session(doubler, threads=threads + 1):
            seen.append((torch.get_num_threads(), module.training))
            raise KeyError

    with pytest.raises(KeyError):
        fail_in_a_session()

    assert [(threads + 1, False)] == seen
    assert (threads, True) == (torch.get_num_threads(), module.training)


def test_a_missing_form_of_the_model_is_explained(doubler: RunnableModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="needs a PyTorch module"), TorchEager().session(RunnableModel(tmp_path)):
        pass
    absent = RunnableModel(tmp_path / "absent.onnx")
    with pytest.raises(ModelError, match="needs an ONNX file"), OnnxRuntimeCpu().session(absent):
        pass
    with OnnxRuntimeCpu().session(doubler) as session, pytest.raises(ModelError, match="expected 1: x"):
        session.run([X, X])
    broken = RunnableModel(tmp_path / "broken.onnx")
    (tmp_path / "broken.onnx").write_text("not a model")
    with pytest.raises(ModelError, match="cannot load"), OnnxRuntimeCpu().session(broken):
        pass


def test_where_a_size_besides_the_batch_is_open_placement_is_known_after_the_first_run(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", "W"]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", [x], [y])
    save_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), str(tmp_path / "relu.onnx")
    )

    with OnnxRuntimeCpu().session(RunnableModel(tmp_path / "relu.onnx")) as session:
        before = session.node_placement
        session.bind([X])
        after = session.node_placement

    assert ({}, {"CPUExecutionProvider": 1}) == (before, after)
