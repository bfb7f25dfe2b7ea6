"""Groups of channels in ONNX graphs: a wider graph computes the same, a narrower one still runs, the rest stays."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from made_networks import chain
from numpy.typing import NDArray
from torch import Tensor, nn

from nni_prune_ext.doctor.network import Network
from nni_prune_ext.doctor.widths import Widths
from nni_prune_ext.export.onnx_static import export_onnx
from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.inputs import tensors_in
from nni_prune_ext.testing.toy_models import ZOO

RESIZABLE = ("chain", "residual", "projection", "concat_twice", "dense", "squeeze_excite", "nchw_flatten", "transposed")
OTHERS = ("depthwise", "grouped", "view_shuffle", "chunk", "nhwc_flatten", "shared", "tied_autoencoder", "group_norm",
          "transposed_depthwise", "multihead_attention", "prelu", "segmenter", "channel_buffers", "spatial_attention",
          "computed_weight", "inline_pad")  # fmt: skip


def exported(model: nn.Module, example: Tensor) -> Network:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model.eval(), example, path, exporter="torchscript", check=False)
        return Network.load(path, [tuple(example.shape)])


def outputs(model: onnx.ModelProto, example: Tensor) -> list[NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: example.numpy()})


def with_random_norms(model: nn.Module) -> nn.Module:
    """Returns the model with statistics that a wrong order of channels would show in."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    return model


@cache
def toy(name: str) -> tuple[Network, Tensor]:
    torch.manual_seed(0)
    example = next(tensors_in(ZOO[name].example_inputs()))
    return exported(with_random_norms(ZOO[name].build()), example), example


@pytest.mark.parametrize("name", [*RESIZABLE, *OTHERS])
def test_channels_of_zeros_change_nothing_and_fewer_channels_still_run(name: str) -> None:
    network, example = toy(name)
    widths = Widths(network)
    expected = outputs(network.model, example)
    groups = widths.groups()

    wider = widths.resized({group.root: group.width + 3 + index for index, group in enumerate(groups)})
    narrower = widths.resized({group.root: max(group.width - 1, 1) for group in groups})

    for found, wanted in zip(outputs(wider, example), expected):
        np.testing.assert_allclose(found, wanted, atol=2e-5 * max(1, float(np.abs(wanted).max())))
    assert [o.shape for o in expected] == [o.shape for o in outputs(narrower, example)]
    onnx.checker.check_model(wider)


@pytest.mark.parametrize("name", RESIZABLE)
def test_every_group_of_the_usual_topologies_can_be_resized(name: str) -> None:
    network, _ = toy(name)
    torch.manual_seed(0)
    traced = trace_channel_groups(ZOO[name].build().eval(), ZOO[name].example_inputs())

    found = {group.root: group.width for group in Widths(network).groups()}

    assert {group.name: group.num_channels for group in traced} == found


def test_a_wider_group_is_wider_in_the_graph_and_the_others_are_not() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1))
    network = exported(model, torch.zeros(2, 3, 8, 8))
    widths = Widths(network)
    group = next(g for g in widths.groups() if any(network.layers[name].kind == "depthwise" for name in g.layers))

    wider = widths.resized({group.root: group.width + 5})

    changed = {
        name: (old.in_channels, old.out_channels, new.in_channels, new.out_channels)
        for name, old in network.layers.items()
        for new in [_layers_of(wider)[name]]
        if old != new
    }
    assert set(group.layers) == set(changed)
    depthwise = next(name for name in changed if network.layers[name].kind == "depthwise")
    assert (group.width, group.width, group.width + 5, group.width + 5) == changed[depthwise]


def _layers_of(model: onnx.ModelProto):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, str(path))
        return Network.load(path, [(2, 3, 8, 8)]).layers


def test_a_mean_and_a_reshape_that_names_the_width_are_followed_as_dynamo_writes_them(tmp_path: Path) -> None:
    example = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network = Network.load(chain(tmp_path / "a.onnx", [5, 7], mean_and_reshape=True), [(2, 3, 8, 8)])
    widths = Widths(network)

    wider = widths.resized({"conv0": 9, "conv1": 16})

    assert {"conv0": 5, "conv1": 7} == {group.root: group.width for group in widths.groups()}
    np.testing.assert_allclose(outputs(wider, example)[0], outputs(network.model, example)[0], atol=1e-5)


def test_channels_that_an_unknown_operator_moves_keep_their_width() -> None:
    class Flipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1), nn.Conv2d(5, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.first(x).flip(1)))

    network = exported(Flipped(), torch.zeros(2, 3, 8, 8))

    assert ["second"] == [group.root for group in Widths(network).groups()]
