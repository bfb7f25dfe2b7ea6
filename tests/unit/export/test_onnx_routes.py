"""Gated networks as static sub-networks per route: what a bare ONNX Runtime computes, and what the index says.

The slow exporter runs for one network only; what is measured of it is asked in several tests.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from nni_prune_ext.costs import count_costs
from nni_prune_ext.errors import ArtefactError, ConfigError, ExportError, OutputError, ParityError
from nni_prune_ext.export import onnx_routes, route_judging
from nni_prune_ext.export.onnx_routes import LIMITS, RoutedExport, export_routes
from nni_prune_ext.export.onnx_static import export_onnx
from nni_prune_ext.export.route_judging import remarks
from nni_prune_ext.export.routes_folder import IndexedRoute, IndexedRouter, RoutesIndex, Routing
from nni_prune_ext.gates.estimates import measure_gating
from nni_prune_ext.gates.fixed_masks import fixed_masks
from nni_prune_ext.gates.gated_network import GatedNetwork
from nni_prune_ext.gates.placement import chosen_places, new_gates
from nni_prune_ext.graph.gate_tracing import trace_gate_flow

EXAMPLE = torch.zeros(1, 3, 8, 8)


def gated() -> GatedNetwork:
    """Returns a network of four gated layers whose heads read which colour is brightest; later layers are larger."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    for own in model:
        if isinstance(own, nn.BatchNorm2d):
            nn.init.normal_(own.running_mean, 0, 0.3)
            nn.init.normal_(own.bias, 0.2, 0.3)
    network = GatedNetwork(model, new_gates(chosen_places(trace_gate_flow(model, EXAMPLE)), softmax=False)).eval()
    for head in network.gates.all_heads():
        nn.init.normal_(head.weight, 0, 3)
        nn.init.normal_(head.bias, 0, 0.5)
    return network


def images(count: int, seed: int) -> Tensor:
    """Returns images with a colour each, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randn(count, 3, 1, 1, generator=generator)
    return colours + 0.1 * torch.randn(count, 3, 8, 8, generator=generator)


CALIBRATION, JUDGES = images(200, seed=1), images(100, seed=2)


@dataclass(frozen=True)
class Case:
    network: GatedNetwork
    made: RoutedExport
    labels: Tensor


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    network = gated()
    with torch.no_grad():
        labels = network(JUDGES).argmax(1)
    folder = tmp_path_factory.mktemp("routes") / "new" / "net"
    with pytest.MonkeyPatch.context() as patch:  # the quick exporter
        patch.setattr(onnx_routes, "export_onnx", partial(export_onnx, exporter="torchscript"))
        return Case(network, export_routes(network, EXAMPLE, folder, CALIBRATION, JUDGES, labels), labels)


def run(path: Path, given: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    return found


# -- the files ---------------------------------------------------------------------------------------------------------


def test_a_file_per_route_computes_the_gated_network_with_the_masks_of_the_route(case: Case) -> None:
    assert 3 == len(case.made.routes.routes) == len(case.made.index.routes) == len(case.made.exports)

    for route, described in zip(case.made.routes.routes, case.made.index.routes):
        with fixed_masks(case.network, route.opened), torch.no_grad():
            expected = case.network.model(JUDGES).numpy()
        for batch in (1, 7, 100):
            found = run(case.made.folder / described.file, JUDGES[:batch])
            np.testing.assert_allclose(found, expected[:batch], rtol=1e-4, atol=1e-4)
    assert all(own.parity.passed and own.path.is_file() for own in case.made.exports)


def test_files_are_smaller_than_the_network_and_say_what_they_are(case: Case) -> None:
    dense = count_costs(case.network.model, EXAMPLE).macs

    for number, (described, sub) in enumerate(zip(case.made.index.routes, case.made.networks)):
        properties = {own.key: own.value for own in onnx.load(case.made.folder / described.file).metadata_props}
        assert count_costs(sub, EXAMPLE).macs == described.macs < dense
        assert pytest.approx(described.macs / dense) == described.macs_share
        assert ("static", LIMITS) == tuple(properties[f"nni_prune_ext.{key}"] for key in ("flavour", "limits"))
        assert f"{number} of 3" == properties["nni_prune_ext.route"]


def test_the_router_names_routes_for_any_batch_and_is_as_good_as_said(case: Case) -> None:
    router = case.made.index.router
    named = run(case.made.folder / router.file, JUDGES)

    assert (np.int64, (100,)) == (named.dtype, named.shape)
    assert named[3:4].tolist() == run(case.made.folder / router.file, JUDGES[3:4]).tolist()
    right = nearest_by_hand(case, JUDGES)
    assert pytest.approx(float(np.mean(named == right.numpy()))) == router.agreement
    assert pytest.approx(int(right.bincount().max()) / 100) == router.most_frequent
    assert router.agreement > router.most_frequent + 0.2
    assert router.macs_share < 0.3
    assert router.layers == tuple(place.layer for place in case.network.gates.places)[: len(router.layers)]


def nearest_by_hand(case: Case, given: Tensor) -> Tensor:
    """Returns the nearest centre of every image, from what the index says."""
    index = json.loads((case.made.folder / "routes.json").read_text())
    with torch.no_grad():
        case.network(given)
    away = [
        sum(
            index["weights"][layer] * ((own.float() - torch.tensor(route["centre"][layer])) ** 2).sum(1)
            for layer, own in case.network.gates.open_channels().items()
        )
        for route in index["routes"]
    ]
    return torch.stack(away).argmin(0)


def test_the_macs_of_the_router_are_those_of_what_it_runs(case: Case) -> None:
    count = len(case.made.index.router.layers)
    convs, heads, logits = (64 * 9 * 3 * 6, 64 * 9 * 6 * 8, 64 * 9 * 8 * 16), (3 * 6, 6 * 8, 8 * 16), (6, 8, 16)

    assert 1 < count < 4
    expected = sum(convs[: count - 1]) + sum(heads[:count]) + 3 * sum(logits[:count])
    assert expected == case.made.index.router.macs


def test_a_bare_onnx_runtime_needs_nothing_but_the_folder(case: Case, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", JUDGES.numpy())
    program = """
import json, sys
import numpy, onnxruntime
folder, images = sys.argv[1], numpy.load(sys.argv[2])
index = json.load(open(folder + "/routes.json"))
run = lambda name, x: onnxruntime.InferenceSession(folder + "/" + name, providers=["CPUExecutionProvider"]).run(
    None, {"input": x})[0]
named = run(index["router"]["file"], images)
scores = numpy.zeros((len(images), 4), "float32")
for number, route in enumerate(index["routes"]):
    if (named == number).any():
        scores[named == number] = run(route["file"], images[named == number])
assert "torch" not in sys.modules
print(json.dumps(scores.argmax(1).tolist()))
"""
    port = onnxruntime.InferenceSession(str(case.made.folder / "route-0.onnx")).get_inputs()[0].name
    program = program.replace('"input"', f'"{port}"')

    done = subprocess.run(
        [sys.executable, "-c", program, str(case.made.folder), str(tmp_path / "images.npy")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip

    accuracy = float(np.mean(np.array(json.loads(done.stdout)) == case.labels.numpy()))
    assert pytest.approx(accuracy) == case.made.index.routings["routes by the router"].accuracy


# -- what is measured --------------------------------------------------------------------------------------------------


def test_ways_to_run_images_are_measured_side_by_side_on_images_that_found_no_route(case: Case) -> None:
    index, right = case.made.index, nearest_by_hand(case, JUDGES)
    with torch.no_grad():
        hits = torch.stack([own(JUDGES).argmax(1) == case.labels for own in case.made.networks])
    macs = torch.tensor([float(own.macs_share) for own in index.routes])

    assert 100 == index.images == sum(own.images for own in index.routes)
    by_masks, first = index.routings["routes by full masks"], index.routings["route 0 for all"]
    assert pytest.approx(float(hits[right, torch.arange(100)].float().mean())) == by_masks.accuracy
    assert pytest.approx(float(macs[right].mean())) == by_masks.macs_share
    assert (pytest.approx(float(hits[0].float().mean())), index.routes[0].macs_share) == (
        first.accuracy,
        first.macs_share,
    )
    assert 1.0 == index.routings["gated network"].accuracy, "the labels are what it says"
    assert pytest.approx(measure_gating(case.network, EXAMPLE, [JUDGES])[0].share) == (
        index.routings["gated network"].macs_share
    )
    router = index.routings["routes by the router"]
    assert router.macs_share > index.router.macs_share + float(macs.min())
    for number, own in enumerate(index.routes):
        assert pytest.approx(float(hits[number][right == number].float().mean())) == own.accuracy
    assert index.routings["one sub-network"].accuracy <= 1
    assert 0.4 < by_masks.accuracy < 1


def test_the_index_says_how_filters_fire_and_hashes_every_file(case: Case) -> None:
    index = RoutesIndex.load(case.made.folder)

    assert index == case.made.index
    files = {path.name for path in case.made.folder.iterdir()}
    assert {"route-0.onnx", "route-1.onnx", "route-2.onnx", "router.onnx", "routes.json"} == files
    assert files - {"routes.json"} == index.parts.keys()
    for route, described in zip(case.made.routes.routes, index.routes):
        for layer, rate in route.centre.items():
            assert pytest.approx(rate.tolist(), abs=1e-4) == list(described.centre[layer])
            assert pytest.approx(float(rate.mean())) == described.firing_rate[layer]
    assert sorted((own.share for own in index.routes), reverse=True) == [own.share for own in index.routes]


def routing(macs: float, accuracy: float | None) -> Routing:
    return Routing(macs_share=macs, accuracy=accuracy)


def said(
    *,
    found: int = 3,
    agreement: float | None = 0.9,
    router_macs: float = 0.5,
    gated: float | None = 0.81,
    one: tuple[float, float | None],
) -> str:
    route = IndexedRoute(
        file="x", share=1, macs=1, macs_share=1, images=1, accuracy=None, firing_rate={}, centre={}
    )  # fmt: skip
    router = None
    ways = {"routes by full masks": routing(0.4, 0.8), "one sub-network": routing(*one)}
    ways["gated network"] = routing(0.4, gated)
    if agreement is not None:
        router = IndexedRouter(
            file="x", layers=(), macs=1, macs_share=0.1, agreement=agreement, most_frequent=0.5
        )  # fmt: skip
        ways["routes by the router"] = routing(router_macs, 0.75)
    return "; ".join(remarks(3, [route] * found, router, ways))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"one": (0.5, 0.7)}, ""),
        ({"one": (0.6, 0.9)}, ""),
        ({"one": (0.5, 0.75)}, "one sub-network for all images is at least as accurate (75.00% against 75.00%)"),
        ({"one": (0.5, None)}, ""),
        ({"one": (0.45, 0.75), "agreement": None}, ""),
        ({"one": (0.4, 0.8), "agreement": None}, "one sub-network for all images"),
        ({"one": (0.5, 0.7), "gated": 0.83}, "fixed masks cost accuracy: 80.00% against 83.00% of the gated network"),
        ({"one": (0.5, 0.7), "gated": None}, ""),
        ({"one": (0.5, 0.7), "found": 2}, "2 of 3 routes were found"),
        ({"one": (0.5, 0.7), "agreement": 0.59}, "the router hardly tells routes apart: it is right for 59.0%"),
        ({"one": (0.5, 0.7), "agreement": 0.61}, ""),
        ({"one": (1.5, 0.7), "router_macs": 1.0}, "router and route together take 1.00 of the MACs"),
    ],
)
def test_what_does_not_pay_is_said(options: dict[str, object], expected: str) -> None:
    found = said(**options)

    assert ("" == found) == ("" == expected)
    assert expected in found


# -- options -----------------------------------------------------------------------------------------------------------


def test_one_route_is_the_plain_static_sub_network_without_a_router(tmp_path: Path) -> None:
    made = export_routes(gated(), EXAMPLE, tmp_path, CALIBRATION, JUDGES, routes=1, dynamic_batch=False, multiple=4)

    assert {"route-0.onnx", "routes.json"} == {path.name for path in tmp_path.iterdir()}
    assert made.index.router is None
    assert made.index.routes[0].accuracy is None
    opened = [int(own.sum()) for own in made.routes.routes[0].opened.values()]
    assert [min(-(-own // 4) * 4, most) for own, most in zip(opened, (6, 8, 16, 16))] == [
        own.out_channels for own in made.networks[0] if isinstance(own, nn.Conv2d)
    ]
    assert {"gated network", "routes by full masks", "route 0 for all", "one sub-network"} == made.index.routings.keys()
    assert made.index.routings["one sub-network"] == made.index.routings["routes by full masks"]
    graph = onnx.load(tmp_path / "route-0.onnx").graph
    assert 1 == graph.input[0].type.tensor_type.shape.dim[0].dim_value


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """Writes files that were exported before."""

    def write(model: nn.Module, example: Tensor, path: Path, **options: object) -> object:
        path.write_bytes((case.made.folder / path.name).read_bytes())
        return case.made.exports[int(path.stem[-1])]

    monkeypatch.setattr(onnx_routes, "export_onnx", write)
    router = onnx.load(case.made.folder / "router.onnx")
    monkeypatch.setattr(onnx_routes, "router_graph", lambda *arguments, **options: router)


def test_an_unchanged_earlier_export_is_replaced(tmp_path: Path, quick: None) -> None:
    export_routes(gated(), EXAMPLE, tmp_path, CALIBRATION, JUDGES, router=False)
    assert 4 == len(list(tmp_path.iterdir()))

    export_routes(gated(), EXAMPLE, tmp_path, CALIBRATION, JUDGES, routes=2, router=False)

    assert {"route-0.onnx", "route-1.onnx", "routes.json"} == {path.name for path in tmp_path.iterdir()}
    assert 2 == len(RoutesIndex.load(tmp_path).routes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("what", ["another file", "a changed file", "an index of something else", "no folder"])
def test_what_is_not_ours_is_refused_and_stays(what: str, tmp_path: Path, quick: None) -> None:
    folder = tmp_path / "net"
    if what == "no folder":
        folder.write_text("text")
    elif what == "an index of something else":
        folder.mkdir()
        (folder / "routes.json").write_text('{"routes": []}')
    else:
        export_routes(gated(), EXAMPLE, folder, CALIBRATION, JUDGES, router=False)
        (folder / ("route-1.onnx" if what == "a changed file" else "notes.txt")).write_text("mine")
    before = contents(folder) if folder.is_dir() else folder.read_text()

    with pytest.raises(OutputError, match="is in the way"):
        export_routes(gated(), EXAMPLE, folder, CALIBRATION, JUDGES, router=False)

    assert before == (contents(folder) if folder.is_dir() else folder.read_text())


def test_a_failure_leaves_the_earlier_export(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    export_routes(gated(), EXAMPLE, tmp_path, CALIBRATION, JUDGES, router=False)
    before = contents(tmp_path)
    monkeypatch.setattr(route_judging, "run_graph", lambda graph, parts: {"route": np.full(len(JUDGES), 9)})

    with pytest.raises(ParityError, match="names the route that PyTorch names for 0.0% of 100 images"):
        export_routes(gated(), EXAMPLE, tmp_path, CALIBRATION, JUDGES, routes=2)

    assert before == contents(tmp_path)


def test_a_folder_without_an_index_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no index of routes"):
        RoutesIndex.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"labels": torch.zeros(3)}, ConfigError, "3 labels for 100 images"),
        ({"images": JUDGES[:0]}, ConfigError, "0 images to judge"),
        ({"routes": 0}, ConfigError, "number of routes is 0"),
        ({"keep": 2.0}, ConfigError, "stays open is 2.0"),
        ({"example_inputs": (EXAMPLE, EXAMPLE)}, ExportError, "2 input tensors"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    options: dict[str, object], error: type[Exception], said: str, tmp_path: Path
) -> None:
    given = {"example_inputs": EXAMPLE, "calibration": CALIBRATION, "images": JUDGES, **options}

    with pytest.raises(error, match=said):
        export_routes(gated(), folder=tmp_path / "net", **given)

    assert [] == list(tmp_path.iterdir())
