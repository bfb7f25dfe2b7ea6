"""Layers are found with their sizes, measured at a few widths, and read off between them."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.latency.alignment import probe_alignment
from nni_prune_ext.latency.conditions import LatencyConditions
from nni_prune_ext.latency.layers import Layer, find_layers
from nni_prune_ext.latency.micro_models import micro_model
from nni_prune_ext.latency.predictor import LatencyPredictor, LayerTable, measured_tables

CPU = torch.device("cpu")
PLAIN = Layer(weight="w", size=(8, 8), kernel=(1, 1), stride=(1, 1), dilation=(1, 1), padding=(0,) * 4)
LAYERS = {
    "strided": (nn.Conv2d(6, 8, 3, stride=2, padding=1), (6, 9, 7), (6, 8)),
    "same": (nn.Conv2d(4, 8, 4, padding="same"), (4, 9, 7), (4, 8)),
    "dilated": (nn.Conv2d(4, 8, 3, dilation=2), (4, 9, 7), (4, 8)),
    "grouped": (nn.Conv2d(8, 12, 3, groups=4), (8, 9, 7), (8, 12)),
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8), (8, 9, 7), (8, 8)),
    "depthwise twice": (nn.Conv2d(8, 16, 3, groups=8), (8, 9, 7), (8, 16)),
    "one-dimensional": (nn.Conv1d(8, 16, 3, padding=1), (8, 9), (8, 16)),
    "transposed": (nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1), (8, 5, 7), (8, 6)),
    "linear": (nn.Linear(7, 5), (7,), (7, 5)),
    "linear over positions": (nn.Linear(7, 5), (3, 7), (7, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_micro_model_does_the_work_of_its_layer(name: str, tmp_path) -> None:
    module, shape, widths = LAYERS[name]
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))

    [layer] = find_layers(module, x)
    model, [array] = micro_model(layer, *layer.widths(module.weight.shape), 2, tmp_path / "layer.onnx", CPU)

    assert widths == layer.widths(module.weight.shape)
    assert array.shape == tuple(x.shape)
    assert model.module.weight.shape == module.weight.shape
    [out] = onnxruntime.InferenceSession(str(model.onnx_path)).run(None, {"x": array})
    assert out.shape == tuple(module(x).shape)
    with torch.no_grad():
        model.module.bias.zero_()
        assert np.allclose(model.module(torch.from_numpy(array)).numpy(), out, atol=1e-4)


def test_equal_work_has_one_key_and_other_work_another() -> None:
    twin = PLAIN.model_copy(update={"weight": "other"})

    assert PLAIN.key(8, 16) == twin.key(8, 16)
    others = [{"size": (8, 9)}, {"kernel": (3, 3)}, {"stride": (2, 2)}, {"groups": 2}, {"depthwise": True}]
    keys = {PLAIN.model_copy(update=change).key(8, 16) for change in others}
    assert len(others) == len(keys - {PLAIN.key(8, 16), PLAIN.key(16, 8)})


def test_between_measured_widths_a_table_goes_in_steps_and_straight_lines() -> None:
    table = LayerTable(layer=PLAIN, read=(8, 16), written=(8, 24), ms=((1.0, 3.0), (2.0, 5.0)), step=4)

    assert 1.0 == table.at((8, 8, 1, 1))
    assert 5.0 == table.at((24, 16, 1, 1))
    assert table.at((16, 16, 1, 1)) == pytest.approx(3.5)
    assert table.at((13, 16, 1, 1)) == table.at((16, 16, 1, 1))
    assert table.at((12, 16, 1, 1)) < table.at((13, 16, 1, 1))


def test_only_widths_that_can_be_cut_are_measured_at_several(network, images, groups, fake) -> None:
    stopwatch = fake(network, images, LatencyConditions())
    predictor = measured_tables(find_layers(network, images), groups, stopwatch, 4)

    tables = {table.layer.weight: table for table in predictor.tables}
    assert ((3,), (8, 32, 64)) == (tables["first.weight"].read, tables["first.weight"].written)
    assert ((12, 48, 96), (16, 64, 128)) == (tables["fourth.weight"].read, tables["fourth.weight"].written)
    assert ((16, 64, 128), (10,)) == (tables["last.weight"].read, tables["last.weight"].written)


def test_a_depthwise_layer_is_measured_along_its_one_width(fake) -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3, groups=64), nn.ReLU(), nn.Conv2d(64, 4, 1))
    x = torch.zeros(1, 3, 8, 8)
    stopwatch = fake(model, x, LatencyConditions())

    predictor = measured_tables(find_layers(model, x), trace_channel_groups(model, x), stopwatch, 4)

    table = predictor.tables[1]
    assert ((8, 32, 64), 1) == (table.read, len(table.ms[0]))
    assert table.at((16, 1, 3, 3)) < table.at((32, 1, 3, 3)) < table.at((64, 1, 3, 3))


def test_a_dip_in_the_times_is_smoothed_so_that_fewer_channels_never_cost_more(network, images, groups, fake) -> None:
    class Noisy(fake):
        def _layer(self, layer, read, written):
            return super()._layer(layer, read, written) * (2 if written == 32 else 1)

    stopwatch = Noisy(network, images, LatencyConditions())
    predictor = measured_tables(find_layers(network, images), groups, stopwatch, 4)

    for table in predictor.tables:
        rows = np.array(table.ms)
        assert (np.diff(rows, axis=0) >= 0).all()
        assert (np.diff(rows, axis=1) >= 0).all()


def test_the_curve_goes_through_measured_networks_and_the_dense_one_is_exact() -> None:
    table = LayerTable(layer=PLAIN, read=(8, 16), written=(16,), ms=((1.0,), (3.0,)), step=1)
    base = LatencyPredictor(tables=(table,), curve=((3.0, 1.0),), dense_ms=0.0)

    predictor = base.through([(1.0, 0.5)], 10.0)

    assert [10.0, 7.5, 5.0] == [predictor({"w": (16, read, 1, 1)}) for read in (16, 12, 8)]
    corrected = predictor.corrected(1.2)
    assert [10.0, 9.0, 6.0] == [pytest.approx(corrected({"w": (16, read, 1, 1)})) for read in (16, 12, 8)]
    assert 10.0 == predictor.corrected(0.8)({"w": (16, 16, 1, 1)}), "the dense network is what was measured"
    assert 10.0 == predictor.corrected(2.0)({"w": (16, 12, 1, 1)}), "never above the dense network"


def test_a_cut_that_was_measured_slower_than_dense_saves_nothing() -> None:
    base = LatencyPredictor(tables=(), curve=((3.0, 1.0),), dense_ms=0.0)

    assert ((1.0, 0.5), (2.0, 1.0), (3.0, 1.0)) == base.through([(2.0, 1.1), (1.0, 0.5)], 1.0).curve


@pytest.mark.parametrize(("liked", "multiple"), [(16, 16), (8, 8), (4, 4), (1, 1)])
def test_the_probe_finds_the_multiple_that_a_runtime_likes(liked, multiple, network, images, fake, monkeypatch) -> None:
    monkeypatch.setattr(fake, "liked", liked)

    found = probe_alignment(fake(network, images, LatencyConditions()))

    assert multiple == found.multiple
    assert {1, 2, 4, 8} == set(found.penalties)
