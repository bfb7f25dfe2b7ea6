"""One small network, exported once with the slow exporter for all tests of this folder."""

from __future__ import annotations

import pytest
import torch
from precision_nets import Digits, trained_digits
from torch import Tensor, nn

from nni_prune_ext.export.onnx_static import ExportResult, export_onnx


class TinyNet(nn.Module):
    """Convolution, BatchNorm with statistics, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 5)
        norm = self.stem[1]
        assert isinstance(norm, nn.BatchNorm2d)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        assert norm.running_mean is not None
        nn.init.normal_(norm.running_mean)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.stem(images)
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


@pytest.fixture(scope="session")
def tiny_net() -> TinyNet:
    torch.manual_seed(0)
    return TinyNet()


@pytest.fixture(scope="session")
def exported(tiny_net: TinyNet, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """The network as the dynamo exporter writes it, from an example of batch size 1."""
    path = tmp_path_factory.mktemp("exported") / "tiny.onnx"
    return export_onnx(tiny_net, torch.zeros(1, 3, 8, 8), path, properties={"plan": '{"removed": {}}'})


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    """A network that reads digits, trained once for all tests of lower precision."""
    return trained_digits(tmp_path_factory.mktemp("digits"))
