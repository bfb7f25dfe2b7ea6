"""`benchmark` as a user meets it: what it measures, what it writes, and what it says to mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner, Result

from nni_prune_ext import deployment
from nni_prune_ext.cli.benchmark import benchmark
from nni_prune_ext.deployment import write_artefacts
from nni_prune_ext.errors import ArtefactError, ConfigError, ModelError, NniPruneExtError, UnknownPluginError
from nni_prune_ext.evidence import OutputParity, measuring
from nni_prune_ext.export.onnx_static import export_onnx
from nni_prune_ext.runtimes.onnxruntime_cpu import OnnxRuntimeCpu
from nni_prune_ext.runtimes.onnxruntime_cuda import OnnxRuntimeCuda

APP = typer.Typer()
APP.command()(benchmark)
QUICK = ["--rounds", "2", "--seconds", "0", "--fresh", "0"]
CPU = ["--on", "onnxruntime-cpu"]


def net(width: int, size: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * (size - 2) ** 2, 10))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    example = torch.zeros(1, 1, 16, 16)
    write_artefacts(net(16), folder / "wide", example)
    write_artefacts(net(2), folder / "narrow", example)
    export_onnx(net(4), example, folder / "loose.onnx", exporter="torchscript")
    export_onnx(net(2), example, folder / "fixed.onnx", exporter="torchscript", dynamic_batch=False)
    export_onnx(net(2, 8), torch.zeros(1, 1, 8, 8), folder / "small.onnx", exporter="torchscript")
    (folder / "text.onnx").write_text("not an ONNX file")
    return folder


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(APP, [str(argument) for argument in arguments], catch_exceptions=False)


def test_networks_are_measured_side_by_side_at_every_batch_size(place: Path, tmp_path: Path) -> None:
    found = run(place / "wide", place / "narrow", place / "loose.onnx", *CPU, "--batch", "1", "--batch", "4", *QUICK,
                "--out", tmp_path / "new" / "times.json")  # fmt: skip

    assert 0 == found.exit_code
    facts = json.loads((tmp_path / "new" / "times.json").read_text())
    assert [("onnxruntime-cpu", 1), ("onnxruntime-cpu", 4)] == [
        (m["runtime"], m["batch"]) for m in facts["measurements"]
    ]
    for measured in facts["measurements"]:
        rows = measured["latency"]["rows"]
        assert ["wide", "narrow", "loose.onnx"] == [row["name"] for row in rows]
        assert 1 == rows[0]["ratio"]
        assert all(0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] for row in rows)
        assert all(t["images_per_s"] > 0 and t["threads"] == 1 for t in measured["throughput"].values())
        assert {measured["batch"]} == {t["batch_size"] for t in measured["throughput"].values()}
    assert (place / "wide" / "model.onnx").stat().st_size == facts["networks"][0]["size_bytes"]
    assert {} == facts["accuracy"] == facts["parity"] == facts["fresh_processes"]
    assert [] == facts["not_measured"]
    assert facts["environment"]["cpu"]
    for word in ("onnxruntime-cpu, batch 4, input (N, 1, 16, 16)", "× first", "cpu time, 1 thread(s)", "mean nothing"):
        assert word in found.stdout


def test_a_wider_network_is_slower_than_the_first_one(place: Path) -> None:
    found = run(place / "narrow", place / "wide", *CPU, "--batch", "16", "--json", "--fresh", "0", "--seconds", "0.2",
                "--rounds", "20")  # fmt: skip

    narrow, wide = json.loads(found.stdout)["measurements"][0]["latency"]["rows"]
    assert 1 == narrow["ratio"] < wide["ratio"]


def test_with_data_accuracy_is_that_of_the_model_on_the_same_images(place: Path) -> None:
    from nni_prune_ext.data.batches import split_batches
    from nni_prune_ext.data.sources import open_data
    from nni_prune_ext.training import accuracy

    found = run(place / "narrow", *CPU, *QUICK, "--data", "digits", "--limit-images", "60", "--json")

    batches = split_batches(open_data("digits", limit=60), "test", 60)
    assert {"onnxruntime-cpu": {"narrow": accuracy(net(2), batches)}} == json.loads(found.stdout)["accuracy"]


def test_pytorch_and_onnx_runtime_are_on_one_page_with_parity_and_macs(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from torch import nn\ndef build():\n    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), "
    (tmp_path / "my_nets.py").write_text(code + "nn.Linear(392, 10))\n")
    monkeypatch.syspath_prepend(tmp_path)

    found = run(place / "narrow", *CPU, "--on", "torch-eager", *QUICK, "--model", "my_nets:build", "--batch", "2",
                "--out", tmp_path / "new", "--page", tmp_path / "pages" / "evidence.md")  # fmt: skip

    assert 0 == found.exit_code
    facts = json.loads((tmp_path / "new" / "evidence.json").read_text())
    assert {"onnxruntime-cpu", "torch-eager"} == {m["runtime"] for m in facts["measurements"]} == set(facts["parity"])
    assert facts["parity"]["torch-eager"]["narrow"]["max_rel"] <= 1e-6
    assert facts["parity"]["onnxruntime-cpu"]["narrow"]["max_rel"] <= 1e-5
    assert 2 * 14 * 14 * 9 + 392 * 10 == facts["networks"][0]["macs"]
    page = (tmp_path / "pages" / "evidence.md").read_text()
    assert all(word in page for word in ("| torch-eager | narrow | 2 |", "MACs × first", "torch-cpu 4", "fp32"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_pytorch_is_not_put_on_a_gpu_that_is_not_there(place: Path) -> None:
    with pytest.raises(ConfigError, match="PyTorch sees no CUDA device"):
        run(place / "narrow", *QUICK, "--device", "cuda")


def test_precision_and_clock_are_those_asked_for(place: Path) -> None:
    found = run(place / "narrow", *CPU, *QUICK, "--precision", "fp16", "--clock", "wall", "--json")

    facts = json.loads(found.stdout)
    assert ("fp16", "wall") == (facts["conditions"]["precision"], facts["measurements"][0]["latency"]["clock"])


def test_machines_get_one_object_and_nothing_else(place: Path) -> None:
    found = run(place / "narrow", *CPU, *QUICK, "--json")

    assert 1 == len(found.stdout.splitlines())
    assert ("done", 2, None) == tuple(json.loads(found.stdout)[key] for key in ("event", "format", "data"))


@pytest.mark.skipif(OnnxRuntimeCuda().availability().usable, reason="this machine has a GPU")
def test_a_runtime_asked_for_by_name_that_is_not_usable_is_stated_and_ends_with_exit_code_2(place: Path) -> None:
    found = run(place / "narrow", *CPU, "--on", "onnxruntime-cuda", *QUICK)

    assert 2 == found.exit_code
    assert f"not measured on onnxruntime-cuda: {OnnxRuntimeCuda().availability().reason}" in found.stderr
    assert "onnxruntime-cpu, batch 1" in found.stdout


def test_by_default_all_usable_runtimes_are_measured_and_the_others_stated(place: Path) -> None:
    found = run(place / "narrow", *QUICK)

    assert 0 == found.exit_code
    assert "onnxruntime-cpu, batch 1" in found.stdout
    table = " ".join(found.stdout.partition("NOT MEASURED")[2].replace("│", " ").split())
    assert "torch-eager narrow everything The runtime torch-eager needs a PyTorch module" in table
    assert "measured only if asked for: --on torch-compile" in table
    assert "does not say how its model is built" in table
    assert "not measured" not in found.stderr


def test_a_compiler_that_was_asked_for_is_tried(place: Path) -> None:
    found = run(place / "narrow", *QUICK, "--on", "torch-compile", "--json")

    [missing] = json.loads(found.stdout)["not_measured"]
    assert "narrow" == missing["network"]
    assert "needs a PyTorch module" in missing["reason"]


def test_if_nothing_can_be_measured_the_exit_code_is_2(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "runtime", lambda *_: Broken())

    found = run(place / "narrow", *QUICK)

    assert 2 == found.exit_code
    assert "cannot be used here. It is broken." in found.stderr


class Broken(OnnxRuntimeCpu):
    """Says that it is usable and then is not."""

    def session(self, *arguments: object, **options: object):
        from nni_prune_ext.errors import RuntimeUnavailableError

        raise RuntimeUnavailableError("It cannot be used here. It is broken.")


MISTAKES: dict[str, tuple[list[str], type[NniPruneExtError], str]] = {
    "nothing there": (["nowhere"], ConfigError, "nothing at 'nowhere'"),
    "folder that is no artefact": (["."], ArtefactError, "holds no manifest.json"),
    "file that is no ONNX": (["text.onnx"], ModelError, "text.onnx' cannot be read as ONNX"),
    "two input shapes": (["wide", "small.onnx"], ConfigError, r"\(N, 1, 8, 8\).*'wide' of \(N, 1, 16, 16\)"),
    "same network twice": (["wide", "wide"], ConfigError, "given twice"),
    "fixed batch": (["fixed.onnx", "--batch", "2"], ConfigError, "batch of 1 only.*--batch 1 alone"),
    "unknown runtime": (["wide", "--on", "onnxruntime-gpu"], UnknownPluginError, "Did you mean"),
    "images of another size": (["wide", "--data", "digits", "--image-size", "8"], ConfigError, "--image-size"),
    "fewer images than a batch": (
        ["wide", "--data", "digits", "--limit-images", "20", "--batch", "300"],
        ConfigError,
        "at least --batch 300",
    ),
    "page of another kind": (["wide", "--page", "page.pdf"], ConfigError, r"ends in '.pdf', expected .html or .md"),
    "option without runtime": (["wide", "--runtime-option", "a=1"], ConfigError, "Expected RUNTIME:KEY=VALUE"),
    "option of a runtime that is not measured": (
        ["wide", *CPU, "--runtime-option", "onnxruntime-cuda:cuda_graph=true"],
        ConfigError,
        "names 'onnxruntime-cuda', which is not measured.*Add --on onnxruntime-cuda",
    ),
    "option that a runtime does not have": (
        ["wide", *CPU, "--runtime-option", "onnxruntime-cpu:cuda_graph=true"],
        ConfigError,
        "has no option 'cuda_graph'",
    ),
    "CPU time of two threads": (["wide", "--clock", "cpu", "--threads", "2"], ConfigError, "counts one thread only"),
    "model that does not exist": (["wide", "--model", "resnet21"], ModelError, "no built-in model 'resnet21'"),
    "unreadable mean": (["wide", "--data", "digits", "--mean", "x"], ConfigError, "--mean 'x'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_before_anything_is_measured_or_written(
    mistake: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, error, message = MISTAKES[mistake]
    monkeypatch.chdir(place)

    with pytest.raises(error, match=message):
        run(*arguments, *QUICK, "--out", tmp_path / "times.json")

    assert [] == list(tmp_path.iterdir())


def test_numbers_that_json_does_not_know_are_null(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far = OutputParity(float("inf"), float("nan"), None, 1)
    monkeypatch.setattr(measuring.ParityCount, "result", lambda _: far)

    found = run(place / "narrow", *CPU, *QUICK, "--data", "digits", "--limit-images", "60", "--json",
                "--out", tmp_path / "times.json")  # fmt: skip

    for text in (found.stdout, (tmp_path / "times.json").read_text()):
        parity = json.loads(text, parse_constant=pytest.fail)["parity"]["onnxruntime-cpu"]["narrow"]
        assert {"max_rel": None, "mean_rel": None, "top1_agreement": None, "images": 1} == parity


def test_a_damaged_folder_is_not_measured(place: Path, tmp_path: Path) -> None:
    write_artefacts(net(2), tmp_path / "net", torch.zeros(1, 1, 16, 16))
    with (tmp_path / "net" / "model.onnx").open("ab") as file:
        file.write(b"\0")

    with pytest.raises(ArtefactError, match="damaged"):
        run(tmp_path / "net", *QUICK)


def test_a_network_with_a_fixed_batch_is_measured_at_it(place: Path) -> None:
    found = run(place / "fixed.onnx", place / "narrow", *CPU, *QUICK, "--json")

    assert [1, 1, 16, 16] == json.loads(found.stdout)["input_shape"]


def test_networks_of_one_name_are_told_apart_by_their_paths(place: Path, tmp_path: Path) -> None:
    write_artefacts(net(2), tmp_path / "narrow", torch.zeros(1, 1, 16, 16))

    found = run(place / "narrow", tmp_path / "narrow", *CPU, *QUICK, "--json")

    names = [network["name"] for network in json.loads(found.stdout)["networks"]]
    assert [str(place / "narrow"), str(tmp_path / "narrow")] == names
