"""The parts of an artefact folder: read back exactly, and refused by name where one is damaged or foreign."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from nni_prune_ext.deployment import add_parts, load_gated, load_masks, load_pruned, write_artefacts
from nni_prune_ext.errors import ArtefactError, ModelError, NniPruneExtError, PlanError, WeightsError
from nni_prune_ext.export import artefact_loading
from nni_prune_ext.export.example_structure import ExampleStructure
from nni_prune_ext.export.manifest import MethodUse, Part, body_sha256, checked_manifest, read_manifest, write_manifest
from nni_prune_ext.export.weight_masks import mask_pattern, write_tensors
from nni_prune_ext.methods.base import MethodSpec, PruningMethod
from nni_prune_ext.pipeline import PruneResult, prune

EXAMPLE = torch.zeros(1, 3, 8, 8)


class GateOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    hidden: int = 2


class Gated(nn.Module):
    """Scales the output of a network by a gate that looks at the input."""

    def __init__(self, model: nn.Module, hidden: int) -> None:
        super().__init__()
        self.model = model
        self.gate = nn.Sequential(nn.Linear(3, hidden), nn.Linear(hidden, 1))

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.model(x) * self.gate(x.mean((2, 3)))
        return scaled


GATED = MethodSpec(
    "toy",
    "for tests",
    "none",
    GateOptions,
    lambda options: PruningMethod(),
    products=frozenset({"plan", "gated_model"}),
    build_gated=lambda model, options, example, tensors: Gated(model, options.hidden),
)


def build() -> nn.Module:
    """The original model code; its weights do not matter."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))


@pytest.fixture(scope="module")
def result() -> PruneResult:
    torch.manual_seed(0)
    return prune(build(), EXAMPLE, target="ratio=0.5", seed=3)


@pytest.fixture(scope="module")
def masks(result: PruneResult) -> dict[str, Tensor]:
    """A 2:4 mask and an unstructured one, with zeros in the weights to match."""
    linear, convolution = result.model[4].weight, result.model[0].weight
    made = {"4.weight": torch.tensor([True, False, False, True]).repeat(5, linear.shape[1] // 4)}
    made["0.weight"] = torch.rand(convolution.shape, generator=torch.Generator().manual_seed(1)) > 0.3
    with torch.no_grad():
        linear *= made["4.weight"]
        convolution *= made["0.weight"]
    return made


@pytest.fixture(scope="module")
def gated(result: PruneResult) -> nn.Module:
    torch.manual_seed(5)
    return Gated(result.model, 4)


@pytest.fixture(scope="module")
def written(
    result: PruneResult, masks: dict[str, Tensor], gated: nn.Module, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("written") / "net"
    write_artefacts(
        result.model,
        folder,
        EXAMPLE,
        plan=result.plan,
        weight_masks=masks,
        gated_model=gated,
        method=MethodUse(name="toy", options={"hidden": 4}),
    )
    add_parts(folder, {"report.json": "{}", "report.html": "<html></html>"})
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(written, tmp_path / "net"))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefact_loading, "_registered", lambda name: GATED if name == "toy" else None)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_model_code_and_the_folder_alone_rebuild_the_network(written: Path, result: PruneResult) -> None:
    by_function, by_model = load_pruned(build, written), load_pruned(build(), written, EXAMPLE)

    assert same_weights(result.model, by_function)
    assert same_weights(result.model, by_model)


def test_masks_come_back_with_their_facts(written: Path, masks: dict[str, Tensor]) -> None:
    found = load_masks(written)

    assert masks.keys() == found.keys()
    assert all(torch.equal(masks[name], found[name]) for name in masks)
    facts = read_manifest(written).masks
    assert ("2:4", "unstructured") == (facts["4.weight"].pattern, facts["0.weight"].pattern)
    assert (0.5, tuple(masks["0.weight"].shape)) == (facts["4.weight"].kept, facts["0.weight"].shape)


def test_the_gated_network_comes_back_around_the_compact_one(written: Path, gated: nn.Module, registered: None) -> None:
    images = torch.randn(2, 3, 8, 8)

    found = load_gated(build, written)

    assert same_weights(gated, found)
    torch.testing.assert_close(gated.eval()(images), found.eval()(images))
    assert same_weights(gated, load_gated(build, written, spec=GATED))


def test_no_part_is_anything_but_safetensors_json_onnx_or_a_page(written: Path) -> None:
    assert {".safetensors", ".json", ".onnx", ".html"} == {path.suffix for path in written.iterdir()}
    assert all(not path.read_bytes().startswith((b"\x80", b"PK")) for path in written.iterdir())


def damage(name: str) -> Callable[[Path], None]:
    """Flips one bit in the middle of a part."""

    def flip(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return flip


def change(name: str, text: str) -> Callable[[Path], None]:
    """Replaces a part and lets the manifest agree, as somebody who mixes folders by hand does."""

    def write(folder: Path) -> None:
        (folder / name).write_text(text)
        resign(folder)

    return write


def resign(folder: Path) -> None:
    manifest = read_manifest(folder)
    write_manifest(folder, method=manifest.method, masks=manifest.masks)


def put_masks(**masks: Tensor) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_tensors({name.replace("_", "."): mask for name, mask in masks.items()}, folder / "masks.safetensors")
        resign(folder)

    return write


def edit_manifest(**values: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "manifest.json"
        body = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({**body, "sha256": body_sha256(body)}))

    return write


def name_part(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text("")
        parts = {**read_manifest(folder).model_dump()["parts"], name: Part.of(folder / name).model_dump()}
        edit_manifest(parts=parts)(folder)

    return write


FLAWS: dict[str, tuple[Callable[[Path], object], type[NniPruneExtError], str]] = {
    **{
        f"damaged {name}": (damage(name), ArtefactError, f"{name}' is damaged.*Copy the whole folder")
        for name in ("plan.json", "model.safetensors", "model.onnx", "model.json", "masks.safetensors", "report.html")
    },
    "part cut short": (lambda f: (f / "model.onnx").write_bytes(b""), ArtefactError, "0 bytes"),
    "part missing": (lambda f: (f / "model.safetensors").unlink(), ArtefactError, "lacks 'model.safetensors'"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), ArtefactError, "holds no manifest.json.*made anew"),
    "manifest cut short": (lambda f: (f / "manifest.json").write_text('{"pa'), ArtefactError, "manifest.json' cannot"),
    "manifest of something else": (lambda f: (f / "manifest.json").write_text("[]"), ArtefactError, "cannot be read"),
    "newer format": (edit_manifest(format=2, package_version="9.0"), ArtefactError, "format 2.*newer version.*9.0"),
    "format that is no number": (
        edit_manifest(format=True),
        ArtefactError,
        "manifest.json' cannot be read .*whole number",
    ),
    "hash that is none": (
        edit_manifest(parts={"plan.json": {"sha256": "abc", "size_bytes": 1}}),
        ArtefactError,
        "manifest.json' cannot be read .*sha256",
    ),
    "manifest edited by hand": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace('"toy"', '"other"')),
        ArtefactError,
        "manifest.json' itself is damaged or was edited",
    ),
    "manifest that leads outside": (name_part("../x"), ArtefactError, r"lacks '\.\./x'"),
    "part that nobody named": (
        lambda f: (f / "model.onnx.data").touch(),
        ArtefactError,
        "'model.onnx.data', which its manifest does not name",
    ),
    "plan that is none": (change("plan.json", "{}"), PlanError, "not a usable pruning plan"),
    "mask of an unknown weight": (put_masks(elsewhere=torch.ones(2).bool()), ArtefactError, "masks 'elsewhere'"),
    "mask of another shape": (put_masks(**{"4_bias": torch.ones(3).bool()}), ArtefactError, r"shape \(3,\).*\(5,\)"),
    "mask that is not bool": (put_masks(**{"4_bias": torch.ones(5)}), ArtefactError, "torch.float32"),
    "mask with zeros that the weights do not have": (
        put_masks(**{"4_bias": torch.zeros(5).bool()}),
        ArtefactError,
        "5 weights of '4.bias' are zero, but 5 of them are not",
    ),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_folder_with_a_flaw_is_refused_by_name(flaw: str, folder: Path) -> None:
    breaks, error, message = FLAWS[flaw]
    breaks(folder)

    with pytest.raises(error, match=message):
        load_pruned(build, folder)


def test_whichever_bit_of_the_manifest_flips_the_manifest_is_blamed(folder: Path) -> None:
    path = folder / "manifest.json"
    content = path.read_bytes()

    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with pytest.raises(ArtefactError, match=f"^'{path}' (itself is damaged|cannot be read)"):
            read_manifest(folder)


def test_the_difference_of_a_part_is_told_in_full(folder: Path) -> None:
    expected = read_manifest(folder).parts["model.onnx"].sha256
    damage("model.onnx")(folder)

    with pytest.raises(
        ArtefactError, match=f"has SHA-256 {Part.of(folder / 'model.onnx').sha256}, expected {expected}"
    ):
        checked_manifest(folder)
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ArtefactError, match=r"it has [\d,]+ bytes, expected [\d,]+ as"):
        checked_manifest(folder)


def test_files_that_are_no_part_may_lie_beside_the_network(folder: Path, result: PruneResult) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "plots").mkdir()

    assert same_weights(result.model, load_pruned(build, folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_read_nor_written(
    value: float, folder: Path, result: PruneResult, tmp_path: Path
) -> None:
    diverged = copy.deepcopy(result.model)
    with torch.no_grad():
        diverged[4].bias[:2] = value
    write_tensors(diverged.state_dict(), folder / "model.safetensors")
    resign(folder)

    with pytest.raises(WeightsError, match=r"model.safetensors' has 2 values that are NaN or infinite in '4\.bias'"):
        load_pruned(build, folder)
    with pytest.raises(WeightsError, match=r"network to write has 2 values .* in '4\.bias'.*smaller learning rate"):
        write_artefacts(diverged, tmp_path / "new", EXAMPLE, plan=result.plan)

    assert not (tmp_path / "new").exists()


def test_a_plan_for_another_model_is_refused(folder: Path) -> None:
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 36, 5))

    with pytest.raises(PlanError, match="made for another model"):
        load_pruned(other, folder)


def test_weights_of_another_network_are_refused(folder: Path) -> None:
    write_tensors({"elsewhere": torch.ones(1)}, folder / "model.safetensors")
    resign(folder)

    with pytest.raises(WeightsError, match="belongs to another model"):
        load_pruned(build, folder)


def test_a_dense_network_is_not_taken_for_a_pruned_one(tmp_path: Path) -> None:
    write_artefacts(build(), tmp_path / "dense", EXAMPLE)

    with pytest.raises(ArtefactError, match=r"has no plan\.json"):
        load_pruned(build, tmp_path / "dense")
    with pytest.raises(ArtefactError, match=r"has no masks\.safetensors"):
        load_masks(tmp_path / "dense")
    with pytest.raises(ArtefactError, match=r"has no gated\.safetensors"):
        load_gated(build, tmp_path / "dense")


def test_a_function_that_builds_no_model_is_named(written: Path) -> None:
    with pytest.raises(ModelError, match="builds a str"):
        load_pruned(lambda: "model", written)  # type: ignore[arg-type, return-value]


def test_a_gated_network_whose_method_is_unknown_is_refused(written: Path) -> None:
    with pytest.raises(ArtefactError, match=r"'toy' is not registered here.*spec="):
        load_gated(build, written)


def test_a_folder_does_not_decide_what_code_is_imported(folder: Path) -> None:
    edit_manifest(method={"name": "antigravity:SPEC", "options": {"hidden": 4}})(folder)

    with pytest.raises(ArtefactError, match=r"no folder decides.*from antigravity import SPEC, and pass spec=SPEC"):
        load_gated(build, folder)

    assert "antigravity" not in sys.modules
    load_gated(build, folder, spec=GATED)


def test_a_method_passed_that_cannot_rebuild_is_named(written: Path) -> None:
    with pytest.raises(ArtefactError, match="'toy' that was passed has no build_gated"):
        load_gated(build, written, spec=replace(GATED, build_gated=None, products=frozenset({"plan"})))


def test_a_gated_network_whose_method_takes_other_options_is_refused(folder: Path, registered: None) -> None:
    edit_manifest(method={"name": "toy", "options": {"width": 3}})(folder)

    with pytest.raises(ArtefactError, match="width.*Install the version"):
        load_gated(build, folder)


def test_a_gated_network_that_could_not_be_read_back_is_not_written(
    tmp_path: Path, result: PruneResult, gated: nn.Module, registered: None
) -> None:
    other = MethodUse(name="toy", options={"hidden": 7})

    with pytest.raises(ArtefactError, match=r"'gate\.0\.bias' of shape \(4,\).*\(7,\)"):
        write_artefacts(result.model, tmp_path / "net", EXAMPLE, plan=result.plan, gated_model=gated, method=other)

    assert [] == list(tmp_path.iterdir())


def test_masks_that_the_weights_do_not_follow_are_not_written(tmp_path: Path, result: PruneResult) -> None:
    with pytest.raises(ArtefactError, match="are zero, but"):
        write_artefacts(
            result.model, tmp_path / "net", EXAMPLE, plan=result.plan, weight_masks={"4.bias": torch.zeros(5).bool()}
        )

    assert [] == list(tmp_path.iterdir())


def test_texts_join_the_folder_and_its_manifest(folder: Path) -> None:
    add_parts(folder, {"report.html": "<html>new</html>", "table.md": "| |"})

    manifest = checked_manifest(folder)
    assert Part.of(folder / "table.md") == manifest.parts["table.md"]
    assert "<html>new</html>" == (folder / "report.html").read_text()
    assert "report.json" in manifest.parts


@pytest.mark.parametrize("name", ["plan.json", "manifest.json", "../x.json"])
def test_texts_do_not_replace_other_parts(name: str, folder: Path) -> None:
    with pytest.raises(ArtefactError, match="cannot be added"):
        add_parts(folder, {name: ""})

    load_pruned(build, folder)


@pytest.mark.parametrize("survives", [1, 2, 3])
def test_adding_texts_leaves_a_usable_folder_wherever_it_is_cut_off(
    survives: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nni_prune_ext.export import manifest

    writes, real = 0, manifest.write_text

    def dies(path: Path, text: str) -> None:
        nonlocal writes
        writes += 1
        if writes > survives:
            raise KeyboardInterrupt
        real(path, text)

    monkeypatch.setattr(manifest, "write_text", dies)
    with pytest.raises(KeyboardInterrupt):
        add_parts(folder, {"report.json": "[1]", "report.html": "<html>new</html>"})

    load_pruned(build, folder)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (torch.tensor([[1, 1, 0, 0, 0, 1, 0, 1]]), "2:4"),
        (torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0]]), "2:4"),
        (torch.tensor([[1, 0, 0, 0, 1, 1, 0, 1]]), "unstructured"),
        (torch.tensor([[0, 1, 1, 1, 0, 0, 0, 0]]), "unstructured"),
        (torch.tensor([[1, 0, 1, 0, 0, 0]]), "unstructured"),
        (torch.tensor([1, 0, 1, 0]), "unstructured"),
        (torch.tensor([1, 0, 0, 1]).reshape(1, 4, 1, 1).expand(3, 4, 2, 2), "2:4"),
        (torch.tensor([1, 0, 0, 1]).reshape(1, 1, 1, 4).expand(3, 4, 4, 4), "unstructured"),
    ],
)
def test_a_2_4_mask_keeps_two_of_four_neighbours_along_the_input_channels(mask: Tensor, expected: str) -> None:
    assert expected == mask_pattern(mask.bool())


@pytest.mark.parametrize(
    "inputs",
    [
        torch.zeros(2, 3, 8, 8),
        (torch.zeros(1, 3, dtype=torch.float16), torch.zeros(1, 5, dtype=torch.int64)),
        [torch.zeros(1, 4, dtype=torch.bool)],
    ],
    ids=["tensor", "tuple", "list"],
)
def test_inputs_of_the_same_structure_are_made_from_the_description(inputs: object) -> None:
    described = ExampleStructure.of(inputs)

    assert described is not None
    made = ExampleStructure.model_validate_json(described.model_dump_json()).inputs()
    assert type(inputs) is type(made)
    pairs = [(inputs, made)] if isinstance(inputs, Tensor) else list(zip(inputs, made))
    assert [(a.shape, a.dtype) for a, _ in pairs] == [(b.shape, b.dtype) for _, b in pairs]
    assert described.inputs() is not made


@pytest.mark.parametrize("inputs", [{"x": EXAMPLE}, (EXAMPLE, 3), ([EXAMPLE],), ()])
def test_inputs_that_are_no_flat_row_of_tensors_have_no_description(inputs: object) -> None:
    assert ExampleStructure.of(inputs) is None


def test_a_network_with_such_inputs_asks_for_them(tmp_path: Path) -> None:
    model, example = Named(), {"x": EXAMPLE}
    result = prune(model, example, target="ratio=0.5")
    write_artefacts(result.model, tmp_path / "net", example, plan=result.plan)

    with pytest.raises(ModelError, match="Pass example_inputs"):
        load_pruned(Named, tmp_path / "net")

    assert same_weights(result.model, load_pruned(Named, tmp_path / "net", example))


class Named(nn.Module):
    """Takes its input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y
