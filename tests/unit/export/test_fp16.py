"""fp16 files: half the size, float32 at both ends, and nothing that overflows in half precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped, unused-ignore]
import pytest
import torch
from precision_nets import Digits
from torch import Tensor, nn

from nni_prune_ext.errors import DataError, ExportError
from nni_prune_ext.export.fp16 import convert_to_fp16
from nni_prune_ext.export.onnx_static import export_onnx

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def test_weights_are_halves_and_both_ends_float32(digits: Digits, tmp_path: Path) -> None:
    made = convert_to_fp16(digits.path, tmp_path / "half.onnx", digits.train, test_batches=digits.test)

    graph = onnx.load(str(made.path)).graph
    assert [FLOAT, FLOAT] == [port.type.tensor_type.elem_type for port in (*graph.input, *graph.output)]
    assert {HALF} == {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 4}
    assert made.size_bytes < 0.7 * digits.path.stat().st_size
    assert (5, {}) == (len(made.reduced), made.kept_float)
    assert (0.0, True) == (made.parity.drop, made.parity.passed)
    assert 0 < made.parity.max_rel < 5e-3


def test_origin_is_kept_and_the_cpu_is_advised_against(digits: Digits, tmp_path: Path) -> None:
    made = convert_to_fp16(digits.path, tmp_path / "half.onnx")

    session = onnxruntime.InferenceSession(str(made.path), providers=["CPUExecutionProvider"])
    written = session.get_modelmeta().custom_metadata_map
    before = {entry.key: entry.value for entry in onnx.load(str(digits.path)).metadata_props}
    assert before.items() <= written.items()
    assert ("fp16", None) == (written["nni_prune_ext.precision"], written.get("nni_prune_ext.calibration"))
    assert "on the CPU it is slower" in made.advice
    with pytest.raises(ExportError, match="of precision fp16 already"):
        convert_to_fp16(made.path, tmp_path / "again.onnx")


class Loud(nn.Module):
    """Its values reach 1e5 in the middle; half precision ends at 65504."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.loud, self.last = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        nn.init.constant_(self.loud.weight, 3e4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.loud(torch.sigmoid(self.first(x))) / 3e4)
        return result


def test_layers_whose_values_half_precision_cannot_hold_stay_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Loud()
    file = export_onnx(model, torch.zeros(1, 4), tmp_path / "loud.onnx", exporter="torchscript").path

    made = convert_to_fp16(file, tmp_path / "half.onnx")

    assert {"/loud/MatMul"} == set(made.kept_float)
    assert "half precision ends at 65504" in made.kept_float["/loud/MatMul"]
    session = onnxruntime.InferenceSession(str(made.path), providers=["CPUExecutionProvider"])
    x = torch.randn(3, 4)
    with torch.no_grad():
        np.testing.assert_allclose(model(x).numpy(), session.run(None, {"x": x.numpy()})[0], atol=5e-3)


def test_named_layers_stay_and_images_are_checked(digits: Digits, tmp_path: Path) -> None:
    made = convert_to_fp16(digits.path, tmp_path / "half.onnx", keep_float=["head"])

    assert {"/head/Gemm": "named in keep_float"} == made.kept_float
    with pytest.raises(DataError, match="given images are float32"):
        convert_to_fp16(digits.path, tmp_path / "half.onnx", digits.train[:, :, 1:])
