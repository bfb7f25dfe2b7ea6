"""The fastest flavour of a gated network, and a run from ``prune`` to rows, artefacts and the report page.

The clock of the first part is made up. The slow exporter runs once per network.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from nni_prune_ext import gated_deployment, gating_facts
from nni_prune_ext.deployment import (
    Measurement,
    Variant,
    compare_variants,
    gated_variants,
    load_gated,
    result_facts,
)
from nni_prune_ext.errors import ConfigError, ExportError, OutputError, ParityError
from nni_prune_ext.evaluation import LatencyReport, LatencyRow
from nni_prune_ext.export import onnx_gated
from nni_prune_ext.gated_deployment import STATIC_CORE, FastestFlavour, export_fastest
from nni_prune_ext.gates.gated_network import GatedNetwork
from nni_prune_ext.gates.placement import chosen_places, new_gates
from nni_prune_ext.graph.gate_tracing import trace_gate_flow
from nni_prune_ext.pipeline import PruneResult, prune
from nni_prune_ext.report import Row, RunReport, write_html, write_report
from nni_prune_ext.report.gate_facts import GatingFacts
from nni_prune_ext.runtimes.base import Array, RunnableModel

EXAMPLE = torch.zeros(1, 3, 8, 8)
FLAVOURS = ("mask", "compact", "compact, all layers")
OPTIONS = {"epochs": 2, "core_epochs": 0, "calibration_batches": 2, "mass": 0.7, "head_learning_rate": 1.0}


def build() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


def batches(count: int = 4, seed: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Returns images with structure: classes differ in the channel that is bright."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        labels = torch.randint(4, (16,), generator=generator)
        bright = 2 * torch.eye(4)[labels][:, :3, None, None]
        made.append((torch.randn(16, 3, 8, 8, generator=generator) + bright, labels))
    return made


@pytest.fixture(scope="module")
def network() -> GatedNetwork:
    torch.manual_seed(0)
    model = build()
    gates = new_gates(chosen_places(trace_gate_flow(model, EXAMPLE)))
    for head in gates.all_heads():
        nn.init.normal_(head.weight, 0, 6)
        nn.init.normal_(head.bias)
    return GatedNetwork(model, gates)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.cat([images for images, _ in batches()])


@pytest.fixture(scope="module", autouse=True)
def exporter_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Lets the slow exporter run once per network, for gated networks and for static cores."""
    marked: dict[int, tuple[GatedNetwork, onnx.ModelProto]] = {}
    cores: dict[int, tuple[nn.Module, Path]] = {}
    write_marked, write_core = onnx_gated.marked_graph, gated_deployment.export_onnx

    def remembered(network: GatedNetwork, example: Tensor, *, opset: int = 18) -> onnx.ModelProto:
        if id(network) not in marked:
            marked[id(network)] = (network, write_marked(network, example, opset=opset))
        return marked[id(network)][1]

    def remembered_core(model: nn.Module, example: Tensor, path: Path, **options: object) -> None:
        if id(model) not in cores:
            cores[id(model)] = (model, tmp_path_factory.mktemp("core") / "core.onnx")
            write_core(model, example, cores[id(model)][1], **options)
        shutil.copy(cores[id(model)][1], path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_gated, "marked_graph", remembered)
        patch.setattr(gated_deployment, "export_onnx", remembered_core)
        yield


@dataclass
class MadeUpClock:
    """Says what latencies are, and notes what it was asked to measure."""

    ratios: Mapping[str, float]
    error_bar: float = 0.01
    files: dict[str, bytes] = field(default_factory=dict)
    inputs: Sequence[Sequence[Array]] = ()
    settings: Mapping[str, object] = field(default_factory=dict)

    def __call__(
        self, entries: Mapping[str, tuple[object, RunnableModel]], inputs: Sequence[Sequence[Array]], **settings: object
    ) -> LatencyReport:
        self.files = {name: Path(own.onnx_path).read_bytes() for name, (_, own) in entries.items()}
        self.inputs, self.settings = inputs, settings
        rows = [
            LatencyRow(name, "made up", ratio, ratio, ratio, ratio, 1, (), {}, None)
            for name, ratio in ((name, self.ratios.get(name, 1.0)) for name in entries)
        ]
        return LatencyReport(tuple(rows), 1 + self.error_bar, self.error_bar, "cpu", 1, 1, 1, 0)


Fastest = Callable[..., tuple[FastestFlavour, MadeUpClock]]


@pytest.fixture
def second_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the second gated layer gain from gathering, whatever its size and rate; the first never does."""
    monkeypatch.setattr(
        onnx_gated, "_does_not_pay", lambda layer, rate: [] if layer.name == "3" else ["it does not pay"]
    )


@pytest.fixture
def fastest(
    network: GatedNetwork, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second_pays: None
) -> Fastest:
    def run(ratios: Mapping[str, float], *, error_bar: float = 0.01, **options: object):
        clock = MadeUpClock(ratios, error_bar)
        monkeypatch.setattr(gated_deployment, "measure_latency", clock)
        return export_fastest(network, EXAMPLE, tmp_path / "net.onnx", images, **options), clock

    return run


def properties_of(path: Path) -> dict[str, str]:
    return {own.key.removeprefix("nni_prune_ext."): own.value for own in onnx.load(path).metadata_props}


def run_one_by_one(path: Path, images: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: image[None].numpy()})[0] for image in images])


# -- the fastest flavour -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("winner", FLAVOURS)
def test_the_flavour_with_the_smallest_ratio_is_written(
    winner: str, fastest: Fastest, network: GatedNetwork, images: Tensor, tmp_path: Path
) -> None:
    with torch.no_grad():
        expected = copy.deepcopy(network).eval()(images).numpy()

    best, clock = fastest({name: 0.5 if name == winner else 0.9 for name in FLAVOURS})

    assert winner == best.name
    assert (tmp_path / "net.onnx") == best.export.path
    assert clock.files[winner] == best.export.path.read_bytes()
    found = properties_of(best.export.path)
    assert winner.split(",")[0] == found["flavour"] == best.export.flavour
    assert {"mask": "", "compact": "3", "compact, all layers": "0, 3"}[winner] == found["gathered"]
    np.testing.assert_allclose(run_one_by_one(best.export.path, images), expected, rtol=1e-4, atol=1e-4)
    assert ["net.onnx"] == [path.name for path in tmp_path.iterdir()]
    assert {} == best.refused


def test_a_reference_is_never_what_is_written(fastest: Fastest, tmp_path: Path) -> None:
    best, _ = fastest({STATIC_CORE: 0.1, "mask": 0.8, "compact": 0.9, "compact, all layers": 0.7})

    assert "compact, all layers" == best.name


def test_flavours_and_references_are_measured_together_one_image_at_a_time_on_one_thread(
    fastest: Fastest, images: Tensor, tmp_path: Path
) -> None:
    dense = tmp_path / "dense.onnx"
    dense.write_bytes(b"dense")

    best, clock = fastest({}, references={"dense": dense}, rounds=7, min_seconds=0.5)

    assert ["dense", STATIC_CORE, *FLAVOURS] == list(clock.files)
    assert [row.name for row in best.latency.rows] == list(clock.files)
    assert {"rounds": 7, "min_seconds": 0.5, "threads": 1} == clock.settings
    assert len(images) == len(clock.inputs)
    assert all(np.array_equal(image[None].numpy(), own) for image, (own,) in zip(images, clock.inputs))
    assert b"dense" == dense.read_bytes()


@pytest.mark.parametrize(
    ("mask", "error_bar", "unbeaten"),
    [
        (0.5, 0.01, ()),
        (0.95, 0.01, (STATIC_CORE,)),
        (0.995, 0.01, ("dense", STATIC_CORE)),  # within the error of the measurement
        (0.9, 0.2, ("dense", STATIC_CORE)),
        (1.2, 0.01, ("dense", STATIC_CORE)),
    ],
)
def test_the_verdict_names_the_references_that_no_flavour_beats(
    mask: float, error_bar: float, unbeaten: tuple[str, ...], fastest: Fastest, tmp_path: Path
) -> None:
    dense = tmp_path / "dense.onnx"
    dense.write_bytes(b"dense")
    ratios = {"dense": 1.0, STATIC_CORE: 0.8, "mask": mask, "compact": 2.0, "compact, all layers": 2.0}

    best, _ = fastest(ratios, error_bar=error_bar, references={"dense": dense})

    assert best.verdict.startswith(f"The fastest flavour is 'mask', × {mask:.2f} of the first reference.")
    assert bool(unbeaten) == ("No flavour beats" in best.verdict)
    assert set(unbeaten) == {name for name in ("dense", STATIC_CORE) if f"{name} (×" in best.verdict}


def test_seven_images_are_too_few(network: GatedNetwork, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on 7 images, expected 8 or more"):
        export_fastest(network, EXAMPLE, tmp_path / "net.onnx", images[:7])

    assert [] == list(tmp_path.iterdir())


def test_compact_without_a_gathered_layer_is_no_candidate_however_fast(
    fastest: Fastest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_gated, "_does_not_pay", lambda layer, rate: ["it is small"])

    best, clock = fastest({"mask": 0.9, "compact": 0.1, "compact, all layers": 0.95})

    assert ("mask", "mask") == (best.name, best.export.flavour)
    assert [STATIC_CORE, "mask", "compact, all layers"] == list(clock.files)
    assert {"compact"} == best.refused.keys()
    assert "No gated layer would compute its open filters only ('0': it is small)" in best.refused["compact"]
    batch = onnx.load(best.export.path).graph.input[0].type.tensor_type.shape.dim[0]
    assert batch.dim_param, "any batch size"


def test_where_no_layer_can_gather_only_the_mask_is_left(fastest: Fastest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        onnx_gated, "_left_out", lambda layers, rates, gathered: [(own.name, "cannot") for own in layers]
    )

    best, _ = fastest({"mask": 3.0})

    assert "mask" == best.name
    assert {"compact", "compact, all layers"} == best.refused.keys()


def test_eight_images_are_enough(network: GatedNetwork, images: Tensor, tmp_path: Path, second_pays: None) -> None:
    best = export_fastest(network, EXAMPLE, tmp_path / "net.onnx", images[:8], rounds=2, min_seconds=0)

    assert {STATIC_CORE, *FLAVOURS} == {row.name for row in best.latency.rows}
    smallest = min((row for row in best.latency.rows if row.name != STATIC_CORE), key=lambda row: row.ratio)
    assert smallest.name == best.name
    assert 1.0 == pytest.approx(best.latency.rows[0].ratio)


def test_a_flavour_that_is_wrong_is_refused_and_the_others_go_on(
    fastest: Fastest, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, "compact")

    best, clock = fastest({"mask": 3.0})

    assert "mask" == best.name
    assert {"compact", "compact, all layers"} == best.refused.keys()
    assert all("does not compute what the gated network computes" in reason for reason in best.refused.values())
    assert [STATIC_CORE, "mask"] == list(clock.files)


def broken(monkeypatch: pytest.MonkeyPatch, *flavours: str) -> None:
    """Breaks flavours: all weights of the classifier become zero."""
    for flavour in flavours:
        intact = getattr(onnx_gated, f"{flavour}_form")

        def damaged(*arguments: object, intact: Callable[..., onnx.ModelProto] = intact) -> onnx.ModelProto:
            graph = intact(*arguments)
            for own in graph.graph.initializer:
                if len(own.dims) == 2 and own.dims[0] == 4:
                    own.raw_data = bytes(len(own.raw_data))
            return graph

        monkeypatch.setattr(onnx_gated, f"{flavour}_form", damaged)


def test_if_no_flavour_is_right_the_older_file_stays_and_no_draft(
    fastest: Fastest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.onnx").write_bytes(b"older")
    broken(monkeypatch, "mask", "compact")

    with pytest.raises(ParityError):
        fastest({})

    assert ["net.onnx"] == [path.name for path in tmp_path.iterdir()]
    assert b"older" == (tmp_path / "net.onnx").read_bytes()


@pytest.mark.parametrize("part", ["measure_latency", "export_onnx"])
def test_a_failure_leaves_the_older_file_and_no_draft(
    part: str, network: GatedNetwork, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ExportError("made up")

    monkeypatch.setattr(gated_deployment, part, fail)
    (tmp_path / "net.onnx").write_bytes(b"older")

    with pytest.raises(ExportError, match="made up"):
        export_fastest(network, EXAMPLE, tmp_path / "net.onnx", images)

    assert ["net.onnx"] == [path.name for path in tmp_path.iterdir()]
    assert b"older" == (tmp_path / "net.onnx").read_bytes()


def test_properties_of_the_caller_are_in_every_flavour(fastest: Fastest) -> None:
    _, clock = fastest({}, properties={"method": "ftwt"})

    assert all(b"nni_prune_ext.method" in clock.files[name] for name in FLAVOURS)


@pytest.mark.parametrize(
    "place",
    [
        "none/net.onnx",
        pytest.param(
            "folder",
        ),
    ],
)
def test_a_place_that_cannot_be_written_is_a_mistake_of_the_caller(
    place: str, network: GatedNetwork, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gated_deployment, "measure_latency", MadeUpClock({}))
    (tmp_path / "folder").mkdir()

    with pytest.raises(OutputError):
        export_fastest(network, EXAMPLE, tmp_path / place, images)


def test_what_may_differ_goes_for_the_static_core_too(fastest: Fastest, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = []

    def note(model: nn.Module, example: Tensor, path: Path, **options: object) -> None:
        allowed.append(options.get("fail"))
        path.write_bytes(b"core")

    monkeypatch.setattr(gated_deployment, "export_onnx", note)

    fastest({}, fail=0.01)

    assert [0.01] == allowed


def test_a_reference_that_is_called_like_a_flavour_is_refused(fastest: Fastest, tmp_path: Path) -> None:
    (tmp_path / "mine.onnx").write_bytes(b"mine")

    with pytest.raises(ConfigError, match="mask"):
        fastest({}, references={"mask": tmp_path / "mine.onnx"})


def test_folding_where_no_layer_gains_leaves_that_flavour_out(
    fastest: Fastest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_gated, "_does_not_pay", lambda layer, rate: ["it is small"])

    best, clock = fastest({"compact, all layers": 0.5}, fold=True)

    assert "compact, all layers" == best.name
    assert ["compact"] == list(best.refused)
    assert "no gate left" in best.refused["compact"]
    assert [STATIC_CORE, "mask", "compact, all layers"] == list(clock.files)


# -- a run from end to end ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run that was measured and written."""

    folder: Path
    dense: nn.Module
    result: PruneResult
    rows: Mapping[str, Row]
    latency: LatencyReport | None
    gating: GatingFacts

    @property
    def gated(self) -> GatedNetwork:
        made = copy.deepcopy(self.result.outcome.gated_model)
        assert isinstance(made, GatedNetwork)
        return made.eval()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.manual_seed(0)
    dense, folder = build(), tmp_path_factory.mktemp("run") / "out"
    result = prune(dense, EXAMPLE, method="ftwt", target="macs=1", options=OPTIONS, train_batches=batches())
    variants = [
        Variant("dense", dense),
        *gated_variants(result, 1.5, OPTIONS),
        Variant("ftwt", result.model, result, 1.5, OPTIONS),
    ]
    rows, latency, [gating] = compare_variants(
        variants, folder, EXAMPLE, test_batches=batches(2, seed=9), measurement=Measurement(2, 0)
    )
    return Run(folder, dense, result, {row.name: row for row in rows}, latency, gating)


def macs_by_hand(network: GatedNetwork, images: Tensor) -> float:
    """Counts what an image needs: open filters times open inputs, heads, and the classifier's open inputs."""
    with torch.no_grad():
        network(images)
    one, two = (network.gates.open_channels()[layer].sum(1).double() for layer in ("0", "3"))
    heads = sum(len(h.bias) * (h.weight.shape[1] - (not h.removed)) for h in network.gates.all_heads())
    return float((64 * 27 * one + 64 * 9 * one * two + 4 * two + heads).mean())


def test_both_flavours_have_a_row_between_the_dense_and_the_pruned_network(done: Run) -> None:
    assert ["dense", "ftwt-mask", "ftwt-compact", "ftwt"] == list(done.rows)
    assert ["dense", "gated", "gated", "pruned"] == [row.kind for row in done.rows.values()]


@pytest.mark.parametrize("flavour", ["mask", "compact"])
def test_the_macs_of_a_gated_row_are_the_mean_over_the_test_images(flavour: str, done: Run) -> None:
    images = torch.cat([images for images, _ in batches(2, seed=9)])
    row = done.rows[f"ftwt-{flavour}"]

    assert round(macs_by_hand(done.gated, images)) == row.macs
    assert row.macs < done.rows["ftwt"].macs
    assert row.asked.startswith("expected MACs: mean over 32 test images, standard deviation ")


@pytest.mark.parametrize("flavour", ["mask", "compact"])
def test_a_gated_row_has_everything_that_is_measured(flavour: str, done: Run) -> None:
    row, labels = done.rows[f"ftwt-{flavour}"], torch.cat([labels for _, labels in batches(2, seed=9)])
    images = torch.cat([images for images, _ in batches(2, seed=9)])
    with torch.no_grad():
        right = (done.gated(images).argmax(1) == labels).float().mean()

    assert float(right) == pytest.approx(row.top1)
    assert row.top1 == row.top1_onnx
    assert sum(own.numel() for own in done.gated.parameters()) == row.params
    assert row.parity is not None
    assert row.parity <= 1e-5
    assert row.top1_removed is None
    assert row.latency_ratio is not None
    assert 1.5 == row.seconds
    assert (done.folder / row.name / "model.onnx").stat().st_size == row.onnx_bytes


@pytest.mark.parametrize("name", ["ftwt-mask", "ftwt-compact", "ftwt"])
def test_an_artefact_folder_gives_the_gated_network_back(name: str, done: Run) -> None:
    images = batches(1, seed=9)[0][0]
    with torch.no_grad():
        expected = done.gated(images)

    found = load_gated(build, done.folder / name).eval()

    with torch.no_grad():
        assert torch.equal(expected, found(images))


@pytest.mark.parametrize("flavour", ["mask", "compact"])
def test_the_file_in_an_artefact_folder_computes_the_gated_network(flavour: str, done: Run) -> None:
    images = batches(1, seed=9)[0][0]
    with torch.no_grad():
        expected = done.gated(images)

    path = done.folder / f"ftwt-{flavour}" / "model.onnx"
    np.testing.assert_allclose(run_one_by_one(path, images), expected.numpy(), rtol=1e-4, atol=1e-4)
    assert flavour == properties_of(path)["flavour"]
    assert ("ftwt", f"ftwt-{flavour}") == (properties_of(path)["method"], properties_of(path)["variant"])


def test_firing_is_counted_over_the_test_images(done: Run) -> None:
    images, gated = torch.cat([images for images, _ in batches(2, seed=9)]), done.gated
    with torch.no_grad():
        gated(images)

    assert ("ftwt", "test images", 32) == (done.gating.network, done.gating.data, done.gating.images)
    assert list(gated.gates.open_channels()) == [layer.layer for layer in done.gating.layers]
    for layer in done.gating.layers:
        rate = gated.gates.open_channels()[layer.layer].double().mean(0)
        bits = -(rate * rate.log2() + (1 - rate) * (1 - rate).log2()).nan_to_num(0.0)
        assert (len(rate), len(rate)) == (layer.filters, layer.units)
        assert (int((rate == 0).sum()), int((rate == 1).sum())) == (layer.never, layer.always)
        assert layer.filters == layer.never + layer.always + layer.varying
        assert float(rate.mean()) == pytest.approx(layer.rate)
        assert float(bits.mean()) == pytest.approx(layer.entropy_bits, abs=1e-9)
        assert 0.64 == layer.break_even, "of single filters, 3×3 kernels and 64 pixels"
    assert any(layer.varying for layer in done.gating.layers)


def test_macs_are_said_with_their_spread_and_refer_to_the_dense_network(done: Run) -> None:
    images = torch.cat([images for images, _ in batches(2, seed=9)])
    by_image = torch.tensor([macs_by_hand(done.gated, image[None]) for image in images], dtype=torch.float64)
    macs = done.gating.macs

    assert macs is not None
    assert float(by_image.mean()) == pytest.approx(macs.mean)
    assert float(by_image.std(correction=0)) == pytest.approx(macs.spread)
    assert (float(by_image.min()), float(by_image.max())) == pytest.approx((macs.smallest, macs.largest))
    assert done.rows["dense"].macs == macs.dense
    assert sum(head.macs for head in done.gated.gates.all_heads()) == macs.heads
    assert 0 < macs.official < macs.mean


def test_both_files_say_how_their_masks_agree_and_which_layers_are_gathered(done: Run) -> None:
    assert ["ftwt-mask", "ftwt-compact"] == [file.name for file in done.gating.files]
    for file in done.gating.files:
        assert file.agreement is not None
        assert (16, 16, 1.0) == (file.agreement.images, file.agreement.compared, file.agreement.agreement)
        assert 16 * sum(layer.units for layer in done.gating.layers) == file.agreement.bits
        assert done.rows[file.name].parity == file.agreement.max_rel
        assert done.rows[file.name].parity_limit == file.agreement.fail
        found = properties_of(done.folder / file.name / "model.onnx")
        assert (found["flavour"], found["limits"]) == (file.flavour, file.limits)
        assert ((), {layer.layer for layer in done.gating.layers}) == (file.gathered, set(file.masked))
    mask, compact = done.gating.files
    assert {"the flavour is mask"} == set(mask.masked.values())
    assert all(reason.endswith(" M MACs only") for reason in compact.masked.values())
    assert {} == done.gating.failed


def test_all_networks_are_measured_side_by_side(done: Run) -> None:
    assert done.latency is not None
    assert list(done.rows) == [row.name for row in done.latency.rows]


def test_the_page_explains_gated_marks_and_shows_how_filters_fire(done: Run, tmp_path: Path) -> None:
    facts = {key: value for key, value in result_facts(done.result).items() if key != "epochs"}
    write_report(tmp_path / "report.json", list(done.rows.values()), {"title": "tiny", **facts})

    write_html(tmp_path / "report.html", [RunReport.load(tmp_path)])

    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "gated per input: MACs are a mean over the test images" in text
    assert '<img alt="" src="data:image/png;base64,' in text
    assert "Firing rates, one band per gated layer" in text
    assert "ftwt-compact" in text


def test_the_page_of_a_run_without_gates_does_not_speak_of_them(done: Run, tmp_path: Path) -> None:
    write_report(tmp_path / "report.json", [done.rows["dense"], done.rows["ftwt"]], {"title": "tiny"})

    write_html(tmp_path / "report.html", [RunReport.load(tmp_path)])

    assert "gated per input" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_result_without_gates_has_no_gated_variants() -> None:
    result = prune(build(), EXAMPLE, target="macs=0.8")

    assert [] == gated_variants(result, None, {})


def test_without_test_images_a_gated_row_does_not_claim_to_be_a_mean(done: Run, tmp_path: Path) -> None:
    variants = [Variant("dense", done.dense), *gated_variants(done.result, None, OPTIONS)[:1]]

    rows, latency, [gating] = compare_variants(variants, tmp_path / "out", EXAMPLE, measurement=None)

    expected, firing = done.result.outcome.gating
    assert ("training images that the method calibrated on", expected.images) == (gating.data, gating.images)
    assert [own.varying for own in firing.values()] == [layer.varying for layer in gating.layers]
    assert expected.mean == gating.macs.mean
    assert latency is None
    assert [None, None] == [row.top1 for row in rows]
    assert "mean over" not in rows[1].asked


def test_a_flavour_that_cannot_be_written_costs_its_row_and_not_the_run(
    done: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, "compact")
    told: list[str] = []
    variants = [Variant("dense", done.dense), *gated_variants(done.result, None, OPTIONS)]
    settings = {"test_batches": batches(1), "progress": told.append, "measurement": Measurement(1, 0)}

    rows, latency, [gating] = compare_variants(variants, tmp_path / "out", EXAMPLE, **settings)

    assert ["dense", "ftwt-mask"] == [row.name for row in rows]
    assert latency is not None
    assert ["dense", "ftwt-mask"] == [row.name for row in latency.rows]
    assert ["dense", "ftwt-mask"] == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert any(line.startswith("no row ftwt-compact: The ONNX file does not compute") for line in told)
    assert ["ftwt-mask"] == [file.name for file in gating.files]
    assert ["ftwt-compact"] == list(gating.failed)
    assert any(line == f"no row ftwt-compact: {gating.failed['ftwt-compact']}" for line in told)
    assert [layer.layer for layer in done.gating.layers] == [layer.layer for layer in gating.layers]


def test_macs_of_all_rows_are_those_of_one_image_whatever_the_example(done: Run, tmp_path: Path) -> None:
    variants = [Variant("dense", done.dense), *gated_variants(done.result, None, OPTIONS)[:1]]
    given = batches(2, seed=9)

    rows, *_ = compare_variants(
        variants, tmp_path / "out", EXAMPLE.expand(2, -1, -1, -1), test_batches=given, measurement=None
    )

    expected = done.rows["ftwt-mask"].macs / done.rows["dense"].macs
    assert expected == pytest.approx(rows[1].macs / rows[0].macs, rel=1e-4), "whole numbers both"


def test_the_gates_of_one_network_are_measured_once_for_all_its_files(
    done: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, measure = [], gating_facts.measure_gating
    monkeypatch.setattr(gating_facts, "measure_gating", lambda *a, **k: calls.append(a) or measure(*a, **k))
    variants = [Variant("dense", done.dense), *gated_variants(done.result, None, OPTIONS)]

    compare_variants(variants, tmp_path / "out", EXAMPLE, test_batches=batches(1), measurement=None)

    assert 1 == len(calls)


class LoaderWithoutLength:
    """Batches whose number is not known, as those of a loader over a stream."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(batches(1))

    def __len__(self) -> int:
        raise TypeError("a stream has no length")


def test_test_images_may_come_from_a_stream(done: Run, tmp_path: Path) -> None:
    variants = [Variant("dense", done.dense), *gated_variants(done.result, None, OPTIONS)[:1]]

    *_, [gating] = compare_variants(
        variants, tmp_path / "out", EXAMPLE, test_batches=LoaderWithoutLength(), measurement=None
    )

    assert ("test images", 16) == (gating.data, gating.images)


def test_a_gated_network_whose_method_measured_nothing_has_its_files_only(done: Run, tmp_path: Path) -> None:
    silent = replace(done.result, outcome=replace(done.result.outcome, gating=None))
    variants = [Variant("dense", done.dense), *gated_variants(silent, None, OPTIONS)[:1]]

    *_, [gating] = compare_variants(variants, tmp_path / "out", EXAMPLE, measurement=None)

    assert (None, None, (), None) == (gating.data, gating.images, gating.layers, gating.macs)
    assert ["ftwt-mask"] == [file.name for file in gating.files]
    assert gating.files[0].agreement is None, "there were no images to compare on"


def test_a_run_without_gates_has_no_entry(tmp_path: Path) -> None:
    *_, gating = compare_variants([Variant("dense", build())], tmp_path / "out", EXAMPLE, measurement=None)

    assert () == gating
