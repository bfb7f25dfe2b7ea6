"""Exported files hold nothing that hinders a runtime or a quantiser, and nothing of the machine: read from the file."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
from google.protobuf.message import Message
from torch import Tensor, nn

from nni_prune_ext.export.exporters import ExporterName
from nni_prune_ext.export.onnx_static import export_onnx
from nni_prune_ext.models.loading import build_model


def strings_in(message: Message) -> Iterator[str]:
    """Yields every text in a file, at every depth; weights are no text."""
    for field, value in message.ListFields():
        for one in value if field.is_repeated else (value,):
            if isinstance(one, Message):
                yield from strings_in(one)
            elif isinstance(one, str):
                yield one
            elif isinstance(one, bytes) and field.name != "raw_data":
                yield one.decode("utf-8", "replace")


class Block(nn.Module):
    """What leaves noise: BatchNorm around convolutions, equal biases, a padded shortcut, constants, nested names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8))
        self.third = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)
        for layer in (self.first[0], self.third):
            nn.init.zeros_(layer.bias)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, images: Tensor) -> Tensor:
        shortcut = nn.functional.pad(images[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        features = torch.relu(self.third(self.second(self.first(images))) + shortcut * self.scale)
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


@pytest.fixture(scope="module", params=["dynamo", "torchscript"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    exporter: ExporterName = request.param
    torch.manual_seed(0)
    model, folder = Block(), tmp_path_factory.mktemp(exporter)
    made = export_onnx(model, torch.randn(1, 4, 8, 8), folder / "block.onnx", exporter=exporter)
    assert ["block.onnx"] == [path.name for path in folder.iterdir()]
    return onnx.load(str(made.path))


def test_no_text_in_the_file_names_this_machine(file: onnx.ModelProto) -> None:
    texts = list(strings_in(file))
    private = (str(Path.cwd()), str(Path(torch.__file__).parents[1]), str(Path.home()), ".py", "/tmp", "Traceback")

    assert "images" in texts
    assert [] == [text for text in texts if any(word in text for word in private)]
    assert getpass.getuser() not in texts


def test_batchnorms_are_folded_and_nothing_stands_before_a_weight(file: onnx.ModelProto) -> None:
    kinds = {node.op_type for node in file.graph.node}
    weights = {tensor.name for tensor in file.graph.initializer}
    heavy = [node for node in file.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]

    assert not kinds & {"BatchNormalization", "Identity", "Constant", "CastLike", "Expand", "ConstantOfShape", "Shape"}
    assert 4 == len(heavy)
    assert all(set(node.input[1:]) <= weights for node in heavy)


def test_what_is_known_is_computed_and_what_nobody_reads_is_gone(file: onnx.ModelProto) -> None:
    weights = {tensor.name for tensor in file.graph.initializer}
    read = {name for node in file.graph.node for name in node.input}

    assert weights <= read
    assert [] == [node.op_type for node in file.graph.node if node.input and set(node.input) - {""} <= weights]
    assert "N" == file.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert [""] == [entry.domain for entry in file.opset_import]


def test_padded_shortcuts_of_cifar_networks_leave_no_arithmetic_on_sizes(tmp_path: Path) -> None:
    model = build_model("resnet20")

    made = export_onnx(model, torch.zeros(1, 3, 16, 16), tmp_path / "net.onnx", exporter="torchscript", check=False)

    kinds = {node.op_type for node in onnx.load(str(made.path)).graph.node}
    assert {"Add", "Conv", "Flatten", "Gemm", "GlobalAveragePool", "Pad", "Relu", "Slice"} == kinds
