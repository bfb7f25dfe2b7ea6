"""The compiled runtime runs a module in one compiled piece, or says why it cannot; it never runs it uncompiled."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nni_prune_ext.errors import ModelError, RuntimeUnavailableError
from nni_prune_ext.runtimes import torch_compile
from nni_prune_ext.runtimes.base import RunnableModel
from nni_prune_ext.runtimes.torch_compile import TorchCompile

X = np.asarray([[1.0, -2.0, 3.0]], np.float32)


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compiles with a backend that takes no time: the graph runs as traced; returns the sizes of the graphs."""
    graphs: list[int] = []
    whole = torch.compile

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda *arguments, **options: whole(*arguments, backend=keep, **options))
    return graphs


class Forks(nn.Module):
    """Decides by a value what it does."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


def test_the_module_is_compiled_once_per_shape(traced_only: list[int]) -> None:
    with TorchCompile().session(RunnableModel(module=nn.ReLU())) as session:
        (single,) = session.run([X])
        session.bind([X])()
        before = len(traced_only)
        session.run([np.repeat(X, 2, axis=0)])

        assert [[1.0, 0.0, 3.0]] == single.tolist()
        assert (1, 2) == (before, len(traced_only))
        assert (("inductor-cpu",), {"inductor-cpu": 1}) == (session.providers, session.node_placement)


def test_a_module_that_cannot_be_compiled_whole_is_refused(traced_only: list[int]) -> None:
    with (
        TorchCompile().session(RunnableModel(module=Forks())) as session,
        pytest.raises(
            RuntimeUnavailableError, match=r"cannot compile the model in one piece: .*Data-dependent branching"
        ),
    ):
        session.run([X])


def test_more_shapes_than_pytorch_keeps_are_refused_instead_of_running_uncompiled(traced_only: list[int]) -> None:
    with TorchCompile().session(RunnableModel(module=nn.ReLU())) as session:
        for size in range(1, 9):
            session.run([np.repeat(X, size, axis=0)])
        with pytest.raises(RuntimeUnavailableError, match="FailOnRecompileLimitHit"):
            session.run([np.repeat(X, 9, axis=0)])


def test_many_sessions_do_not_use_up_the_versions_of_one_another(traced_only: list[int]) -> None:
    for _ in range(12):
        with TorchCompile().session(RunnableModel(module=nn.Sequential(nn.ReLU()))) as session:
            session.run([X])

    assert 12 == len(traced_only)


def test_a_missing_compiler_or_header_is_named_and_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    without_compiler = TorchCompile().availability()
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(torch_compile.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    without_headers = TorchCompile().availability()

    assert not without_compiler.usable
    assert "there is no C++ compiler 'no-such-compiler'; install one, or name it in CXX." in without_compiler.reason
    assert not without_headers.usable
    assert f"the headers of Python are missing ('{tmp_path / 'Python.h'}')" in without_headers.reason
    with (
        pytest.raises(RuntimeUnavailableError, match="torch-compile cannot be used here"),
        TorchCompile().session(RunnableModel(module=nn.ReLU())),
    ):
        pass


def test_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_compile, "_missing_for_cpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch_compile.importlib.util, "find_spec", lambda _: None)

    availability = TorchCompile().availability()

    assert (False, True) == (availability.usable, "package triton is missing" in availability.reason)


def test_it_needs_a_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch_compile, "_missing_for_cpu", lambda: None)

    with (
        pytest.raises(ModelError, match="torch-compile needs a PyTorch module"),
        TorchCompile().session(RunnableModel(tmp_path / "net.onnx")),
    ):
        pass
