"""Both exporters give the same names to what goes in."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from nni_prune_ext.export.exporters import ExporterName
from nni_prune_ext.export.onnx_static import export_onnx


class Sum(nn.Module):
    """Takes any number of tensors, and a nested one."""

    def forward(self, *terms: Tensor | tuple[Tensor, ...]) -> Tensor:
        flat = [tensor for term in terms for tensor in (term if isinstance(term, tuple) else (term,))]
        return torch.stack(flat).sum(0)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_positional_and_nested_inputs_are_numbered(tmp_path: Path, exporter: ExporterName) -> None:
    tensors = (torch.ones(1, 2), (torch.ones(1, 2), torch.ones(1, 2)))

    result = export_onnx(Sum(), tensors, tmp_path / "model.onnx", exporter=exporter)

    graph = onnx.load(str(result.path)).graph
    assert ["terms_0", "terms_1_0", "terms_1_1"] == [port.name for port in graph.input]
    assert ["N"] * 3 == [port.type.tensor_type.shape.dim[0].dim_param for port in graph.input]


class ClassToken(nn.Module):
    """Joins a token to every image: what makes the exporter believe in a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.layers = nn.Sequential(nn.TransformerEncoderLayer(4, 1, 8, batch_first=True), nn.Linear(4, 4), nn.GELU())

    def forward(self, patches: Tensor) -> Tensor:
        tokens: Tensor = self.layers(torch.cat([self.token.expand(patches.shape[0], -1, -1), patches], 1))
        return tokens[:, 0]


def test_an_example_of_one_image_does_not_fix_the_batch_size(tmp_path: Path) -> None:
    torch.manual_seed(0)

    result = export_onnx(ClassToken(), torch.zeros(1, 3, 4), tmp_path / "model.onnx", exporter="dynamo")

    assert result.parity is not None
    assert result.parity.varied
