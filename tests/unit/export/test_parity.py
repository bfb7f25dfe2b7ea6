"""The comparison with PyTorch must notice what is wrong, and say by how much."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from nni_prune_ext.errors import ParityError
from nni_prune_ext.export.onnx_static import ExportResult, export_onnx
from nni_prune_ext.export.parity import check_parity

IMAGES = torch.zeros(1, 3, 8, 8)


def sabotaged(source: Path, weight: str, change: Callable[[np.ndarray], np.ndarray], target: Path) -> Path:
    model = onnx.load(str(source))
    (tensor,) = (entry for entry in model.graph.initializer if entry.name == weight)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), weight))
    onnx.save_model(model, str(target))
    return target


def test_an_untouched_file_passes(exported: ExportResult, tiny_net: nn.Module) -> None:
    report = check_parity(tiny_net, exported.path, IMAGES, given_inputs=[torch.ones(2, 3, 8, 8)])

    assert report.passed
    assert report.varied
    assert 4 * 2 + 1 == report.num_inputs
    assert ["output"] == [row.name for row in report.outputs]
    assert "CPUExecutionProvider" == report.provider
    assert report.max_rel < 1e-5
    assert json.loads(json.dumps(report.to_dict()))["passed"]


@pytest.mark.parametrize(
    "change",
    [lambda weight: weight * 1.001, lambda weight: weight[::-1].copy()],
    ids=["one part in a thousand", "channels in the wrong order"],
)
def test_a_changed_weight_fails(
    exported: ExportResult, tiny_net: nn.Module, tmp_path: Path, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    path = sabotaged(exported.path, "head.weight", change, tmp_path / "changed.onnx")

    report = check_parity(tiny_net, path, IMAGES)

    assert not report.passed
    assert report.max_rel > report.fail


def test_a_value_that_is_not_finite_fails(exported: ExportResult, tiny_net: nn.Module, tmp_path: Path) -> None:
    path = sabotaged(exported.path, "head.bias", lambda bias: np.full_like(bias, np.nan), tmp_path / "nan.onnx")

    report = check_parity(tiny_net, path, IMAGES)

    assert not report.passed
    assert math.inf == report.max_rel


@pytest.mark.parametrize(
    ("value", "cause"),
    [(math.nan, "1 in 'bias'"), (math.inf, "1 in 'bias'"), (3e38, "weights are finite, so they are too large")],
)
def test_a_network_that_computes_no_numbers_itself_is_blamed_and_not_the_file(
    value: float, cause: str, tmp_path: Path
) -> None:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.bias[0] = value
        if math.isfinite(value):
            model.weight[:] = value

    with pytest.raises(ParityError, match="Linear itself computes NaN or infinity in PyTorch, for .* inputs") as caught:
        export_onnx(model, 10 * torch.ones(1, 2), tmp_path / "m.onnx", exporter="torchscript",
                    given_inputs=[10 * torch.ones(1, 2)])  # fmt: skip

    assert cause in str(caught.value)
    assert "smaller learning rate" in str(caught.value)
    assert not any(word in str(caught.value) for word in ("opset", "xporter"))
    assert [] == list(tmp_path.iterdir())


def test_the_relative_difference_is_measured_on_the_largest_output(tmp_path: Path) -> None:
    class Double(nn.Module):
        factor = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * x

    model = Double()
    path = export_onnx(model, torch.zeros(1, 2), tmp_path / "model.onnx", exporter="torchscript").path
    model.factor = 2.5

    report = check_parity(model, path, torch.zeros(1, 2), probes=0, given_inputs=[torch.tensor([[1.0, -4.0]])])

    assert [2.0, 0.2] == pytest.approx([report.max_abs, report.max_rel])
    assert 1.0 == report.top1_agreement


def test_a_caller_can_allow_a_larger_difference(exported: ExportResult, tiny_net: nn.Module, tmp_path: Path) -> None:
    path = sabotaged(exported.path, "head.weight", lambda weight: weight * 1.001, tmp_path / "changed.onnx")

    assert check_parity(tiny_net, path, IMAGES, fail=0.1).passed


def test_outputs_that_never_change_are_reported_as_weak_evidence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.weight)

    result = export_onnx(model, torch.zeros(1, 2), tmp_path / "model.onnx", exporter="torchscript")

    assert result.parity is not None
    assert (True, False) == (result.parity.passed, result.parity.varied)
    assert "parity proves little" in caplog.text


def test_numbers_that_stand_for_something_stay_in_range(tmp_path: Path) -> None:
    model = nn.Embedding(4, 3)
    tokens = torch.tensor([[0, 3, 2]])

    result = export_onnx(model, tokens, tmp_path / "model.onnx", exporter="torchscript")

    assert result.parity is not None
    assert result.parity.passed


def test_a_file_that_cannot_be_read_is_an_error(tiny_net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_text("not a model")

    with pytest.raises(ParityError, match="cannot load it"):
        check_parity(tiny_net, path, IMAGES)


def test_the_same_seed_gives_the_same_report(exported: ExportResult, tiny_net: nn.Module) -> None:
    state = torch.get_rng_state()

    reports = [check_parity(tiny_net, exported.path, IMAGES, seed=3) for _ in range(2)]

    assert reports[0] == reports[1]
    assert torch.equal(state, torch.get_rng_state())
