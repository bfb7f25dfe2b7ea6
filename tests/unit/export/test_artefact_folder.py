"""Artefact folders are complete or absent, hold one run only, and say how their model is built."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from nni_prune_ext import deployment
from nni_prune_ext.deployment import (
    Measurement,
    Variant,
    add_parts,
    compare_variants,
    load_masks,
    write_artefacts,
)
from nni_prune_ext.errors import ArtefactError, ConfigError, ModelError, OutputError, ParityError
from nni_prune_ext.evaluation import latency_caption, measurement_facts
from nni_prune_ext.export import artefact_writing
from nni_prune_ext.export.artefact_folder import ModelSpec, check_unused, check_writable, complete_or_absent
from nni_prune_ext.export.earlier_run import remove_earlier_run
from nni_prune_ext.export.example_structure import ExampleStructure
from nni_prune_ext.export.manifest import MethodUse, checked_manifest, read_manifest
from nni_prune_ext.export.onnx_static import ExportResult
from nni_prune_ext.export.provenance import provenance
from nni_prune_ext.pipeline import PruneResult, prune

EXAMPLE = torch.zeros(1, 3, 8, 8)
SPEC = ModelSpec(model="mine:net", num_classes=5, input_shape=(1, 3, 8, 8))


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))


@pytest.fixture(scope="module")
def result(dense: nn.Module) -> PruneResult:
    return prune(dense, EXAMPLE, target="macs=0.5", seed=3)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        deployment,
        "compare_latency",
        lambda paths, images, **_: real_latency(paths, images, rounds=2, min_seconds=0.0),
    )


real_latency = deployment.compare_latency


def test_a_specification_survives_the_file_and_is_absent_without_one(tmp_path: Path) -> None:
    SPEC.save(tmp_path)

    assert SPEC == ModelSpec.load(tmp_path)
    assert ModelSpec.load(tmp_path / "none") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"model": "m", "input_shape": [1, 3], "format": 2}',
        '{"model": "m", "input_shape": [1, 3], "format": true}',
    ],
)
def test_an_unusable_specification_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.json").write_text(text)

    with pytest.raises(ModelError, match=r"model\.json.*Copy the whole folder"):
        ModelSpec.load(tmp_path)


def test_the_file_of_a_pruned_network_says_how_it_came_to_be(
    tmp_path: Path, dense: nn.Module, result: PruneResult, quick: None
) -> None:
    rows, *_ = compare_variants(
        [Variant("dense", dense), Variant("l1", result.model, result)], tmp_path, EXAMPLE, spec=SPEC
    )

    written = {
        p.key.removeprefix("nni_prune_ext."): p.value for p in onnx.load(tmp_path / "l1/model.onnx").metadata_props
    }
    assert ("l1", "l1", "3") == (written["variant"], written["method"], written["seed"])
    assert result.certificate is not None
    assert result.certificate.as_dict() == json.loads(written["certificate"])
    assert "macs=0.5" == json.loads(written["targets"])[0]["target"]
    assert SPEC == ModelSpec.model_validate_json(written["model"])
    assert SPEC.model_copy(update={"example": ExampleStructure.of(EXAMPLE)}) == ModelSpec.load(tmp_path / "l1")
    assert ["dense", "l1"] == [row.name for row in rows] == sorted(path.name for path in tmp_path.iterdir())


def test_a_file_that_fails_the_check_leaves_an_earlier_run_as_it_was(
    tmp_path: Path, dense: nn.Module, result: PruneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.json").write_text(own_report("l2"))
    write_artefacts(dense, tmp_path / "l2", EXAMPLE)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    export = artefact_writing.export_onnx

    def refuse_pruned(model: nn.Module, *arguments: object, **options: object) -> ExportResult:
        if model is result.model:
            raise ParityError("differs")
        return export(model, *arguments, **options)

    monkeypatch.setattr(artefact_writing, "export_onnx", refuse_pruned)

    with pytest.raises(ParityError):
        compare_variants([Variant("dense", dense), Variant("l1", result.model, result)], tmp_path, EXAMPLE)

    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_pruned_network_may_differ_from_pytorch_by_twice_as_much_as_the_dense_one(
    tmp_path: Path, dense: nn.Module, result: PruneResult, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    export = artefact_writing.export_onnx

    def with_gap(*arguments: object, fail: float, **options: object) -> ExportResult:
        limits.append(fail)
        made = export(*arguments, **options)
        assert made.parity is not None
        return replace(made, parity=replace(made.parity, max_rel=8e-5))

    monkeypatch.setattr(artefact_writing, "export_onnx", with_gap)

    rows, *_ = compare_variants([Variant("dense", dense), Variant("l1", result.model, result)], tmp_path, EXAMPLE)

    assert [1e-4, 1.6e-4] == limits == [row.parity_limit for row in rows]


def test_a_folder_in_use_is_refused_and_not_touched(tmp_path: Path, dense: nn.Module) -> None:
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(OutputError, match=r"notes\.txt.*--overwrite"):
        compare_variants([Variant("dense", dense)], tmp_path, EXAMPLE, overwrite=False)

    assert ["notes.txt"] == [path.name for path in tmp_path.iterdir()]
    check_unused(tmp_path / "new")


ROW = {"name": "l2", "macs": 1, "params": 1, "onnx_bytes": 1, "parity": 0.0, "kind": "pruned"}


def own_report(*names: str) -> str:
    """A report as a run writes it, as far as it matters here."""
    return json.dumps({"format": 1, "rows": [{**ROW, "name": name} for name in names]})


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_overwriting_removes_the_networks_of_the_earlier_report_and_nothing_else(
    tmp_path: Path, dense: nn.Module
) -> None:
    out = tmp_path / "out"
    for name in ("l2", "fpgm", "unnamed"):
        write_artefacts(dense, out / name, EXAMPLE)
    (out / "report.json").write_text(own_report("l2", "fpgm", "empty", "..", ".", "../outside"))
    (out / "empty").mkdir()
    write_artefacts(dense, tmp_path / "outside", EXAMPLE)
    write_artefacts(dense, tmp_path, EXAMPLE)  # what ".." would name
    (out / "l2" / "notes.txt").write_text("mine")
    kept = {
        name: content for name, content in files_in(tmp_path).items() if not name.startswith(("out/l2/", "out/fpgm/"))
    }
    kept = {
        **{name: content for name, content in kept.items() if name != "out/report.json"},
        "out/l2/notes.txt": b"mine",
    }

    remove_earlier_run(out)

    assert kept == files_in(tmp_path)
    assert ["empty", "l2", "unnamed"] == sorted(path.name for path in out.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        '{"rows": [{"name": "l2"}]}',
        '{"format": 1, "rows": []}',
        '{"format": true, "rows": [{"name": "l2", "macs": 1, "params": 1, "onnx_bytes": 1, "parity": 0, "kind": ""}]}',
        "[]",
        "not JSON",
    ],
)
def test_a_report_of_another_tool_stays_and_so_do_the_networks_that_it_names(
    text: str, tmp_path: Path, dense: nn.Module
) -> None:
    write_artefacts(dense, tmp_path / "l2", EXAMPLE)
    (tmp_path / "report.json").write_text(text)
    (tmp_path / "report.html").write_text("mine")
    before = files_in(tmp_path)

    remove_earlier_run(tmp_path)

    assert before == files_in(tmp_path)


def test_a_page_goes_with_the_report_only_if_a_network_holds_its_copy(tmp_path: Path, dense: nn.Module) -> None:
    for folder, page in (("own", "ours"), ("foreign", "mine")):
        write_artefacts(dense, tmp_path / folder / "l2", EXAMPLE)
        add_parts(tmp_path / folder / "l2", {"report.html": "ours"})
        (tmp_path / folder / "report.json").write_text(own_report("l2"))
        (tmp_path / folder / "report.html").write_text(page)

        remove_earlier_run(tmp_path / folder)

    assert {"foreign/report.html": b"mine"} == files_in(tmp_path)


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "masks.safetensors"])
def test_files_of_others_that_are_called_like_parts_are_never_replaced(
    name: str, tmp_path: Path, dense: nn.Module
) -> None:
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / name).write_text('{"name": "my web app", "icons": []}')
    (tmp_path / "report.json").write_text('{"rows": [{"name": "dense"}]}')
    before = files_in(tmp_path)

    with pytest.raises(OutputError, match=rf"dense/{name}' is in the way.*would be lost.*Move it"):
        write_artefacts(dense, tmp_path / "dense", EXAMPLE)
    with pytest.raises(OutputError, match=rf"dense/{name}' is in the way.*would be lost.*Move it"):
        compare_variants([Variant("dense", dense)], tmp_path, EXAMPLE, measurement=None)

    assert before == files_in(tmp_path)


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "masks.safetensors"])
def test_parts_that_were_changed_since_are_set_aside_and_not_lost(name: str, tmp_path: Path, dense: nn.Module) -> None:
    for content in ("first", "second"):
        write_artefacts(dense, tmp_path / "net", EXAMPLE)
        (tmp_path / "report.json").write_text(own_report("net"))
        (tmp_path / "net" / name).write_text(content)

        compare_variants([Variant("net", dense)], tmp_path, EXAMPLE, measurement=None)

    found = files_in(tmp_path / "net")
    assert (b"first", b"second") == (found[f"{name}.changed-1"], found[f"{name}.changed-2"])
    checked_manifest(tmp_path / "net")


def test_a_network_that_no_report_names_leaves_no_parts_behind(
    tmp_path: Path, dense: nn.Module, result: PruneResult
) -> None:
    write_artefacts(result.model, tmp_path / "net", EXAMPLE, plan=result.plan)

    compare_variants([Variant("net", dense)], tmp_path, EXAMPLE, measurement=None)

    assert not (tmp_path / "net" / "plan.json").exists()
    checked_manifest(tmp_path / "net")


def test_a_file_in_place_of_a_network_is_refused_before_any_work(tmp_path: Path, dense: nn.Module) -> None:
    (tmp_path / "dense").write_text("mine")

    with pytest.raises(OutputError, match="dense' is in the way: it is no folder"):
        compare_variants([Variant("dense", dense)], tmp_path, EXAMPLE)

    assert {"dense": b"mine"} == files_in(tmp_path)


@pytest.mark.parametrize("moves", [0, 1, 2, 3])
def test_a_folder_that_a_kill_left_half_moved_is_refused_and_can_be_written_again(
    moves: int, tmp_path: Path, dense: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_artefacts(dense, tmp_path / "net", EXAMPLE)
    replace_file, moved = Path.replace, []

    def dies(path: Path, target: Path) -> Path:
        if tmp_path / "net" == target.parent:
            if len(moved) == moves:
                raise KeyboardInterrupt
            moved.append(path.name)
        return replace_file(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            write_artefacts(dense, tmp_path / "net", EXAMPLE)
    with pytest.raises(ArtefactError):
        checked_manifest(tmp_path / "net")

    write_artefacts(dense, tmp_path / "net", EXAMPLE)

    checked_manifest(tmp_path / "net")


def test_writing_again_leaves_no_plan_of_the_earlier_network(
    tmp_path: Path, dense: nn.Module, result: PruneResult
) -> None:
    write_artefacts(result.model, tmp_path / "net", EXAMPLE, plan=result.plan)

    files = write_artefacts(dense, tmp_path / "net", EXAMPLE)

    names = ["manifest.json", "model.json", "model.onnx", "model.safetensors"]
    assert names == sorted(path.name for path in (tmp_path / "net").iterdir())
    assert tmp_path / "net" / "model.onnx" == files.onnx == files.export.path


DRAFT_OF_A_KILLED_RUN = """
import os, sys
from pathlib import Path
from nni_prune_ext.export.artefact_folder import complete_or_absent
with complete_or_absent(Path(sys.argv[1])) as draft:
    (draft / "model.onnx").write_text("half")
    print(draft.parent.name, flush=True)
    os._exit(9)
"""


@pytest.fixture(scope="module")
def killed_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a process that was killed while it wrote has left."""
    place = tmp_path_factory.mktemp("killed")
    subprocess.run([sys.executable, "-c", DRAFT_OF_A_KILLED_RUN, str(place / "net")], check=False)
    (draft,) = place.iterdir()
    return draft


def put(draft: Path, folder: Path, name: str | None = None) -> Path:
    """Copies a draft, under a name of its own if one is given."""
    return Path(shutil.copytree(draft, folder / (name or draft.name), symlinks=True))


def test_the_draft_of_a_killed_run_goes_when_the_next_one_writes_there(tmp_path: Path, killed_draft: Path) -> None:
    put(killed_draft, tmp_path)

    with complete_or_absent(tmp_path / "net") as draft:
        (draft / "plan.json").write_text("{}")
        assert draft.parent.name.startswith(f".unfinished-{socket.gethostname()}-{os.getpid()}-")

    assert ["net"] == [path.name for path in tmp_path.iterdir()]
    assert ["plan.json"] == [path.name for path in (tmp_path / "net").iterdir()]


def without_marker(draft: Path) -> None:
    for path in draft.iterdir():
        if path.is_file():
            path.unlink()


def with_a_letter(draft: Path) -> None:
    (draft / "letter.txt").write_text("mine")


def renamed(old: str, new: str) -> Callable[[Path], None]:
    """Gives a draft another name, and its marker the same one: only that part of the proof is missing."""

    def rename(draft: Path) -> None:
        name = draft.name.replace(old, new)
        for path in draft.iterdir():
            if path.is_file():
                path.write_text(path.read_text().replace(draft.name, name))
        draft.rename(draft.with_name(name))

    return rename


def linked(draft: Path) -> None:
    draft.rename(draft.with_name("elsewhere"))
    draft.symlink_to(draft.with_name("elsewhere"), target_is_directory=True)


LOOK_ALIKES: dict[str, Callable[[Path], object]] = {
    "no marker": without_marker,
    "other files beside the marker": with_a_letter,
    "another host": renamed(socket.gethostname(), "elsewhere"),
    "a living process": lambda draft: renamed(draft.name.split("-")[-2], str(os.getppid()))(draft),
    "no process": lambda draft: renamed(f"-{draft.name.split('-')[-2]}-", "-x-")(draft),
    "another random part": lambda draft: renamed(draft.name.rpartition("-")[2], "vol 1")(draft),
    "renamed, with the marker of the old name": lambda draft: draft.rename(
        draft.with_name(draft.name[:-1] + ("b" if draft.name.endswith("a") else "a"))
    ),
    "a link": linked,
    "a novel": lambda draft: (without_marker(draft), draft.rename(draft.with_name(".unfinished-novel"))),
}  # fmt: skip


@pytest.mark.parametrize("kind", LOOK_ALIKES)
def test_folders_that_look_like_drafts_of_killed_runs_stay_however_old(
    kind: str, tmp_path: Path, killed_draft: Path
) -> None:
    LOOK_ALIKES[kind](put(killed_draft, tmp_path))
    for path in [*tmp_path.rglob("*"), *tmp_path.iterdir()]:
        os.utime(path, (0, 0))
    before = sorted(tmp_path.rglob("*"))

    check_writable(tmp_path / "net")
    with complete_or_absent(tmp_path / "net"):
        pass

    assert [*before, tmp_path / "net"] == sorted(tmp_path.rglob("*"), key=lambda path: (path.name == "net", path))


@pytest.mark.parametrize("check", [check_writable, check_unused])
def test_checking_a_place_removes_nothing_and_leaves_nothing(
    check: Callable[[Path], None], tmp_path: Path, killed_draft: Path
) -> None:
    put(killed_draft, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    check(tmp_path / "new" / "out")
    check(tmp_path)  # the draft of a killed run is no use of the folder

    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_folder_that_holds_a_look_alike_is_in_use(tmp_path: Path) -> None:
    (tmp_path / ".unfinished-novel").mkdir()

    with pytest.raises(OutputError, match="unfinished-novel"):
        check_unused(tmp_path)


def test_the_manifest_is_the_first_file_to_come_and_the_last_to_go(
    tmp_path: Path, dense: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_artefacts(dense, tmp_path / "net", EXAMPLE)
    order: list[str] = []
    replace_file, unlink = Path.replace, Path.unlink
    monkeypatch.setattr(
        Path, "replace", lambda path, target: order.append(f"+{target.name}") or replace_file(path, target)
    )
    monkeypatch.setattr(
        Path, "unlink", lambda path, missing_ok=False: order.append(f"-{path.name}") or unlink(path, missing_ok)
    )

    write_artefacts(dense, tmp_path / "net", EXAMPLE)

    ours = [step for step in order if step[1:] in ("manifest.json", "model.json", "model.onnx", "model.safetensors")]
    assert ["-model.json", "-model.onnx", "-model.safetensors", "-manifest.json"] == ours[-8:-4]
    assert ["+manifest.json", "+model.json", "+model.onnx", "+model.safetensors"] == ours[-4:]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_with_the_way_on(
    code: int, tmp_path: Path, dense: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)

    with pytest.raises(OutputError, match=r"no space left.*Make space.*--resume") as caught:
        write_artefacts(dense, tmp_path / "net", EXAMPLE)

    assert "reate the folder" not in str(caught.value)
    assert [] == list(tmp_path.iterdir())


def test_the_date_in_a_file_can_be_fixed(dense: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")

    facts = provenance(dense, {}, opset=18, exporter="dynamo", extra={})

    assert "1970-01-01T00:00:00+00:00" == facts["nni_prune_ext.created"]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "today")
    with pytest.raises(ConfigError, match="today"):
        provenance(dense, {}, opset=18, exporter="dynamo", extra={})


def test_rows_say_what_each_network_is_and_how_many_weights_a_mask_holds_at_zero(
    tmp_path: Path, dense: nn.Module, result: PruneResult, quick: None
) -> None:
    masks = {"3.bias": torch.tensor([True, False, True, True, False])}
    network = copy.deepcopy(result.model)
    network.load_state_dict({**network.state_dict(), "3.bias": masks["3.bias"].float()})
    masked = replace(result, outcome=replace(result.outcome, weight_masks=masks))

    rows, *_ = compare_variants(
        [Variant("dense", dense), Variant("longer", dense), Variant("l1", network, masked, options={"steps": 1})],
        tmp_path,
        EXAMPLE,
    )

    assert ["dense", "control", "pruned"] == [row.kind for row in rows]
    assert [None, None, 2 / result.costs.params] == [row.weight_sparsity for row in rows]
    assert MethodUse(name="l1", options={"steps": 1}) == read_manifest(tmp_path / "l1").method
    assert read_manifest(tmp_path / "dense").method is None
    assert torch.equal(masks["3.bias"], load_masks(tmp_path / "l1")["3.bias"])


def test_latency_is_measured_as_long_as_asked_or_not_at_all(tmp_path: Path, dense: nn.Module) -> None:
    rows, latency, _ = compare_variants(
        [Variant("dense", dense)], tmp_path, EXAMPLE, measurement=Measurement(rounds=3, min_seconds=0.0)
    )
    unmeasured, none, _ = compare_variants([Variant("dense", dense)], tmp_path, EXAMPLE, measurement=None)

    assert latency is not None
    assert (3, latency.rows[0].p50_ms) == (latency.rounds, rows[0].latency_ms)
    assert (None, None) == (none, unmeasured[0].latency_ms)
    assert "latency: not measured; no data given: accuracy not measured" == latency_caption(none, without_data=True)
    assert measurement_facts(none)["latency"] is None
