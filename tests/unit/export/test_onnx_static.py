"""The written file: complete, portable, silent about this machine, and equal to PyTorch."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped, unused-ignore]
import pytest
import torch
from torch import Tensor, nn

from nni_prune_ext.errors import ConfigError, ExportError, ModelError, OutputError, ParityError
from nni_prune_ext.export import onnx_static
from nni_prune_ext.export.exporters import ExporterName
from nni_prune_ext.export.onnx_static import ExportResult, export_onnx
from nni_prune_ext.export.provenance import state_dict_sha256
from nni_prune_ext.inputs import ExampleInputs

IMAGES = torch.zeros(1, 3, 8, 8)


def bare_session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("batch", [1, 5])
def test_any_batch_size_runs_in_a_bare_session(exported: ExportResult, tiny_net: nn.Module, batch: int) -> None:
    images = torch.randn(batch, 3, 8, 8)

    (actual,) = bare_session(exported.path).run(None, {"images": images.numpy()})

    with torch.no_grad():
        expected = tiny_net.eval()(images).numpy()
    np.testing.assert_allclose(expected, actual, rtol=1e-4, atol=1e-5)


def test_the_file_names_no_local_path_and_no_source_file(exported: ExportResult) -> None:
    content = exported.path.read_bytes()

    assert str(Path.cwd()).encode() not in content
    assert str(Path(torch.__file__).parent).encode() not in content
    assert b".py" not in content


def test_dynamo_is_the_first_choice_and_writes_one_file(exported: ExportResult) -> None:
    assert ("dynamo", None, None) == (exported.exporter, exported.fallback_reason, exported.data_path)
    assert ["tiny.onnx"] == [file.name for file in exported.path.parent.iterdir()]
    assert exported.path.stat().st_size == exported.size_bytes


def test_nodes_and_weights_keep_the_names_of_pytorch_layers(exported: ExportResult) -> None:
    graph = onnx.load(str(exported.path)).graph

    assert ["stem.1/Conv", "stem.2/Relu", "ReduceMean", "head/Gemm"] == [node.name for node in graph.node]
    assert {"stem.0.weight", "head.weight", "head.bias"} <= {weight.name for weight in graph.initializer}


def test_the_file_tells_where_it_comes_from(exported: ExportResult, tiny_net: nn.Module) -> None:
    written = bare_session(exported.path).get_modelmeta().custom_metadata_map

    assert exported.properties == written
    assert '{"removed": {}}' == written["nni_prune_ext.plan"]
    assert '{"images": [1, 3, 8, 8]}' == written["nni_prune_ext.input_shapes"]
    assert ("18", "dynamo") == (written["nni_prune_ext.opset"], written["nni_prune_ext.exporter"])
    assert state_dict_sha256(tiny_net) == written["nni_prune_ext.state_dict_sha256"]


def test_a_changed_weight_changes_the_hash() -> None:
    model = nn.Linear(2, 2)
    before = state_dict_sha256(model)

    nn.init.ones_(model.bias)

    assert before != state_dict_sha256(model)


def test_the_file_was_compared_with_pytorch(exported: ExportResult) -> None:
    assert exported.parity is not None
    assert exported.parity.passed
    assert 8 == exported.parity.num_inputs  # 4 random inputs at each of 2 batch sizes
    assert 1.0 == exported.parity.top1_agreement


def test_exporting_leaves_modes_hooks_and_settings(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    model.train()
    model[1].eval()
    handle = model[0].register_forward_hook(lambda *_: None)
    statistics = {name: value.clone() for name, value in model.state_dict().items()}

    export_onnx(model, IMAGES, tmp_path / "model.onnx", exporter="torchscript")

    assert [True, True, False, True] == [module.training for module in model.modules()]
    assert [handle.id] == list(model[0]._forward_hooks)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, statistics[name]) for name, value in model.state_dict().items())


class Undecided(nn.Module):
    """Branches on a value, which `torch.export` refuses and tracing does not notice."""

    def forward(self, images: Tensor) -> Tensor:
        return images + 1 if images.sum() < 1e9 else images


def test_where_dynamo_fails_torchscript_steps_in_and_the_reason_is_kept(tmp_path: Path) -> None:
    result = export_onnx(Undecided(), IMAGES, tmp_path / "model.onnx")

    assert "torchscript" == result.exporter
    assert result.fallback_reason is not None
    assert "data-dependent" in result.fallback_reason


class Unsupported(nn.Module):
    """Uses an operation that ONNX does not have."""

    def forward(self, matrices: Tensor) -> Tensor:
        eigenvalues: Tensor = torch.linalg.eigvals(matrices)
        return eigenvalues.real


def test_a_failed_export_leaves_no_file_and_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("old")
    model = Unsupported().train()

    with pytest.raises(ExportError, match="eigvals"):
        export_onnx(model, torch.eye(2)[None], path, exporter="torchscript")

    assert ["old"] == [file.read_text() for file in tmp_path.iterdir()]
    assert model.training


class Stand(nn.Module):
    """A frozen 0/1 convolution that keeps the first channels, and can turn back into a slice."""

    def __init__(self, replacement: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1, bias=False)
        self.replacement = replacement
        self.conv.weight.data = torch.eye(3)[:2, :, None, None]

    def forward(self, images: Tensor) -> Tensor:
        selected: Tensor = self.conv(images)
        return selected

    def for_export(self) -> nn.Module:
        return self.replacement()


class FirstTwo(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images[:, :2]


class LastTwo(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images[:, 1:]


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda module: module])
def test_modules_that_offer_another_form_are_written_in_it(
    tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    stand = Stand(FirstTwo)
    model = wrap(stand)

    result = export_onnx(model, IMAGES, tmp_path / "model.onnx", exporter="torchscript")

    assert ["Slice"] == [node.op_type for node in onnx.load(str(result.path)).graph.node]
    assert stand in list(model.modules())


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="relative difference"):
        export_onnx(nn.Sequential(Stand(LastTwo)), IMAGES, tmp_path / "model.onnx", exporter="torchscript")

    assert [] == list(tmp_path.iterdir())


def test_weights_that_do_not_fit_one_file_go_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_static, "ONE_FILE_LIMIT_BYTES", 0)
    model = nn.Linear(32, 32)

    result = export_onnx(model, torch.zeros(1, 32), tmp_path / "model.onnx", exporter="torchscript")

    assert tmp_path / "model.onnx.data" == result.data_path
    assert {"model.onnx", "model.onnx.data"} == {file.name for file in tmp_path.iterdir()}
    assert (1, 32) == bare_session(result.path).run(None, {"input": np.zeros((1, 32), np.float32)})[0].shape


class TwoInputs(nn.Module):
    def forward(self, left: Tensor, scale: float = 1.0, right: Tensor | None = None) -> dict[str, Tensor]:
        assert right is not None
        return {"total": left + scale * right, "difference": left - right}


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_keyword_inputs_and_named_outputs_keep_their_names(tmp_path: Path, exporter: ExporterName) -> None:
    inputs: ExampleInputs = {"right": torch.ones(1, 2), "left": torch.ones(1, 2)}

    result = export_onnx(TwoInputs(), inputs, tmp_path / "model.onnx", exporter=exporter)

    session = bare_session(result.path)
    assert ["left", "right"] == [port.name for port in session.get_inputs()]
    assert ["output_total", "output_difference"] == [port.name for port in session.get_outputs()]


def test_the_fused_attention_path_is_off_while_exporting(tmp_path: Path) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    result = export_onnx(model, torch.zeros(2, 4, 8), tmp_path / "model.onnx", exporter="torchscript")

    operators = {node.op_type for node in onnx.load(str(result.path)).graph.node}
    assert "Softmax" in operators
    assert not operators & {"Identity", "Constant"}


class Frozen(nn.Module):
    """Writes the batch size of the example into the graph."""

    def forward(self, images: Tensor) -> Tensor:
        return images + torch.ones(int(images.shape[0]), *images.shape[1:])


def test_a_batch_size_frozen_by_the_model_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="does not run on inputs of shape"):
        export_onnx(Frozen(), torch.zeros(2, 3), tmp_path / "model.onnx", exporter="torchscript")

    assert [] == list(tmp_path.iterdir())


def test_a_fixed_batch_size_is_written_when_asked_for(tmp_path: Path) -> None:
    result = export_onnx(
        nn.Linear(2, 2), torch.zeros(3, 2), tmp_path / "model.onnx", exporter="torchscript", dynamic_batch=False
    )

    assert [3, 2] == bare_session(result.path).get_inputs()[0].shape


def test_a_full_disk_and_a_folder_in_the_way_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = nn.Linear(2, 2), torch.zeros(1, 2)
    (tmp_path / "folder").mkdir()

    with pytest.raises(OutputError, match="folder': .*Choose another path"):
        export_onnx(model, example, tmp_path / "folder", exporter="torchscript")

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_static.onnx, "save_model", full)
    with pytest.raises(OutputError, match=r"net\.onnx': no space left.*Make space.*export again"):
        export_onnx(model, example, tmp_path / "net.onnx", exporter="torchscript")

    assert ["folder"] == [path.name for path in tmp_path.iterdir()]


def test_mistakes_are_explained(tmp_path: Path) -> None:
    path, model = tmp_path / "model.onnx", nn.Linear(2, 2)

    with pytest.raises(ModelError, match=r"do not fit Linear\.forward"):
        export_onnx(model, {"wrong": torch.zeros(1, 2)}, path)
    with pytest.raises(ModelError, match=r"does not run on the example inputs \{'input': \(1, 3\)\}"):
        export_onnx(model, torch.zeros(1, 3), path)
    with pytest.raises(OutputError, match="cannot be written"):
        export_onnx(model, torch.zeros(1, 2), tmp_path / "missing" / "model.onnx")
    with pytest.raises(ConfigError, match="opset"):
        export_onnx(model, torch.zeros(1, 2), path, exporter="torchscript", properties={"opset": "1"})
    assert [] == list(tmp_path.iterdir())
