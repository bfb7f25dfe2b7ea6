"""Gated networks as ONNX files: what a bare ONNX Runtime computes against PyTorch, and what is refused.

The slow exporter runs once per network; whoever asks again gets the same graph from memory.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.errors import ConfigError, ExportError, NniPruneExtError, OutputError, ParityError
from nni_prune_ext.export import gated_graph, onnx_gated
from nni_prune_ext.export.gate_graphs import GatedLayer, compact_form, with_masks
from nni_prune_ext.export.gated_graph import marked_graph
from nni_prune_ext.export.onnx_gated import LIMITS, GatedExport, break_even, export_gated, firing_rates
from nni_prune_ext.gates.gated_network import GatedNetwork, Gates
from nni_prune_ext.gates.heads import GateHead
from nni_prune_ext.gates.placement import chosen_places
from nni_prune_ext.graph.gate_tracing import trace_gate_flow

Array = npt.NDArray[np.generic]

SCATTERED = (1, 0, 2, 1, 0, 2, 2, 1, 0, 1, 2, 0)  # three blocks of four
UNEQUAL = (0, 1, 0, 2, 0, 0, 3, 0, 1, 0, 2, 0, 0, 1, 0, 0)  # units of ten, three, two and one
EXAMPLE = torch.zeros(1, 3, 8, 8)
FLAVOURS = ("mask", "compact")


class Net(nn.Module):
    """A residual block, a depthwise block with squeeze-and-excitation, and a projection: every kind of reader."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.back, self.back_norm = nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.wide, self.wide_norm = nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16, affine=False)
        self.deep, self.deep_norm = nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.BatchNorm2d(16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.narrow, self.narrow_norm = nn.Conv2d(16, 12, 1), nn.BatchNorm2d(12)
        self.last = nn.Conv2d(12, 6, 3)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem_norm(self.stem(x)))
        y = functional.relu(self.inner_norm(self.inner(x)))
        x = functional.relu(self.back_norm(self.back(y)) + x)
        x = functional.hardswish(self.wide_norm(self.wide(x)))
        x = functional.relu(self.deep_norm(self.deep(x)))
        pooled = x.mean((2, 3), keepdim=True)
        x = x * torch.sigmoid(self.excite(functional.relu(self.squeeze(pooled))))
        x = functional.relu(self.narrow_norm(self.narrow(x)))
        return self.head(functional.relu(self.last(x)).mean((2, 3)))


HEADS: dict[str, Callable[[], GateHead]] = {
    "stem": lambda: GateHead(3, range(8)),
    "inner": lambda: GateHead(8, SCATTERED),
    "back": lambda: GateHead(32, range(8)).cut(torch.arange(12), torch.arange(8)),  # twenty inputs are gone
    "wide": lambda: GateHead(8, UNEQUAL, softmax=False),
    "deep": lambda: GateHead(16, range(16), pool="avg"),
    "narrow": lambda: GateHead(16, SCATTERED, pool="avg", softmax=False),
    "last": lambda: GateHead(15, range(6), pool="avg").cut(torch.arange(12), torch.arange(6)),
}
"""Layer → its head; together they have every option that a head has."""


class Chain(nn.Module):
    """Convolutions one after the other, each with a norm; the classifier reads the last one."""

    def __init__(
        self, widths: Sequence[int] = (8, 8), kernels: Sequence[int] = (3, 3), norms: Sequence[str] = ("batch",) * 4
    ) -> None:
        super().__init__()
        make = {
            "batch": nn.BatchNorm2d,
            "group": lambda channels: nn.GroupNorm(2, channels),
            "batch statistics": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
        }
        sizes = zip([3, *widths], widths, kernels)
        self.convs = nn.ModuleList(nn.Conv2d(one, two, kernel, padding=kernel // 2) for one, two, kernel in sizes)
        self.norms = nn.ModuleList(make[norm](width) for norm, width in zip(norms, widths))
        self.head = nn.Linear(widths[-1], 5)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms):
            x = functional.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))


class RawReader(Chain):
    """Reads what its second convolution computes in front of the norm, too."""

    def forward(self, x: Tensor) -> Tensor:
        raw = self.convs[1](functional.relu(self.norms[0](self.convs[0](x))))
        return self.head((functional.relu(self.norms[1](raw)) + raw).mean((2, 3)))


class SharedNorm(Chain):
    """Has one norm behind its last two convolutions."""

    def __init__(self) -> None:
        super().__init__((8, 8, 8), (3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, (self.norms[0], self.norms[1], self.norms[1])):
            x = functional.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))


class TwoNames(Chain):
    """Calls its first convolution by a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.convs[0]

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norms[0](self.first(x)))
        return self.head(functional.relu(self.norms[1](self.convs[1](x))).mean((2, 3)))


def gated(
    make: Callable[[], nn.Module],
    *,
    heads: dict[str, Callable[[], GateHead]] | None = None,
    layers: list[str] | None = None,
    example: Tensor = EXAMPLE,
) -> GatedNetwork:
    """Returns a network with random statistics and heads that say something else for every image."""
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    places = chosen_places(trace_gate_flow(model, example), layers)
    made = [heads[own.layer]() if heads is not None else GateHead(own.inputs, range(own.channels)) for own in places]
    for head in made:
        nn.init.normal_(head.weight)
        head.scale.fill_(1.0 if head.softmax else 0.3)
    network = GatedNetwork(model, Gates(places, made)).eval()
    for place, head in zip(places, made):
        with torch.no_grad():
            network(varied(size=example.shape[-1]))
            logits = network.gates.logits[place.layer]
            strength = logits.std(0).clamp(min=1e-4)
            head.weight /= strength[:, None]
            head.bias.copy_(-((logits - head.bias) / strength).quantile(0.5, dim=0))
    return network


def fixed(network: GatedNetwork, rates: Sequence[float]) -> GatedNetwork:
    """Opens the same share of the filters of each layer for all images."""
    for head, rate in zip(network.gates.all_heads(), rates, strict=True):
        with torch.no_grad():
            head.weight.zero_()
            head.bias.copy_(torch.where(torch.arange(head.num_units) < round(rate * head.num_units), 1.0, -1.0))
    return network


def varied(count: int = 64, size: int = 8) -> Tensor:
    """Returns images that differ in strength, also of single channels."""
    generator = torch.Generator().manual_seed(3)
    strength = 4 * torch.rand(count, 1, 1, 1, generator=generator) * torch.rand(count, 3, 1, 1, generator=generator)
    return torch.randn(count, 3, size, size, generator=generator) * strength


def expected(network: GatedNetwork, images: Tensor) -> tuple[Array, dict[str, Array]]:
    """Returns what PyTorch computes, and which units it opens."""
    quiet = copy.deepcopy(network).eval()
    with torch.no_grad():
        output = quiet(images).numpy()
    return output, {layer: own.numpy() for layer, own in quiet.gates.opened.items()}


def bare(model: Path | onnx.ModelProto, images: Tensor, batch: int) -> list[Array]:
    """Runs a file as any user of ONNX Runtime would."""
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    rows = [session.run(None, {session.get_inputs()[0].name: part.numpy()}) for part in images.split(batch)]
    return [np.concatenate(own) for own in zip(*rows)]


def masks_in(path: Path, images: Tensor, batch: int) -> dict[str, Array]:
    shown = with_masks(onnx.load(path))
    values = zip((output.name for output in shown.graph.output), bare(shown, images, batch))
    return {name[5:-5]: own for name, own in values if name.startswith("gate/") and name.endswith("/open")}


def properties_of(path: Path) -> dict[str, str]:
    return {own.key.removeprefix("nni_prune_ext."): own.value for own in onnx.load(path).metadata_props}


def picking_convolutions(path: Path) -> int:
    """Counts the convolutions whose weights are picked when the file runs."""
    graph = onnx.load(path).graph
    constants = {own.name for own in graph.initializer}
    return sum(node.op_type == "Conv" and node.input[1] not in constants for node in graph.node)


def close(one: Array, other: Array) -> bool:
    return bool(np.abs(one - other).max() <= 1e-4 * np.abs(one).max())


def remember(patch: pytest.MonkeyPatch, known: dict[object, tuple[GatedNetwork, onnx.ModelProto]]) -> None:
    """Lets the slow exporter run once per network."""

    def remembered(network: GatedNetwork, example: Tensor, *, opset: int = 18) -> onnx.ModelProto:
        key = id(network), opset
        if key not in known:
            known[key] = (network, marked_graph(network, example, opset=opset))  # the network keeps its id taken
        return known[key][1]

    patch.setattr(onnx_gated, "marked_graph", remembered)


@pytest.fixture(scope="module", autouse=True)
def exporter_once():
    with pytest.MonkeyPatch.context() as patch:
        remember(patch, {})
        yield


@pytest.fixture(scope="module")
def images() -> Tensor:
    return varied()


@pytest.fixture(scope="module")
def network() -> GatedNetwork:
    return gated(Net, heads=HEADS)


@pytest.fixture(scope="module")
def files(network: GatedNetwork, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, GatedExport]:
    """The same network in both flavours."""
    folder = tmp_path_factory.mktemp("gated")
    return {
        "mask": export_gated(network, EXAMPLE, folder / "mask.onnx", flavour="mask", images=images),
        "compact": export_gated(network, EXAMPLE, folder / "compact.onnx", images=images, gathered="all"),
    }


@pytest.fixture(scope="module")
def chain() -> GatedNetwork:
    return gated(Chain)


@pytest.fixture(scope="module")
def unfoldable() -> GatedNetwork:
    return gated(lambda: Chain(norms=("group", "batch statistics")))


@pytest.fixture(scope="module")
def large() -> GatedNetwork:
    """A layer that is too small, two that fire at 0.25 and 0.75, and one with 1×1 kernels that fires at 0.5."""
    network = gated(lambda: Chain((32, 32, 32, 160), (3, 3, 3, 1)), example=torch.zeros(1, 3, 24, 24))
    return fixed(network, (0.25, 0.25, 0.75, 0.5))


@pytest.fixture(scope="module")
def large_images() -> Tensor:
    return varied(8, 24)


LARGE = torch.zeros(1, 3, 24, 24)

# -- numbers -----------------------------------------------------------------------------------------------------------


def test_the_gates_of_the_example_differ_between_images_and_have_every_kind_of_head(
    network: GatedNetwork, images: Tensor
) -> None:
    _, masks = expected(network, images)

    assert list(HEADS) == [place.layer for place in network.gates.places]
    for layer, own in masks.items():
        assert own.any(0).mean() > own.all(0).mean(), layer
    kinds = {(head.pool, head.softmax, bool(head.removed)) for head in network.gates.all_heads()}
    assert {("max", True, True), ("avg", True, True), ("max", False, False), ("avg", False, False)} <= kinds


@pytest.mark.parametrize("layer", HEADS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_file_opens_the_units_that_pytorch_opens(
    flavour: str, layer: str, files: dict[str, GatedExport], network: GatedNetwork, images: Tensor
) -> None:
    _, masks = expected(network, images)

    found = masks_in(files[flavour].path, images, 64 if flavour == "mask" else 1)

    assert masks.keys() == found.keys()
    assert masks[layer].shape == found[layer].shape
    assert (masks[layer] == found[layer]).mean() >= 0.999


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_outputs_are_those_of_pytorch_wherever_the_masks_agree(
    flavour: str, files: dict[str, GatedExport], network: GatedNetwork, images: Tensor
) -> None:
    batch = 64 if flavour == "mask" else 1
    output, masks = expected(network, images)
    opened = masks_in(files[flavour].path, images, batch)
    same = np.stack([(masks[layer] == opened[layer]).all(1) for layer in masks]).all(0)

    (found,) = bare(files[flavour].path, images, batch)

    assert same.sum() >= 60
    assert output.std(0).min() > 0
    assert close(output[same], found[same])


def test_what_the_export_reports_is_what_a_bare_session_shows(files: dict[str, GatedExport], images: Tensor) -> None:
    for flavour, made in files.items():
        opened = masks_in(made.path, images, 64 if flavour == "mask" else 1)
        bits = np.concatenate([own.ravel() for own in opened.values()])

        assert made.parity is not None
        assert made.parity.passed
        assert (64, bits.size) == (made.parity.images, made.parity.bits)
        assert bits.mean() == pytest.approx(made.parity.firing_rate, abs=0.001)
        assert made.path.stat().st_size == made.size_bytes


def test_the_inputs_that_a_cut_head_has_lost_stay_in_its_softmax(
    files: dict[str, GatedExport], network: GatedNetwork, images: Tensor
) -> None:
    forgetful = copy.deepcopy(network)
    for head in forgetful.gates.all_heads():
        head.removed.zero_()
    remembering, forgetting = expected(network, images)[1], expected(forgetful, images)[1]

    found = masks_in(files["mask"].path, images, 64)

    for layer in ("back", "last"):
        assert network.gates.head(layer).removed > 0
        assert (remembering[layer] == found[layer]).mean() >= 0.999
        assert (forgetting[layer] == found[layer]).mean() < 0.98


def test_filters_are_picked_in_all_layers_that_have_no_groups(files: dict[str, GatedExport]) -> None:
    made = files["compact"]

    assert ("stem", "inner", "back", "wide", "narrow", "last") == made.gathered
    assert ["deep"] == list(made.masked)
    assert "groups" in made.masked["deep"]
    assert 6 <= picking_convolutions(made.path)
    assert 0 == picking_convolutions(files["mask"].path)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_file_is_standard_onnx_and_its_norms_are_folded(flavour: str, files: dict[str, GatedExport]) -> None:
    model = onnx.load(files[flavour].path)

    assert [("", 18)] == [(own.domain, own.version) for own in model.opset_import]
    assert {""} == {node.domain for node in model.graph.node}
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert ["output"] == [output.name for output in model.graph.output]


def test_norms_that_cannot_be_folded_stay_and_their_layers_are_masked(
    unfoldable: GatedNetwork, images: Tensor, tmp_path: Path
) -> None:
    together, masks = expected(unfoldable, images)
    alone = np.concatenate([expected(unfoldable, image[None])[0] for image in images])

    masked = export_gated(unfoldable, EXAMPLE, tmp_path / "mask.onnx", flavour="mask", images=images)
    compact = export_gated(unfoldable, EXAMPLE, tmp_path / "compact.onnx", gathered="all")

    found = masks_in(masked.path, images, 64)
    assert all((own == found[layer]).mean() >= 0.999 for layer, own in masks.items())
    assert close(together, bare(masked.path, images, 64)[0])
    assert () == compact.gathered
    assert all("not by Conv" in reason for reason in compact.masked.values())
    assert close(alone, bare(compact.path, images, 1)[0])


def test_a_norm_with_the_statistics_of_a_batch_is_compared_image_by_image(
    unfoldable: GatedNetwork, images: Tensor, tmp_path: Path
) -> None:
    made = export_gated(unfoldable, EXAMPLE, tmp_path / "compact.onnx", images=images)

    assert made.parity is not None
    assert made.parity.passed


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            RawReader,
            id="its convolution is read before it",
        ),
        pytest.param(SharedNorm, id="it is used twice"),
    ],
)
def test_a_norm_is_folded_only_where_that_changes_nothing(
    make: Callable[[], nn.Module], images: Tensor, tmp_path: Path
) -> None:
    network = gated(make, layers=["convs.0"])
    output, _ = expected(network, images)

    made = export_gated(network, EXAMPLE, tmp_path / "net.onnx", flavour="mask")

    assert close(output, bare(made.path, images, 64)[0])


def test_a_gated_convolution_may_be_called_by_its_second_name(images: Tensor, tmp_path: Path) -> None:
    network = gated(TwoNames)
    output, _ = expected(network, images)

    made = export_gated(network, EXAMPLE, tmp_path / "net.onnx", flavour="mask")

    assert close(output, bare(made.path, images, 64)[0])


# -- batch size --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_flavour_mask_takes_any_batch(
    batch: int, files: dict[str, GatedExport], network: GatedNetwork, images: Tensor
) -> None:
    output, _ = expected(network, images)

    (found,) = bare(files["mask"].path, images, batch)

    assert close(output, found)


def test_the_flavour_compact_refuses_an_open_batch_and_says_why(
    network: GatedNetwork, images: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="the images of a batch need different filters"):
        export_gated(network, EXAMPLE, tmp_path / "net.onnx", images=images, dynamic_batch=True)

    assert [] == list(tmp_path.iterdir())


def test_the_flavour_compact_gives_an_error_for_two_images_and_no_numbers(
    files: dict[str, GatedExport], images: Tensor
) -> None:
    session = onnxruntime.InferenceSession(str(files["compact"].path), providers=["CPUExecutionProvider"])
    port = session.get_inputs()[0]

    with pytest.raises(Exception, match=r"(?s)Got: 2 Expected: 1"):
        session.run(None, {port.name: images[:2].numpy()})

    assert [1, 3, 8, 8] == port.shape


def test_the_flavour_mask_can_fix_its_batch(network: GatedNetwork, tmp_path: Path) -> None:
    made = export_gated(network, EXAMPLE, tmp_path / "net.onnx", flavour="mask", dynamic_batch=False)

    session = onnxruntime.InferenceSession(str(made.path), providers=["CPUExecutionProvider"])
    assert 1 == session.get_inputs()[0].shape[0]


# -- which layers are gathered -----------------------------------------------------------------------------------------


def test_layers_that_gain_are_gathered_and_the_others_say_why_not(
    large: GatedNetwork, large_images: Tensor, tmp_path: Path
) -> None:
    made = export_gated(large, LARGE, tmp_path / "net.onnx", images=large_images)

    assert ("convs.1",) == made.gathered
    assert {
        "convs.0": "it has 0.50 M MACs only",
        "convs.2": "it fires at 0.75, and gains below 0.65 only",
        "convs.3": "it fires at 0.50, and gains below 0.42 only",  # kernels of one pixel
    } == made.masked
    assert () == made.folded
    assert large is made.network


def test_a_layer_at_its_bound_does_not_gain(
    large: GatedNetwork, large_images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_gated, "SMALLEST_GAIN", 0.5)  # 0.75 - 0.5 is the rate of convs.1, exactly

    made = export_gated(large, LARGE, tmp_path / "net.onnx", images=large_images)

    assert () == made.gathered
    assert "it fires at 0.25, and gains below 0.25 only" == made.masked["convs.1"]


@pytest.mark.parametrize(
    ("rate", "side", "kernel", "block"),
    [
        (0.75, 24, 3, 1),
        (0.75, 14, 3, 1),
        (0.64, 13, 3, 1),
        (0.64, 7, 3, 1),
        (0.37, 6, 3, 1),
        (0.37, 6, 3, None),  # units of unequal sizes are single filters
        (0.75, 24, 3, 16),
        (0.75, 4, 3, 4),
        (0.56, 3, 3, 4),
        (0.52, 24, 1, 1),
        (0.77, 24, 1, 16),
    ],
)
def test_break_even_rates_are_those_that_were_measured(rate: float, side: int, kernel: int, block: int | None) -> None:
    layer = GatedLayer("a", "a", 32, 32, block, side, side, (kernel, kernel), 32, True, None)

    assert rate == break_even(layer)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_an_export_says_the_break_even_rate_of_every_layer_that_could_be_gathered(
    flavour: str, network: GatedNetwork, tmp_path: Path
) -> None:
    made = export_gated(network, EXAMPLE, tmp_path / "net.onnx", flavour=flavour)

    assert {"stem": 0.64, "inner": 0.75, "back": 0.64, "wide": 0.52, "narrow": 0.77, "last": 0.37} == made.break_even


def test_firing_rates_count_filters_and_not_units(network: GatedNetwork, images: Tensor) -> None:
    _, masks = expected(network, images)

    rates = firing_rates(network, images)

    assert masks["stem"].mean() == pytest.approx(rates["stem"])
    by_hand = masks["wide"][:, list(UNEQUAL)].mean()
    assert by_hand == pytest.approx(rates["wide"])
    assert masks["wide"].mean() != pytest.approx(rates["wide"])


def test_without_images_everything_that_can_be_is_gathered(large: GatedNetwork, tmp_path: Path) -> None:
    made = export_gated(large, LARGE, tmp_path / "net.onnx")

    assert ("convs.0", "convs.1", "convs.2", "convs.3") == made.gathered
    assert made.parity is None
    assert {} == made.masked


def test_layers_can_be_gathered_by_name(network: GatedNetwork, images: Tensor, tmp_path: Path) -> None:
    output, _ = expected(network, images)

    made = export_gated(network, EXAMPLE, tmp_path / "net.onnx", images=images, gathered=["back", "narrow", "deep"])

    assert ("back", "narrow") == made.gathered
    assert {"stem", "inner", "wide", "deep", "last"} == made.masked.keys()
    assert "it was not asked for" == made.masked["stem"]
    assert "groups" in made.masked["deep"]
    assert "back, narrow" == properties_of(made.path)["gathered"]
    assert close(output, bare(made.path, images, 1)[0])


def test_no_layer_at_all_may_be_gathered(network: GatedNetwork, images: Tensor, tmp_path: Path) -> None:
    output, _ = expected(network, images)

    made = export_gated(network, EXAMPLE, tmp_path / "net.onnx", images=images, gathered=())

    assert () == made.gathered
    assert 0 == picking_convolutions(made.path)
    assert close(output, bare(made.path, images, 1)[0])


@pytest.mark.parametrize("names", [["stem", "stam"], "stem"], ids=["a name that is no layer", "a text for a list"])
def test_unknown_layers_to_gather_are_refused(names: list[str] | str, network: GatedNetwork, tmp_path: Path) -> None:
    with pytest.raises(NniPruneExtError, match="stam|list"):
        export_gated(network, EXAMPLE, tmp_path / "net.onnx", gathered=names)


def test_folding_gives_the_network_without_the_gates_that_do_not_gain(
    large: GatedNetwork, large_images: Tensor, tmp_path: Path
) -> None:
    output, _ = expected(large, large_images)
    folded, _ = expected(large.without(["convs.0", "convs.2", "convs.3"]), large_images)

    made = export_gated(large, LARGE, tmp_path / "net.onnx", images=large_images, fold=True)

    (found,) = bare(made.path, large_images, 1)
    assert close(folded, found)
    assert not close(output, found)
    assert ("convs.0", "convs.2", "convs.3") == made.folded
    assert ("convs.1",) == made.gathered
    assert {} == made.masked
    assert close(folded, expected(made.network, large_images)[0])
    assert ["convs.1"] == list(masks_in(made.path, large_images, 1))
    assert "convs.0, convs.2, convs.3" == properties_of(made.path)["folded"]
    assert 4 == len(large.gates.places)


def test_a_network_that_would_lose_all_its_gates_is_refused(
    chain: GatedNetwork, images: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"no gate left.*export_onnx"):
        export_gated(chain, EXAMPLE, tmp_path / "net.onnx", images=images, fold=True)

    assert [] == list(tmp_path.iterdir())


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"fold": True}, {"gathered": "all"}, {"gathered": ()}], ids=str)
def test_the_flavour_mask_refuses_what_it_cannot_do(
    options: dict[str, object], network: GatedNetwork, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="mask gathers and folds nothing"):
        export_gated(network, EXAMPLE, tmp_path / "net.onnx", flavour="mask", **options)

    assert [] == list(tmp_path.iterdir())


def test_an_unknown_flavour_is_refused(network: GatedNetwork, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compcat"):
        export_gated(network, EXAMPLE, tmp_path / "net.onnx", flavour="compcat")


def test_a_network_with_two_inputs_is_refused(network: GatedNetwork, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="2 input tensors, expected one"):
        export_gated(network, (EXAMPLE, EXAMPLE), tmp_path / "net.onnx")


def test_a_folder_that_is_not_there_is_a_mistake_of_the_caller(network: GatedNetwork, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="existing folder"):
        export_gated(network, EXAMPLE, tmp_path / "none" / "net.onnx", flavour="mask")


@pytest.mark.parametrize("images", [varied(2, 10), varied(2)[:0]], ids=["of another size", "none"])
def test_images_that_do_not_fit_are_refused_in_our_own_words(
    images: Tensor, network: GatedNetwork, tmp_path: Path
) -> None:
    with pytest.raises(NniPruneExtError):
        export_gated(network, EXAMPLE, tmp_path / "net.onnx", images=images, gathered="all")


# -- parity ------------------------------------------------------------------------------------------------------------


def without_a_bias(graph: onnx.ModelProto) -> None:
    for bias in graph.graph.initializer:
        if bias.name == "stem.layer.bias" or list(bias.dims) == [8]:
            bias.CopyFrom(numpy_helper.from_array(np.zeros(bias.dims, np.float32), bias.name))


def with_filters_in_another_order(graph: onnx.ModelProto) -> None:
    for weight in graph.graph.initializer:
        if 8 * 12 * 9 == np.prod(weight.dims):
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[::-1].copy(), weight.name))


def with_another_threshold(graph: onnx.ModelProto) -> None:
    zero = next(own for own in graph.graph.initializer if own.name == "gate/zero")
    zero.CopyFrom(numpy_helper.from_array(np.float32(0.5), zero.name))


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("damage", [without_a_bias, with_filters_in_another_order, with_another_threshold])
def test_a_file_that_computes_something_else_is_not_kept(
    damage: Callable[[onnx.ModelProto], None],
    flavour: str,
    network: GatedNetwork,
    images: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    form = f"{flavour}_form"
    intact = getattr(onnx_gated, form)

    def damaged(*arguments: object) -> onnx.ModelProto:
        graph = intact(*arguments)
        damage(graph)
        return graph

    monkeypatch.setattr(onnx_gated, form, damaged)
    (tmp_path / "old.onnx").write_bytes(b"an older file")

    for name in ("new.onnx", "old.onnx"):
        with pytest.raises(ParityError, match=r"(?s)mask bits.*was not kept"):
            export_gated(network, EXAMPLE, tmp_path / name, flavour=flavour, images=images)

    assert ["old.onnx"] == [path.name for path in tmp_path.iterdir()]
    assert b"an older file" == (tmp_path / "old.onnx").read_bytes()


def test_how_much_outputs_may_differ_can_be_said(
    network: GatedNetwork, images: Tensor, files: dict[str, GatedExport], tmp_path: Path
) -> None:
    parity = files["mask"].parity
    assert parity is not None
    assert 0 < parity.max_rel <= 1e-5

    with pytest.raises(ParityError):
        export_gated(network, EXAMPLE, tmp_path / "net.onnx", flavour="mask", images=images, fail=parity.max_rel / 2)


# -- what is in the file -----------------------------------------------------------------------------------------------


def test_the_file_says_what_it_is_and_what_it_cannot_do(files: dict[str, GatedExport]) -> None:
    for flavour, made in files.items():
        found = properties_of(made.path)

        assert (flavour, LIMITS[flavour]) == (found["flavour"], found["limits"])
        assert LIMITS[flavour] == made.limits
        assert ", ".join(made.gathered) == found["gathered"]
        assert "" == found["folded"]
        assert {"speed", "version", "torch", "state_dict_sha256", "input_shapes"} <= found.keys()
    assert "none" == properties_of(files["mask"].path)["speed"]


def test_the_file_holds_no_path_of_this_machine(files: dict[str, GatedExport]) -> None:
    for made in files.values():
        content = made.path.read_bytes()

        for text in (os.getcwd(), tempfile.gettempdir(), sys.prefix, str(made.path.parent), "site-packages", ".py"):
            assert text.encode() not in content, text


def test_properties_of_the_caller_are_written_too(network: GatedNetwork, tmp_path: Path) -> None:
    made = export_gated(network, EXAMPLE, tmp_path / "net.onnx", flavour="mask", properties={"method": "ftwt"})

    assert "ftwt" == properties_of(made.path)["method"]


def test_the_caller_cannot_say_another_flavour(network: GatedNetwork, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="flavour"):
        export_gated(network, EXAMPLE, tmp_path / "net.onnx", flavour="mask", properties={"flavour": "compact"})


# -- nothing is open ---------------------------------------------------------------------------------------------------

ON_ITS_OWN = """\
import sys
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
images = np.load(sys.argv[2])
np.save(sys.argv[3], np.concatenate([session.run(None, {session.get_inputs()[0].name: x[None]})[0] for x in images]))
"""


def run_on_its_own(path: Path, images: Tensor) -> Array:
    """Runs a file in a process that is ended if it does not return: ONNX Runtime cannot be interrupted."""
    given, made = path.with_suffix(".images.npy"), path.with_suffix(".outputs.npy")
    np.save(given, images.numpy())
    subprocess.run([sys.executable, "-c", ON_ITS_OWN, path, given, made], check=True, timeout=60)
    return np.load(made)


def test_a_network_that_would_close_every_filter_returns_the_numbers_of_pytorch(images: Tensor, tmp_path: Path) -> None:
    network = fixed(gated(lambda: Chain((8, 8, 8), (3, 3, 3))), (0, 0, 0))
    output, masks = expected(network, images[:4])
    made = export_gated(network, EXAMPLE, tmp_path / "net.onnx")

    found = run_on_its_own(made.path, images[:4])

    assert [1 / 8] * 3 == [own.mean() for own in masks.values()]
    assert ("convs.0", "convs.1", "convs.2") == made.gathered
    assert close(output, found)


def test_images_full_of_nan_or_infinity_return(files: dict[str, GatedExport]) -> None:
    strange = torch.stack([torch.full((3, 8, 8), value) for value in (float("nan"), float("inf"), float("-inf"))])

    found = run_on_its_own(files["compact"].path, strange)

    assert (3, 5) == found.shape


# -- leaving no trace --------------------------------------------------------------------------------------------------


def trace_of(network: GatedNetwork) -> list[object]:
    modules = [
        (name, module.training, len(module._forward_hooks), len(module._forward_pre_hooks), type(module))
        for name, module in network.named_modules()
    ]
    parameters = [(name, own.requires_grad, own.grad is None) for name, own in network.named_parameters()]
    tensors = [(name, own.clone().numpy().tobytes(), own.data_ptr()) for name, own in network.state_dict().items()]
    return [modules, parameters, tensors, network.gates.masks, torch.get_rng_state().numpy().tobytes()]


@pytest.mark.parametrize("failing", ["", "export_graph", "check_gated_parity", "published"])
def test_the_network_is_left_as_it_was_also_by_an_export_that_fails(
    failing: str, chain: GatedNetwork, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered, network = onnx_gated.marked_graph, gated(Chain).train()
    network.model.norms[1].eval()
    network.model.convs[0].register_forward_hook(lambda *_: None)
    network.gates.head("convs.0").requires_grad_(False)
    if failing in ("", "export_graph"):
        monkeypatch.setattr(onnx_gated, "marked_graph", marked_graph)
    else:
        monkeypatch.setattr(onnx_gated, "marked_graph", lambda *_, **__: remembered(chain, EXAMPLE))
    if failing:
        module = gated_graph if failing == "export_graph" else onnx_gated
        monkeypatch.setattr(module, failing, lambda *_, **__: 1 / 0)
    before = trace_of(network)

    with pytest.raises(ZeroDivisionError) if failing else nullcontext():
        export_gated(network, EXAMPLE, tmp_path / "net.onnx", images=images)

    assert before == trace_of(network)
    assert ([] if failing else ["net.onnx"]) == [path.name for path in tmp_path.iterdir()]


def test_the_marked_graph_is_used_and_not_changed(network: GatedNetwork, files: dict[str, GatedExport]) -> None:
    marked = onnx_gated.marked_graph(network, EXAMPLE, opset=18)
    before = marked.SerializeToString(deterministic=True)

    compact_form(marked)

    assert before == marked.SerializeToString(deterministic=True)
