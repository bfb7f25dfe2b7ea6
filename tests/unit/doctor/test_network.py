"""Layers of ONNX files, and which layer a node of a profile belongs to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from made_networks import chain, conv, profile, saved
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from nni_prune_ext.costs import count_costs
from nni_prune_ext.doctor.layer_times import ProfiledNetwork
from nni_prune_ext.doctor.measuring import profile_in_turns
from nni_prune_ext.doctor.network import Network, layer_name
from nni_prune_ext.errors import ModelError
from nni_prune_ext.export.onnx_static import export_onnx
from nni_prune_ext.models.loading import build_model
from nni_prune_ext.runtimes.onnxruntime_cpu import OnnxRuntimeCpu
from nni_prune_ext.runtimes.onnxruntime_profile import load_profile, read_profile

SHAPE = [(1, 3, 8, 8)]


@pytest.mark.parametrize(
    ("node", "weight", "expected"),
    [
        ("features.0.1/Conv", "features.0.0.weight", "features.0.0"),
        ("/layer1/layer1.0/conv1/Conv", "onnx::Conv_193", "layer1.0.conv1"),
        ("/features/features.1/conv/conv.0/conv.0.0/Conv", "onnx::Conv_541", "features.1.conv.0.0"),
        ("/conv/Conv_2", "w", "conv"),
        ("head.fc/MatMul", "val_3", "head.fc"),
        ("/Conv", "w", "/Conv"),
    ],
)
def test_a_layer_is_called_after_its_weight_or_else_after_its_node(node: str, weight: str, expected: str) -> None:
    assert expected == layer_name(helper.make_node("Conv", ["x", weight], ["y"], name=node))


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_layers_of_an_exported_network_are_its_modules_with_their_macs(name: str, tmp_path: Path) -> None:
    model, example = build_model(name).eval(), torch.zeros(1, 3, 32, 32)
    export_onnx(model, example, tmp_path / "a.onnx", exporter="torchscript", check=False)

    network = Network.load(tmp_path / "a.onnx", [(1, 3, 32, 32)])

    modules = dict(model.named_modules())
    assert count_costs(model, example).macs == sum(layer.macs for layer in network.layers.values())
    for layer in network.layers.values():
        weight = modules[layer.name].weight
        assert (weight.shape[0], weight.shape[1] * layer.groups) == (layer.out_channels, layer.in_channels)
    assert len([m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]) == len(network.layers)


def test_transposed_and_shared_layers_are_counted_with_all_their_uses(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.same = nn.ConvTranspose2d(3, 5, 2, stride=2), nn.Conv2d(5, 5, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.same(self.same(self.up(x)))

    export_onnx(Twice(), torch.zeros(1, 3, 8, 8), tmp_path / "a.onnx", exporter="torchscript", check=False)

    layers = Network.load(tmp_path / "a.onnx", SHAPE).layers

    assert 8 * 8 * 3 * 5 * 4 == layers["up"].macs
    assert 2 * 16 * 16 * 5 * 5 * 9 == layers["same"].macs
    assert ("transposed", "conv 3×3") == (layers["up"].kind, layers["same"].kind)


def test_every_layer_of_a_real_profile_is_found_also_where_a_sum_has_two_convolutions(tmp_path: Path) -> None:
    class Projection(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.long, self.short = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 1), nn.Conv2d(8, 12, 1)
            self.head = nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            return self.head(torch.relu(self.long(x) + self.short(x)).mean((2, 3)))

    export_onnx(Projection(), torch.zeros(1, 3, 8, 8), tmp_path / "a.onnx", exporter="torchscript", check=False)
    network = Network.load(tmp_path / "a.onnx", SHAPE)

    (nodes,) = profile_in_turns(
        OnnxRuntimeCpu(), [network.path], [[torch.zeros(1, 3, 8, 8).numpy()]], rounds=3, threads=1, seed=0
    )

    assert ["stem", "long", "short", "head"] == list(ProfiledNetwork(network, nodes).sides())
    assert {3} == {len(node.ms) for node in nodes}


def test_nodes_are_joined_by_name_by_written_value_and_by_elimination(tmp_path: Path) -> None:
    network = Network.load(chain(tmp_path / "a.onnx", [5, 7]), SHAPE)

    owners = network.owners(
        [
            ("conv0_relu_nchwc", "Conv"),
            ("conv1/Conv", "FusedConv"),
            ("conv1/Relu", "Relu"),
            ("fc/Gemm/MatMulAddFusion", "Gemm"),
            ("ReorderOutput_token_3", "ReorderOutput"),
            ("other_nchwc", "Conv"),
        ]
    )

    assert ["conv0", "conv1", None, "fc", None, None] == owners


@pytest.mark.parametrize("alone", ["left", "right"])
def test_a_sum_belongs_to_the_convolution_that_has_no_node_of_its_own(alone: str, tmp_path: Path) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 4, 4]) for name in ("x", "sum")]
    weights = [
        numpy_helper.from_array(np.ones((2, 2, 1, 1), np.float32), f"{side}.weight") for side in ("left", "right")
    ]
    nodes = [
        helper.make_node("Conv", ["x", "left.weight"], ["left_out"], name="left/Conv"),
        helper.make_node("Conv", ["x", "right.weight"], ["right_out"], name="right/Conv"),
        helper.make_node("Add", ["left_out", "right_out"], ["sum"], name="Add"),
    ]
    model = helper.make_model(helper.make_graph(nodes, "sum", ends[:1], ends[1:], weights), ir_version=10)
    helper.set_model_props(model, {"nni_prune_ext.version": "0"})
    onnx.save(model, str(tmp_path / "a.onnx"))
    network = Network.load(tmp_path / "a.onnx", [(1, 2, 4, 4)])

    owners = network.owners([("sum_nchwc", "Conv"), (f"{alone}_out_nchwc", "Conv")])

    assert [{"left": "right", "right": "left"}[alone], alone] == owners


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    network = Network.load(chain(tmp_path / "a.onnx", [5, 7]), SHAPE)
    other = profile([("stage/Conv", "Conv", 1.0, 0), ("fc/Gemm", "Gemm", 1.0, 0)])

    with pytest.raises(ModelError, match=r"profile does not belong to .*2 of 3 layers \(conv0, conv1\)"):
        ProfiledNetwork(network, read_profile(other))


def test_a_file_of_somebody_else_a_damaged_one_and_a_wrong_input_are_refused(tmp_path: Path) -> None:
    chain(tmp_path / "foreign.onnx", [5, 7], ours=False)
    (tmp_path / "text.onnx").write_text("no ONNX")
    chain(tmp_path / "ours.onnx", [5, 7])
    model = onnx.load(str(tmp_path / "ours.onnx"))
    onnx.save(model, str(tmp_path / "apart.onnx"), save_as_external_data=True, location="apart.data", size_threshold=0)
    (tmp_path / "apart.data").unlink()

    for name, message in (
        ("foreign", "no ONNX file of this package"),
        ("text", "cannot be read"),
        ("no", "cannot be"),
        ("apart", "cannot be"),
    ):
        with pytest.raises(ModelError, match=message):
            Network.load(tmp_path / f"{name}.onnx", SHAPE)
    with pytest.raises(ModelError, match="takes inputs of shapes"):
        Network.load(tmp_path / "ours.onnx", [(1, 4, 8, 8)])


def test_a_profile_is_read_run_by_run_without_the_first_and_without_containers() -> None:
    events = profile([("a", "Conv", 1.5, 7), ("loop", "Loop", 9.0, 0), ("b", "Relu", 0.25, 0)], runs=4, noise=0.5)

    nodes = read_profile(events, skip=1)

    assert ["a", "b"] == [node.name for node in nodes]
    assert [2.0, 1.5, 2.0] == nodes[0].ms.tolist()
    assert (1, 7, 8, 8) == nodes[0].output_shape
    assert () == nodes[1].output_shape


@pytest.mark.parametrize("text", ["", "{}", "[1]"])
def test_a_file_that_is_no_profile_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text(text)

    with pytest.raises(ModelError, match="cannot be read as a profile"):
        load_profile(tmp_path / "profile.json")


def test_a_profile_of_one_run_or_of_none_is_refused(tmp_path: Path) -> None:
    one = saved(tmp_path / "one.json", profile([conv(0, 1.0)], runs=1))

    for events in (load_profile(one), [], [{"cat": "Node"}]):
        with pytest.raises(ModelError, match="not a usable profile"):
            read_profile(events)
