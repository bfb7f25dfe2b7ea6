"""``gates``: what it says before any training, the files that it writes, and what it says to mistakes.

The slow exporter runs once per network; whoever asks again gets the same graph from memory.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from nni_prune_ext import cli, gates
from nni_prune_ext.data.batches import split_batches
from nni_prune_ext.data.sources import open_data
from nni_prune_ext.deployment import load_gated
from nni_prune_ext.export import artefact_loading, onnx_gated
from nni_prune_ext.export.manifest import MethodUse, read_manifest
from nni_prune_ext.export.provenance import state_dict_sha256
from nni_prune_ext.gates import GatedNetwork
from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.methods.ftwt import FTWT
from nni_prune_ext.report import RunReport

MODULE = """
from torch import nn
from nni_prune_ext.data.sources import open_data


def build(num_classes=10, in_channels=1):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )


def images():
    return open_data("digits", limit=80)
"""
MODEL, DATA = "tiny_for_gates:build", "tiny_for_gates:images"
PRUNE = [
    *("prune", MODEL, "--data", DATA, "--batch-size", "20", "--method", "ftwt", "--target", "macs=1"),
    *("--option", "epochs=2", "--option", "mass=0.6", "--option", "softmax=false", "--option", "safe_start=false"),
    *("--option", "calibration_batches=2", "--epochs", "0", "--no-measure", "--no-control", "--out", "run"),
]
ESTIMATE = ("gates", "estimate", MODEL, "--data", DATA, "--images", "32")

Command = Callable[..., tuple[int, str, str]]


def run_command(*words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["nni-prune-ext", *words])
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


def remember(patch: pytest.MonkeyPatch) -> None:
    """Lets the exporter run once for networks with equal tensors."""
    known: dict[object, onnx.ModelProto] = {}
    write = onnx_gated.marked_graph

    def remembered(network: GatedNetwork, example: ExampleInputs, *, opset: int = 18) -> onnx.ModelProto:
        key = state_dict_sha256(network), opset
        if key not in known:
            known[key] = write(network, example, opset=opset)
        return known[key]

    patch.setattr(onnx_gated, "marked_graph", remembered)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a module and a run of FTWT, which is made once."""
    folder = tmp_path_factory.mktemp("gates")
    (folder / "tiny_for_gates.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setattr(sys, "path", [*sys.path])
        remember(patch)
        with redirect_stdout(StringIO()):
            assert 0 == run_command(*PRUNE)
        yield folder
    sys.modules.pop("tiny_for_gates", None)


@pytest.fixture
def folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def invoke(*words: str) -> tuple[int, str, str]:
        code = run_command(*words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return invoke


def export(run: Path, *words: str, artefact: str = "ftwt", out: str = "net.onnx") -> list[str]:
    given = str(run / "run" / artefact)
    return ["gates", "export", MODEL, "--artefact", given, "--data", DATA, "--out", out, *words]


def first_test_images(count: int) -> Tensor:
    images, _ = next(iter(split_batches(open_data("digits", limit=80), "test", count)))
    return images


def facts_of(out: str) -> dict[str, object]:
    return json.loads(out.splitlines()[-1])


# -- gates estimate ----------------------------------------------------------------------------------------------------


def test_the_estimate_is_a_table_with_a_row_per_mass(folder: Path, command: Command, run: Path) -> None:
    code, out, err = command(*ESTIMATE, "--mass", "0.5", "--mass", "1")

    assert (0, "") == (code, err)
    for heading in ("mass", "MACs open", "closed", "official", "ceiling"):
        assert heading in out
    assert 2 == sum(line.strip("│┃ ").startswith(("0.5 ", "1 ")) for line in out.splitlines())
    assert [] == list(folder.iterdir())


def test_the_estimate_as_json_saves_more_for_less_mass(folder: Path, command: Command, run: Path) -> None:
    code, out, _ = command(*ESTIMATE, "--mass", "0.3", "--mass", "0.7", "--mass", "1", "--json")

    found = facts_of(out)
    assert (0, "done") == (code, found["event"])
    assert [0.3, 0.7, 1.0] == [row["mass"] for row in found["estimates"]]
    shares = [row["closed_loop_macs_share"] for row in found["estimates"]]
    assert sorted(shares) == shares
    assert 0 < shares[0] < shares[1] < shares[2]
    for row in found["estimates"]:
        assert {"open_loop_macs_share", "closed_loop_spread", "official_macs_share", "accuracy"} < row.keys()
        assert 0 <= row["accuracy"] <= 1
    assert (None, None) == (found["macs"], found["mass"])
    assert [] == list(folder.iterdir())


def test_a_mass_is_found_for_a_share_of_the_macs(folder: Path, command: Command, run: Path) -> None:
    code, out, _ = command(*ESTIMATE, "--macs", "0.6", "--mass", "1", "--json")

    assert 0 == code
    mass = facts_of(out)["mass"]
    code, out, _ = command(*ESTIMATE, "--mass", str(mass), "--json")
    assert 0.5 < facts_of(out)["estimates"][0]["closed_loop_macs_share"] <= 0.6


def test_a_mass_that_is_found_is_said_below_the_table(folder: Path, command: Command, run: Path) -> None:
    code, out, _ = command(*ESTIMATE, "--macs", "0.6", "--mass", "1")

    assert 0 == code
    assert "for 60% of the dense MACs (closed loop): mass 0." in out


def test_uniform_masses_are_shares_of_the_filters_that_go(folder: Path, command: Command, run: Path) -> None:
    code, out, _ = command(*ESTIMATE, "--uniform", "--json")

    found = facts_of(out)["estimates"]
    assert 0 == code
    assert max(row["mass"] for row in found) < 1
    shares = [row["closed_loop_macs_share"] for row in found]
    assert sorted(shares, reverse=True) == shares


def test_blocks_of_filters_are_foreseen(
    folder: Path, command: Command, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "solve_mass", lambda *_, block, **__: block / 10)
    words = (*ESTIMATE, "--mass", "0.5", "--macs", "0.6", "--json")
    single, blocks = (facts_of(command(*words, *more)[1]) for more in ((), ("--block", "4")))

    assert (1, 4) == (single["block"], blocks["block"])
    assert blocks["estimates"][0]["closed_loop_macs_share"] != single["estimates"][0]["closed_loop_macs_share"]
    assert (0.1, 0.4) == (single["mass"], blocks["mass"])
    code, out, _ = command(*ESTIMATE, "--mass", "0.5", "--block", "4")
    assert 0 == code
    assert "blocks of up to 4 filters" in out


def test_layers_to_gate_can_be_named(folder: Path, command: Command, run: Path) -> None:
    _, every, _ = command(*ESTIMATE, "--mass", "0.5", "--json")
    code, one, _ = command(*ESTIMATE, "--mass", "0.5", "--gate", "3", "--json")

    assert 0 == code
    shares = [facts_of(out)["estimates"][0]["closed_loop_macs_share"] for out in (every, one)]
    assert shares[0] < shares[1] < 1


# -- gates export ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flavour", "artefact"), [("mask", "ftwt"), ("compact", "ftwt"), ("compact", "ftwt-mask")])
def test_a_flavour_is_written_that_computes_the_gated_network(
    flavour: str, artefact: str, folder: Path, command: Command, run: Path
) -> None:
    code, out, err = command(*export(run, "--flavour", flavour, artefact=artefact))

    assert (0, "") == (code, err)
    assert ["net.onnx"] == [path.name for path in folder.iterdir()]
    assert f"net.onnx: flavour {flavour}, " in out
    assert "of the mask bits agree with PyTorch on 64 images" in out
    assert "Limits: " in out
    assert (flavour == "compact") == ("open filters only: " in out)
    images = first_test_images(8)
    with torch.no_grad():
        expected = load_gated(sys.modules["tiny_for_gates"].build(), run / "run" / artefact).eval()(images).numpy()
    session = onnxruntime.InferenceSession(str(folder / "net.onnx"), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    found = np.concatenate([session.run(None, {name: image[None].numpy()})[0] for image in images])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_fastest_flavour_says_what_it_measured(folder: Path, command: Command, run: Path) -> None:
    code, out, err = command(*export(run, "--json"))

    found = facts_of(out)
    assert (0, "") == (code, err)
    assert {"dense", "static core", "mask", "compact, all layers"} == found["latency_ratios"].keys()
    assert {"compact"} == found["refused"].keys(), "these layers are too small to gain"
    assert found["verdict"].startswith("The fastest flavour is '")
    assert str(run / "run" / "dense" / "model.onnx") == found["dense"]
    assert 1 == pytest.approx(found["latency_ratios"]["dense"])
    properties = {own.key: own.value for own in onnx.load(folder / "net.onnx").metadata_props}
    assert found["flavour"] == properties["nni_prune_ext.flavour"]
    assert found["size_bytes"] == (folder / "net.onnx").stat().st_size
    assert found["parity"]["passed"]
    assert ["net.onnx"] == [path.name for path in folder.iterdir()]


def test_a_dense_network_can_be_named_and_is_said(folder: Path, command: Command, run: Path) -> None:
    shutil.copy(run / "run" / "ftwt" / "model.onnx", "mine.onnx")  # the static core, in the place of any network

    code, out, err = command(*export(run, "--dense", "mine.onnx"))

    assert (0, "") == (code, err)
    assert "\nratios are to the dense network mine.onnx\n" in out
    assert "\n  dense: × 1.00\n" in out
    assert "\n  compact: not considered. No gated layer would compute its open filters only" in out
    assert ["mine.onnx", "net.onnx"] == sorted(path.name for path in folder.iterdir())
    assert (run / "run" / "ftwt" / "model.onnx").read_bytes() == (folder / "mine.onnx").read_bytes()


def test_a_run_without_a_dense_network_says_so(folder: Path, command: Command, run: Path) -> None:
    shutil.copytree(run / "run" / "ftwt", "alone/ftwt")

    code, out, _ = command("gates", "export", MODEL, "--artefact", "alone/ftwt", "--data", DATA, "--out", "net.onnx")

    assert 0 == code
    assert "no dense network was timed, ratios are to the static core; --dense names one" in out
    assert "  static core: × 1.00" in out
    assert "  dense: ×" not in out


def test_the_flavour_static_is_a_folder_with_a_file_per_route(folder: Path, command: Command, run: Path) -> None:
    code, out, err = command(
        *export(run, "--flavour", "static", "--routes", "2", "--keep", "0.6", "--multiple", "4", out="new/net")
    )

    assert (0, "") == (code, err)
    made = folder / "new" / "net"
    assert {"route-0.onnx", "route-1.onnx", "router.onnx", "routes.json"} == {path.name for path in made.iterdir()}
    index = json.loads((made / "routes.json").read_text())
    assert 0.6 == index["keep"]
    core = load_gated(sys.modules["tiny_for_gates"].build(), run / "run" / "ftwt").model
    full = {own.out_channels for own in core if isinstance(own, nn.Conv2d)}
    for route in index["routes"]:
        dims = [own.dims for own in onnx.load(made / route["file"]).graph.initializer if len(own.dims) == 4]
        assert all(own[0] % 4 == 0 or own[0] in full for own in dims), "a multiple, as far as there are channels"
    for number, route in enumerate(index["routes"]):
        assert f"new/net/route-{number}.onnx: {route['share']:.1%} of the images that the routes were found on" in out
    assert f"new/net/router.onnx: {index['router']['macs_share']:.3f} of the MACs, right for " in out
    for name, way in index["routings"].items():
        assert f"  {name}: {way['macs_share']:.3f} of the MACs, accuracy {way['accuracy']:.2%}" in out
    assert index["remarks"] == [line[6:] for line in out.splitlines() if line.startswith("note: ")]
    assert "Limits: any runtime and any batch size, but all images of a batch take one route" in out


def test_the_flavour_static_as_json_finds_routes_on_training_images_and_judges_them_on_test_images(
    folder: Path, command: Command, run: Path
) -> None:
    code, out, _ = command(*export(run, "--flavour", "static", "--routes", "1", "--images", "12", "--json", out="net"))

    found = facts_of(out)
    network = load_gated(sys.modules["tiny_for_gates"].build(), run / "run" / "ftwt").eval()
    train, _ = next(iter(split_batches(open_data("digits", limit=80), "train", 12)))
    with torch.no_grad():
        network(train)
    rates = {layer: float(own.float().mean()) for layer, own in network.gates.open_channels().items()}
    assert (0, "static", "net", 12) == (code, found["flavour"], found["path"], found["images"])
    assert {layer: pytest.approx(rate) for layer, rate in rates.items()} == found["routes"][0]["firing_rate"]
    assert found["router"] is None
    images, labels = next(iter(split_batches(open_data("digits", limit=80), "test", 12)))
    with torch.no_grad():
        accuracy = float((network(images).argmax(1) == labels).float().mean())
    assert pytest.approx(accuracy) == found["routings"]["gated network"]["accuracy"]


# -- mistakes ----------------------------------------------------------------------------------------------------------


def dense(run: Path, file: str) -> list[str]:
    """Returns a command with a dense network that is in the run's folder, where other files lie, too."""
    shape = [1, 3, 5, 5] if file == "colours.onnx" else [4, 1, 16, 16]
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "other", ports[:1], ports[1:])
    if file in ("colours.onnx", "four.onnx"):
        onnx.save(onnx.helper.make_model(graph), str(run / file))
    return export(run, "--dense", str(run / file))


MISTAKES = {
    "a dense network that is not there": (lambda run: dense(run, "nothing.onnx"), "There is no file '"),
    "a folder as dense network": (lambda run: dense(run, "run"), "expected the ONNX file of the dense network"),
    "a dense network of colours": (lambda run: dense(run, "colours.onnx"), "(1, 3, 5, 5), expected (1, 1, 16, 16)"),
    "a dense network of four images": (lambda run: dense(run, "four.onnx"), "(4, 1, 16, 16), expected (1, 1, 16, 16)"),
    "a dense network that is text": (lambda run: dense(run, "tiny_for_gates.py"), "cannot be read as ONNX"),
    "a dense network with mask": (lambda run: export(run, "--flavour", "mask", "--dense", "a.onnx"), "without timing"),
    "a dense network to write": (
        lambda run: export(run, "--dense", str(run / "run/dense/model.onnx"), out=str(run / "run/dense/model.onnx")),
        "--dense and --out are both",
    ),
    "a folder without a gated network": (lambda run: export(run, artefact="dense"), "gated"),
    "a folder that is not there": (lambda run: export(run, artefact="nothing"), "nothing"),
    "an unknown flavour": (
        lambda run: export(run, "--flavour", "fast"),
        "'fast', expected mask, compact, static or fastest",
    ),
    "static with fold": (lambda run: export(run, "--flavour", "static", "--fold"), "static has no gates to fold"),
    "routes of a mask": (lambda run: export(run, "--flavour", "mask", "--routes", "2"), "given with the flavour mask"),
    "keep by default": (lambda run: export(run, "--keep", "0.5"), "given with the flavour fastest"),
    "no router of compact": (
        lambda run: export(run, "--flavour", "compact", "--no-router"),
        "given with the flavour compact",
    ),
    "multiple of mask": (
        lambda run: export(run, "--flavour", "mask", "--multiple", "4"),
        "given with the flavour mask",
    ),
    "no route": (lambda run: export(run, "--flavour", "static", "--routes", "0"), "greater than or equal to 1"),
    "keep above one": (lambda run: export(run, "--flavour", "static", "--keep", "2"), "stays open is 2.0, expected"),
    "mask with fold": (lambda run: export(run, "--flavour", "mask", "--fold"), "mask gathers and folds nothing"),
    "too few images": (lambda run: export(run, "--images", "7"), "greater than or equal to 8"),
    "a mass above one": (lambda run: [*ESTIMATE, "--mass", "1.5"], "The mass is 1.5, expected 0–1"),
    "a mass below zero": (lambda run: [*ESTIMATE, "--mass", "-0.1"], "The mass is -0.1"),
    "all filters go": (lambda run: [*ESTIMATE, "--uniform", "--mass", "1"], "expected 0–1 without 1"),
    "macs with uniform": (lambda run: [*ESTIMATE, "--uniform", "--macs", "0.5"], "--macs and --uniform"),
    "macs that cannot be reached": (lambda run: [*ESTIMATE, "--macs", "0.01", "--mass", "1"], "0.01"),
    "an unknown block": (lambda run: [*ESTIMATE, "--block", "5"], "The block is 5, expected one of 1, 4, 8, 16"),
    "an unknown layer": (lambda run: [*ESTIMATE, "--gate", "layer9.*"], "layer9.*"),
    "an unknown model": (lambda run: ["gates", "estimate", "resnet21", "--data", DATA], "resnet21"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_nothing_is_written(
    mistake: str, folder: Path, command: Command, run: Path
) -> None:
    words, said = MISTAKES[mistake]

    code, out, err = command(*words(run))

    assert 2 == code
    assert said in err
    assert "Traceback" not in err
    assert "" == out
    assert [] == list(folder.iterdir())


def test_a_mistake_is_one_json_line_where_json_is_asked_for(folder: Path, command: Command, run: Path) -> None:
    code, out, _ = command(*ESTIMATE, "--mass", "1.5", "--json")

    found = facts_of(out)
    assert 2 == code
    assert ("error", "ConfigError", 2) == (found["event"], found["kind"], found["exit_code"])


def test_the_file_is_compared_on_test_images(folder: Path, command: Command, run: Path) -> None:
    network = load_gated(sys.modules["tiny_for_gates"].build(), run / "run" / "ftwt").eval()
    with torch.no_grad():
        network(first_test_images(40))
    opened = torch.cat(list(network.gates.opened.values()), 1)
    assert (opened != opened[:1]).any()  # so that other images would say something else

    code, out, _ = command(*export(run, "--flavour", "mask", "--images", "40", "--json"))

    parity = facts_of(out)["parity"]
    assert (0, 40) == (code, parity["images"])
    assert float(opened.float().mean()) == pytest.approx(parity["firing_rate"])


def test_an_operator_set_can_be_chosen(folder: Path, command: Command, run: Path) -> None:
    code, _, _ = command(*export(run, "--flavour", "mask", "--opset", "20"))

    assert 0 == code
    assert 20 == onnx.load(folder / "net.onnx").opset_import[0].version


def test_an_operator_set_can_be_chosen_for_the_fastest_flavour(folder: Path, command: Command, run: Path) -> None:
    code, _, _ = command(*export(run, "--opset", "20"))

    assert 2 == code or 20 == onnx.load(folder / "net.onnx").opset_import[0].version


def test_a_mistake_makes_no_folder(folder: Path, command: Command, run: Path) -> None:
    code, _, _ = command(*export(run, "--flavour", "mask", "--fold", out="new/net.onnx"))

    assert 2 == code
    assert [] == list(folder.iterdir())


def test_an_older_file_survives_a_mistake(folder: Path, command: Command, run: Path) -> None:
    (folder / "net.onnx").write_bytes(b"older")

    code, _, _ = command(*export(run, "--flavour", "mask", "--fold"))

    assert 2 == code
    assert b"older" == (folder / "net.onnx").read_bytes()


@pytest.mark.parametrize("flavour", ["mask", "fastest", "static"])
def test_an_older_export_is_replaced_only_where_it_may_be(
    flavour: str, folder: Path, command: Command, run: Path
) -> None:
    assert 0 == command(*export(run, "--flavour", flavour))[0]
    older = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in written(folder)}

    code, out, err = command(*export(run, "--flavour", flavour))
    assert (2, "") == (code, out)
    assert "--overwrite" in err
    assert older == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in written(folder)}

    assert 0 == command(*export(run, "--flavour", flavour, "--overwrite"))[0]
    assert all(older[path][1] < path.stat().st_mtime_ns for path in written(folder))


def written(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_folder_is_no_name_of_a_file(folder: Path, command: Command, run: Path) -> None:
    (folder / "net.onnx").mkdir()

    code, _, err = command(*export(run, "--flavour", "mask", "--overwrite"))

    assert (2, True) == (code, "a folder, expected the name of a file, for example net.onnx/gated.onnx" in err)


def test_overwrite_spares_what_no_export_wrote(folder: Path, command: Command, run: Path) -> None:
    (folder / "net.onnx").mkdir()
    (folder / "net.onnx" / "mine.txt").write_text("mine")

    code, _, err = command(*export(run, "--flavour", "static", "--overwrite"))

    assert (2, True) == (code, "is in the way" in err)
    assert "mine" == (folder / "net.onnx" / "mine.txt").read_text()


def test_images_can_be_limited(folder: Path, command: Command, run: Path) -> None:
    words = [word if word != DATA else "digits" for word in export(run, "--flavour", "mask", "--json")]

    code, out, err = command(*words, "--images", "60", "--limit-images", "30")

    assert (0, 30) == (code, facts_of(out)["parity"]["images"]), err


class OtherGates(nn.Module):
    """A gated network of another kind with the same tensors."""

    def __init__(self, network: GatedNetwork) -> None:
        super().__init__()
        self.model, self.gates = network.model, network.gates


OTHER = replace(FTWT, name="other", build_gated=lambda *arguments: OtherGates(FTWT.build_gated(*arguments)))


@pytest.mark.parametrize(("known", "said"), [(False, "'other' is not registered"), (True, "is a OtherGates, expected")])
def test_a_gated_network_of_another_method_is_refused(
    known: bool, said: str, folder: Path, command: Command, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artefact = Path(shutil.copytree(run / "run" / "ftwt", folder / "other"))
    read_manifest(artefact).model_copy(update={"method": MethodUse(name="other", options={})}).save(artefact)
    monkeypatch.setattr(artefact_loading, "_registered", lambda name: OTHER if known and name == "other" else None)

    code, out, err = command("gates", "export", MODEL, "--artefact", "other", "--data", DATA, "--out", "net.onnx")

    assert 2 == code
    assert said in err
    assert "" == out
    assert ["other"] == [path.name for path in folder.iterdir()]


def test_the_report_of_a_run_says_how_its_gates_fire_and_came_out(run: Path) -> None:
    report = RunReport.load(run / "run")
    network = load_gated(sys.modules["tiny_for_gates"].build(), run / "run" / "ftwt").eval()
    tests = torch.cat([images for images, _ in split_batches(sys.modules["tiny_for_gates"].images(), "test", 64)])
    with torch.no_grad():
        network(tests)

    [own] = report.gating

    assert ("ftwt", "test images", len(tests)) == (own.network, own.data, own.images)
    expected = {layer: float(opened.float().mean()) for layer, opened in network.gates.open_channels().items()}
    assert expected == pytest.approx({layer.layer: layer.rate for layer in own.layers})
    assert ["ftwt-mask", "ftwt-compact"] == [file.name for file in own.files]
    text = (run / "run" / "report.html").read_text(encoding="utf-8")
    assert f"Measured on {len(tests)} test images (data: {DATA})" in re.sub("<wbr>", "", text)
    assert "No layer of ftwt-compact gains from its gate" in text
    copy = RunReport.load(run / "run" / "ftwt")
    assert report.gating == copy.gating
