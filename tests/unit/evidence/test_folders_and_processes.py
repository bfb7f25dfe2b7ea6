"""Networks read back from artefact folders, and what fresh processes measure of them."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import onnx
import pytest
import torch

import nni_prune_ext as npe
from nni_prune_ext.errors import ArtefactError, ConfigError, ModelError, RuntimeUnavailableError
from nni_prune_ext.evidence import FreshTask, common_shape, fresh_process, measure_fresh, networks, read_networks
from nni_prune_ext.evidence.fresh_process import FreshResult, run_task
from nni_prune_ext.evidence.networks import rebuilt
from nni_prune_ext.export import artefact_writing
from nni_prune_ext.export.artefact_folder import ModelSpec
from nni_prune_ext.export.manifest import write_manifest

EXAMPLE = torch.zeros(1, 1, 16, 16)
SPEC = ModelSpec(model="resnet20", num_classes=10, input_shape=(1, 1, 16, 16))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense and a pruned network in their folders, an ONNX file alone, and a folder that names unknown code."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    dense = npe.build_model("resnet20", in_channels=1).eval()
    result = npe.prune(dense, EXAMPLE, target="macs=0.5")
    with pytest.MonkeyPatch.context() as quick:
        exported = partial(artefact_writing.export_onnx, exporter="torchscript")
        quick.setattr(artefact_writing, "export_onnx", exported)
        npe.write_artefacts(dense, folder / "dense", EXAMPLE, spec=SPEC)
        npe.write_artefacts(result.model, folder / "pruned", EXAMPLE, plan=result.plan, spec=SPEC)
        strange = SPEC.model_copy(update={"model": "cifar:nni_prune_ext.models.cifar_resnet:resnet20"})
        npe.write_artefacts(dense, folder / "strange", EXAMPLE, spec=strange)
    (folder / "alone.onnx").write_bytes((folder / "pruned" / "model.onnx").read_bytes())
    return folder


def test_folders_give_modules_with_their_costs_and_files_alone_say_why_not(place: Path) -> None:
    dense, pruned, alone = read_networks([place / name for name in ("dense", "pruned", "alone.onnx")])

    assert ["dense", "pruned", "alone.onnx"] == [dense.name, pruned.name, alone.name]
    for network in (dense, pruned):
        assert network.module is not None
        assert not network.module.training
        assert npe.count_costs(network.module, EXAMPLE).macs == network.macs
        assert npe.check_parity(network.module, network.onnx_path, EXAMPLE).passed
    assert 0.45 < pruned.macs / dense.macs <= 0.5  # type: ignore[operator]
    assert (None, None, networks.NO_FOLDER) == (alone.module, alone.macs, alone.no_module)
    assert pruned.size_bytes == alone.size_bytes == (place / "alone.onnx").stat().st_size
    assert (None, 1, 16, 16) == common_shape([dense, pruned, alone], [1, 2])


def test_no_folder_decides_what_code_is_imported(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "build_model", lambda *_, **__: pytest.fail("code of the folder was run"))

    (network,) = read_networks([place / "strange"])

    assert network.module is None
    assert "no folder decides what code is imported. If you trust that code, pass --model cifar:" in network.no_module


def test_code_that_is_named_by_the_user_is_built(place: Path) -> None:
    (network,) = read_networks([place / "strange"], model="nni_prune_ext.models.cifar_resnet:resnet20")

    assert network.module is not None


def test_a_model_named_by_the_user_that_does_not_fit_is_an_error(place: Path) -> None:
    with pytest.raises(ModelError, match="no built-in model 'resnet21'"):
        read_networks([place / "dense"], model="resnet21")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("resnet20", True),
        ("cifar:resnet20", True),
        ("torchvision:resnet18", True),
        ("timm:resnet18", True),
        ("timm:hf-hub:somebody/net", False),
        ("timm:local-dir:somewhere", False),
        ("my.code:build", False),
        ("cifar:my.code:build", False),
        ("torchvision", False),
    ],
)
def test_only_names_of_known_libraries_are_trusted(name: str, known: bool) -> None:
    assert known == networks._is_known(name)


def test_a_folder_that_does_not_say_how_its_model_is_built_is_explained(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "net"
    folder.mkdir()
    for part in ("model.onnx", "model.safetensors"):
        (folder / part).write_bytes((place / "dense" / part).read_bytes())
    write_manifest(folder)

    with pytest.raises(ArtefactError, match=r"does not say how its model is built. Name it with --model"):
        rebuilt(folder)
    assert "does not say how" in read_networks([folder])[0].no_module


def test_weights_are_drawn_without_touching_the_random_numbers_of_others(place: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)

    rebuilt(place / "dense")

    assert expected == torch.rand(1)


def test_a_file_with_an_open_image_size_is_refused(tmp_path: Path) -> None:
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 1, "H", 8]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "relu", ports[:1], ports[1:])
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "open.onnx"))

    with pytest.raises(ConfigError, match=r"\(N, 1, N, 8\), expected only the first size to be open"):
        read_networks([tmp_path / "open.onnx"])


def task(place: Path, runtime: str, **more: object) -> FreshTask:
    values = {"runtime": runtime, "onnx_path": place / "pruned" / "model.onnx", "input_shape": (1, 16, 16)}
    return FreshTask.model_validate({**values, **more})


@pytest.mark.parametrize("runtime", ["onnxruntime-cpu", "torch-eager"])
def test_a_process_measures_load_first_run_and_a_peak_that_never_falls_with_the_batch(
    place: Path, runtime: str
) -> None:
    folder = place / "pruned" if runtime == "torch-eager" else None

    found = run_task(task(place, runtime, folder=folder, batches=(1, 4, 64)))

    assert found.load_ms > 0
    assert found.first_run_ms > 0
    peaks = list(found.host_peak_bytes.values())
    assert [1, 4, 64] == list(found.host_peak_bytes)
    if sys.platform == "linux":
        assert sorted(peaks) == peaks  # type: ignore[type-var]
        assert peaks[-1] > 64 * 16 * 16 * 16 * 4  # type: ignore[operator]  # one feature map of the stem at least


def test_where_the_system_does_not_say_memory_is_unknown_not_zero(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fresh_process, "_STATUS", tmp_path / "absent")
    monkeypatch.setattr(fresh_process, "_RESET_PEAK", tmp_path / "absent" / "either")

    assert {1: None} == run_task(task(place, "onnxruntime-cpu")).host_peak_bytes


def test_a_real_process_does_the_task(place: Path) -> None:
    runs = measure_fresh(task(place, "torch-eager", folder=place / "pruned"), 1)

    assert 1 == runs.processes
    assert runs.cold_start_ms == pytest.approx(runs.load_ms + runs.first_run_ms)


def test_medians_are_taken_over_processes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([(1.0, 9.0, 30), (2.0, 1.0, 10), (5.0, 2.0, 20)])

    def in_a_process(_: FreshTask) -> FreshResult:
        load, first, peak = next(found)
        return FreshResult(load_ms=load, first_run_ms=first, host_peak_bytes={1: peak})

    monkeypatch.setattr(fresh_process, "_in_a_process", in_a_process)

    runs = measure_fresh(task(place, "onnxruntime-cpu"), 3)

    assert (7.0, 2.0, 2.0, {1: 20}) == (runs.cold_start_ms, runs.load_ms, runs.first_run_ms, runs.host_peak_bytes)


def test_a_process_that_fails_says_why_and_starts_with_empty_caches(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, str] = {}

    def fail(command: list[str], **options: object) -> None:
        seen.update(options["env"])  # type: ignore[call-overload]
        raise subprocess.CalledProcessError(1, command, stderr="Traceback\nModelError: it is broken.\n")

    monkeypatch.setattr(fresh_process.subprocess, "run", fail)

    with pytest.raises(RuntimeUnavailableError, match=r"not run the network: ModelError: it is broken\. Expected"):
        measure_fresh(task(place, "onnxruntime-cpu"), 1)
    assert seen["TORCHINDUCTOR_CACHE_DIR"] == seen["TRITON_CACHE_DIR"] != ""
    assert not Path(seen["TRITON_CACHE_DIR"]).exists()


def test_a_process_that_hangs_is_ended(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **options: object) -> None:
        raise subprocess.TimeoutExpired(command, 900)

    monkeypatch.setattr(fresh_process.subprocess, "run", hang)

    with pytest.raises(RuntimeUnavailableError, match="did not end within 900 s"):
        measure_fresh(task(place, "onnxruntime-cpu"), 1)
